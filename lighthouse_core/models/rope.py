"""The frequencies of RoPE, scaled for longer sequences or not, computed in float32 as transformers computes them."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Scaling = Mapping[str, Any]


def rotary_table(positions: int, head_dim: int, theta: float, scaling: Scaling | None = None) -> Tensor:
    """Cosine and sine of every position's angles, float32 [positions, head_dim / 2, 2].

    Args:
        positions: that the table covers, from 0.
        head_dim: D.
        theta: base of the frequencies, theta^(-2i / D).
        scaling: the table of [model.rope_scaling].
    """
    frequencies, factor = _frequencies(head_dim, theta, scaling)
    angles = torch.outer(torch.arange(positions).float(), frequencies)
    table = torch.stack((angles.cos(), angles.sin()), dim=-1)
    return table if factor == 1 else table * factor


def _frequencies(head_dim: int, theta: float, scaling: Scaling | None) -> tuple[Tensor, float]:
    """Radians a position of each pair, [D/2], and the factor of cosine and sine."""
    exponent = torch.arange(0, head_dim, 2).float() / head_dim
    plain = 1.0 / theta**exponent
    if scaling is None:
        return plain, 1.0
    kind, factor = scaling["rope_type"], scaling["factor"]
    if kind == "linear":
        return plain / factor, 1.0
    if kind == "llama3":
        return _llama3(plain, scaling), 1.0
    assert kind == "yarn", kind
    usual = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return _yarn(theta**exponent, head_dim, theta, scaling), scaling.get("attention_factor", usual)


def _llama3(plain: Tensor, scaling: Scaling) -> Tensor:
    original, low, high = (
        scaling[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    waves = 2 * math.pi / plain
    scaled = torch.where(waves > original / low, plain / scaling["factor"], plain)
    kept = (original / waves - low) / (high - low)
    between = (1 - kept) * scaled / scaling["factor"] + kept * scaled
    middle = ~(waves < original / high) * ~(waves > original / low)
    return torch.where(middle, between, scaled)


def _yarn(powers: Tensor, head_dim: int, theta: float, scaling: Scaling) -> Tensor:
    def pair(turns: float) -> float:
        """Which pair turns so many times within the original length."""
        length = scaling["original_max_position_embeddings"] / (turns * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(theta))

    low, high = pair(scaling.get("beta_fast", 32.0)), pair(scaling.get("beta_slow", 1.0))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    # Of equal borders the ramp is a step.
    high = high + 0.001 if low == high else high
    ramp = ((torch.arange(head_dim // 2).float() - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (scaling["factor"] * powers) * (1 - kept) + 1.0 / powers * kept
