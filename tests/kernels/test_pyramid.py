"""What the selection shows of the scores: which norm, in which precision, and the maximum over windows and groups."""

import draws
import pytest
import slow
import torch

from lighthouse_core import select_indices

COARSE = draws.config(4, 2, 2, 2, cover_prefix=False)  # S = N/4 + 8; the two parents are the two best windows


def parents(indices, tokens, cfg):
    return [(e.level, e.window) for e in slow.parse(indices, tokens, cfg) if e.parent]


def test_a_window_scores_as_its_largest_token_not_as_its_mean():
    q, k = torch.ones(1, 64, 1, 2), torch.ones(1, 64, 1, 2)
    q[0, 20:24, 0] = torch.tensor([[9.0, 0], [-9, 0], [9, 0], [-9, 0]])  # window 5: the mean is 0, the largest norm 9
    q[0, 40:44, 0] = torch.tensor([4.0, 0])  # window 10: the largest mean
    k[0, 61, 0] = torch.tensor([0.0, -7.0])  # window 15: one large token
    assert parents(select_indices(q, k, COARSE)[0, 0], 64, COARSE) == [(1, 5), (1, 15)]


def test_the_norm_is_euclidean():
    q, k = torch.zeros(1, 64, 1, 4), torch.zeros(1, 64, 1, 4)
    q[0, 20, 0] = torch.tensor([3.0, 3, 3, 3])  # norm 6, largest element 3
    q[0, 40, 0] = torch.tensor([5.0, 0, 0, 0])
    k[0, 60, 0] = torch.tensor([5.0, 0, 0, 0])  # norm 5, sum 5
    k[0, 50, 0] = torch.tensor([2.0, 2, 2, 2])  # norm 4, sum 8
    assert parents(select_indices(q, k, COARSE)[0, 0], 64, COARSE) == [(1, 5), (1, 15)]


def test_query_and_key_scores_are_not_mixed():
    q, k = torch.zeros(1, 64, 1, 1), torch.zeros(1, 64, 1, 1)
    q[0, 20], q[0, 40] = 1.0, 0.9  # the second best query is not chosen: one parent by query, one by key
    k[0, 21], k[0, 60] = 0.6, 0.5  # window 5 is taken already: the key slot goes to the best of the remaining
    assert parents(select_indices(q, k, COARSE)[0, 0], 64, COARSE) == [(1, 5), (1, 15)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_scored_in_float32(dtype):
    """These norms differ by less than one step of the 16-bit type: rounded to it, they would tie to the lower index."""
    q, k = torch.zeros(1, 64, 1, 2, dtype=dtype), torch.zeros(1, 64, 1, 2, dtype=dtype)
    small = 2.0**-6
    q[0, 20, 0] = torch.tensor([1.0, 0.0])
    q[0, 40, 0] = torch.tensor([1.0, small])
    k[0, 24, 0] = torch.tensor([1.0, small])
    k[0, 60, 0] = torch.tensor([1.0, 2 * small])
    assert torch.tensor((1 + 4 * small**2) ** 0.5).to(dtype) == 1
    assert parents(select_indices(q, k, COARSE)[0, 0], 64, COARSE) == [(1, 10), (1, 15)]


def test_float16_norms_do_not_overflow():
    q, k = (torch.ones(1, 64, 1, 2, dtype=torch.float16) for _ in range(2))
    q[0, 20], q[0, 40] = 400.0, 500.0  # squares are beyond float16's range
    k[0, 24], k[0, 60] = 3.0, 4.0
    assert parents(select_indices(q, k, COARSE)[0, 0], 64, COARSE) == [(1, 10), (1, 15)]


@pytest.mark.parametrize("shape", draws.SHAPES, ids=draws.SHAPE_IDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_norm_scores_select_as_the_slow_truth(shape, dtype):
    q, k, _, cfg = draws.make(shape, dtype=dtype)
    assert torch.equal(select_indices(q, k, cfg), slow.select(q, k, cfg))


def test_a_group_scores_as_its_largest_query_head():
    q, k = torch.zeros(1, 64, 4, 1), torch.zeros(1, 64, 2, 1)
    q[0, 20, 0], q[0, 24, 1] = 1.0, 2.0  # KV head 0: heads 0 and 1; the sum over the group would not change the order
    q[0, 40, 2], q[0, 40, 3], q[0, 44, 3] = 2.0, 2.0, 3.0  # KV head 1: window 10 wins by sum, window 11 by maximum
    k[0, 60] = 1.0
    indices = select_indices(q, k, COARSE)[0]
    assert parents(indices[0], 64, COARSE) == [(1, 6), (1, 15)]
    assert parents(indices[1], 64, COARSE) == [(1, 11), (1, 15)]


@pytest.mark.parametrize("shape", draws.SHAPES, ids=draws.SHAPE_IDS)
def test_scores_of_windows_and_scores_of_tokens_select_alike(shape):
    q, k, _, cfg = draws.make(shape)
    by_token = draws.token_scores(q, k, seed=3, values=40)
    by_window = tuple(
        torch.tensor(
            [[slow.flat_scores(s[b, :, g].tolist(), cfg) for g in range(s.shape[2])] for b in range(s.shape[0])]
        )
        for s in slow.head_scores(*by_token)
    )
    expected = slow.select(q, k, cfg, by_token)
    assert torch.equal(select_indices(q, k, cfg, scores=by_token), expected)
    assert torch.equal(select_indices(q, k, cfg, scores=by_window), expected)


def test_scores_of_windows_need_not_be_maxima():
    """Given per window, a coarse score is taken as it is."""
    cfg = draws.config(4, 3, 2, 2, cover_prefix=False)
    q = k = torch.zeros(1, 64, 1, 1)
    geo = slow.geometry(64, cfg)
    s_q, s_k = torch.zeros(1, 1, geo.flat_length), torch.zeros(1, 1, geo.flat_length)
    s_q[0, 0, 60] = 9.0  # a token of coarse window 3, whose own score stays 0
    s_q[0, 0, geo.starts[2] + 1] = 1.0
    s_k[0, 0, geo.starts[2] + 2] = 1.0
    chosen = parents(select_indices(q, k, cfg, scores=(s_q, s_k))[0, 0], 64, cfg)
    assert [window for level, window in chosen if level == 2] == [1, 2]
