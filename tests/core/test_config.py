"""The recipe language: what it accepts, what it says about what it does not, and that dumping loses nothing."""

import dataclasses
import textwrap
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lighthouse_core.attention.config import NAMES, LighthouseConfig
from lighthouse_core.config import Recipe, dump_recipe, load_recipe, loads_recipe
from lighthouse_core.config.lighthouse import LighthouseSection
from lighthouse_core.config.load import known_keys, parse_override
from lighthouse_core.config.positions import flatten, line_numbers
from lighthouse_core.errors import RecipeError
from lighthouse_core.models import FAMILIES

BASE = """\
# A comment.
[model]
dim = 64
layers = 4
heads = 4
ffn_dim = 96
vocab_size = 320
dense_layers = [
  0,  # the first
  3,
]

[lighthouse]
topk = 16
tile_parents = 8

[training]
seq_len = 1024
global_batch_size = 4
steps = 10

[optimizer]
lr = 1e-3

[data]
packing = "concat"
"""


SCORERS = f"must be one of {', '.join(NAMES['scorer'])}"


def problem(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        loads_recipe(text, overrides, source="r.toml")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_are_resolved():
    recipe = loads_recipe(BASE)
    assert (recipe.model.kv_heads, recipe.model.head_dim) == (4, 16)
    assert recipe.model.dense_layers == (0, 3)
    assert recipe.checkpoint.interval == 500
    assert recipe.phases[-1].attention == LighthouseConfig(topk=16, tile_parents=8)


def test_the_lighthouse_section_is_the_attention_config():
    own = ("enabled", "phases", "budget")
    ours = {name: field.default for name, field in LighthouseSection.model_fields.items() if name not in own}
    assert ours == {field.name: field.default for field in dataclasses.fields(LighthouseConfig)}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "pyramid (pooling 4, levels 3, topk 1536, scorer norm)"),
        (
            {"scorer": "block", "window": 512, "rotate": "after"},
            "pyramid (pooling 4, levels 3, topk 1536, scorer block), rotated after pooling, window 512",
        ),
        ({"method": "sliding", "window": 64}, "sliding, window 64"),
        (
            {"method": "blocks", "window": 64, "blocks": 8},
            "blocks (blocks 8, block_size 128, block_score mean, tile 256), window 64",
        ),
        ({"method": "compressed", "window": 64}, "compressed (compression 16), window 64"),
        (
            {"method": "compressed", "window": 64, "keep": 4, "scorer": "random"},
            "compressed (compression 16, keep 4, scorer random), window 64",
        ),
    ],
)
def test_a_phase_says_its_attention(settings, words):
    (phase,) = LighthouseSection(**settings).resolved(7, ())
    assert phase.described() == words


