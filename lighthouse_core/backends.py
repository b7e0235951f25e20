"""Which kernels run: the only module that imports lighthouse_kernels. Importing it does not import torch."""

import logging
from types import ModuleType

from lighthouse_core.attention.config import LighthouseConfig
from lighthouse_kernels.geometry import Geometry

logger = logging.getLogger(__name__)
_logged: set[str] = set()


def log_once(message: str) -> None:
    """Log at INFO the first time a message is seen. Silent while torch.compile traces, which cannot log."""
    import torch

    if not torch.compiler.is_compiling() and message not in _logged:
        _logged.add(message)
        logger.info(message)


def geometry(tokens: int, cfg: LighthouseConfig) -> Geometry:
    """Pyramid of a sequence of `tokens` tokens."""
    return Geometry(tokens, cfg.pooling, cfg.levels, cfg.topk, cfg.tile_parents, cfg.cover_prefix)


def gathered_length(N: int, cfg: LighthouseConfig) -> int:
    """Length S of the sequence the dense kernel sees N'/c_(L-1) + (L-1) p k, or N when the call is dense.

    Args:
        N: sequence length in tokens.
        cfg: settings of the call.

    Raises:
        ValueError: if N < 1.
    """
    return geometry(N, cfg).gathered_length


def kernels(name: str) -> ModuleType:
    """The operations of one backend, as a module; `auto` picks, and logs why.

    Raises:
        ValueError: for a backend that is not there.
    """
    if name == "triton":
        raise ValueError("backend 'triton' is not available in this release; use 'reference' or 'auto'")
    if name == "auto":
        log_once("attention backend: reference, the only one of this release")
    from lighthouse_kernels import reference

    return reference
