"""The frequencies of RoPE, scaled for longer sequences or not, computed in float32 as transformers computes them."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lighthouse_core.config.rope import Llama3Scaling, RopeScaling, YarnScaling


def rotary_table(positions: int, head_dim: int, theta: float, scaling: "RopeScaling | None" = None) -> Tensor:
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


def _frequencies(head_dim: int, theta: float, scaling: "RopeScaling | None") -> tuple[Tensor, float]:
    """Radians a position of each pair, [D/2], and the factor of cosine and sine."""
    exponent = torch.arange(0, head_dim, 2).float() / head_dim
    plain = 1.0 / theta**exponent
    if scaling is None:
        return plain, 1.0
    match scaling.rope_type:
        case "linear":
            return plain / scaling.factor, 1.0
        case "llama3":
            return _llama3(plain, scaling), 1.0
        case "yarn":
            usual = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
            factor = usual if scaling.attention_factor is None else scaling.attention_factor
            return _yarn(theta**exponent, head_dim, theta, scaling), factor


def _llama3(plain: Tensor, scaling: "Llama3Scaling") -> Tensor:
    original, low, high = (
        scaling.original_max_position_embeddings,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
    )
    waves = 2 * math.pi / plain
    scaled = torch.where(waves > original / low, plain / scaling.factor, plain)
    kept = (original / waves - low) / (high - low)
    between = (1 - kept) * scaled / scaling.factor + kept * scaled
    middle = ~(waves < original / high) * ~(waves > original / low)
    return torch.where(middle, between, scaled)


def _yarn(powers: Tensor, head_dim: int, theta: float, scaling: "YarnScaling") -> Tensor:
    def pair(turns: float) -> float:
        """Which pair turns so many times within the original length."""
        length = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    # Of equal borders the ramp is a step.
    high = high + 0.001 if low == high else high
    ramp = ((torch.arange(head_dim // 2).float() - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (scaling.factor * powers) * (1 - kept) + 1.0 / powers * kept
