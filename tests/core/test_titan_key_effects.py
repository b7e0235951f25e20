"""[titan]: every key that a recipe may set changes something that can be seen, with the job that its recipe makes."""

import contextlib
import gc
import json
import os
from types import SimpleNamespace
from unittest.mock import MagicMock

import jobs
import pytest
import torch
from test_titan_keys import VALUES, needed
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointError

from lighthouse_core.config import load_recipe
from lighthouse_core.config.dump import toml_value
from lighthouse_core.job.environment import MEETING
from lighthouse_core.job.meeting import meeting
from lighthouse_core.models.decoder import Decoder, DecoderArgs
from lighthouse_core.titan import build_job, guard, trainer
from lighthouse_core.titan import job as ours
from lighthouse_core.titan.job import ALLOWED
from lighthouse_core.titan.parallelize import parallelize
from lighthouse_core.titan.runtime import DEVICE_TYPE, HAS_ACCELERATOR

from torchtitan.distributed import ParallelDims, utils  # isort: skip
from torchtitan.tools import profiling  # isort: skip
from torchtitan.tools.utils import GarbageCollection  # isort: skip

# On a GPU all of it is the GPU's.
pytestmark = [pytest.mark.gpu] if HAS_ACCELERATOR else []
TOKENS = 32
SIZE = ["model.dim=32", "model.layers=2", "model.heads=2", "model.head_dim=16", "model.ffn_dim=48"]
SIZE += ["model.dense_layers=[]", "model.vocab_size=259"]
ONE = ParallelDims(1, 1, 1, 1, 1, 1, 1, 1)


def recipe(*settings):
    return load_recipe("recipes/quickstart.toml", [*SIZE, *settings])


@pytest.fixture(autouse=True)
def as_before(monkeypatch, tmp_path):
    """torchtitan sets some of these, for its process."""
    monkeypatch.setattr(ours, "HAS_ACCELERATOR", True)
    names = "ASYNC_ERROR_HANDLING", "DUMP_ON_TIMEOUT"
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE", *(f"TORCH_NCCL_{name}" for name in names)):
        monkeypatch.setenv(name, "")
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", MEETING: str(tmp_path / "store")}.items():
        monkeypatch.setenv(name, value)
    for name in ("CUBLAS_WORKSPACE_CONFIG", "PYTHONHASHSEED"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    for name in ("deterministic", "benchmark"):
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
    yield
    gc.enable()
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()


@contextlib.contextmanager
def joined(job, folder):
    """A job of one process, by torchtitan's own function."""
    with meeting():
        utils.init_distributed(job.comm, base_folder=str(folder))
    try:
        yield torch.distributed.distributed_c10d._get_default_group()
    finally:
        torch.distributed.destroy_process_group()
        (folder / "store").unlink(missing_ok=True)


def model(job, *settings):
    with torch.device(DEVICE_TYPE):
        built = Decoder(DecoderArgs.of(recipe(*settings).model, TOKENS))
    with torch.no_grad():
        built.init_weights()
    return parallelize(built, ONE, job)


def loss(built):
    tokens = torch.arange(2 * TOKENS, device=DEVICE_TYPE).view(2, TOKENS)
    return built(tokens, labels=tokens)


class Count(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))


def logged(job, see):
    see.log.clear()
    job.maybe_log()
    collector = GarbageCollection(job.training.gc_freq)
    for step in range(1, 30):
        collector.run(step)
    said = [record.getMessage() for record in see.log.records]
    return sum("Running with configs" in line for line in said), sum("periodic GC" in line for line in said)


