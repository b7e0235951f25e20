"""Whether torchtitan's trainer calls our parts of a step: counted in Python, and checked after every step.

A hook that a later torchtitan no longer calls would change what is trained without a word. Nothing here waits for the
device: what is compared are counters and the identity of objects. The scale of the loss is compared on the device, and
the guard against bad numbers brings the result to the host.
"""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from lighthouse_core.attention.context import AttentionContext, Documents
from lighthouse_core.errors import PatchError

# Relative, of one float32 division.
_SCALE_ERROR = 1e-4


class Effects:
    """Follows each micro-batch: the context is sent, the model runs with it, its output is the loss, the gradient
    comes back to it.

    Args:
        device_type: of the model.
        autocast: whether the model is to run under autocast.
    """

    def __init__(self, device_type: str, autocast: bool = False):
        self.device_type, self.autocast = device_type, autocast
        # Whether the last gradient of a loss had another scale, on the device.
        self.misscaled: Tensor | None = None
        self._sent: AttentionContext | None = None
        self._output: Tensor | None = None
        self._tokens: float | Tensor | None = None
        # Outside of steps and validations the time of a dense step is measured, which is not followed.
        self._within = False
        self.contexts = self.runs = self.losses = self.gradients = 0

    def watch(self, model: nn.Module) -> None:
        """Follow the runs of this model; called once, after torchtitan has wrapped it."""
        model.register_forward_pre_hook(self._runs, with_kwargs=True)
        model.register_forward_hook(self._ran)

    def begin(self, tokens: float | Tensor | None = None) -> None:
        """Begin a step, or a validation.

        Args:
            tokens: one over the gradient that the loss of each micro-batch is to have; None in a validation.
        """
        self.contexts = self.runs = self.losses = self.gradients = 0
        self._sent, self._output, self._tokens, self._within = None, None, tokens, True

    def scale(self, tokens: Tensor) -> None:
        """The same of this step's micro-batches, [] on the device, where it is known only then."""
        self._tokens = tokens

    def send(self, context: AttentionContext) -> AttentionContext:
        """Note the context that the model's next run is to have."""
        self.contexts += 1
        self._sent = context
        return context

    def _runs(self, model: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not self._within:
            return
        if self._sent is None or not _same(named.get("context"), self._sent):
            raise PatchError("the model was to run without the attention context of its micro-batch")
        if torch.is_autocast_enabled(self.device_type) != self.autocast:
            raise PatchError(f"the model was to run {'without' if self.autocast else 'under'} autocast")
        self._sent = None
        self.runs += 1

    def _ran(self, model: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        if self._within:
            self._output = output

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        """The loss function: the model's output is the loss, summed over the tokens of the micro-batch."""
        if not self._within:
            raise PatchError("torchtitan called the loss function outside of a step of ours")
        if output is not self._output:
            raise PatchError("the loss function was given something else than the model's output")
        self._output = None
        self.losses += 1
        if output.requires_grad:
            output.register_hook(self._gradient)
        return output

    def _gradient(self, grad: Tensor) -> None:
        self.gradients += 1
        if self._tokens is not None:
            self.misscaled = (grad.detach() * self._tokens - 1).abs() > _SCALE_ERROR

    def check(self, where: str, micro_batches: int, *, gradients: bool) -> None:
        """Raise PatchError unless each of so many micro-batches was sent, run, and its output taken for the loss.

        Args:
            where: "step 3", for the message.
            micro_batches: how many there were to be.
            gradients: whether each was to have a gradient, too.
        """
        self._within = False
        counted = {
            "contexts": self.contexts,
            "runs of the model with them": self.runs,
            "calls of the loss function": self.losses,
            "gradients of the loss": self.gradients,
        }
        for what, found in counted.items():
            wanted = micro_batches if gradients or what != "gradients of the loss" else 0
            if found != wanted:
                raise PatchError(f"{where} has {micro_batches} micro-batches, but {found} {what}, not {wanted}")


def _same(received: Any, sent: AttentionContext) -> bool:
    """Whether a context is the one that was sent. FSDP copies it, with the same tensors in it."""
    if received is sent:
        return True
    if type(received) is not type(sent):
        return False
    return all(_equal(getattr(received, field.name), getattr(sent, field.name)) for field in fields(sent))


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Documents) and isinstance(b, Documents):
        return all(map(_equal, a, b))
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b
