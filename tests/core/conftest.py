"""Tokenizers from files, made once."""

import sys
from pathlib import Path

import pytest


@pytest.fixture
def short_samples(monkeypatch):
    """Exports are compared on fewer texts; those of test_export_tokenizer.py on all of them."""
    monkeypatch.setattr("lighthouse_core.export.tokenizer._SAMPLE_BYTES", 50_000)


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory) -> Path:
    """A directory of Python sources: a few hundred kilobytes of the standard library."""
    out = tmp_path_factory.mktemp("sources")
    stdlib = Path(sys.modules["json"].__file__).parents[1]
    for number, name in enumerate(("json", "email", "logging", "html", "http", "unittest", "asyncio", "importlib")):
        (out / name).mkdir()
        for file in sorted((stdlib / name).glob("*.py"))[:12]:
            # Tabs and CRLF occur, so that pieces hold them.
            text = file.read_text(encoding="utf-8")
            text = {1: text.replace("\n", "\r\n"), 2: text.replace("    ", "\t")}.get(number, text)
            (out / name / file.name).write_bytes(text.encode())
    return out


@pytest.fixture(scope="session")
def sources(text_dir):
    """A `[data]` section over text_dir."""
    from lighthouse_core.config.data import DataSection

    return DataSection(source="python-sources", paths=(str(text_dir),), validation=0.2)


@pytest.fixture(scope="session")
def spm(sources, tmp_path_factory) -> Path:
    """A sentencepiece model of `lighthouse tokenizer train`."""
    from lighthouse_core.data.tokenizers.train import train_tokenizer

    out = tmp_path_factory.mktemp("trained") / "small.model"
    train_tokenizer(sources, out, 1500, 400_000)
    return out


@pytest.fixture(scope="session")
def foreign_spm(tmp_path_factory):
    """Makes sentencepiece models with other settings."""
    import io

    from sentencepiece import SentencePieceTrainer

    folder = tmp_path_factory.mktemp("foreign")

    def make(name: str, **settings) -> Path:
        path = folder / f"{name}.model"
        if not path.exists():
            content = io.BytesIO()
            base = dict(
                model_type="bpe",
                vocab_size=340,
                hard_vocab_limit=False,
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                minloglevel=3,
            )
            SentencePieceTrainer.train(
                sentence_iterator=iter(["the cat sat on the mat with  the other cats", "def f(x): return x + 1"] * 50),
                model_writer=content,
                **base | settings,
            )
            path.write_bytes(content.getvalue())
        return path

    return make
