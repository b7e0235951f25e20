"""The attention call taken apart: each stage forward and backward, the whole call, and every dense kernel there is."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lighthouse_core.attention import AttentionContext, LighthouseConfig, lighthouse_attention
from lighthouse_core.attention.backends import kernels
from lighthouse_core.attention.dense.call import blocks_kernel
from lighthouse_core.attention.parts import parts_kernel, windowed_kernel
from lighthouse_core.attention.stages import stages
from lighthouse_core.errors import UserError
from lighthouse_core.profile.check import check_call
from lighthouse_core.profile.dense import TOKENS, Kernel, dense_kernels, random_inputs
from lighthouse_core.profile.machine import Roof, free_memory
from lighthouse_core.profile.timing import Sample, measure, measure_parts, peak_gib, resident_gib
from lighthouse_core.profile.work import Shape, Work, stage_work

# A dense call forward and backward that would take longer is worked out from a shorter one.
LIMIT_MS = 10_000.0
# That one is at least so large a part of it.
_FRACTION = 8


@dataclass(frozen=True)
class Pass:
    """One stage in one direction.

    Attributes:
        ms: measured, where it stands in the call.
        gigabytes: that it has to move at least; None where that is not known.
        gigaflops: that it has to compute; 0 where memory is the limit.
        of_roof: fraction of the copy rate, or of the rate of a matrix product, that this is.
    """

    ms: Sample
    gigabytes: float | None
    gigaflops: float
    of_roof: float | None

    @classmethod
    def of(cls, ms: Sample, work: Work | None, roof: Roof) -> "Pass":
        if work is None or not work.bytes:
            return cls(ms, None, 0.0, None)
        seconds = ms.median / 1e3
        least = work.flops / roof.flops_per_second if work.flops else work.bytes / roof.bytes_per_second
        return cls(ms, work.bytes / 1e9, work.flops / 1e9, least / seconds)


@dataclass(frozen=True)
class Stage:
    """One stage of the call."""

    name: str
    forward: Pass
    backward: Pass | None


@dataclass(frozen=True)
class Call:
    """A whole attention call.

    Attributes:
        name: short.
        label: what it is.
        forward_ms: without gradients.
        both_ms: forward and backward.
        peak_gib: of device memory, forward and backward, with inputs and gradients; None on the CPU.
        extrapolated: worked out, by the square of the length, from a call on this many tokens; 0 for a measured one.
    """

    name: str
    label: str
    forward_ms: Sample
    both_ms: Sample
    peak_gib: float | None
    extrapolated: int = 0


@dataclass(frozen=True)
class AttentionProfile:
    """One shape, measured.

    Attributes:
        settings: the shape and the attention settings, with the backends that `auto` stood for, and `gathered_length`
            where the method has one.
        checks: relative errors of what is timed, seen before it was timed.
        stages: of the Lighthouse call.
        lighthouse: the whole call.
        others: the same by the other dense kernels that a recipe can name, where it named none.
        dense: every dense kernel that takes such inputs, fastest first.
        absent: why others are not there.
        resident_gib: largest resident memory of the process.
    """

    settings: dict[str, Any]
    checks: dict[str, float]
    stages: list[Stage]
    lighthouse: Call
    others: list[Call]
    dense: list[Call]
    absent: dict[str, str]
    resident_gib: float

    @property
    def speedup(self) -> dict[str, dict[str, float]]:
        """Times that `lighthouse` is faster than each of `dense`, `forward` and `forward_backward`."""
        ours = self.lighthouse
        return {
            call.name: {
                "forward": call.forward_ms.median / ours.forward_ms.median,
                "forward_backward": call.both_ms.median / ours.both_ms.median,
            }
            for call in self.dense
        }

    @property
    def tokens(self) -> int:
        return self.settings["seq"]

    @property
    def level_0(self) -> float | None:
        """Share of the tokens that a pyramid keeps at level 0; None for other methods."""
        if "gathered_length" not in self.settings:
            return None
        return self.settings["pooling"] * self.settings["topk"] / self.tokens

    def as_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        return asdict(self) | {"speedup": self.speedup}


def _smaller(tokens: int, cfg: LighthouseConfig) -> str:
    """What to do about a selection that is no shorter than the sequence: options with which it is, where there are."""
    tile = cfg.tile_parents
    while cfg.levels > 1 and tile:
        topk = min(cfg.topk, tokens // ((cfg.levels - 1) * cfg.pooling)) // tile * tile
        while topk:
            with contextlib.suppress(ValueError):
                if not replace(cfg, topk=topk, tile_parents=tile).geometry(tokens).dense:
                    tiles = "" if tile == cfg.tile_parents else f" --tile-parents {tile}"
                    return f"use a longer --seq, or a smaller selection, as --topk {topk}{tiles} makes it"
            topk = topk // 2 // tile * tile
        # It has to be even.
        tile = tile // 4 * 2
    return f"use a longer --seq, or {'fewer' if cfg.levels > 1 else 'more'} --levels"


def check_size(shape: Shape, cfg: LighthouseConfig, device: torch.device) -> None:
    """Raise before anything is allocated.

    Raises:
        UserError: for a selection no shorter than the sequence, or too little memory.
    """
    if cfg.pools:
        try:
            g = cfg.geometry(shape.tokens)
        except ValueError as error:
            raise UserError(str(error)) from None
        if g.dense:
            raise UserError(
                f"at N = {shape.tokens} this selection would hold {g.selected_length} entries, so the call would be "
                "dense",
                hint=_smaller(shape.tokens, cfg),
            )
    elif cfg.window >= shape.tokens:
        raise UserError(
            f"a window of {cfg.window} tokens holds all of N = {shape.tokens}", hint="use a smaller --window"
        )
    # Of q, k and v: 3 for a call by the Triton kernels, 4 for dense attention, and some for what is compared; plain
    # PyTorch keeps more.
    rows = 6 if device.type == "cuda" and cfg.backend != "reference" else 16
    needed, there = rows * shape.tokens * shape.row, free_memory(device)
    if needed > there:
        raise UserError(
            f"N = {shape.tokens} needs about {needed / 2**30:.0f} GiB, and {there / 2**30:.0f} are free",
            hint="use a smaller --seq, or fewer --heads: the times of heads add up",
        )


def profile_call(
    name: str,
    label: str,
    call: Callable[..., Tensor],
    shape: Shape,
    device: torch.device,
    repeats: int,
) -> Call:
    """Time a call, forward and with its gradients, on random inputs of this shape."""
    besides = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    *qkv, grad = random_inputs(shape, device)
    leaves = [x.requires_grad_() for x in qkv]

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(*leaves), leaves, grad)

    with torch.no_grad():
        forward = measure(lambda: call(*leaves), device, repeats=repeats)
    return Call(name, label, forward, measure(both, device, repeats=repeats), peak_gib(both, device, besides))


def profile_lighthouse(cfg: LighthouseConfig, shape: Shape, device: torch.device, repeats: int) -> Call:
    """Time a Lighthouse call with these settings."""
    key = torch.zeros(3, dtype=torch.int64, device=device)

    def call(*x: Tensor) -> Tensor:
        return lighthouse_attention(*x, cfg, key=key)

    label = f"Lighthouse, {cfg.method}, {cfg.dense_backend} inside"
    return profile_call("lighthouse", label, call, shape, device, repeats)


def profile_attention(
    shape: Shape,
    cfg: LighthouseConfig,
    roof: Roof,
    device: torch.device,
    *,
    before: Mapping[str, Call] | None = None,
    before_tokens: int = 0,
    repeats: int = 20,
) -> AttentionProfile:
    """Time one attention call, stage by stage, beside every dense kernel, on random data, batch 1.

    Args:
        shape: of the call.
        cfg: its settings.
        roof: of this machine.
        device: a GPU, or the CPU.
        before: dense calls of a shorter sequence, by name, from which long ones are worked out.
        before_tokens: its length.
        repeats: timed calls at most.

    Raises:
        UserError: see `check_size`.
        LighthouseError: what would be timed disagrees with plain PyTorch.
    """
    check_size(shape, cfg, device)
    there, absent = dense_kernels(device, shape)
    cfg, more = _resolved(cfg, shape, device, there)
    checks: dict[str, float] = {}
    for one in (cfg, *more):
        found = check_call(shape, one, device)
        checks |= {f"{what}, {one.dense_backend} inside": error for what, error in found.items()}
    checks |= {f"{kernel.name}, {TOKENS} tokens": kernel.error for kernel in there}
    parts = _stages(shape, cfg, roof, device, repeats) if cfg.pools and not cfg.window else []
    ours, *others = (profile_lighthouse(one, shape, device, repeats) for one in (cfg, *more))
    dense = [_dense(kernel, shape, device, repeats, (before or {}).get(kernel.name), before_tokens) for kernel in there]
    settings = {"batch": 1, "seq": shape.tokens, **asdict(shape), **asdict(cfg)}
    del settings["tokens"]
    if cfg.pools:
        settings["gathered_length"] = cfg.geometry(shape.tokens).gathered_length
    return AttentionProfile(
        settings=settings,
        checks=checks,
        stages=parts,
        lighthouse=ours,
        others=others,
        dense=sorted(dense, key=lambda call: call.both_ms.median),
        absent=absent,
        resident_gib=resident_gib(),
    )


def _resolved(
    cfg: LighthouseConfig, shape: Shape, device: torch.device, there: list[Kernel]
) -> tuple[LighthouseConfig, list[LighthouseConfig]]:
    """The settings with the backends that `auto` stands for; and the same by each other dense kernel, if that was
    `auto` and may be another."""
    dtype = getattr(torch, shape.dtype)
    if cfg.pools:
        ops = kernels(cfg.backend, device.type, dtype).__name__
        cfg = replace(cfg, backend=ops.rpartition(".")[2])
    if cfg.dense_backend != "auto":
        return cfg, []
    if cfg.rule.chooses_blocks:
        found = blocks_kernel("auto", device.type, dtype, shape.head_dim, cfg.tile, cfg.block_size)
        return replace(cfg, dense_backend=found.name), []
    if cfg.adds_parts or cfg.rule.windows:
        found = (windowed_kernel if cfg.rule.windows else parts_kernel)(
            cfg.dense_backend, device.type, dtype, shape.head_dim
        )
        return replace(cfg, dense_backend=found.name), []
    settings = [replace(cfg, dense_backend=kernel.name) for kernel in there if kernel.trains] or [cfg]
    return settings[0], settings[1:]


def _dense(
    kernel: Kernel, shape: Shape, device: torch.device, repeats: int, before: Call | None, before_tokens: int
) -> Call:
    """A dense kernel, measured; worked out from a shorter call where it would take over LIMIT_MS."""
    if before is None or before_tokens * _FRACTION < shape.tokens:
        before_tokens = max(1, shape.tokens // _FRACTION)
        short = replace(shape, tokens=before_tokens)
        before = profile_call(kernel.name, kernel.label, kernel.call, short, device, 3)
    longer = shape.tokens / before_tokens
    if before.both_ms.median * longer**2 <= LIMIT_MS:
        return profile_call(kernel.name, kernel.label, kernel.call, shape, device, repeats)
    return Call(
        kernel.name,
        kernel.label,
        _scaled(before.forward_ms, longer**2),
        _scaled(before.both_ms, longer**2),
        None if before.peak_gib is None else before.peak_gib * longer,
        before.extrapolated or before_tokens,
    )


def _scaled(sample: Sample, factor: float) -> Sample:
    return Sample(sample.median * factor, sample.p10 * factor, sample.p90 * factor, sample.calls)


def _stages(shape: Shape, cfg: LighthouseConfig, roof: Roof, device: torch.device, repeats: int) -> list[Stage]:
    """Every stage as it runs within one call, forward and backward."""
    q, k, v, grad = random_inputs(shape, device)
    key = torch.zeros(3, dtype=torch.int64, device=device)
    found = measure_parts(lambda: _one_by_one(q, k, v, grad, cfg, key), device, repeats=repeats)
    return [
        Stage(
            name,
            Pass.of(found[name, "forward"], forward, roof),
            Pass.of(found[name, "backward"], backward, roof) if (name, "backward") in found else None,
        )
        for name, (forward, backward) in stage_work(shape, cfg).items()
    ]


def _one_by_one(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, cfg: LighthouseConfig, key: Tensor
) -> Iterator[tuple[str, str]]:
    """What `lighthouse_attention` and its backward pass do, a stage a step; yields its name and its direction."""
    values: dict[str, Any] = {"q": q.requires_grad_(), "k": k.requires_grad_(), "v": v.requires_grad_()}
    done = []
    ops = kernels(cfg.backend, q.device.type, q.dtype)
    for stage in stages(q, k.shape[2], cfg, AttentionContext(key=key), cfg.geometry(q.shape[1]), ops):
        # Each stage begins with tensors of its own, so that its backward pass ends there.
        inputs = {name: _leaves(values[name]) for name in stage.reads}
        values[stage.writes] = stage.run(*inputs.values())
        done.append((stage, inputs, values[stage.writes]))
        yield stage.name, "forward"
    grads: dict[str, list[Tensor | None]] = {"out": [grad]}
    for stage, inputs, output in reversed(done):
        outputs = _differentiable(output)
        if not outputs:
            continue
        leaves = {name: _differentiable(value) for name, value in inputs.items()}
        flat = [leaf for several in leaves.values() for leaf in several]
        back = iter(torch.autograd.grad(outputs, flat, grads[stage.writes], allow_unused=True))
        grads |= {name: [next(back) for _ in several] for name, several in leaves.items()}
        yield stage.name, "backward"


def _differentiable(value: Any) -> list[Tensor]:
    """The tensors with a gradient in a value that a stage makes."""
    if isinstance(value, Tensor):
        return [value] if value.requires_grad else []
    return [x for part in value or () for x in _differentiable(part)]


def _leaves(value: Any) -> Any:
    """The same value, in which every tensor with a gradient begins a graph."""
    if isinstance(value, Tensor):
        return value.detach().requires_grad_() if value.requires_grad else value
    if value is None:
        return None
    parts = map(_leaves, value)
    # Of a plain tuple, or of one with names.
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