def profiled(job, see):
    """What the profiler does in each step, and the files that are written."""
    profile = torch.profiler.profile
    # For a CPU alone torchtitan names no second activity.
    see.patch.setattr(
        torch.profiler, "profile", lambda activities, **more: profile(activities=[*filter(None, activities)], **more)
    )
    memory = SimpleNamespace(_record_memory_history=lambda max_entries: None, _snapshot=dict)
    see.patch.setattr(profiling, "device_module", SimpleNamespace(memory=memory))
    folder, actions = see.folder / "profiled", []
    with (
        joined(job, see.folder),
        profiling.maybe_enable_profiling(job.profiling, base_folder=str(folder)) as traces,
        profiling.maybe_enable_memory_snapshot(job.profiling, base_folder=str(folder)) as snapshots,
    ):
        for _ in range(25):
            if traces:
                actions.append(traces.current_action)
                traces.step()
            if snapshots:
                snapshots.step()
    return actions, sorted(str(file.relative_to(folder)) for file in folder.rglob("*.*"))


def whole_after_forward(job, see, *settings):
    """Which weights are whole, in bfloat16 by FSDP."""
    with joined(job, see.folder):
        built = model(job, *settings)
        loss(built)
        return [not isinstance(weight, DTensor) for weight in built.parameters()]


def operations(job, see):
    with Count() as count:
        loss(model(job)).backward()
    return count.calls


def states_of_generators(job, see):
    ask, asked = torch.get_rng_state, []
    built = model(job)
    see.patch.setattr(torch, "get_rng_state", lambda: asked.append(1) or ask())
    loss(built).backward()
    return len(asked)


def other_shapes_are_seen(job, see):
    """Inside a part whose tensors are larger when they are computed again."""
    # Selective checkpointing also compares the operations.
    job.activation_checkpoint.mode = "full"
    built, calls = model(job), []

    def larger(part, inputs):
        calls.append(part)
        return (inputs[0].expand(len(calls), -1, -1, -1),)

    part = built.layers["1"].feed_forward
    part.register_forward_pre_hook(larger)
    part.register_forward_hook(lambda part, inputs, output: output[0])
    try:
        loss(built).backward()
    except CheckpointError:
        return True
    except RuntimeError as error:
        assert "shape" in str(error)
    assert len(calls) == 2
    return False


def compiled(job, see):
    built = model(job)
    counters = torch._dynamo.utils.counters
    counters.clear()
    if job.compile.backend != "inductor":
        loss(built).backward()
    return type(built.layers["0"]), built.output.compiled, counters["aot_autograd"]["total"] > 0


def timeout(job, see):
    with joined(job, see.folder) as group:
        return group._get_backend(torch.device(DEVICE_TYPE)).options._timeout


def recorder(job, see):
    with joined(job, see.folder):
        return os.environ["TORCH_FR_BUFFER_SIZE"]


def timeout_of_a_later_launch(job, see):
    """Of a run that goes on with step 5; torchtitan does it after step 1."""
    set_to, one = [], trainer.Trainer.__new__(trainer.Trainer)
    see.patch.setattr(guard, "HAS_ACCELERATOR", True)
    see.patch.setattr(trainer, "is_training", lambda: False)
    see.patch.setattr(trainer, "training_begins", lambda: None)
    see.patch.setattr(trainer.titan_train.Trainer, "train_step", lambda self, batches: None)
    torchtitans = MagicMock(__name__="utils", set_pg_timeouts=lambda timeout, parallel_dims: set_to.append(timeout))
    see.patch.setattr(trainer.titan_train, "dist_utils", guard.NotingUtils(torchtitans, None, 0, 0.0))
    parts = ("lr_schedulers", "effects", "guard", "parallel_dims", "checkpointer", "dataloader")
    one.__dict__ |= dict(
        step=5, asked=4, begun=True, ranks=1, theta=None, loss_scale=None, gradient_accumulation_steps=1, job_config=job
    )
    one.__dict__ |= {part: MagicMock() for part in parts} | {
        "stage": SimpleNamespace(recipe=recipe(), phase=lambda step: None)
    }
    one.budgets = SimpleNamespace(begin=lambda step: None, end=lambda step: None)
    see.patch.setattr(trainer.Trainer, "anywhere", lambda self, here: here)
    one.train_step(None)
    return set_to


