"""The recipes that come with the package: each loads, says what it is, and costs what it should."""

import json
from pathlib import Path

import pytest

from lighthouse_core import shelf
from lighthouse_core.config import dump_recipe, find_recipe, load_recipe, loads_recipe
from lighthouse_core.config.model import ModelSection
from lighthouse_core.errors import RecipeError
from lighthouse_core.estimate import estimate, flops_per_token

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = sorted(RECIPES.glob("*.toml"))
PAPER = ("530m_98k", "530m_98k_dense")


# Recipes that continue a model, whose shape they do not have.
CONTINUE = ("extend_131072", "extend_2048")


def recipe(name: str, *overrides: str):
    return load_recipe(RECIPES / f"{name}.toml", overrides)


@pytest.fixture
def model(tmp_path):
    """A directory's description of a model of 8192 tokens with Llama 3.2 1B's shape, and no weights."""
    shape = {"dim": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "ffn_dim": 8192, "vocab_size": 128256}
    section = ModelSection(**shape, tied_embeddings=True, rope_theta=500000.0)
    ids = {"bos_id": 128000, "eos_id": 128001, "pad_id": 128001}
    config = section.kind.config(section, seq_len=8192, dtype="bfloat16", **ids)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return [f"model.from={json.dumps(str(tmp_path))}", 'data.tokenizer="bytes"']


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_loads_and_opens_with_two_comment_lines(file, model):
    lines = file.read_text().splitlines()
    assert [line[:2] for line in lines[:2]] == ["# ", "# "] and lines[2] == ""
    loaded = load_recipe(file, model if file.stem in CONTINUE else ())
    assert loads_recipe(dump_recipe(loaded)) == loaded
    assert f"[{file.name}]({file.name})" in (RECIPES / "README.md").read_text()


@pytest.mark.parametrize("name", CONTINUE)
def test_a_recipe_without_a_shape_asks_for_a_model(name):
    assert "--from" in shelf.recipe_title(RECIPES / f"{name}.toml")
    with pytest.raises(RecipeError, match=rf"{name}\.toml has no shape in \[model\]") as caught:
        recipe(name)
    assert "--from DIR" in caught.value.hint
    # A key that is wrong, or another one that is missing, comes first.
    with pytest.raises(RecipeError, match=r"unknown key model\.dimm; did you mean model\.dim\?"):
        recipe(name, "model.dimm=64")
    with pytest.raises(RecipeError, match=r"model\.layers is missing"):
        recipe(name, "model.dim=64")


def memory(settings) -> float:
    found = estimate(settings)
    return (found.state_bytes + found.activation_bytes) / 2**30


def test_the_extension_raises_theta_and_fits_one_h200(model):
    extended = recipe("extend_131072", *model)
    found = estimate(extended)
    assert found.parameters.total == 1_235_814_400
    assert (extended.model.rope_theta, extended.model.rope_scaling) == (2e7, None)
    # The least that slows the slowest pair by the ratio of the lengths, for heads of 128.
    assert extended.model.rope_theta > 500000 * (131072 / 8192) ** (128 / 126)
    assert found.tokens_per_step == 2**22 and extended.phases[0].first_window == 8192
    assert extended.training.steps * 5 == (extended.training.steps + extended.recover.steps) * 4
    needed, page = memory(extended), (RECIPES.parent / "docs/extending-context.md").read_text(encoding="utf-8")
    assert needed < 0.8 * 139
    full = memory(recipe("extend_131072", *model, 'training.activation_checkpointing="full"'))
    assert f"{needed:.0f} GiB" in page and f"{full:.0f} GiB" in page
    windows = ", ".join(phase.window_words for phase in extended.phases)
    assert f"windows {windows}" in page and f"| {extended.training.steps} + {extended.recover.steps} dense |" in page


