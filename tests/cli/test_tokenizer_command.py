"""lighthouse tokenizer train."""

import os
import signal

from lighthouse_core.data.tokenizer import build_tokenizer
from lighthouse_core.data.tokenizers import train


def test_train(lighthouse, here, tmp_path):
    (here / "src").mkdir()
    (here / "src" / "a.py").write_text("\n".join(f"def f{i}(x):\n    return x + {i}  # add" for i in range(200)))
    settings = ("--set", 'data.paths=["src"]', "--set", "data.validation=0.0", "--set", 'data.tokenizer="my.model"')
    done = lighthouse("tokenizer", "train", "tiny.toml", "my.model", "--vocab", "310", *settings)
    assert done.code == 0 and done.out == "my.model\n", done
    assert "310 pieces" in done.err and "bytes per token" in done.err and "training text" in done.err
    assert build_tokenizer("my.model").vocab_size == 310

    again = lighthouse("tokenizer", "train", "tiny.toml", "my.model", "--vocab", "310", *settings)
    assert "my.model exists" in again.error


def test_mistakes(lighthouse, here):
    assert "no recipe nothing" in lighthouse("tokenizer", "train", "nothing", "a.model").error
    assert ".model" in lighthouse("tokenizer", "train", "tiny.toml", "a.txt").error
    assert "data.sauce" in lighthouse("tokenizer", "train", "tiny.toml", "a.model", "--set", "data.sauce=1").error
    assert not (here / "a.model").exists()


def test_an_interruption_leaves_no_file(lighthouse, here, monkeypatch):
    def send(model, data):
        assert model.is_file()
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train, "_measure", send)
    (here / "a.py").write_text("\n".join(f"def f{i}(x): return x + {i}" for i in range(200)))
    done = lighthouse("tokenizer", "train", "tiny.toml", "a.model", "--vocab", "290", "--set", 'data.paths=["."]')
    assert done.code == 130 and "Traceback" not in done.err
    assert sorted(path.name for path in here.iterdir()) == ["a.py", "tiny.toml"]
