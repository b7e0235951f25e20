"""The time of a dense step, measured in a Lighthouse run."""

import time

import torch
from torch import nn

from lighthouse_core.titan.model import attention_layers, use_dense

_PASSES = 4


def dense_seconds(model: nn.Module, shape: tuple[int, int], backend: str) -> float:
    """Seconds of a forward and backward pass with every layer dense. The model is as before, but for gradients.

    Args:
        model: as it trains: compiled, sharded, with checkpointing.
        shape: of the tokens, [B, N].
        backend: dense kernel; see `dense_attention`.
    """
    layers = attention_layers(model)
    before = [layer.inner_attention for layer in layers]
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    # Random ones: numbers that repeat let a GPU run at a higher clock.
    tokens = torch.randint(model.vocab_size, shape, generator=generator).to(device)
    times = []
    use_dense(model, backend)
    try:
        for _ in range(_PASSES):
            start = _now(device)
            (model(tokens, labels=tokens) / tokens.numel()).backward()
            times.append(_now(device) - start)
            model.zero_grad()
    finally:
        for layer, attention in zip(layers, before, strict=True):
            layer.inner_attention = attention
        if device.type == "cuda":
            # A Lighthouse step needs less, and its memory is measured.
            torch.cuda.empty_cache()
    # The first one compiles.
    return min(times[1:])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
