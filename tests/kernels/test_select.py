"""The descent: which windows are kept, which of them are parents, and in what order."""

from collections import Counter
from itertools import pairwise

import draws
import pytest
import slow
import torch
from hypothesis import given
from hypothesis import strategies as st

from lighthouse_core import gathered_length, select_indices


def every_head(indices):
    return indices.flatten(0, 1).tolist()


def test_worked_example():
    cfg = draws.config(4, 3, 2, 2, cover_prefix=False)
    s_q, s_k = slow.worked_example()
    indices = select_indices(s_q[..., None], s_k[..., None], cfg, scores=(s_q, s_k))
    assert indices.dtype == torch.int32 and indices.shape == (1, 1, 20)
    slow.assert_worked_example(slow.parse(indices[0, 0], 64, cfg))


def test_recorded_indices(golden_case):
    case, cfg = golden_case
    assert torch.equal(select_indices(case["q"], case["k"], cfg), case["idx"])
    scores = (case["scores_qk"], case["scores_kq"])
    assert torch.equal(select_indices(case["q"], case["k"], cfg, scores=scores), case["idx"])


@pytest.mark.parametrize("cover_prefix", [True, False])
@pytest.mark.parametrize("shape", draws.SHAPES, ids=draws.SHAPE_IDS)
def test_against_the_slow_truth(shape, cover_prefix):
    q, k, _, cfg = draws.make(shape, cover_prefix=cover_prefix)
    for seed in range(5):
        scores = draws.token_scores(q, k, seed=seed, values=1000)
        assert torch.equal(select_indices(q, k, cfg, scores=scores), slow.select(q, k, cfg, scores))


@given(draws.calls())
def test_ties_go_to_the_lower_index(call):
    q, k, _, cfg, scores = call
    assert torch.equal(select_indices(q, k, cfg, scores=scores), slow.select(q, k, cfg, scores))


@pytest.mark.parametrize("shape", draws.SHAPES, ids=draws.SHAPE_IDS)
def test_negative_scores_come_before_padding(shape):
    """Padding scores -1, not 0: given scores may be as low as that."""
    q, k, _, cfg = draws.make(shape)
    scores = tuple(s / 5 - 0.9 for s in draws.token_scores(q, k, seed=7))
    assert torch.equal(select_indices(q, k, cfg, scores=scores), slow.select(q, k, cfg, scores))


@pytest.mark.parametrize("cover_prefix", [True, False])
def test_constant_scores_choose_the_first_windows_of_each_tile(cover_prefix):
    cfg = draws.config(2, 3, 8, 4, cover_prefix=cover_prefix)  # two tiles of 32 coarse windows
    q = k = torch.ones(2, 256, 1, 3)
    expected = {(2, i) for i in (0, 1, 2, 3, 32, 33, 34, 35)} | {(1, i) for i in (0, 1, 2, 3, 64, 65, 66, 67)}
    for head in every_head(select_indices(q, k, cfg)):
        assert {(e.level, e.window) for e in slow.parse(head, 256, cfg) if e.parent} == expected


