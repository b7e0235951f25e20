"""Dense attention of a sequence that GPUs share: by heads, as here, beside the ring attention of torch.

    torchrun --nproc-per-node 2 kernels/benchmarks/context.py --tokens 98304 1048576 --json FILE

Batch 1, 8 heads of 128, bfloat16. First both are compared with one GPU that has a whole sequence, of 16384 tokens; then
the median of forward and backward passes of all GPUs is timed, between barriers.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import context_parallel_unshard
from torch.nn.attention import SDPBackend, sdpa_kernel

from lighthouse_core import dense_attention
from lighthouse_core.attention.context import AttentionContext
from lighthouse_core.attention.module import DenseAttention

HEADS, DIM, CHECKED = 8, 128, 16384
Passes = Callable[[], tuple[Tensor, ...]]


def whole(tokens: int) -> list[Tensor]:
    """q, k, v and the gradient of the output, [1, N, H, D], the same on all GPUs."""
    generator = torch.Generator("cuda").manual_seed(tokens)
    shape = 1, tokens, HEADS, DIM
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(4)]


def by_heads(inputs: list[Tensor], backend: str) -> Passes:
    """One pass of this GPU's tokens, in their order."""
    group = dist.group.WORLD
    *qkv, grad = (x.chunk(dist.get_world_size(), 1)[dist.get_rank()].clone() for x in inputs)
    for x in qkv:
        x.requires_grad_()
    context, layer = AttentionContext(group=group), DenseAttention(backend)

    def run() -> tuple[Tensor, ...]:
        out = layer(*qkv, context)
        return out.detach(), *torch.autograd.grad(out, qkv, grad)

    return run


def gathered(parts: tuple[Tensor, ...]) -> list[Tensor]:
    found = []
    for part in parts:
        pieces = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(pieces, part.contiguous())
        found.append(torch.cat(pieces, 1))
    return found


def alone(inputs: list[Tensor]) -> list[Tensor]:
    qkv = [x.clone().requires_grad_() for x in inputs[:3]]
    out = dense_attention(*qkv, backend="cudnn")
    return [out.detach(), *torch.autograd.grad(out, qkv, inputs[3])]


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest, relative to the largest value."""
    pairs = zip(ours, theirs, strict=True)
    return max(float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs)


def milliseconds(run: Passes, repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        dist.barrier()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        dist.barrier()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def ring(tokens: int, mesh: dist.DeviceMesh, repeats: int, found: dict[str, float | str]) -> None:
    """torch's, over its cuDNN kernel, its load balanced; the check for `CHECKED` tokens, the time for others."""
    buffers = [x.movedim(1, 2).contiguous() for x in whole(tokens)]
    expected = alone(whole(tokens)) if tokens == CHECKED else []
    with (
        context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2] * 4, no_restore_buffers=set(buffers)),
        sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
    ):
        qkv, grad = [x.detach().requires_grad_() for x in buffers[:3]], buffers[3]

        def run() -> tuple[Tensor, ...]:
            out = torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True)
            return out.detach(), *torch.autograd.grad(out, qkv, grad)

        if expected:
            parts = context_parallel_unshard(mesh, [x.contiguous() for x in run()], [2] * 4)
            found["ring difference"] = difference([x.movedim(1, 2) for x in parts], expected)
        else:
            found["ring ms"] = milliseconds(run, repeats)


def main() -> None:
    """Check, then time; the first process prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[98304])
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    mesh = init_device_mesh("cuda", (dist.get_world_size(),), mesh_dim_names=("cp",))
    rows = []
    for tokens in [CHECKED, *asked.tokens]:
        found: dict[str, float | str] = {"tokens": tokens, "gpus": dist.get_world_size()}
        repeats = 10 if tokens < 2**18 else 2
        for backend in ("cudnn", "auto"):
            if tokens == CHECKED:
                expected, inputs = alone(whole(tokens)), whole(tokens)
                found[f"{backend} difference"] = difference(gathered(by_heads(inputs, backend)()), expected)
            else:
                found[f"{backend} ms"] = milliseconds(by_heads(whole(tokens), backend), repeats)
        try:
            ring(tokens, mesh, repeats, found)
        except Exception as error:
            found["ring error"] = f"{type(error).__name__}: {error}"[:300]
        rows.append(found)
        if dist.get_rank() == 0:
            print(json.dumps(found), flush=True)
    if dist.get_rank() == 0 and asked.json:
        what = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
        asked.json.write_text(json.dumps(what, indent=1) + "\n", encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
