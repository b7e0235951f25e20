"""The last step of a run under torch's profiler, for `lighthouse profile step`."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import profile, record_function, schedule
from torchtitan import train as titan_train

from lighthouse_core import annotations
from lighthouse_core.attention.backends import kernels
from lighthouse_core.attention.module import DenseAttention, LighthouseAttention
from lighthouse_core.models.decoder import Attention, Block, FeedForward
from lighthouse_core.titan.runtime import DEVICE_TYPE, HAS_ACCELERATOR

if TYPE_CHECKING:
    from lighthouse_core.titan.trainer import Trainer

_STAGES = {
    "pyramid": annotations.PYRAMID,
    "select": annotations.SELECT,
    "select_drawn": annotations.SELECT,
    "gather": annotations.GATHER,
    "scatter": annotations.SCATTER,
    "merge": annotations.MERGE,
}


def trace_last_step(trainer: "Trainer", folder: Path) -> None:
    """Have the trainer write a Chrome trace of its last step to rankN.json.gz in `folder`, and save no checkpoint.

    The step before it is traced, too, and thrown away: the profiler starts up in it. Shapes are recorded; outside of
    compiled blocks, which admit none, annotations name the module or the stage of attention.

    Args:
        trainer: about to train.
        folder: where the files go.
    """
    _annotate(trainer)
    trainer.checkpointer.save = lambda *_, **__: None
    trainer.job_config.validation.enable = False
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank{torch.distributed.get_rank()}.json.gz"
    profiler = profile(
        schedule=schedule(wait=0, warmup=1, active=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
        record_shapes=True,
    )
    train_step, end = trainer.train_step, trainer.stage.end

    def step(batches: Iterator[Any]) -> None:
        if trainer.step == end - 1:
            profiler.start()
        elif trainer.step == end:
            _wait()
            profiler.step()
        train_step(batches)
        if trainer.step == end:
            _wait()
            profiler.stop()

    patched: Any = trainer
    patched.train_step = step


def _wait() -> None:
    if HAS_ACCELERATOR:
        torch.accelerator.synchronize()


def _annotate(trainer: "Trainer") -> None:
    recipe, (model,) = trainer.stage.recipe, trainer.model_parts
    for place, name in (
        (model, annotations.MODEL),
        (model.tok_embeddings, annotations.EMBEDDING),
        (model.output, annotations.HEAD),
    ):
        _wrap(place, "forward", name)
    _wrap(trainer.optimizers, "step", annotations.OPTIMIZER)
    _wrap(titan_train.dist_utils, "clip_grad_norm_", annotations.OPTIMIZER)
    patched: Any = trainer
    batches = trainer.batch_generator
    patched.batch_generator = lambda loader: _annotated_items(batches(loader))
    if recipe.training.compile:
        return
    for module in model.modules():
        if isinstance(module, Attention):
            for projection in (module.wq, module.wk, module.wv, module.wo):
                _wrap(projection, "forward", annotations.PROJECTIONS)
        for kind, name in (
            # What checkpointing makes again is outside of the model's own forward pass.
            (Block, annotations.MODEL),
            (FeedForward, annotations.MLP),
            (LighthouseAttention, annotations.DENSE_CALL),
            (DenseAttention, annotations.DENSE_LAYERS),
        ):
            if isinstance(module, kind):
                _wrap(module, "forward", name)
    if (attention := recipe.phases[-1].attention).pools:
        ops = kernels(attention.backend, DEVICE_TYPE, getattr(torch, recipe.training.dtype))
        for stage, name in _STAGES.items():
            _wrap(ops, stage, name)


def _wrap(place: Any, attribute: str, name: str) -> None:
    call: Callable[..., Any] = getattr(place, attribute)

    @functools.wraps(call)
    def annotated(*arguments: Any, **options: Any) -> Any:
        with record_function(name):
            return call(*arguments, **options)

    setattr(place, attribute, annotated)


def _annotated_items(items: Iterator[Any]) -> Iterator[Any]:
    while True:
        with record_function(annotations.DATA):
            item = next(items)
        yield item
