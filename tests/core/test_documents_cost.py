"""What keeping documents apart costs, as it is accounted, against a count of the pairs that are attended to."""

import random
from itertools import accumulate, pairwise

import pytest
import torch

from lighthouse_core import select_indices
from lighthouse_core.attention import Documents
from lighthouse_core.attention.documents import of_entries
from lighthouse_core.config import load_recipe
from lighthouse_core.data.survey import Survey
from lighthouse_core.estimate import DENSE, estimate, flops_per_token, mean_keys

TOKENS = 1024
PYRAMID = "lighthouse.topk=16", "lighthouse.tile_parents=16", "lighthouse.window=64"
SETTINGS = {
    "dense": ("lighthouse.enabled=false",),
    "sliding": ('lighthouse={method="sliding",window=100}',),
    "chunked": ('lighthouse={method="chunked",window=300}',),
    "long chunks": ('lighthouse={method="chunked",window=1000}',),
    "blocks": ('lighthouse={method="blocks",window=100,tile=64,block_size=16,blocks=5}',),
    "random": PYRAMID,
    "block": (*PYRAMID, 'lighthouse.scorer="block"', "lighthouse.score_block=16"),
}


def recipe(name):
    common = "model.dense_layers=[]", 'data.packing="documents"', f"training.seq_len={TOKENS}"
    return load_recipe("recipes/quickstart.toml", [*common, *SETTINGS[name]])


def sequences(count, align, seed=0):
    """The lengths of the documents of each sequence, log-uniform, in multiples of `align`."""
    draw, left = random.Random(seed), 0
    for _ in range(count):
        lengths, room = [], TOKENS
        while room:
            left = left or align * max(1, round(2 ** draw.uniform(5, 11.5) / align))
            lengths.append(min(left, room))
            left, room = left - lengths[-1], room - lengths[-1]
        yield lengths


def pairs(recipe, lengths, seed):
    """Query and key, of which one is no later, that see each other in a sequence; a token and itself count half, as in
    the area of a triangle."""
    ends = torch.tensor([*accumulate(lengths)])
    place = torch.arange(TOKENS)
    document = torch.searchsorted(ends, place, right=True)
    ahead = place[:, None] - place
    seen = (document[:, None] == document) & (ahead >= 0)
    cfg = recipe.phases[-1].attention
    total = 0.0
    if recipe.lighthouse.enabled and cfg.method == "chunked":
        seen &= (place // cfg.window)[:, None] == place // cfg.window
    elif recipe.lighthouse.enabled:
        seen &= ahead < cfg.window
    if recipe.lighthouse.enabled and cfg.method == "blocks":
        # Of the tile's first token, in its document.
        first = place // cfg.tile * cfg.tile - torch.tensor([0, *ends])[document]
        there = (first - cfg.window + 1).clamp(min=0) // cfg.block_size
        total += cfg.block_size * there.clamp(max=cfg.blocks).sum().item()
    if recipe.lighthouse.enabled and cfg.pools:
        q = torch.zeros(1, TOKENS, 1, 8)
        indices = select_indices(q, q, cfg, key=torch.tensor([seed, 0, 0]))
        starts = torch.tensor([0, *ends], dtype=torch.int32)
        entries = of_entries(Documents(starts, max(lengths)), indices, cfg.geometry(TOKENS)).starts.diff()
        total += (entries.double() ** 2).sum().item() / 2
    return total + seen.sum().item() - TOKENS / 2


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_accounted_is_what_is_attended_to(name):
    asked = recipe(name)
    drawn = list(sequences(60, asked.alignment))
    counted = sum(pairs(asked, lengths, seed) for seed, lengths in enumerate(drawn)) / len(drawn) / TOKENS
    lengths = [length for one in drawn for length in one]
    seen = mean_keys(asked, lengths)
    found = seen[DENSE] if name == "dense" else seen[1]
    exact = name == "dense" or "chunk" in name
    assert found == pytest.approx(counted, rel=1e-9 if exact else 0.05)
    # Without documents it is several times as much.
    if name in ("dense", "long chunks"):
        assert mean_keys(asked)[DENSE if name == "dense" else 1] > 1.3 * found
    model, weights = asked.model, asked.model.kind.parameters(asked.model)
    flops = flops_per_token(asked, "dense" if name == "dense" else "lighthouse", lengths=lengths)
    width = model.heads * model.head_dim
    assert flops == pytest.approx(6 * (weights.body + weights.head) + 12 * width * found * model.layers)
    cost = estimate(asked, lengths)
    assert flops == (cost.dense_flops if name == "dense" else cost.lighthouse_flops)


def test_documents_are_cut_where_samples_end():
    import numpy as np

    found = Survey("train", np.array([5, 3, 30, 8, 1]), True, 16, (), 4)
    # Padded 8, 4, 32, 8, 4; boundaries 8 12 44 52 56, and 16 32 48.
    assert found.pieces.tolist() == [8, 4, 4, 16, 12, 4, 4, 4]
    assert found.pieces.sum() == 56
    assert Survey("train", np.zeros(0, dtype=np.int64), True, 16, (), 4).pieces.tolist() == []
    assert [b - a for a, b in pairwise([0, 5, 8, 16])] == Survey(
        "train", np.array([5, 3, 8]), True, 16, (), None
    ).pieces.tolist()
