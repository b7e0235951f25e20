"""`lighthouse eval` and `lighthouse compare`: what they are asked for, and what they cannot do."""

import json
import warnings

import pytest

from lighthouse_core.config import load_recipe
from lighthouse_core.runs.create import create_run


@pytest.fixture
def run(here):
    return create_run(load_recipe(here / "tiny.toml", ["data.validation=0.02"]), "tiny", "one")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nothing",), "nothing"),
        (("one", "--only", "los"), "--only knows loss, context"),
        (("one", "--set", "data.validation=0.5"), "--set changes the recipe that --recipe names"),
        (("exported",), "says nothing of held-out text"),
        (("exported", "--recipe", "tiny.toml", "--attention", "dense"), "--attention is for checkpoints"),
        (("exported", "--recipe", "tiny.toml", "--tokens", "4096", "--extrapolate"), "--extrapolate is for runs"),
        (("one", "--extrapolate"), "needs --tokens"),
        (("one",), "checkpoint"),
    ],
)
def test_what_it_cannot_measure(lighthouse, here, run, arguments, words):
    (here / "exported").mkdir()
    (here / "exported/config.json").write_text("{}")
    assert words in lighthouse("eval", *arguments).error


@pytest.fixture
def measured(monkeypatch, run):
    """What `evaluate` was asked for, on a model of a stage 1 or a dense one."""
    from lighthouse_core import evaluate
    from lighthouse_core.evaluate import load

    asked = []
    subject = type("Subject", (), {"name": "one step 4", "tokens": 1024, "model": None, "leaky": False})

    def measure(subject, data, **options):
        asked.append((data, options))
        mean = {"mean": 1.0, "standard_error": float("nan"), "sequences": 1}
        loss = {"nats_per_token": mean, "bits_per_byte": mean}
        return {"subject": subject.name, "leaky": False, "loss": loss, "by_position": []}

    monkeypatch.setattr(evaluate, "evaluate", measure)
    monkeypatch.setattr(evaluate, "plot", lambda report, folder: [])
    monkeypatch.setattr(load, "load_checkpoint", lambda path, **options: (subject, run.recipe))
    return asked, subject


def test_bits_per_byte_that_are_not_known_are_not_shown(lighthouse, monkeypatch, measured):
    from lighthouse_core import evaluate

    known = evaluate.evaluate

    def unknown(*given, **options):
        report = known(*given, **options)
        return report | {"loss": report["loss"] | {"bits_per_byte": None}}

    shown = lighthouse("eval", "one", "--context", "128")
    assert "1.0000 nats per token, 1.0000 bits per byte" in shown.out and "unknown" not in shown.err
    assert "without ± is of one sequence" in shown.err
    monkeypatch.setattr(evaluate, "evaluate", unknown)
    shown = lighthouse("eval", "one", "--context", "128", "--out", "other")
    assert shown.code == 0 and "bits per byte" not in shown.out and "bits per byte are unknown" in shown.err


def test_of_a_dense_model_no_leak_is_measured_unasked(lighthouse, run, measured):
    asked, subject = measured
    assert lighthouse("eval", "one", "--context", "128").code == 0
    assert asked[-1][1]["measures"] == ("loss", "context", "needles") and asked[-1][1]["tokens"] == 1024
    subject.model = object()
    assert lighthouse("eval", "one").code == 0
    # A context of 2048 is not shorter than the sequences.
    assert asked[-1][1]["measures"] == ("loss", "leak", "switch", "needles")
    assert lighthouse("eval", "one", "--only", "leak", "--tokens", "512").code == 0
    assert asked[-1][1]["measures"] == ("leak",) and asked[-1][1]["tokens"] == 512


def test_numbers_go_to_stdout_and_into_the_run(lighthouse, run, measured):
    done = lighthouse("eval", "one", "--json")
    report = json.loads(done.out)
    # JSON has no NaN.
    assert report["loss"]["nats_per_token"]["standard_error"] is None
    assert json.loads((run.path / "eval/one-step-4/results.json").read_text()) == report
    assert "written to" in done.err and "matplotlib" not in done.err
    assert lighthouse("eval", "one", "--only", "leak").code == 0
    assert {path.name for path in (run.path / "eval").iterdir()} == {"one-step-4", "one-step-4-leak"}


def test_text_that_was_trained_on_is_refused(lighthouse, here, run, measured):
    wrong = lighthouse("eval", "one", "--recipe", "tiny.toml", "--set", "data.validation=0.5")
    assert "trained on this text, on all but 2.00% of its documents, and 50.00% of them" in wrong.error
    (here / "other").mkdir()
    for number in range(20):
        (here / f"other/{number}").mkdir()
        (here / f"other/{number}/a.py").write_text(f"print('of nobody but {number}')")
    other = ["--recipe", "tiny.toml", "--set", "data.validation=0.5", "--set", f'data.paths=["{here}/other"]']
    assert lighthouse("eval", "one", *other).code == 0


def test_a_recipe_that_holds_no_text_out_is_named(lighthouse, run, measured):
    wrong = lighthouse("eval", "one", "--recipe", "tiny.toml", "--set", "data.validation=0")
    assert wrong.code == 2 and wrong.error == "error: tiny.toml holds no text out"
    assert "--set data.validation=0.05" in wrong.err


def test_a_recipe_that_could_not_be_trained_names_text_all_the_same(lighthouse, here, run, measured):
    """Its method keeps no documents apart: the model that is measured does."""
    text = (here / "tiny.toml").read_text().replace('packing = "concat"', 'packing = "documents"')
    (here / "other.toml").write_text(text)
    arguments = ("--recipe", "other.toml", "--set", "data.validation=0.01")
    assert 'data.packing "documents", the default, is not for' in lighthouse("pretrain", "other.toml").error
    assert lighthouse("eval", "one", *arguments).code == 0
    assert measured[0][-1][0].packing == "documents"


def test_runs_without_a_step_are_not_compared(lighthouse, run):
    assert "no logged step" in lighthouse("compare", "one").error


def test_documents_that_are_kept_apart(lighthouse, here):
    import torch
    import torch.distributed.checkpoint as dcp

    from lighthouse_core.models.decoder import build_dense_model
    from lighthouse_core.seal import seal

    (here / "text.jsonl").write_text("".join(json.dumps({"text": "ab c" * (i % 37)}) + "\n" for i in range(400)))
    settings = ['data.source="files"', f'data.paths=["{here}/text.jsonl"]', "data.validation=0.5",
                'data.packing="documents"', 'lighthouse.method="sliding"', "lighthouse.window=16", "model.dim=16",
                "training.seq_len=128"]  # fmt: skip
    run = create_run(load_recipe(here / "tiny.toml", settings), "tiny", "one")
    model = build_dense_model(run.recipe.model, 128)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        model.init_weights()
        dcp.save(dict(model.named_parameters()), checkpoint_id=run.checkpoint_dir(10), no_dist=True)
    seal(run.checkpoint_dir(10))
    shown = lighthouse("eval", "one", "--sequences", "2", "--context", "32", "--trials", "1")
    assert shown.code == 0 and "documents apart" in shown.err
    assert "leak across documents" in shown.out and "earlier" in shown.out
    # Some bins have a token of one sequence alone.
    assert "nan" not in shown.out and " ± " in shown.out and "without ± is of one sequence" in shown.err
    report = json.loads(
        (run.path / "eval/one-step-10-Lighthouse-attention-sliding-window-16-/results.json").read_text()
    )
    assert report["data"]["packing"] == "documents" and report["tokens"] == 128
    assert [row["largest"] for row in report["leak_across"]] == [0, 0]
