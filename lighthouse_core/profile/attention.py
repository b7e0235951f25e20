"""The attention call taken apart: each stage forward and backward, the whole call, and dense attention."""

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lighthouse_core.attention import LighthouseConfig, dense_attention, lighthouse_attention, select_indices
from lighthouse_core.backends import geometry, kernels
from lighthouse_core.errors import LighthouseError, UserError
from lighthouse_core.profile.timing import host_memory, median_ms, peak_gib, resident_gib

SCHEMA = 1
_CHECK_TOKENS = 512


@dataclass(frozen=True)
class Timing:
    """One row: milliseconds forward and, where there is a gradient, backward."""

    name: str
    forward_ms: float
    backward_ms: float | None

    @property
    def total_ms(self) -> float:
        return self.forward_ms + (self.backward_ms or 0.0)


@dataclass(frozen=True)
class Profile:
    """What `run` measured.

    Attributes:
        settings: the shape and the attention settings.
        machine: device, threads and versions.
        checks: what was compared before anything was timed, with the figure seen.
        stages: the stages of the Lighthouse call.
        calls: the whole Lighthouse call and dense attention.
        peak_gib: peak device memory of a forward and backward of each call; None on the CPU.
        resident_gib: largest resident memory of the process.
        speedup: dense time over Lighthouse time, `forward` and `forward_backward`.
    """

    settings: dict[str, Any]
    machine: dict[str, Any]
    checks: dict[str, float]
    stages: list[Timing]
    calls: list[Timing]
    peak_gib: dict[str, float | None]
    resident_gib: float
    speedup: dict[str, float]
    schema: int = field(default=SCHEMA)

    def as_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        return asdict(self)


def _relative_error(got: Tensor, exact: Tensor) -> float:
    return ((got.float() - exact).norm() / exact.norm()).item()


def _check(cfg: LighthouseConfig, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device):
    """Compare both calls, at a smaller size, with plain PyTorch in float32; raise if they disagree."""
    cfg = replace(cfg, topk=cfg.tile_parents)
    coarsest = cfg.pooling ** (cfg.levels - 1)
    # Long enough for the selection to leave something out.
    tokens = 2 * cfg.topk * ((cfg.levels - 1) * cfg.pooling + coarsest)
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, tokens, h, dim, device=device, dtype=dtype, generator=generator)
        for h in (heads, kv_heads, kv_heads)
    )
    key = torch.zeros(3, dtype=torch.int64, device=device)
    plain = replace(cfg, backend="reference", dense_backend="math")
    scores = tuple(x.float().norm(dim=-1) for x in (q, k))
    if not torch.equal(select_indices(q, k, cfg, scores=scores), select_indices(q, k, plain, scores=scores)):
        raise LighthouseError("the selection is not that of plain PyTorch: nothing was timed")
    indices = select_indices(q, k, cfg, key=key)
    exact = lighthouse_attention(q.float(), k.float(), v.float(), plain, indices=indices)
    short = slice(_CHECK_TOKENS)
    checks = {
        "lighthouse_relative_error": _relative_error(lighthouse_attention(q, k, v, cfg, key=key), exact),
        "dense_relative_error": _relative_error(
            dense_attention(q[:, short], k[:, short], v[:, short], backend=cfg.dense_backend),
            dense_attention(*(x[:, short].float() for x in (q, k, v)), backend="math"),
        ),
    }
    # A few roundings to the dtype; float32 itself sums in another order.
    bound = max(4 * torch.finfo(dtype).eps, 1e-5)
    for name, error in checks.items():
        if not error <= bound:
            raise LighthouseError(f"{name} is {error:.2e}, above {bound:.0e}: nothing was timed")
    return checks


def _time(call: Callable[..., Any], inputs: tuple[Tensor, ...], name: str, **timing) -> Timing:
    """Time `call` on `inputs` forward, and backward through whatever of its result carries a gradient."""
    forward = median_ms(lambda: call(*inputs), **timing)
    leaves = tuple(x.detach().requires_grad_(x.is_floating_point()) for x in inputs)
    result = call(*leaves)
    outputs = tuple(x for x in (result if isinstance(result, tuple) else (result,)) if x.requires_grad)
    if not outputs:
        return Timing(name, forward, None)
    wanted = tuple(x for x in leaves if x.requires_grad)
    gradients = tuple(torch.randn_like(x) for x in outputs)
    backward = median_ms(
        lambda: torch.autograd.grad(outputs, wanted, gradients, retain_graph=True, allow_unused=True), **timing
    )
    return Timing(name, forward, backward)


