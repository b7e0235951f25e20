"""Attention within packed documents, beside the same calls over one document, on one GPU of 80 GB, in two minutes.

98304 tokens, batch 1, 8 heads of 128, bfloat16: as one document, as 100 of equal length, and as documents whose lengths
are drawn log-uniformly from 64 tokens to the whole sequence. Each call is checked before it is timed: at 8192 tokens,
output and gradients against plain PyTorch in float32, with what plain PyTorch loses in bfloat16 as the measure; at
98304, that another document in place of one changes no bit of the others' output. Times are medians, by the clock of
`lighthouse profile`. "Keys" is what a query attends to on average, gathered rows of a pyramid counted with their share.
"""

import argparse
import json
import platform
import random
import sys
from dataclasses import replace
from itertools import pairwise

import torch
import triton

from lighthouse_core import LighthouseConfig, dense_attention, lighthouse_attention
from lighthouse_core.attention import Documents
from lighthouse_core.attention.dense.call import KERNELS
from lighthouse_core.profile.attention import profile_call
from lighthouse_core.profile.dense import random_inputs
from lighthouse_core.profile.work import Shape

DEVICE = torch.device("cuda")
REPEATS = 20
HEADS, DIM = 8, 128
TOKENS, CHECKED = 98304, 8192
PYRAMID = {"levels": 3, "window": 512, "backend": "triton"}
CALLS = {
    "dense": None,
    "pyramid, norm, window 512": PYRAMID | {"topk": 1536},
    "pyramid, block, window 512": PYRAMID | {"topk": 1536, "scorer": "block"},
    "sliding, window 1024": {"method": "sliding", "window": 1024},
    "chunked, window 2048": {"method": "chunked", "window": 2048},
}
KEY = torch.tensor([0, 1, 2, 0], device=DEVICE)


def shape(tokens: int) -> Shape:
    return Shape(tokens, heads=HEADS, kv_heads=HEADS, head_dim=DIM, dtype="bfloat16")


