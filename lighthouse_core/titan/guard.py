"""Bad numbers: whether a step's update is made is decided on the device, before the update, without waiting for it."""

import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lighthouse_core.errors import PatchError, TrainingError
from lighthouse_core.titan.runtime import HAS_ACCELERATOR
from lighthouse_core.titan.scaling import LossScale

logger = logging.getLogger(__name__)


class Guard:
    """Leaves out the update of every step whose loss or gradient is not finite.

    The verdict is what fused optimizers know from mixed-precision training as `found_inf`: where it is 1, weights,
    moments and the optimizer's step count keep their bits. The host reads of it one step later, when it is long there.

    No update is made without a verdict: a hook before the optimizer's step raises PatchError. A hook after the step
    compares the optimizer's step count and one weight with the verdict, on the device. The host reads the result with
    the verdict, so a torch whose optimizer ignores `found_inf` ends the run at the next step, and before any save.

    With a loss scale, a gradient that overflowed is no fault, whatever the policy: the update is left out, the scale
    halves, and the step neither counts as one of those in a row nor ends their row. A loss that is not finite stays a
    fault, for the forward pass is not scaled; so does a gradient that overflows at scale 1.

    Args:
        policy: "skip" leaves out such updates; "halt" leaves out all from the first one on.
        limit: under "skip", updates in a row after which training ends.
        sequences: of a step, for the message.
        optimizers: torch optimizers with `fused=True`.
        device: of the parameters.
        group: of all processes with data of their own, or None for one process.
        scale: of the loss, in float16 training; updated with each verdict.

    Raises:
        PatchError: an optimizer is not fused; only fused ones read `found_inf`.
    """

    def __init__(
        self,
        policy: str,
        limit: int,
        sequences: int,
        optimizers,
        device: torch.device,
        group=None,
        scale: LossScale | None = None,
    ):
        self.limit = 1 if policy == "halt" else limit
        self.sequences = sequences
        self.group = group
        self.scale = scale
        self.loss_bad = torch.zeros((), device=device)
        # Left out in a row; once that reaches the limit, nothing is updated any more.
        self.in_row = torch.zeros((), device=device)
        self.verdict = torch.zeros((), device=device)
        # 1 where an optimizer did not do what the verdict says, and where a loss had another scale; read with `in_row`.
        self.disobeyed = torch.zeros((), device=device)
        self.misscaled = torch.zeros((), device=device)
        # 1 where the update that was judged last is left out for an overflow that the loss scale explains.
        self.overflowed = torch.zeros((), device=device)
        self.optimizers = list(optimizers)
        # `waiting` has the optimizers that have yet to make the update that was judged last. `before` has what each
        # optimizer had before that update.
        self.waiting: list[torch.optim.Optimizer] = []
        self.before: dict[torch.optim.Optimizer, tuple[Tensor, Tensor | None]] = {}
        # Losses seen since the last verdict; the step of the last verdict and the losses that it rests on.
        self.seen = 0
        self.judged: tuple[int, int] | None = None
        for optimizer in self.optimizers:
            if not all(group.get("fused") for group in optimizer.param_groups):
                raise PatchError("the optimizer is not fused, and would make updates of bad numbers")
            optimizer.found_inf = self.verdict
            optimizer.register_step_pre_hook(self._before_update)
            optimizer.register_step_post_hook(self._after_update)
        # (step, [in_row, disobeyed, misscaled, overflowed] on the host, its event) of the steps that it has yet to look
        # at.
        self.pending: list[tuple[int, Tensor, Any]] = []

    def see(self, loss: Tensor, misscaled: Tensor | None = None) -> None:
        """A micro-batch's loss; `misscaled` is true where its gradient had another scale than it should."""
        self.seen += 1
        self.loss_bad += (~loss.detach().isfinite()).to(self.loss_bad)
        if misscaled is not None:
            self.misscaled += misscaled.to(self.misscaled)

    def judge(self, step: int, grad_norm: Tensor) -> None:
        """Decide on the update of a step; called between its backward pass and its update.

        Args:
            step: number of the step.
            grad_norm: of the whole gradient, unscaled, the same on all processes.

        Raises:
            PatchError: the update that was judged before has not been made.
        """
        if self.waiting:
            raise PatchError(f"step {step} was judged twice, or an optimizer left out the update before it")
        self.waiting, self.judged, self.seen = list(self.optimizers), (step, self.seen), 0
        found = torch.stack((self.loss_bad > 0, ~grad_norm.isfinite())).to(self.verdict)
        if self.group is not None:
            torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX, group=self.group)
        bad, ended = found.amax(), (self.in_row >= self.limit).to(found)
        if self.scale is not None:
            self.overflowed.copy_(bad * (1 - found[0]) * (1 - ended) * self.scale.explains())
        in_row = torch.maximum((self.in_row + 1) * bad, self.in_row * ended)
        self.in_row.copy_(torch.where(self.overflowed > 0, self.in_row, in_row))
        self.verdict.copy_(torch.maximum(bad, ended))
        self.loss_bad.zero_()
        if self.scale is not None:
            self.scale.update(self.verdict, self.overflowed)

    def _before_update(self, optimizer: torch.optim.Optimizer, *unused: Any) -> None:
        if optimizer not in self.waiting:
            # torch makes an optimizer's state for a checkpoint by an update at rate 0.
            if all(group["lr"] == 0 for group in optimizer.param_groups):
                return
            raise PatchError("an update was about to be made that nobody has judged: the gradient norm did not come by")
        if getattr(optimizer, "found_inf", None) is not self.verdict:
            raise PatchError("something took the verdict on bad numbers from the optimizer")
        self.before[optimizer] = _traces(optimizer)

    def _after_update(self, optimizer: torch.optim.Optimizer, *unused: Any) -> None:
        if optimizer not in self.before:
            return
        (count, weight), (later, changed) = self.before.pop(optimizer), _traces(optimizer)
        disobeyed = later - count != 1 - self.verdict
        if weight is not None and changed is not None:
            same = (changed == weight) | (changed.isnan() & weight.isnan())
            disobeyed = disobeyed | (~same & (self.verdict > 0))
        self.disobeyed += disobeyed.to(self.disobeyed)
        self.waiting.remove(optimizer)
        if not self.waiting:
            assert self.judged is not None
            self._tell(self.judged[0])

    def _tell(self, step: int) -> None:
        """Send the host what was found of a step."""
        found, event = torch.stack((self.in_row, self.disobeyed, self.misscaled, self.overflowed)), None
        if found.is_cuda:
            # To pinned memory: into any other, the host would wait for it.
            found = torch.empty(len(found), pin_memory=True).copy_(found, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.pending.append((step, found, event))

    def check(self, step: int, losses: int) -> None:
        """Raise PatchError unless this step was judged once, from so many losses, and updated. Compares Python's
        numbers alone."""
        if self.judged != (step, losses):
            of = "never" if self.judged is None else f"last at step {self.judged[0]}, from {self.judged[1]} losses"
            raise PatchError(
                f"the guard against bad numbers was to judge step {step} from {losses} losses; it did {of}"
            )
        if self.waiting:
            raise PatchError(f"an optimizer made no update in step {step}, or one that nobody can see")

    def look(self, lag: int = 1) -> None:
        """Read what was decided, up to `lag` steps ago.

        Raises:
            TrainingError: too many updates in a row were left out.
            PatchError: the verdict, or the scale of the loss, took no effect.
        """
        while len(self.pending) > lag:
            step, found, event = self.pending.pop(0)
            if event:
                event.synchronize()
            in_row, disobeyed, misscaled, overflowed = found.tolist()
            if disobeyed:
                raise PatchError(f"the optimizer did not obey the verdict on bad numbers in step {step}")
            if misscaled:
                raise PatchError(
                    f"the gradient of the loss of step {step} is not one over the labels that count in the global "
                    "batch: something else divides the loss, or counts other labels"
                )
            if overflowed:
                logger.info("step %d: the gradient overflowed; its update is left out, and the loss scale halves", step)
                continue
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


def _traces(optimizer: torch.optim.Optimizer) -> tuple[Tensor, Tensor | None]:
    """What an update changes in a parameter, copied on the device: the count of its updates [], one of its numbers [].

    The parameter is the last one of which this process has a part; without any, there is no number.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not parameters:
        raise PatchError("an update was about to be made, but no parameter has a gradient")
    mine = next((p for p in reversed(parameters) if _local(p).numel()), None)
    parameter = parameters[-1] if mine is None else mine
    local = _local(parameter)
    count = optimizer.state.get(parameter, {}).get("step")
    count = torch.zeros((), device=local.device) if count is None else _local(count).clone()
    return count, None if mine is None else local[(0,) * local.dim()].clone()


def _local(x: Tensor) -> Tensor:
    x = x.detach()
    return x.to_local() if isinstance(x, DTensor) else x


class NotingUtils(ModuleType):
    """torchtitan's distributed utilities for its trainer, whose gradient norm no one else is told of.

    Args:
        utils: torchtitan's.
        note: called with the norm of the gradient before it is clipped.
        unscale: called with the parameters before that, to undo the scale of their gradients.
        parameters: how many are to be clipped.
        max_norm: that the gradient is to be clipped to.
    """

    def __init__(
        self,
        utils: ModuleType,
        note: Callable[[Tensor], None],
        parameters: int,
        max_norm: float,
        unscale: Callable[[Any], None] | None = None,
    ):
        super().__init__(utils.__name__)
        self._utils, self._note, self._unscale = utils, note, unscale
        self._expected = parameters, max_norm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._utils, name)

    def clip_grad_norm_(self, parameters: Any, max_norm: float, **options: Any) -> Tensor:
        if (len(parameters), max_norm) != self._expected:
            raise PatchError(
                f"{len(parameters)} parameters were to be clipped to {max_norm}, not {self._expected[0]} to "
                f"{self._expected[1]}"
            )
        if self._unscale is not None:
            self._unscale(parameters)
        norm = self._utils.clip_grad_norm_(parameters, max_norm, **options)
        self._note(norm)
        return norm

    def set_pg_timeouts(self, **settings: Any) -> None:
        # Tightens the time-outs of accelerator process groups after the first step; gloo keeps the initial ones.
        if HAS_ACCELERATOR:
            self._utils.set_pg_timeouts(**settings)
