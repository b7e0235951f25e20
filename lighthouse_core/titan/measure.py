"""The time of a dense step, measured in a Lighthouse run."""

import time

import torch

from lighthouse_core.attention.context import AttentionContext
from lighthouse_core.models.decoder import Decoder

_PASSES = 4
_WHOLE = AttentionContext()


def dense_seconds(model: Decoder, shape: tuple[int, int], context: AttentionContext = _WHOLE) -> float:
    """Seconds of a forward and backward pass with every layer dense. The model is as before, but for gradients.

    Args:
        model: as it trains: compiled, sharded, with checkpointing.
        shape: of the tokens, [B, N].
        context: documents and positions of a batch, where documents are kept apart.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    # Random ones: numbers that repeat let a GPU run at a higher clock.
    tokens = torch.randint(model.vocab_size, shape, generator=generator).to(device)
    times = []
    dense = context.as_dense()
    try:
        for _ in range(_PASSES):
            start = _now(device)
            (model(tokens, labels=tokens, context=dense) / tokens.numel()).backward()
            times.append(_now(device) - start)
            model.zero_grad()
    finally:
        if device.type == "cuda":
            # A Lighthouse step needs less, and its memory is measured.
            torch.cuda.empty_cache()
    # The first one compiles.
    return min(times[1:])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
