"""Metrics of a run: metrics.jsonl, from which the launcher shows progress, TensorBoard and Weights & Biases."""

import contextlib
import json
import logging
import math
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import torch
from torchtitan.components.metrics import BaseLogger, DeviceMemoryMonitor, LoggerContainer, MetricsProcessor
from torchtitan.tools.utils import NoColor, get_peak_flops

from lighthouse_core.errors import UserError
from lighthouse_core.estimate import flops_per_token
from lighthouse_core.files import open_to_append, replacing
from lighthouse_core.reading import read_regular
from lighthouse_core.runs.rows import finite, parse_row
from lighthouse_core.titan.loggers import TensorBoard, WeightsAndBiases
from lighthouse_core.titan.runtime import DEVICE_TYPE, HAS_ACCELERATOR
from lighthouse_core.titan.scaling import LossScale
from lighthouse_core.titan.spikes import Spikes

if TYPE_CHECKING:
    from lighthouse_core.titan.trainer import Stage


logger = logging.getLogger(__name__)


class _Peak(NamedTuple):
    """The two memory figures that torchtitan's trainer reads."""

    max_reserved_gib: float
    max_reserved_pct: float


class _HostMemoryMonitor:
    """Peak resident memory of the process, in place of an accelerator's."""

    device_name = "cpu"

    def get_peak_stats(self) -> _Peak:
        kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return _Peak(kibibytes / 2**20, 0.0)

    def reset_peak_stats(self) -> None:
        pass


