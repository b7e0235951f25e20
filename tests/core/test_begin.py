"""A directory that training begins from comes back bit for bit, and so does a run."""

import json
import shutil
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from directories import RECIPE, bits, corpus, edit, made, rewrite, same_bits, tensors

from lighthouse_core.config import load_recipe
from lighthouse_core.config.model import ModelSection
from lighthouse_core.errors import CheckpointError, ExportError, UserError
from lighthouse_core.export import publish, strip, verify
from lighthouse_core.models import FAMILIES
from lighthouse_core.models.decoder import Decoder, DecoderArgs
from lighthouse_core.models.family import to_half_split, to_interleaved
from lighthouse_core.runs.create import create_run
from lighthouse_core.runs.run import Run
from lighthouse_core.seal import seal
from lighthouse_core.weights.origin import check_unchanged, find_weights

pytestmark = pytest.mark.usefixtures("short_samples")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(RECIPE)
    corpus(tmp_path)
    return tmp_path


def begin(name, origin, *settings) -> Run:
    """A run with the checkpoint of step 0 that training leaves."""
    recipe = load_recipe("tiny.toml", [f'model.from="{origin}"', *settings])
    weights = find_weights(recipe.model, verify=True)
    update = {"model": recipe.model.model_copy(update={"origin": str(weights.path)})}
    run = create_run(recipe.model_copy(update=update), "tiny", name, weights=weights.facts)
    save(run, 0, find_weights(run.recipe.model).read)
    return run


def save(run, step, initial):
    args = DecoderArgs.of(run.recipe.model, 64)
    with torch.device("meta"):
        model = Decoder(args, initial)
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.init_weights()
    state = {**model.state_dict(), "train_state.step": step}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(state, checkpoint_id=run.checkpoint_dir(step), no_dist=True)
    seal(run.checkpoint_dir(step))


def back(origin, out, **how):
    """Import, no step, strip."""
    run = begin("back", origin)
    return strip(run.path, out, **how)


# What may differ in config.json: which release made it, and the ids of a tokenizer that the recipe names in place of
# the model's own.
MADE = ("transformers_version", "_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id")


def compare_configs(before, after):
    """All that was said is said again; all that was left out is said as transformers reads it."""
    transformers = pytest.importorskip("transformers")
    said = {key: value for key, value in json.loads((before / "config.json").read_text()).items() if key not in MADE}
    again = json.loads((after / "config.json").read_text())
    assert {key: again[key] for key in said} == said
    known = [transformers.AutoConfig.from_pretrained(path).to_dict() for path in (before, after)]
    for one in known:
        for key in MADE:
            one.pop(key, None)
    # An id that nobody uses, by its absence or as null.
    differ = {key for key in known[0].keys() | known[1].keys() if known[0].get(key) != known[1].get(key)}
    assert differ <= {"head_dim", "rope_theta", "rope_scaling"}, differ
    if "head_dim" in differ:
        assert "head_dim" not in said and known[1]["head_dim"] == known[1]["hidden_size"] // 6


def compare(before, after, twin=False):
    given, found = tensors(before), tensors(after)
    if twin:
        given.pop("lm_head.weight")
    assert found.keys() == given.keys()
    for name, weight in given.items():
        assert same_bits(weight, found[name]), name
    compare_configs(before, after)


CASES = [
    ("llama", "bfloat16", {"tie_word_embeddings": True, "num_key_value_heads": 1}, "5GB"),
    ("mistral", "float16", {"tie_word_embeddings": False, "head_dim": 12}, "40KB"),
    ("qwen2", "float32", {"tie_word_embeddings": True}, "40KB"),
    ("qwen3", "bfloat16", {"tie_word_embeddings": False, "vocab_size": 301, "intermediate_size": 77}, "5GB"),
]
WIDE = [
    (family, dtype, {"tie_word_embeddings": tied, "num_key_value_heads": kv_heads, "head_dim": head_dim}, shards)
    for family in FAMILIES
    for dtype in ("float32", "bfloat16", "float16")
    for tied, kv_heads, head_dim, shards in ((True, 6, 10, "5GB"), (False, 2, 16, "30KB"), (True, 1, 4, "30KB"))
]


