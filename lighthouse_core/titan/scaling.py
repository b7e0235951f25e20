"""The loss scale of float16 training. float16 has no numbers below 6e-8: small gradients would become 0.

The backward pass is that of the loss times a power of two, and the gradients are divided by it before they are clipped.
The scale follows the rule of torch.amp.GradScaler: halved when a gradient overflowed, doubled after so many good steps
in a row. torch's class itself runs the optimizer, and takes `found_inf` from it afterwards; here torchtitan runs the
optimizer, and the guard against bad numbers has `found_inf`. Nothing here waits for the device.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lighthouse_core.errors import CheckpointError

# As torch.amp.GradScaler begins, and how many good steps in a row double the scale.
INITIAL, INTERVAL = 2.0**16, 2000
# At 1 the backward pass is that of the loss itself: an overflow is no longer the scale's. Above the other bound the
# scaled loss itself might overflow.
_LEAST, _MOST = 1.0, 2.0**64


class LossScale:
    """Dynamic; the same on all processes, for it follows from the guard's verdict, which they share.

    Attributes:
        factor: on the loss of the next step, [] float32 on the device.
        good: steps in a row without an overflow since the factor changed last, [].
        skipped: updates left out because of an overflow since the run began, [].

    Args:
        device: of the parameters.
    """

    def __init__(self, device: torch.device):
        self.factor = torch.full((), INITIAL, device=device)
        self.good, self.skipped = torch.zeros((), device=device), torch.zeros((), device=device)

    def explains(self) -> Tensor:
        """Whether a gradient that is not finite may be due to the scale, [] bool: a lower one can be tried."""
        return self.factor > _LEAST

    @torch.no_grad()
    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients, which are float32, in place. Exact: the scale is a power of two."""
        gradients = (p.grad for p in parameters if p.grad is not None)
        local = [x.to_local() if isinstance(x, DTensor) else x for x in gradients]
        if local:
            torch._foreach_mul_(local, 1 / self.factor)

    def update(self, left_out: Tensor, overflowed: Tensor) -> None:
        """Go on to the next step.

        Args:
            left_out: 1 where the update of this step is left out, for whatever reason, else 0; [].
            overflowed: the same, where the scale explains it.
        """
        self.skipped += overflowed
        good = (self.good + 1) * (1 - left_out)
        doubled = (good >= INTERVAL).to(good)
        self.factor.mul_(1 + doubled - overflowed / 2).clamp_(_LEAST, _MOST)
        self.good.copy_(good * (1 - doubled))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds; waits for the device."""
        return {"factor": float(self.factor), "good": int(self.good), "skipped": int(self.skipped)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the scale of a checkpoint.

        Raises:
            CheckpointError: it has a number that no training leaves.
        """
        factor, good, skipped = state["factor"], state["good"], state["skipped"]
        sound = math.isfinite(factor) and _LEAST <= factor <= _MOST and math.frexp(factor)[0] == 0.5
        problem = None
        if not sound:
            problem = f"the checkpoint's loss scale, {factor}, is not a power of two from 1 to 2^64"
        elif not 0 <= good < INTERVAL:
            problem = f"the checkpoint counts {good} good steps since its loss scale changed, not 0 to {INTERVAL - 1}"
        elif skipped < 0:
            problem = f"the checkpoint counts {skipped} updates that its loss scale left out"
        if problem:
            raise CheckpointError(problem, hint="take another checkpoint of the run")
        self.factor.fill_(factor)
        self.good.fill_(good)
        self.skipped.fill_(skipped)
