"""The whole attention call as plainly as its rule reads: Python loops over windows and rows, no vectorisation.

Every other implementation is judged by this one, so nothing here is clever. Sorting keys are exact fractions. The
pooled vector of a window that is not filled with real tokens is NaN: a finite output proves that no position read one.
"""

from dataclasses import dataclass
from fractions import Fraction

import torch

PADDING_SCORE = -1.0


@dataclass(frozen=True)
class Geometry:
    """The sizes that follow from N and a configuration."""

    tokens: int
    padded: int
    widths: tuple[int, ...]
    starts: tuple[int, ...]
    entries: int

    @property
    def dense(self) -> bool:
        return self.entries >= self.tokens

    @property
    def flat_length(self) -> int:
        return sum(self.padded // c for c in self.widths)

    def locate(self, flat: int) -> tuple[int, int]:
        """(level, window) of a flat pyramid index."""
        level = max(lv for lv, start in enumerate(self.starts) if start <= flat)
        window = flat - self.starts[level]
        assert 0 <= window < self.padded // self.widths[level], f"flat index {flat} is outside the pyramid"
        return level, window


def geometry(tokens, cfg) -> Geometry:
    widths = tuple(cfg.pooling**level for level in range(cfg.levels))
    tiles = cfg.topk // cfg.tile_parents
    padded = 0
    while padded < max(tokens, widths[-1] * cfg.topk):
        padded += widths[-1] * tiles
    starts = tuple(sum(padded // c for c in widths[:level]) for level in range(cfg.levels))
    entries = padded // widths[-1] + (cfg.levels - 1) * cfg.pooling * cfg.topk
    return Geometry(tokens, padded, widths, starts, entries)


@dataclass(frozen=True)
class Entry:
    level: int
    window: int
    parent: bool

    def key(self, pooling) -> Fraction:
        c = pooling**self.level
        if self.parent:
            return c * (self.window + 1) - Fraction(1, 2**self.level)
        return Fraction(c * self.window)

    def writes(self, pooling) -> range:
        c = pooling**self.level
        return range(self.window * c + c - 1, self.window * c + 2 * c - 1)

    def __str__(self):
        mark = "P" if self.parent else "r" if self.level else ""
        return f"({self.level},{self.window}){mark}"


def window_scores(token_scores, cfg) -> list[list[float]]:
    """Scores of every window of every level: the largest of its tokens' scores, padding scoring -1."""
    geo = geometry(len(token_scores), cfg)
    padded = list(token_scores) + [PADDING_SCORE] * (geo.padded - len(token_scores))
    return [[max(padded[i : i + c]) for i in range(0, geo.padded, c)] for c in geo.widths]


def flat_scores(token_scores, cfg) -> list[float]:
    """The same in flat pyramid order."""
    return [score for level in window_scores(token_scores, cfg) for score in level]


def best(candidates, scores, count) -> list[int]:
    return sorted(candidates, key=lambda i: (-scores[i], i))[:count]


def descend(by_query, by_key, tokens, cfg) -> list[Entry]:
    """The kept entries of one head in causal order; `by_query` and `by_key` hold the scores of each level's windows."""
    geo = geometry(tokens, cfg)
    tiles = cfg.topk // cfg.tile_parents
    half = cfg.tile_parents // 2
    coarse = geo.padded // geo.widths[-1]
    kept = []
    for tile in range(tiles):
        candidates = list(range(tile * coarse // tiles, (tile + 1) * coarse // tiles))
        for level in range(cfg.levels - 1, 0, -1):
            forced = [0] if cfg.cover_prefix and tile == 0 else []
            others = [i for i in candidates if i not in forced]
            queries = forced + best(others, by_query[level], half - len(forced))
            keys = best([i for i in candidates if i not in queries], by_key[level], half)
            parents = sorted(queries + keys)
            kept += [Entry(level, i, i in parents) for i in candidates]
            candidates = [i * cfg.pooling + j for i in parents for j in range(cfg.pooling)]
        kept += [Entry(0, i, False) for i in candidates]
    return sorted(kept, key=lambda e: e.key(cfg.pooling))


def head_scores(s_q, s_k) -> tuple[torch.Tensor, torch.Tensor]:
    """Token scores [B,N,H] and [B,N,Hkv] -> two [B,N,Hkv], a group of query heads scoring as its largest."""
    b, n, heads = s_q.shape
    kv_heads = s_k.shape[2]
    return s_q.reshape(b, n, kv_heads, heads // kv_heads).amax(3), s_k


def orders(q, k, cfg, scores=None) -> list[list[list[Entry]]]:
    """orders[b][kv head] -> kept entries in causal order, from token scores or from the norms of q and k."""
    if scores is None:
        scores = (q.float().square().sum(-1).sqrt(), k.float().square().sum(-1).sqrt())
    s_q, s_k = head_scores(*scores)
    return [
        [
            descend(
                window_scores(s_q[b, :, g].tolist(), cfg), window_scores(s_k[b, :, g].tolist(), cfg), q.shape[1], cfg
            )
            for g in range(s_k.shape[2])
        ]
        for b in range(q.shape[0])
    ]


def flat(entries, tokens, cfg) -> list[int]:
    starts = geometry(tokens, cfg).starts
    return [starts[e.level] + e.window for e in entries]


def select(q, k, cfg, scores=None) -> torch.Tensor:
    """What select_indices must return, [B,Hkv,S] int32."""
    b, n = q.shape[:2]
    if geometry(n, cfg).dense:
        return torch.arange(n, dtype=torch.int32).expand(b, k.shape[2], n)
    rows = [[flat(head, n, cfg) for head in row] for row in orders(q, k, cfg, scores)]
    return torch.tensor(rows, dtype=torch.int32)


def parse(indices, tokens, cfg) -> list[Entry]:
    """Flat indices of one head -> entries; a parent is an entry whose first child is kept as well."""
    geo = geometry(tokens, cfg)
    located = [geo.locate(int(i)) for i in indices]
    kept = set(located)
    return [Entry(lv, i, lv > 0 and (lv - 1, i * cfg.pooling) in kept) for lv, i in located]


def pool(x, entry, cfg):
    """Mean of x [N,D] over the entry's window, NaN where the window is not full of real tokens."""
    c = cfg.pooling**entry.level
    start, stop = entry.window * c, (entry.window + 1) * c
    return x[start:stop].mean(0) if stop <= x.shape[0] else torch.full_like(x[0], float("nan"))


def softmax_row(q, keys, values, scale):
    return torch.softmax(scale * (keys @ q), dim=0) @ values


def attend(q, k, v, cfg, kept=None, scale=None):
    """The call in the dtype of its inputs, with autograd; `kept` as `orders` returns it, or None for a dense call."""
    b, n, heads, dim = q.shape
    kv_heads = k.shape[2]
    scale = dim**-0.5 if scale is None else scale
    if kept is None:
        kept = [[[Entry(0, t, False) for t in range(n)]] * kv_heads] * b
    out = []
    for row in range(b):
        for head in range(heads):
            g = head // (heads // kv_heads)
            entries = kept[row][g]
            keys = torch.stack([pool(k[row, :, g], e, cfg) for e in entries])
            values = torch.stack([pool(v[row, :, g], e, cfg) for e in entries])
            sums = [torch.zeros_like(q[0, 0, 0]) for _ in range(n)]
            for i, e in enumerate(entries):
                positions = [t for t in e.writes(cfg.pooling) if t < n]
                if positions:
                    o = softmax_row(pool(q[row, :, head], e, cfg), keys[: i + 1], values[: i + 1], scale)
                    for t in positions:
                        sums[t] = sums[t] + o
            out.append(torch.stack(sums))
    return torch.stack(out).reshape(b, heads, n, dim).transpose(1, 2)


def attention(q, k, v, cfg, *, scores=None, scale=None):
    """What lighthouse_attention must return, [B,N,H,D]."""
    kept = None if geometry(q.shape[1], cfg).dense else orders(q, k, cfg, scores)
    return attend(q, k, v, cfg, kept, scale)


def contributors(entries, tokens, cfg) -> list[int]:
    """How many entries write to each position."""
    counts = [0] * tokens
    for e in entries:
        for t in e.writes(cfg.pooling):
            if t < tokens:
                counts[t] += 1
    return counts


WORKED_ORDER = (
    "(1,0)r (0,4) (0,5) (0,6) (0,7) (1,1)P (1,2)r (1,3)r (2,0)P (1,4)r "
    "(0,20) (0,21) (0,22) (0,23) (1,5)P (1,6)r (1,7)r (2,1)P (2,2)r (2,3)r"
)
WORKED_KEYS = "0 4 5 6 7 7.5 8 12 15.75 16 20 21 22 23 23.5 24 28 31.75 32 48"


def worked_example():
    """(s_q, s_k) token scores [1,64,1] under which the worked example's parents are chosen, without prefix cover."""
    s_q, s_k = torch.zeros(1, 64, 1), torch.zeros(1, 64, 1)
    s_q[0, 6] = 1.0
    s_k[0, 21] = 1.0
    return s_q, s_k


def assert_worked_example(entries) -> None:
    """The entries (p = 4) are those of the worked example, in its order and with its keys."""
    assert " ".join(map(str, entries)) == WORKED_ORDER
    keys = [e.key(4) for e in entries]
    assert " ".join(f"{float(x):g}" for x in keys) == WORKED_KEYS
    assert list(entries[8].writes(4)) == list(range(15, 31))