@pytest.mark.parametrize(
    ("family", "dtype", "changes", "shards"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in WIDE)]
)
def test_no_step_changes_no_bit(here, family, dtype, changes, shards):
    made(here / "given", family, dtype, shards=shards, **changes)
    assert (shards == "5GB") == (here / "given/model.safetensors").exists()
    report = back("given", here / "out")
    assert report.dtype == dtype and report.recovered and report.max_logit_difference < 1e-4
    compare(here / "given", here / "out")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_each_tensor_keeps_its_own_dtype_and_its_odd_numbers(here, family):
    """Norms in float32 beside a float16 body, the sign of zeros, and numbers below the smallest normal one."""
    made(here / "given", family, "float16")

    def change(weights):
        for name, weight in weights.items():
            if "norm" in name:
                weights[name] = weight.float() * (1 + 2**-20)
                weights[name][:2] = torch.tensor([-0.0, 2.0**-140])
            elif "down_proj" in name:
                weights[name] = weight.bfloat16()
                weights[name][0, :2] = torch.tensor([-0.0, 2.0**-130])
            else:
                weight.view(-1)[:3] = torch.tensor([-0.0, 0.0, 2.0**-24])

    rewrite(here / "given", change)
    edit(here / "given", dtype="float32")
    report = back("given", here / "out")
    assert report.dtype == "float16"
    compare(here / "given", here / "out")
    assert json.loads((here / "out/config.json").read_text())["dtype"] == "float32"
    # Asked for one dtype, all have it.
    strip("runs/back", here / "same", dtype="bfloat16")
    assert {weight.dtype for weight in tensors(here / "same").values()} == {torch.bfloat16}
    assert json.loads((here / "same/config.json").read_text())["dtype"] == "bfloat16"


def test_a_table_that_is_there_twice_comes_back_once(here):
    made(here / "given", "llama", tie_word_embeddings=True)
    rewrite(
        here / "given", lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"] + 0})
    )
    back("given", here / "out")
    compare(here / "given", here / "out", twin=True)


def test_a_chain_of_runs_hands_on_what_came_in(here):
    made(here / "given", "qwen2", "bfloat16", tie_word_embeddings=True)
    (here / "given/generation_config.json").write_text('{"eos_token_id": [1, 2], "top_p": 0.5}')
    one = begin("one", "given")
    two = begin("two", one.path, "training.seq_len=128", "model.rope_theta=2e6")
    shutil.rmtree(here / "given")
    # A name of a step, of a run that has others.
    save(two, 7, find_weights(two.recipe.model).read)
    three = begin("three", two.checkpoint_dir(0), "training.seq_len=4096")
    assert three.recipe.model.rope_theta == 2e6 and three.recipe.model.origin.endswith("two/checkpoints/step-0")
    report = strip(three.path, here / "out")
    assert report.dtype == "bfloat16" and report.recovered
    strip(one.path, here / "first")
    assert all(same_bits(weight, tensors(here / "out")[name]) for name, weight in tensors(here / "first").items())
    config, first = (json.loads((here / name / "config.json").read_text()) for name in ("out", "first"))
    assert config["max_position_embeddings"] == 4096 and first["max_position_embeddings"] == 2048
    assert config["rope_parameters"]["rope_theta"] == 2e6 and config["use_sliding_window"] is False
    assert json.loads((here / "out/generation_config.json").read_text())["top_p"] == 0.5


def test_a_run_of_drawn_weights_is_begun_from_as_its_export_would_be(here):
    settings = ["model.dim=24", "model.layers=1", "model.heads=2", "model.ffn_dim=32", "model.vocab_size=300"]
    first = create_run(load_recipe("tiny.toml", settings), "tiny", "first")
    save(first, 1, None)
    second = begin("second", first.path)
    assert second.ledger["weights"]["recovered"] is False and second.ledger["weights"]["dtype"] == "bfloat16"
    one, two = (
        find_weights(ModelSection(**run.recipe.model.model_dump() | {"from": str(run.path)})) for run in (first, second)
    )
    for entry in first.recipe.model.kind.entries(first.recipe.model):
        assert torch.equal(bits(one.read(entry.source)), bits(two.read(entry.source)))
    assert "never trained with every layer dense" in one.about
    with pytest.raises(CheckpointError, match="never trained with every layer dense"):
        strip(second.path, here / "out")


