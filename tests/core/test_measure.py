"""A dense step is timed inside a Lighthouse run, which is then as it was."""

import pytest
import torch

from lighthouse_core import LighthouseConfig
from lighthouse_core.attention import AttentionContext, Documents
from lighthouse_core.config import load_recipe
from lighthouse_core.errors import RecipeError, TrainingError
from lighthouse_core.models.decoder import build_dense_model, use_dense, use_lighthouse
from lighthouse_core.titan import measure
from lighthouse_core.titan.trainer import _full_memory_explained

TOKENS = 64


@pytest.fixture
def model():
    recipe = load_recipe("recipes/quickstart.toml", ["model.layers=3", "model.dense_layers=[0]"])
    built = build_dense_model(recipe.model, TOKENS)
    with torch.no_grad():
        built.init_weights()
    use_dense(built, "math")
    use_lighthouse(built, LighthouseConfig(pooling=2, levels=3, topk=4, tile_parents=4), [0])
    return built


def test_every_layer_is_dense_meanwhile_and_the_model_as_before_then(model, monkeypatch):
    tokens = torch.arange(TOKENS)[None]
    loss = model(tokens, labels=tokens)
    monkeypatch.setattr(type(model.layers["1"].attention.inner_attention.cfg.rule), "run", pytest.fail)
    clock = iter([0.0, 1.0, 10.0, 13.0, 20.0, 22.0, 30.0, 34.0])
    monkeypatch.setattr(measure, "_now", lambda device: next(clock))
    assert measure.dense_seconds(model, (2, TOKENS)) == 2.0
    monkeypatch.undo()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model(tokens, labels=tokens), loss)


def test_it_keeps_the_documents_of_a_batch_apart(model):
    documents = Documents(torch.tensor([0, 10, TOKENS, 2 * TOKENS], dtype=torch.int32), TOKENS)
    positions = torch.cat([torch.arange(n) for n in (10, TOKENS - 10, TOKENS)]).int().view(2, TOKENS)
    seen = []
    model.register_forward_pre_hook(lambda module, inputs, named: seen.append(named["context"]), with_kwargs=True)
    measure.dense_seconds(model, (2, TOKENS), AttentionContext(documents=documents, positions=positions))
    assert len(seen) == 4 and all(one.dense and one.documents is documents for one in seen)
    assert all(one.positions is positions for one in seen)


def test_a_dense_run_has_nothing_to_measure_against():
    with pytest.raises(RecipeError, match="measure_dense"):
        load_recipe("recipes/quickstart.toml", ["metrics.measure_dense=true", "lighthouse.enabled=false"])


def test_full_memory_is_one_line_with_a_way_out():
    words = (
        "CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.32 GiB is "
        "free. Including non-PyTorch memory, this process has 77.77 GiB memory in use. Of the allocated memory ..."
    )
    with pytest.raises(TrainingError) as caught, _full_memory_explained():
        raise torch.OutOfMemoryError(words)
    assert str(caught.value) == (
        "the accelerator's memory is full: CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has a total capacity "
        "of 79.10 GiB of which 1.32 GiB is free"
    )
    assert "activation_checkpointing" in caught.value.hint


def test_a_full_memory_of_a_cpu_is_one_line():
    words = r"^this machine's memory is full: \d+\.00 GiB more"
    with pytest.raises(TrainingError, match=words) as error, _full_memory_explained():
        torch.empty(1 << 60, dtype=torch.uint8)
    assert "\n" not in str(error.value) and error.value.hint
