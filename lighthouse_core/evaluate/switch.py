"""What the switch to dense attention will do to a model of stage 1: to its loss, and to each attention call."""

import torch
from torch import Tensor

from lighthouse_core.attention.dense import dense_attention
from lighthouse_core.attention.module import LighthouseAttention
from lighthouse_core.evaluate.subject import Subject


@torch.no_grad()
def attention_errors(subject: Subject, tokens: Tensor) -> dict[int, float]:
    """Relative error of each Lighthouse call against dense attention on the same q, k and v: |call - dense| / |dense|,
    Frobenius norms over all positions.

    Args:
        subject: a model of stage 1.
        tokens: [B, N] int64, whose activations are taken.

    Returns:
        By layer.
    """
    errors: dict[int, float] = {}

    def compare(layer: LighthouseAttention, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        dense = dense_attention(*(x.transpose(1, 2) for x in inputs), backend=layer.cfg.dense_backend).transpose(1, 2)
        errors[layer.layer] = ((out - dense).float().norm() / dense.float().norm()).item()

    assert subject.model is not None
    layers = [module for module in subject.model.modules() if isinstance(module, LighthouseAttention)]
    hooks = [layer.register_forward_hook(compare) for layer in layers]
    try:
        subject.hidden(tokens.to(subject.device))
    finally:
        for hook in hooks:
            hook.remove()
    return errors
