"""A recipe as torchtitan's JobConfig."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field, TypeAdapter, ValidationError
from torchtitan.config import JobConfig

from lighthouse_core.errors import RecipeError, did_you_mean
from lighthouse_core.titan.runtime import HAS_ACCELERATOR

if TYPE_CHECKING:
    from lighthouse_core.config import Recipe

MODEL = "lighthouse"
# A timeout, a number of steps or of records: none is longer than a month of seconds, or larger than memory.
_Count = Annotated[int, Field(gt=0, le=2_592_000)]


class Allowed(NamedTuple):
    """A key of [titan] that a recipe may set.

    Attributes:
        values: the type of its values, narrower than torchtitan's where others end in a traceback or change nothing.
        reader: what reads it in a run of ours.
    """

    values: Any
    reader: str


# Whatever is not here is refused, a key of a torchtitan to come as well, until somebody has read what it does.
ALLOWED = {
    "job.print_config": Allowed(bool, "JobConfig.maybe_log, into the job's log"),
    "profiling.enable_profiling": Allowed(bool, "maybe_enable_profiling around the steps"),
    "profiling.profile_freq": Allowed(_Count, "maybe_enable_profiling and maybe_enable_memory_snapshot"),
    "profiling.profiler_active": Allowed(_Count, "maybe_enable_profiling"),
    "profiling.profiler_warmup": Allowed(Annotated[int, Field(ge=0, le=2_592_000)], "maybe_enable_profiling"),
    "profiling.enable_memory_snapshot": Allowed(bool, "maybe_enable_memory_snapshot around the steps"),
    "training.gc_freq": Allowed(_Count, "GarbageCollection before every step"),
    "parallelism.fsdp_reshard_after_forward": Allowed(
        Literal["default", "always", "never"], "apply_fsdp in lighthouse_core.titan.parallelize"
    ),
    "checkpoint.enable_first_step_checkpoint": Allowed(bool, "CheckpointManager._should_save"),
    "activation_checkpoint.early_stop": Allowed(bool, "apply_ac"),
    "activation_checkpoint.preserve_rng_state": Allowed(bool, "apply_ac"),
    "activation_checkpoint.determinism_check": Allowed(Literal["default", "none"], "apply_ac"),
    "activation_checkpoint.debug": Allowed(bool, "apply_ac"),
    "compile.components": Allowed(
        list[Literal["model", "loss"]], "lighthouse_core.titan.parallelize, for the blocks and for the loss"
    ),
    "compile.backend": Allowed(Literal["inductor", "aot_eager", "eager"], "apply_compile"),
    "comm.init_timeout_seconds": Allowed(_Count, "init_distributed"),
    "comm.train_timeout_seconds": Allowed(_Count, "set_pg_timeouts after the first step, on accelerators"),
    "comm.trace_buf_size": Allowed(Annotated[int, Field(ge=0, le=2**31 - 1)], "init_distributed, for NCCL's recorder"),
    "debug.deterministic_warn_only": Allowed(bool, "set_determinism"),
}

_LEAVE_OUT = f"leave it out; [titan] takes {', '.join(ALLOWED)}"
_DATA_PARALLEL = "only data parallelism is supported"
_NOT_USED = "it has no effect here"
_RUNS_CODE = "it runs code"
_WRITES = "it writes where it likes: what a run writes stays in its folder"
# A key refuses its whole table, too.
REFUSED = {
    "job.save_config_file": _WRITES,
    "job.custom_config_module": _RUNS_CODE,
    "profiling.save_traces_folder": _WRITES,
    "profiling.save_memory_snapshot_folder": _WRITES,
    "metrics.save_for_all_ranks": "one process writes the metrics of all",
    "metrics.save_tb_folder": _WRITES,
    "model.hf_assets_path": "[data] has the tokenizer, and weights are drawn from training.seed",
    "model.tokenizer_path": "data.tokenizer decides it",
    "model.print_after_conversion": "[model] and [lighthouse] decide it",
    "optimizer.early_step_in_backward": "bad numbers are decided upon before an update",
    "lr_scheduler": "[schedule] and [recover] decide it",
    "training.dataset_path": "data.paths decides it",
    "training.enable_cpu_offload": "bad numbers are decided upon where the weights are",
    "training.gc_debug": _WRITES,
    "training.dataloader": "the loader of [data] makes batches in a thread of its own",
    "parallelism.tensor_parallel_degree": _DATA_PARALLEL,
    "parallelism.disable_loss_parallel": _DATA_PARALLEL,
    "parallelism.enable_async_tensor_parallel": _DATA_PARALLEL,
    "parallelism.pipeline_parallel_degree": _DATA_PARALLEL,
    "parallelism.module_fqns_per_model_part": _DATA_PARALLEL,
    "parallelism.pipeline_parallel_first_stage_less_layers": _DATA_PARALLEL,
    "parallelism.pipeline_parallel_last_stage_less_layers": _DATA_PARALLEL,
    "parallelism.pipeline_parallel_layers_per_stage": _DATA_PARALLEL,
    "parallelism.pipeline_parallel_schedule": _DATA_PARALLEL,
    "parallelism.pipeline_parallel_schedule_csv": _DATA_PARALLEL,
    "parallelism.pipeline_parallel_microbatch_size": _DATA_PARALLEL,
    "parallelism.pipeline_parallel_expert_parallel_overlap": _DATA_PARALLEL,
    "parallelism.context_parallel_degree": _DATA_PARALLEL,
    "parallelism.context_parallel_load_balancer": _DATA_PARALLEL,
    "parallelism.context_parallel_rotate_method": _DATA_PARALLEL,
    "parallelism.expert_parallel_degree": _DATA_PARALLEL,
    "parallelism.expert_tensor_parallel_degree": _DATA_PARALLEL,
    "parallelism.expert_parallel_comm_backend": _DATA_PARALLEL,
    "checkpoint.enable_ft_dataloader_checkpoints": _NOT_USED,
    "checkpoint.initial_load_model_only": "a run begins with weights drawn from training.seed",
    "checkpoint.initial_load_in_hf": "a run begins with weights drawn from training.seed",
    "checkpoint.initial_load_in_hf_quantized": "a run begins with weights drawn from training.seed",
    "checkpoint.last_save_in_hf": "lighthouse strip exports",
    "checkpoint.export_dtype": "lighthouse strip exports",
    "checkpoint.exclude_from_loading": "a run loads all of its checkpoint",
    "checkpoint.create_seed_checkpoint": "weights do not depend on the number of processes",
    "checkpoint.load_only": "a run saves its checkpoints",
    "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns": (
        "training.activation_checkpointing decides what is kept"
    ),
    "activation_checkpoint.memory_budget": "training.activation_checkpointing has no such mode",
    "activation_checkpoint.visualize_memory_budget_pareto": "training.activation_checkpointing has no such mode",
    "quantize": _NOT_USED,
    "comm.save_traces_file_prefix": _WRITES,
    "comm.mode": "a run trains for real",
    "memory_estimation": _NOT_USED,
    "fault_tolerance": _NOT_USED,
    "experimental": _RUNS_CODE,
    "validation": "[data] and [metrics] decide it",
    "debug.moe_force_load_balance": "no layer has experts",
}


def _settings(recipe: "Recipe", run_dir: Path, steps: int) -> dict[str, Any]:
    """Every torchtitan setting a recipe's own sections decide."""
    training, checkpoint = recipe.training, recipe.checkpoint
    return {
        "job.config_file": None,
        "job.dump_folder": str(run_dir),
        "job.description": run_dir.name,
        "metrics.log_freq": recipe.metrics.every,
        # Metrics does both itself.
        "metrics.enable_tensorboard": False,
        "metrics.enable_wandb": False,
        "metrics.disable_color_printing": True,
        "model.name": MODEL,
        "model.flavor": MODEL,
        # The model is built with its attention.
        "model.converters": [],
        "optimizer.name": "AdamW",
        # The guard against bad numbers needs it.
        "optimizer.implementation": "fused",
        "optimizer.lr": recipe.optimizer.lr,
        "optimizer.beta1": recipe.optimizer.beta1,
        "optimizer.beta2": recipe.optimizer.beta2,
        "optimizer.eps": recipe.optimizer.eps,
        "optimizer.weight_decay": recipe.optimizer.weight_decay,
        "lr_scheduler.warmup_steps": recipe.schedule.warmup_steps,
        "lr_scheduler.total_steps": None,
        "lr_scheduler.decay_ratio": 0.0,
        "training.dataset": "mixture" if recipe.data.sources else recipe.data.source,
        "training.local_batch_size": training.local_batch_size,
        "training.global_batch_size": training.global_batch_size,
        "training.seq_len": training.seq_len,
        "training.max_norm": recipe.optimizer.clip_norm,
        "training.steps": steps,
        "training.dtype": "float32",
        "training.mixed_precision_param": training.dtype,
        "training.mixed_precision_reduce": "float32",
        "parallelism.data_parallel_shard_degree": recipe.parallel.shard,
        "parallelism.data_parallel_replicate_degree": recipe.parallel.replicate,
        "checkpoint.enable": True,
        "checkpoint.folder": "checkpoints",
        "checkpoint.interval": checkpoint.interval,
        "checkpoint.keep_latest_k": checkpoint.keep,
        "checkpoint.async_mode": "async" if checkpoint.async_save else "disabled",
        # torchtitan's default drops the optimizer state, without which neither resuming nor recovery is possible.
        "checkpoint.last_save_model_only": False,
        "checkpoint.initial_load_path": None,
        "checkpoint.load_step": -1,
        "activation_checkpoint.mode": training.activation_checkpointing,
        "activation_checkpoint.selective_ac_option": "op",
        "compile.enable": training.compile,
        "comm.save_traces_folder": "logs",
        "debug.seed": training.seed,
        "debug.deterministic": training.deterministic,
        "validation.enable": recipe.data.validation > 0,
    }


