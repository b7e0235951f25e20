"""The methods of stage 1 side by side: one attention call forward and backward, by FlashAttention-4, on one GPU.

Checks, inputs and clock are those of `lighthouse profile`: nothing is timed that is not what plain PyTorch gives.
"""

import argparse
import json

import torch

from lighthouse_core import LighthouseConfig
from lighthouse_core.attention.dense.call import KERNELS
from lighthouse_core.attention.methods import METHODS
from lighthouse_core.profile.attention import profile_call, profile_lighthouse
from lighthouse_core.profile.check import check_call
from lighthouse_core.profile.work import Shape

CHECKED, REPEATS = 8192, 20


def examples(tokens: int, dense_backend: str) -> dict[str, LighthouseConfig]:
    """Settings of every method, by a short name each."""
    return {
        name: LighthouseConfig(method=method.name, **settings, dense_backend=dense_backend)
        for method in METHODS.values()
        for name, settings in method.examples(tokens).items()
    }


def shape(tokens: int) -> Shape:
    return Shape(tokens, heads=8, kv_heads=8, head_dim=128, dtype="bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 65536, 98304], help="sequence lengths")
    parser.add_argument("--dense-backend", default="fa4", help="inside the calls, and beside them")
    parser.add_argument("--out", help="JSON file to write")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    device, kernel = torch.device("cuda"), KERNELS[arguments.dense_backend]
    errors = {
        name: max(check_call(shape(CHECKED), cfg, device).values())
        for name, cfg in examples(CHECKED, kernel.name).items()
    }
    print("check passed, relative errors: " + ", ".join(f"{name} {e:.1e}" for name, e in errors.items()), flush=True)
    rows = []
    for tokens in arguments.tokens:
        dense = profile_call(
            kernel.name, kernel.label, lambda *x: kernel.forward(*x, None), shape(tokens), device, REPEATS
        ).both_ms.median
        for name, cfg in examples(tokens, kernel.name).items():
            call = profile_lighthouse(cfg, shape(tokens), device, REPEATS)
            ms, gib = call.both_ms.median, call.peak_gib
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