@pytest.mark.parametrize("what", ["the weights", "config.json", "a file less"])
def test_files_that_change_after_the_start_are_noticed(here, what):
    made(here / "given", "llama")
    facts = begin("run", "given").ledger["weights"]
    check_unchanged(facts)
    if what == "the weights":
        rewrite(here / "given", lambda weights: weights["model.norm.weight"].add_(1))
    elif what == "config.json":
        edit(here / "given", eos_token_id=5)
    else:
        (here / "given/model.safetensors").unlink()
    with pytest.raises(UserError, match="changed since the run began"):
        check_unchanged(facts)


def test_a_file_that_changes_its_shapes_while_it_is_read_is_noticed(here):
    made(here / "given", "llama")
    weights = find_weights(load_recipe("tiny.toml", ['model.from="given"']).model)
    rewrite(here / "given", lambda found: found.update({"model.norm.weight": torch.ones(59)}))
    with pytest.raises(UserError, match="another shape"):
        weights.read("norm.weight")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_rows_in_a_wrong_order_are_noticed(here, monkeypatch, family):
    """By the comparison of the weights; and by that of the logits alone, also of biases and of the norms of heads."""
    made(here / "given", family)
    run = begin("run", "given")
    monkeypatch.setattr(publish, "to_half_split", lambda weight, heads: weight)
    with pytest.raises(ExportError, match=r"does not equal layers\.0\.attention"):
        strip(run.path, here / "out")
    monkeypatch.setattr(verify, "check_weights", lambda *given: None)
    for part in (".weight", ".bias", "_norm.weight"):
        rotary = [entry for entry in run.recipe.model.kind.entries(run.recipe.model) if entry.rotary_heads]
        wrong = [
            tuple(entry.shape) for entry in rotary if entry.target.endswith(part) and "norm" in entry.source + part
        ] or [tuple(entry.shape) for entry in rotary if entry.target.endswith(part)]
        if not wrong:
            continue

        def swapped(weight, heads, wrong=wrong):
            return weight if tuple(weight.shape) in wrong else to_half_split(weight, heads)

        monkeypatch.setattr(publish, "to_half_split", swapped)
        with pytest.raises(ExportError, match="logits differ"):
            strip(run.path, here / "out")
    assert not (here / "out").exists()


def test_both_orders_are_inverse_for_every_dtype():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape, heads in (((24, 5), 3), ((24,), 2), ((14,), 1)):
            weight = torch.randn(shape).to(dtype)
            weight.view(-1)[0] = -0.0
            assert same_bits(to_half_split(to_interleaved(weight, heads), heads), weight)


ODD = {
    "nothing": "",
    "not JSON": "{",
    "a list": "[1]",
    "another model": '{"hidden_size": 64}',
    "a window": '{"use_sliding_window": true}',
    "a family": '{"model_type": "gemma"}',
}


@pytest.mark.parametrize("kind", ODD)
def test_a_description_in_the_run_that_is_of_another_model_is_refused(here, kind):
    made(here / "given", "qwen3")
    run = begin("run", "given")
    path, text = run.path / "origin/config.json", ODD[kind]
    if kind == "nothing":
        path.unlink()
    elif text.startswith("{") and text != "{":
        edit(run.path / "origin", **json.loads(text))
    else:
        path.write_text(text)
    with pytest.raises(CheckpointError, match=r"origin/config\.json"):
        strip(run.path, here / "out")
    assert not (here / "out").exists()


def test_a_ledger_that_says_nonsense_of_the_weights_is_refused(here):
    made(here / "given", "llama")
    run = begin("run", "given")
    ledger = json.loads((run.path / "ledger.json").read_text())
    for change in ({"dtype": "int8"}, {"dtype": ["float32"]}, {"others": [1]}, {"others": {"a": "x"}}, {"recovered": 1},
                   {"files": None}, {"origin": 1}):  # fmt: skip
        (run.path / "ledger.json").write_text(json.dumps(ledger | {"weights": ledger["weights"] | change}))
        with pytest.raises(UserError, match="ledger"):
            Run(run.path)
