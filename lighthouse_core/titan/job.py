"""A recipe as torchtitan's JobConfig."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from torchtitan.config import JobConfig

from lighthouse_core.errors import RecipeError

if TYPE_CHECKING:
    from lighthouse_core.config import Recipe

MODEL = "lighthouse"
_DATA_PARALLEL = "only data parallelism is supported"
_NOT_USED = "it has no effect here"
# A key refuses its whole table, too.
_FORBIDDEN = {
    # They import code by name.
    "experimental.custom_import": "it runs code",
    "experimental.custom_args_module": "it runs code",
    "job.custom_config_module": "it runs code",
    "parallelism.tensor_parallel_degree": _DATA_PARALLEL,
    "parallelism.pipeline_parallel_degree": _DATA_PARALLEL,
    "parallelism.context_parallel_degree": _DATA_PARALLEL,
    "parallelism.expert_parallel_degree": _DATA_PARALLEL,
    "checkpoint.last_save_in_hf": "lighthouse strip exports",
    "checkpoint.load_only": "a run saves its checkpoints",
    "checkpoint.exclude_from_loading": "a run loads all of its checkpoint",
    "optimizer.early_step_in_backward": "bad numbers are decided upon before an update",
    "training.enable_cpu_offload": "bad numbers are decided upon where the weights are",
    "comm.mode": "a run trains for real",
    "fault_tolerance": _NOT_USED,
    "lr_scheduler": "[schedule] and [recover] decide it",
    "memory_estimation": _NOT_USED,
    "model": "[model] decides it",
    "quantize": _NOT_USED,
    "validation": "[data] and [metrics] decide it",
}


def _settings(recipe: "Recipe", run_dir: Path, steps: int) -> dict[str, Any]:
    """Every torchtitan setting a recipe's own sections decide."""
    training, checkpoint = recipe.training, recipe.checkpoint
    return {
        "job.config_file": None,
        "job.dump_folder": str(run_dir),
        "job.description": run_dir.name,
        "metrics.log_freq": recipe.metrics.every,
        "metrics.enable_tensorboard": recipe.metrics.tensorboard,
        "metrics.save_tb_folder": "tb",
        # Metrics does this itself: torchtitan goes on, and only makes a note, where it cannot be set up.
        "metrics.enable_wandb": False,
        "metrics.disable_color_printing": True,
        "model.name": MODEL,
        "model.flavor": MODEL,
        "model.converters": [MODEL],
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
        "training.dataset": recipe.data.source,
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
    _apply(job, recipe.titan, "", _owned(recipe))
    return job


def check_overrides(recipe: "Recipe") -> None:
    """Raise RecipeError unless every [titan] table holds settings of torchtitan, with torchtitan's types, that no
    other section of the recipe decides."""
    _apply(JobConfig(), recipe.titan, "", _owned(recipe))


def _owned(recipe: "Recipe") -> dict[str, str]:
    owned = {key: "the recipe's own sections decide it" for key in _settings(recipe, Path("run"), 0)}
    return owned | _FORBIDDEN


def _apply(target: Any, table: dict[str, Any], prefix: str, refused: dict[str, str]) -> None:
    hints = get_type_hints(type(target))
    names = [field.name for field in dataclasses.fields(target)]
    for name, value in table.items():
        key = prefix + name
        if key in refused:
            raise RecipeError(f"titan.{key} cannot be set: {refused[key]}")
        if name not in names:
            raise RecipeError(f"titan.{key} is not a setting of torchtitan", hint=f"it knows {', '.join(names)}")
        current = getattr(target, name)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, dict):
                raise RecipeError(f"titan.{key} must be a table, not {value!r}")
            _apply(current, value, key + ".", refused)
            continue
        try:
            setattr(target, name, TypeAdapter(hints[name]).validate_python(value, strict=True))
        except ValidationError as error:
            problem = error.errors()[0]["msg"].lower()
            raise RecipeError(f"titan.{key} = {value!r}: {problem}") from None
