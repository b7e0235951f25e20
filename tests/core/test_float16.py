"""Training in float16: the loss scale, alone and in whole runs, and the attention call of large numbers."""

import contextlib
import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from forked import spawn

from lighthouse_core import LighthouseConfig, dense_attention, lighthouse_attention
from lighthouse_core.checkpoint import read_contents
from lighthouse_core.checkpoint_reader import load
from lighthouse_core.config import load_recipe
from lighthouse_core.errors import CheckpointError, ExportError, TrainingError, UserError
from lighthouse_core.estimate import estimate
from lighthouse_core.export import strip
from lighthouse_core.job import stop
from lighthouse_core.job.environment import MEETING
from lighthouse_core.models.decoder import Head
from lighthouse_core.runs.create import create_run
from lighthouse_core.runs.run import Run
from lighthouse_core.titan import scaling, trainer
from lighthouse_core.titan.guard import Guard
from lighthouse_core.titan.scaling import INITIAL, LossScale
from lighthouse_core.weights.checkpoint import find_source

# The scale and the guard


class Job:
    """A small model trained in float32 under a loss scale; `train` takes what to spoil: "", "gradient" or "loss"."""

    def __init__(self, policy="halt", limit=3, scale=INITIAL):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(5, 5)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, fused=True)
        self.scale = LossScale(torch.device("cpu"))
        self.scale.factor.fill_(scale)
        self.guard = Guard(policy, limit, 4, [self.optimizer], torch.device("cpu"), scale=self.scale)
        self.step = 0

    def train(self, *spoiled):
        for spoil in spoiled:
            self.step += 1
            self.optimizer.zero_grad()
            loss = self.model(torch.linspace(0, 1, 5) * self.step).square().sum()
            (loss * self.scale.factor).backward()
            if spoil == "gradient":
                self.model.weight.grad[2, 3] = float("inf")
            self.scale.unscale(self.model.parameters())
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.guard.see(loss * float("nan") if spoil == "loss" else loss)
            self.guard.judge(self.step, norm)
            self.optimizer.step()
            self.guard.check(self.step, 1)
            self.guard.look()

    @property
    def weights(self):
        return [x.detach().clone() for x in self.model.parameters()]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_scale_changes_no_bit_of_a_good_step():
    jobs = [Job(scale=scale) for scale in (1.0, INITIAL, 2.0**40)]
    for job in jobs:
        job.train("", "", "")
    assert all(same(job.weights, jobs[0].weights) for job in jobs)


def test_an_overflow_leaves_out_the_update_and_halves_the_scale_under_halt_too(caplog):
    caplog.set_level("INFO")
    job = Job("halt")
    job.train("", "")
    before = job.weights
    job.train("gradient")
    assert same(job.weights, before) and job.scale.state_dict() == {"factor": INITIAL / 2, "good": 0, "skipped": 1}
    job.train("", "")
    assert not same(job.weights, before) and job.scale.state_dict() == {"factor": INITIAL / 2, "good": 2, "skipped": 1}
    (words,) = (record.getMessage() for record in caplog.records)
    assert words.startswith("step 3: the gradient overflowed")


def test_the_scale_follows_the_rule_of_torch(monkeypatch):
    monkeypatch.setattr(scaling, "INTERVAL", 3)
    job, theirs = Job(), torch.amp.GradScaler("cpu", init_scale=INITIAL, growth_interval=3)
    weight = torch.nn.Parameter(torch.ones(1))
    other = torch.optim.SGD([weight])
    for bad in (0, 0, 0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1):
        job.train("gradient" if bad else "")
        weight.grad = torch.full((1,), float("inf") if bad else 1.0) * theirs.scale(torch.ones(()))
        theirs.unscale_(other)
        theirs.step(other)
        theirs.update()
        assert float(job.scale.factor) == theirs.get_scale()
    assert float(job.scale.factor) != INITIAL


