"""The recipe as torchtitan sees it, and the Llama it trains."""

import errno
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lighthouse_core.attention import backends
from lighthouse_core.attention.module import LighthouseAttention
from lighthouse_core.config import load_recipe
from lighthouse_core.errors import RecipeError, UserError
from lighthouse_core.models.decoder import build_dense_model, use_lighthouse
from lighthouse_core.titan import build_job, check_overrides, trainer
from lighthouse_core.titan import metrics as metrics_module
from lighthouse_core.titan.budget import Budgets
from lighthouse_core.titan.effects import Effects
from lighthouse_core.titan.metrics import Metrics
from lighthouse_core.titan.trainer import Stage


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("recipes/quickstart.toml")


def test_the_optimizer_state_is_kept_at_the_last_step(recipe, tmp_path):
    job = build_job(recipe, tmp_path, steps=7)
    assert job.training.steps == 7
    assert not job.checkpoint.last_save_model_only
    assert job.optimizer.lr == recipe.optimizer.lr


def test_titan_tables_reach_torchtitan(tmp_path):
    recipe = load_recipe("recipes/quickstart.toml", ["titan.comm.init_timeout_seconds=77"])
    check_overrides(recipe)
    assert build_job(recipe, tmp_path, steps=1).comm.init_timeout_seconds == 77


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("titan.comm.init_timeout=1", r"not a setting of torchtitan; did you mean init_timeout_seconds\?"),
        ("titan.com.init_timeout_seconds=1", r"titan.com is not a setting of torchtitan; did you mean comm\?"),
        ('titan.comm.init_timeout_seconds="long"', "valid integer"),
        ("titan.nothing.at_all=1", "not a setting of torchtitan"),
        ("titan.training.seq_len=64", "training.seq_len decides it"),
        ("titan.parallelism.tensor_parallel_degree=2", "only data and context parallelism"),
        ("titan.lr_scheduler.min_lr_factor=0.5", "schedule"),
        ("titan.fault_tolerance.enable=true", "no effect"),
        ('titan.experimental.custom_import="os"', "runs code"),
        ("titan.comm={init_timeout_seconds=true}", "valid integer"),
    ],
)
def test_titan_tables_are_checked(override, words):
    with pytest.raises(RecipeError, match=words):
        check_overrides(load_recipe("recipes/quickstart.toml", [override]))


def test_widths_are_exact():
    recipe = load_recipe(
        "recipes/quickstart.toml",
        ["model.dim=40", "model.heads=4", "model.kv_heads=2", "model.head_dim=6", "model.ffn_dim=37"],
    )
    model = build_dense_model(recipe.model, 32)
    block = model.layers["0"]
    assert block.attention.wq.weight.shape == (24, 40)
    assert block.attention.wk.weight.shape == (12, 40)
    assert block.attention.wo.weight.shape == (40, 24)
    assert block.feed_forward.w1.weight.shape == (37, 40)
    assert sum(p.numel() for p in model.parameters()) == recipe.model.kind.parameters(recipe.model).total


def test_initial_weights_depend_on_the_seed_alone(recipe):
    def weights(seed):
        model = build_dense_model(recipe.model, 32)
        model.args.seed = seed
        with torch.no_grad():
            model.init_weights()
        return torch.cat([p.flatten() for p in model.parameters()])

    first = weights(3)
    assert torch.equal(first, weights(3))
    assert not torch.equal(first, weights(4))
    assert first.isfinite().all()


@pytest.mark.parametrize(("settings", "std"), [([], 1.0), (["model.embedding_std=0.02"], 0.02)])
def test_initial_embeddings(settings, std):
    model = build_dense_model(load_recipe("recipes/quickstart.toml", settings).model, 32)
    with torch.no_grad():
        model.init_weights()
    assert model.tok_embeddings.weight.std().item() == pytest.approx(std, rel=0.05)
    assert model.output.weight.std().item() == pytest.approx(model.args.dim**-0.5, rel=0.05)


def test_lighthouse_takes_the_place_of_all_but_the_dense_layers(recipe):
    model = build_dense_model(recipe.model, 32)
    before = set(model.state_dict())
    use_lighthouse(model, recipe.phases[-1].attention, list(recipe.model.dense_layers))
    lighthouse = [n for n, b in model.layers.items() if isinstance(b.attention.inner_attention, LighthouseAttention)]
    assert lighthouse == ["1", "2"]
    assert set(model.state_dict()) == before


@pytest.mark.parametrize(
    ("settings", "name", "words"),
    [
        (
            [],
            "lighthouse",
            ["(pooling 4, levels 3, topk 64, scorer random), layers 1-2 of 0-3, the others dense"],
        ),
        (['lighthouse.dense_backend="math"'], "dense", ["dense attention on cpu: plain matrix products"]),
        (
            ["model.layers=9", "model.dense_layers=[2,3,5]", 'lighthouse={method="chunked",window=256}'],
            "lighthouse",
            ["chunked, window 256, layers 0-1, 4, 6-8 of 0-8, the others dense", "dense attention on cpu: "],
        ),
        (["model.dense_layers=[]"], "lighthouse", ["scorer random), every layer"]),
        (
            ['lighthouse={method="blocks",window=256}'],
            "lighthouse",
            ["blocks (blocks 16, block_size 128", "chosen blocks on cpu: plain matrix products; FlashAttention-4 "],
        ),
        (
            ['lighthouse={method="blocks",window=256,dense_backend="math"}'],
            "lighthouse",
            ["chosen blocks on cpu: plain matrix products"],
        ),
        (['lighthouse={method="sliding",window=256}'], "lighthouse", ["windows on cpu: plain matrix products; "]),
        (["lighthouse.window=64", 'data.packing="documents"'], "dense", ["documents on cpu: flash attention (torch)"]),
    ],
)
def test_a_run_begins_with_the_words_of_its_attention(settings, name, words, monkeypatch, caplog):
    recipe = load_recipe("recipes/quickstart.toml", settings)
    # What another test made this process say counts as unsaid.
    monkeypatch.setattr(backends, "_logged", set())
    with caplog.at_level("INFO"):
        trainer._build_model(trainer.Stage(None, recipe, name, 0, 1, False), trainer.Args.of(recipe.model, 32))
    said = [record.getMessage() for record in caplog.records]
    assert all(any(one in line for line in said) for one in words)
    assert sum(line.startswith("stage 1: ") for line in said) == (name == "lighthouse")