@given(draws.calls())
def test_structure(call):
    """Counts, families, tiles and order, from the returned indices alone."""
    q, k, _, cfg, scores = call
    n, p, top = q.shape[1], cfg.pooling, cfg.levels - 1
    geo = slow.geometry(n, cfg)
    indices = select_indices(q, k, cfg, scores=scores)
    assert indices.shape == (q.shape[0], k.shape[2], gathered_length(n, cfg)) and indices.dtype == torch.int32
    tile_width = geo.padded * cfg.tile_parents // cfg.topk
    for head in every_head(indices):
        assert len(set(head)) == len(head) and min(head) >= 0 and max(head) < geo.flat_length
        entries = slow.parse(head, n, cfg)
        kept = {(e.level, e.window) for e in entries}
        levels = Counter(e.level for e in entries)
        assert levels == {top: geo.padded // geo.widths[-1]} | dict.fromkeys(range(top), p * cfg.topk)
        tiles = Counter((e.level, e.window * geo.widths[e.level] // tile_width) for e in entries if e.parent)
        tile_count = cfg.topk // cfg.tile_parents
        assert tiles == {(lv, t): cfg.tile_parents for lv in range(1, cfg.levels) for t in range(tile_count)}
        for e in entries:
            assert e.level == top or (e.level + 1, e.window // p) in kept
            siblings = {(e.level - 1, e.window * p + j) for j in range(p)}
            assert not e.parent or siblings <= kept
        keys = [e.key(p) for e in entries]
        assert all(a < b for a, b in pairwise(keys))


@given(draws.calls())
def test_the_order_is_exactly_causal(call):
    """With a plain causal mask no entry reads a token later than the first position it writes to."""
    q, k, _, cfg, scores = call
    n = q.shape[1]
    for head in every_head(select_indices(q, k, cfg, scores=scores)):
        latest = -1
        for e in slow.parse(head, n, cfg):
            latest = max(latest, cfg.pooling**e.level * (e.window + 1) - 1)
            assert latest <= e.writes(cfg.pooling)[0]


@given(draws.calls(cover_prefix=True))
def test_cover_prefix_makes_the_first_window_of_every_level_a_parent(call):
    q, k, _, cfg, scores = call
    for head in every_head(select_indices(q, k, cfg, scores=scores)):
        chosen = {(e.level, e.window) for e in slow.parse(head, q.shape[1], cfg) if e.parent}
        assert {(level, 0) for level in range(1, cfg.levels)} <= chosen


def test_cover_prefix_takes_a_query_slot_and_leaves_the_key_slots():
    s_q, s_k = torch.zeros(1, 64, 1), torch.zeros(1, 64, 1)
    s_q[0, 20], s_q[0, 40] = 2.0, 1.0
    s_k[0, 60], s_k[0, 50] = 2.0, 1.0
    q = k = torch.zeros(1, 64, 1, 1)
    for m, expected in ((2, [0, 15]), (4, [0, 5, 12, 15])):
        cfg = draws.config(4, 2, m, m, cover_prefix=True)
        entries = slow.parse(select_indices(q, k, cfg, scores=(s_q, s_k))[0, 0], 64, cfg)
        assert sorted(e.window for e in entries if e.parent) == expected


def test_windows_of_padding_are_chosen_last():
    """Real windows score 0, the least a norm can be, and are still preferred to windows of padding."""
    cfg = draws.config(4, 2, 8, 4, cover_prefix=False)  # N' = 80: two tiles of ten windows
    q = k = torch.zeros(1, 53, 1, 1)  # windows 0..12 hold 52 tokens, window 13 one, windows 14..19 none
    entries = slow.parse(select_indices(q, k, cfg)[0, 0], 53, cfg)
    assert slow.geometry(53, cfg).padded == 56
    assert sorted(e.window for e in entries if e.parent) == [0, 1, 2, 3, 7, 8, 9, 10]


@given(st.sampled_from([2, 4, 8]), st.integers(1, 4), st.sampled_from([2, 4]), st.integers(1, 3), st.integers(1, 3000))
def test_gathered_length(p, levels, m, tiles, n):
    cfg = draws.config(p, levels, m * tiles, m)
    unit = p ** (levels - 1) * tiles
    units = max(-(-n // unit), cfg.tile_parents)
    assert gathered_length(n, cfg) == min(n, units * tiles + (levels - 1) * p * cfg.topk)


def test_gathered_length_of_the_paper():
    assert gathered_length(98304, draws.config(4, 3, 1536, 128)) == 18432
    assert gathered_length(131072, draws.config(4, 3, 1536, 128)) == 131136 // 16 + 12288


@pytest.mark.parametrize(
    "n, rest",
    [(1, (4, 3, 2, 2)), (18, (4, 3, 2, 2)), (50, (2, 1, 2, 2)), (20, (4, 2, 4, 4))],
    ids=["one token", "S = N", "one level", "short"],
)
def test_a_dense_call_keeps_every_token(n, rest):
    cfg = draws.config(*rest)
    q, k, _ = draws.qkv(n, 2, 4, 2, 3)
    assert slow.geometry(n, cfg).entries >= n and gathered_length(n, cfg) == n
    indices = select_indices(q, k, cfg)
    assert indices.dtype == torch.int32
    assert torch.equal(indices, torch.arange(n, dtype=torch.int32).expand(2, 2, n))


def test_the_first_length_that_is_not_dense():
    cfg = draws.config(4, 3, 2, 2)  # S = 2 + 16 up to N = 32
    q, k, _ = draws.qkv(19, 1, 1, 1, 3)
    assert gathered_length(19, cfg) == 18
    assert torch.equal(select_indices(q, k, cfg), slow.select(q, k, cfg))


def test_selection_carries_no_gradient():
    q, k, _, cfg = draws.make(draws.SHAPES[1])
    indices = select_indices(q.requires_grad_(), k.requires_grad_(), cfg)
    assert not indices.requires_grad and indices.shape[-1] < q.shape[1]


def test_padding_comes_last_whatever_it_is_given(generator):
    """Window scores are the caller's, but windows of padding alone are never preferred to real ones."""
    cfg = draws.config(2, 3, 8, 4, cover_prefix=False)
    q = torch.randn(1, 101, 1, 4, generator=generator)
    geo = slow.geometry(101, cfg)
    scores = torch.rand(1, 1, sum(geo.padded // c for c in geo.widths), generator=generator)
    high = scores.clone()
    for start, c in zip(geo.starts, geo.widths, strict=True):
        high[..., start - (-geo.tokens // c) : start + geo.padded // c] = 1e6
    assert not torch.equal(high, scores)
    assert torch.equal(
        select_indices(q, q, cfg, scores=(high, high)), select_indices(q, q, cfg, scores=(scores.clone(), scores))
    )