@pytest.mark.parametrize("scale", [1.0, INITIAL])
def test_a_loss_that_is_not_finite_is_a_fault_at_any_scale(scale):
    job = Job("halt", scale=scale)
    job.train("")
    with pytest.raises(TrainingError, match="step 2 "):
        job.train("loss", "")
    assert job.scale.state_dict()["skipped"] == 0 and float(job.scale.factor) == scale


def test_an_overflow_at_scale_1_is_a_fault():
    job = Job("halt", scale=4.0)
    job.train("gradient", "gradient", "")
    assert float(job.scale.factor) == 1
    before = job.weights
    with pytest.raises(TrainingError, match="step 4 "):
        job.train("gradient", "")
    assert same(job.weights, before) and job.scale.state_dict() == {"factor": 1.0, "good": 0, "skipped": 2}


def test_overflows_neither_count_among_faults_in_a_row_nor_end_the_row():
    job = Job("skip", limit=2)
    job.train(*("gradient",) * 5, "", "loss", "", "loss")
    with pytest.raises(TrainingError, match=r"step 11 .*, 2 in a row"):
        job.train("gradient", "loss", "")


@pytest.mark.parametrize("key, value", [("factor", 0.5), ("factor", 3.0), ("factor", float("nan")), ("good", -1)])
def test_a_scale_that_no_training_leaves_is_refused(key, value):
    scale = LossScale(torch.device("cpu"))
    with pytest.raises(CheckpointError, match="loss scale"):
        scale.load_state_dict(scale.state_dict() | {key: value})


# Runs

SETTINGS = [
    *("model.layers=2", "model.heads=2", "model.kv_heads=2", "model.head_dim=16", "model.dense_layers=[]"),
    *("model.dim=32", "model.ffn_dim=32", "training.seq_len=64", "training.global_batch_size=4"),
    *("schedule.warmup_steps=5", "data.validation=0.1", "metrics.validation_batches=1", "metrics.tensorboard=false"),
    *("lighthouse.topk=4", "lighthouse.tile_parents=4", "metrics.measure_dense=false", "metrics.every=1"),
]


def new_run(folder: Path, dtype: str, steps: int, *settings: str) -> Run:
    settings = (*SETTINGS, f'training.dtype="{dtype}"', f"training.steps={steps}", *settings, f'output.dir="{folder}"')
    return create_run(load_recipe("recipes/quickstart.toml", settings), f"{dtype}-{steps}")


def train(run: Run, meet: Path, rank: int = 0, world: int = 1, overflow: tuple[int, int] = (0, 0)) -> list[float]:
    """Train a run as one process of a job.

    Args:
        run: one.
        meet: a file that is not there, at which the processes meet.
        rank, world: which process, of how many.
        overflow: the step and the rank of a gradient that is to overflow.

    Returns:
        The loss scale after each step.
    """
    scales: list[float] = []
    update, forward = LossScale.update, Head.forward

    def noting(self, *given):
        update(self, *given)
        scales.append(float(self.factor))

    def spoiling(self, hidden, *rest):
        if hidden.requires_grad and (len(scales) + 1, rank) == overflow:
            hidden.register_hook(lambda gradient: gradient * 2**20)
        return forward(self, hidden, *rest)

    titan, clock = trainer.titan_train, SimpleNamespace(sleep=lambda seconds: None, perf_counter=time.perf_counter)
    where = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, MEETING: meet}
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.dict(os.environ, {name: str(value) for name, value in where.items()}))
        patches.enter_context(mock.patch.object(stop, "_training", False, create=True))
        # It waits for other processes at the end.
        patches.enter_context(mock.patch.object(titan, "time", clock))
        # A trainer puts its own in their place.
        patches.enter_context(mock.patch.object(titan, "dist_utils", trainer.dist_utils))
        patches.enter_context(mock.patch.object(titan, "CheckpointManager", titan.CheckpointManager))
        patches.enter_context(mock.patch.object(LossScale, "update", noting))
        patches.enter_context(mock.patch.object(Head, "forward", spoiling))
        try:
            trainer.train(run)
        finally:
            meet.unlink(missing_ok=True)
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    return scales