def keep_rows(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop from a metrics file the rows after `step`, and lines that are no rows; returns the others.

    A figure that was not finite is NaN in them.
    """
    lines = read_regular(path).splitlines() if path.exists() else []
    rows = {line: row for line in lines if (row := parse_row(line)) is not None and row["step"] <= step}
    with replacing(path) as file:
        file.writelines(line + b"\n" for line in rows)
    return list(rows.values())


class Metrics(MetricsProcessor):
    """Writes one JSON object a logged step to metrics.jsonl, on rank 0.

    Keys of a training row: `step`, `stage` ("lighthouse" or "dense"), `loss` (nats per token), `leaky` (true where the
    selection saw later tokens, so that the loss is no language-model loss), `grad_norm`, `lr`, `tokens` (since the
    start of the run), `steps` that the figures are of, `tokens_per_second` (all ranks), `seconds` (per step),
    `memory_gib` (peak of one rank), `mfu` (model FLOPs by lighthouse_core.estimate as a fraction of the accelerator's
    bf16 peak, which the ledger states; absent on CPU) and `data_seconds` (waiting for data, per step).
    Of a recipe with phases `phase` is the number, from 1, of the step's phase, and `window` the step's window.
    Where documents are kept apart `flops_per_token` and `dense_flops_per_token` count what is attended to.
    In float16 training `loss_scale` is that of the next step, and `skipped_steps` counts the updates since the start of
    the run that were left out because gradients overflowed.
    `spike` is there where the loss is one: its robust z-score among the last logged losses; `first_of_launch`, true, in
    the row of a launch's first step, which compiles.
    A validation row has `step`, `stage`, `leaky`, `val_loss`.
    A row of a measurement by [lighthouse.budget] has `step`, `stage`, `leaky`; `budget_share`, the share of attention
    beyond the window, a mean over the layers and KV heads that are not dense; `budget_heads`, how many of these heads
    choose blocks from then on; and `budget_blocks`, how many blocks the head with most has.
    A figure that is not finite is null.

    TensorBoard and Weights & Biases have the same figures under the same names, so that a curve goes through both
    stages, and with `loss` they have `dense`: 1 where the step attends densely in every layer, else 0.
    """

    def __init__(self, stage: "Stage", job_config, parallel_dims, model_args=None):
        self.stage = stage
        self.job_config = job_config
        self.parallel_dims = parallel_dims
        self.logger = LoggerContainer()
        if stage.recipe.metrics.wandb and torch.distributed.get_rank() == 0:
            # Before the model is made: much can be wrong with an account.
            self.logger.add_logger(WeightsAndBiases(stage.run, stage.recipe))
        self.device_memory_monitor = DeviceMemoryMonitor() if HAS_ACCELERATOR else _HostMemoryMonitor()
        self.gpu_peak_flops = get_peak_flops(self.device_memory_monitor.device_name) if HAS_ACCELERATOR else None
        self.color = NoColor()
        self.ntokens_since_last_log = 0
        self.data_loading_times: list[float] = []
        self.optimizers = self.lr_schedulers = self.model_parts = None
        self.spikes = Spikes()
        self.unwritten = b""
        # Whether something else has the name of the file.
        self.taken = False
        self.file: BinaryIO | None = None
        self.last_step = self.start_step = stage.start
        self.last_time = 0.0
        # Of the last validation row.
        self.validated: int | None = None
        # Tokens of each document of this process since the last row, where documents are kept apart.
        self.lengths: list[int] = []
        # Gives the loss of a validation in place of torchtitan's mean over batches.
        self.validation_loss: Callable[[], float] | None = None
        # Of float16 training.
        self.loss_scale: LossScale | None = None

    def begin(self, step: int, data: int) -> bool:
        """Open metrics.jsonl, without the rows of steps that are about to be repeated, and start the clocks.

        Args:
            step: the last finished step of the checkpoint that training goes on from.
            data: fingerprint of the training text, for the ledger.

        Returns:
            Whether there is a validation row of that step; on processes other than the first, False.
        """
        validated = False
        if torch.distributed.get_rank() == 0:
            path = self.stage.run.path / "metrics.jsonl"
            rows = keep_rows(path, step)
            validated = any(row["step"] == step and "val_loss" in row for row in rows)
            for row in rows:
                if row.get("stage") == self.stage.name and math.isfinite(row.get("loss", math.nan)):
                    self.spikes.score(row["loss"])
            self.file = open_to_append(path)
            if self.stage.recipe.metrics.tensorboard:
                self._add_tensorboard(step)
            self.stage.run.note(conditions=self.conditions(), data=f"{data:016x}")
        self.device_memory_monitor.reset_peak_stats()
        self.last_step = self.start_step = step
        self.last_time = time.perf_counter()
        return validated

    def _add_tensorboard(self, step: int) -> None:
        try:
            self.logger.add_logger(TensorBoard(self.stage.run.path / "tb", step))
        except OSError as error:
            logger.warning("nothing is logged to TensorBoard: %s", error.strerror)

    def conditions(self) -> dict[str, Any]:
        """What the time of a step depends on, beside the model: where it runs, and how."""
        training, context = self.stage.recipe.training, self.stage.recipe.parallel.context
        return {
            "device": self.device_memory_monitor.device_name,
            "devices": self.parallel_dims.world_size,
            # Also of ledgers from before there was one.
            **({"context": context} if context > 1 else {}),
            "peak_flops": self.gpu_peak_flops,
            "cudnn": torch.backends.cudnn.version(),
            "dense_backend": self.stage.recipe.lighthouse.dense_backend,
            "local_batch_size": training.local_batch_size,
            "compile": training.compile,
            "activation_checkpointing": training.activation_checkpointing,
        }

    def note_documents(self, starts: torch.Tensor) -> None:
        """Count the work of a batch whose documents are kept apart: `Documents.starts`, on the CPU."""
        self.lengths += [length for length in starts.diff().tolist() if length]

    @contextlib.contextmanager
    def left_out(self):
        """Leave what is done within out of the time of training steps."""
        if HAS_ACCELERATOR:
            # What it still has to do belongs to them.
            torch.accelerator.synchronize()
        began = time.perf_counter()
        try:
            yield
        finally:
            self.last_time += time.perf_counter() - began

    def _over_ranks(self, *numbers: float) -> list[float]:
        """Means over the processes, whose documents differ. All of them log the same steps."""
        total = torch.tensor(numbers, dtype=torch.float64, device=DEVICE_TYPE)
        torch.distributed.all_reduce(total)
        return (total / torch.distributed.get_world_size()).tolist()

    def should_log(self, step: int) -> bool:
        return super().should_log(step) or step == self.stage.end or step == self.start_step + 1

    def log(self, step: int, global_avg_loss, global_max_loss, grad_norm, extra_metrics=None) -> None:
        training = self.stage.recipe.training
        now = time.perf_counter()
        steps, elapsed = step - self.last_step, now - self.last_time
        tokens_per_step = training.global_batch_size * training.seq_len
        row = {
            "loss": float(global_avg_loss),
            "grad_norm": float(grad_norm),
            "lr": float(extra_metrics["lr"]),
            "tokens": step * tokens_per_step,
            "steps": steps,
            "tokens_per_second": steps * tokens_per_step / elapsed,
            "seconds": elapsed / steps,
            "data_seconds": sum(self.data_loading_times) / steps,
            "memory_gib": self.device_memory_monitor.get_peak_stats().max_reserved_gib,
        }
        of_steps = (self.last_step + 1, step), self.lengths or None
        flops = flops_per_token(self.stage.recipe, self.stage.name, *of_steps)
        if self.lengths:
            flops, dense = self._over_ranks(flops, flops_per_token(self.stage.recipe, "dense", *of_steps))
            row |= {"flops_per_token": flops, "dense_flops_per_token": dense}
        self.lengths.clear()
        if self.gpu_peak_flops:
            per_device = row["tokens_per_second"] / self.parallel_dims.world_size
            row["mfu"] = flops * per_device / self.gpu_peak_flops
        if (phase := self.stage.phase(step)) and self.stage.recipe.lighthouse.phases:
            row |= {"phase": phase.number} | ({} if phase.dense else {"window": phase.window_at(step)})
        if self.loss_scale is not None:
            state = self.loss_scale.state_dict()
            row |= {"loss_scale": state["factor"], "skipped_steps": state["skipped"]}
        if self.last_step == self.start_step:
            row["first_of_launch"] = True
        if spike := self.spikes.score(row["loss"]):
            row["spike"] = spike
            logger.warning(
                "step %d: loss %.4f is a spike, %.1f robust deviations above the last", step, row["loss"], spike
            )
        self._write(step, row)
        self.last_step, self.last_time = step, now
        self.data_loading_times.clear()
        self.device_memory_monitor.reset_peak_stats()

    def log_validation(self, loss: float, step: int, extra_metrics: dict[str, Any] | None = None) -> None:
        self._write(step, {"val_loss": float(loss) if self.validation_loss is None else self.validation_loss()})
        self.validated = step

    def log_budget(self, row: dict[str, float], step: int) -> None:
        """Write what `Budgets` measured in a step."""
        self._write(step, row)

    def _write(self, step: int, row: dict[str, Any]) -> None:
        phase = self.stage.phase(step)
        dense = phase is None or phase.dense
        try:
            # A step may have other rows besides.
            self.logger.log(row | ({"dense": float(dense)} if "loss" in row else {}), step)
        except OSError as error:
            logger.warning("no more is logged to TensorBoard or Weights & Biases: %s", error.strerror)
            self.logger = BaseLogger()
        if self.file:
            leaky = phase is not None and not dense and phase.attention.leaks
            row = {"step": step, "stage": self.stage.name, "leaky": leaky} | row
            self.unwritten += json.dumps(finite(row), allow_nan=False).encode() + b"\n"
            self._write_rows(step)

    def _write_rows(self, step: int) -> None:
        """Write the rows that wait; they wait on while there is no room, or the name of their file is taken."""
        assert self.file is not None
        try:
            if not self._find_again():
                return
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:
            # The next save will end the run if there is still no room.
            logger.warning("step %d waits to be written to metrics.jsonl: %s", step, error.strerror)

    def _find_again(self) -> bool:
        """Go on in a new file where metrics.jsonl was deleted or replaced: rows in the old one would be lost.

        Returns:
            Whether rows can be written; not while something else has the name.

        Raises:
            OSError: of the system.
        """
        assert self.file is not None
        path = self.stage.run.path / "metrics.jsonl"
        try:
            # A link to the file that is open loses no row.
            if os.path.samestat(path.stat(), os.fstat(self.file.fileno())):
                self.taken = False
                return True
        except OSError:
            # It is gone, or a link to nothing.
            pass
        try:
            found = open_to_append(path)
        except FileNotFoundError:
            # The folder is gone: there is no other place.
            return True
        except (UserError, IsADirectoryError):
            if not self.taken:
                logger.warning("%s is a link or no ordinary file: rows wait until the name is free", path)
            self.taken = True
            return False
        self.file.close()
        self.file, self.taken = found, False
        logger.warning("%s was deleted or replaced: later rows go to the file that is there now", path)
        return True

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.logger.close()
        if self.file:
            if self.unwritten:
                self._write_rows(self.last_step)
            if self.unwritten:
                logger.warning(
                    "rows of metrics.jsonl are lost, as they could not be written: %d", self.unwritten.count(b"\n")
                )
            self.file.close()
            self.file = None
