"""The Lighthouse attention call beside dense attention, on one GPU of 80 GB, in about two minutes.

Every shape is checked before it is timed. The selection must be that of plain PyTorch from the same scores. The call as
it is timed, with each dense kernel, is compared with plain PyTorch in float32, output and gradients, with what plain
PyTorch loses in bfloat16 as the measure; all heads up to 131072 tokens, one head beyond.

Batch 1, 8 heads of 128, bfloat16, the norm scorer. Times are medians between CUDA events around each call, called one
after the other as in training, the host ahead of the GPU, with the L2 cache overwritten before each. "Stages" is the
device time of one call in torch's profiler, of all kernels, fills and copies but those that the dense call alone (by
cuDNN) has, too.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from dataclasses import replace

import torch
import triton
from torch.profiler import ProfilerActivity, profile

from lighthouse_core import LighthouseConfig, dense_attention, gathered_length, lighthouse_attention, select_indices
from lighthouse_core.attention import flash
from lighthouse_core.backends import geometry, kernels

HEADS, DIM = 8, 128
# N: levels, parents a level.
SHAPES = {32768: (3, 1024), 98304: (3, 1536), 131072: (3, 2048), 524288: (4, 2048), 1048576: (5, 2048)}
KERNELS = {
    "pyramid": "_reduce_kernel",
    "select": "_select_kernel",
    "gather": "_gather_kernel",
    "scatter": "_scatter_kernel",
    "scatter backward": "_scatter_backward_kernel",
    "gather backward": "_gather_backward_kernel",
}


def milliseconds(call, prepare=tuple) -> float:
    """Median of 20 calls after two that do not count; of 3 where one takes over 0.1 s, the second where over 1 s.

    What `prepare` returns is given to the call, which is timed without it.
    """
    l2 = torch.empty(2**28, dtype=torch.int8, device="cuda")

    def times(repeats, ahead):
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        # So many seconds, at most 3 GHz: else short calls would be as fast as the host calls them, and in training it
        # has work queued.
        torch.cuda._sleep(int(ahead * 3e9))
        began = time.monotonic()
        for start, end in events:
            l2.zero_()
            given = prepare()
            start.record()
            call(*given)
            end.record()
        took = time.monotonic() - began
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events], took

    times(1, 0.05)
    (second,), _ = times(1, 0.05)
    if second > 1000:
        return second
    repeats, ahead = 3 if second > 100 else 20, 0.05
    found, took = times(repeats, ahead)
    while took > ahead:
        if ahead > 1:
            sys.exit(f"the host took {took:.1f} s to make {repeats} calls: they would be timed by it")
        ahead = 2 * took
        found, took = times(repeats, ahead)
    return statistics.median(found)


def peak_gib(call) -> float:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def copy_rate() -> float:
    """Bytes read and written a second by a copy of 2 GiB."""
    x = torch.empty(2**30, dtype=torch.bfloat16, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / (milliseconds(lambda: y.copy_(x)) / 1e3)


def inputs(tokens: int, heads: int = HEADS) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)

    def draw():
        return torch.randn(1, tokens, heads, DIM, device="cuda", dtype=torch.bfloat16, generator=generator)

    return [draw().requires_grad_() for _ in range(3)], draw()


def both_ways(call, qkv, grad):
    return torch.autograd.grad(call(*qkv), qkv, grad)


def both_ways_ms(call, qkv, grad) -> float:
    return milliseconds(lambda: both_ways(call, qkv, grad))


def check(tokens: int, cfg: LighthouseConfig, backends: list[str]) -> dict[str, dict[str, float]]:
    """Relative errors of the call with each dense kernel, and plain PyTorch's; one too large ends the process."""
    qkv, grad = inputs(tokens, HEADS if tokens <= 131072 else 1)
    q, k, _ = qkv
    plain = replace(cfg, backend="reference")
    scores = tuple(x.detach().float().norm(dim=-1) for x in (q, k))
    if not torch.equal(select_indices(q, k, cfg, scores=scores), select_indices(q, k, plain, scores=scores)):
        sys.exit(f"N = {tokens}: the selection is not that of plain PyTorch")
    indices = select_indices(q, k, cfg)
    # By its own norms, whose last bit depends on the order of addition.
    pairs = zip(indices.flatten(0, 1), select_indices(q, k, plain).flatten(0, 1), strict=True)
    shared = min(torch.isin(ours, theirs).float().mean().item() for ours, theirs in pairs)
    if shared < 0.999:
        sys.exit(f"N = {tokens}: only {shared:.1%} of the selection is that of plain PyTorch")

    def results(cfg, dtype, **given):
        leaves = [x.detach().to(dtype).requires_grad_() for x in qkv]
        out = lighthouse_attention(*leaves, cfg, **given)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    truth = results(replace(plain, dense_backend="auto"), torch.float32, indices=indices)

    def error(config, **given):
        values = zip(results(config, torch.bfloat16, **given), truth, strict=True)
        values = [((x.float() - y).norm() / y.norm()).item() for x, y in values]
        return dict(zip(("out", "dq", "dk", "dv"), values, strict=True))

    errors = {"plain": error(replace(plain, dense_backend="cudnn"), indices=indices)}
    for backend in backends:
        errors[backend] = error(replace(cfg, dense_backend=backend))
        for what, value in errors[backend].items():
            if not value <= 2 * errors["plain"][what] + 1e-6:
                sys.exit(
                    f"N = {tokens}, {backend}: relative error of {what} is {value:.2e}, "
                    f"plain PyTorch's {errors['plain'][what]:.2e}"
                )
    return errors


