"""Small random calls: shapes for hypothesis, fixed shapes for parametrised tests, and their tensors."""

import slow
import torch
from hypothesis import strategies as st

from lighthouse_core import LighthouseConfig

# (N, B, H, Hkv, D, p, L, k, m): none reduces to dense attention, and N' > N in all but the first.
SHAPES = [
    (64, 1, 1, 1, 4, 2, 3, 4, 2),
    (37, 2, 4, 2, 3, 2, 2, 2, 2),
    (61, 3, 2, 2, 5, 2, 3, 4, 4),
    (50, 1, 4, 1, 8, 2, 4, 2, 2),
    (67, 2, 2, 1, 7, 4, 2, 4, 2),
    (101, 1, 4, 4, 1, 4, 3, 2, 2),
    (150, 1, 2, 1, 3, 4, 4, 2, 2),
    (75, 2, 3, 3, 2, 8, 2, 2, 2),
    (165, 1, 2, 2, 4, 8, 3, 4, 4),
    (21, 2, 2, 1, 4, 4, 3, 2, 2),  # fewer tokens than two of the coarsest windows: most windows are padding
    (131, 1, 1, 1, 2, 8, 4, 2, 2),  # fewer tokens than one of the coarsest windows
]
SHAPE_IDS = ["N{}-B{}-H{}-Hkv{}-D{}-p{}-L{}-k{}-m{}".format(*shape) for shape in SHAPES]


def config(p, levels, k, m, **others) -> LighthouseConfig:
    return LighthouseConfig(pooling=p, levels=levels, topk=k, tile_parents=m, backend="reference", **others)


def qkv(n, b, h, hkv, d, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def draw(heads):
        return torch.randn(b, n, heads, d, generator=generator, dtype=torch.float64).to(dtype)

    return draw(h), draw(hkv), draw(hkv)


def make(shape, *, seed=0, dtype=torch.float64, **others):
    """(q, k, v, cfg) of one of SHAPES."""
    n, b, h, hkv, d, *rest = shape
    return *qkv(n, b, h, hkv, d, seed=seed, dtype=dtype), config(*rest, **others)


def token_scores(q, k, *, seed, values=5):
    """Token scores with few distinct values, so that most comparisons are ties."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(values, x.shape[:3], generator=generator).float() for x in (q, k))


def sparse_length(cfg, extra) -> int:
    """The (extra + 1)-th smallest N whose call is not dense."""
    n = 1
    while True:
        if slow.geometry(n, cfg).entries < n:
            if extra == 0:
                return n
            extra -= 1
        n += 1


@st.composite
def calls(draw, **others):
    """(q, k, v, cfg, scores): a call that is not dense, in float64, with scores full of ties."""
    p, levels = draw(st.sampled_from([(2, 2), (2, 3), (2, 4), (4, 2), (4, 3), (8, 2)]))
    m = draw(st.sampled_from([2, 4]))
    tiles = draw(st.integers(1, 2))
    others.setdefault("cover_prefix", draw(st.booleans()))
    cfg = config(p, levels, m * tiles, m, **others)
    n = sparse_length(cfg, draw(st.integers(0, 30)))
    hkv, group = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    seed = draw(st.integers(0, 2**20))
    q, k, v = qkv(n, draw(st.integers(1, 2)), hkv * group, hkv, draw(st.integers(1, 4)), seed=seed)
    return q, k, v, cfg, token_scores(q, k, seed=seed)