def test_an_integer_is_a_float_and_nothing_else_is_converted():
    recipe = loads_recipe(BASE, ["optimizer.lr=1", "optimizer.weight_decay=0"])
    assert recipe.optimizer.lr == 1.0 and isinstance(recipe.optimizer.lr, float)
    for override in ("training.steps=true", "training.steps=1.0", 'training.steps="1"', "optimizer.lr=true"):
        assert "must be" in problem(BASE, override)
    assert "must be true or false" in problem(BASE, "training.compile=1")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seq_len", "sequence_len", "r.toml:18: unknown key training.sequence_len; did you mean training.seq_len?"),
        ("steps =", "lr =", "r.toml:20: unknown key training.lr; did you mean optimizer.lr?"),
        ("[optimizer]", "[optimiser]", "r.toml:22: unknown section [optimiser]; did you mean [optimizer]?"),
        ("# A comment.", "seq_len = 3", "r.toml:1: unknown key seq_len outside of any section; did you mean"),
        ("seq_len = 1024", "seq_len = '1024'", 'r.toml:18: training.seq_len must be an integer, not the string "1024"'),
        ("lr = 1e-3", "lr = nan", "r.toml:23: optimizer.lr must be a finite number"),
        ("seq_len = 1024\n", "", "r.toml:17: training.seq_len is missing"),
        ("[optimizer]\nlr = 1e-3\n", "", "r.toml: section [optimizer] is missing"),
        ("  3,\n", "  3\n  4,\n", "r.toml:11: not valid TOML"),
        ("lr = 1e-3", "lr = [1,", "r.toml:25: not valid TOML"),
        ("[optimizer]", "[training]", "r.toml:22: not valid TOML"),
        ("  3,", "  true,", "r.toml:8: model.dense_layers[2] must be an integer, not true"),
        ("  3,", "  4,", "r.toml:8: model.dense_layers: layer 4 is outside 0..3"),
        ("  3,", "  -1,", "r.toml:8: model.dense_layers: layer -1 is outside 0..3"),
        ("  3,", "  0,", "r.toml:8: model.dense_layers lists layer 0 more than once"),
        ("heads = 4", "heads = 4\nkv_heads = 3", "r.toml:6: model.heads (4) must be a multiple of model.kv_heads (3)"),
        ("heads = 4", "heads = 5", "r.toml:3: model.dim 64 is not a multiple of model.heads 5"),
        ("heads = 4", "heads = 4\nhead_dim = 7", "r.toml:6: model.head_dim must be even"),
        ("dim = 64", "dim = 0", "r.toml:3: model.dim must be above 0, not 0"),
        ("vocab_size = 320", "vocab_size = 257", "r.toml:7: model.vocab_size must be at least 258"),
        ("topk = 16", "topk = 20", "r.toml:14: lighthouse.topk must be a positive multiple of tile_parents (8)"),
        ("topk = 16", "pooling = 3", "r.toml:14: lighthouse.pooling must be a power of two"),
        ("topk = 16", "scorer = 'best'", "r.toml:14: lighthouse.scorer must be one of norm, random, block"),
        (
            "topk = 16",
            "scorer = 'blok'",
            f"r.toml:14: lighthouse.scorer {SCORERS}, not 'blok'; did you mean block?",
        ),
        (
            'packing = "concat"',
            "source = 'filez'",
            'r.toml:26: data.source must be "python-sources", "files", "hf" or "tokens", not "filez"; did you mean '
            "files?",
        ),
        ("topk = 16", "topk = 128", "r.toml:14: the gathered sequence (S = 1152) is not shorter than training.seq_len"),
        ("steps = 10", "steps = -1", "r.toml:20: training.steps must be above 0, not -1"),
        ("steps = 10", "local_batch_size = 3\nsteps = 10", "r.toml:19: training.global_batch_size (4) must be a mult"),
        ("[training]", "[checkpoint]\nkeep = 1\n[training]", "r.toml:18: checkpoint.keep must be 0 (all)"),
        ('packing = "concat"', "validation = 1.0", "r.toml:26: data.validation must be below 1, not 1.0"),
        ('packing = "concat"', "paths = []", "r.toml:26: data.paths must not be empty"),
        ("[training]", "[parallel]\nshard = 0\n[training]", "r.toml:18: parallel.shard must be -1"),
        (
            'packing = "concat"',
            'packing = "concat"\nvalidation = 0\n[metrics]\nvalidation_every = 5',
            "r.toml:29: metrics.validation_every needs data.validation above 0",
        ),
        (
            "seq_len = 1024",
            'seq_len = 1024\ndtype = "fp8"',
            'r.toml:19: training.dtype must be "bfloat16", "float16" or "float32", not "fp8"',
        ),
    ],
)
def test_an_error_names_the_line_and_the_key(old, new, message):
    assert BASE.count(old) == 1 or old == "steps ="
    assert problem(BASE.replace(old, new)).startswith(message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps=9", 'lighthouse.method "pyramid" without a lighthouse.window: write data.packing = "concat"'),
        ("lighthouse={method='compressed', window=64}", 'lighthouse.method "compressed": write data.packing'),
        (
            "lighthouse={method='chunked', window=64, dense_backend='cudnn'}",
            'lighthouse.dense_backend "cudnn" is not for data.packing "documents": write data.packing = "concat", or',
        ),
        ("lighthouse={enabled=false, dense_backend='cudnn'}", 'lighthouse.dense_backend "cudnn" is not for data'),
    ],
)
def test_a_recipe_that_cannot_keep_documents_apart_is_told_what_to_write(override, message):
    text = BASE.replace('[data]\npacking = "concat"\n', "")
    assert message in problem(text, override)


