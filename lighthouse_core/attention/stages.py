"""The stages of a pyramid's call, in order. The call runs them; `lighthouse profile` times them.

B batch, N tokens, H query heads, Hkv key/value heads, D head dimension, M windows of all levels, S entries.
"""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lighthouse_core.attention.backends import is_selection, window_scores, with_edge
from lighthouse_core.attention.context import AttentionContext
from lighthouse_core.attention.dense.call import dense_attention
from lighthouse_core.attention.documents import of_last_tokens, of_windows
from lighthouse_core.attention.parts import Part, near, near_entries
from lighthouse_core.attention.rotary import last_tokens, rotate, rotate_entries
from lighthouse_core.attention.selectors import selector_of
from lighthouse_core.attention.selectors.selector import Inputs
from lighthouse_core.attention.settings import Settings
from lighthouse_core.attention.sharing import (
    from_previous,
    of_all_query_heads,
    rows_by_heads,
    with_last_tokens,
)
from lighthouse_kernels.geometry import Geometry


class Stage(NamedTuple):
    """One stage.

    Attributes:
        name: for reports.
        reads: names of the values that it takes; the call begins with "q", "k" and "v".
        writes: name of the value that it makes; the last one is "out".
        run: makes it.
    """

    name: str
    reads: tuple[str, ...]
    writes: str
    run: Callable[..., Any]


def run(stage: Stage, values: dict[str, Any]) -> None:
    """Add to the values what a stage makes of them."""
    values[stage.writes] = stage.run(*(values[name] for name in stage.reads))


