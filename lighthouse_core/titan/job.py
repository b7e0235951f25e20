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
    "compile.components": Allowed(
        list[Literal["model", "loss"]], "lighthouse_core.titan.parallelize, for the blocks and for the loss"
    ),
    "compile.backend": Allowed(Literal["inductor", "aot_eager", "eager"], "apply_compile"),
    "comm.init_timeout_seconds": Allowed(_Count, "init_distributed"),
    "comm.train_timeout_seconds": Allowed(_Count, "set_pg_timeouts after the first step of a launch, on accelerators"),
    "comm.trace_buf_size": Allowed(Annotated[int, Field(ge=0, le=2**31 - 1)], "init_distributed, for NCCL's recorder"),
    "debug.deterministic_warn_only": Allowed(bool, "set_determinism"),
}


class Refused(NamedTuple):
    """A key of [titan] that a recipe may not set.

    Attributes:
        reason: why not.
        instead: what to do, as an imperative; "" to leave it out.
    """

    reason: str
    instead: str = ""


def _decided(*keys: str) -> Refused:
    """By keys of a recipe's own sections."""
    return Refused(f"{' and '.join(keys)} {'decide' if len(keys) > 1 else 'decides'} it", f"set {' or '.join(keys)}")


_DATA_PARALLEL = Refused(
    "only data and context parallelism are supported", "set parallel.shard, parallel.replicate or parallel.context"
)
_BY_HEADS = Refused("processes that share a sequence share out its heads", "set parallel.context")
_NOT_USED = Refused("it has no effect here")
_RUNS_CODE = Refused("it runs code")
_WRITES = Refused("it writes where it likes: what a run writes stays in its folder")
_ORIGIN = Refused(
    "a run begins with the weights of model.from, or draws its own",
    "set model.from, or give lighthouse pretrain --from",
)
_EXPORT = Refused("a run's checkpoints are torch's, and complete", "export with lighthouse strip")
_ALWAYS = Refused("a run saves checkpoints")
_KEPT = _decided("training.activation_checkpointing")
_VALIDATION = Refused("the held-out part of [data] is validated", "set data.validation")
# All others; a key here is that of a value, or of a table that nothing reads.
REFUSED = {
    "job.config_file": Refused("the recipe is the configuration"),
    "job.dump_folder": Refused("what a run writes stays in its folder", "give lighthouse pretrain --name"),
    "job.description": Refused("it is the run's name", "give lighthouse pretrain --name"),
    "job.save_config_file": _WRITES,
    "job.custom_config_module": _RUNS_CODE,
    "profiling.save_traces_folder": _WRITES,
    "profiling.save_memory_snapshot_folder": _WRITES,
    "metrics.log_freq": _decided("metrics.every"),
    "metrics.enable_tensorboard": _decided("metrics.tensorboard"),
    "metrics.enable_wandb": _decided("metrics.wandb"),
    "metrics.disable_color_printing": Refused("logs have no colours"),
    "metrics.save_for_all_ranks": Refused("one process writes the metrics of all"),
    "metrics.save_tb_folder": _WRITES,
    "model.name": _decided("model.family"),
    "model.flavor": Refused("[model] has the sizes"),
    "model.hf_assets_path": Refused(
        "[data] has the tokenizer, and model.from the weights", "set data.tokenizer or model.from"
    ),
    "model.tokenizer_path": _decided("data.tokenizer"),
    "model.converters": Refused("the model is built with its attention, and converted by nothing"),
    "model.print_after_conversion": Refused("the model is converted by nothing"),
    "optimizer.name": Refused("the optimizer is AdamW"),
    "optimizer.implementation": Refused("the guard against bad numbers needs the fused one"),
    "optimizer.lr": _decided("optimizer.lr"),
    "optimizer.beta1": _decided("optimizer.beta1"),
    "optimizer.beta2": _decided("optimizer.beta2"),
    "optimizer.eps": _decided("optimizer.eps"),
    "optimizer.weight_decay": _decided("optimizer.weight_decay"),
    "optimizer.early_step_in_backward": Refused("bad numbers are decided upon before an update"),
    "lr_scheduler.warmup_steps": _decided("schedule.warmup_steps"),
    "lr_scheduler.total_steps": _decided("training.steps", "recover.steps"),
    "lr_scheduler.decay_ratio": _decided("schedule.decay_steps", "recover.decay"),
    "lr_scheduler.decay_type": _decided("schedule.decay", "recover.decay"),
    "lr_scheduler.min_lr_factor": _decided("schedule.min_lr_factor"),
    "training.dataset": _decided("data.source", "data.sources"),
    "training.dataset_path": _decided("data.paths"),
    "training.local_batch_size": _decided("training.local_batch_size"),
    "training.global_batch_size": _decided("training.global_batch_size"),
    "training.seq_len": _decided("training.seq_len"),
    "training.max_norm": _decided("optimizer.clip_norm"),
    "training.steps": _decided("training.steps", "recover.steps"),
    "training.enable_cpu_offload": Refused("bad numbers are decided upon where the weights are"),
    "training.dtype": Refused("weights are float32", "set training.dtype for the type of the computation"),
    "training.mixed_precision_param": _decided("training.dtype"),
    "training.mixed_precision_reduce": Refused("gradients are float32"),
    "training.gc_debug": _WRITES,
    "training.dataloader": Refused("the loader of [data] makes batches in a thread of its own"),
    "parallelism.data_parallel_shard_degree": _decided("parallel.shard"),
    "parallelism.data_parallel_replicate_degree": _decided("parallel.replicate"),
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
    "parallelism.context_parallel_degree": _decided("parallel.context"),
    "parallelism.context_parallel_load_balancer": _BY_HEADS,
    "parallelism.context_parallel_rotate_method": _BY_HEADS,
    "parallelism.expert_parallel_degree": _DATA_PARALLEL,
    "parallelism.expert_tensor_parallel_degree": _DATA_PARALLEL,
    "parallelism.expert_parallel_comm_backend": _DATA_PARALLEL,
    "checkpoint.enable": _ALWAYS,
    "checkpoint.enable_ft_dataloader_checkpoints": _NOT_USED,
    "checkpoint.folder": Refused("what a run writes stays in its folder"),
    "checkpoint.interval": _decided("checkpoint.interval"),
    "checkpoint.initial_load_path": _ORIGIN,
    "checkpoint.initial_load_model_only": _ORIGIN,
    "checkpoint.initial_load_in_hf": _ORIGIN,
    "checkpoint.initial_load_in_hf_quantized": _ORIGIN,
    "checkpoint.last_save_model_only": _EXPORT,
    "checkpoint.last_save_in_hf": _EXPORT,
    "checkpoint.export_dtype": _EXPORT,
    "checkpoint.async_mode": _decided("checkpoint.async_save"),
    "checkpoint.keep_latest_k": _decided("checkpoint.keep"),
    "checkpoint.load_step": Refused(
        "a run goes on from its newest checkpoint", "give lighthouse pretrain --from RUN/checkpoints/step-N"
    ),
    "checkpoint.exclude_from_loading": Refused(
        "a run loads all of its checkpoint", "give lighthouse pretrain --from RUN, which takes its weights alone"
    ),
    "checkpoint.create_seed_checkpoint": Refused("weights do not depend on the number of processes"),
    "checkpoint.load_only": _ALWAYS,
    "activation_checkpoint.mode": _KEPT,
    "activation_checkpoint.selective_ac_option": _KEPT,
    "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns": _KEPT,
    "activation_checkpoint.memory_budget": _KEPT,
    "activation_checkpoint.visualize_memory_budget_pareto": _KEPT,
    # A ValueError of torch in the first step.
    "activation_checkpoint.debug": Refused("torch takes it only where no result is kept, and selections are"),
    "compile.enable": _decided("training.compile"),
    "quantize": _NOT_USED,
    "comm.save_traces_folder": Refused("traces are written to the run's logs"),
    "comm.save_traces_file_prefix": _WRITES,
    "comm.mode": Refused("a run trains for real"),
    "memory_estimation": Refused("nothing reads it", "look at the estimate of lighthouse pretrain --dry-run"),
    "fault_tolerance": _NOT_USED,
    "experimental": _RUNS_CODE,
    "validation.enable": _VALIDATION,
    "validation.dataset": _VALIDATION,
    "validation.dataset_path": _VALIDATION,
    "validation.local_batch_size": _decided("training.local_batch_size"),
    "validation.seq_len": _decided("training.seq_len"),
    "validation.freq": _decided("metrics.validation_every"),
    "validation.steps": _decided("metrics.validation_batches"),
    "validation.dataloader": Refused("the loader of [data] makes batches in a thread of its own"),
    "debug.seed": _decided("training.seed"),
    "debug.deterministic": _decided("training.deterministic"),
    "debug.moe_force_load_balance": Refused("no layer has experts"),
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
        "parallelism.context_parallel_degree": recipe.parallel.context,
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
        assert hasattr(target, name) and key in REFUSED, key
        setattr(target, name, value)
    _apply(job, recipe)
    return job


def check_overrides(recipe: "Recipe") -> None:
    """Raise RecipeError unless every [titan] table holds settings of torchtitan that a run reads, with values that it
    takes, and that change something in a run of this recipe."""
    job = build_job(recipe, Path("run"), steps=recipe.training.steps)
    given = _flat(recipe.titan)
    traces, snapshots = job.profiling.enable_profiling, job.profiling.enable_memory_snapshot
    blocks_compiled = job.compile.enable and "model" in job.compile.components
    tracing = traces, "without titan.profiling.enable_profiling"
    accelerated = HAS_ACCELERATOR, "without an accelerator"
    # torch compiles checkpointing in a way of its own.
    recomputed = (
        job.activation_checkpoint.mode != "none" and not blocks_compiled,
        'without training.activation_checkpointing, or where "model" is compiled',
    )
    effective = {
        "profiling.profile_freq": (
            traces or snapshots,
            "without titan.profiling.enable_profiling or enable_memory_snapshot",
        ),
        "profiling.profiler_active": tracing,
        "profiling.profiler_warmup": tracing,
        "parallelism.fsdp_reshard_after_forward": (
            recipe.parallel.shard != 1
            or recipe.parallel.context > 1
            or (recipe.parallel.replicate == 1 and recipe.training.dtype != "float32"),
            "without FSDP: parallel.shard is 1",
        ),
        "checkpoint.enable_first_step_checkpoint": (
            recipe.checkpoint.interval > 1 and 1 not in recipe.checkpoint.also,
            "where checkpoint.interval or checkpoint.also has step 1 saved",
        ),
        **{key: recomputed for key in ALLOWED if key.startswith("activation_checkpoint.")},
        "compile.components": (job.compile.enable, "without training.compile"),
        "compile.backend": (blocks_compiled, 'unless training.compile compiles "model"'),
        "comm.train_timeout_seconds": accelerated,
        "comm.trace_buf_size": accelerated,
        "debug.deterministic_warn_only": (job.debug.deterministic, "without training.deterministic"),
    }
    for key in given:
        changes, unless = effective.get(key, (True, ""))
        if not changes:
            raise RecipeError(f"titan.{key} has no effect {unless}", hint="leave it out, or change that, too")


def _leave_out() -> str:
    return f"leave it out; [titan] takes {', '.join(ALLOWED)}"


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value that is no table, by its key with dots; an empty table is one, too."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name: value}
    return flat


def _apply(job: JobConfig, recipe: "Recipe") -> None:
    for key, value in _flat(recipe.titan).items():
        path = key.split(".")
        above = {".".join(path[: n + 1]) for n in range(len(path))}
        if refused := above & REFUSED.keys():
            reason, instead = REFUSED[refused.pop()]
            raise RecipeError(f"titan.{key} cannot be set: {reason}", hint=instead or _leave_out())
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
                f"titan.{key} cannot be set: what it would do to a run has not been looked into", hint=_leave_out()
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