def build_job(recipe: "Recipe", run_dir: Path, *, steps: int) -> JobConfig:
    """torchtitan's configuration of one stage of a run.

    Args:
        recipe: the resolved recipe.
        run_dir: the run's directory.
        steps: step at which the stage ends, counted from the start of the run.

    Raises:
        RecipeError: for a [titan] table that does not fit torchtitan's settings.
    """
    job = JobConfig()
    for key, value in _settings(recipe, run_dir, steps).items():
        section, name = key.rsplit(".", 1)
        target = getattr(job, section)
        assert hasattr(target, name), key
        setattr(target, name, value)
    _apply(job, recipe)
    return job


def check_overrides(recipe: "Recipe") -> None:
    """Raise RecipeError unless every [titan] table holds settings of torchtitan that a run reads, with values that it
    takes, and that no other section of the recipe decides."""
    _apply(JobConfig(), recipe)
    given = _flat(recipe.titan)
    profiling = given.get("profiling.enable_profiling"), given.get("profiling.enable_memory_snapshot")
    compiles = recipe.training.compile, "training.compile"
    checkpoints = recipe.training.activation_checkpointing != "none", 'an activation_checkpointing other than "none"'
    needs = {
        "profiling.profile_freq": (any(profiling), "titan.profiling.enable_profiling or enable_memory_snapshot"),
        "profiling.profiler_active": (profiling[0], "titan.profiling.enable_profiling"),
        "profiling.profiler_warmup": (profiling[0], "titan.profiling.enable_profiling"),
        "compile.components": compiles,
        "compile.backend": compiles,
        **{key: checkpoints for key in ALLOWED if key.startswith("activation_checkpoint.")},
        "comm.train_timeout_seconds": (HAS_ACCELERATOR, "an accelerator"),
        "comm.trace_buf_size": (HAS_ACCELERATOR, "an accelerator"),
        "debug.deterministic_warn_only": (recipe.training.deterministic, "training.deterministic"),
        "parallelism.fsdp_reshard_after_forward": (
            recipe.parallel.replicate == 1 or recipe.parallel.shard != 1,
            "a parallel.shard other than 1",
        ),
    }
    for key in given:
        there, what = needs.get(key, (True, ""))
        if not there:
            raise RecipeError(f"titan.{key} has no effect without {what}", hint="leave it out, or set that, too")


