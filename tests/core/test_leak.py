"""The leak test on a tiny model trained here: exactly 0 where the selection cannot see later tokens."""

from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy

from lighthouse_core.attention import LighthouseConfig
from lighthouse_core.attention.context import AttentionContext, selection_keys
from lighthouse_core.config.model import ModelSection
from lighthouse_core.data.tokenizer import BytesTokenizer
from lighthouse_core.evaluate import Subject, leak

TOKENS, VOCAB = 256, 64


def _text(batch: int, seed: int) -> torch.Tensor:
    """Random words repeated in random order: something a small model can learn from earlier tokens."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(VOCAB, (16, 8), generator=torch.Generator().manual_seed(0))
    return words[torch.randint(16, (batch, TOKENS // 8), generator=generator)].flatten(1)


def _losses(logits):
    """Of a model, tokens [B, N] -> logits [B, N, V]."""
    return Subject("it", logits, lambda hidden: hidden, BytesTokenizer(), TOKENS, torch.device("cpu")).losses


def _trained(scorer: str | None, steps: int = 15):
    from lighthouse_core.models.decoder import build_dense_model, use_lighthouse

    section = ModelSection(dim=32, layers=3, heads=2, ffn_dim=64, vocab_size=VOCAB)
    model = build_dense_model(section, TOKENS)
    if scorer:
        cfg = LighthouseConfig(pooling=2, levels=3, topk=16, tile_parents=4, scorer=scorer, score_block=8)
        use_lighthouse(model, cfg, dense_layers=[])
    with torch.no_grad():
        model.init_weights()
    context = AttentionContext(selection_keys(seed=1, step=2, sample=0, layers=section.layers))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        text = _text(4, seed=step + 1)
        loss = cross_entropy(model(text[:, :-1], context=context).flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return _losses(partial(model.eval(), context=context))


@pytest.mark.parametrize("scorer", ["random", "block", None])
def test_nothing_leaks_without_content_in_the_scores(scorer):
    rows = leak(_trained(scorer), _text(4, seed=100), _text(4, seed=200), cuts=[70, 129, 200], distances=(0, 1, 5, 40))
    assert [row.distance for row in rows] == [0, 1, 5, 40]
    assert all(row.pairs == 12 and row.mean == 0 and row.largest == 0 for row in rows)


def test_the_norm_scorer_leaks():
    rows = leak(_trained("norm"), _text(4, seed=100), _text(4, seed=200), cuts=[70, 129, 200])
    assert rows[0].largest > 0


def test_a_model_that_reads_ahead_is_measured_exactly():
    def cheat(tokens):
        """Knows the token after next, and predicts it as the next one."""
        return torch.nn.functional.one_hot(tokens.roll(-1, dims=1), VOCAB).double() * 10

    text, other = _text(2, seed=1), (_text(2, seed=1) + 1) % VOCAB
    near, far = leak(_losses(cheat), text, other, cuts=[64], distances=(0, 3))
    assert near.mean == pytest.approx(10.0)  # the logit of the right token falls from 10 to 0, the others' sum stays
    assert far.mean == 0


def test_a_cut_needs_room_before_it():
    with pytest.raises(ValueError, match="cut"):
        leak(_losses(lambda tokens: tokens), _text(1, 0), _text(1, 0), cuts=[16], distances=(0, 16))
