"""The families of models: names, counts and config.json both ways, and the same numbers as transformers' classes."""

import json

import pytest
import torch
from directories import made
from hypothesis import given
from hypothesis import strategies as st

from lighthouse_core.config.model import ModelSection
from lighthouse_core.models import FAMILIES
from lighthouse_core.models.decoder import build_dense_model
from lighthouse_core.models.family import to_half_split
from lighthouse_core.weights.origin import find_weights

IDS = {"seq_len": 64, "bos_id": None, "eos_id": 1, "pad_id": 2, "dtype": "float32"}
SCALINGS = [
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 256,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    {
        "rope_type": "yarn",
        "factor": 3.0,
        "original_max_position_embeddings": 128,
        "attention_factor": 1.5,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
]


@st.composite
def sections(draw):
    kv_heads, group = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    heads = kv_heads * group
    return ModelSection(
        family=draw(st.sampled_from(list(FAMILIES))),
        dim=heads * draw(st.integers(1, 6)),
        layers=draw(st.integers(1, 3)),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 8)),
        ffn_dim=draw(st.integers(1, 50)),
        vocab_size=draw(st.integers(1, 300)),
        rope_theta=draw(st.sampled_from([10000.0, 500000.0])),
        rope_scaling=draw(st.sampled_from([None, *SCALINGS])),
        tied_embeddings=draw(st.booleans()),
    )


@given(sections())
def test_what_it_knows_of_a_model_is_that_model(section):
    state, kind = build_dense_model(section, 16).state_dict(), section.kind
    assert {one.source: one.shape for one in kind.entries(section)} == {k: tuple(v.shape) for k, v in state.items()}
    assert kind.parameters(section).total == sum(weight.numel() for weight in state.values())
    assert ModelSection(**kind.settings(kind.config(section, **IDS))) == section


@given(sections())
def test_config_json_is_that_of_transformers(section):
    transformers = pytest.importorskip("transformers")
    config = section.kind.config(section, **IDS)
    known = transformers.AutoConfig.for_model(**config)
    assert type(known).__name__.lower() == f"{section.family}config"
    assert ModelSection(**section.kind.settings(json.loads(known.to_json_string()))) == section


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"sliding_window": 512, "use_sliding_window": True},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        {"num_experts": 8},
        {"intermediate_size": None},
    ],
    ids=str,
)
def test_another_model_is_refused_by_the_field(family, change):
    section = ModelSection(family=family, dim=24, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=40, vocab_size=300)
    fields = [*change, *(field for value in change.values() if isinstance(value, dict) for field in value)]
    with pytest.raises(ValueError, match=r"\b(" + "|".join(fields) + r")\b"):
        section.kind.settings(section.kind.config(section, **IDS) | change)


def test_what_changes_nothing_is_not_minded():
    section = ModelSection(family="qwen2", dim=24, layers=2, heads=4, ffn_dim=40, vocab_size=300)
    config = section.kind.config(section, **IDS)
    unused = {
        "use_mrope": False,
        "sliding_window": 4096,
        "max_window_layers": 2,
        "pretraining_tp": 1,
        "unheard_of": None,
    }
    assert ModelSection(**section.kind.settings(config | unused)) == section
    with pytest.raises(ValueError, match="use_mrope"):
        section.kind.settings(config | {"use_mrope": True})


def loaded(path, tokens=2048):
    """The trainer's model with the weights of a directory."""
    settings = json.loads((path / "config.json").read_text())
    section = ModelSection(**FAMILIES[settings["model_type"]].settings(settings) | {"from": str(path)})
    model, weights = build_dense_model(section, tokens), find_weights(section)
    model.load_state_dict({name: weights.read(name) for name in model.state_dict()})
    return section, model


CASES = [
    (family, {"tie_word_embeddings": tied, "rope": rope})
    for family in FAMILIES
    for tied, rope in ((False, None), (True, SCALINGS[1]))
] + [("llama", {"rope": scaling}) for scaling in SCALINGS]


@pytest.mark.parametrize(("family", "changes"), CASES, ids=str)
def test_logits_and_gradients_equal_those_of_transformers(tmp_path, family, changes):
    theirs = made(tmp_path, family, **changes)
    section, ours = loaded(tmp_path)
    generator = torch.Generator().manual_seed(1)
    for length in (1, 17, 512, 2048):
        tokens = torch.randint(section.vocab_size, (1, length), generator=generator)
        with torch.no_grad():
            expected = theirs(tokens, use_cache=False).logits
            torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=1e-5)
    tokens = torch.randint(section.vocab_size, (2, 65), generator=generator)
    loss = theirs(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    # Theirs is the mean over all labels but the first of each row.
    total = ours(tokens[:, :-1], labels=tokens[:, 1:]) / tokens[:, 1:].numel()
    total.backward()
    torch.testing.assert_close(total, loss, rtol=1e-5, atol=0)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    found = dict(ours.named_parameters())
    for entry in section.kind.entries(section):
        gradient = found[entry.source].grad
        if entry.rotary_heads:
            gradient = to_half_split(gradient, entry.rotary_heads)
        expected = gradients.pop(entry.target)
        error = (gradient - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, f"{entry.source}: {error:.1e}"
    assert not gradients
