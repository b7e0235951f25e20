"""torchtitan's trainer, given our model, data, schedule and metrics."""

import contextlib
import functools
import itertools
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torchtitan.protocols.train_spec as train_specs
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtitan import train as titan_train
from torchtitan.components.checkpoint import MODEL as MODEL_STATE
from torchtitan.components.lr_scheduler import LRSchedulersContainer
from torchtitan.components.optimizer import build_optimizers
from torchtitan.components.validate import BaseValidator
from torchtitan.components.validate import Validator as TitanValidator
from torchtitan.distributed import utils as dist_utils

from lighthouse_core import vml
from lighthouse_core.attention.call import log_choices
from lighthouse_core.attention.context import AttentionContext, selection_keys
from lighthouse_core.attention.documents import check_documents
from lighthouse_core.attention.settings import BackendError
from lighthouse_core.checkpoint import check_model
from lighthouse_core.config import Recipe
from lighthouse_core.config.phases import Phase, phase_at
from lighthouse_core.data.documents import Split
from lighthouse_core.data.loader import TokenLoader, build_loader
from lighthouse_core.data.tokenizer import build_tokenizer
from lighthouse_core.errors import DataError, PatchError, TrainingError, UserError, memory_fault
from lighthouse_core.job.environment import TRACE_FOLDER
from lighthouse_core.job.heartbeat import note_step
from lighthouse_core.job.meeting import meeting
from lighthouse_core.job.stop import Interrupted, is_training, stop_requested, training_begins
from lighthouse_core.models.decoder import Decoder, DecoderArgs, use_dense, use_lighthouse
from lighthouse_core.models.labels import IGNORED
from lighthouse_core.runs.run import Run
from lighthouse_core.runs.schedule import recovery_factor, stage_1_factor
from lighthouse_core.titan.budget import Budgets
from lighthouse_core.titan.checkpointer import LOSS_SCALE, Checkpointer
from lighthouse_core.titan.effects import Effects
from lighthouse_core.titan.guard import Guard, NotingUtils
from lighthouse_core.titan.job import MODEL, build_job
from lighthouse_core.titan.measure import dense_seconds
from lighthouse_core.titan.metrics import Metrics
from lighthouse_core.titan.parallelize import parallelize
from lighthouse_core.titan.runtime import DEVICE_TYPE
from lighthouse_core.titan.scaling import LossScale
from lighthouse_core.weights.checkpoint import BUDGET
from lighthouse_core.weights.origin import check_unchanged, find_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """What one launch trains.

    Attributes:
        run: the run.
        recipe: its resolved recipe, as of this stage.
        name: "lighthouse" or "dense".
        start, end: steps of the run between which this stage lies.
        recovery: whether it follows another stage.
    """

    run: Run
    recipe: Recipe
    name: str
    start: int
    end: int
    recovery: bool

    @property
    def unread(self) -> dict[str, int]:
        """The files that could not be read when the run ended last, and the sizes that they had."""
        noted = (stage["unread"] for stage in reversed(self.run.ledger["stages"]) if "unread" in stage)
        return next(noted, {})

    @functools.cached_property
    def phases(self) -> tuple[Phase, ...]:
        """Of stage 1; () for a dense stage."""
        return self.recipe.phases if self.name == "lighthouse" else ()

    @property
    def pooled(self) -> list[Phase]:
        """The phases that are not dense."""
        return self.recipe.sparse_phases if self.name == "lighthouse" else []

    @property
    def compilations(self) -> int:
        """How often a layer may be compiled for phases beyond the first one: each time as a sparse layer and as a dense
        one, with gradients and without, and as often again where a window grows."""
        return 8 * len(self.phases[1:])

    def phase(self, step: int) -> Phase | None:
        """The phase of a step, which the step alone decides; None in a dense stage."""
        return phase_at(self.phases, step) if self.phases else None

    def context(self, step: int, key_step: int, sample: int, device: torch.device) -> AttentionContext:
        """What the attention of a micro-batch is given.

        Args:
            step: of the training, which decides the settings.
            key_step: of the key that selectors draw from.
            sample: number of the micro-batch's first row within the global batch.
            device: of the key.
        """
        phase = self.phase(step)
        if phase is None:
            return AttentionContext()
        key, settings = None, phase.settings(step)
        if settings.draws and not phase.dense:
            key = selection_keys(self.recipe.training.seed, key_step, sample, self.recipe.model.layers).to(device)
        return AttentionContext(key=key, settings=settings, dense=phase.dense, dense_layers=phase.dense_layers)


