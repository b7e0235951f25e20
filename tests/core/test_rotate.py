"""Rotation after pooling: what a branch of the published release recorded, and what rotation before has in common."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lighthouse_core import LighthouseConfig, dense_attention, lighthouse_attention, select_indices
from lighthouse_core.attention.rotary import last_tokens, rotate, rotate_entries
from lighthouse_core.attention.settings import SettingError
from lighthouse_core.config import load_recipe
from lighthouse_core.models.decoder import build_dense_model, use_lighthouse

SMALL = LighthouseConfig(pooling=2, levels=3, topk=8, tile_parents=4, backend="reference", rotate="after")


def table(tokens, dim, theta=10000.0):
    angles = torch.outer(torch.arange(tokens).float(), theta ** (-torch.arange(0, dim, 2).float() / dim))
    return torch.stack((angles.cos(), angles.sin()), -1)


def draw(tokens=150, dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(2, tokens, heads, 8, generator=generator, dtype=dtype) for heads in (4, 2, 2)]


def test_the_recorded_call():
    """Indices equal; output and gradients to float32's rounding."""
    case = load_file(Path(__file__).parents[1] / "golden/case_d.safetensors")
    cfg = LighthouseConfig(
        pooling=4,
        levels=3,
        topk=256,
        tile_parents=128,
        cover_prefix=False,
        backend="reference",
        dense_backend="math",
        rotate="after",
    )
    assert torch.equal(select_indices(case["q"], case["k"], cfg), case["idx"].int())
    leaves = [case[name].requires_grad_() for name in ("q", "k", "v")]
    out = lighthouse_attention(*leaves, cfg, rotary=table(4096, 16))
    grads = torch.autograd.grad(out, leaves, case["go"])
    for got, wanted in zip((out, *grads), (case[name] for name in ("out", "dq", "dk", "dv")), strict=True):
        assert (got - wanted).norm() <= 1e-5 * wanted.norm()


def test_the_last_token_of_a_window():
    g = SMALL.geometry(50)
    rows = [(i + 1) * g.window(level) - 1 for level in range(g.levels) for i in range(g.windows(level))]
    assert last_tokens(torch.arange(g.pyramid_length), g).tolist() == rows


def test_entries_of_tokens_are_turned_as_tokens_are():
    q, _, _ = draw()
    g, rotary = SMALL.geometry(150), table(150, 8)
    tokens = torch.arange(150).expand(2, 2, -1)
    assert torch.equal(rotate_entries(q, tokens, rotary, g), rotate(q, rotary))


@pytest.mark.parametrize("window", [0, 10])
@pytest.mark.parametrize("scorer", ["norm", "block"])
def test_a_rotation_by_nothing_is_none(window, scorer):
    """With all angles 0 both ways are the same call."""
    qkv, key = draw(), torch.tensor([1, 2, 3])
    still = table(150, 8) * 0 + torch.tensor([1.0, 0.0])
    after = replace(SMALL, window=window, scorer=scorer)
    out = lighthouse_attention(*qkv, after, rotary=still, key=key)
    before = lighthouse_attention(*qkv, replace(after, rotate="before"), key=key)
    # It turns in float32.
    torch.testing.assert_close(out, before, rtol=1e-5, atol=1e-5)


def test_queries_and_keys_of_a_window_are_turned_at_their_places():
    """Tokens that have little but their window are dense attention after RoPE, nearly."""
    (q, k, v), rotary = draw(), table(150, 8)
    out = lighthouse_attention(q, k, v, replace(SMALL, window=149), rotary=rotary)
    dense = dense_attention(rotate(q, rotary), rotate(k, rotary), v)
    other = lighthouse_attention(q, k, v, replace(SMALL, window=149, rotate="before"))
    assert (out - dense).norm() < 0.5 * (other - dense).norm()


def test_a_dense_call_is_turned_too():
    (q, k, v), rotary = draw(), table(150, 8)
    out = lighthouse_attention(q, k, v, replace(SMALL, levels=1), rotary=rotary)
    assert torch.equal(out, dense_attention(rotate(q, rotary), rotate(k, rotary), v))


def test_the_table_comes_with_the_setting():
    qkv = draw()
    with pytest.raises(ValueError, match="needs the rotary table"):
        lighthouse_attention(*qkv, SMALL)
    with pytest.raises(ValueError, match="takes no rotary table"):
        lighthouse_attention(*qkv, replace(SMALL, rotate="before"), rotary=table(150, 8))
    for method in ("chunked", "sliding", "compressed"):
        with pytest.raises(SettingError, match="must be 'before' for the method"):
            LighthouseConfig(method=method, window=16, rotate="after")


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_rotates_after_pooling(compiled):
    """Its layers give what the call gives; dense layers, and a context that is dense, rotate before."""
    from lighthouse_core.attention import AttentionContext

    torch._dynamo.reset()
    settings = ['lighthouse.rotate="after"', 'lighthouse.scorer="norm"', "lighthouse.topk=16", "training.seq_len=256"]
    recipe = load_recipe("recipes/quickstart.toml", settings)
    model, plain = (build_dense_model(recipe.model, 256) for _ in range(2))
    with torch.no_grad():
        model.init_weights()
        plain.load_state_dict(model.state_dict())
    use_lighthouse(model, recipe.phases[-1].attention, recipe.model.dense_layers)
    tokens = torch.randint(257, (1, 256), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(tokens, context=AttentionContext(dense=True)), plain(tokens))
    seen = []
    hook = model.layers["1"].attention.inner_attention.register_forward_hook(
        lambda m, x, named, y: seen.append((x, named, y)), with_kwargs=True
    )
    logits = model(tokens)
    hook.remove()
    ((q, k, v, _), named, out), *_ = seen
    rotary = named["rotary"]
    assert torch.equal(rotary, model.freqs_cis)
    assert torch.equal(out, lighthouse_attention(q, k, v, recipe.phases[-1].attention, rotary=rotary))
    if compiled:
        for block in model.layers.values():
            block.compile(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(model(tokens), logits, rtol=1e-4, atol=1e-4)
