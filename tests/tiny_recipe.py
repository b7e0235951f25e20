"""A small recipe on Python's own sources. It ends with [data], for further keys."""

RECIPE = """\
[model]
dim = 64
layers = 2
heads = 2
ffn_dim = 96
vocab_size = 320

[lighthouse]
topk = 16
tile_parents = 8

[training]
seq_len = 1024
global_batch_size = 4
steps = 100

[optimizer]
lr = 1e-3

[recover]
steps = 20

[data]
packing = "concat"
"""
