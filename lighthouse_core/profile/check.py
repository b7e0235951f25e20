"""Whether the call that is timed gives what plain PyTorch gives."""

from dataclasses import replace

import torch
from torch import Tensor

from lighthouse_core.attention import LighthouseConfig, lighthouse_attention, select_indices
from lighthouse_core.errors import LighthouseError
from lighthouse_core.profile.dense import relative_error, tolerance
from lighthouse_core.profile.work import Shape

# A window that is wider is checked as one of this many tokens.
_WINDOW = 1024
_NAMES = ("output", "dq", "dk", "dv")


def check_call(shape: Shape, cfg: LighthouseConfig, device: torch.device) -> dict[str, float]:
    """Compare a call, and its gradients, with plain PyTorch in float32.

    All of it on a shorter sequence; and at the full length, where the reference does without scores of all pairs, one
    KV head with its query heads.

    Returns:
        The relative errors.

    Raises:
        LighthouseError: the selection is another one, or an error is more than a few roundings.
    """
    small = replace(cfg, topk=cfg.tile_parents, window=_shorter(cfg))
    errors = {f"{what}, short": error for what, error in _compare(_short(shape, small), small, "math", device).items()}
    if cfg.method == "chunked" or (cfg.method == "pyramid" and not cfg.window):
        group = Shape(shape.tokens, shape.heads // shape.kv_heads, 1, shape.head_dim, shape.dtype)
        errors |= {f"{what}, N tokens": error for what, error in _compare(group, cfg, "auto", device).items()}
    return errors


def _shorter(cfg: LighthouseConfig) -> int:
    return _WINDOW if cfg.window > _WINDOW and _WINDOW % max(cfg.compression, 1) == 0 else cfg.window


def _short(shape: Shape, cfg: LighthouseConfig) -> Shape:
    """Long enough for the selection, or the window, to leave something out."""
    tokens = 3 * cfg.window
    if cfg.method == "pyramid":
        entries = (cfg.levels - 1) * cfg.pooling + cfg.pooling ** (cfg.levels - 1)
        tokens = max(tokens, 2 * cfg.topk * entries)
    return Shape(tokens, shape.heads, shape.kv_heads, shape.head_dim, shape.dtype)


def _compare(shape: Shape, cfg: LighthouseConfig, truth: str, device: torch.device) -> dict[str, float]:
    """Relative errors of output and gradients, beside those of plain PyTorch in float32 with the dense backend
    `truth`."""
    dtype = getattr(torch, shape.dtype)
    q, k, v, grad = random_inputs(shape, device)
    given = {"key": torch.zeros(3, dtype=torch.int64, device=device)}
    plain = replace(cfg, backend="reference", dense_backend=truth)
    if cfg.method == "pyramid":
        scores = tuple(x.float().norm(dim=-1) for x in (q, k))
        if not torch.equal(select_indices(q, k, cfg, scores=scores), select_indices(q, k, plain, scores=scores)):
            raise LighthouseError("the selection is not that of plain PyTorch: nothing was timed")
        # The last bit of a norm depends on the order of addition.
        given["indices"] = select_indices(q, k, cfg, **given)

    def results(cfg: LighthouseConfig, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = lighthouse_attention(*leaves, cfg, **given)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    pairs = zip(results(cfg, dtype), results(plain, torch.float32), strict=True)
    errors = dict(zip(_NAMES, (relative_error(got, exact) for got, exact in pairs), strict=True))
    for what, error in errors.items():
        if not error <= tolerance(dtype):
            raise LighthouseError(
                f"relative error of {what} is {error:.2e} at {shape.tokens} tokens, above {tolerance(dtype):.0e}: "
                "nothing was timed"
            )
    return errors


def random_inputs(shape: Shape, device: torch.device) -> list[Tensor]:
    """q [1, N, H, D], k and v [1, N, Hkv, D], and a gradient of the output, normally distributed."""
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(
            1, shape.tokens, h, shape.head_dim, device=device, dtype=getattr(torch, shape.dtype), generator=generator
        )
        for h in (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    ]
