"""The recipe as torchtitan sees it, and the Llama it trains."""

import pytest
import torch

from lighthouse_core.attention.module import LighthouseAttention
from lighthouse_core.config import load_recipe
from lighthouse_core.errors import RecipeError
from lighthouse_core.estimate import parameters
from lighthouse_core.titan import build_dense_model, build_job, check_overrides
from lighthouse_core.titan.model import use_lighthouse


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("recipes/quickstart.toml")


def test_the_optimizer_state_is_kept_at_the_last_step(recipe, tmp_path):
    job = build_job(recipe, tmp_path, steps=7, converters=[])
    assert job.training.steps == 7
    assert not job.checkpoint.last_save_model_only
    assert job.optimizer.lr == recipe.optimizer.lr


def test_titan_tables_reach_torchtitan(tmp_path):
    recipe = load_recipe("recipes/quickstart.toml", ["titan.comm.init_timeout_seconds=77"])
    check_overrides(recipe)
    assert build_job(recipe, tmp_path, steps=1, converters=[]).comm.init_timeout_seconds == 77


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("titan.comm.init_timeout=1", "not a setting of torchtitan"),
        ('titan.comm.init_timeout_seconds="long"', "valid integer"),
        ("titan.nothing.at_all=1", "not a setting of torchtitan"),
        ("titan.training.seq_len=64", "recipe's own sections"),
        ("titan.parallelism.tensor_parallel_degree=2", "only data parallelism"),
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
    assert sum(p.numel() for p in model.parameters()) == parameters(recipe.model).total


def test_initial_weights_depend_on_the_seed_alone(recipe):
    def weights(seed):
        model = build_dense_model(recipe.model, 32)
        model.model_args.seed = seed
        with torch.no_grad():
            model.init_weights()
        return torch.cat([p.flatten() for p in model.parameters()])

    first = weights(3)
    assert torch.equal(first, weights(3))
    assert not torch.equal(first, weights(4))
    assert first.isfinite().all()


def test_lighthouse_takes_the_place_of_all_but_the_dense_layers(recipe):
    model = build_dense_model(recipe.model, 32)
    before = set(model.state_dict())
    use_lighthouse(model, recipe.lighthouse.attention(), list(recipe.model.dense_layers))
    lighthouse = [n for n, b in model.layers.items() if isinstance(b.attention.inner_attention, LighthouseAttention)]
    assert lighthouse == ["1", "2"]
    assert set(model.state_dict()) == before
