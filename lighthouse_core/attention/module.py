"""The attention calls as modules that take the place of a model's own attention."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lighthouse_core.attention.call import lighthouse_attention
from lighthouse_core.attention.config import LighthouseConfig
from lighthouse_core.attention.dense import dense_attention


class LighthouseAttention(nn.Module):
    """Lighthouse attention over heads-first tensors, the layout of torch's scaled_dot_product_attention.

    Has no parameters and saves nothing in a checkpoint.

    Args:
        cfg: settings of the call.
        layer: number of the layer, part of the key of content-free scorers.

    Attributes:
        dense: attend densely for as long as it is set.
    """

    def __init__(self, cfg: LighthouseConfig, layer: int):
        super().__init__()
        self.cfg = cfg
        self.layer = layer
        self.dense = False
        self.register_buffer("key", torch.zeros(4, dtype=torch.int64), persistent=False)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, enable_gqa: bool = False
    ) -> Tensor:
        """Attend causally.

        Args:
            q: [B, H, N, D].
            k, v: [B, Hkv, N, D].
            scale: factor on the attention scores; 1/sqrt(D) by default.
            enable_gqa: accepted for compatibility; grouped heads are told from the shapes.

        Returns:
            [B, H, N, D].
        """
        tokens_first = (x.transpose(1, 2) for x in (q, k, v))
        if self.dense:
            return dense_attention(*tokens_first, scale=scale, backend=self.cfg.dense_backend).transpose(1, 2)
        return lighthouse_attention(*tokens_first, self.cfg, scale=scale, key=self.key).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"layer={self.layer}, {self.cfg}"


class DenseAttention(nn.Module):
    """Dense causal attention, in the layout of `LighthouseAttention`.

    Args:
        backend: see `dense_attention`.
    """

    def __init__(self, backend: str = "auto"):
        super().__init__()
        self.backend = backend

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, enable_gqa: bool = False
    ) -> Tensor:
        """See `LighthouseAttention.forward`."""
        tokens_first = (x.transpose(1, 2) for x in (q, k, v))
        return dense_attention(*tokens_first, scale=scale, backend=self.backend).transpose(1, 2)

    def extra_repr(self) -> str:
        return self.backend


def set_selection_keys(model: nn.Module, seed: int, step: int, sample: int) -> None:
    """Write (seed, step, layer, sample) into every Lighthouse layer of `model`, before a micro-batch's forward pass.

    Args:
        model: any module that holds `LighthouseAttention` layers.
        seed: seed of the run.
        step: number of the training step.
        sample: number of the micro-batch's first row within the global batch.
    """
    for module in model.modules():
        if isinstance(module, LighthouseAttention):
            module.key.copy_(torch.tensor((seed, step, module.layer, sample)))


def use_settings(model: nn.Module, cfg: LighthouseConfig) -> None:
    """Have every Lighthouse layer of `model` go on with other settings. Compiled layers compile again."""
    for module in model.modules():
        if isinstance(module, LighthouseAttention):
            module.cfg = cfg


@contextmanager
def dense_for_now(model: nn.Module) -> Iterator[None]:
    """Every Lighthouse layer of `model` attends densely for as long as the context lasts."""
    layers = [module for module in model.modules() if isinstance(module, LighthouseAttention)]
    for layer in layers:
        layer.dense = True
    try:
        yield
    finally:
        for layer in layers:
            layer.dense = False