def test_documents_are_kept_apart_unless_the_recipe_says_otherwise():
    text = BASE.replace('[data]\npacking = "concat"\n', "").replace("topk = 16", "topk = 16\nwindow = 8")
    assert (loads_recipe(text).data.packing, loads_recipe(text).alignment) == ("documents", 16)
    assert loads_recipe(text, ["lighthouse.enabled=false"]).alignment == 1
    # A run that was made before has it in its resolved recipe, as this one does.
    resolved = dump_recipe(loads_recipe(BASE))
    assert loads_recipe(resolved).data.packing == "concat" and loads_recipe(resolved).alignment is None


def test_the_selection_may_be_any_length_in_a_dense_run():
    assert not loads_recipe(BASE, ["lighthouse.enabled=false", "lighthouse.topk=1024"]).lighthouse.enabled


def test_s_error_suggests_what_to_change():
    message = problem(BASE, "lighthouse.topk=512")
    assert "smaller lighthouse.topk" in message and "more lighthouse.levels" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.sequence_len=3", "--set training.sequence_len: unknown key training.sequence_len; did you mean"),
        ("trainin.steps=3", "--set trainin.steps: unknown section [trainin]; did you mean [training]?"),
        ("lighthouse.scorer=random", "--set lighthouse.scorer: random is not a TOML value"),
        ("training.compile=True", "--set training.compile: True is not a TOML value"),
        ("training.steps=", "--set training.steps: nothing is not a TOML value"),
        ("data.sources[0].weight=1", "--set data.sources[0].weight names an entry of a list"),
        ("training.steps", "--set training.steps: expected key=value"),
        ("training.steps=1\nseed=2", "--set training.steps: 1\\nseed=2 is not a TOML value"),
        ("training.steps=-5", "--set training.steps: training.steps must be above 0"),
        ("model=3", "--set model: model must be a table"),
        ("titan.comm=3", "--set titan.comm: titan.comm must be a table"),
        ("training={stepz=1}", "--set training: unknown key training.stepz; did you mean training.steps?"),
    ],
)
def test_an_override_error_names_the_flag(override, message):
    assert problem(BASE, override).startswith(message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.heads=3", "--set model.heads: model.dim 64 is not a multiple of model.heads 3"),
        ("model.layers=3", "--set model.layers: model.dense_layers: layer 3"),
        ("training.seq_len=64", "--set training.seq_len: the gathered sequence"),
        ("lighthouse.tile_parents=6", "--set lighthouse.tile_parents: lighthouse.topk must be"),
        ("data.validation=0.0", "--set data.validation: metrics.validation_every needs"),
        ("checkpoint.also=[3, 99999]", "--set checkpoint.also: checkpoint.also has step 99999, which"),
    ],
)
def test_of_keys_that_conflict_the_one_that_a_flag_set_is_named(override, message):
    text = BASE + "[metrics]\nvalidation_every = 1\n"
    assert problem(text, override).startswith(message)
    assert problem(text, "training.steps=7", override).startswith(message)


def test_a_flag_that_has_no_part_in_a_conflict_is_not_named():
    text = BASE.replace("[training]", "[training]\nlocal_batch_size = 3")
    assert problem(text, "training.steps=7").startswith("r.toml:20: training.global_batch_size (4) must be")


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("training.seed=abc", "training.seed takes an integer"),
        ("training.steps=", "training.steps takes an integer, or tokens: --set 'training.steps=\"2.5B tokens\"'"),
        ("optimizer.lr=1e-3x", "optimizer.lr takes a number"),
        ("training.compile=yes", "training.compile takes true or false"),
        ("training.compile=True", "write --set 'training.compile=true'"),
        ("data.paths=src", 'a list is written ["a", "b"]'),
        ("data.tokenizer=a.model", "write --set 'data.tokenizer=\"a.model\"'"),
        ("data.nothing=a", "write --set 'data.nothing=\"a\"'"),
    ],
)
def test_the_hint_fits_what_the_key_takes(override, hint):
    with pytest.raises(RecipeError) as caught:
        parse_override(override)
    assert caught.value.hint == hint