def rows(run: Run, key: str) -> list[float]:
    lines = map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


def updates(run: Run) -> set[int]:
    """How many updates each weight of the newest checkpoint has had, by the optimizer's counts."""
    folder = run.checkpoint_dir(run.checkpoint_steps()[-1])
    counts = {name: torch.zeros(()) for name in read_contents(folder).tensors if name.endswith(".step")}
    load(counts, folder, alone=True)
    assert counts
    return {int(count) for count in counts.values()}


def continued(run: Run, end: int, **changes: str) -> Run:
    """The same run with more steps. A copy: this process holds the other's checkpoints for as long as it lives."""
    copy = Run(shutil.copytree(run.path, run.path.with_name(f"{run.name}-to-{end}")))
    text = copy.recipe_path.read_text()
    for old, new in changes.items():
        assert f'"{old}"' in text
        text = text.replace(f'"{old}"', f'"{new}"')
    copy.recipe_path.write_text(text)
    copy.ledger["stages"][-1]["end"] = end
    return copy


def test_losses_are_those_of_float32(tmp_path):
    """Four micro-batches a step."""
    runs = [new_run(tmp_path, dtype, 20) for dtype in ("float16", "float32")]
    for run in runs:
        train(run, tmp_path / "meeting")
    ours, theirs = (rows(run, "loss") + rows(run, "val_loss") for run in runs)
    assert len(ours) == 21 and ours[-1] < ours[0] - 0.3
    assert ours == pytest.approx(theirs, rel=2e-3) and ours != theirs
    assert rows(runs[0], "grad_norm") == pytest.approx(rows(runs[1], "grad_norm"), rel=1e-2)
    assert rows(runs[0], "loss_scale") == [INITIAL] * 20 and rows(runs[0], "skipped_steps") == [0] * 20
    assert not rows(runs[1], "loss_scale")
    assert updates(runs[0]) == {20}


def test_a_resume_goes_on_with_the_scale(tmp_path, monkeypatch):
    """It falls from one that is too high, and rises again."""
    monkeypatch.setattr(scaling, "INITIAL", 2.0**22)
    monkeypatch.setattr(scaling, "INTERVAL", 4)
    whole, part = (new_run(tmp_path, "float16", steps) for steps in (16, 11))
    train(whole, tmp_path / "meeting")
    train(part, tmp_path / "meeting")
    # From here on, a scale that begins anew is another one.
    monkeypatch.setattr(scaling, "INITIAL", 4.0)
    part = continued(part, 16)
    train(part, tmp_path / "meeting")
    for key in ("loss", "grad_norm", "loss_scale", "skipped_steps", "lr"):
        assert rows(part, key) == rows(whole, key), key
    scales, skipped = rows(whole, "loss_scale"), rows(whole, "skipped_steps")[-1]
    assert 2 < skipped < 10 and max(scales) == scales[0] == 2.0**21
    # Doubled after the resume, by good steps of before it.
    assert scales[11] == 2 * scales[10]
    # torch's recipe: the schedule goes on, the optimizer does not count what it has not done.
    assert updates(whole) == updates(part) == {16 - skipped}
    assert rows(whole, "lr")[:4] == pytest.approx([rows(whole, "lr")[0] * step for step in (1, 2, 3, 4)])
    # Whose norm is not finite.
    assert rows(whole, "grad_norm")[0] is None


def test_a_checkpoint_without_a_scale_begins_with_the_first_one(tmp_path, monkeypatch):
    before = new_run(tmp_path, "bfloat16", 2)
    train(before, tmp_path / "meeting")
    after = continued(before, 4, bfloat16="float16")
    assert train(after, tmp_path / "meeting") == [INITIAL] * 2
    assert len(rows(after, "loss")) == 4 and rows(after, "loss_scale") == [INITIAL] * 2
    # And one with a scale is no obstacle for a dtype without.
    back = continued(after, 5, float16="bfloat16")
    assert train(back, tmp_path / "meeting") == [] and len(rows(back, "loss")) == 5


