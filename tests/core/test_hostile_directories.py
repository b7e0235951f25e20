"""Hugging Face directories from anywhere: nothing of them is run, and only a whole model is measured."""

import copy
import json
import os
import pickle
import random
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch

from lighthouse_cli import _output
from lighthouse_cli.app import main
from lighthouse_core.errors import UserError
from lighthouse_core.evaluate.load import load_directory

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
CPU = torch.device("cpu")
RECIPE = """
[model]
dim = 16
layers = 1
heads = 2
ffn_dim = 32
vocab_size = 260

[lighthouse]
enabled = false

[data]
validation = 0.2

[training]
seq_len = 32
global_batch_size = 1
steps = 20

[optimizer]
lr = 1e-3
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A small model that transformers wrote, with a tokenizer of the characters a to z."""
    path = tmp_path_factory.mktemp("whole") / "model"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    write_tokenizer(path)
    return path


def write_tokenizer(path: Path, more: int = 0) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["<unk>", "<s>", "</s>", " ", *map(chr, range(97, 123)), *(f"x{i}" for i in range(more))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')


@pytest.fixture
def model(whole, tmp_path, monkeypatch) -> Path:
    """A copy of it, beside a canary that its code would make."""
    path = Path(shutil.copytree(whole, tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    # Whatever asks, nobody answers.
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("it asked"))
    yield path
    assert not (tmp_path / "canary").exists()


def edit(path: Path, name: str = "config.json", **changes) -> None:
    content = json.loads((path / name).read_text())
    content |= {key: value for key, value in changes.items() if value is not ...}
    for key, value in changes.items():
        if value is ...:
            del content[key]
    (path / name).write_text(json.dumps(content))


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        load_directory(path, device=CPU)
    assert str(error.value).isprintable() and len(str(error.value)) < 700
    return str(error.value)


def test_a_whole_model_is_measured(model):
    said = []
    subject = load_directory(model, device=CPU, say=said.append)
    assert said == ["the tokenizer is tokenizer.json"]
    tokens = torch.tensor([[1, 4, 5, 6, 7]])
    direct = transformers.AutoModelForCausalLM.from_pretrained(model)(tokens).logits.log_softmax(-1)
    expected = -direct[0, :-1].gather(-1, tokens[0, 1:, None])[:, 0]
    torch.testing.assert_close(subject.losses(tokens)[0], expected)


def code(path: Path) -> None:
    (path / "own.py").write_text(
        f"open({str(path.parent / 'canary')!r}, 'w')\n"
        "from transformers import LlamaConfig as OwnConfig, LlamaForCausalLM as Own\n"
    )


AUTO_MAP = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": "own.Own"}


def test_code_of_its_own_is_not_run(model):
    code(model)
    edit(model, "tokenizer_config.json", auto_map=AUTO_MAP, tokenizer_class="Own")
    edit(model, auto_map=AUTO_MAP, custom_pipelines={"text-generation": {"impl": "own.Own"}})
    (model / "custom_generate").mkdir()
    shutil.copy(model / "own.py", model / "custom_generate/generate.py")
    shutil.copy(model / "own.py", model / "modeling_llama.py")
    # transformers has a class of that name, which needs nothing of it.
    load_directory(model, device=CPU)
    edit(model, model_type="own")
    assert "needs code of its own (auto_map" in refused(model)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("value", ["someone/kernel", {"": "someone/kernel@main:name"}])
def test_kernels_that_it_names_are_not_fetched(model, key, value):
    edit(model, **{key: value})
    if isinstance(value, str):
        assert f"names kernels to fetch and run: {key}" in refused(model)
    else:
        try:
            subject = load_directory(model, device=CPU)
        except UserError:
            return
        assert subject.losses(torch.arange(8)[None]).isfinite().all()


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "consolidated.00.pth", "tf_model.h5"]
)
def test_pickled_weights_are_refused_by_name(model, name):
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(Touch(model.parent / "canary")))
    assert name in refused(model)
    # Beside safetensors they are not opened.
    shutil.copy(model / name, model / "training_args.bin")


def test_pickled_weights_beside_safetensors_are_not_opened(model):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pkl"):
        (model / name).write_bytes(pickle.dumps(Touch(model.parent / "canary")))
    load_directory(model, device=CPU)


def indexed(path: Path, name: str) -> None:
    weights = safetensors.load_file(path / "model.safetensors")
    (path / "model.safetensors").rename(path / "model-1.safetensors")
    weight_map = dict.fromkeys(weights, "model-1.safetensors") | {"lm_head.weight": name}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_weights_in_several_files(model):
    indexed(model, "model-1.safetensors")
    load_directory(model, device=CPU)


@pytest.mark.parametrize("name", ["../model-1.safetensors", "/etc/passwd", "weights.bin", 3, None, "a\x1b[2J", ".."])
def test_an_index_names_files_beside_it(model, name):
    indexed(model, name)
    shutil.copy(model / "model-1.safetensors", model.parent)
    assert "no file of safetensors beside it" in refused(model)


