"""A torchtitan that no longer calls what we put in its place ends a run with one error, instead of training without."""

import inspect
import os
import shutil
import sys
import textwrap
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from lighthouse_core.config import load_recipe
from lighthouse_core.errors import PatchError
from lighthouse_core.job import stop
from lighthouse_core.job.environment import MEETING
from lighthouse_core.job.meeting import meeting
from lighthouse_core.runs.create import create_run
from lighthouse_core.runs.run import Run
from lighthouse_core.titan import guard, trainer

from torchtitan.components.checkpoint import CheckpointManager  # isort: skip
from torchtitan.components.lr_scheduler import LRSchedulersContainer  # isort: skip
from torchtitan.components.validate import Validator  # isort: skip
from torchtitan.train import Trainer  # isort: skip

SETTINGS = [
    *(
        "model.layers=2",
        "model.heads=2",
        "model.kv_heads=2",
        "model.head_dim=16",
        "model.dense_layers=[]",
        "model.dim=32",
        "model.ffn_dim=32",
        "training.seq_len=64",
        "training.global_batch_size=2",
        "training.steps=2",
    ),
    *("schedule.warmup_steps=5", "data.validation=0.1", "metrics.validation_batches=1", "metrics.tensorboard=false"),
    *("lighthouse.topk=4", "lighthouse.tile_parents=4", "metrics.measure_dense=false"),
]


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Trains a run of two steps in this process; returns the run."""
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, MEETING: tmp_path / "meeting"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(stop, "_training", False, raising=False)
    # It waits for other processes at the end.
    monkeypatch.setattr(
        trainer.titan_train, "time", SimpleNamespace(sleep=lambda seconds: None, perf_counter=lambda: 0.0)
    )
    monkeypatch.setattr(trainer.titan_train, "dist_utils", trainer.dist_utils)
    monkeypatch.setattr(trainer.titan_train, "CheckpointManager", CheckpointManager)

    def call(run: Run | None = None, *settings: str) -> Run:
        (tmp_path / "meeting").unlink(missing_ok=True)
        if run is None:
            settings = (*SETTINGS, *settings, f'output.dir="{tmp_path}"')
            run = create_run(load_recipe("recipes/quickstart.toml", settings), "tiny")
        trainer.train(run)
        return run

    with mock.patch.dict(os.environ):
        yield call
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def upstream(monkeypatch):
    """Changes the source of a function of torchtitan, as a later version might."""

    def change(owner: type, name: str, old: str, new: str) -> None:
        text = textwrap.dedent(inspect.getsource(vars(owner)[name]))
        assert old in text, f"torchtitan's {name} has no {old!r} any more"
        there = dict(vars(sys.modules[owner.__module__]))
        # Under the names of its module at the time of the call, but for what the text defines.
        exec(compile(text.replace(old, new), f"<a later {name}>", "exec"), vars(sys.modules[owner.__module__]), there)
        monkeypatch.setattr(owner, name, there[name])

    return change


def longer(run: Run) -> Run:
    """The same run with a third step. A copy: this process holds the other's checkpoints for as long as it lives."""
    copy = Run(shutil.copytree(run.path, run.path.with_name("longer")))
    copy.ledger["stages"][-1]["end"] = 3
    return copy


def test_a_run_and_its_continuation_take_our_parts(train):
    run = longer(train())
    train(run)
    assert run.checkpoint_steps() == [2, 3]


