"""One Lighthouse attention call, as functions and as a module. Importing this package does not import torch."""

from importlib import import_module
from typing import Any

from lighthouse_core.attention.config import LighthouseConfig, gathered_length
from lighthouse_core.attention.context import AttentionContext, Documents

_WHERE = {
    "check_backends": "lighthouse_core.attention.call",
    "dense_attention": "lighthouse_core.attention.dense.call",
    "lighthouse_attention": "lighthouse_core.attention.call",
    "select_indices": "lighthouse_core.attention.call",
    "LighthouseAttention": "lighthouse_core.attention.module",
}

__all__ = [
    "AttentionContext",
    "Documents",
    "LighthouseAttention",
    "LighthouseConfig",
    "check_backends",
    "dense_attention",
    "gathered_length",
    "lighthouse_attention",
    "select_indices",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'lighthouse_core.attention' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