def run(
    seq: int,
    cfg: LighthouseConfig,
    *,
    heads: int = 8,
    kv_heads: int | None = None,
    head_dim: int = 128,
    dtype: str | None = None,
    repeats: int = 5,
    budget: float = 10.0,
) -> Profile:
    """Time one Lighthouse attention call, stage by stage, beside dense attention, on random data, batch 1.

    Args:
        seq: sequence length N in tokens.
        cfg: settings of the call.
        heads: query heads H.
        kv_heads: key/value heads; `heads` by default.
        head_dim: D.
        dtype: `float32`, `bfloat16` or `float16`; bfloat16 on a GPU and float32 on the CPU by default.
        repeats: timed calls a row; the median is kept.
        budget: seconds a row may take before no further call is begun.

    Raises:
        UserError: for shapes that make no call, or a selection no shorter than the sequence.
        LighthouseError: when what is timed disagrees with a slower way to the same result.
    """
    kv_heads = kv_heads or heads
    if min(seq, heads, kv_heads, head_dim) < 1 or heads % kv_heads:
        raise UserError(f"no attention call has N = {seq}, {heads} heads, {kv_heads} KV heads and D = {head_dim}")
    g = geometry(seq, cfg)
    if g.dense:
        raise UserError(
            f"at N = {seq} this selection would hold {g.selected_length} entries, so the call would be dense",
            hint=f"use --seq above {g.selected_length}, a smaller --topk, or more --levels",
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    number = getattr(torch, dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    # q, k, v, their gradients, the pyramids and the outputs of both calls.
    needed = 16 * seq * (heads + kv_heads) * head_dim * number.itemsize
    there = torch.cuda.mem_get_info()[0] if device.type == "cuda" else host_memory()
    if needed > there:
        raise UserError(f"N = {seq} needs about {needed / 2**30:.0f} GiB, and {there / 2**30:.0f} GiB are there")
    checks = _check(cfg, heads, kv_heads, head_dim, number, device)

    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, seq, h, head_dim, device=device, dtype=number, generator=generator)
        for h in (heads, kv_heads, kv_heads)
    )
    key = torch.zeros(3, dtype=torch.int64, device=device)
    ops = kernels(cfg.backend, device.type, number)
    timing = {"device": device, "repeats": repeats, "budget": budget}

    by_norm = cfg.scorer == "norm"
    pyramid = ops.pyramid(q, k, v, g, scored=by_norm)
    selection = ops.given(select_indices(q, k, cfg, key=key), g)
    gathered = ops.gather(q, k, v, pyramid, selection, g)
    rows = dense_attention(*gathered, backend=cfg.dense_backend)

    def gather(q: Tensor, k: Tensor, v: Tensor, *pooled: Tensor) -> tuple[Tensor, ...]:
        return ops.gather(q, k, v, pyramid._replace(q=pooled[0], k=pooled[1], v=pooled[2]), selection, g)

    def select(*x: Tensor) -> Tensor:
        if by_norm:
            return ops.select(pyramid.scores, g).indices
        return select_indices(*x, cfg, key=key)

    stages = [
        _time(lambda *x: tuple(ops.pyramid(*x, g, scored=by_norm)[:3]), (q, k, v), "pyramid + score", **timing),
        _time(select, (q, k), "select", **timing),
        _time(gather, (q, k, v, *pyramid[:3]), "gather", **timing),
        _time(lambda *x: dense_attention(*x, backend=cfg.dense_backend), gathered, "dense call on S", **timing),
        _time(lambda x: ops.scatter(x, selection, g), (rows,), "scatter", **timing),
    ]
    # Let go of them before the memory of whole calls is measured.
    pyramid = gathered = rows = None

    def lighthouse(*x: Tensor) -> Tensor:
        return lighthouse_attention(*x, cfg, key=key)

    def dense(*x: Tensor) -> Tensor:
        return dense_attention(*x, backend=cfg.dense_backend)

    def both_ways(call: Callable[..., Tensor]) -> None:
        leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))
        call(*leaves).sum().backward()

    calls = [_time(lighthouse, (q, k, v), "lighthouse", **timing), _time(dense, (q, k, v), "dense", **timing)]
    peaks = {
        name: peak_gib(lambda c=c: both_ways(c), device) for name, c in (("lighthouse", lighthouse), ("dense", dense))
    }
    return Profile(
        settings={
            "batch": 1,
            "seq": seq,
            "gathered_length": g.gathered_length,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "dtype": str(number).removeprefix("torch."),
            **asdict(cfg),
        },
        machine={
            "device": torch.cuda.get_device_name()
            if device.type == "cuda"
            else platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        checks=checks,
        stages=stages,
        calls=calls,
        peak_gib=peaks,
        resident_gib=resident_gib(),
        speedup={
            "forward": calls[1].forward_ms / calls[0].forward_ms,
            "forward_backward": calls[1].total_ms / calls[0].total_ms,
        },
    )