@pytest.mark.parametrize(
    ("owner", "name", "old", "new", "words"),
    [
        (
            Trainer,
            "__init__",
            "CheckpointManager(",
            "importlib.import_module('torchtitan.components.checkpoint').CheckpointManager(",
            "the checkpointer is torchtitan's CheckpointManager",
        ),
        (
            Trainer,
            "train_step",
            "dist_utils.clip_grad_norm_(",
            "(lambda p, norm, **_: torch.nn.utils.clip_grad_norm_(p, norm))(",
            "nobody has judged",
        ),
        (Trainer, "train_step", "self.job_config.training.max_norm", "1e9", r"clipped to 1000000000.0, not \d+ to 1"),
        (
            Trainer,
            "train_step",
            "self.optimizers.step()",
            "self.optimizers.step(); self.optimizers.step()",
            "nobody has judged",
        ),
        (Trainer, "train_step", "self.optimizers.step()", "pass", "no update in step 1"),
        (
            Trainer,
            "train_step",
            "self.forward_backward_step(",
            "Trainer.forward_backward_step(self, ",
            "judge step 1 from 2 losses; it did last at step 1, from 0",
        ),
        (
            Trainer,
            "forward_backward_step",
            "loss_sum / global_valid_tokens",
            "loss_sum / global_valid_tokens / 2",
            "step 1 is not one over the labels",
        ),
        (
            Trainer,
            "forward_backward_step",
            "loss.backward()",
            "(8 * loss).backward()",
            "step 1 is not one over the labels",
        ),
        (Trainer, "forward_backward_step", "self.loss_fn(pred, labels)", "pred", "but 0 calls of the loss function"),
        (
            Trainer,
            "forward_backward_step",
            "self.loss_fn(pred, labels)",
            "self.loss_fn(pred * 2, labels)",
            "something else than the model's output",
        ),
        (Trainer, "forward_backward_step", "loss.backward()", "pass", "no parameter has a gradient"),
        (Trainer, "forward_backward_step", "**extra_inputs", "labels=labels", "without the attention context"),
        (
            Trainer,
            "forward_backward_step",
            "self.post_dataloading_process(",
            "Trainer.post_dataloading_process(self, ",
            "without the attention context",
        ),
        (
            Trainer,
            "forward_backward_step",
            "self.maybe_enable_amp",
            "torch.autocast('cpu', torch.bfloat16)",
            "under autocast",
        ),
        (Trainer, "train", "self.train_step(", "Trainer.train_step(self, ", "outside of a step of ours"),
        (Trainer, "train", "self.batch_generator(", "Trainer.batch_generator(self, ", "without our batches"),
        (
            Trainer,
            "train",
            "self.should_continue_training()",
            "self.step < job_config.training.steps",
            "without asking",
        ),
        (Trainer, "train", "self.checkpointer.save(", "(lambda *_, **__: None)(", "but None is the last saved one"),
        (Trainer, "train", "self.validator.validate(", "(lambda *_: None)(", "without its validation"),
        (CheckpointManager, "save", "self._save_last_step(curr_step)", "pass", "saved step 2 in its own way"),
        (LRSchedulersContainer, "step", "scheduler.step()", "pass", "step 2 has the learning rate"),
        (
            Validator,
            "validate",
            "self.loss_fn(predictions, labels)",
            "predictions",
            "validation of step 2 has 2 micro-batches, but 0 calls",
        ),
        (Validator, "validate", "self.metrics_processor.log_validation(", "(lambda **_: None)(", "wrote no loss"),
    ],
)
def test_what_is_no_longer_called_is_noticed(train, upstream, owner, name, old, new, words):
    upstream(owner, name, old, new)
    with pytest.raises(PatchError, match=words) as caught:
        train()
    assert "\n" not in str(caught.value) and caught.value.hint


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("forward_backward_step", "loss_sum / global_valid_tokens", "loss_sum / labels.numel()"),
        ("train_step", "(labels != IGNORE_INDEX).sum()", "labels.numel()"),
        ("train_step", "global_valid_tokens = local_valid_tokens.float()", "global_valid_tokens = torch.tensor(1.0)"),
    ],
)
def test_a_loss_that_is_not_of_the_labels_that_count_is_noticed(train, upstream, tmp_path, name, old, new):
    (tmp_path / "texts").mkdir()
    for number in range(60):
        (tmp_path / f"texts/{number}.txt").write_text("a few words " * (1 + number % 3))
    data = 'data.source="files"', f'data.paths=["{tmp_path}/texts/*.txt"]', 'data.packing="documents"'
    upstream(Trainer, name, old, new)
    with pytest.raises(PatchError, match="step 1 is not one over the labels that count"):
        train(None, *data, "lighthouse.window=8")


@pytest.mark.parametrize(
    ("owner", "name", "old", "new", "words"),
    [
        (
            CheckpointManager,
            "load",
            "self.dcp_load(",
            "(lambda *_, **__: None)(",
            "from step 0, and not from the checkpoint of step 2",
        ),
        (
            LRSchedulersContainer,
            "load_state_dict",
            "copy.deepcopy(state_dict)",
            "state_dict | {'last_epoch': 7}",
            "step 3 has the learning rate",
        ),
    ],
)
def test_a_continuation_without_its_checkpoint_or_rate_is_noticed(train, upstream, owner, name, old, new, words):
    run = longer(train())
    upstream(owner, name, old, new)
    with pytest.raises(PatchError, match=words):
        train(run)
    assert run.checkpoint_steps() == [2]


def test_another_schedule_has_its_rate_from_the_first_step_on(train, monkeypatch):
    """The checkpoint holds the rate of the schedule that saved it."""
    run, rates, train_step = longer(train()), [], Trainer.train_step
    text = run.recipe_path.read_text()
    assert "warmup_steps = 5\n" in text
    run.recipe_path.write_text(text.replace("warmup_steps = 5\n", "warmup_steps = 30\n"))

    def noting(self, batches):
        rates.extend(group["lr"] for group in self.optimizers.optimizers[0].param_groups)
        train_step(self, batches)

    monkeypatch.setattr(Trainer, "train_step", noting)
    train(run)
    assert rates == [pytest.approx(run.recipe.optimizer.lr * 3 / 30)]


def test_an_optimizer_that_ignores_the_verdict_saves_nothing(train, monkeypatch, tmp_path):
    kernel, judge = torch._fused_adamw_, guard.Guard.judge
    monkeypatch.setattr(guard.Guard, "judge", lambda self, step, norm: judge(self, step, norm * float("nan")))
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *x, found_inf=None, **settings: kernel(*x, **settings))
    with pytest.raises(PatchError, match="did not obey the verdict on bad numbers in step 1"):
        train()
    assert not list(tmp_path.glob("tiny*/checkpoints/step-*"))


def test_processes_that_meet_elsewhere_are_noticed():
    with pytest.raises(PatchError, match="did not meet"), meeting():
        pass