def test_the_hint_of_a_bare_word_is_a_flag_that_works():
    with pytest.raises(RecipeError) as caught:
        loads_recipe(BASE, ["lighthouse.scorer=random"])
    flag = caught.value.hint.split("'")[1].removeprefix("--set ")
    assert parse_override(flag) == {"lighthouse": {"scorer": "random"}}
    assert loads_recipe(BASE, [flag]).lighthouse.scorer == "random"


def test_overrides_merge_and_the_last_one_wins():
    recipe = loads_recipe(BASE, ["training.steps=20", "training.steps=30", "titan.comm.trace_buf_size=0"])
    assert (recipe.training.steps, recipe.training.seq_len) == (30, 1024)
    assert recipe.titan == {"comm": {"trace_buf_size": 0}}


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(RecipeError, match="cannot read"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b"# \xe9\n")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(tmp_path / "latin.toml")


def test_line_numbers_of_every_kind_of_statement():
    text = textwrap.dedent('''\
        # [not.a.section]
        top = """
        [fake]
        key = 1
        """
        [a.b]  # two tables, one line

        x.y = [  # dotted
          1,
        ]
        "quoted key" = { inline = "[c]", z = 3 }
        [c]
    ''')
    assert (
        line_numbers(text)
        == line_numbers(text.replace("\n", "\r\n"))
        == {
            ("top",): 2,
            ("a",): 6,
            ("a", "b"): 6,
            ("a", "b", "x"): 8,
            ("a", "b", "x", "y"): 8,
            ("a", "b", "quoted key"): 11,
            ("a", "b", "quoted key", "inline"): 11,
            ("a", "b", "quoted key", "z"): 11,
            ("c",): 12,
        }
    )


def test_every_key_can_be_written_and_no_other():
    dumped = tomllib.loads(dump_recipe(loads_recipe(BASE)))
    known = known_keys()
    assert known.pop("titan") == []
    # Of one source and of several, only one has a value.
    known["data"].remove("sources")
    # TOML has no null: weights that are drawn come from nowhere, and frequencies may be as they are.
    for key in ("from", "rope_scaling"):
        known["model"].remove(key)
    assert {name: list(table) for name, table in dumped.items()} == known


SCALINGS = [
    {"rope_type": "linear", "factor": 4},
    {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64, "high_freq_factor": 2.5},
    {"rope_type": "yarn", "factor": 1.5, "original_max_position_embeddings": 64, "truncate": False},
]


def scaled(*lines: str) -> str:
    """BASE with a table of a scaling, which begins at line 28."""
    return "\n".join((BASE.rstrip(), "", "[model.rope_scaling]", *lines, ""))


@pytest.mark.parametrize(
    ("lines", "overrides", "place", "words"),
    [
        (['rope_type = "ntk"', "factor = 2"], (), "r.toml:29", '"linear", "llama3" or "yarn", not "ntk"'),
        (["factor = 2"], (), "r.toml:28", "rope_type is missing"),
        (['rope_type = "linear"', "factor = 0.5"], (), "r.toml:30", "factor must be at least 1, not 0.5"),
        (['rope_type = "linear"', 'factor = "2"'], (), "r.toml:30", 'factor must be a number, not the string "2"'),
        (['rope_type = "linear"'], (), "r.toml:28", "factor is missing"),
        (['rope_type = "linear"', "factor = 2", "beta_fast = 1"], (), "r.toml:31", "unknown key"),
        (['rope_type = "yarn"', "factor = 2"], (), "r.toml:28", "original_max_position_embeddings is missing"),
        (['rope_type = "linear"', "factor = 2"], ["factor=0"], "--set model.rope_scaling.factor", "at least 1, not 0"),
        (['rope_type = "linear"', "factor = 2"], ['rope_type="x"'], "--set model.rope_scaling.rope_type", "must be"),
        ([], ["factor=2"], "--set model.rope_scaling.factor", "rope_type is missing"),
    ],
)
def test_a_scaling_of_the_rotation_is_named_with_its_place(lines, overrides, place, words):
    text = scaled(*lines) if lines else BASE
    found = problem(text, *(f"model.rope_scaling.{override}" for override in overrides))
    assert found.startswith(f"{place}: ") and words in found and "model.rope_scaling" in found


