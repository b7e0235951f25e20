"""The methods of stage 1 side by side: one attention call forward and backward, by FlashAttention-4, on one GPU.

Each is first checked at 8192 tokens against itself by plain matrix products in float32, output and gradients, with what
these lose in bfloat16 as the measure. Inputs and timing are those of attention_call.py.
"""

import argparse
import json
import sys
from dataclasses import replace

import torch
from attention_call import both_ways, both_ways_ms, inputs, peak_gib

from lighthouse_core import LighthouseConfig, dense_attention, lighthouse_attention, select_indices

CHECKED = 8192
# Of the random draws.
KEY = (0, 0, 0)


def methods(tokens: int) -> dict[str, LighthouseConfig]:
    """At the ratios of recipes/evidence: k = N / 64, about 1000 keys a query at 16384 tokens."""
    topk = tokens // 64
    return {
        "norm": LighthouseConfig(topk=topk),
        "block": LighthouseConfig(topk=topk, scorer="block"),
        "block-window": LighthouseConfig(topk=topk, scorer="block", window=512),
        "kept": LighthouseConfig(method="compressed", window=512, compression=32, keep=32),
        "compressed": LighthouseConfig(method="compressed", window=512),
        "sliding": LighthouseConfig(method="sliding", window=1024),
        "chunked": LighthouseConfig(method="chunked", window=2048),
    }


def check(name: str, cfg: LighthouseConfig) -> float:
    """The largest relative error of output and gradients; one too large ends the process."""
    qkv, grad = inputs(CHECKED)
    given = {"key": torch.tensor(KEY, device="cuda")}
    if cfg.method == "pyramid":
        # The last bit of a norm depends on the order of addition.
        given["indices"] = select_indices(*qkv[:2], cfg, key=given["key"])

    def results(cfg: LighthouseConfig, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in qkv]
        out = lighthouse_attention(*leaves, cfg, **given)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    plain = replace(cfg, backend="reference", dense_backend="math")
    truth = results(plain, torch.float32)

    def errors(cfg: LighthouseConfig) -> list[float]:
        found = zip(results(cfg, torch.bfloat16), truth, strict=True)
        return [((x.float() - y).norm() / y.norm()).item() for x, y in found]

    fused, usual = errors(replace(cfg, dense_backend="fa4")), errors(plain)
    if any(not a <= 2 * b + 5e-3 for a, b in zip(fused, usual, strict=True)):
        sys.exit(f"{name}: relative errors {fused}, those of plain matrix products {usual}")
    return max(fused)


def measure(tokens: int, cfg: LighthouseConfig) -> tuple[float, float]:
    """Milliseconds forward and backward, and peak GiB."""
    cfg, key = replace(cfg, dense_backend="fa4"), torch.tensor(KEY, device="cuda")

    def call(*x: torch.Tensor) -> torch.Tensor:
        return lighthouse_attention(*x, cfg, key=key)

    qkv, grad = inputs(tokens)
    return both_ways_ms(call, qkv, grad), peak_gib(lambda: both_ways(call, qkv, grad))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 65536, 98304], help="sequence lengths")
    parser.add_argument("--out", help="JSON file to write")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    errors = {name: check(name, cfg) for name, cfg in methods(CHECKED).items()}
    print("check passed, relative errors: " + ", ".join(f"{name} {e:.1e}" for name, e in errors.items()), flush=True)
    rows = []
    for tokens in arguments.tokens:
        dense = both_ways_ms(lambda *x: dense_attention(*x, backend="fa4"), *inputs(tokens))
        for name, cfg in methods(tokens).items():
            ms, gib = measure(tokens, cfg)
            rows.append({"N": tokens, "method": name, "both_ms": ms, "dense_both_ms": dense, "peak_gib": gib})
            print(
                f"{tokens:7} {name:13} {ms:7.2f} ms, dense {dense:6.1f}, {dense / ms:5.1f}x, {gib:5.2f} GiB", flush=True
            )
    if arguments.out:
        result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "errors": errors, "rows": rows}
        with open(arguments.out, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
