"""Lighthouse: long-context pre-training with Lighthouse Attention. Importing this package does not import torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lighthouse_core.attention.config import LighthouseConfig, gathered_length

if TYPE_CHECKING:
    from lighthouse_core.attention import dense_attention, lighthouse_attention, select_indices

_WHERE = {
    "dense_attention": "lighthouse_core.attention",
    "lighthouse_attention": "lighthouse_core.attention",
    "select_indices": "lighthouse_core.attention",
}

__all__ = ["LighthouseConfig", "dense_attention", "gathered_length", "lighthouse_attention", "select_indices"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'lighthouse_core' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