@dataclass
class Args(DecoderArgs):
    """The decoder's arguments, as torchtitan asks for them."""

    def update_from_config(self, job_config, **unused) -> None:
        """Nothing: the recipe has decided them."""

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        # Metrics works out the FLOPs.
        return sum(p.numel() for p in model.parameters()), 0


def _build_model(stage: Stage, args: Args) -> Decoder:
    """The decoder with the attention of a stage in every layer."""
    recipe = stage.recipe
    # Before the first checkpoint of a run: from then on there is one to load.
    begins = recipe.model.origin and not stage.run.checkpoint_steps()
    model = Decoder(args, find_weights(recipe.model).read if begins else None)
    for phase in stage.phases:
        which = f" phase {phase.number} of {len(stage.phases)}, steps {phase.begin}-{phase.end}:"
        layers = "" if phase.dense else f", {_layers(recipe, phase.dense_layers)}"
        logger.info(f"stage 1:{which * (len(stage.phases) > 1)} {phase.described()}{layers}")
    try:
        dtype, shared = getattr(torch, recipe.training.dtype), None
        if recipe.parallel.context > 1:
            shared = recipe.training.seq_len, recipe.parallel.context
        documents = recipe.data.packing == "documents"
        for phase in stage.phases:
            # A compiled window that grows takes the kernels of documents: see `Chunked`.
            packs = documents or (phase.growth is not None and recipe.training.compile)
            what: dict[str, Any] = {"pooled": not phase.dense, "documents": packs, "shared": shared}
            log_choices(phase.attention, DEVICE_TYPE, dtype, recipe.model.head_dim, **what)
        if not stage.phases:
            cfg = recipe.lighthouse.dense_attention
            log_choices(cfg, DEVICE_TYPE, dtype, recipe.model.head_dim, pooled=False, documents=documents)
    except BackendError as error:
        raise UserError(str(error), hint=error.hint) from None
    use_dense(model, recipe.lighthouse.dense_backend)
    if stage.pooled:
        # What is dense in some phases alone, the context of a step says.
        always = set.intersection(*(set(phase.dense_layers) for phase in stage.pooled))
        use_lighthouse(model, stage.pooled[-1].attention, always)
    return model


def _layers(recipe: Recipe, dense: tuple[int, ...]) -> str:
    """Which layers are not dense, counted from 0, as "layers 2-27 of 0-29, the others dense"."""
    count = recipe.model.layers
    if not dense:
        return "every layer"
    pooled = [layer for layer in range(count) if layer not in dense]
    begins = [layer for layer in pooled if layer - 1 not in pooled]
    ends = [layer for layer in pooled if layer + 1 not in pooled]
    spans = (f"{begin}-{end}" if begin < end else f"{begin}" for begin, end in zip(begins, ends, strict=True))
    return f"layers {', '.join(spans) or 'none'} of 0-{count - 1}, the others dense"


class _Schedulers(LRSchedulersContainer):
    """Takes the place in the schedule from a checkpoint, but the rate from this stage's own schedule."""

    def take_rates(self) -> None:
        """Give every group the rate of its place in this schedule; called once all of a checkpoint is loaded, for the
        optimizer's part of it, which comes after the schedule's, holds the rate of the stage that saved it."""
        for scheduler in self.schedulers:
            scheduler._last_lr = [
                base * factor(scheduler.last_epoch)
                for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            ]
            for group, lr in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
                group["lr"] = lr

    def check(self, step: int) -> None:
        """Raise PatchError unless the next update, that of `step`, has the rate of this stage's schedule."""
        for scheduler in self.schedulers:
            groups, last = scheduler.optimizer.param_groups, scheduler.get_last_lr()
            wanted = [
                base * factor(step - 1) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            ]
            if [group["lr"] for group in groups] != wanted or last != wanted:
                raise PatchError(
                    f"step {step} has the learning rate {groups[0]['lr']} ({last[0]} in the metrics), but its schedule "
                    f"gives {wanted[0]}"
                )