def device_ms(call, qkv, grad) -> dict[str, float]:
    """Milliseconds of every kernel, fill and copy of one forward and backward pass, and of overwriting the cache."""
    both_ways(call, qkv, grad)
    l2 = torch.empty(2**28, dtype=torch.int8, device="cuda")
    repeats = 5
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(repeats):
            l2.zero_()
            both_ways(call, qkv, grad)
        torch.cuda.synchronize()
    return {event.key: event.self_device_time_total / repeats / 1e3 for event in seen.key_averages()}


def stages(tokens: int, cfg: LighthouseConfig) -> dict[str, float]:
    """Milliseconds of our kernels in one forward and backward pass, and of the rest outside the dense call."""
    whole = device_ms(lambda *x: lighthouse_attention(*x, cfg), *inputs(tokens))
    dense = device_ms(lambda *x: dense_attention(*x, backend="cudnn"), *inputs(gathered_length(tokens, cfg)))
    named = {stage: whole.pop(kernel) for stage, kernel in KERNELS.items()}
    return named | {"rest": sum(ms for name, ms in whole.items() if name not in dense)}


def selection_ms(tokens: int, cfg: LighthouseConfig) -> float:
    """Between events, in the midst of whole calls: a profiler leaves out what lies between the selection's two kernels.

    Among pyramids alone it takes less, for the dense call lowers the clock: results/2026-11-27-h100-clock.json.
    """
    g, ops = geometry(tokens, cfg), kernels("triton", "cuda")
    qkv, grad = inputs(tokens)

    def prepare():
        both_ways(lambda *x: lighthouse_attention(*x, cfg), qkv, grad)
        return (ops.pyramid(*(x.detach() for x in qkv), g, scored=True).scores,)

    return milliseconds(lambda scores: ops.select(scores, g), prepare)


def floors(tokens: int, cfg: LighthouseConfig, rate: float) -> float:
    """Milliseconds that the least traffic outside the dense call takes at the measured copy rate.

    Forward 4N + 3w + 3r + 4S rows of one tensor, backward 4N + 4S, with w rows of pooled windows stored, and r of them
    and of tokens read again for the windows that are kept. Storing more levels makes w larger and r smaller.
    """
    g = geometry(tokens, cfg)

    def pooled(first: int) -> int:
        """w + r where the levels from this one on are stored."""
        stored = sum(g.windows(level) for level in range(first, g.levels))
        kept = g.windows(g.levels - 1) + (g.levels - 1 - first) * g.pooling * g.topk
        return stored + kept + g.topk * g.window(first)

    rows = 8 * tokens + 3 * min(map(pooled, range(1, g.levels))) + 8 * g.selected_length
    return rows * 2 * HEADS * DIM / rate * 1e3