def _process(rank: int, path: Path, meet: Path) -> list[float]:
    return train(Run(path), meet, rank, 2, overflow=(3, 1))


@pytest.mark.parametrize(
    "parallel", [("parallel.shard=2",), ("parallel.shard=1", "parallel.replicate=2")], ids=["fsdp", "ddp"]
)
def test_an_overflow_of_one_process_is_one_of_all(tmp_path, parallel):
    run = new_run(tmp_path, "float16", 4, *parallel)
    scales = spawn(_process, run.path, tmp_path / "meeting", count=2)
    assert scales == [[INITIAL] * 2 + [INITIAL / 2] * 2] * 2
    assert rows(run, "skipped_steps") == [0, 0, 1, 1] and updates(run) == {3}
    assert [norm is None for norm in rows(run, "grad_norm")] == [False, False, True, False]


def test_a_run_that_exists_keeps_its_dtype(tmp_path):
    run = new_run(tmp_path, "bfloat16", 2)
    for dtype in ("float16", "float32"):
        with pytest.raises(UserError, match=r"training\.dtype"):
            run.change([f'training.dtype="{dtype}"'])


def test_what_16_bits_cost(tmp_path):
    recipes = {dtype: new_run(tmp_path, dtype, 2).recipe for dtype in ("float16", "bfloat16", "float32")}
    bytes_of = {dtype: estimate(recipe).activation_bytes for dtype, recipe in recipes.items()}
    assert bytes_of["float16"] == bytes_of["bfloat16"] < bytes_of["float32"]


def test_weights_are_exported_in_what_they_were_trained_in(tmp_path):
    """float16 has more digits than bfloat16, and what has no bfloat16 can load it."""
    run = new_run(tmp_path, "float16", 1)
    train(run, tmp_path / "meeting")
    assert find_source(run.path).dtype == "float16"


def test_weights_that_float16_cannot_hold_are_not_exported_in_it(tmp_path):
    run = new_run(tmp_path, "float32", 1, "model.embedding_std=1e5")
    train(run, tmp_path / "meeting")
    with pytest.raises(ExportError, match=r"embed_tokens\.weight has numbers that float16 cannot hold"):
        strip(run.path, tmp_path / "out", dtype="float16", allow_unrecovered=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
def test_a_gpu_trains_in_float16_as_in_bfloat16(tmp_path, monkeypatch):
    """Compiled, from a scale without overflows; the losses are nearer to those of float32 than bfloat16's are."""
    monkeypatch.setattr(scaling, "INITIAL", 2.0**12)
    settings = ("training.seq_len=1024", "model.head_dim=64", "model.dense_layers=[0]", "data.validation=0")
    runs = {
        dtype: new_run(tmp_path, dtype, 20, *settings, f"training.compile={compiled}")
        for dtype, compiled in (("float16", "true"), ("bfloat16", "true"), ("float32", "false"))
    }
    for run in runs.values():
        train(run, tmp_path / "meeting")
    losses = {dtype: torch.tensor(rows(run, "loss")) for dtype, run in runs.items()}
    assert rows(runs["float16"], "skipped_steps")[-1] == 0 and losses["float16"][-1] < losses["float16"][0] - 0.3
    off = {dtype: float((found / losses["float32"] - 1).abs().max()) for dtype, found in losses.items()}
    assert off["float16"] < off["bfloat16"] < 2e-2


@pytest.mark.gpu
def test_the_scale_does_not_wait_for_the_accelerator():
    scale = LossScale(torch.device("cuda"))
    weight = torch.nn.Parameter(torch.ones(3, device="cuda"))
    optimizer = torch.optim.AdamW([weight], fused=True)
    guard = Guard("halt", 1, 4, [optimizer], weight.device, scale=scale)
    for step in (1, 2):
        (weight.sum() * scale.factor).backward()
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            scale.unscale([weight])
            guard.judge(step, torch.full((), float("inf"), device="cuda"))
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert scale.state_dict() == {"factor": INITIAL / 4, "good": 0, "skipped": 2} and (weight == 1).all()


# The attention call

PYRAMID = {"pooling": 2, "levels": 3, "topk": 4, "tile_parents": 4, "dense_backend": "math"}
COMPRESSED = {"method": "compressed", "window": 8, "compression": 4}
CALLS = {
    "dense": None,
    "norm": PYRAMID,
    "window": {**PYRAMID, "window": 8},
    "drawn": {**PYRAMID, "scorer": "random"},
    "dilated": {**PYRAMID, "scorer": "dilated"},
    "gla": {**PYRAMID, "scorer": "gla"},
    "chunked": {"method": "chunked", "window": 8},
    "sliding": {"method": "sliding", "window": 8},
    "compressed": COMPRESSED,
    "kept": {**COMPRESSED, "keep": 2, "score_block": 4},
    "blocks": {"method": "blocks", "window": 8, "tile": 8, "block_size": 4, "blocks": 2},
}
BACKENDS = [*((name, "reference") for name in CALLS), ("norm", "triton"), ("window", "triton")]


def results(settings, dtype, size, values, scale, backend="reference"):
    """[out, dq, dk, dv] of q and k up to `size` and v up to `values`, all of them numbers of float16."""
    draw = torch.Generator().manual_seed(5)
    q, k, v = (
        ((2 * torch.rand(1, 40, heads, 16, generator=draw) - 1) * most).half().to(dtype).requires_grad_()
        for heads, most in ((4, size), (2, size), (2, values))
    )
    gradient = (torch.randn(q.shape, generator=draw) / values).half().to(dtype)
    if settings is None:
        out = dense_attention(q, k, v, scale=scale)
    else:
        cfg = LighthouseConfig(**settings, backend=backend)
        key = torch.tensor([1, 2, 3, 0]) if cfg.draws else None
        out = lighthouse_attention(q, k, v, cfg, key=key, scale=scale)
    assert out.dtype == dtype
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), gradient)]


