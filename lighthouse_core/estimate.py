"""What a recipe costs, by arithmetic alone: parameters, gathered length, FLOPs, memory. Nothing here imports torch."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from math import inf

from lighthouse_core.config import Recipe
from lighthouse_core.models.family import Parameters

# (pooling, levels, topk) at lengths where the published release was measured.
_MEASURED = {
    98304: (4, 3, 1536),
    131072: (4, 3, 2048),
    262144: (4, 3, 2048),
    524288: (4, 4, 2048),
    1048576: (4, 5, 2048),
}
# Takes the place of a window.
DENSE = -1


@dataclass(frozen=True)
class Estimate:
    """Of one recipe.

    Attributes:
        parameters: exact.
        gathered: S, the tokens a Lighthouse layer attends over; None for a dense run, and for methods that gather none.
        lighthouse_flops: per token of stage 1, forward and backward; None for a dense run.
        dense_flops: per token with every layer dense.
        tokens_per_step: of the global batch.
        state_bytes: weights, gradients and two Adam moments in float32, over all processes.
        activation_bytes: rough, of one process, in the stage that takes more.
    """

    parameters: Parameters
    gathered: int | None
    lighthouse_flops: float | None
    dense_flops: float
    tokens_per_step: int
    state_bytes: int
    activation_bytes: int


def estimate(recipe: Recipe, lengths: Sequence[int] | None = None) -> Estimate:
    """All numbers of a recipe; `lengths` are those of `flops_per_token`."""
    counts = recipe.model.kind.parameters(recipe.model)
    lighthouse = recipe.lighthouse.enabled
    return Estimate(
        parameters=counts,
        gathered=gathered(recipe) if lighthouse and recipe.lighthouse.attention().pools else None,
        lighthouse_flops=flops_per_token(recipe, "lighthouse", lengths=lengths) if lighthouse else None,
        dense_flops=flops_per_token(recipe, "dense", lengths=lengths),
        tokens_per_step=recipe.training.global_batch_size * recipe.training.seq_len,
        state_bytes=16 * counts.total,
        activation_bytes=_activation_bytes(recipe),
    )


def gathered(recipe: Recipe) -> int:
    """S at the recipe's sequence length."""
    return recipe.lighthouse.attention().geometry(recipe.training.seq_len).gathered_length


def mean_keys(recipe: Recipe, lengths: Sequence[int] | None = None) -> dict[int, float]:
    """Keys that a query sees, on average: by each window of stage 1, and by -1 with dense attention.

    Args:
        recipe: gives the attention and N.
        lengths: tokens of each document of such sequences, one behind another, where documents are kept apart; a
            document a sequence by default.
    """
    tokens = recipe.training.seq_len
    lengths = lengths or [tokens]
    total = sum(lengths)
    # How many documents are alike in their length and place: in short ones there are many.
    found = Counter(zip(lengths, (end % tokens for end in accumulate(lengths, initial=0)), strict=False))

    def mean(keys: Callable[[int, int], float]) -> float:
        return sum(length * number / total * keys(length, first) for (length, first), number in found.items())

    seen = {DENSE: mean(lambda length, first: length / 2)}
    if recipe.lighthouse.enabled:
        for window in recipe.lighthouse.turns(recipe.training.steps):
            seen[window] = mean(partial(recipe.lighthouse.attention(window).keys, tokens))
    return seen


def keys_of_stage_1(recipe: Recipe, seen: dict[int, float], steps: tuple[int, int] | None = None) -> float:
    """Keys that a query sees in a Lighthouse layer, on average over steps of stage 1: dense steps within it, and its
    windows, count with their share.

    Args:
        recipe: gives the steps and windows.
        seen: of `mean_keys`.
        steps: the first and the last one; all of stage 1 by default.
    """
    first, last = steps or (1, recipe.training.steps)
    turns = recipe.lighthouse.turns(recipe.training.steps)
    keys = 0.0
    for window, (begin, end) in zip(turns, pairwise([*turns.values(), inf]), strict=True):
        share = (min(last + 1, end) - max(first, begin)) / (last + 1 - first)
        keys += seen[window] * max(0.0, share)
    if every := recipe.lighthouse.dense_every:
        keys += (seen[DENSE] - keys) / every
    return keys


def flops_per_token(
    recipe: Recipe, stage: str, steps: tuple[int, int] | None = None, lengths: Sequence[int] | None = None
) -> float:
    """Forward and backward, causal work counted once.

    6 (body + head) + 6 d N for each dense layer + 6 d S^2 / N for each Lighthouse layer, d = heads * head_dim; or 12 d
    times the keys that a query sees there. Dense steps within stage 1, and its windows, count with their share.

    Args:
        recipe: gives the model and N.
        stage: "lighthouse" or "dense".
        steps: the first and the last one that it is the mean over; all of stage 1 by default.
        lengths: as in `mean_keys`.
    """
    model, seen = recipe.model, mean_keys(recipe, lengths)
    counts = model.kind.parameters(model)
    dense = model.layers if stage == "dense" else len(model.dense_layers)
    flops: float = 6 * (counts.body + counts.head) + 12 * model.heads * model.head_dim * seen[DENSE] * dense
    if dense < model.layers:
        keys = keys_of_stage_1(recipe, seen, steps)
        flops += 12 * model.heads * model.head_dim * keys * (model.layers - dense)
    return float(flops)


def profile_defaults(tokens: int) -> tuple[int, int, int]:
    """(pooling, levels, topk) for a sequence length: measured ones, else topk near N / 32 in whole tiles of 128."""
    return _MEASURED.get(tokens, (4, 3, max(128, tokens // 32 // 128 * 128)))


def _activation_bytes(recipe: Recipe) -> int:
    """What autograd keeps, per process, in the stage that takes more.

    A layer without checkpointing keeps about 5 rows of dim, 2 of the queries, 2 of the keys and values and 3 of the
    feed-forward: 78 GiB over 30 layers of width 1024 at 98304 tokens, where 77 were measured. A Lighthouse layer keeps
    some more rows of the queries where several parts make its softmax, fitted to the peaks in recipes/evidence, which
    are of no checkpointing. "full" keeps one row a layer and one layer at a time; "selective" is taken as half. The
    head: logits of one chunk, and its weights' gradient in float32 and in the compute type.
    """
    model, training, lighthouse = recipe.model, recipe.training, recipe.lighthouse
    width = 2 if training.dtype == "bfloat16" else 4
    rows = 5 * model.dim + 2 * model.head_dim * (model.heads + model.kv_heads) + 3 * model.ffn_dim
    cfg = lighthouse.attention()
    pooled = model.layers - len(model.dense_layers) if lighthouse.enabled else 0
    more = cfg.rule.extra_rows(cfg) * model.heads * model.head_dim
    kept = {
        "none": rows * model.layers + more * pooled,
        "selective": (rows * model.layers + more * pooled) // 2,
        "full": model.dim * model.layers + rows + (more if pooled else 0),
    }[training.activation_checkpointing]
    tokens = training.local_batch_size * training.seq_len
    head = min(training.loss_chunk, tokens) * model.vocab_size * width + model.vocab_size * model.dim * (4 + width)
    return tokens * kept * width + head
