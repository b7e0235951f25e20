"""The memory estimate against bytes that are counted on a CPU: what a block keeps, and what reading weights takes.

tests/recipes/test_memory.py compares whole peaks with those of GPUs.
"""

import functools
import os
from unittest import mock

import pytest
from forked import spawn
from kept_bytes import kept_bytes
from loading_peak import loading_peak

from lighthouse_core.config import loads_recipe
from lighthouse_core.config.model import ModelSection
from lighthouse_core.estimate import estimate, loading_bytes, process_bytes, state_bytes

TEXT = """
[model]
dim = 256
layers = 2
heads = 4
kv_heads = 4
ffn_dim = 384
vocab_size = 300
rope_theta = 1e4

[lighthouse]
pooling = 2
levels = 3
topk = 8
tile_parents = 8
backend = "triton"

[data]
source = "python-sources"
paths = ["stdlib"]
tokenizer = "bytes"
packing = "concat"

[training]
seq_len = 128
global_batch_size = 1
steps = 1
dtype = "float32"
compile = true

[optimizer]
lr = 1e-3

[schedule]
warmup_steps = 0
"""
SHARED, GROUPED, PLAIN = "parallel.context=2", "model.kv_heads=1", 'lighthouse.dense_backend="math"'
DDP, BF16 = "parallel={shard=1, replicate=2}", 'training.dtype="bfloat16"'


def checkpointing(mode):
    return f'training.activation_checkpointing="{mode}"'


CASES = [
    ([SHARED, GROUPED], "dense"),
    ([SHARED, "lighthouse.window=16", 'lighthouse.dense_backend="math"'], "lighthouse"),
    ([checkpointing("selective"), SHARED, GROUPED], "lighthouse"),
    ([checkpointing("attention"), SHARED], "lighthouse"),
    ([checkpointing("full")], "lighthouse"),
    (["training.compile=false"], "dense"),
    (["training.compile=false", SHARED], "lighthouse"),
    # The scores of all pairs.
    ([PLAIN, "training.compile=false"], "dense"),
    # Under DDP autocast casts the weights, which FSDP keeps cast: that is what a block in bfloat16 stands for here.
    ([DDP, BF16], "dense"),
    ([DDP, BF16, checkpointing("full")], "dense"),
]
SLOW = [
    ([], "dense"),
    ([SHARED], "lighthouse"),
    ([checkpointing("selective"), SHARED, GROUPED], "dense"),
    ([checkpointing("selective")], "lighthouse"),
    ([PLAIN], "dense"),
    ([DDP, BF16, checkpointing("selective")], "dense"),
]


@functools.cache
def counted(slow: bool) -> list[int]:
    """The bytes of each case, counted on a CPU with the kernels' interpreter."""
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1"):
        return spawn(kept_bytes, TEXT, SLOW if slow else CASES, count=1)[0]


@pytest.mark.parametrize(
    ("slow", "number"),
    [
        pytest.param(cases is SLOW, number, id="-".join([*settings, stage]), marks=[pytest.mark.slow] * (cases is SLOW))
        for cases in (CASES, SLOW)
        for number, (settings, stage) in enumerate(cases)
    ],
)
def test_what_a_layer_keeps_is_what_autograd_keeps(slow, number):
    settings, stage = (SLOW if slow else CASES)[number]
    two, three = (loads_recipe(TEXT, [*settings, f"model.layers={layers}"]) for layers in (2, 3))
    # A third layer adds what is kept of one; weights are the same share.
    processes = two.parallel.context * two.parallel.replicate
    sizes = [process_bytes(r, processes, gpu=False)[stage] - state_bytes(r, processes) for r in (two, three)]
    layer, kept = sizes[1] - sizes[0], counted(slow)[number]
    # Log-sum-exps, indices, one number a norm and the state of a generator are not counted.
    assert 0.94 * (kept - 5056) < layer <= kept


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_reading_weights_takes_what_is_estimated(tmp_path, dtype):
    model = ModelSection(dim=512, layers=2, heads=4, kv_heads=4, ffn_dim=1024, vocab_size=65536, rope_theta=1e4)
    (there,) = spawn(loading_peak, tmp_path, dtype, model, count=1)
    recipe = loads_recipe(TEXT).model_copy(update={"model": model})
    host, device = loading_bytes(recipe, 1, dtype)
    assert 0.85 * host < there < host
    total, largest = model.kind.parameters(model).total, 65536 * 512
    assert device == 4 * total + 4 * largest < estimate(recipe).state_bytes
