"""Lighthouse: long-context pre-training with Lighthouse Attention. Importing this package does not import torch."""

from importlib import import_module
from typing import TYPE_CHECKING

from lighthouse_core.attention.config import LighthouseConfig

if TYPE_CHECKING:
    from lighthouse_core.attention import dense_attention, lighthouse_attention, select_indices
    from lighthouse_core.backends import gathered_length

_WHERE = {
    "dense_attention": "lighthouse_core.attention",
    "lighthouse_attention": "lighthouse_core.attention",
    "select_indices": "lighthouse_core.attention",
    "gathered_length": "lighthouse_core.backends",
}

__all__ = ["LighthouseConfig", "dense_attention", "gathered_length", "lighthouse_attention", "select_indices"]


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'lighthouse_core' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
