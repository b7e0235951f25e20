"""torch's flex_attention, which leaves out whole blocks of the scores.

B batch, N tokens, H query heads, Hkv key/value heads, G query heads of a KV head, D head dimension.
"""

import functools
from typing import Any, Literal

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from lighthouse_core.attention.dense.kernel import DenseKernel, Tiles
from lighthouse_core.attention.dense.math import members

# Tiles and blocks are whole multiples of this many tokens, which the kernels take at a time.
UNIT = 128


def blocked(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, tiles: Tiles, backend: Literal["TRITON", "FLASH"] = "TRITON"
) -> Tensor:
    """Attention to a window and to chosen blocks, as one call. Differentiable in q, k and v.

    Args:
        q: [B, N, H, D].
        k, v: [B, N, Hkv, D].
        scale: factor on the scores; 1/sqrt(D) for None.
        tiles: which keys are seen.
        backend: torch's name of the kernel: "FLASH" is FlashAttention-4.
    """
    # Not compiled, flex_attention makes the scores of all pairs.
    call = _blocked if torch.compiler.is_compiling() else _compiled()
    return call(q, k, v, scale, tiles, backend)


@functools.cache
def _compiled() -> Any:
    return torch.compile(_blocked, dynamic=False, fullgraph=True)


def _blocked(q: Tensor, k: Tensor, v: Tensor, scale: float | None, tiles: Tiles, backend: Any) -> Tensor:
    batch, kv_heads, window = q.shape[0], k.shape[2], tiles.window

    def near(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < window)

    # A KV head is a sequence of its own, so that its query heads have one mask, and not a copy each. All are made
    # contiguous: Inductor lays out the output like the queries, and gives a dimension of one element a stride of 1.
    # FlashAttention-4 takes such a stride in contiguous tensors alone.
    q = q.unflatten(2, (kv_heads, -1)).movedim(1, 3).flatten(0, 1).contiguous()
    k, v = (x.transpose(1, 2).flatten(0, 1).contiguous()[:, None] for x in (k, v))
    with torch.no_grad():
        size = (tiles.tile, tiles.block_size)
        mask = BlockMask((q.shape[2], q.shape[2]), **lists(tiles, q.shape[2]), BLOCK_SIZE=size, mask_mod=near)
    options: Any = {"BACKEND": backend}
    out = flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=True, kernel_options=options)
    assert isinstance(out, Tensor)
    return out.unflatten(0, (batch, kv_heads)).movedim(3, 1).flatten(2, 3)


def lists(tiles: Tiles, tokens: int) -> dict[str, Any]:
    """The lists of a BlockMask, of which rows are tiles and columns blocks, each of a KV head of a sequence.

    Args:
        tiles: which keys are seen.
        tokens: N.

    Returns:
        By BlockMask's names, of blocks seen in part, and of those seen in full, for each tile how many there are, int32
        [B Hkv, 1, N / tile], and their numbers, [B Hkv, 1, N / tile, width]. And the same of the tiles for each block,
        [B Hkv, 1, N / block_size] and [B Hkv, 1, N / block_size, N / tile].
    """
    names = [f"{full}{of}_{what}" for of in ("kv", "q") for full in ("", "full_") for what in ("num_blocks", "indices")]
    return dict(zip(names, _lists(*tiles, tokens), strict=True))


