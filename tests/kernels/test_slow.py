"""The slow truth itself, against the worked example and a recorded call."""

import pytest
import slow
import torch

from lighthouse_core import LighthouseConfig


def test_worked_example():
    cfg = LighthouseConfig(pooling=4, levels=3, topk=2, tile_parents=2, cover_prefix=False)
    s_q, s_k = slow.worked_example()
    slow.assert_worked_example(slow.orders(s_q[..., None], s_k[..., None], cfg, (s_q, s_k))[0][0])


def test_recorded_selection_and_scores(golden_case):
    case, cfg = golden_case
    assert torch.equal(slow.select(case["q"], case["k"], cfg), case["idx"])
    for name, recorded in (("q", "scores_qk"), ("k", "scores_kq")):
        norms = case[name].square().sum(-1).sqrt()
        for head in range(2):
            windows = slow.flat_scores(norms[0, :, head].tolist(), cfg)
            torch.testing.assert_close(torch.tensor(windows), case[recorded][0, head], rtol=1e-6, atol=0)


@pytest.fixture
def one_thread():
    """Thousands of rows this small spend their time waking threads, most of all where other work shares the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@torch.no_grad()
def test_recorded_output(golden_case, one_thread):
    case, cfg = golden_case
    q, k, v = (case[name].double() for name in "qkv")
    out = slow.attend(q, k, v, cfg, slow.orders(case["q"], case["k"], cfg))
    torch.testing.assert_close(out, case["out"].double(), rtol=0, atol=2e-6)