def owned_keys(recipe: "Recipe") -> set[str]:
    """Keys of torchtitan that the sections of a recipe decide."""
    return set(_settings(recipe, Path("run"), 0))


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value that is no table, by its key with dots; an empty table is one, too."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name: value}
    return flat


def _apply(job: JobConfig, recipe: "Recipe") -> None:
    owned = owned_keys(recipe)
    for key, value in _flat(recipe.titan).items():
        path = key.split(".")
        above = {".".join(path[: n + 1]) for n in range(len(path))}
        if above & owned:
            raise RecipeError(
                f"titan.{key} cannot be set: the recipe's own sections decide it",
                hint="set it in its own section; lighthouse recipes show NAME lists them",
            )
        if refused := above & REFUSED.keys():
            raise RecipeError(f"titan.{key} cannot be set: {REFUSED[refused.pop()]}", hint=_LEAVE_OUT)
        target: Any = job
        for n, name in enumerate(path):
            names = [field.name for field in dataclasses.fields(target)] if dataclasses.is_dataclass(target) else []
            if name not in names:
                parent = ".".join(path[:n])
                known = f"it knows {', '.join(names)}" if names else f"titan.{parent} is a value, and no table"
                # Of what can be set.
                near = {one.split(".")[n] for one in ALLOWED if one.split(".")[:n] == path[:n] and one.count(".") >= n}
                meant = did_you_mean(name, sorted(near))
                raise RecipeError(f"titan.{'.'.join(path[: n + 1])} is not a setting of torchtitan{meant}", hint=known)
            section, target = target, getattr(target, name)
        if dataclasses.is_dataclass(target):
            if value != {}:
                known = ", ".join(field.name for field in dataclasses.fields(target))
                raise RecipeError(f"titan.{key} must be a table, not {value!r}", hint=f"it knows {known}")
            continue
        if key not in ALLOWED:
            raise RecipeError(
                f"titan.{key} cannot be set: what it would do to a run has not been looked into", hint=_LEAVE_OUT
            )
        try:
            setattr(section, path[-1], TypeAdapter(ALLOWED[key].values).validate_python(value, strict=True))
        except ValidationError as error:
            problem = error.errors()[0]["msg"].lower()
            raise RecipeError(f"titan.{key} = {value!r}: {problem}", hint=f"torchtitan has {target!r}") from None
    _check_profiling(job.profiling)


def _check_profiling(profiling: Any) -> None:
    if (profiling.enable_profiling or profiling.enable_memory_snapshot) and not HAS_ACCELERATOR:
        raise RecipeError("titan.profiling needs a GPU", hint="lighthouse profile takes a step of a CPU apart")
    if profiling.profile_freq < profiling.profiler_warmup + profiling.profiler_active:
        raise RecipeError(
            f"titan.profiling.profile_freq ({profiling.profile_freq}) is below profiler_warmup "
            f"({profiling.profiler_warmup}) and profiler_active ({profiling.profiler_active}) together",
            hint="a trace takes its warm-up and its active steps out of every profile_freq steps",
        )