@custom_op("lighthouse::block_lists", mutates_args=())
def _lists(chosen: Tensor, starts: Tensor | None, window: int, tile: int, size: int, tokens: int) -> list[Tensor]:
    """The window of a tile is a run of blocks. All queries see all keys of those in its middle, as of the chosen ones.

    An operation of its own: Inductor fails on the divisions among its indices.
    """
    batch, kv_heads, rows, wanted = chosen.shape
    count, width, device = tokens // size, _width(tokens, wanted, window, tile, size), chosen.device
    window = min(window, tokens)
    first = torch.arange(rows, dtype=torch.int32, device=device) * tile
    last = first + (tile - 1)
    # Blocks begin to end are those of the window, and whole to part are those in its middle.
    begin = ((first - (window - 1)).clamp(min=0) // size).expand(batch, 1, rows)
    if starts is not None:
        begin = torch.maximum(begin, (starts // size)[:, None])
    end = last // size + 1
    whole = torch.maximum(begin, ((last - (window - 1)).clamp(min=0) + (size - 1)) // size)
    part = torch.maximum(whole, (first + 1) // size)
    before, there = whole - begin, (chosen < count).sum(3, dtype=torch.int32)
    counts = before + (end - part), there + (part - whole)
    begin, end, whole, part, before, there = (x[..., None] for x in (begin, end, whole, part, before, there))
    place = torch.arange(width, dtype=torch.int32, device=device)
    in_part = torch.where(place < before, begin + place, part + place - before)
    in_full = torch.where(place < there, pad(chosen, (0, width - wanted)), whole + place - there)
    block = torch.arange(count, dtype=torch.int32, device=device)
    middle = (block >= whole) & (block < part)
    edges = (block >= begin) & (block < end) & ~middle
    chosen_too = middle | members(chosen, count)
    found = counts[0], in_part, counts[1], in_full, *_transposed(edges), *_transposed(chosen_too)
    return [x.expand(batch, kv_heads, *x.shape[2:]).flatten(0, 1)[:, None].contiguous() for x in found]


@_lists.register_fake
def _(chosen, starts, window, tile, size, tokens):
    heads, rows, count = chosen.shape[0] * chosen.shape[1], chosen.shape[2], tokens // size
    of_rows, of_blocks = (heads, 1, rows), (heads, 1, count)
    width = _width(tokens, chosen.shape[3], window, tile, size)
    shapes = [of_rows, (*of_rows, width)] * 2 + [of_blocks, (*of_blocks, rows)] * 2
    return [chosen.new_empty(shape) for shape in shapes]


def _width(tokens: int, wanted: int, window: int, tile: int, size: int) -> int:
    """Places in the lists of blocks: the kernels want the same number in both."""
    return min(tokens // size, wanted + (window + tile) // size + 2)


def _transposed(member: Tensor) -> tuple[Tensor, Tensor]:
    """For each block how many tiles see it, and their numbers, ascending, before those of the others: a sort of bits,
    by counting.

    Args:
        member: bool [..., tiles, blocks].
    """
    member = member.transpose(-1, -2)
    until = member.cumsum(-1, dtype=torch.int32)
    total = until[..., -1:]
    number = torch.arange(member.shape[-1], dtype=torch.int32, device=member.device)
    place = torch.where(member, until - 1, total + number - until)
    return total[..., 0], torch.empty_like(place).scatter(-1, place.long(), number.expand_as(place))


def absence(device_type: str) -> str | None:
    """Why it is not there for any tensor on such a device; None if it is. Touches no GPU."""
    return None if device_type == "cuda" else f"needs a CUDA device, not {device_type}"


def obstacle(device_type: str, dtype: torch.dtype, dim: int) -> str | None:
    """Why it cannot take such tensors; None if it can."""
    if why_not := absence(device_type):
        return why_not
    if dtype.itemsize > 4:
        return f"takes no {dtype}"
    return f"takes no head dimension of {dim}" if dim < 16 else None


def _blocks(device_type: str, dtype: torch.dtype, dim: int, tile: int, size: int) -> str | None:
    return obstacle(device_type, dtype, dim) or odd_sizes(tile, size)


def odd_sizes(tile: int, size: int) -> str | None:
    """Why tiles and blocks of these sizes cannot be taken; None if they can."""
    return (
        f"takes tiles and blocks of multiples of {UNIT} tokens, not {tile} and {size}" if (tile | size) % UNIT else None
    )


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    tokens = q.shape[1]
    q, k, v = (pad(x, (0, 0, 0, 0, 0, -tokens % UNIT)) for x in (q, k, v))
    none = torch.empty(q.shape[0], k.shape[2], q.shape[1] // UNIT, 0, dtype=torch.int32, device=q.device)
    return blocked(q, k, v, scale, Tiles(none, None, q.shape[1], UNIT, UNIT))[:, :tokens]


# Its backward pass makes the gradients of queries and of keys apart, so it is deterministic.
KERNEL = DenseKernel(
    "flex",
    "flex attention (torch)",
    absence,
    obstacle,
    _forward,
    blocked=blocked,
    blocks=_blocks,
    kept=(torch.ops.higher_order.flex_attention,),
)
