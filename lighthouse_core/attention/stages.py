"""The stages of a pyramid's call, in order. The call runs them; `lighthouse profile` times them.

B batch, N tokens, H query heads, Hkv key/value heads, D head dimension, M windows of all levels, S entries.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lighthouse_core.attention.backends import is_selection, window_scores
from lighthouse_core.attention.context import AttentionContext
from lighthouse_core.attention.dense.call import dense_attention
from lighthouse_core.attention.documents import of_windows
from lighthouse_core.attention.parts import near, near_entries
from lighthouse_core.attention.rotary import rotate, rotate_entries
from lighthouse_core.attention.selectors import selector_of
from lighthouse_core.attention.selectors.selector import Inputs
from lighthouse_core.attention.settings import Settings
from lighthouse_core.attention.sharing import of_all_query_heads
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
        g: its pyramid, not `dense`.
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
    documents = context.documents
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

    def attend(gathered: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return dense_attention(*gathered, **how)

    def scatter(rows: Tensor, selection: Any) -> Tensor:
        return ops.scatter(rows, selection, g)

    def part(gathered: tuple[Tensor, Tensor, Tensor], selection: Any) -> Any:
        if documents is None:
            return near(*gathered, 0, **how)
        return near_entries(*gathered, selection.indices, documents, g, **how)

    def merge(near: Any, rows: Any, selection: Any) -> Tensor:
        begins = None if documents is None else of_windows(documents, len(rows.out), g)
        return ops.merge(*near, *rows, selection, g, begins)

    def window(q: Tensor, k: Tensor, v: Tensor) -> Any:
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return near(q, k, v, settings.window, **how, documents=documents)

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