def test_the_table_lists_nothing_else():
    assert (RECIPES / "README.md").read_text().count(".toml](") == len(FILES)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_model(name):
    found = estimate(recipe(name))
    assert found.parameters.total == 530_117_632
    assert found.tokens_per_step == 32 * 98304
    assert found.gathered == (18432 if name == "530m_98k" else None)
    settings = recipe(name)
    assert (settings.optimizer.lr, settings.schedule.warmup_steps) == (2e-3, 2000)
    assert (settings.optimizer.beta1, settings.optimizer.beta2, settings.optimizer.weight_decay) == (0.9, 0.95, 0.1)


def test_both_of_the_papers_runs_are_the_same_but_for_the_attention():
    ours, dense = recipe("530m_98k"), recipe("530m_98k_dense")
    assert ours.training.steps + ours.recover.steps == dense.training.steps + dense.recover.steps
    assert ours.model.model_copy(update={"dense_layers": ()}) == dense.model
    for section in ("data", "optimizer", "schedule", "parallel", "checkpoint", "metrics"):
        assert getattr(ours, section) == getattr(dense, section)
    assert not dense.lighthouse.enabled


def test_the_recommended_stage_1_has_the_papers_model_and_steps():
    ours, growing = recipe("530m_98k"), recipe("530m_98k_growing")
    others = {"dense_layers": (), "rope_theta": 1000000.0, "embedding_std": 0.02}
    assert ours.model.model_copy(update=others) == growing.model
    assert growing.training.steps + growing.recover.steps == ours.training.steps + ours.recover.steps
    assert growing.training.steps * 10 == (growing.training.steps + growing.recover.steps) * 9
    for section in ("data", "optimizer", "schedule", "parallel", "checkpoint", "metrics"):
        assert getattr(ours, section) == getattr(growing, section)


def test_flops_of_the_paper():
    # 6 (body + head) = 2.3927e9; a dense layer 6 * 1024 * 98304; a Lighthouse layer 6 * 1024 * 18432^2 / 98304.
    settings = recipe("530m_98k")
    weights = 6 * (267_449_344 + 131_334_144)
    assert flops_per_token(settings, "dense") == weights + 30 * 603_979_776
    assert flops_per_token(settings, "lighthouse") == weights + 4 * 603_979_776 + 26 * 21_233_664
    assert estimate(recipe("530m_98k_dense")).lighthouse_flops is None


def test_parameters_with_grouped_heads_and_a_wide_head():
    model = recipe("quickstart", "model.kv_heads=2", "model.head_dim=64").model
    layer = 128 * 4 * 64 * 2 + 128 * 2 * 64 * 2 + 3 * 128 * model.ffn_dim + 2 * 128
    counts = model.kind.parameters(model)
    assert counts.embedding == counts.head == 128 * model.vocab_size
    assert counts.body == model.layers * layer + 128


def test_a_recipe_is_found_by_path_and_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("quickstart") == find_recipe("quickstart.toml") == RECIPES / "quickstart.toml"
    (tmp_path / "quickstart.toml").write_text("mine")
    assert find_recipe("quickstart.toml") == Path("quickstart.toml")
    with pytest.raises(RecipeError, match="no recipe elsewhere/quickstart"):
        find_recipe("elsewhere/quickstart.toml")


def test_a_wheel_carries_the_recipes_inside_the_package(tmp_path, monkeypatch):
    (tmp_path / "installed.toml").touch()
    monkeypatch.setattr(shelf, "SHELVES", (tmp_path, tmp_path / "absent"))
    assert find_recipe("installed") == tmp_path / "installed.toml"
    with pytest.raises(RecipeError) as caught:
        find_recipe("quickstart")
    assert caught.value.hint == "give a path, or one of installed"


def test_quickstart_is_for_a_cpu():
    settings = recipe("quickstart")
    assert settings.training.dtype == "float32"
    assert settings.lighthouse.scorer in ("random", "block"), "the norm scorer leaks: its loss means little"
    assert settings.recover.steps > 0
    assert estimate(settings).parameters.total < 2e6
