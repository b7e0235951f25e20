"""Which kernels run: but for the shape of a pyramid, all of lighthouse_kernels comes from here. Imports no torch."""

import importlib.util
import logging
import os
from types import ModuleType
from typing import TYPE_CHECKING

from lighthouse_core.attention.settings import BackendError, known
from lighthouse_kernels.geometry import Geometry

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from typing_extensions import TypeIs

    from lighthouse_kernels.types import Selection

BACKENDS = ("auto", "reference", "triton")
logger = logging.getLogger(__name__)
# Constants, for torch.compile follows what `kernels` reads.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_logged: set[str] = set()


def log_once(message: str) -> None:
    """Log at INFO the first time a message is seen. Silent while torch.compile traces, which cannot log."""
    import torch

    if not torch.compiler.is_compiling() and message not in _logged:
        _logged.add(message)
        logger.info(message)


def window_scores(
    scores: "tuple[torch.Tensor, torch.Tensor]", shape: tuple[int, ...], kv_heads: int, g: Geometry
) -> "tuple[torch.Tensor, torch.Tensor]":
    """(s_Q, s_K), each [B, Hkv, M] float32, from scores of tokens or of windows.

    Args:
        scores: a pair [B, N, H] and [B, N, Hkv], or both [B, Hkv, M].
        shape: (B, N, H).
        kv_heads: Hkv.
        g: the pyramid.

    Raises:
        ValueError: for other shapes.
    """
    from lighthouse_kernels.pyramid import reference

    by_query, by_key = (x.detach().float() for x in scores)
    windows = (shape[0], kv_heads, g.pyramid_length)
    if by_query.shape == windows and by_key.shape == windows:
        return reference.mask_padding(by_query, g), reference.mask_padding(by_key, g)
    if by_query.shape == shape and by_key.shape == (*shape[:2], kv_heads):
        return (
            reference.window_scores(reference.group_max(by_query, kv_heads), g),
            reference.window_scores(by_key.transpose(1, 2), g),
        )
    raise ValueError(
        f"scores must be a pair of token scores [B, N, H] and [B, N, Hkv], or of window scores {list(windows)}; "
        f"got {tuple(by_query.shape)} and {tuple(by_key.shape)}"
    )


def norm_scores(q: "torch.Tensor", k: "torch.Tensor", g: Geometry) -> "tuple[torch.Tensor, torch.Tensor]":
    """(s_Q, s_K) of the scorer `norm`, each [B, Hkv, M] float32, in plain PyTorch. To be looked at: the scores that
    another backend selects by may be rounded otherwise.

    Args:
        q: [B, N, H, D].
        k: [B, N, Hkv, D].
        g: the pyramid.
    """
    from lighthouse_kernels.pyramid import reference

    return reference.norm_scores(q, k, g)


def uniform(key: "torch.Tensor", batch: int, heads: int, index: "torch.Tensor") -> "torch.Tensor":
    """What content-free scorers draw, in [0, 1), [B, heads, len(index)]: see lighthouse_kernels.pyramid.random."""
    from lighthouse_kernels.pyramid.random import uniform as draw

    return draw(key, batch, heads, index)


def with_edge(
    selection: "Selection", g: Geometry, from_previous: "Callable[[torch.Tensor], torch.Tensor]"
) -> "Selection":
    """The selection of a shard, with the entries of the shard before that serve its first positions; see
    lighthouse_kernels.types. `from_previous` sends a tensor to the next process, and gives that of the one before."""
    from lighthouse_kernels.types import last_kept, with_edge

    return with_edge(selection, from_previous(last_kept(selection.indices, g)))


def is_selection(found: object) -> "TypeIs[Selection]":
    """Whether a selector returned a selection, rather than scores."""
    from lighthouse_kernels.types import Selection

    return isinstance(found, Selection)


def kernels(name: str, device_type: str, dtype: "torch.dtype | None" = None) -> ModuleType:
    """The operations of one backend, as a module; `auto` picks, and logs why.

    Args:
        name: of the backend.
        device_type: of the tensors.
        dtype: of the tensors, where they are there already.

    Raises:
        ValueError: for a backend that is not there, or cannot take such tensors.
    """
    known("backend", name, BACKENDS)
    # Triton's interpreter runs the kernels on a CPU, but so slowly that nobody gets it unasked.
    obstacle = _triton_obstacle(device_type, dtype, interpreter=_INTERPRETED and name == "triton")
    if name == "triton" and obstacle:
        raise BackendError(f"backend 'triton' {obstacle}", 'the backend "auto" takes what runs here')
    if name == "reference" or obstacle:
        if name == "auto":
            log_once(f"attention backend: reference, because triton {obstacle}")
        from lighthouse_kernels import reference

        return reference
    if name == "auto":
        log_once(f"attention backend: triton, the faster one on {device_type}")
    from lighthouse_kernels import triton

    return triton


def _triton_obstacle(device_type: str, dtype: "torch.dtype | None", interpreter: bool) -> str | None:
    """Why the Triton kernels cannot run; None if they can."""
    if not _HAS_TRITON:
        return "is not installed"
    if device_type != "cuda" and not interpreter:
        return f"needs a CUDA device, not {device_type}"
    if dtype is not None and dtype.itemsize > 4:
        return f"takes no {dtype}"
    return None
