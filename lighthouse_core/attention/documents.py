"""Boundaries of documents: of the tokens of a batch, of the chunks that they are cut into, of the entries of a pyramid.

B batch, N tokens, Hkv key/value heads, S entries.
"""

from itertools import pairwise

import torch
from torch import Tensor

from lighthouse_core.attention.context import Documents
from lighthouse_core.attention.rotary import last_tokens
from lighthouse_kernels.geometry import Geometry

# Blocks along the second and third side of a grid, in CUDA.
_MOST = 65535


def check_documents(documents: Documents, batch: int, tokens: int, alignment: int = 1, why: str = "") -> None:
    """Raise ValueError unless the documents are those of a batch. On a GPU the boundaries themselves are not looked at,
    for the host would wait for them.

    Args:
        documents: of B sequences of N tokens.
        batch, tokens: B and N.
        alignment: tokens; each document begins at a multiple of it within its sequence.
        why: what asks for the alignment, as it ends the message.
    """
    starts, longest = documents
    if starts.dtype != torch.int32 or starts.dim() != 1 or len(starts) < 2:
        raise ValueError(f"documents must have int32 starts [documents + 1]; got {starts.dtype} {tuple(starts.shape)}")
    if starts.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bounds = starts.tolist()
    if bounds[0] != 0 or bounds[-1] != batch * tokens or bounds != sorted(bounds):
        raise ValueError(f"the starts of documents must ascend from 0 to B N = {batch * tokens}")
    if missing := set(range(0, batch * tokens, tokens)) - set(bounds):
        raise ValueError(f"a sequence begins at token {min(missing)}, and no document")
    if longest < (most := max(end - start for start, end in pairwise(bounds))):
        raise ValueError(f"a document has {most} tokens, and `longest` is {longest}")
    for start in bounds[:-1]:
        if start % tokens % alignment:
            raise ValueError(
                f"a document begins at token {start % tokens} of a sequence, which is no multiple of the "
                f"{alignment} tokens {why}"
            )


def check_count(name: str, documents: Documents) -> None:
    """Raise ValueError if there are more documents than a grid of blocks has along its second side.

    Args:
        name: of the kernel, for the message.
        documents: of one call of it.
    """
    if (count := len(documents.starts) - 1) > _MOST:
        raise ValueError(f"the dense backend {name!r} takes at most {_MOST} documents a call, not {count}")


def cut(documents: Documents | None, batch: int, tokens: int, window: int, device: torch.device) -> Documents:
    """The documents of a batch, each cut wherever a multiple of `window` tokens of its sequence begins.

    Args:
        documents: of B sequences of N tokens; None for a document a sequence.
        batch, tokens: B and N.
        window: tokens.
        device: of the batch.
    """
    window = min(window, tokens)
    chunks = torch.arange(-(-tokens // window), dtype=torch.int32, device=device) * window
    starts = (torch.arange(batch, dtype=torch.int32, device=device)[:, None] * tokens + chunks).flatten()
    if documents is None:
        end = starts.new_full((1,), batch * tokens)
        return Documents(torch.cat((starts, end)), window)
    # A boundary of both is there twice: a document without a token.
    return Documents(torch.cat((starts, documents.starts)).sort().values, min(window, documents.longest))


def of_entries(documents: Documents, indices: Tensor, g: Geometry) -> Documents:
    """The documents of gathered rows, as the tokens of Hkv sequences: the B S entries of each head, one sequence behind
    another.

    Args:
        documents: of B sequences of N tokens.
        indices: [B, Hkv, S] flat pyramid indices in causal order.
        g: the pyramid.
    """
    return of_last_tokens(documents, last_tokens(indices.transpose(0, 1), g), g)


def of_last_tokens(documents: Documents, last: Tensor, g: Geometry) -> Documents:
    """`of_entries` of the last token of each entry's window in the whole sequence, integers [Hkv, B, S]; `g` is the
    pyramid or one of its shards."""
    heads, batch, entries = last.shape
    # A window that ends in padding belongs to the last document.
    last = last.clamp(max=g.sequence - 1)
    sequences = torch.arange(batch, device=last.device)[:, None] * g.sequence
    # In its last shape before it is made: Inductor of torch 2.11 searches no sequence that is a view of another tensor.
    numbers = _numbers(documents, (last + sequences).flatten(1))
    wanted = torch.arange(len(documents.starts) - 1, device=last.device).expand(heads, -1).contiguous()
    starts = torch.searchsorted(numbers, wanted, out_int32=True)
    starts += torch.arange(heads, dtype=torch.int32, device=last.device)[:, None] * (batch * entries)
    end = starts.new_full((1,), heads * batch * entries)
    # A window is kept at most once, and all levels together have fewer than twice as many windows as tokens.
    most = 2 * (documents.longest + g.padded - g.tokens)
    return Documents(torch.cat((starts.flatten(), end)), min(entries, most))


def of_windows(documents: Documents, batch: int, g: Geometry) -> Tensor:
    """For each window of the coarsest level the first token of its document, int32 [B, N'/c_(L-1)]; tokens of a shard
    are counted from its own first one.

    Args:
        documents: of B sequences of N tokens.
        batch: B.
        g: the pyramid.
    """
    coarsest = g.levels - 1
    first = torch.arange(g.windows(coarsest), device=documents.starts.device) * g.window(coarsest)
    sequence = torch.arange(batch, dtype=torch.int32, device=first.device)[:, None] * g.sequence + g.first
    return documents.starts[_numbers(documents, first.clamp(max=g.tokens - 1) + sequence)] - sequence


def of_tiles(documents: Documents, batch: int, tokens: int, tile: int) -> Tensor:
    """For each tile the first token of its document within the sequence, int32 [B, ceil(N / tile)].

    Args:
        documents: of B sequences of N tokens.
        batch, tokens: B and N.
        tile: tokens, of which every document takes a whole multiple.
    """
    first = torch.arange(-(-tokens // tile), device=documents.starts.device) * tile
    sequence = torch.arange(batch, dtype=torch.int32, device=first.device)[:, None] * tokens
    return documents.starts[_numbers(documents, first + sequence)] - sequence


def of_shard(documents: Documents, batch: int, first: int, tokens: int, whole: int) -> Documents:
    """The documents of a part of each sequence. Those that are not in it are there without a token.

    Args:
        documents: of B sequences of N tokens.
        batch, whole: B and N.
        first, tokens: the part's first token within a sequence, and how many it has.
    """
    sequence, token = documents.starts // whole, documents.starts % whole
    starts = sequence * tokens + (token - first).clamp(0, tokens)
    return Documents(starts.int(), min(documents.longest, tokens))


def _numbers(documents: Documents, tokens: Tensor) -> Tensor:
    """The document of each token, int64 of the shape of `tokens`, which are numbered through the batch."""
    return torch.searchsorted(documents.starts, tokens.to(torch.int32).contiguous(), right=True) - 1