def warns(job, see):
    utils.set_determinism(ONE, torch.device("cpu"), job.debug, [])
    assert torch.are_deterministic_algorithms_enabled()
    return torch.is_deterministic_algorithms_warn_only_enabled()


SEEN_BY = {
    "job.print_config": logged,
    "training.gc_freq": logged,
    "parallelism.fsdp_reshard_after_forward": whole_after_forward,
    "activation_checkpoint.early_stop": operations,
    "activation_checkpoint.preserve_rng_state": states_of_generators,
    "activation_checkpoint.determinism_check": other_shapes_are_seen,
    "compile.components": compiled,
    "compile.backend": compiled,
    "comm.init_timeout_seconds": timeout,
    "comm.train_timeout_seconds": timeout_of_a_later_launch,
    "comm.trace_buf_size": recorder,
    "debug.deterministic_warn_only": warns,
    **{key: profiled for key in ALLOWED if key.startswith("profiling.")},
}
# By a whole run.
FIRST = "checkpoint.enable_first_step_checkpoint"
# Instead of torchtitan's own value, which takes its time.
OTHER = {"compile.backend": ["titan.compile.backend='eager'"]}


def test_all_are_here():
    assert set(SEEN_BY) | {FIRST} == set(ALLOWED)


@pytest.fixture
def see(tmp_path, caplog, monkeypatch):
    with caplog.at_level("INFO"), monkeypatch.context() as patch:
        yield SimpleNamespace(folder=tmp_path, log=caplog, patch=patch)


def different(key, value, see, *settings, seen_by=None, more=()):
    """What is seen without the key and with it."""
    there = [*needed(key), *settings]
    if key.startswith("parallelism"):
        there.append('training.dtype="bfloat16"')
    for given in (OTHER.get(key, []), [f"titan.{key}={toml_value(value)}"]):
        job = build_job(recipe(*there, *given), see.folder, steps=9)
        with pytest.MonkeyPatch.context() as patch:
            see.patch = patch
            yield (seen_by or SEEN_BY[key])(job, see, *more)


@pytest.mark.parametrize("key", SEEN_BY)
def test_it_changes_something(key, see):
    without, changed = different(key, VALUES[key], see)
    assert without != changed


@pytest.mark.parametrize("value", ["never", "always"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_policy_of_fsdp_is_one_of_its_own(value, tied, see):
    key, settings = "parallelism.fsdp_reshard_after_forward", [f"model.tied_embeddings={str(tied).lower()}"]
    without, changed = different(key, value, see, *settings, more=settings)
    assert (sum(changed) > sum(without) > 0) if value == "never" else sum(without) > sum(changed) == 0


@pytest.mark.slow
def test_runs_differ(tmp_path):
    """Two of the command line, alike but for keys that change no number."""
    keys = {key: VALUES[key] for key in (FIRST, "job.print_config", "debug.deterministic_warn_only")}
    keys |= {key: VALUES[key] for key in ALLOWED if key.startswith("activation")} | {"training.gc_freq": 2}
    keys["comm.init_timeout_seconds"] = 77
    shared = [*jobs.TINY, "training.steps=4", "training.deterministic=true", "checkpoint.keep=0"]
    shared.append('training.activation_checkpointing="selective"')
    seen = []
    for name, given in (("plain", {}), ("changed", keys)):
        options = jobs.options(*shared, *(f"titan.{key}={toml_value(value)}" for key, value in given.items()))
        jobs.succeed("pretrain", str(jobs.RECIPE), "--name", name, "--nproc", "1", *options, cwd=tmp_path)
        run = tmp_path / "runs" / name
        log = (run / "logs/rank0.log").read_text()
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        saved = sorted(folder.name for folder in (run / "checkpoints").iterdir())
        seen.append((saved, "Running with configs" in log, log.count("periodic GC"), [row.get("loss") for row in rows]))
    (*plain, losses), (*changed, same) = seen
    assert losses == same and plain == [["step-4"], False, 0] and changed == [["step-1", "step-4"], True, 2]
