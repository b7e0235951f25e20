"""Content-free scores: reproducible, keyed by every part of the key, uniform, and blind to what the tokens hold."""

from collections import Counter
from graphlib import TopologicalSorter
from itertools import pairwise

import draws
import pytest
import slow
import torch

from lighthouse_core import select_indices

SCORERS = ["random", "block"]
ONE_LEVEL = (4, 2, 2, 2)  # 2 parents of N/4 windows


def key(*fields):
    return torch.tensor(fields, dtype=torch.int64)


def draw(cfg, fields, *, n=64, b=1, hkv=1):
    """select_indices of zeros; the selection may depend on the key alone."""
    q = torch.zeros(b, n, hkv, 1)
    return select_indices(q, q, cfg, key=key(*fields))


def parents(head, n, cfg, level=1):
    return sorted(e.window for e in slow.parse(head.tolist(), n, cfg) if e.parent and e.level == level)


@pytest.fixture(params=SCORERS)
def cfg(request):
    return draws.config(4, 2, 8, 8, scorer=request.param, score_block=4, cover_prefix=False)


def test_same_key_same_indices(cfg):
    first, second = draw(cfg, (3, 5, 7), n=512, b=2, hkv=2), draw(cfg, (3, 5, 7), n=512, b=2, hkv=2)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "other",
    [(4, 5, 7, 0), (3, 6, 7, 0), (3, 5, 8, 0), (3, 5, 7, 1), (5, 3, 7, 0), (3, 7, 5, 0), (7, 5, 3, 0), (3, 5, 0, 7)],
    ids=["seed", "step", "layer", "sample", "seed-step", "step-layer", "seed-layer", "layer-sample"],
)
def test_every_part_of_the_key_counts(cfg, other):
    assert not torch.equal(draw(cfg, (3, 5, 7, 0), n=512), draw(cfg, other, n=512))


def test_every_bit_of_the_seed_counts(cfg):
    """One field holds all 64 bits of a seed; neither half of it may be dropped."""
    seeds = (1, 2**31 + 1, 2**32 + 1, 2**62 + 1, -1, 2**32 - 1)
    assert len({tuple(draw(cfg, (seed, 1, 1), n=512).flatten().tolist()) for seed in seeds}) == len(seeds)


def test_rows_and_heads_draw_their_own(cfg):
    indices = draw(cfg, (0, 0, 0), n=512, b=3, hkv=3).flatten(0, 1)
    assert len({tuple(row) for row in indices.tolist()}) == 9


def test_without_a_sample_the_batch_starts_at_row_zero(cfg):
    assert torch.equal(draw(cfg, (3, 5, 7), n=512, b=2), draw(cfg, (3, 5, 7, 0), n=512, b=2))


@pytest.mark.parametrize("split", [1, 2, 5])
def test_indices_do_not_depend_on_how_a_batch_is_split(cfg, split):
    whole = draw(cfg, (3, 5, 7, 10), n=512, b=6, hkv=2)
    parts = [draw(cfg, (3, 5, 7, 10 + i), n=512, b=min(split, 6 - i), hkv=2) for i in range(0, 6, split)]
    assert torch.equal(whole, torch.cat(parts))


