"""[titan]: every key of torchtitan's JobConfig is looked into, and is taken, decided by a recipe, or refused."""

import dataclasses
import re

import pytest

from lighthouse_core.config import load_recipe
from lighthouse_core.config.dump import toml_value
from lighthouse_core.errors import RecipeError
from lighthouse_core.titan import build_job, check_overrides
from lighthouse_core.titan import job as ours
from lighthouse_core.titan.job import ALLOWED, REFUSED, JobConfig

# Values that a recipe may give, other than torchtitan's own.
VALUES = {
    "job.print_config": True,
    "profiling.enable_profiling": True,
    "profiling.profile_freq": 11,
    "profiling.profiler_active": 2,
    "profiling.profiler_warmup": 4,
    "profiling.enable_memory_snapshot": True,
    "training.gc_freq": 7,
    "parallelism.fsdp_reshard_after_forward": "never",
    "checkpoint.enable_first_step_checkpoint": True,
    "activation_checkpoint.early_stop": True,
    "activation_checkpoint.preserve_rng_state": False,
    "activation_checkpoint.determinism_check": "none",
    "compile.components": ["model"],
    "compile.backend": "aot_eager",
    "comm.init_timeout_seconds": 77,
    "comm.train_timeout_seconds": 78,
    "comm.trace_buf_size": 0,
    "debug.deterministic_warn_only": True,
}


def needed(key):
    """What a run must have for a key to change something."""
    if key.startswith("activation"):
        return ['training.activation_checkpointing="selective"']
    settings = {"compile": "training.compile=true", "debug": "training.deterministic=true"}
    settings["profiling.prof"] = "titan.profiling.enable_profiling=true"
    return [setting for table, setting in settings.items() if key.startswith(table)]


def leaves(target=None, prefix=""):
    target = target or JobConfig()
    for field in dataclasses.fields(target):
        value = getattr(target, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


KEYS = list(leaves())


def value_of(job, key):
    for name in key.split("."):
        job = getattr(job, name)
    return job


def recipe(*settings):
    return load_recipe("recipes/quickstart.toml", settings)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(ours, "HAS_ACCELERATOR", True)


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_in_one_class(key):
    tables = {key.rsplit(".", n)[0] for n in range(key.count(".") + 1)}
    assert (key in ALLOWED) + len(tables & REFUSED.keys()) == 1


def test_there_are_no_others(tmp_path):
    tables = {key.rsplit(".", n)[0] for key in KEYS for n in range(key.count(".") + 1)}
    assert set(ALLOWED) <= set(KEYS) and set(REFUSED) <= tables
    assert set(VALUES) == set(ALLOWED) and all(allowed.reader for allowed in ALLOWED.values())


def test_what_a_recipe_decides_is_refused(tmp_path):
    """A recipe of other values than torchtitan's, whose sections change none of the keys that are allowed."""
    other = recipe("training.seed=3", "training.compile=true", "checkpoint.async_save=true", "training.steps=9")
    job = build_job(other, tmp_path, steps=9)
    decided = {key for key in KEYS if value_of(job, key) != value_of(JobConfig(), key)}
    assert decided >= {"debug.seed", "compile.enable", "checkpoint.async_mode", "training.steps"}
    assert not decided & set(ALLOWED)


@pytest.mark.parametrize("key", REFUSED)
def test_what_to_set_instead_is_a_key_of_a_recipe(key):
    for section, name in re.findall(r"\b([a-z]+)\.([a-z0-9_]+)", REFUSED[key].instead):
        fields = type(getattr(recipe(), section)).model_fields
        assert name in {field.alias or name for name, field in fields.items()}


@pytest.mark.parametrize(
    ("key", "words"),
    [
        *((f"checkpoint.initial_load_{name}", r"model\.from.* --from") for name in ("path", "in_hf", "model_only")),
        ("checkpoint.initial_load_in_hf_quantized", r"model\.from.* --from"),
        ("checkpoint.last_save_in_hf", "lighthouse strip"),
        ("training.max_norm", r"set optimizer\.clip_norm"),
        ("validation.freq", r"set metrics\.validation_every"),
        ("parallelism.context_parallel_degree", r"parallel\.context"),
    ],
)
def test_the_hint_names_what_to_use(key, words):
    with pytest.raises(RecipeError) as error:
        check_overrides(recipe(f"titan.{key}=1"))
    assert re.search(words, error.value.hint)


@pytest.mark.parametrize("key", ALLOWED)
def test_what_is_allowed_reaches_the_trainer(key, tmp_path, gpu):
    plain, default = build_job(recipe(*needed(key)), tmp_path, steps=1), value_of(JobConfig(), key)
    changed = recipe(*needed(key), f"titan.{key}={toml_value(VALUES[key])}")
    check_overrides(changed)
    job = build_job(changed, tmp_path, steps=1)
    assert value_of(job, key) == VALUES[key] != default
    different = [one for one in KEYS if value_of(job, one) != value_of(plain, one)]
    assert different == [key]


@pytest.mark.parametrize("key", [key for key in KEYS if key not in ALLOWED])
def test_all_others_are_refused_with_a_reason(key, tmp_path):
    for value in (value_of(JobConfig(), key), "x", 3):
        if value is None:
            continue
        given = recipe(f"titan.{key}={toml_value(value)}")
        for check in (check_overrides, lambda given: build_job(given, tmp_path, steps=1)):
            with pytest.raises(RecipeError, match=rf"^titan\.{re.escape(key)} cannot be set: [\w\[]") as error:
                check(given)
            assert error.value.hint and "\n" not in error.value.hint


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("titan.activation_checkpoint.debug=true", "cannot be set: torch takes it only"),
        ("titan.training.gc_freq=0", "greater than 0"),
        ("titan.training.gc_freq=true", "valid integer"),
        (f"titan.comm.init_timeout_seconds={10**18}", "less than or equal to"),
        ("titan.comm.train_timeout_seconds=-1", "greater than 0"),
        ("titan.comm.trace_buf_size=-1", "greater than or equal to 0"),
        ('titan.compile.backend="os:system"', "input should be"),
        ('titan.compile.components=["weights"]', "input should be"),
        ('titan.activation_checkpoint.determinism_check="x"', "input should be"),
        ("titan.profiling.profile_freq=3", "is below profiler_warmup"),
        ("titan.profiling.enable_profiling=true", "needs a GPU"),
        ("titan.profiling.enable_memory_snapshot=true", "needs a GPU"),
        ("titan.quantize.linear=3", "no effect"),
        ("titan.comm.init_timeout_seconds.x=1", "is not a setting"),
        ("titan.nothing={}", "is not a setting"),
        ("titan.comm.mode.x=1", "trains for real"),
    ],
)
def test_values_that_cannot_work_are_refused(setting, words, monkeypatch):
    monkeypatch.setattr(ours, "HAS_ACCELERATOR", False)
    with pytest.raises(RecipeError, match=words) as error:
        check_overrides(recipe(setting))
    assert error.value.hint and "\n" not in error.value.hint


