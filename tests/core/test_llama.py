"""The family Llama: its names, counts and config.json, both ways."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lighthouse_core.config.model import ModelSection
from lighthouse_core.models.decoder import build_dense_model
from lighthouse_core.models.llama import entries, hf_config, model_settings, parameters

IDS = {"seq_len": 64, "bos_id": None, "eos_id": 1, "pad_id": 2, "dtype": "float32"}


@st.composite
def sections(draw):
    kv_heads, group = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    heads = kv_heads * group
    return ModelSection(
        dim=heads * draw(st.integers(1, 6)),
        layers=draw(st.integers(1, 3)),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 8)),
        ffn_dim=draw(st.integers(1, 50)),
        vocab_size=draw(st.integers(1, 300)),
        rope_theta=draw(st.sampled_from([10000.0, 500000.0])),
    )


@given(sections())
def test_what_it_knows_of_a_model_is_that_model(section):
    state = build_dense_model(section, 16).state_dict()
    assert {entry.source: entry.shape for entry in entries(section)} == {k: tuple(v.shape) for k, v in state.items()}
    assert parameters(section).total == sum(weight.numel() for weight in state.values())
    found = ModelSection(**model_settings(hf_config(section, **IDS)))
    assert found == section


def test_config_json_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    section = ModelSection(dim=24, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=40, vocab_size=300)
    config = transformers.LlamaConfig(**hf_config(section, **IDS)).to_dict()
    assert ModelSection(**model_settings(config)) == section


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "qwen2"},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}},
    ],
    ids=str,
)
def test_another_model_is_refused_by_the_field(change):
    section = ModelSection(dim=24, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=40, vocab_size=300)
    with pytest.raises(ValueError, match=next(iter(change)).replace("rope_parameters", "rope_type")):
        model_settings(hf_config(section, **IDS) | change)