def test_a_kernel_that_cannot_take_the_tensors_is_the_users_mistake():
    recipe = load_recipe("recipes/quickstart.toml", ['lighthouse.dense_backend="varlen"'])
    with pytest.raises(UserError, match="dense backend 'varlen' needs an NVIDIA GPU") as refused:
        trainer._build_model(trainer.Stage(None, recipe, "dense", 0, 1, False), trainer.Args.of(recipe.model, 32))
    assert '"auto" takes' in refused.value.hint


def micro_batch(recipe, stage="lighthouse", step=7):
    """The context of rank 1 of 2, in its second micro-batch of 3 rows."""
    one = trainer.Trainer.__new__(trainer.Trainer)
    one.__dict__ |= dict(micro_batch=1, ranks=2, rank=1, step=step, device=torch.device("cpu"), effects=Effects("cpu"))
    one.sharers = trainer._Sharers()
    one.stage = trainer.Stage(None, recipe, stage, 0, 100, False)
    one.budgets = Budgets(recipe.lighthouse.budget, one.stage.phases, (1, 1), one.device)
    tokens = torch.zeros(3, 32)
    *_, inputs, _ = one.post_dataloading_process({"input": tokens}, tokens)
    assert one.micro_batch == 2
    return inputs["context"]


def test_selection_keys_name_the_step_the_layer_and_the_row(recipe):
    """Its first row is number 9 of the global batch."""
    context, seed = micro_batch(recipe), recipe.training.seed
    assert context.key.tolist() == [[seed, 7, layer, 9] for layer in range(recipe.model.layers)]
    assert context.of_layer(2).key.tolist() == [seed, 7, 2, 9]
    assert micro_batch(recipe, "dense").key is None


def writing(file, log) -> Metrics:
    metrics = Metrics.__new__(Metrics)
    metrics.logger, metrics.file, metrics.unwritten = SimpleNamespace(log=log), file, b""
    metrics.lengths, metrics.validation_loss, metrics.loss_scale = [], None, None
    metrics.stage = Stage(SimpleNamespace(path=Path("nowhere")), None, "dense", 0, 9, False)
    return metrics


class Disk(io.BytesIO):
    """A file with room for so many bytes; what there is room for is written."""

    room = 50

    def write(self, content):
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = super().write(content[: self.room])
        self.room -= written
        return written


def test_rows_wait_until_there_is_room_for_them(caplog):
    def full(row, step):
        raise OSError(errno.ENOSPC, "No space left on device")

    disk = Disk()
    metrics = writing(disk, full)
    for step in range(3):
        metrics._write(step, {"loss": 1.0})
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "no more is logged to TensorBoard or Weights & Biases",
        *(f"step {step} waits to be written to metrics.jsonl" for step in range(3)),
    ]
    disk.room = 10_000
    metrics._write(3, {"loss": 1.0})
    assert [json.loads(line)["step"] for line in disk.getvalue().splitlines()] == [0, 1, 2, 3]


def test_the_time_of_a_step_has_neither_saves_nor_evaluations(recipe, monkeypatch):
    """Steps 1 to 4 of 2 s each, one save of 5 s and one evaluation of 7 s between two rows."""
    now = 0.0
    monkeypatch.setattr(metrics_module.time, "perf_counter", lambda: now)
    metrics = writing(io.BytesIO(), lambda row, step: None)
    metrics.stage = replace(metrics.stage, recipe=recipe)
    metrics.device_memory_monitor = metrics_module._HostMemoryMonitor()
    metrics.gpu_peak_flops, metrics.spikes, metrics.data_loading_times = None, metrics_module.Spikes(), []
    metrics.start_step = metrics.last_step = metrics.last_time = 0
    for step, others in ((1, ()), (2, (5.0, 7.0)), (3, ()), (4, (5.0,))):
        now += 2.0
        if step in (1, 3, 4):
            metrics.log(step, 1.0, 1.0, 1.0, {"lr": 1.0})
        for seconds in others:
            with metrics.left_out():
                now += seconds
    rows = [json.loads(line) for line in metrics.file.getvalue().splitlines()]
    assert [(row["steps"], row["seconds"]) for row in rows] == [(1, 2.0), (2, 2.0), (1, 2.0)]
    assert [row.get("first_of_launch", False) for row in rows] == [True, False, False]


def test_figures_that_are_not_finite_are_null_in_the_metrics_file():
    metrics = writing(io.BytesIO(), lambda row, step: None)
    metrics._write(3, {"loss": math.nan, "grad_norm": math.inf, "lr": 1.5})
    row = json.loads(metrics.file.getvalue(), parse_constant=pytest.fail)
    assert row == {"step": 3, "stage": "dense", "leaky": False, "loss": None, "grad_norm": None, "lr": 1.5}
