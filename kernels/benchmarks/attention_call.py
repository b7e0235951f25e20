"""The Lighthouse attention call beside dense attention, on one GPU.

    python kernels/benchmarks/attention_call.py [--out FILE.json] [--only 98304 ...] [--dense-up-to N]

Every shape is checked before it is timed: one head's output and gradients against plain PyTorch in float32, with what
plain PyTorch loses in bfloat16 as the measure. Batch 1, 8 heads of 128, bfloat16, the norm scorer. Times are medians
between CUDA events around each call, called one after the other as in training, with the L2 cache overwritten before
each. Stages are the device time of our kernels in torch's profiler.
"""

import argparse
import json
import platform
import statistics
import sys
from dataclasses import replace

import torch
import triton
from torch.profiler import ProfilerActivity, profile

from lighthouse_core import LighthouseConfig, dense_attention, gathered_length, lighthouse_attention, select_indices
from lighthouse_core.attention import flash

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


def milliseconds(call) -> float:
    """Median of 20 calls after two that do not count; of 3 where one takes over 0.1 s, the second where over 1 s."""
    l2 = torch.empty(2**28, dtype=torch.int8, device="cuda")

    def times(repeats):
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            l2.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    times(1)
    (second,) = times(1)
    if second > 1000:
        return second
    return statistics.median(times(3 if second > 100 else 20))


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


def check(tokens: int, cfg: LighthouseConfig) -> dict[str, dict[str, float]]:
    """Relative errors of one head, ours and plain PyTorch's; ends the process if ours are more than twice as large."""
    qkv, grad = inputs(tokens, heads=1)
    indices = select_indices(*qkv[:2], cfg)
    plain = replace(cfg, backend="reference")

    def results(cfg, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in qkv]
        out = lighthouse_attention(*leaves, cfg, indices=indices)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    truth = results(replace(plain, dense_backend="auto"), torch.float32)
    errors = {}
    for name, config in (("ours", cfg), ("plain", plain)):
        pairs = zip(results(config, torch.bfloat16), truth, strict=True)
        values = [((x.float() - y).norm() / y.norm()).item() for x, y in pairs]
        errors[name] = dict(zip(("out", "dq", "dk", "dv"), values, strict=True))
    for what, error in errors["ours"].items():
        if not error <= 2 * errors["plain"][what] + 1e-6:
            sys.exit(
                f"N = {tokens}: relative error of {what} is {error:.2e}, plain PyTorch's {errors['plain'][what]:.2e}"
            )
    return errors


def stages(call, qkv, grad) -> dict[str, float]:
    """Milliseconds of our kernels in one forward and backward pass."""
    both_ways(call, qkv, grad)
    repeats = 5
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(repeats):
            both_ways(call, qkv, grad)
        torch.cuda.synchronize()
    spent = {event.key: event.self_device_time_total / repeats / 1e3 for event in seen.key_averages()}
    return {stage: spent[kernel] for stage, kernel in KERNELS.items()}


def floors(tokens: int, cfg: LighthouseConfig, rate: float) -> float:
    """Milliseconds that the least traffic outside the dense call takes at the measured copy rate.

    Forward 4N + 6c + 3m + 4S rows, backward 4N + 4S, with c the coarsest windows and m the rows under finer windows.
    """
    row = 2 * HEADS * DIM
    entries = gathered_length(tokens, cfg)
    coarse = entries - (cfg.levels - 1) * cfg.pooling * cfg.topk
    touched = cfg.pooling ** (cfg.levels - 1) * cfg.topk
    rows = 8 * tokens + 6 * coarse + 3 * touched + 8 * entries
    return rows * row / rate * 1e3


def measure(tokens: int, dense_up_to: int, rate: float) -> dict:
    levels, topk = SHAPES[tokens]
    cfg = LighthouseConfig(levels=levels, topk=topk, backend="triton", dense_backend="cudnn")
    row = {"N": tokens, "S": gathered_length(tokens, cfg), "levels": levels, "topk": topk, "check": check(tokens, cfg)}
    print(f"N = {tokens}: check passed, relative error of the output {row['check']['ours']['out']:.1e}", flush=True)
    qkv, grad = inputs(tokens)
    backends = ["cudnn"] + ["fa4"] * flash.INSTALLED
    for backend in backends:
        chosen = replace(cfg, dense_backend=backend)

        def call(*x, chosen=chosen):
            return lighthouse_attention(*x, chosen)

        with torch.no_grad():
            forward = milliseconds(lambda: call(*qkv))
        row[backend] = {
            "forward_ms": forward,
            "both_ms": both_ways_ms(call, qkv, grad),
            "peak_gib": peak_gib(lambda: both_ways(call, qkv, grad)),
        }

        def dense(*x, backend=backend):
            return dense_attention(*x, backend=backend)

        row[backend]["dense_call_ms"] = both_ways_ms(dense, *inputs(row["S"]))
        if tokens <= dense_up_to:
            with torch.no_grad():
                row[backend]["dense_forward_ms"] = milliseconds(lambda: dense(*qkv))
            row[backend]["dense_both_ms"] = both_ways_ms(dense, qkv, grad)
    row["stages_ms"] = stages(lambda *x: lighthouse_attention(*x, cfg), qkv, grad)
    row["outside_ms"] = sum(row["stages_ms"].values())
    row["floor_ms"] = floors(tokens, cfg, rate)
    return row


def table(rows: list[dict]) -> str:
    lines = [
        "| N | S | dense kernel | fwd ms | fwd+bwd ms | dense fwd+bwd ms | ratio | peak GiB | stages ms | floor ms |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for backend in ("cudnn", "fa4"):
            if backend not in row:
                continue
            r = row[backend]
            dense = r.get("dense_both_ms")
            against = f"{dense:.1f} | {dense / r['both_ms']:.1f}x" if dense else "- | -"
            lines.append(
                f"| {row['N']} | {row['S']} | {backend} | {r['forward_ms']:.2f} | {r['both_ms']:.2f} | {against} "
                f"| {r['peak_gib']:.2f} | {row['outside_ms']:.2f} | {row['floor_ms']:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--only", type=int, nargs="+", choices=SHAPES, default=list(SHAPES), help="sequence lengths")
    parser.add_argument("--dense-up-to", type=int, default=524288, help="longest sequence to time dense attention at")
    arguments = parser.parse_args()
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