def errors(settings, *how, backend="reference"):
    found, truth = (results(settings, dtype, *how, backend) for dtype in (torch.float16, torch.float32))
    assert all(x.isfinite().all() for x in found)
    return [float((a.double() - b).norm() / b.double().norm()) for a, b in zip(found, truth, strict=True)]


@pytest.mark.parametrize("size, values", [(1, 1), (100, 100), (100, 2e4)])
@pytest.mark.parametrize("name, backend", BACKENDS)
def test_float16_loses_no_more_than_dense_attention_does(name, backend, size, values):
    """4 times what torch's own kernel loses. Products of queries and keys reach 160000, and sums of pooled values more:
    neither fits float16. The scale on the scores keeps the softmax a soft one, so that there are gradients."""
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("the kernels' interpreter is for machines without a GPU")
    how = size, values, 0.25 / size**2
    allowed = [4 * error for error in errors(None, *how)]
    assert max(allowed) < 1e-2
    for what, error, most in zip(
        ("out", "dq", "dk", "dv"), errors(CALLS[name], *how, backend=backend), allowed, strict=True
    ):
        assert error <= most, what


@pytest.mark.parametrize("name", CALLS)
def test_scores_beyond_float16_stay_finite(name):
    """Without a scale of its own a softmax of such scores has one key."""
    out, *_, of_values = errors(CALLS[name], 100, 100, None)
    assert out < 1e-3 and of_values < 1e-3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"factor": 3.0}, r"loss scale, 3\.0, is not a power of two from 1 to 2\^64"),
        ({"good": 2000}, "counts 2000 good steps since its loss scale changed, not 0 to 1999"),
        ({"skipped": -1}, "counts -1 updates"),
    ],
)
def test_a_loss_scale_that_no_training_leaves(change, words):
    scale = LossScale(torch.device("cpu"))
    with pytest.raises(CheckpointError, match=words):
        scale.load_state_dict(scale.state_dict() | change)
    scale.load_state_dict(scale.state_dict())
    assert float(scale.factor) == INITIAL