def measure_backend(tokens: int, cfg: LighthouseConfig, with_dense: bool) -> dict[str, float]:
    """Times and memory of the call, times of its dense call alone and, if asked for, of dense attention."""

    def call(*x):
        return lighthouse_attention(*x, cfg)

    def dense(*x):
        return dense_attention(*x, backend=cfg.dense_backend)

    qkv, grad = inputs(tokens)
    row = {}
    with torch.no_grad():
        row["forward_ms"] = milliseconds(lambda: call(*qkv))
    row["both_ms"] = both_ways_ms(call, qkv, grad)
    row["peak_gib"] = peak_gib(lambda: both_ways(call, qkv, grad))
    row["dense_call_ms"] = both_ways_ms(dense, *inputs(gathered_length(tokens, cfg)))
    if with_dense:
        with torch.no_grad():
            row["dense_forward_ms"] = milliseconds(lambda: dense(*qkv))
        row["dense_both_ms"] = both_ways_ms(dense, qkv, grad)
    return row


def measure(tokens: int, dense_up_to: int, rate: float) -> dict:
    start = time.monotonic()
    levels, topk = SHAPES[tokens]
    cfg = LighthouseConfig(levels=levels, topk=topk, backend="triton", dense_backend="cudnn")
    backends = ["cudnn"] + ["fa4"] * flash.INSTALLED
    row = {"N": tokens, "S": gathered_length(tokens, cfg), "levels": levels, "topk": topk}
    row["check"] = check(tokens, cfg, backends)
    error = row["check"]["cudnn"]["out"]
    print(f"N = {tokens}: check passed in {time.monotonic() - start:.0f} s, relative error {error:.1e}", flush=True)
    for backend in backends:
        row[backend] = measure_backend(tokens, replace(cfg, dense_backend=backend), tokens <= dense_up_to)
    row["stages_ms"] = stages(tokens, cfg)
    row["selection_ms"] = selection_ms(tokens, cfg)
    row["outside_ms"] = sum(row["stages_ms"].values())
    row["floor_ms"] = floors(tokens, cfg, rate)
    print(f"N = {tokens}: measured after {time.monotonic() - start:.0f} s", flush=True)
    return row


def table(rows: list[dict]) -> str:
    lines = [
        "| N | S | level 0 | dense kernel | forward ms | forward + backward ms | dense call alone "
        "| dense attention ms | ratio | peak GiB | stages ms | floor ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for backend in ("cudnn", "fa4"):
            if backend not in row:
                continue
            r, share = row[backend], LighthouseConfig.pooling * row["topk"] / row["N"]
            dense = r.get("dense_both_ms")
            lines.append(
                f"| {row['N']} | {row['S']} | {share:.1%} | {backend} | {r['forward_ms']:.2f} | {r['both_ms']:.2f} "
                f"| {r['dense_call_ms']:.2f} | "
                + (f"{dense:.1f} | {dense / r['both_ms']:.1f}x" if dense else "- | -")
                + f" | {r['peak_gib']:.2f} | {row['outside_ms']:.2f} | {row['floor_ms']:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--only", type=int, nargs="+", choices=SHAPES, default=list(SHAPES), help="sequence lengths")
    parser.add_argument("--dense-up-to", type=int, default=524288, help="longest sequence to time dense attention at")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    rate = copy_rate()
    result = {
        "machine": {
            "device": torch.cuda.get_device_name(),
            "copy_bytes_per_second": rate,
            "torch": torch.__version__,
            "cudnn": torch.backends.cudnn.version(),
            "triton": triton.__version__,
            "python": platform.python_version(),
        },
        "rows": [],
    }
    for tokens in arguments.only:
        result["rows"].append(measure(tokens, arguments.dense_up_to, rate))
        torch.cuda.empty_cache()
        if arguments.out:
            with open(arguments.out, "w", encoding="utf-8") as file:
                json.dump(result, file, indent=1)
    print(f"\n{result['machine']}\n\n{table(result['rows'])}")


if __name__ == "__main__":
    main()
