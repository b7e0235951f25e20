"""strip: a checkpoint becomes a Hugging Face Llama with the same weights and logits, or nothing at all."""

import json
import re
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from lighthouse_core.config.model import ModelSection
from lighthouse_core.errors import CheckpointError, ExportError, RunError, UserError
from lighthouse_core.export import publish, strip, verify
from lighthouse_core.models.family import Family
from lighthouse_core.seal import seal

pytestmark = pytest.mark.usefixtures("short_samples")

transformers = pytest.importorskip("transformers")

RECIPE = """
[model]
dim = 24
layers = 2
heads = 4
kv_heads = 2
head_dim = 8
ffn_dim = 40
vocab_size = 300
rope_theta = 500.0
norm_eps = 1e-5

[lighthouse]
enabled = true
pooling = 2
levels = 2
topk = 2
tile_parents = 2

[data]
tokenizer = "bytes"
packing = "concat"

[training]
seq_len = 48
global_batch_size = 1
steps = 120

[optimizer]
lr = 1e-3

[recover]
steps = 20
"""
LIGHTHOUSE = {"stage": "lighthouse", "start": 0, "end": 120}
DENSE = {"stage": "dense", "start": 120, "end": 140}


class Llama(nn.Module):
    """A Llama written from its equations, rotating the pairs (0,1), (2,3), ..., with the trainer's parameter names."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.tok_embeddings = nn.Embedding(model.vocab_size, model.dim)
        self.output = nn.Linear(model.dim, model.vocab_size, bias=False)
        self.weights = {}

    def load_state_dict(self, weights, assign=False):
        self.weights = weights
        self.output.weight = nn.Parameter(weights["output.weight"])

    def rotate(self, x):  # [B, N, heads, D]
        head_dim = self.model.head_dim
        frequency = 1.0 / self.model.rope_theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
        angle = (torch.arange(x.shape[1])[:, None] * frequency)[:, None]
        even, odd = x[..., 0::2], x[..., 1::2]
        rotated = (even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos())
        return torch.stack(rotated, dim=-1).flatten(-2)

    def norm(self, x, name):
        scale = (x.pow(2).mean(-1, keepdim=True) + self.model.norm_eps).rsqrt()
        return x * scale * self.weights[f"{name}.weight"]

    def hidden(self, tokens):
        model, weights = self.model, self.weights
        x = weights["tok_embeddings.weight"][tokens]
        n = tokens.shape[1]
        for i in range(model.layers):
            h = self.norm(x, f"layers.{i}.attention_norm")
            q, k, v = (
                F.linear(h, weights[f"layers.{i}.attention.{name}.weight"]).unflatten(-1, (-1, model.head_dim))
                for name in ("wq", "wk", "wv")
            )
            q, k = self.rotate(q), self.rotate(k)
            k, v = (t.repeat_interleave(model.heads // model.kv_heads, dim=2) for t in (k, v))
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * model.head_dim**-0.5
            scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
            mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(-2)
            x = x + F.linear(mixed, weights[f"layers.{i}.attention.wo.weight"])
            h = self.norm(x, f"layers.{i}.ffn_norm")
            w1, w2, w3 = (weights[f"layers.{i}.feed_forward.{name}.weight"] for name in ("w1", "w2", "w3"))
            x = x + F.linear(F.silu(F.linear(h, w1)) * F.linear(h, w3), w2)
        return self.norm(x, "norm")

    def head(self, hidden):
        return self.output(hidden)


def section(**changes):
    shape = dict(dim=24, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=40, vocab_size=300)
    return ModelSection(**(shape | dict(rope_theta=500.0, norm_eps=1e-5) | changes))


def draw_weights(model, generator):
    # Wide enough that attention is far from uniform, so that a wrong rotation shows in the logits.
    return {
        entry.source: torch.randn(entry.shape, generator=generator) * (0.3 if len(entry.shape) == 2 else 1.0)
        for entry in model.kind.entries(model)
    }


def save(run, step, weights):
    state = weights | {
        "optimizer.state.output.weight.exp_avg": torch.ones(3),
        "train_state.step": torch.tensor(step),
        "lr_scheduler.last_epoch": step,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(state, checkpoint_id=run / "checkpoints" / f"step-{step}", no_dist=True)
        seal(run / "checkpoints" / f"step-{step}")


@pytest.fixture
def weights(generator):
    return draw_weights(section(), generator)


@pytest.fixture
def run(tmp_path, weights):
    """A finished run: step 100 and 120 of the first stage, step 130 and 140 of its recovery."""
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / "recipe.toml").write_text(RECIPE)
    set_stages(run, LIGHTHOUSE, DENSE)
    for step in (100, 120, 130, 140):
        save(run, step, weights)
    return run


def set_stages(run, *stages):
    if len(stages) > 1:
        (run / "recover.toml").write_text(RECIPE)
    (run / "ledger.json").write_text(json.dumps({"version": 1, "stages": stages}))


def nothing_left(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


def load_model(out):
    return transformers.AutoModelForCausalLM.from_pretrained(out).eval()


def test_float32_model_of_grouped_heads_equals_an_independent_llama(run, weights, tmp_path):
    report = strip(run, tmp_path / "out", dtype="float32")
    assert report.step == 140 and report.recovered and not report.skipped and not report.warnings
    assert report.parameters == sum(weight.numel() for weight in weights.values())
    assert report.max_logit_difference <= 1e-4

    reference = Llama(section())
    reference.load_state_dict(weights)
    tokens = torch.arange(90).reshape(2, 45) * 3 % 300
    with torch.no_grad():
        torch.testing.assert_close(
            load_model(tmp_path / "out")(tokens).logits, reference.head(reference.hidden(tokens)), atol=1e-4, rtol=0
        )


def test_bfloat16_is_the_default_and_verified_on_the_rounded_weights(run, weights, tmp_path):
    report = strip(run, tmp_path / "out")
    assert report.dtype == "bfloat16" and report.max_logit_difference <= 1e-4
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in written.values()} == {torch.bfloat16}
    assert torch.equal(written["model.embed_tokens.weight"], weights["tok_embeddings.weight"].bfloat16())


def test_written_rows_of_q_and_k_are_those_of_the_half_split_layout(run, weights, tmp_path):
    strip(run, tmp_path / "out", dtype="float32")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for ours, theirs, heads in (("wq", "q_proj", 4), ("wk", "k_proj", 2)):
        rows = weights[f"layers.1.attention.{ours}.weight"]
        # D = 8: within a head the even rows come first, then the odd ones.
        expected = [rows[head * 8 + row] for head in range(heads) for row in (0, 2, 4, 6, 1, 3, 5, 7)]
        assert torch.equal(written[f"model.layers.1.self_attn.{theirs}.weight"], torch.stack(expected))
    assert torch.equal(written["model.layers.1.self_attn.v_proj.weight"], weights["layers.1.attention.wv.weight"])


@pytest.mark.parametrize("shape", [dict(heads=3, kv_heads=1, head_dim=16), dict(heads=6, kv_heads=6, head_dim=4)])
def test_head_dim_apart_from_dim_and_heads(shape, run, tmp_path, generator, monkeypatch):
    model = section(**shape)
    recipe = RECIPE
    for key, value in shape.items():
        recipe = recipe.replace(f"\n{key} = {getattr(section(), key)}\n", f"\n{key} = {value}\n")
    for name in ("recipe.toml", "recover.toml"):
        (run / name).write_text(recipe)
    shutil.rmtree(run / "checkpoints")
    save(run, 140, draw_weights(model, generator))
    assert strip(run, tmp_path / "out", dtype="float32").max_logit_difference <= 1e-4


def test_keys_are_exactly_those_of_llama_for_causal_lm(run, tmp_path):
    strip(run, tmp_path / "out")
    built = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(tmp_path / "out"))
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == built.state_dict().keys()


def test_config_says_everything_and_needs_no_code(run, tmp_path):
    strip(run, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and "auto_map" not in config
    assert (config["head_dim"], config["num_key_value_heads"], config["intermediate_size"]) == (8, 2, 40)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500.0
    assert (config["bos_token_id"], config["eos_token_id"], config["max_position_embeddings"]) == (256, 257, 48)
    assert config["dtype"] == config["torch_dtype"] == "bfloat16" and config["tie_word_embeddings"] is False


def test_provenance(run, tmp_path):
    strip(run / "checkpoints" / "step-130", tmp_path / "out")
    provenance = json.loads((tmp_path / "out" / "lighthouse.json").read_text())
    assert provenance["run"] == "tiny" and provenance["step"] == 130 and provenance["recovered"]
    assert provenance["stages"] == [LIGHTHOUSE, DENSE]
    assert len(provenance["recipe_sha256"]) == 64
    assert torch.__version__.startswith(provenance["versions"]["torch"])


@pytest.mark.parametrize(
    ("checkpoint", "average", "steps"),
    [
        ("", 1, [140]),
        ("", 2, [130, 140]),
        ("", 3, [125, 130, 140]),
        ("step-130", 2, [125, 130]),
        ("step-120", 2, [100, 120]),
    ],
)
def test_an_average_is_the_mean_of_the_last_checkpoints(checkpoint, average, steps, run, tmp_path, generator):
    each = {step: draw_weights(section(), generator) for step in (100, 120, 125, 130, 140)}
    shutil.rmtree(run / "checkpoints")
    for step, weights in each.items():
        save(run, step, weights)
    source = run / "checkpoints" / checkpoint if checkpoint else run
    report = strip(source, tmp_path / "out", dtype="float32", average=average, allow_unrecovered=True)
    written = load_file(tmp_path / "out" / "model.safetensors")
    for ours, theirs in (("output", "lm_head"), ("layers.1.attention.wv", "model.layers.1.self_attn.v_proj")):
        expected = torch.stack([each[step][f"{ours}.weight"] for step in steps]).double().mean(0)
        torch.testing.assert_close(written[f"{theirs}.weight"].double(), expected, atol=1e-6, rtol=0)
    name = "the checkpoint's" if average == 1 else f"those of the mean of steps {', '.join(map(str, steps))}"
    assert f"weights equal {name} bit for bit" in report.verified[0] and report.max_logit_difference <= 1e-4
    assert json.loads((tmp_path / "out" / "lighthouse.json").read_text())["averaged_steps"] == steps


def test_the_mean_of_equal_weights_is_these_weights(run, weights, tmp_path):
    strip(run, tmp_path / "out", dtype="float32", average=2)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["model.embed_tokens.weight"], weights["tok_embeddings.weight"])


def test_an_average_takes_no_checkpoint_of_the_other_stage(run, tmp_path):
    for source, count, words in (
        (run, 3, "has no 3 checkpoints of dense training up to step 140: it has 130, 140"),
        (run / "checkpoints/step-120", 3, "has no 3 checkpoints of stage 1 up to step 120: it has 100, 120"),
    ):
        with pytest.raises(CheckpointError, match=words):
            strip(source, tmp_path / "out", average=count, allow_unrecovered=True)
    with pytest.raises(UserError, match="a mean of 0"):
        strip(run, tmp_path / "out", average=0)
    assert nothing_left(tmp_path)


def test_an_average_reads_no_damaged_checkpoint(run, weights, tmp_path):
    save(run, 135, weights | {"output.weight": weights["output.weight"] * float("nan")})
    with pytest.raises(CheckpointError, match=r"output.weight of .*step-135 holds NaN"):
        strip(run, tmp_path / "out", average=2)
    (file,) = (run / "checkpoints/step-135").glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="step-135 is damaged") as found:
        strip(run, tmp_path / "out", average=2)
    assert found.value.hint == "--average 1 leaves it out"
    with pytest.raises(CheckpointError, match="step-135 is damaged") as found:
        strip(run, tmp_path / "out", average=3)
    assert found.value.hint == "--average 1 leaves it out"
    assert nothing_left(tmp_path)


def test_generates_text(run, tmp_path):
    strip(run, tmp_path / "out", dtype="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    inputs = tokenizer("def f(", return_tensors="pt")
    assert inputs.input_ids[0].tolist() == [256, *b"def f("]
    new = load_model(tmp_path / "out").generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert new.shape == (1, 15)
    assert tokenizer.decode(new[0], skip_special_tokens=True).startswith("def f(")


def test_small_shards_load(run, tmp_path):
    report = strip(run, tmp_path / "out", dtype="float32", shard_bytes=20_000)
    out = tmp_path / "out"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and not (out / "model.safetensors").exists()
    assert sorted(path.name for path in out.glob("*.safetensors")) == files
    assert index["metadata"]["total_size"] == 4 * report.parameters
    # A tensor larger than the limit has a file of its own.
    for name in files:
        tensors = load_file(out / name)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 20_000
    assert report.max_logit_difference <= 1e-4


def test_missing_permutation_is_caught_by_the_weights(run, tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "to_half_split", lambda weight, heads: weight)
    with pytest.raises(ExportError, match=r"[qk]_proj"):
        strip(run, tmp_path / "out")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_missing_permutation_is_caught_by_the_logits_alone(dtype, run, tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "to_half_split", lambda weight, heads: weight)
    monkeypatch.setattr(verify, "to_interleaved", lambda weight, heads: weight)
    with pytest.raises(ExportError, match="length 17"):
        strip(run, tmp_path / "out", dtype=dtype)
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("key, wrong", [("rope_theta", 10000.0), ("rms_norm_eps", 0.1), ("num_hidden_layers", 1)])
def test_wrong_config_is_caught(key, wrong, run, tmp_path, monkeypatch):
    right = Family.config

    def config(*args, **kwargs):
        changed = right(*args, **kwargs) | {key: wrong}
        return changed | {"rope_parameters": {"rope_type": "default", "rope_theta": changed["rope_theta"]}}

    monkeypatch.setattr(Family, "config", config)
    with pytest.raises(ExportError):
        strip(run, tmp_path / "out", dtype="float32")
    assert nothing_left(tmp_path)


def test_one_changed_bit_is_caught(run, tmp_path, monkeypatch):
    def save_changed(tensors, path, metadata):
        tensors["model.norm.weight"].view(torch.int16)[3] ^= 1
        safetensors_save(tensors, path, metadata=metadata)

    safetensors_save = publish.save_file
    monkeypatch.setattr(publish, "save_file", save_changed)
    with pytest.raises(ExportError, match=r"model\.norm\.weight"):
        strip(run, tmp_path / "out")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("edit", ["drop", "add"])
def test_wrong_key_set_is_caught(edit, run, tmp_path, monkeypatch):
    def save_edited(tensors, path, metadata):
        if edit == "drop":
            del tensors["lm_head.weight"]
        else:
            tensors["model.layers.0.self_attn.gate.weight"] = torch.ones(2)
        safetensors_save(tensors, path, metadata=metadata)

    safetensors_save = publish.save_file
    monkeypatch.setattr(publish, "save_file", save_edited)
    with pytest.raises(ExportError, match={"drop": "lm_head", "add": "gate"}[edit]):
        strip(run, tmp_path / "out")
    assert nothing_left(tmp_path)


def test_the_head_is_compared_at_every_position(run, tmp_path, monkeypatch):
    """An error at the last position of one length alone is found, whichever chunk holds it."""
    right = verify.trainer_model

    def late_error(*args):
        module = right(*args)
        right_hidden = module.hidden

        def wrong(tokens):
            hidden = right_hidden(tokens)
            if tokens.shape[1] == 300:
                hidden[:, -1] += 1.0
            return hidden

        module.hidden = wrong
        return module

    monkeypatch.setattr(verify, "trainer_model", late_error)
    strip(run, tmp_path / "good", dtype="float32")
    with pytest.raises(ExportError, match="length 300, positions 256 to 299"):
        strip(run, tmp_path / "bad", dtype="float32", verify_length=300)
    assert not (tmp_path / "bad").exists()


def test_without_transformers_the_weights_are_still_verified(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    report = strip(run, tmp_path / "out")
    assert report.max_logit_difference is None
    assert "bit for bit" in report.verified[0] and "transformers" in report.skipped[0]
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("stages", [[LIGHTHOUSE], [LIGHTHOUSE, DENSE]])
def test_unrecovered_is_refused(stages, run, tmp_path):
    set_stages(run, *stages)
    with pytest.raises(CheckpointError, match="step 120") as caught:
        strip(run / "checkpoints" / "step-120", tmp_path / "out")
    assert "lighthouse recover" in caught.value.hint
    assert nothing_left(tmp_path)


def test_unrecovered_is_exported_on_request_and_says_so(run, tmp_path):
    report = strip(run / "checkpoints" / "step-120", tmp_path / "out", allow_unrecovered=True)
    assert not report.recovered and "never" in report.warnings[0]
    assert json.loads((tmp_path / "out" / "lighthouse.json").read_text())["recovered"] is False


def test_unfinished_recovery_is_exported_with_a_warning(run, tmp_path):
    report = strip(run / "checkpoints" / "step-130", tmp_path / "out")
    assert report.recovered and "10 of 20" in report.warnings[0]


@pytest.mark.parametrize("stages", [[{**DENSE, "start": 0}], [{**DENSE, "start": 0, "end": 120}, DENSE]])
def test_dense_from_the_start_needs_no_recovery(stages, run, tmp_path):
    set_stages(run, *stages)
    for step in (100, 120):
        report = strip(run / "checkpoints" / f"step-{step}", tmp_path / f"out-{step}")
        assert report.recovered and not report.warnings


def test_incomplete_checkpoints_are_passed_over(run, tmp_path):
    (run / "checkpoints" / ".step-150.saving").mkdir()
    save(run, 9, {})
    (run / "checkpoints" / "step-9").rename(run / "checkpoints" / "step-200.partial")
    assert strip(run, tmp_path / "out").step == 140
    with pytest.raises(CheckpointError, match="step-150 is missing"):
        strip(run / "checkpoints" / "step-150", tmp_path / "out2")
    (run / "checkpoints" / "step-150").mkdir()
    with pytest.raises(CheckpointError, match=r"step-150 is damaged: manifest.json is missing"):
        strip(run, tmp_path / "out3")


def test_no_checkpoint(run, tmp_path):
    with pytest.raises(RunError, match="not a run"):
        strip(tmp_path / "nowhere", tmp_path / "out")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        strip(run, tmp_path / "out")
    assert nothing_left(tmp_path)


def change_missing(weights):
    del weights["layers.1.ffn_norm.weight"]


def change_shape(weights):
    weights["layers.0.attention.wk.weight"] = torch.zeros(32, 24)


def change_extra(weights):
    weights["layers.2.ffn_norm.weight"] = torch.zeros(24)


def change_nan(weights):
    weights["norm.weight"][5] = float("nan")


@pytest.mark.parametrize(
    "change, match",
    [
        (change_missing, r"another model: layers\.1\.ffn_norm\.weight is missing"),
        (change_shape, r"another model: layers\.0\.attention\.wk\.weight has shape \[32, 24\]"),
        (change_extra, r"another model: layers\.2\.ffn_norm\.weight is not in"),
        (change_nan, r"norm\.weight .* NaN"),
    ],
)
def test_another_model(change, match, run, weights, tmp_path):
    change(weights)
    shutil.rmtree(run / "checkpoints")
    save(run, 140, weights)
    with pytest.raises(CheckpointError, match=match):
        strip(run, tmp_path / "out")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("damage", ["truncate", "delete", "metadata"])
def test_damaged_checkpoint(damage, run, tmp_path):
    path = run / "checkpoints" / "step-140"
    file = path / ".metadata" if damage == "metadata" else next(path.glob("*.distcp"))
    if damage == "delete":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=f"{file.name} "):
        strip(run, tmp_path / "out")
    assert nothing_left(tmp_path)


def test_existing_out_is_kept(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("keep")
    with pytest.raises(UserError, match="already exists"):
        strip(run, out)
    assert [path.name for path in out.iterdir()] == ["mine"]
    with pytest.raises(UserError, match="already exists"):
        strip(run, out / "mine")


def test_empty_out_is_used(run, tmp_path):
    (tmp_path / "out").mkdir()
    strip(run, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "lighthouse.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "runs"]


def test_files_are_as_readable_as_any_other(run, tmp_path):
    (tmp_path / "plain").touch()
    expected = (tmp_path / "plain").stat().st_mode
    (tmp_path / "plain").unlink()
    strip(run, tmp_path / "out")
    assert {path.stat().st_mode for path in (tmp_path / "out").iterdir()} == {expected}


def test_interruption_leaves_nothing(run, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "compare_logits", interrupt)
    with pytest.raises(KeyboardInterrupt):
        strip(run, tmp_path / "out")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("arguments", [dict(dtype="int8"), dict(verify_length=0)])
def test_arguments_out_of_range(arguments, run, tmp_path):
    with pytest.raises(UserError):
        strip(run, tmp_path / "out", **arguments)
    assert nothing_left(tmp_path)


def test_the_python_of_the_readme_runs(run, tmp_path, monkeypatch, capsys):
    """In the place of a model of the quickstart it finds one that was not trained."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert ["transformers" in block for block in blocks] == [True, False]
    strip(run, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert (
        said.startswith("def main(")
        and said.endswith("\n2560\n")
        and "print(gathered_length(8192, cfg))  # 2560" in text
    )