def test_content_is_not_read(cfg):
    q, k, _ = draws.qkv(512, 2, 4, 2, 3)
    expected = draw(cfg, (3, 5, 7), n=512, b=2, hkv=2)
    for a, b in ((q, k), (1e3 * q, k.flip(1)), (torch.full_like(q, float("nan")), k), (q.bfloat16(), k.bfloat16())):
        assert torch.equal(select_indices(a, b, cfg, key=key(3, 5, 7)), expected)


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("cover_prefix", [True, False])
@pytest.mark.parametrize("n, rest", [(301, (2, 4, 4, 2)), (149, (4, 3, 4, 4)), (131, (8, 4, 2, 2))])
def test_structure_and_padding(scorer, cover_prefix, n, rest):
    """The rule's counts hold; windows of padding are parents only when the real windows of their tile run out."""
    cfg = draws.config(*rest, scorer=scorer, score_block=8, cover_prefix=cover_prefix)
    geo = slow.geometry(n, cfg)
    tile_width = geo.padded * cfg.tile_parents // cfg.topk
    for fields in ((0, 0, 0), (1, 2, 3)):
        for head in draw(cfg, fields, n=n, b=2, hkv=2).flatten(0, 1):
            entries = slow.parse(head.tolist(), n, cfg)
            assert len(entries) == len(set(entries)) == geo.entries
            keys = [e.key(cfg.pooling) for e in entries]
            assert all(a < b for a, b in pairwise(keys))
            for level in range(1, cfg.levels):
                c = geo.widths[level]
                for tile in range(cfg.topk // cfg.tile_parents):
                    inside = [e for e in entries if e.level == level and e.window * c // tile_width == tile]
                    chosen = [e.window for e in inside if e.parent]
                    assert len(chosen) == cfg.tile_parents
                    spare = [e.window for e in inside if not e.parent and e.window * c < n]
                    padding = [i for i in chosen if i * c >= n]
                    assert not (spare and padding)
                    first_padding = min((e.window for e in inside if e.window * c >= n), default=0)
                    assert padding == list(range(first_padding, first_padding + len(padding)))
                assert not cover_prefix or any(e.parent and (e.level, e.window) == (level, 0) for e in entries)


def chi_square(counts, bins):
    expected = sum(counts.values()) / bins
    return sum((counts[i] - expected) ** 2 / expected for i in range(bins))


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("field", ["seed", "step", "layer", "sample", "row", "head"])
def test_every_window_is_chosen_about_equally_often(scorer, field):
    """512 draws along one field of the key: 2 of 16 windows each, uniform, and neighbours independent.

    The statistic has 15 degrees of freedom; 45 is beyond its 0.9999 quantile. The overlap of two independent choices is
    0.25 on average with a standard error of 0.02.
    """
    cfg = draws.config(*ONE_LEVEL, scorer=scorer, score_block=4, cover_prefix=False)
    if field in ("row", "head"):
        heads = draw(cfg, (1, 2, 3), b=512 if field == "row" else 1, hkv=512 if field == "head" else 1).flatten(0, 1)
    else:
        at = ("seed", "step", "layer", "sample").index(field)
        heads = torch.cat([draw(cfg, [*[1] * at, i, *[1] * (3 - at)])[0] for i in range(512)])
    chosen = [parents(head, 64, cfg) for head in heads]
    assert chi_square(Counter(i for pair in chosen for i in pair), 16) < 45
    overlap = sum(len(set(a) & set(b)) for a, b in pairwise(chosen)) / 511
    assert 0.17 < overlap < 0.33


def test_random_children_are_chosen_about_equally_often():
    """One level down, every one of a parent's windows is as likely as its siblings, wherever the parent is."""
    cfg = draws.config(4, 3, 2, 2, scorer="random", cover_prefix=False)
    counts = Counter()
    for head in draw(cfg, (0, 0, 0), n=256, b=32, hkv=32).flatten(0, 1):
        fine = parents(head, 256, cfg, level=1)
        counts.update(i % 4 for i in fine)
    assert sum(counts.values()) == 2048 and chi_square(counts, 4) < 22  # 3 degrees of freedom


def siblings_share(scorer):
    """How often both parents of level 1 share a parent at level 2; blocks are as wide as the windows of level 1."""
    cfg = draws.config(4, 3, 2, 2, scorer=scorer, score_block=4, cover_prefix=False)
    heads = draw(cfg, (0, 0, 0), n=1024, b=20, hkv=20).flatten(0, 1)
    pairs = [parents(head, 1024, cfg) for head in heads]
    return sum(a // 4 == b // 4 for a, b in pairs) / len(pairs)


def test_random_levels_are_independent():
    assert 0.34 < siblings_share("random") < 0.52  # 3/7, standard error 0.025


def test_block_scores_of_wider_windows_are_maxima():
    """The two best of 64 coarse windows hold the two best blocks, one each, unless both are in one (1.2 %)."""
    assert siblings_share("block") < 0.05


@pytest.mark.parametrize("levels, n", [(2, 256), (3, 256), (4, 500)])
def test_block_scores_are_shared_inside_a_block(levels, n):
    """All windows here lie inside blocks of 16 tokens. Within a block ties go to the lower index; between blocks every
    level and tile must agree with one order of the blocks, so "chosen before" must have no cycle."""
    cfg = draws.config(2, levels, 12, 6, scorer="block", score_block=16, cover_prefix=False)
    geo = slow.geometry(n, cfg)
    split = 0
    for head in draw(cfg, (0, 0, 0), n=n, b=2, hkv=2).flatten(0, 1):
        entries = slow.parse(head.tolist(), n, cfg)
        before = {}
        for level in range(1, levels):
            c = geo.widths[level]
            for tile in range(2):
                inside = [e for e in entries if e.level == level and e.window * c * 2 // geo.padded == tile]
                blocks = {}
                for e in sorted((e for e in inside if e.window * c < n), key=lambda e: e.window):
                    blocks.setdefault(e.window * c // 16, []).append(e.parent)
                assert all(flags == sorted(flags, reverse=True) for flags in blocks.values())
                partly = [b for b, flags in blocks.items() if any(flags) and not all(flags)]
                assert len(partly) <= 1
                split += len(partly)
                full = [b for b, flags in blocks.items() if all(flags)]
                none = [b for b, flags in blocks.items() if not any(flags)]
                for left, right in ((full, partly), (full, none), (partly, none)):
                    for b in right:
                        before.setdefault(b, set()).update(left)
        TopologicalSorter(before).prepare()
    assert split > 0


@pytest.mark.parametrize("scorer", SCORERS)
def test_dense_calls_need_no_scores(scorer):
    cfg = draws.config(4, 3, 64, 2, scorer=scorer)
    assert torch.equal(draw(cfg, (0, 0, 0)), torch.arange(64, dtype=torch.int32)[None, None])