def _build_schedulers(stage: Stage, optimizers, config, training_steps) -> LRSchedulersContainer:
    recipe = stage.recipe
    factor = recovery_factor(recipe, stage.start, stage.end) if stage.recovery else stage_1_factor(recipe)
    return _Schedulers(optimizers, factor)


def _build_loader(
    stage: Stage, dp_world_size: int, dp_rank: int, split: Split = "train", prefetch: int = 2, **unused
) -> TokenLoader:
    training = stage.recipe.training
    return build_loader(
        stage.recipe.data,
        training.seq_len,
        training.local_batch_size,
        dp_rank,
        dp_world_size,
        training.seed,
        split=split,
        align=stage.recipe.alignment,
        mended=stage.unread,
        prefetch=prefetch,
    )


def _packed(
    context: AttentionContext, inputs: dict[str, Any], device: torch.device, recipe: Recipe
) -> AttentionContext:
    """The context of a batch of the loader. With the packing "concat" attention and RoPE cross the boundaries of
    documents, and positions are those within the sequence."""
    if (documents := inputs.get("documents")) is None:
        return context
    if device.type != "cpu" or recipe.training.compile:
        # While they are on the host: neither a call on a GPU nor a compiled one looks at the boundaries.
        why = "of data.align" if recipe.data.align else "that the attention method needs"
        batch, tokens = inputs["input"].shape
        check_documents(documents, batch, tokens, recipe.alignment or 1, why)
    return replace(context, documents=documents.to(device), positions=inputs["positions"].to(device))


