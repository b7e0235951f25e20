"""`pretrain --from`: what fits begins, and everything else is refused in one line before anything is written."""

import json
import os
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from directories import RECIPE, corpus, edit, made, rewrite
from safetensors.torch import load_file, save_file
from test_bad_input import check_refused, tree

from lighthouse_core.config import load_recipe
from lighthouse_core.runs.create import create_run
from lighthouse_core.runs.run import Run


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A model of every family that differs in what can be wrong with it."""
    folder = tmp_path_factory.mktemp("originals")
    made(folder / "llama", "llama", tie_word_embeddings=True)
    made(folder / "qwen3", "qwen3", "bfloat16", shards="40KB")
    made(folder / "mistral", "mistral")
    made(folder / "qwen2", "qwen2")
    return folder


@pytest.fixture
def place(here, trainer, originals):
    shutil.copytree(originals / "llama", here / "given")
    shutil.copytree(originals / "qwen3", here / "parts")
    (here / "begin.toml").write_text(RECIPE)
    corpus(here)
    return here


def refused(lighthouse, trainer, place, *words, name="given", arguments=()):
    """That a start is refused in one line with these words, by the dry run as well unless only weights say it."""
    before = tree(place)
    said = check_refused(lighthouse("pretrain", "begin.toml", "--name", "new", "--from", str(name), *arguments))
    assert all(word in said for word in words), said
    assert tree(place) == before and not trainer.launches
    return said


def test_a_directory_begins_a_run(lighthouse, trainer, place):
    answer = lighthouse("pretrain", "begin.toml", "--name", "new", "--from", "given")
    assert answer.code == 0, answer
    assert "beginning with" in answer.err and "LlamaForCausalLM, float32, 1 file; step, optimizer" in answer.err
    run = Run("runs/new")
    assert run.recipe.model.origin == str(place / "given") and run.ledger["weights"]["recovered"] is True
    assert (run.recipe.model.dim, run.recipe.model.tied_embeddings) == (60, True)
    assert sorted(os.listdir(run.path / "origin")) == ["config.json", "generation_config.json"]
    # What it keeps loads again without the directory.
    shutil.rmtree(place / "given")
    assert load_recipe(run.recipe_path) == run.recipe


def test_a_dry_run_says_what_is_read_and_what_changes(lighthouse, trainer, place):
    before = tree(place)
    answer = lighthouse("pretrain", "begin.toml", "--dry-run", "--from", "parts", "--set", "model.rope_theta=1e6")
    assert re.search(
        r"\n# loading \(estimate\) +\d+\.\d\d GiB a process, and \d+\.\d\d GiB of the machine's memory\n", answer.out
    )
    assert answer.code == 0 and tree(place) == before, answer
    said = [" ".join(line.split()[1:]) for line in answer.out.splitlines() if line.startswith("# ")]
    assert any(line.startswith(f"weights {place / 'parts'}: Qwen3ForCausalLM, bfloat16, ") for line in said), said
    changed = [line for line in said if line.startswith("changed")]
    assert changed == ["changed length 2048 -> 64", "changed model.rope_theta 500000.0 -> 1000000.0"]


def cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:count])


def lie(path: Path) -> None:
    """A header of a file of safetensors that says more than there is."""
    header = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def index(path: Path, **places) -> None:
    (path / "model.safetensors").rename(path / "model-1.safetensors")
    names = dict.fromkeys(load_file(path / "model-1.safetensors"), "model-1.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names | places}))


def pickled(path: Path) -> None:
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def quantized(path: Path, kind: torch.dtype) -> None:
    rewrite(path, lambda w: w.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(100, 60).to(kind)}))


DOWN = "model.layers.1.mlp.down_proj.weight"
# What is done to a directory, and what the refusal names.
BAD = {
    "a missing tensor": (lambda p: rewrite(p, lambda w: w.pop(DOWN)), ["no tensor", DOWN]),
    "an extra tensor": (lambda p: rewrite(p, lambda w: w.update(x=torch.ones(1))), ["has a tensor", " x"]),
    "an extra bias": (
        lambda p: rewrite(p, lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(60)})),
        ["model.layers.0.self_attn.q_proj.bias"],
    ),
    "a wrong shape": (lambda p: rewrite(p, lambda w: w.update({DOWN: w[DOWN].mT.contiguous()})), [DOWN, "[100, 60]"]),
    "another width": (lambda p: edit(p, intermediate_size=99), ["gate_proj", "[99, 60]"]),
    "another vocabulary": (lambda p: edit(p, vocab_size=301), ["embed_tokens", "[301, 60]"]),
    "a layer less": (lambda p: edit(p, num_hidden_layers=1), ["model.layers.1."]),
    "a layer more": (lambda p: edit(p, num_hidden_layers=3), ["model.layers.2."]),
    "pickled": (pickled, ["pickled", "pytorch_model.bin"]),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), ["neither a model.safetensors"]),
    "no config": (lambda p: (p / "config.json").unlink(), ["neither a config.json"]),
    "auto_map": (lambda p: edit(p, auto_map={"AutoModel": "own.Own"}), ["auto_map"]),
    "an index above": (lambda p: index(p, x="../x.safetensors"), ["index.json", "../x.safetensors"]),
    "an absolute index": (lambda p: index(p, x="/x.safetensors"), ["index.json", "/x.safetensors"]),
    "an index of a folder": (lambda p: index(p, x="a/x.safetensors"), ["index.json", "a/x.safetensors"]),
    "an index of numbers": (lambda p: index(p, x=3), ["index.json", "'3'"]),
    "an index of pickles": (lambda p: index(p, x="x.bin"), ["index.json", "x.bin"]),
    "an index of a file that is not there": (lambda p: index(p, x="gone.safetensors"), ["gone.safetensors"]),
    "an index of more than there is": (lambda p: index(p, x="model-1.safetensors"), ["model-1.safetensors", " x"]),
    "a link to nothing": (
        lambda p: (index(p, x="y.safetensors"), (p / "y.safetensors").symlink_to("nowhere")),
        ["y.safetensors"],
    ),
    "a link to a device": (
        lambda p: (index(p, x="y.safetensors"), (p / "y.safetensors").symlink_to("/dev/zero")),
        ["y.safetensors"],
    ),
    "a pipe": (lambda p: (index(p, x="y.safetensors"), os.mkfifo(p / "y.safetensors")), ["y.safetensors"]),
    "the same tensor twice": (
        lambda p: (
            save_file({"model.norm.weight": torch.ones(60)}, p / "two.safetensors"),
            index(p, x="two.safetensors"),
        ),
        ["model.norm.weight", "two.safetensors"],
    ),
    "cut off": (lambda p: cut(p / "model.safetensors", 20_000), ["model.safetensors cannot be read"]),
    "cut off in its header": (lambda p: cut(p / "model.safetensors", 100), ["model.safetensors cannot be read"]),
    "empty": (lambda p: cut(p / "model.safetensors", 0), ["model.safetensors cannot be read"]),
    "a header that lies": (lambda p: lie(p / "model.safetensors"), ["model.safetensors cannot be read"]),
    "int8": (lambda p: quantized(p, torch.int8), ["up_proj", "I8"]),
    "fp8": (lambda p: quantized(p, torch.float8_e4m3fn), ["up_proj", "F8_E4M3"]),
    "float64": (lambda p: quantized(p, torch.float64), ["up_proj", "F64"]),
    "quantized": (lambda p: edit(p, quantization_config={"quant_method": "fp8"}), ["quantization_config"]),
    "an unknown field": (lambda p: edit(p, logit_softcap=30.0), ["config.json", "logit_softcap"]),
    "multipliers": (lambda p: edit(p, embedding_multiplier=12.0), ["embedding_multiplier"]),
    "experts": (lambda p: edit(p, num_local_experts=8), ["num_local_experts"]),
    "a window": (lambda p: edit(p, sliding_window=512), ["sliding_window"]),
    "windows in layers": (
        lambda p: edit(p, layer_types=["full_attention", "sliding_attention"]),
        ["layer_types"],
    ),
    "a partial rotation": (lambda p: edit(p, partial_rotary_factor=0.5), ["partial_rotary_factor"]),
    "longrope": (
        lambda p: edit(p, rope_parameters={"rope_type": "longrope", "factor": 4, "short_factor": [1.0]}),
        ["rope_type", "longrope"],
    ),
    "dynamic": (
        lambda p: edit(p, rope_parameters=..., rope_scaling={"type": "dynamic", "factor": 4}),
        ["rope_type", "dynamic"],
    ),
    "a scaling without its factor": (
        lambda p: edit(p, rope_parameters={"rope_type": "linear", "rope_theta": 1e4}),
        ["config.json", "model.rope_scaling.factor"],
    ),
    "another family": (lambda p: edit(p, model_type="gemma"), ["model_type", "gemma"]),
    "a mixture": (lambda p: edit(p, model_type="mixtral"), ["model_type", "mixtral"]),
    "no family": (lambda p: edit(p, model_type=...), ["model_type", "None"]),
    "a family that is no name": (lambda p: edit(p, model_type=["llama"]), ["model_type"]),
    "10^9 layers": (lambda p: edit(p, num_hidden_layers=10**9), ["config.json", "layers", "1000000000"]),
    "10^9 wide": (
        lambda p: edit(p, hidden_size=6 * 10**8, num_attention_heads=6, head_dim=10**8),
        ["config.json", "model."],
    ),
    "10^9 tokens": (lambda p: edit(p, vocab_size=10**9), ["config.json", "vocab_size", "1000000000"]),
    "a width below 0": (lambda p: edit(p, intermediate_size=-1), ["config.json", "ffn_dim", "-1"]),
    "a width of text": (lambda p: edit(p, hidden_size="60"), ["config.json", '"60"']),
    "a width that is true": (lambda p: edit(p, intermediate_size=True), ["config.json", "ffn_dim", "true"]),
    "no heads": (lambda p: edit(p, num_attention_heads=0, head_dim=...), ["config.json", "num_attention_heads"]),
    "too many digits": (
        lambda p: (p / "config.json").write_text('{"model_type": "llama", "hidden_size": ' + "9" * 5000 + "}"),
        ["config.json", "digits"],
    ),
    "nested": (lambda p: (p / "config.json").write_text("[" * 9999 + "]" * 9999), ["config.json", "nested"]),
    "a list": (lambda p: (p / "config.json").write_text("[1]"), ["config.json", "no object"]),
    "no JSON": (lambda p: (p / "config.json").write_text("{"), ["config.json"]),
    "not UTF-8": (lambda p: (p / "config.json").write_bytes(b'{"a": "\xff"}'), ["config.json"]),
    "heads that do not divide": (lambda p: edit(p, num_key_value_heads=4), ["config.json", "kv_heads"]),
    "an epsilon of 0": (lambda p: edit(p, rms_norm_eps=0.0), ["config.json", "norm_eps"]),
    "NaN": (lambda p: rewrite(p, lambda w: w[DOWN].view(-1)[-1:].fill_(float("nan"))), [DOWN, "NaN"]),
    "infinity": (lambda p: rewrite(p, lambda w: w[DOWN][:1].fill_(float("inf"))), [DOWN, "infinity"]),
    "another head": (
        lambda p: rewrite(p, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1})),
        ["lm_head.weight", "tie_word_embeddings"],
    ),
    "a head of another shape": (
        lambda p: rewrite(p, lambda w: w.update({"lm_head.weight": torch.ones(3)})),
        ["lm_head.weight", "tie_word_embeddings"],
    ),
    "an adapter": (lambda p: edit(p, "config.json") or shutil.copy(p / "config.json", p / "adapter_config.json"),
                   ["adapter"]),
    "an adapter alone": (lambda p: (p / "config.json").rename(p / "adapter_config.json"), ["adapter"]),
    "weights of another name": (lambda p: edit(p, transformers_weights="x.safetensors"), ["transformers_weights"]),
    "kernels to fetch": (lambda p: edit(p, _attn_implementation="a/b"), ["_attn_implementation"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_directory_that_does_not_fit_is_refused(lighthouse, trainer, place, kind):
    change, words = BAD[kind]
    change(place / "given")
    refused(lighthouse, trainer, place, *words)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": 512, "use_sliding_window": True},
        {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True},
        {"num_experts": 4},
        {"attention_bias": True},
        {"unheard_of": 1},
    ],
    ids=str,
)
def test_what_a_family_has_not_is_refused_by_its_field(lighthouse, trainer, place, originals, family, change):
    shutil.copytree(originals / family, place / "other")
    edit(place / "other", **change)
    said = refused(lighthouse, trainer, place, "config.json", name="other")
    assert any(field in said for field in change), said


def test_a_directory_of_links_begins_a_run(lighthouse, trainer, place):
    """As the cache of Hugging Face keeps them: snapshots of links into blobs."""
    snapshot = place / "hub/models--a--b/snapshots/0a1b"
    snapshot.mkdir(parents=True)
    (place / "hub/models--a--b/blobs").mkdir()
    for number, file in enumerate(sorted((place / "parts").iterdir())):
        file.rename(place / f"hub/models--a--b/blobs/{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (place / "a link").symlink_to(snapshot)
    answer = lighthouse("pretrain", "begin.toml", "--name", "new", "--from", "a link")
    assert answer.code == 0, answer
    kept = place / "runs/new/origin/config.json"
    assert kept.is_file() and not kept.is_symlink()


@pytest.mark.parametrize("where", ["~/mine", "with spaces/in it", "größe/模型", "runs/given", "a'b\"c"])
def test_where_a_directory_may_be(lighthouse, trainer, place, monkeypatch, where):
    monkeypatch.setenv("HOME", str(place / "home"))
    path = Path(os.path.expanduser(where))
    shutil.copytree(place / "given", path)
    answer = lighthouse("pretrain", "begin.toml", "--name", "new", "--from", where)
    assert answer.code == 0, answer
    assert Run("runs/new").recipe.model.origin == os.path.abspath(path)
    lighthouse("pretrain", "begin.toml", "--name", "two", "--set", f"model.from={json.dumps(where)}")
    assert Run("runs/two").recipe.model == Run("runs/new").recipe.model


def test_a_directory_that_cannot_be_written_to_begins_a_run(lighthouse, trainer, place):
    for path in (*(place / "given").iterdir(), place / "given"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = tree(place / "given")
    assert lighthouse("pretrain", "begin.toml", "--name", "new", "--from", "given").code == 0
    assert tree(place / "given") == before
    assert not list((place / "given").glob("*new*"))


def test_a_name_that_is_not_utf_8_is_refused(lighthouse, trainer, place):
    shutil.copytree(place / "given", place / "\udcff")
    refused(lighthouse, trainer, place, "not UTF-8", name="\udcff")


@pytest.mark.parametrize("kind", ["file", "folder", "nothing", "empty"])
def test_what_is_no_directory_of_a_model_is_refused(lighthouse, trainer, place, kind):
    (place / "file").write_text("x")
    (place / "folder").mkdir()
    words = {
        "file": "file",
        "folder": "neither a config.json nor a recipe.toml",
        "nothing": "nothing",
        "empty": "--from",
    }
    name = "" if kind == "empty" else kind
    refused(lighthouse, trainer, place, words[kind], name=name)


CHANGES = {
    "family": '"mistral"', "dim": "66", "layers": "3", "heads": "12", "kv_heads": "6", "head_dim": "12",
    "ffn_dim": "101", "vocab_size": "301", "norm_eps": "1e-3", "tied_embeddings": "false",
}  # fmt: skip


@pytest.mark.parametrize("key", CHANGES)
def test_a_recipe_that_contradicts_is_refused_by_the_key(lighthouse, trainer, place, key):
    refused(lighthouse, trainer, place, f"--set model.{key}: model.{key} is ", "config.json",
            arguments=("--set", f"model.{key}={CHANGES[key]}"))  # fmt: skip
    text = (place / "begin.toml").read_text()
    (place / "begin.toml").write_text(f"[model]\n{key} = {CHANGES[key]}\n{text}")
    refused(lighthouse, trainer, place, f"begin.toml:2: model.{key} is ")


def test_a_recipe_may_repeat_what_is_there(lighthouse, trainer, place):
    settings = [
        part
        for key, value in load_recipe("begin.toml", ['model.from="given"']).model.model_dump().items()
        if key in CHANGES
        for part in ("--set", f"model.{key}={json.dumps(value)}")
    ]
    assert lighthouse("pretrain", "begin.toml", "--name", "new", "--from", "given", *settings).code == 0


def test_some_keys_of_a_scaling_may_be_changed(lighthouse, trainer, place):
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024, "rope_theta": 1e4}
    edit(place / "given", rope_parameters=yarn)
    found = load_recipe("begin.toml", ['model.from="given"', "model.rope_scaling.factor=8"]).model.rope_scaling
    assert (found.rope_type, found.factor, found.original_max_position_embeddings) == ("yarn", 8, 1024)
    found = load_recipe("begin.toml", ['model.from="given"', 'model.rope_scaling={rope_type="linear", factor=3}']).model
    assert found.rope_scaling.model_dump() == {"rope_type": "linear", "factor": 3.0}
    found = load_recipe("begin.toml", ['model.from="given"', 'model.rope_scaling.rope_type="default"']).model
    assert found.rope_scaling is None
    answer = lighthouse("pretrain", "begin.toml", "--dry-run", "--from", "given")
    assert answer.code == 0 and "changed               model." not in answer.out
    refused(lighthouse, trainer, place, "--set model.rope_scaling.factor: model.rope_scaling.factor must be at least 1",
            arguments=("--set", "model.rope_scaling.factor=0.5"))  # fmt: skip


def test_a_directory_without_a_tokenizer_needs_one(lighthouse, trainer, place):
    (place / "begin.toml").write_text(RECIPE.replace('tokenizer = "bytes"\n', ""))
    refused(lighthouse, trainer, place, "tokenizer.json")


def test_from_is_for_a_new_run(lighthouse, trainer, place):
    said = check_refused(lighthouse("pretrain", "--resume", "x", "--from", "given"))
    assert "--from" in said and "--resume" in said


@pytest.fixture
def a_run(place):
    """A run with a checkpoint of step 2, begun from the directory."""
    import warnings

    import torch.distributed.checkpoint as dcp

    from lighthouse_core.seal import seal

    run = create_run(load_recipe("begin.toml", ['model.from="given"']), "begin", "one")
    weights = {entry.source: torch.ones(entry.shape) for entry in run.recipe.model.kind.entries(run.recipe.model)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(weights, checkpoint_id=run.checkpoint_dir(2), no_dist=True)
    seal(run.checkpoint_dir(2))
    return run


@pytest.mark.parametrize("name", ["one", "runs/one", "one/checkpoints/step-2", "runs/one/checkpoints/step-2"])
def test_a_run_begins_a_run(lighthouse, trainer, place, a_run, name):
    (place / "one").mkdir()
    answer = lighthouse("pretrain", "begin.toml", "--name", "new", "--from", name, "--set", "training.seq_len=128")
    assert answer.code == 0, answer
    assert "step 2 of run one, which was never trained with every layer dense" in answer.err
    run = Run("runs/new")
    assert run.recipe.model.origin == os.path.abspath(a_run.checkpoint_dir(2))
    # It needs no more of the other run.
    shutil.rmtree(a_run.path)
    assert Run("runs/new").recipe == run.recipe


def test_a_run_that_is_trained_may_begin_another(lighthouse, trainer, place, a_run):
    with a_run.lock():
        assert lighthouse("pretrain", "begin.toml", "--name", "new", "--from", "one").code == 0


def damage(run) -> None:
    file = next(run.checkpoint_dir(2).glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


BAD_RUNS = {
    "no checkpoint": (lambda run: shutil.rmtree(run.path / "checkpoints"), "one", ["no complete checkpoint"]),
    "a step that is not there": (lambda run: None, "one/checkpoints/step-3", ["step-3 is missing"]),
    "a step that is no number": (lambda run: None, "runs/one/checkpoints/step-02", ["step-02"]),
    "a step of many digits": (lambda run: None, f"one/checkpoints/step-{'9' * 30}", ["step-999"]),
    "damaged": (damage, "one", ["step-2 is damaged"]),
    "no metadata": (lambda run: (run.checkpoint_dir(2) / ".metadata").unlink(), "one", ["step-2"]),
    "no ledger": (lambda run: (run.path / "ledger.json").unlink(), "one", ["ledger.json"]),
    "a recipe of nothing": (lambda run: (run.path / "recipe.toml").write_text(""), "one", ["recipe.toml"]),
    "a recipe that is none": (lambda run: (run.path / "recipe.toml").write_text("x"), "one", ["recipe.toml"]),
    "a recipe of odd tables": (
        lambda run: (run.path / "recipe.toml").write_text("training = 1\nmodel = 2\ndata = 3"), "one", ["recipe.toml"],
    ),
    "a recipe of another width": (
        lambda run: (run.path / "recipe.toml").write_text(
            run.recipe_path.read_text().replace("ffn_dim = 100", "ffn_dim = 90")), "one", ["another model", "w1"],
    ),
    "a width that is no number": (
        lambda run: (run.path / "recipe.toml").write_text(
            run.recipe_path.read_text().replace("ffn_dim = 100", 'ffn_dim = "x"')), "one",
        ["runs/one/recipe.toml: model.ffn_dim must be an integer"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_RUNS)
def test_a_run_that_cannot_begin_another_is_refused(lighthouse, trainer, place, a_run, kind):
    change, name, words = BAD_RUNS[kind]
    change(a_run)
    refused(lighthouse, trainer, place, *words, name=name)


def test_a_sweep_takes_its_weights_from_a_directory(lighthouse, trainer, place):
    sweep = 'recipe = "begin.toml"\nset = ["model.from=\\"given\\""]\n[runs.one]\n[runs.two]\nset = ["{}"]\n'
    (place / "sweep.toml").write_text(sweep.format("model.rope_theta=1e6"))
    answer = lighthouse("sweep", "sweep.toml", "--dry-run")
    assert answer.code == 0, answer
    (place / "sweep.toml").write_text(sweep.format("model.dim=66"))
    assert "model.dim" in check_refused(lighthouse("sweep", "sweep.toml"))


def test_what_ends_before_the_first_step_leaves_nothing(lighthouse, trainer, place):
    trainer.code = 2
    answer = lighthouse("pretrain", "begin.toml", "--name", "new", "--from", "given")
    assert answer.code == 2 and "held no step and is removed" in answer.err
    assert not (place / "runs/new").exists()


def test_what_somebody_put_among_the_descriptions_is_kept(lighthouse, trainer, place, monkeypatch):
    from lighthouse_core.job import launch

    def launched(run_dir, plan, watcher):
        (run_dir / "origin/config.json").unlink()
        (run_dir / "origin/config.json").symlink_to(place / "given/config.json")
        return 2

    monkeypatch.setattr(launch, "launch", launched)
    answer = lighthouse("pretrain", "begin.toml", "--name", "new", "--from", "given")
    assert answer.code == 2 and "is kept: it holds origin/config.json" in answer.err
    assert (place / "given/config.json").is_file()