def test_an_adapter_is_called_one(model):
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "../other", "peft_type": "LORA"}')
    assert "holds an adapter" in refused(model)
    (model / "config.json").unlink()
    assert "holds an adapter" in refused(model)


def drop(path: Path, *names: str, **more: torch.Tensor) -> None:
    weights = safetensors.load_file(path / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if name not in names} | more
    safetensors.save_file(kept, path / "model.safetensors", metadata={"format": "pt"})


def test_missing_weights_are_not_drawn_at_random(model):
    drop(model, "lm_head.weight")
    assert "describes a model of" in refused(model)
    # Others in their place.
    drop(model, spare=torch.ones(40, 16))
    assert "missing keys, 'lm_head.weight'" in refused(model)


def test_weights_too_many_are_refused(model):
    drop(model, **{"model.layers.2.mlp.up_proj.weight": torch.ones(24, 16)})
    assert "unexpected keys" in refused(model)


def test_weights_of_another_shape_are_refused(model):
    drop(model, "model.norm.weight", **{"model.norm.weight": torch.ones(17)})
    assert "model" in refused(model)


@pytest.mark.parametrize(
    "make",
    [
        lambda: transformers.BertForMaskedLM(
            transformers.BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                    intermediate_size=24)
        ),
        lambda: transformers.LlamaModel(
            transformers.LlamaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=24)
        ),
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=40, d_model=16, num_layers=1, num_heads=2, d_ff=24, d_kv=8)
        ),
    ],
    ids=["masked", "headless", "encoder-decoder"],
)  # fmt: skip
def test_other_models_are_refused(make, tmp_path):
    make().save_pretrained(tmp_path / "other")
    write_tokenizer(tmp_path / "other")
    refused(tmp_path / "other")


def test_weights_under_another_name_are_refused(model):
    edit(model, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    refused(model)
    edit(model, model_type="mistral", architectures=["LlamaForCausalLM"])
    assert "transformers would make MistralForCausalLM of it" in refused(model)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "nonsense"},
        {"hidden_act": None},
        {"hidden_size": 1 << 40},
        {"vocab_size": 1 << 62},
        {"vocab_size": 10**30},
        {"vocab_size": -1},
        {"intermediate_size": 1 << 33},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 1},
        {"num_hidden_layers": "two"},
        {"num_labels": 10**7},
        {"num_attention_heads": 0},
        {"num_attention_heads": 3},
        {"num_key_value_heads": 7},
        {"head_dim": 1 << 30},
        {"model_type": "nonsense"},
        {"model_type": 5},
        {"model_type": ...},
        {"model_type": "a\x1b[2Jb"},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"quantization_config": {"quant_method": "fp8"}},
        {"transformers_weights": "../other.safetensors"},
        {"rms_norm_eps": "small"},
        {"pad_token_id": 4000},
    ],
    ids=str,
)
def test_bad_configurations(model, changes):
    edit(model, **changes)
    refused(model)


@pytest.mark.skipif(transformers.__version__ < "5", reason="older releases do not know these settings")
@pytest.mark.parametrize(
    "changes",
    [{"dtype": "os.system"}, {"rope_parameters": {"rope_type": "nonsense"}}, {"layer_types": ["nonsense"] * 2}],
    ids=str,
)
def test_bad_configurations_of_newer_releases(model, changes):
    edit(model, **changes)
    refused(model)


def test_a_rotation_that_an_older_release_does_not_know(model, monkeypatch):
    config = json.loads((model / "config.json").read_text())
    config.pop("rope_theta", None)
    (model / "config.json").write_text(json.dumps(config | {"rope_parameters": {"rope_type": "default"}}))
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    assert "needs transformers 5" in refused(model)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "null", "7", "\ufeff{}", "[" * 100_000, '{"a":' * 50_000, '{"a": 1' + "0" * 5000 + "}"]
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_files_that_are_no_objects(model, name, text):
    (model / name).write_text(text)
    if name == "generation_config.json":
        # It says nothing of how a text is measured.
        try:
            load_directory(model, device=CPU)
        except UserError as error:
            assert str(error).isprintable()
    elif text != "\ufeff{}" or name == "config.json":
        assert name in refused(model)


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 8, struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 2) + b"{}", b"PK"]
)
def test_bad_safetensors(model, content):
    (model / "model.safetensors").write_bytes(content)
    refused(model)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "model-1.safetensors"])
def test_a_pipe_is_not_waited_for(model, name):
    if name == "model-1.safetensors":
        indexed(model, name)
    (model / name).unlink()
    os.mkfifo(model / name)
    assert name in refused(model)


@pytest.mark.parametrize("depth", [100, 500, 980])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_files_that_are_nested_deeply(model, name, depth):
    there = json.loads((model / name).read_text()) if (model / name).is_file() else {}
    (model / name).write_text(
        json.dumps(there)[:-1] + (", " if there else "") + '"x": ' + "[" * depth + "]" * depth + "}"
    )
    assert "nested too deeply" in refused(model)


