"""What the switch to dense attention will do to a model of stage 1: to its loss, and to each attention call."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lighthouse_core.attention.module import LighthouseAttention
from lighthouse_core.evaluate.subject import Subject, looking
from lighthouse_core.evaluate.text import PackedSequence
from lighthouse_core.models.decoder import lighthouse_layers


@torch.no_grad()
def attention_errors(subject: Subject, tokens: Tensor, packed: PackedSequence | None = None) -> dict[int, float]:
    """Relative error of each Lighthouse call against dense attention on the same q, k and v: |call - dense| / |dense|,
    Frobenius norms over all positions.

    Args:
        subject: a model of stage 1.
        tokens: [B, N] int64, whose activations are taken.
        packed: of documents that are kept apart, by both; B is 1 then.

    Returns:
        By layer.
    """
    errors: dict[int, float] = {}

    def compare(
        number: int, layer: LighthouseAttention, inputs: tuple[Any, ...], given: dict[str, Any], out: Tensor
    ) -> None:
        q, k, v, context = inputs
        dense = layer.forward(q, k, v, context.as_dense(), **given)
        errors[number] = ((out - dense).float().norm() / dense.float().norm()).item()

    assert subject.model is not None
    layers = lighthouse_layers(subject.model)
    hooks = [
        layer.register_forward_hook(partial(compare, number), with_kwargs=True) for number, layer in layers.items()
    ]
    with looking(hooks):
        subject.states(tokens, packed)
    return errors