def test_a_table_of_torchtitan_that_is_a_value_is_refused():
    with pytest.raises(RecipeError, match="must be a table"):
        recipe("titan.comm=3")


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        *((key, []) for key in ALLOWED if key.startswith(("compile", "activation", "debug", "profiling.prof"))),
        # torch's compiled checkpointing has these settings fixed.
        *((key, ["training.compile=true", *needed(key)]) for key in ALLOWED if key.startswith("activation")),
        ("compile.backend", ["training.compile=true", 'titan.compile.components=["loss"]']),
        ("profiling.profiler_active", ["titan.profiling.enable_memory_snapshot=true"]),
        ("parallelism.fsdp_reshard_after_forward", ["parallel.shard=1", "parallel.replicate=2"]),
        ("parallelism.fsdp_reshard_after_forward", ["parallel.shard=1", 'training.dtype="float32"']),
        ("checkpoint.enable_first_step_checkpoint", ["checkpoint.interval=1"]),
        ("checkpoint.enable_first_step_checkpoint", ["checkpoint.also=[0, 1]"]),
    ],
)
def test_what_would_change_nothing_is_refused(key, settings, gpu):
    # What stands in its way alone would be accepted.
    check_overrides(recipe(*settings))
    with pytest.raises(RecipeError, match=rf"titan\.{key} has no effect ") as error:
        check_overrides(recipe(*settings, f"titan.{key}={toml_value(VALUES[key])}"))
    assert error.value.hint


@pytest.mark.parametrize("key", ["comm.train_timeout_seconds", "comm.trace_buf_size"])
def test_what_would_change_nothing_without_an_accelerator_is_refused(key, monkeypatch):
    monkeypatch.setattr(ours, "HAS_ACCELERATOR", False)
    with pytest.raises(RecipeError, match=rf"titan\.{key} has no effect without an accelerator"):
        check_overrides(recipe(f"titan.{key}={VALUES[key]}"))


def test_a_key_of_another_torchtitan_is_refused_until_it_is_looked_into(monkeypatch):
    @dataclasses.dataclass
    class Comm(type(JobConfig().comm)):
        new_key: str = ""

    @dataclasses.dataclass
    class Later(JobConfig):
        comm: Comm = dataclasses.field(default_factory=Comm)

    monkeypatch.setattr(ours, "JobConfig", Later)
    with pytest.raises(RecipeError, match=r"titan\.comm\.new_key cannot be set: .* has not been looked into") as error:
        check_overrides(recipe('titan.comm.new_key="x"'))
    assert error.value.hint


def test_empty_tables_say_nothing(tmp_path):
    given = recipe("titan.comm={}", "titan.training={}")
    check_overrides(given)
    assert build_job(given, tmp_path, steps=1) == build_job(recipe(), tmp_path, steps=1)