@pytest.mark.parametrize(
    ("name", "words"),
    [("1", "a string"), ("true", "a string"), ("['a']", "a string"), ("{a = 1}", "a string"), ('"a\\u0000b"', "NUL")],
)
def test_what_weights_cannot_come_from(name, words):
    found = problem(BASE.replace("dim = 64", f"dim = 64\nfrom = {name}"))
    assert found.startswith("r.toml:4: model.from") and words in found


def test_an_empty_name_stands_for_no_weights():
    assert loads_recipe(BASE, ['model.from=""']) == loads_recipe(BASE)


positive = st.integers(1, 10**6)
small = st.floats(1e-12, 1e3)
names = st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1)
scalars = st.one_of(
    st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.dates(), st.datetimes(), st.times()
)
values = st.recursive(scalars, lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(), part, max_size=3))


@st.composite
def recipes(draw):
    heads, kv_groups, layers = draw(st.integers(1, 8)), draw(st.integers(1, 4)), draw(st.integers(1, 40))
    local, window = draw(st.integers(1, 8)), draw(st.sampled_from([0, 64]))
    model = {
        "dim": heads * kv_groups * draw(st.integers(1, 500)),
        "layers": layers,
        "heads": heads * kv_groups,
        "kv_heads": heads,
        "head_dim": 2 * draw(st.integers(1, 64)),
        "ffn_dim": draw(positive),
        "vocab_size": draw(st.integers(258, 10**6)),
        "rope_theta": 1 + draw(small),
        **draw(st.sampled_from([{}, *({"rope_scaling": scaling} for scaling in SCALINGS)])),
        "family": draw(st.sampled_from(list(FAMILIES))),
        "tied_embeddings": draw(st.booleans()),
        "dense_layers": draw(st.lists(st.integers(0, layers - 1), unique=True)),
    }
    return Recipe.model_validate(
        {
            "model": model,
            "lighthouse": {
                "enabled": draw(st.booleans()),
                "topk": 128,
                "scorer": draw(st.sampled_from(NAMES["scorer"])),
                "window": window,
            },
            "data": {
                "paths": draw(st.lists(names, min_size=1, max_size=3)),
                "packing": "documents" if window else "concat",
            },
            "training": {
                "seq_len": 16 * draw(st.integers(10**3, 10**5)),
                "local_batch_size": local,
                "global_batch_size": local * draw(st.integers(1, 9)),
                "steps": draw(positive),
                "seed": draw(st.integers(0, 2**63 - 1)),
            },
            "optimizer": {"lr": draw(small), "eps": draw(small)},
            "checkpoint": {"keep": draw(st.sampled_from([0, 2, 7]))},
            "output": {"dir": draw(st.text(min_size=1))},
            "titan": draw(st.dictionaries(st.text(), st.dictionaries(st.text(), values, max_size=3), max_size=3)),
        }
    )


@given(recipes())
def test_dumping_loses_nothing(recipe):
    text = dump_recipe(recipe)
    assert loads_recipe(text) == recipe
    sections = [name for name in tomllib.loads(text) if name != "titan"]
    assert sections == [name for name in Recipe.model_fields if name != "titan"]


@given(recipes())
def test_each_key_is_found_on_its_line(recipe):
    text = "# A comment.\n\n" + dump_recipe(recipe)
    lines, numbers = text.split("\n"), line_numbers(text)
    for path in flatten(tomllib.loads(text)):
        if path[0] != "titan":
            header = path in ((path[0],), ("model", "rope_scaling"), ("lighthouse", "budget"))
            begin = f"[{'.'.join(path)}]" if header else f"{path[-1]} = "
            assert lines[numbers[path] - 1].startswith(begin)
