"""Bad numbers: whether a step's update is made is decided on the device, before the update, without waiting for it."""

import logging
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lighthouse_core.errors import TrainingError

logger = logging.getLogger(__name__)


class Guard:
    """Leaves out the update of every step whose loss or gradient is not finite.

    The verdict is what fused optimizers know from mixed-precision training as `found_inf`: where it is 1, weights,
    moments and the optimizer's step count keep their bits. The host reads of it one step later, when it is long there.

    Args:
        policy: "skip" leaves out such updates; "halt" leaves out all from the first one on.
        limit: under "skip", updates in a row after which training ends.
        sequences: of a step, for the message.
        optimizers: torch optimizers with `fused=True`.
        device: of the parameters.
        group: of all processes with data of their own, or None for one process.
    """

    def __init__(self, policy: str, limit: int, sequences: int, optimizers, device: torch.device, group=None):
        self.limit = 1 if policy == "halt" else limit
        self.sequences = sequences
        self.group = group
        self.loss_bad = torch.zeros((), device=device)
        # Left out in a row; once that reaches the limit, nothing is updated any more.
        self.in_row = torch.zeros((), device=device)
        self.verdict = torch.zeros((), device=device)
        for optimizer in optimizers:
            assert all(group["fused"] for group in optimizer.param_groups)
            optimizer.found_inf = self.verdict
        # (step, in_row on the host, its event) of the steps that the host has not looked at.
        self.pending: list[tuple[int, Tensor, Any]] = []

    def see(self, loss: Tensor) -> None:
        """A micro-batch's loss."""
        self.loss_bad += (~loss.detach().isfinite()).to(self.loss_bad)

    def judge(self, step: int, grad_norm: Tensor) -> None:
        """Decide on the update of a step; called between its backward pass and its update.

        Args:
            step: number of the step.
            grad_norm: of the whole gradient, the same on all processes.
        """
        bad = ((self.loss_bad > 0) | ~grad_norm.isfinite()).to(self.verdict)
        if self.group is not None:
            torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX, group=self.group)
        ended = (self.in_row >= self.limit).to(bad)
        self.in_row.copy_(torch.maximum((self.in_row + 1) * bad, self.in_row * ended))
        self.verdict.copy_(torch.maximum(bad, ended))
        self.loss_bad.zero_()
        event = None
        if self.in_row.is_cuda:
            # To pinned memory: into any other, the host would wait for it.
            host = torch.empty((), pin_memory=True).copy_(self.in_row, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            host = self.in_row.clone()
        self.pending.append((step, host, event))

    def look(self, lag: int = 1) -> None:
        """Read what was decided, up to `lag` steps ago.

        Raises:
            TrainingError: too many updates in a row were left out.
        """
        while len(self.pending) > lag:
            step, in_row, event = self.pending.pop(0)
            if event:
                event.synchronize()
            if not in_row:
                continue
            data = f"sequences {(step - 1) * self.sequences} to {step * self.sequences - 1} of the training data"
            if in_row >= self.limit:
                many = f", {in_row:.0f} in a row" if self.limit > 1 else ""
                raise TrainingError(
                    f"the loss or the gradient of step {step} ({data}) is not finite{many}; it changed no weight",
                    hint="look at the data, or begin again with a lower optimizer.lr; "
                    "--set 'training.nonfinite=\"skip\"' leaves such steps out, also where a run goes on",
                )
            logger.warning("step %d (%s): the loss or the gradient is not finite; its update is left out", step, data)


class NotingUtils(ModuleType):
    """torchtitan's distributed utilities for its trainer, whose gradient norm no one else is told of."""

    def __init__(self, utils: ModuleType, note):
        super().__init__(utils.__name__)
        self._utils, self._note = utils, note

    def __getattr__(self, name: str) -> Any:
        return getattr(self._utils, name)

    def clip_grad_norm_(self, *arguments: Any, **options: Any) -> Tensor:
        norm = self._utils.clip_grad_norm_(*arguments, **options)
        self._note(norm)
        return norm