def stages(
    q: Tensor,
    kv_heads: int,
    settings: Settings,
    context: AttentionContext,
    g: Geometry,
    ops: Any,
    *,
    scale: float | None = None,
    indices: Tensor | None = None,
    scores: tuple[Tensor, Tensor] | None = None,
    rotary: Tensor | None = None,
) -> list[Stage]:
    """The stages of one call. Checks what is given.

    Args:
        q: [B, N, H, D], of which shape, dtype and device are read.
        kv_heads: Hkv.
        settings, context: of the call.
        g: its pyramid, not `dense`; of this process's shard where the context has a group.
        ops: the pyramid's operations.
        scale: factor on the attention scores; 1/sqrt(D) by default.
        indices: [B, Hkv, S] that fix the selection.
        scores: (s_Q, s_K) that take the place of the selector's; see `Selector.select`.
        rotary: rotates the gathered rows, and the tokens of the window; see lighthouse_core.attention.rotary.

    Raises:
        ValueError: indices or scores of another shape.
    """
    selector = selector_of(settings.scorer)
    expected = [q.shape[0], kv_heads, g.gathered_length]
    if indices is not None and (indices.dtype not in (torch.int32, torch.int64) or list(indices.shape) != expected):
        raise ValueError(
            f"indices must be int32 or int64 [B, Hkv, S] = {expected}; got {indices.dtype} {tuple(indices.shape)}"
        )
    how: dict[str, Any] = {"scale": scale, "backend": settings.dense_backend}
    documents, group = context.documents, context.group
    in_pass = selector.in_pass and indices is None and scores is None

    def pyramid(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return ops.pyramid(q, k, v, g, scored=in_pass)

    def select(q: Tensor, k: Tensor, v: Tensor, pyramid: Any) -> Any:
        if indices is not None:
            return ops.given(indices, g)
        return selected(q, k, v, settings, context, g, ops, scores=scores, norms=pyramid.scores)

    def gather(q: Tensor, k: Tensor, v: Tensor, pyramid: Any, selection: Any) -> tuple[Tensor, Tensor, Tensor]:
        return ops.gather(q, k, v, pyramid, selection, g)

    def turn(gathered: tuple[Tensor, Tensor, Tensor], selection: Any) -> tuple[Tensor, Tensor, Tensor]:
        assert rotary is not None
        q, k = (rotate_entries(x, selection.indices, rotary, g) for x in gathered[:2])
        return q, k, gathered[2]

    def dense(q: Tensor, k: Tensor, v: Tensor, last: Tensor | None) -> tuple[Tensor, ...]:
        """Of all rows of some heads, whose windows end with the tokens `last`, [heads, B, S]."""
        if not settings.window:
            return (dense_attention(q, k, v, **how),)
        if documents is None:
            return near(q, k, v, 0, **how)
        assert last is not None
        return near_entries(q, k, v, of_last_tokens(documents, last, g), **how)

    def attend(gathered: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        found = dense(*gathered, None) if group is None else rows_by_heads(dense, *gathered, group, g.levels - 1)
        return found[0]

    def part(gathered: tuple[Tensor, Tensor, Tensor], selection: Any) -> Any:
        if group is None:
            last = None if documents is None else last_tokens(selection.indices.transpose(0, 1), g)
            out, lse = dense(*gathered, last)
            return Part(out, lse)
        last = None if documents is None else (last_tokens(selection.indices, g) + g.first).int()
        out, lse = rows_by_heads(dense, *gathered, group, g.levels - 1, last)
        return Part(out, lse)

    def whole(selection: Any) -> Any:
        """With the entries of the rows of the shard before."""
        return selection if group is None else with_edge(selection, g, partial(from_previous, group=group))

    def scatter(rows: Tensor, selection: Any) -> Tensor:
        return ops.scatter(rows, whole(selection), g)

    def merge(near: Any, rows: Any, selection: Any) -> Tensor:
        begins = None if documents is None else of_windows(documents, len(rows.out), g)
        return ops.merge(*near, *rows, whole(selection), g, begins)

    def window(q: Tensor, k: Tensor, v: Tensor) -> Any:
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if group is None:
            return near(q, k, v, settings.window, **how, documents=documents)
        # A shape here: with another window it is compiled again.
        before = operator.index(settings.window)

        def over(q: Tensor, k: Tensor, v: Tensor, documents: Any) -> Part:
            return near(q, k, v, before, **how, documents=documents)

        return Part(*with_last_tokens(over, q, k, v, before, context))

    found = [
        Stage("pyramid + score", ("q", "k", "v"), "pyramid", pyramid),
        Stage("select", ("q", "k", "v", "pyramid"), "selection", select),
        Stage("gather", ("q", "k", "v", "pyramid", "selection"), "gathered", gather),
    ]
    if rotary is not None:
        found.append(Stage("rotate", ("gathered", "selection"), "gathered", turn))
    if settings.window:
        found.append(Stage("window", ("q", "k", "v"), "near", window))
        found.append(Stage("dense call", ("gathered", "selection"), "rows", part))
        found.append(Stage("merge", ("near", "rows", "selection"), "out", merge))
    else:
        found.append(Stage("dense call", ("gathered",), "rows", attend))
        found.append(Stage("scatter", ("rows", "selection"), "out", scatter))
    return found


def selected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    settings: Settings,
    context: AttentionContext,
    g: Geometry,
    ops: Any,
    *,
    scores: tuple[Tensor, Tensor] | None = None,
    norms: Any = None,
) -> Any:
    """The selection from scores that are given, or else by the selector.

    Args:
        q: [B, N, H, D].
        k, v: [B, N, Hkv, D].
        settings, context, scores: see `stages`.
        g: the pyramid, not `dense`.
        ops: its operations.
        norms: see `Inputs`.
    """
    if scores is None:
        found = selector_of(settings.scorer).select(Inputs(q, k, v, context, g, settings, ops, norms))
        if is_selection(found):
            return found
        # Of tokens, or of windows.
        dim = 2 if found[0].shape == q.shape[:3] else 1
        by_query, by_key = (of_all_query_heads(x, dim, context.heads) for x in found)
        scores = by_query, by_key
    return ops.select(window_scores(scores, tuple(q.shape[:3]), k.shape[2], g), g)
