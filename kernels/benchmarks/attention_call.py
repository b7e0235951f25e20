"""The Lighthouse attention call beside dense attention, on one GPU of 80 GB, in about two minutes.

Checks, inputs and clock are those of `lighthouse profile`: before a shape is timed, output and gradients are compared
with plain PyTorch in float32. What this adds is the device time outside of the dense call, beside the least that its
traffic could take.

Batch 1, 8 heads of 128, bfloat16, the norm scorer. Times are medians. "Stages" is the device time of one call in the
profiler of torch, of all kernels, fills and copies but those that the dense call alone (by cuDNN) has, too.
"""

import argparse
import json
import platform
import time
from dataclasses import replace

import torch
import triton
from torch.profiler import ProfilerActivity, profile

from lighthouse_core import LighthouseConfig, dense_attention, gathered_length, lighthouse_attention
from lighthouse_core.attention.backends import kernels
from lighthouse_core.attention.dense.call import KERNELS
from lighthouse_core.profile.attention import Call, profile_call, profile_lighthouse
from lighthouse_core.profile.check import check_call
from lighthouse_core.profile.dense import random_inputs
from lighthouse_core.profile.machine import roof
from lighthouse_core.profile.timing import measure_parts
from lighthouse_core.profile.work import Shape

DEVICE = torch.device("cuda")
REPEATS = 20
HEADS, DIM = 8, 128
# N: levels, parents a level.
SHAPES = {32768: (3, 1024), 98304: (3, 1536), 131072: (3, 2048), 524288: (4, 2048), 1048576: (5, 2048)}
NAMES = {
    "pyramid": "_reduce_kernel",
    "select": "_select_kernel",
    "gather": "_gather_kernel",
    "scatter": "_scatter_kernel",
    "scatter backward": "_scatter_backward_kernel",
    "gather backward": "_gather_backward_kernel",
}


def shape(tokens: int) -> Shape:
    return Shape(tokens, heads=HEADS, kv_heads=HEADS, head_dim=DIM, dtype="bfloat16")


def both_ways(call, qkv, grad):
    return torch.autograd.grad(call(*qkv), qkv, grad)


def device_ms(call, tokens: int) -> dict[str, float]:
    """Milliseconds of every kernel, fill and copy of one forward and backward pass, and of overwriting the cache."""
    *inputs, grad = random_inputs(shape(tokens), DEVICE)
    qkv = [x.requires_grad_() for x in inputs]
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
    whole = device_ms(lambda *x: lighthouse_attention(*x, cfg), tokens)
    dense = device_ms(lambda *x: dense_attention(*x, backend="cudnn"), gathered_length(tokens, cfg))
    named = {stage: whole.pop(kernel) for stage, kernel in NAMES.items()}
    return named | {"rest": sum(ms for name, ms in whole.items() if name not in dense)}


def selection_ms(tokens: int, cfg: LighthouseConfig) -> float:
    """Between events, in the midst of whole calls: a profiler leaves out what lies between the selection's two kernels.

    Among pyramids alone it takes less, for the dense call lowers the clock: results/2026-11-27-h100-clock.json.
    """
    g, ops = cfg.geometry(tokens), kernels("triton", "cuda")
    *qkv, grad = random_inputs(shape(tokens), DEVICE)
    leaves = [x.requires_grad_() for x in qkv]

    def parts():
        both_ways(lambda *x: lighthouse_attention(*x, cfg), leaves, grad)
        scores = ops.pyramid(*(x.detach() for x in qkv), g, scored=True).scores
        yield "before"
        ops.select(scores, g)
        yield "select"

    return measure_parts(parts, DEVICE)["select"].median


def floors(tokens: int, cfg: LighthouseConfig, rate: float) -> float:
    """Milliseconds that the least traffic outside the dense call takes at the measured copy rate.

    Forward 4N + 3w + 3r + 4S rows of one tensor, backward 4N + 4S, with w rows of pooled windows stored, and r of them
    and of tokens read again for the windows that are kept. Storing more levels makes w larger and r smaller.
    """
    g = cfg.geometry(tokens)

    def pooled(first: int) -> int:
        """w + r where the levels from this one on are stored."""
        stored = sum(g.windows(level) for level in range(first, g.levels))
        kept = g.windows(g.levels - 1) + (g.levels - 1 - first) * g.pooling * g.topk
        return stored + kept + g.topk * g.window(first)

    rows = 8 * tokens + 3 * min(map(pooled, range(1, g.levels))) + 8 * g.selected_length
    return rows * 2 * HEADS * DIM / rate * 1e3


def measure_backend(tokens: int, cfg: LighthouseConfig, with_dense: bool) -> dict[str, float]:
    """Times and memory of the call, times of its dense call alone and, if asked for, of dense attention."""
    kernel = KERNELS[cfg.dense_backend]

    def dense(tokens: int) -> Call:
        return profile_call(
            kernel.name, kernel.label, lambda *x: kernel.forward(*x, None), shape(tokens), DEVICE, REPEATS
        )

    ours = profile_lighthouse(cfg, shape(tokens), DEVICE, REPEATS)
    row = {"forward_ms": ours.forward_ms.median, "both_ms": ours.both_ms.median, "peak_gib": ours.peak_gib}
    row["dense_call_ms"] = dense(gathered_length(tokens, cfg)).both_ms.median
    if with_dense:
        other = dense(tokens)
        row |= {"dense_forward_ms": other.forward_ms.median, "dense_both_ms": other.both_ms.median}
    return row


def measure(tokens: int, dense_up_to: int, rate: float) -> dict:
    start = time.monotonic()
    levels, topk = SHAPES[tokens]
    cfg = LighthouseConfig(levels=levels, topk=topk, backend="triton", dense_backend="cudnn")
    backends = ["cudnn"] + ["fa4"] * (KERNELS["fa4"].absence("cuda") is None)
    row = {"N": tokens, "S": gathered_length(tokens, cfg), "levels": levels, "topk": topk}
    row["check"] = {name: check_call(shape(tokens), replace(cfg, dense_backend=name), DEVICE) for name in backends}
    error = max(max(errors.values()) for errors in row["check"].values())
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
    rate = roof(DEVICE, torch.bfloat16).bytes_per_second
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
