"""Compile every kernel for compute capability 9.0, with no GPU: launches on CPU tensors are recorded and compiled.

Prints the kernels' names.
"""

import os

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from lighthouse_kernels.gather import triton as gather
from lighthouse_kernels.geometry import Geometry
from lighthouse_kernels.launching import Layout
from lighthouse_kernels.merge import triton as merge
from lighthouse_kernels.pyramid import triton as pyramid
from lighthouse_kernels.scatter import triton as scatter
from lighthouse_kernels.select import triton as select

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}


def compile_instead(self, *arguments, num_warps, **constants):
    values = dict(zip((p.name for p in self.params), arguments, strict=False)) | constants
    signature, constexprs, attributes = {}, {}, {}
    for parameter in self.params:
        value = values[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constexprs[parameter.num,] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[parameter.num,] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
    source = ASTSource(self, signature, constexprs, attributes)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    print(self.__name__)


JITFunction.__getitem__ = lambda self, grid: lambda *a, **k: compile_instead(self, *a, **k)


def compile_all(tokens, p, levels, k, m, heads, kv_heads, dim, dtype):
    g = Layout(Geometry(tokens, p, levels, k, m))
    q = torch.zeros(1, tokens, heads, dim, dtype=dtype)
    kv = torch.zeros(1, tokens, kv_heads, dim, dtype=dtype)
    *rows, by_query, by_key = pyramid.pyramid(q, kv, kv, g, pooled=True, scored=True)
    indices, slots = select.select(g, 1, kv_heads, scores=(by_query, by_key))
    for block in (0, 64):
        select.select(g, 1, kv_heads, key=torch.zeros(5, dtype=torch.int64), score_block=block)
    gathered = gather.gather(q, kv, kv, rows, indices, g)
    gather.gather_backward(*gathered, slots, g)
    # With and without rows of the shard before.
    for indices in (indices, torch.cat((indices, indices[..., 1 - levels :]), 2)):  # noqa: B020
        rows = q.new_zeros(1, indices.shape[2], heads, dim)
        scatter.scatter(rows, indices, slots, g)
        scatter.scatter_backward(q, indices, g)
        parts = q, torch.zeros(1, heads, tokens), rows, torch.zeros(1, heads, indices.shape[2])
        merged = merge.merge(*parts, indices, slots, g)
        merge.merge_backward(q, merged[1], *parts, indices, slots, g)


compile_all(12288, 4, 3, 128, 128, 8, 8, 128, torch.bfloat16)
compile_all(1000, 2, 4, 16, 16, 4, 2, 96, torch.float32)
# More candidates in a tile than one block holds.
compile_all(8192, 16, 2, 128, 128, 1, 1, 64, torch.bfloat16)