@dataclass(frozen=True)
class _Sharers:
    """The processes that share each sequence, `parallel.context` of them.

    Attributes:
        group: of them; None for one process.
        count, rank: how many they are, and which of them this one is.
    """

    group: torch.distributed.ProcessGroup | None = None
    count: int = 1
    rank: int = 0

    @classmethod
    def of(cls, parallel_dims) -> "_Sharers":
        mesh = parallel_dims.get_optional_mesh("cp")
        return cls() if mesh is None else cls(mesh.get_group(), mesh.size(), mesh.get_local_rank())

    def own(self, x: torch.Tensor) -> torch.Tensor:
        """The part of this process of [B, N]."""
        size = x.shape[1] // self.count
        return x[:, self.rank * size : (self.rank + 1) * size]

    def within(self, context: AttentionContext, tokens: int) -> AttentionContext:
        """The context of this process's part of sequences of N = `tokens`."""
        return replace(context, group=self.group, first_position=self.rank * (tokens // self.count))


class _WithoutContext:
    """torchtitan's dimensions, which say that no sequences are shared: its validator would share them in its own way.

    Args:
        dimensions: torchtitan's.
    """

    cp_enabled = False

    def __init__(self, dimensions):
        self._dimensions = dimensions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dimensions, name)


def _together(
    batches: Iterator[tuple[dict[str, Any], torch.Tensor]], meet: Callable[[DataError | None], None], count: int = 1
) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
    """Batches, `count` at a time. `meet` is called before they are given with what kept them from being read, on every
    process: one that went on alone would wait for the others for ever."""
    while True:
        some, fault = [], None
        try:
            some = list(itertools.islice(batches, count))
        except DataError as error:
            fault = error
        meet(fault)
        yield from some


class _Abandoned(Exception):
    """A validation was given up, for the run was asked to end."""


class Validator(TitanValidator):
    """torchtitan's validator over the held-out split, every `metrics.validation_every` steps and at the stage's end."""

    def __init__(self, stage: Stage, effects: Effects, *, job_config, maybe_enable_amp, **parts):
        BaseValidator.__init__(self, job_config)
        self.stage = stage
        self.effects = effects
        # The step of the last validation that was written.
        self.done: int | None = None
        self.sharers = _Sharers.of(parts["parallel_dims"])
        self.parallel_dims = _WithoutContext(parts["parallel_dims"])
        self.tokenizer = parts["tokenizer"]
        self.loss, self.loss_fn = parts["loss_fn"], self._loss
        self.validation_context = parts["validation_context"]
        self.metrics_processor = parts["metrics_processor"]
        self.maybe_enable_amp = _amp(stage.recipe, self.parallel_dims, maybe_enable_amp)
        self.rank, self.ranks = parts["dp_rank"], parts["dp_world_size"]
        # The losses and the labels that count, summed over the micro-batches of a validation.
        self.total = torch.zeros(2, dtype=torch.float64, device=DEVICE_TYPE)
        if stage.recipe.data.packing == "documents" or self.sharers.count > 1:
            self.metrics_processor.validation_loss = self._mean
        self.loader = _build_loader(stage, self.ranks, self.rank, split="validation")
        training = stage.recipe.training
        # The recipe counts global batches, so that the figure does not depend on the number of processes.
        sequences = stage.recipe.metrics.validation_batches * training.global_batch_size
        job_config.validation.steps = max(1, sequences // (training.local_batch_size * self.ranks))

    def should_validate(self, step: int) -> bool:
        every = self.stage.recipe.metrics.validation_every
        return step == self.stage.end or bool(every and step % every == 0)

    def validate(self, model_parts, step: int) -> None:
        self.batch, self.step = 0, step
        self.validation_dataloader = _together(iter(self.loader), self.meet)
        self.total.zero_()
        self.effects.begin()
        with self.metrics_processor.left_out():
            try:
                super().validate(model_parts, step)
                self.effects.check(f"the validation of step {step}", self.job_config.validation.steps, gradients=False)
                if self.metrics_processor.validated != step:
                    raise PatchError(f"the validation of step {step} wrote no loss")
                self.done = step
            except _Abandoned:
                model_parts[0].train()
            finally:
                # Without a backward pass FSDP keeps some weights whole, and they could not be saved.
                for module in model_parts[0].modules():
                    if isinstance(module, FSDPModule):
                        module.reshard()

    def post_dataloading_process(self, input_dict, labels, model_parts):
        if self.anywhere(stop_requested()):
            raise _Abandoned
        local = labels.shape[0]
        sample = (self.batch * self.ranks + self.rank) * local
        self.batch += 1
        step = max(self.step, 1)
        context = self.budgets.within(self.stage.context(step, 0, sample, labels.device), step)
        context = _packed(context, input_dict, labels.device, self.stage.recipe)
        context = self.effects.send(self.sharers.within(context, labels.shape[1]))
        tokens, labels = self.sharers.own(input_dict["input"]), self.sharers.own(labels)
        self.total[1] += (labels != IGNORED).sum()
        # torchtitan would ask the model for masks.
        return tokens, labels, {"labels": labels, "context": context}, {}

    def _loss(self, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = self.loss(output, labels)
        self.total[0] += loss
        return loss

    def _mean(self) -> float:
        """The loss of all labels that count. The mean over batches, which torchtitan takes, would depend on how many
        labels count in each, and so on the number of processes; and of shared sequences it counts one part of each."""
        if (mesh := self.parallel_dims.get_optional_mesh("loss")) is not None:
            torch.distributed.all_reduce(self.total, group=mesh.get_group())
        return float(self.total[0] / self.total[1])


def _amp(recipe: Recipe, parallel_dims, autocast: contextlib.AbstractContextManager[Any]):
    """Autocast where torchtitan's DDP needs it; FSDP casts by itself, and for one process it is used, too."""
    ddp = parallel_dims.dp_replicate_enabled and not parallel_dims.fsdp_enabled
    return autocast if ddp and recipe.training.dtype != "float32" else contextlib.nullcontext()


class Trainer(titan_train.Trainer):
    """torchtitan's trainer for one stage of a run."""

    # torchtitan's, within which forward passes run.
    maybe_enable_amp: contextlib.AbstractContextManager[Any]

    def __init__(self, stage: Stage):
        recipe = stage.recipe
        self.stage = stage
        self.effects = Effects(DEVICE_TYPE)
        # Steps at which torchtitan last asked whether to go on, and that have been checked; whether batches are made.
        self.asked: int | None = None
        self.checked: int | None = None
        self.begun = False
        self.micro_batch = 0
        # Of the batches of a step on this process.
        self.counted_labels = 0
        # The step of the checkpoint that is to be loaded.
        self.loads = 0
        # In the data, after the last finished step.
        self.place: dict[str, int] | None = None
        self._register(stage, self.effects)
        titan_train.CheckpointManager = Checkpointer
        super().__init__(build_job(recipe, stage.run.path, steps=stage.end))
        self.maybe_enable_amp = _amp(recipe, self.parallel_dims, self.maybe_enable_amp)
        self.effects.autocast = not isinstance(self.maybe_enable_amp, contextlib.nullcontext)
        # Torch gives up after 8 times, which suffice for a stage without further phases.
        torch._dynamo.config.recompile_limit += stage.compilations
        mesh = self.parallel_dims.get_optional_mesh("batch")
        self.ranks: int = 1 if mesh is None else mesh.size()
        self.rank: int = 0 if mesh is None else mesh.get_local_rank()
        self.group = None if mesh is None else mesh.get_group()
        self.sharers = _Sharers.of(self.parallel_dims)
        # The guard's group is of all processes that have losses of their own.
        mesh = self.parallel_dims.get_optional_mesh("loss")
        self._check_parts()
        self.effects.watch(self.model_parts[0])
        # bfloat16 reaches as far as float32, and needs none.
        self.loss_scale = LossScale(self.device) if recipe.training.dtype == "float16" else None
        if self.loss_scale is not None:
            self.checkpointer.states[LOSS_SCALE] = self.metrics_processor.loss_scale = self.loss_scale
        self.budgets = Budgets(
            recipe.lighthouse.budget, stage.phases, (recipe.model.layers, recipe.model.kv_heads), self.device
        )
        if self.budgets.on:
            self.budgets.watch(self.model_parts[0])
            self.checkpointer.states[BUDGET] = self.budgets
        # Base of RoPE's frequencies; None for the model's.
        self.theta: float | None = None
        self.guard = Guard(
            recipe.training.nonfinite,
            recipe.training.nonfinite_limit,
            recipe.training.global_batch_size,
            list(self.optimizers),
            self.device,
            None if mesh is None else mesh.get_group(),
            self.loss_scale,
        )
        titan_train.dist_utils = NotingUtils(
            dist_utils,
            lambda norm: self.guard.judge(self.step, norm),
            len(list(self.model_parts[0].parameters())),
            recipe.optimizer.clip_norm,
            None if self.loss_scale is None else self.loss_scale.unscale,
        )
        self.checkpointer.before_save = self._check_before_save
        self.checkpointer.during_save = self.metrics_processor.left_out
        self.checkpointer.also = recipe.checkpoint.also
        if recipe.data.validation:
            self.validator.anywhere, self.validator.meet = self.anywhere, self._meet
            self.validator.budgets = self.budgets

    def _check_parts(self) -> None:
        """Raise PatchError unless torchtitan has built the trainer from our parts."""
        parts = {
            "the checkpointer": (self.checkpointer, Checkpointer),
            "the metrics": (self.metrics_processor, Metrics),
            "the learning-rate schedule": (self.lr_schedulers, _Schedulers),
            "the model": (self.model_parts[0], Decoder),
        }
        if self.stage.recipe.data.validation:
            parts["the validator"] = self.validator, Validator
        for name, (part, kind) in parts.items():
            if not isinstance(part, kind):
                raise PatchError(f"{name} is torchtitan's {type(part).__name__}, and not ours")
        if self.loss_fn != self.effects.loss:
            raise PatchError("the loss function is not ours")

    def _check_before_save(self) -> None:
        """Nothing is saved of a step that was not checked, or whose numbers are bad."""
        if self.step not in (self.loads, self.checked):
            raise PatchError(f"step {self.step} is to be saved, but step {self.checked} is the last that was checked")
        self.guard.look(lag=0)

    def init_distributed(self):
        with meeting():
            dimensions = super().init_distributed()
        assert torch.distributed.get_world_size() == int(os.environ["WORLD_SIZE"])
        return dimensions

    @staticmethod
    def _register(stage: Stage, effects: Effects) -> None:
        recipe = stage.recipe
        training = recipe.training
        args = Args.of(recipe.model, training.seq_len, seed=training.seed, loss_chunk=training.loss_chunk)
        # Not by register_train_spec, which refuses a name that has one: a process may train one stage after another.
        train_specs._extra_train_specs[MODEL] = train_specs.TrainSpec(
            model_cls=functools.partial(_build_model, stage),
            model_args={MODEL: args},
            parallelize_fn=functools.partial(parallelize, cfgs=[phase.attention for phase in stage.pooled]),
            pipelining_fn=None,
            build_optimizers_fn=build_optimizers,
            build_lr_schedulers_fn=functools.partial(_build_schedulers, stage),
            build_dataloader_fn=functools.partial(_build_loader, stage),
            build_tokenizer_fn=lambda job_config: build_tokenizer(recipe.data.tokenizer),
            build_loss_fn=lambda job_config, **unused: effects.loss,
            build_validator_fn=functools.partial(Validator, stage, effects),
            build_metrics_processor_fn=functools.partial(Metrics, stage),
        )

    def batch_generator(self, data_iterable):
        # torchtitan asks for the batches once, between loading the checkpoint and the first step.
        if self.step != self.loads:
            raise PatchError(
                f"training goes on from step {self.step}, and not from the checkpoint of step {self.loads}"
            )
        self.lr_schedulers.take_rates()
        self.begun = True
        if self.step == 0 and 0 in self.stage.recipe.checkpoint.also and not self._is_published():
            # torch makes the optimizer's state, for a checkpoint, by an update at rate 0, and counts it.
            self.optimizers.state_dict()
            for optimizer in self.optimizers:
                for state in optimizer.state.values():
                    state["step"].zero_()
            self.checkpointer.save(0, last_step=True)
        if self.stage.name == "lighthouse" and self.stage.recipe.metrics.measure_dense:
            self._measure_dense()
        validated = self.metrics_processor.begin(self.step, self.dataloader.fingerprint)
        # A validation that the end of the process cut off, after the checkpoint of its step.
        due = self.stage.start < self.step and self.stage.recipe.data.validation and not self.anywhere(validated)
        if due and self.validator.should_validate(self.step):
            self._turn()
            self.validator.validate(self.model_parts, self.step)
        batches = _together(super().batch_generator(data_iterable), self._meet, self.gradient_accumulation_steps)
        return self._counting(batches)

    def _counting(self, batches):
        for inputs, labels in batches:
            if self.stage.recipe.data.packing == "documents":
                self.counted_labels += int((labels != IGNORED).sum())
            yield inputs, labels

    def _labels_of_step(self) -> torch.Tensor:
        """How many labels of the global batch count, [] on the device, counted without torchtitan."""
        counted = torch.tensor(float(self.counted_labels), device=self.device)
        if self.group is not None:
            torch.distributed.all_reduce(counted, group=self.group)
        return counted

    def _measure_dense(self) -> None:
        """Note the time of a dense step in the ledger, unless it is there."""
        stage = self.stage
        if self.anywhere("measured_dense" in stage.run.ledger["stages"][-1]):
            return
        training = stage.recipe.training
        shape = training.local_batch_size, training.seq_len // self.sharers.count
        context = self.sharers.within(self._first_documents(), training.seq_len)
        try:
            with self.maybe_enable_amp:
                seconds = dense_seconds(self.model_parts[0], shape, context)
        except torch.OutOfMemoryError:
            # Of several processes, the others would wait for this one.
            if torch.distributed.get_world_size() > 1:
                raise
            logger.warning("a step with every layer dense does not fit the accelerator's memory, and is not measured")
            return
        finally:
            self.optimizers.zero_grad()
        if torch.distributed.get_rank() == 0:
            seconds *= self.gradient_accumulation_steps
            stage.run.note(measured_dense={"seconds": seconds, "conditions": self.metrics_processor.conditions()})
            logger.info("a step with every layer dense takes %.3g s, without its update", seconds)

    def _first_documents(self) -> AttentionContext:
        """Documents and positions of the run's first batch, by a loader of its own: the place in the data stays."""
        if self.stage.recipe.data.packing == "concat":
            return AttentionContext()
        # Without prefetching no thread is left behind.
        inputs, _ = next(iter(_build_loader(self.stage, self.ranks, self.rank, prefetch=0)))
        return _packed(AttentionContext(), inputs, self.device, self.stage.recipe)

    def train_step(self, data_iterator) -> None:
        note_step(self.step)
        if not self.begun or self.asked != self.step - 1:
            raise PatchError(f"torchtitan began step {self.step} without our batches, or without asking whether to")
        self.lr_schedulers.check(self.step)
        training, micro_batches = self.stage.recipe.training, self.gradient_accumulation_steps
        # With documents kept apart some labels are ignored; the others are counted once the batches are there.
        some = self.stage.recipe.data.packing == "documents"
        self.effects.begin(None if some else training.global_batch_size * training.seq_len / self.divided)
        self.micro_batch = self.counted_labels = 0
        self.budgets.begin(self.step)
        self._turn()
        super().train_step(data_iterator)
        self.effects.check(f"step {self.step}", micro_batches, gradients=True)
        self.guard.check(self.step, micro_batches)
        self.checked = self.step
        self.place = self.dataloader.state_dict()
        if row := self.budgets.end(self.step):
            self.metrics_processor.log_budget(row, self.step)
        if not is_training():
            # Together: until then a signal ends a process at once.
            self.anywhere(False)
            training_begins()
            # torchtitan does it after the first step of a run, and not of each launch.
            if self.step > 1:
                seconds = self.job_config.comm.train_timeout_seconds
                titan_train.dist_utils.set_pg_timeouts(
                    timeout=timedelta(seconds=seconds), parallel_dims=self.parallel_dims
                )
        self.guard.look()

    def _turn(self) -> None:
        """Rotate positions as the phase of this step does."""
        phase = self.stage.phase(self.step)
        theta = None if phase is None else phase.rope_theta
        if theta != self.theta:
            self.theta = theta
            for part in self.model_parts:
                part.turn_by(theta)

    def _context(self, sample: int) -> AttentionContext:
        """Of a micro-batch of this step."""
        return self.budgets.within(self.stage.context(self.step, self.step, sample, self.device), self.step)

    def post_dataloading_process(self, input_dict, labels):
        sample = (self.micro_batch * self.ranks + self.rank) * labels.shape[0]
        self.micro_batch += 1
        context = self._context(sample)
        if (documents := input_dict.get("documents")) is not None:
            self.metrics_processor.note_documents(documents.starts)
        context = _packed(context, input_dict, self.device, self.stage.recipe)
        context = self.effects.send(self.sharers.within(context, labels.shape[1]))
        tokens, labels = self.sharers.own(input_dict["input"]), self.sharers.own(labels)
        # The model makes its loss itself. torchtitan would share sequences in its own way.
        return tokens, labels, {"labels": labels, "context": context}, {}

    @property
    def averaged(self) -> int:
        """What the gradients of the ranks are divided by when they are added. The loss is a sum over all ranks, as FSDP
        adds gradients. DDP, which torchtitan takes for replication without sharding, averages them."""
        return 1 if self.parallel_dims.fsdp_enabled else self.ranks

    @property
    def divided(self) -> int | torch.Tensor:
        """What the backward pass's loss has to be divided by to be this process's part of the loss: `averaged`, times
        the loss scale of float16."""
        return self.averaged if self.loss_scale is None else self.averaged * self.loss_scale.factor

    def forward_backward_step(self, *, input_dict, labels, global_valid_tokens) -> torch.Tensor:
        if self.micro_batch == 0 and self.stage.recipe.data.packing == "documents":
            self.effects.scale(self._labels_of_step() / self.divided)
        loss = super().forward_backward_step(
            input_dict=input_dict, labels=labels, global_valid_tokens=global_valid_tokens / self.divided
        )
        self.guard.see(loss, self.effects.misscaled)
        return loss / self.divided

    def should_continue_training(self) -> bool:
        self.asked = self.step
        if self.anywhere(stop_requested()):
            self._save_unless_saved()
            raise Interrupted
        return super().should_continue_training()

    def _save_unless_saved(self) -> None:
        self.checkpointer._async_wait()
        if not self._is_published():
            self.checkpointer.save(self.step, last_step=True)

    def _is_published(self) -> bool:
        """Whether there is a checkpoint of this step, which only the first process knows."""
        return self.anywhere(torch.distributed.get_rank() == 0 and self.step in self.stage.run.checkpoint_steps())

    def _meet(self, fault: DataError | None) -> None:
        """Where a process cannot read its data, end all of them.

        Raises:
            DataError: the same on every process.
        """
        if not self.anywhere(fault is not None):
            return
        faults = [fault]
        if (count := torch.distributed.get_world_size()) > 1:
            faults = [None] * count
            torch.distributed.all_gather_object(faults, fault, group=self.checkpointer.group)
        fault = next(one for one in faults if one is not None)
        if fault.file is not None:
            fault.hint = "restore this file, or mend it there, and change no other: then the run can go on"
            if torch.distributed.get_rank() == 0:
                name, size = fault.file
                # Before a step of this launch, the newest checkpoint is of the listing that earlier ones had.
                earlier = self.stage.unread if self.checked is None else {}
                self.stage.run.note(unread={name: size} | earlier)
        raise fault

    def save_checked(self) -> None:
        """Save the last step that this job has finished, if there is one: the step in progress has changed nothing."""
        if self.checked is not None and self.place is not None:
            self.step = self.checked
            self.dataloader.load_state_dict(self.place)
            self._save_unless_saved()

    def check_end(self, *, saves: bool) -> None:
        """Raise PatchError unless the last step was checked and, where this job `saves`, saved and validated."""
        if self.step == self.loads:
            return
        if self.checked != self.step:
            raise PatchError(
                f"training ended at step {self.step}, but step {self.checked} is the last that was checked"
            )
        if not saves:
            return
        if self.checkpointer.saved != self.step:
            raise PatchError(f"training ended at step {self.step}, but {self.checkpointer.saved} is the last saved one")
        if self.stage.recipe.data.validation and self.step == self.stage.end != self.validator.done:
            raise PatchError(f"training ended at step {self.step} without its validation")

    def note_sources(self) -> None:
        """Keep in the ledger what was taken of each source of text."""
        if self.begun and torch.distributed.get_rank() == 0:
            sources = {name: drawn._asdict() for name, drawn in self.dataloader.drawn().items()}
            try:
                self.stage.run.note(sources_since_start=sources)
            except (OSError, UserError) as error:
                logger.warning("the ledger does not say what was taken of each source: %s", error)

    def anywhere(self, here: bool) -> bool:
        """Whether it is so on any process; the answer is the same on all of them."""
        answer = torch.tensor(here)
        if torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(answer, op=torch.distributed.ReduceOp.MAX, group=self.checkpointer.group)
        return bool(answer)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        training = self.stage.recipe.training
        self.step = state_dict["step"]
        self.ntokens_seen = self.step * training.global_batch_size * training.seq_len // self.ranks


@contextlib.contextmanager
def _full_memory_explained():
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if (fault := memory_fault(error)) is None:
            raise
        text = str(fault)
        if isinstance(error, torch.OutOfMemoryError):
            # Statistics of the allocator follow.
            text += ": " + ". ".join(str(error).splitlines()[0].split(". ")[:3])
        raise TrainingError(
            text,
            hint='training.activation_checkpointing = "selective" keeps less, "attention" less than that and "full" '
            "least; a run that goes on takes it by --set, too",
        ) from error


@_full_memory_explained()
def train(run: Run) -> None:
    """Train the last stage of a run's ledger from its newest checkpoint to the stage's end.

    Called on every process of a job.

    Raises:
        UserError: for data or settings that cannot be used.
        TrainingError: a number is not finite, or the memory is full.
    """
    vml.settle()
    stages = run.ledger["stages"]
    last = stages[-1]
    stage = Stage(run, run.recipe, last["stage"], last["start"], last["end"], recovery=len(stages) > 1)
    trainer = Trainer(stage)
    try:
        step = trainer.checkpointer._find_load_step()
        if step >= 0:
            weights = trainer.checkpointer.states[MODEL_STATE].state_dict()
            shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
            trainer.checkpointer.contents = check_model(run.checkpoint_dir(step), shapes, run.recipe_path)
            trainer.loads = step
        elif stage.recipe.model.origin and trainer.model_parts[0].initial is None:
            raise PatchError("the weights that the run begins with were not read")
        elif stage.recipe.model.origin and torch.distributed.get_rank() == 0:
            # On the machine whose files the ledger is about.
            check_unchanged(run.ledger.get("weights", {}))
        if folder := os.environ.get(TRACE_FOLDER):
            from lighthouse_core.titan.tracing import trace_last_step

            trace_last_step(trainer, Path(folder))
        trainer.train()
        trainer.check_end(saves=not folder)
    except TrainingError:
        # All processes are here, and one of them may have a checkpoint to publish yet.
        trainer.checkpointer._async_wait()
        raise
    except DataError:
        # Once training has begun, all processes are here.
        trainer.save_checked()
        raise
    finally:
        trainer.note_sources()
        trainer.close()
        torch.distributed.destroy_process_group()
