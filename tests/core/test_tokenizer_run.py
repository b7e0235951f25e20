"""A run keeps its tokenizer: it trains, resumes and is exported without the original file."""

import base64
import json
import shutil
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp

from lighthouse_core.config import loads_recipe
from lighthouse_core.data.tokenizer import build_tokenizer
from lighthouse_core.errors import DataError, RunError, UserError
from lighthouse_core.export import strip
from lighthouse_core.export.tokenizer import write_tokenizer
from lighthouse_core.runs.create import create_run
from lighthouse_core.runs.find import find_run
from lighthouse_core.runs.recovery import plan_recovery
from lighthouse_core.runs.run import Run
from lighthouse_core.seal import seal

RECIPE = """
[model]
dim = 16
layers = 1
heads = 2
ffn_dim = 24
vocab_size = 1600
[lighthouse]
pooling = 2
levels = 2
topk = 2
tile_parents = 2
[data]
packing = "concat"
[training]
seq_len = 48
global_batch_size = 1
steps = 10
[optimizer]
lr = 1e-3
[recover]
steps = 5
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Makes runs/first with a tokenizer given by a path from the current directory, and a checkpoint of step 10."""
    monkeypatch.chdir(tmp_path)

    def start(tokenizer):
        run = create_run(loads_recipe(RECIPE, [f"data.tokenizer='{tokenizer}'"]), "tiny", "first")
        state = {
            entry.source: torch.full(entry.shape, 0.01) for entry in run.recipe.model.kind.entries(run.recipe.model)
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(state, checkpoint_id=run.checkpoint_dir(10), no_dist=True)
            seal(run.checkpoint_dir(10))
        return run

    return start


@pytest.fixture
def small_model(spm, tmp_path):
    shutil.copy(spm, tmp_path / "mine.model")
    return tmp_path / "mine.model"


@pytest.fixture
def small_json(tmp_path):
    folder = tmp_path / "given"
    folder.mkdir()
    write_tokenizer(folder, build_tokenizer("bytes"), max_length=48)
    return folder / "tokenizer.json"


def test_the_saved_recipe_names_the_runs_own_file(start, small_model):
    run = start("mine.model")
    assert 'tokenizer = "runs/first/tokenizer.model"' in (run.path / "recipe.toml").read_text()
    assert (run.path / "tokenizer.model").read_bytes() == small_model.read_bytes()
    assert run.recipe.data.tokenizer == "runs/first/tokenizer.model"


def test_bytes_needs_no_file(start):
    run = start("bytes")
    assert run.recipe.data.tokenizer == "bytes" and not list(run.path.glob("tokenizer*"))


def test_a_tokenizer_json_brings_its_config(start, small_json):
    small_json.rename(small_json.with_name("other.json"))
    run = start("given/other.json")
    assert run.recipe.data.tokenizer == "runs/first/tokenizer.json"
    assert sorted(path.name for path in run.path.glob("*token*.json")) == [
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert build_tokenizer(run.recipe.data.tokenizer).bos_id == 256


def test_a_tokenizer_named_by_its_directory_is_kept_as_a_file(start, small_json, tmp_path):
    run = start("given")
    assert run.recipe.data.tokenizer == "runs/first/tokenizer.json"
    assert (run.path / "tokenizer.json").read_bytes() == small_json.read_bytes()
    named = build_tokenizer(str(small_json.parent))
    assert named.fingerprint == build_tokenizer(str(small_json)).fingerprint


def test_a_directory_may_have_a_model_or_nothing(small_model, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"folder is a directory without a tokenizer\.json"):
        build_tokenizer(str(tmp_path / "folder"))
    shutil.copy(small_model, tmp_path / "folder/tokenizer.model")
    assert build_tokenizer(str(tmp_path / "folder")).fingerprint == build_tokenizer(str(small_model)).fingerprint


def test_tokenizers_of_other_programs_are_refused_by_what_they_are(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(
        b"".join(b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(9))
    )
    (tmp_path / "tekken.json").write_text(
        json.dumps({"config": {"pattern": "."}, "vocab": [{"rank": 0, "token_bytes": "AA==", "token_str": None}]})
    )
    for name, message in (("tokenizer.model", "tiktoken's list of ranks"), ("tekken.json", r"is a tekken\.json")):
        with pytest.raises(DataError, match=message) as error:
            build_tokenizer(str(tmp_path / name))
        assert error.value.hint == "use the tokenizer.json of the same model"


def test_a_run_that_was_moved_finds_its_tokenizer(start, small_model, tmp_path, monkeypatch):
    path = start("mine.model").path
    fingerprint = build_tokenizer("mine.model").fingerprint
    small_model.unlink()
    (tmp_path / "elsewhere").mkdir()
    path.rename(tmp_path / "elsewhere" / "moved")
    monkeypatch.chdir("/")
    run = find_run(tmp_path / "elsewhere" / "moved")
    assert build_tokenizer(run.recipe.data.tokenizer).fingerprint == fingerprint
    recovery = plan_recovery(run)
    assert build_tokenizer(recovery.recipe.data.tokenizer).fingerprint == fingerprint
    run.write_recovery(recovery)
    assert build_tokenizer(Run(run.path).recipe.data.tokenizer).fingerprint == fingerprint


def test_a_tokenizer_that_cannot_be_copied_leaves_no_run(start, tmp_path):
    with pytest.raises(RunError, match=r"gone\.model"):
        start("gone.model")
    assert not (tmp_path / "runs" / "first").exists()


def test_strip_of_a_sentencepiece_run(start, small_model, tmp_path, monkeypatch):
    run = start("mine.model")
    small_model.unlink()
    monkeypatch.chdir("/")
    report = strip(tmp_path / run.path, tmp_path / "out", allow_unrecovered=True)
    assert any("tokenizer gives the ids" in fact for fact in report.verified)
    for name in ("config.json", "generation_config.json"):
        config = json.loads((tmp_path / "out" / name).read_text())
        assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 0)
    transformers = pytest.importorskip("transformers")
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = build_tokenizer(str(tmp_path / "out" / "tokenizer.model"))
    text = "def f(x):\n    return 'é'  # < s>\n"
    inputs = auto(text, return_tensors="pt")
    assert inputs.input_ids[0].tolist() == [1, *ours.encode(text)]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    new = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert auto.decode(new[0], skip_special_tokens=True).startswith(text)


def test_strip_of_a_tokenizer_json_run(start, small_json, tmp_path):
    run = start("given/tokenizer.json")
    original = small_json.read_bytes()
    shutil.rmtree(small_json.parent)
    strip(run.path, tmp_path / "out", allow_unrecovered=True)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == original
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 257


def test_strip_without_the_runs_tokenizer_says_so(start, small_model, tmp_path):
    run = start("mine.model")
    (run.path / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"first/tokenizer\.model"):
        strip(run.path, tmp_path / "out", allow_unrecovered=True)
    assert not (tmp_path / "out").exists()
