"""What the KV heads of a decoder's layer attend to, measured from the layer's input."""

import torch
from torch import Tensor

from lighthouse_core.attention.beyond import measured_rows, shares_beyond
from lighthouse_core.attention.context import AttentionContext
from lighthouse_core.attention.documents import of_tiles
from lighthouse_core.models.decoder import Block


@torch.no_grad()
def shares_of_block(
    block: Block, x: Tensor, turns: Tensor, context: AttentionContext, *, window: int, queries: int
) -> Tensor:
    """`shares_beyond` of a layer, [Hkv] float32 at least, in the first sequence of a batch.

    Args:
        block: of the layer.
        x, turns, context: what the layer is called with; no other process shares the sequences.
        window: tokens.
        queries: rows of the softmax that are measured.
    """
    assert context.group is None
    tokens, starts = x.shape[1], None
    rows = torch.tensor(measured_rows(tokens, queries), device=x.device)
    turns = turns if turns.dim() == 3 else turns[:1]
    q, k = block.attention.queries_and_keys(block.attention_norm(x[:1]), turns, context, rows)
    if context.documents is not None:
        starts = of_tiles(context.documents, 1, tokens, 1)[0, rows]
    return shares_beyond(q[0], k[0], rows, window, starts)