def equal(tokens: int, align: int = 16) -> list[int]:
    """100 documents of a whole number of the pyramid's windows, and a rest."""
    length = max(align, tokens // 100 // align * align)
    starts = list(range(0, tokens, length))
    return [*starts, tokens]


def drawn(tokens: int, align: int = 16) -> list[int]:
    """Log-uniform lengths, in whole windows of the pyramid; the last document is cut off."""
    draw, starts = random.Random(0), [0]
    while starts[-1] < tokens:
        length = int(64 * (tokens / 64) ** draw.random())
        starts.append(starts[-1] + max(align, length // align * align))
    return [*starts[:-1], tokens]


def documents(bounds: list[int]) -> Documents:
    longest = max(b - a for a, b in pairwise(bounds))
    return Documents(torch.tensor(bounds, dtype=torch.int32, device=DEVICE), 1 << (longest - 1).bit_length())


def settings(name: str, tokens: int, dense_backend: str) -> LighthouseConfig | None:
    given = CALLS[name]
    if given is None:
        return None
    if "topk" in given:
        given = given | {"topk": given["topk"] * tokens // TOKENS}
    return LighthouseConfig(dense_backend=dense_backend, **given)


def caller(cfg: LighthouseConfig | None, dense_backend: str, found: Documents | None):
    if cfg is None:
        return lambda q, k, v: dense_attention(q, k, v, backend=dense_backend, documents=found)
    return lambda q, k, v: lighthouse_attention(q, k, v, cfg, key=KEY, documents=found)


def check(name: str, dense_backend: str, layout) -> float:
    """The largest relative error beside what plain PyTorch loses; one too large ends the process."""
    found, cfg = documents(layout(CHECKED)), settings(name, CHECKED, dense_backend)
    *qkv, grad = random_inputs(shape(CHECKED), DEVICE)
    plain = cfg and replace(cfg, backend="reference", dense_backend="math")
    if cfg is not None and cfg.scorer == "norm":
        # By its own norms, whose last bit depends on the order of addition: the same selection for all.
        from lighthouse_core import select_indices

        indices = select_indices(qkv[0], qkv[1], cfg) if cfg.pools else None
    else:
        indices = None

    def results(cfg, backend, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in qkv]
        if cfg is None:
            out = dense_attention(*leaves, backend=backend, documents=found)
        else:
            out = lighthouse_attention(*leaves, cfg, key=KEY, documents=found, indices=indices)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    truth = results(plain, "math", torch.float32)
    worst = 0.0
    ours, lost = results(cfg, dense_backend, torch.bfloat16), results(plain, "math", torch.bfloat16)
    for what, x, y, exact in zip(("out", "dq", "dk", "dv"), ours, lost, truth, strict=True):
        error, allowed = (((z.float() - exact).norm() / exact.norm()).item() for z in (x, y))
        if not error <= 4 * allowed + 1e-3:
            sys.exit(f"{name}, {dense_backend}: relative error of {what} is {error:.2e}, plain PyTorch's {allowed:.2e}")
        worst = max(worst, error)
    # No bit of another document.
    bounds = layout(TOKENS)
    call = caller(settings(name, TOKENS, dense_backend), dense_backend, documents(bounds))
    if "norm" not in name and len(bounds) > 2:
        *qkv, _ = random_inputs(shape(TOKENS), DEVICE)
        start, end = bounds[len(bounds) // 2 - 1 : len(bounds) // 2 + 1]
        other = [x.clone() for x in qkv]
        for x in other:
            x[:, start:end].normal_()
        before, after = call(*qkv), call(*other)
        if not (torch.equal(before[:, :start], after[:, :start]) and torch.equal(before[:, end:], after[:, end:])):
            sys.exit(f"{name}, {dense_backend}: a document depends on another one")
    return worst


def keys(name: str, bounds: list[int]) -> float:
    cfg = settings(name, TOKENS, "auto")
    seen = 0.0
    for start, end in pairwise(bounds):
        length = end - start
        place = {} if length == TOKENS else {"length": length, "first": start}
        seen += length * (length / 2 if cfg is None else cfg.keys(TOKENS, **place))
    return seen / TOKENS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument(
        "--kernels", nargs="+", default=["fa4", "varlen"], help="dense kernels; those that are not there are left out"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    layouts = {"one": lambda tokens: [0, tokens], "100 equal": equal, "log-uniform": drawn}
    result = {
        "machine": {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
        },
        "tokens": TOKENS,
        "documents": {name: len(layout(TOKENS)) - 1 for name, layout in layouts.items()},
        "rows": [],
    }
    lines = [
        "| call | kernel | documents | keys | forward ms | forward + backward ms | beside one document | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kernel in arguments.kernels:
        if why_not := KERNELS[kernel].obstacle("cuda", torch.bfloat16, DIM):
            print(f"{kernel} {why_not}", flush=True)
            continue
        for name in CALLS:
            whole = None
            for how, layout in layouts.items():
                error = check(name, kernel, layout)
                bounds = layout(TOKENS)
                found = None if how == "one" else documents(bounds)
                timed = profile_call(
                    kernel, name, caller(settings(name, TOKENS, kernel), kernel, found), shape(TOKENS), DEVICE, REPEATS
                )
                row = {
                    "call": name,
                    "kernel": kernel,
                    "documents": how,
                    "keys": keys(name, bounds),
                    "forward_ms": timed.forward_ms.median,
                    "both_ms": timed.both_ms.median,
                    "error": error,
                }
                whole = whole or row
                result["rows"].append(row)
                lines.append(
                    f"| {name} | {kernel} | {how} | {row['keys']:.0f} | {row['forward_ms']:.2f} | {row['both_ms']:.2f} "
                    f"| {row['both_ms'] / whole['both_ms']:.2f} | {error:.1e} |"
                )
                print(lines[-1], flush=True)
                if arguments.out:
                    with open(arguments.out, "w", encoding="utf-8") as file:
                        json.dump(result, file, indent=1)
    print(f"\n{result['machine']}\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
