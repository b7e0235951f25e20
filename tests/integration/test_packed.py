"""A run whose documents are kept apart, through the command line: the same on any number of processes and in any
micro-batches, with and without an interruption, and to its export."""

import shutil
from pathlib import Path

import jobs
import pytest
import torch
from test_pipeline import succeed
from torch.nn.functional import cross_entropy

from lighthouse_core.attention.context import AttentionContext, selection_keys
from lighthouse_core.data.loader import build_loader
from lighthouse_core.estimate import flops_per_token
from lighthouse_core.models.decoder import Decoder, DecoderArgs, use_lighthouse
from lighthouse_core.runs.run import Run

TINY = [
    *(setting for setting in jobs.TINY if "validation_batches" not in setting),
    *('data.packing="documents"', 'data.source="files"', 'data.paths=["texts.jsonl"]', "data.validation=0.2"),
    *("lighthouse.window=32", "training.steps=4", "recover.steps=2", "training.deterministic=true"),
    *("checkpoint.interval=2", "checkpoint.keep=0", "metrics.validation_batches=2", "metrics.tensorboard=false"),
]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    jobs.write_texts(folder / "texts.jsonl")
    return folder


def pretrain(workspace: Path, name: str, *settings: str, more: tuple[str, ...] = ()) -> Path:
    options = jobs.options(*TINY, *settings)
    succeed("pretrain", str(jobs.RECIPE), "--name", name, *options, *more, cwd=workspace)
    return workspace / "runs" / name


@pytest.fixture(scope="module")
def one(workspace):
    run = pretrain(workspace, "one", more=("--nproc", "1", "--measure-dense"))
    shutil.copytree(run, workspace / "runs/resumed")
    return run


def first_batch(recipe):
    """The micro-batches of one process in the first step, of one sequence each."""
    assert recipe.training.local_batch_size == 1
    training = recipe.training
    loader = build_loader(recipe.data, training.seq_len, 1, 0, 1, training.seed, align=recipe.alignment, prefetch=0)
    batches = iter(loader)
    return [next(batches) for _ in range(training.global_batch_size)]


def test_the_loss_is_the_mean_over_the_labels_that_count(one, workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    recipe = Run(one).recipe
    training, model = recipe.training, recipe.model
    built = Decoder(DecoderArgs.of(model, training.seq_len, seed=training.seed))
    with torch.no_grad():
        built.init_weights()
    use_lighthouse(built, recipe.phases[-1].attention, model.dense_layers)
    losses, lengths, ignored = [], [], 0
    for sample, (inputs, labels) in enumerate(first_batch(recipe)):
        key = selection_keys(training.seed, 1, sample, model.layers)
        context = AttentionContext(key=key, documents=inputs["documents"], positions=inputs["positions"])
        with torch.no_grad():
            logits = built(inputs["input"], context=context)[0]
        counted = labels[0] != -100
        ignored += int((~counted).sum())
        losses.append(cross_entropy(logits[counted], labels[0][counted], reduction="none"))
        lengths += [length for length in inputs["documents"].starts.diff().tolist() if length]
    row = jobs.rows(one)[1]
    assert ignored > 20 and len(lengths) > 8
    assert row["loss"] == pytest.approx(torch.cat(losses).double().mean().item(), rel=1e-5)
    assert row["flops_per_token"] == flops_per_token(recipe, "lighthouse", (1, 1), lengths)
    assert row["dense_flops_per_token"] == flops_per_token(recipe, "dense", lengths=lengths)
    assert row["flops_per_token"] < flops_per_token(recipe, "lighthouse")


def test_two_processes_and_other_micro_batches_give_the_same(one, workspace):
    two = pretrain(workspace, "two", "training.local_batch_size=2", more=("--nproc", "2"))
    for key in ("loss", "grad_norm", "val_loss", "flops_per_token", "dense_flops_per_token"):
        expected, seen = jobs.rows(one, key), jobs.rows(two, key)
        assert expected.keys() >= seen.keys() and {4} <= seen.keys()
        for step, row in seen.items():
            assert row[key] == pytest.approx(expected[step][key], rel=1e-5), (key, step)
    ours, theirs = (jobs.load(run / "checkpoints/step-4") for run in (one, two))
    weights = [place for place in ours if place.startswith(("layers", "output", "tok_embeddings"))]
    assert len(weights) > 10
    for place in weights:
        torch.testing.assert_close(theirs[place], ours[place], rtol=0, atol=2e-6)


@pytest.mark.slow
def test_a_resumed_run_repeats_an_uninterrupted_one(one, workspace):
    resumed = workspace / "runs/resumed"
    shutil.rmtree(resumed / "checkpoints/step-4")
    succeed("pretrain", "--resume", "resumed", cwd=workspace)
    for key in ("loss", "grad_norm", "val_loss", "flops_per_token"):
        expected = {step: row[key] for step, row in jobs.rows(one, key).items() if step <= 4}
        assert {step: row[key] for step, row in jobs.rows(resumed, key).items()} == expected and expected
    assert not jobs.differences(*(jobs.load(run / "checkpoints/step-4") for run in (one, resumed)))


@pytest.mark.slow
def test_recovery_goes_on_with_documents_and_its_export_is_verified(one, workspace):
    resumed = workspace / "runs/resumed"
    succeed("recover", "resumed", cwd=workspace)
    recipe, rows = Run(resumed).recipe, jobs.rows(resumed)
    assert recipe.data.packing == "documents" and recipe.alignment == 16
    assert [rows[step]["stage"] for step in (5, 6)] == ["dense"] * 2
    assert all(rows[step]["flops_per_token"] == rows[step]["dense_flops_per_token"] for step in (5, 6))
    ledger = Run(resumed).ledger
    assert ledger["stages"][0]["measured_dense"]["seconds"] > 0
    mean = sum(rows[step]["flops_per_token"] for step in (1, 2, 3, 4)) / 4
    assert ledger["stages"][0]["flops"] == pytest.approx(mean * 4 * 4 * 512)
    pytest.importorskip("transformers")
    done = succeed("strip", "resumed", "out", cwd=workspace)
    assert "logits equal the trainer's" in done.stderr and (workspace / "out/config.json").exists()