def test_a_mark_in_a_configuration_is_named(model):
    (model / "config.json").write_text("\ufeff" + (model / "config.json").read_text())
    assert "byte-order mark" in refused(model)


def test_an_unknown_activation_is_named(model):
    edit(model, hidden_act="nope")
    assert "unknown hidden_act, 'nope'" in refused(model)


def test_missing_files(model):
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        (model / name).unlink()
        assert name in refused(model)


def test_the_tokenizer_fits_the_model(model):
    write_tokenizer(model, more=50)
    assert "tokens, and the model 40" in refused(model)


def test_the_tokenizer_that_can_be_read(model, foreign_spm):
    """tokenizer.json first, as transformers has it; the other one where it cannot be read."""
    (model / "tokenizer.model").write_bytes(b"no model")
    said = []
    assert load_directory(model, device=CPU, say=said.append).tokenizer_name == str(model / "tokenizer.json")
    assert said == ["the tokenizer is tokenizer.json"]
    (model / "tokenizer.json").write_text("{")
    assert "tokenizer.json" in refused(model)
    shutil.copy(foreign_spm("small", vocab_size=300), model / "tokenizer.model")
    # That is read, and has more tokens than this model.
    assert "tokenizer.model has" in refused(model)


HOSTILE = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    7,
    64,
    10**6,
    1 << 31,
    1 << 62,
    10**30,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "os.system",
    "../..",
    "a/b",
    "\x1b[31m",
    [],
    [1],
    ["x"],
    {},
    {"a": 1},
    {"type": "linear"},
    [[]],
    {"": {}},
]


def mutated(config: dict, chance: random.Random) -> dict:
    config = copy.deepcopy(config)
    for _ in range(chance.choice((1, 1, 2, 4))):
        target = config
        nested = [value for value in config.values() if isinstance(value, dict) and value]
        if nested and chance.random() < 0.2:
            target = chance.choice(nested)
        key = chance.choice(list(target))
        if chance.random() < 0.15:
            del target[key]
        elif chance.random() < 0.15:
            target[chance.choice(MORE)] = copy.deepcopy(chance.choice(HOSTILE))
        else:
            target[key] = copy.deepcopy(chance.choice(HOSTILE))
    return config


MORE = [
    "auto_map",
    "attn_implementation",
    "torch_dtype",
    "use_cache",
    "rope_scaling",
    "sliding_window",
    "layer_types",
    "num_experts",
    "is_encoder_decoder",
    "add_cross_attention",
    "is_decoder",
    "text_config",
    "return_dict",
    "output_hidden_states",
    "output_attentions",
    "pruned_heads",
    "torchscript",
    "per_layer_config",
    "quantization_config",
    "_name_or_path",
    "transformers_weights",
    "tp_plan",
    "base_model_tp_plan",
    "num_labels",
    "id2label",
    "label2id",
    "name_or_path",
]


def fuzz(model: Path, count: int, seed: int) -> int:
    config, chance, measured = json.loads((model / "config.json").read_text()), random.Random(seed), 0
    for _ in range(count):
        (model / "config.json").write_text(json.dumps(mutated(config, chance)))
        try:
            subject = load_directory(model, device=CPU)
            assert subject.losses(torch.arange(8)[None]).shape == (1, 7)
            measured += 1
        except UserError as error:
            assert str(error).isprintable()
    return measured


def test_mutated_configurations(model):
    assert fuzz(model, 50, 0) > 5


@pytest.mark.slow
def test_many_mutated_configurations(model):
    assert fuzz(model, 1500, 1) > 150


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"]
)
def test_mutated_files(model, name):
    whole, chance = (model / name).read_bytes(), random.Random(2)
    for _ in range(8):
        content = bytearray(whole)
        for _ in range(chance.choice((1, 3))):
            # Of the weights, the header.
            content[chance.randrange(min(len(content), 1500))] = chance.randrange(256)
        (model / name).write_bytes(content)
        try:
            load_directory(model, device=CPU)
        except UserError as error:
            assert str(error).isprintable()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("adapter", "holds an adapter"),
        ("pickled", "pytorch_model.bin"),
        ("code", "needs code of its own"),
        ("act", "unknown hidden_act"),
    ],
)
def test_the_command_ends_with_2_and_one_line(fault, words, model, monkeypatch, capsys):
    (model.parent / "a.toml").write_text(RECIPE)
    if fault == "adapter":
        (model / "config.json").rename(model / "adapter_config.json")
    elif fault == "pickled":
        (model / "model.safetensors").rename(model / "pytorch_model.bin")
    elif fault == "code":
        code(model)
        edit(model, model_type="own", auto_map=AUTO_MAP)
    else:
        edit(model, hidden_act="nonsense")
    monkeypatch.setattr(sys, "argv", ["lighthouse", "eval", str(model), "--recipe", "a.toml"])
    monkeypatch.setattr(_output, "_quiet", False)
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and "Traceback" not in said and said.count("error: ") == 1
    assert words in said
    assert not (model.parent / "model-eval").exists()
