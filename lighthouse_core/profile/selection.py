"""What a model of stage 1 selects on held-out text, by layer and KV head.

B batch, N tokens, H query heads, Hkv key/value heads, D head dimension, M windows of all levels, S entries, T tiles.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lighthouse_core.attention.backends import window_scores
from lighthouse_core.attention.call import Scores, select_indices
from lighthouse_core.attention.config import LighthouseConfig
from lighthouse_core.attention.context import AttentionContext, selection_keys
from lighthouse_core.attention.module import LighthouseAttention
from lighthouse_core.attention.selectors import selector_of
from lighthouse_core.config.phases import phase_at
from lighthouse_core.data.overlap import own_split
from lighthouse_core.errors import CheckpointError, DataError, UserError
from lighthouse_core.evaluate.load import load_checkpoint
from lighthouse_core.evaluate.report import held_out
from lighthouse_core.evaluate.subject import Subject, fitting, looking
from lighthouse_core.evaluate.text import Text
from lighthouse_core.models.decoder import lighthouse_layers
from lighthouse_core.profile.heads import HeadsView, heads_view
from lighthouse_core.runs.find import split_checkpoint
from lighthouse_core.runs.run import Run
from lighthouse_kernels.geometry import Geometry

_SETTINGS = ("scorer", "pooling", "levels", "topk", "tile_parents", "cover_prefix")


@dataclass(frozen=True)
class SelectionView:
    """What one checkpoint selects. All shares are means over the sequences, 0 to 1, lists [layer][KV head].

    Attributes:
        run, step: name of the run, and step of the checkpoint.
        scorer, pooling, levels, topk, tile_parents, cover_prefix: settings of the call; p, L, k and m.
        tokens, gathered_length, sequences: N, S, and how many sequences.
        layers, kv_heads: numbers of the Lighthouse layers, and how many KV heads each has.
        coverage: [layer][head][level]: of the tokens, those whose finest kept window is of that level; sums to 1.
        density: [layer][head][bin]: of the tokens of that part of the sequence, those kept at level 0.
        overlap: a dictionary for every level above 0. `share`: of the m/2 candidates with the largest s_Q and the m/2
            with the largest s_K, each chosen alone in its tile, those in common, without regard to `cover_prefix`;
            `chance`: what choices that know nothing of each other have in common. None where s_Q = s_K.
        drift: a dictionary for every two consecutive checkpoints, of steps `first` and `last`. `share`: of the tokens
            at level 0 at the first, those that are at level 0 at the last, too; `chance`: the share of all tokens that
            are at level 0 at the last, to which `cover_prefix` adds a little. None with one checkpoint.
        notes: why `overlap` or `drift` is None or means little, and whether the text may have been trained on.
    """

    run: str
    step: int
    scorer: str
    pooling: int
    levels: int
    topk: int
    tile_parents: int
    cover_prefix: bool
    tokens: int
    gathered_length: int
    sequences: int
    layers: list[int]
    kv_heads: int
    coverage: list[list[list[float]]]
    density: list[list[list[float]]]
    overlap: list[dict[str, Any]] | None
    drift: list[dict[str, Any]] | None
    notes: dict[str, str]

    @property
    def level_0(self) -> list[list[float]]:
        """[layer][head]: share of the tokens at level 0."""
        return [[head[0] for head in layer] for layer in self.coverage]

    def as_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        return asdict(self) | {"level_0": self.level_0}

    def columns(self) -> tuple[str, ...]:
        """Names of what `rows` holds; of the drift there is the newest."""
        overlap = [f"overlap {x['level']} (chance {x['chance']:.1%})" for x in self.overlap or ()]
        drift = [f"kept {x['first']} to {x['last']} (chance {x['chance']:.1%})" for x in (self.drift or ())[-1:]]
        return ("layer", *(f"level {level}" for level in range(self.levels)), *overlap, *drift)

    def rows(self) -> list[tuple[str, ...]]:
        """A row a layer: its number, and then mean and range over the heads, of each share."""
        rows = []
        for i, layer in enumerate(self.layers):
            levels = zip(*self.coverage[i], strict=True)
            others = (x["share"][i] for x in [*(self.overlap or ()), *(self.drift or ())[-1:]])
            rows.append((str(layer), *map(_mean_and_range, [*levels, *others])))
        return rows


def _mean_and_range(shares: Iterable[float]) -> str:
    shares = list(shares)
    mean, low, high = (f"{x:.1%}" for x in (sum(shares) / len(shares), min(shares), max(shares)))
    return mean if low == high else f"{mean} ({low} to {high})"


def windows_by_level(indices: Tensor, g: Geometry) -> list[Tensor]:
    """The kept windows of every level, level 0 first, each [B, Hkv, number kept] int64 and ascending, so that those of
    a tile stand together.

    Args:
        indices: [B, Hkv, S] as `select_indices` returns them.
        g: the pyramid; not `dense`.
    """
    counts = [g.pooling * g.topk] * (g.levels - 1) + [g.windows(g.levels - 1)]
    parts = indices.long().sort(-1).values.split(counts, -1)
    return [part - g.offset(level) for level, part in enumerate(parts)]


def finest_levels(indices: Tensor, g: Geometry) -> Tensor:
    """Level of the finest kept window that covers each token, [B, Hkv, N] int8; arguments as in `windows_by_level`."""
    finest = torch.full((*indices.shape[:2], g.padded), g.levels - 1, dtype=torch.int8, device=indices.device)
    by_level = windows_by_level(indices, g)
    for level in range(g.levels - 2, -1, -1):
        tokens_of = finest.unflatten(-1, (-1, g.window(level)))
        kept = by_level[level][..., None].expand(-1, -1, -1, g.window(level))
        tokens_of.scatter_(2, kept, level)
    return finest[..., : g.tokens]


def parent_overlap(indices: Tensor, scores: tuple[Tensor, Tensor], g: Geometry) -> tuple[Tensor, Tensor]:
    """What the m/2 candidates with the largest s_Q have in common with the m/2 with the largest s_K, each chosen alone.

    Args:
        indices: as in `windows_by_level`: whose candidates they are.
        scores: (s_Q, s_K), each [B, Hkv, M].
        g: the pyramid; not `dense`.

    Returns:
        The fraction in common and what chance gives, each [B, Hkv, L - 1] float32, level 1 first: means over the tiles
        that hold tokens. Windows of padding alone do not count.
    """
    shares, chances = [], []
    for level, windows in enumerate(windows_by_level(indices, g)[1:], 1):
        real = (windows * g.window(level) < g.tokens).unflatten(-1, (g.tiles, -1))
        chosen = real
        for s in scores:
            here = s.gather(-1, g.offset(level) + windows).view_as(real)
            best = here.sort(dim=-1, descending=True, stable=True).indices[..., : g.tile_parents // 2]
            chosen = chosen & torch.zeros_like(real).scatter(-1, best, True)
        candidates = real.sum(-1)
        wanted = candidates.clamp(max=g.tile_parents // 2)
        shares.append((chosen.sum(-1) / wanted).nanmean(-1))
        chances.append((wanted / candidates).nanmean(-1))
    return torch.stack(shares, -1), torch.stack(chances, -1)


def kept_by_both(before: Tensor, after: Tensor, g: Geometry) -> Tensor:
    """Of the tokens kept at level 0 `before`, the share kept `after`, too: [B, Hkv] float32; both as in
    `windows_by_level`."""
    first, last = (windows_by_level(indices, g)[0] for indices in (before, after))
    kept = torch.zeros(*last.shape[:2], g.padded, dtype=torch.bool, device=last.device).scatter(-1, last, True)
    real = first < g.tokens
    return (kept.gather(-1, first) & real).sum(-1) / real.sum(-1)


class _Seen(NamedTuple):
    """One call: coverage [Hkv, L], density [Hkv, bins], overlap and its chance [Hkv, L - 1] or empty, and indices
    [1, Hkv, S]; on the CPU."""

    coverage: Tensor
    density: Tensor
    overlap: Tensor
    chance: Tensor
    indices: Tensor


def _see(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores | None, cfg: LighthouseConfig, key: Tensor | None, bins: int
) -> _Seen:
    """q [1, N, H, D], k and v [1, N, Hkv, D] of one call, and the scores that it was given."""
    g = cfg.geometry(q.shape[1])
    indices = select_indices(q, k, cfg, v=v, scores=scores, key=key)
    finest = finest_levels(indices, g)[0]
    coverage = torch.stack([(finest == level).double().mean(-1) for level in range(g.levels)], -1)
    bin_of = torch.arange(g.tokens, device=q.device) * bins // g.tokens
    tokens = torch.zeros(len(finest), bins, device=q.device).index_add_(1, bin_of, (finest == 0).float())
    overlap = chance = torch.empty(0)
    if scores is not None:
        scores = window_scores(scores, tuple(q.shape[:3]), k.shape[2], g)
    else:
        scores = selector_of(cfg.scorer).scores(q, k, v, g)
    if scores is not None:
        overlap, chance = (x[0] for x in parent_overlap(indices, scores, g))
    return _Seen(*(x.cpu() for x in (coverage, tokens / bin_of.bincount(), overlap, chance, indices)))


@torch.no_grad()
def _look(subject: Subject, text: Text, seed: int, step: int, bins: int) -> dict[int, list[_Seen]]:
    """What each Lighthouse layer receives and selects, one sequence of `text` after the other, by layer."""
    assert subject.model is not None
    layers = lighthouse_layers(subject.model)
    seen: dict[int, list[_Seen]] = {number: [] for number in layers}

    def look(number: int, layer: LighthouseAttention, inputs: tuple[Any, ...], given: dict[str, Any]) -> None:
        q, k, v, context = inputs
        seen[number].append(_see(q, k, v, given["scores"], layer.cfg, context.key, bins))

    hooks = [
        layer.register_forward_pre_hook(partial(look, number), with_kwargs=True) for number, layer in layers.items()
    ]
    with looking(hooks), fitting(text.tokens.shape[1]):
        for number, (row, packed) in enumerate(text):
            key = selection_keys(seed, step, number, len(subject.model.layers)).to(subject.device)
            subject.within(AttentionContext(key=key)).states(row, packed)
    return seen


def _mean(seen: dict[int, list[_Seen]], what: str) -> Tensor:
    """Over the sequences, [layers, Hkv, ...] float64."""
    return torch.stack([torch.stack([getattr(one, what) for one in calls]).double().mean(0) for calls in seen.values()])


def _drift(before: dict[int, list[_Seen]], after: dict[int, list[_Seen]], g: Geometry) -> dict[str, Any]:
    shares = [
        [kept_by_both(a.indices, b.indices, g)[0] for a, b in zip(*calls, strict=True)]
        for calls in zip(before.values(), after.values(), strict=True)
    ]
    share = torch.stack([torch.stack(of_layer).double().mean(0) for of_layer in shares])
    return {"share": share.tolist(), "chance": _mean(after, "coverage")[..., 0].mean().item()}


def selection_view(
    path: Path, *, sequences: int = 4, bins: int = 64, device: torch.device | None = None
) -> SelectionView | HeadsView:
    """Look at what a checkpoint of stage 1 selects, on held-out text of the length of training, packed as in training.

    Args:
        path: a run directory (its newest checkpoint of stage 1, and the drift between all of these that it keeps) or
            one of its checkpoints/step-N.
        sequences: how many; one at a time goes through the model.
        bins: equal parts of the sequence, for the density; at most N.
        device: where it runs; a GPU if there is one.

    Returns:
        What heads attend to where the method chooses blocks for each KV head, else what the pyramid selects.

    Raises:
        RunError, CheckpointError: there is no such run or checkpoint, or it is damaged.
        UserError: stage 1 of the run selects nothing, there is too little held-out text, a number is out of range, or
            the memory is too small.
    """
    if min(sequences, bins) < 1:
        raise UserError(f"{sequences} sequences and {bins} bins are too few")
    run, steps = _checkpoints(path)
    recipe = run.recipe
    cfg = phase_at(recipe.phases, steps[-1]).settings(steps[-1])
    if cfg.rule.chooses_blocks:
        return heads_view(run, steps[-1], sequences, device)
    tokens = recipe.training.seq_len
    g = cfg.geometry(tokens)
    text, drift, overlap, notes = None, [], None, {}
    seen: dict[int, list[_Seen]] = {}
    if (split := own_split(recipe, run.ledger["stages"][0].get("data"))).unknown:
        notes["text"] = str(split)
    for number, step in enumerate(steps):
        subject, _ = load_checkpoint(run.checkpoint_dir(step), attention="trained", device=device)
        if text is None:
            # As many as `evaluate` reads at least, for the same text.
            text = held_out(recipe.data, subject, tokens, max(sequences, 2), recipe.alignment)[:sequences]
        before, seen = seen, _look(subject, text, recipe.training.seed, step, min(bins, tokens))
        if number:
            drift.append({"first": steps[number - 1], "last": step} | _drift(before, seen, g))
        # Before the next model is loaded.
        del subject
    if not drift:
        notes["drift"] = "one checkpoint was looked at"
    selector = selector_of(cfg.scorer)
    if _mean(seen, "overlap").numel():
        shares, chances = _mean(seen, "overlap"), _mean(seen, "chance")
        overlap = [
            {"level": i + 1, "share": shares[..., i].tolist(), "chance": chances[..., i].mean().item()}
            for i in range(cfg.levels - 1)
        ]
    else:
        same = f"the scorer {cfg.scorer} gives queries and keys the same scores"
        notes["overlap"] = same if selector.draws else f"scores of {cfg.scorer} are not looked at"
        if drift and selector.draws:
            notes["drift"] = f"the scorer {cfg.scorer} draws anew every step: what both keep is chance by construction"
    return SelectionView(
        run=run.name,
        step=steps[-1],
        **{name: getattr(cfg, name) for name in _SETTINGS},
        tokens=tokens,
        gathered_length=g.gathered_length,
        sequences=sequences,
        layers=list(seen),
        kv_heads=recipe.model.kv_heads,
        coverage=_mean(seen, "coverage").tolist(),
        density=_mean(seen, "density").tolist(),
        overlap=overlap,
        drift=drift or None,
        notes=notes,
    )


def _checkpoints(path: Path) -> tuple[Run, list[int]]:
    """The run, and the steps of the checkpoints of its stage 1 that are meant, oldest first."""
    path = path.resolve()
    folder, one = split_checkpoint(path)
    run = Run(folder)
    recipe = run.recipe
    if not recipe.lighthouse.enabled:
        raise UserError(f"run {run.name} is dense from the start: it selects nothing")
    end = run.start if run.recovering else inf
    steps = [step for step in run.checkpoint_steps() if step <= end] if one is None else [one]
    phase = phase_at(recipe.phases, steps[-1] if steps else recipe.training.steps)
    of = f" in phase {phase.number}" if len(recipe.phases) > 1 else ""
    if not phase.dense and not phase.attention.pools and not phase.attention.rule.chooses_blocks:
        method = phase.attention.method
        raise UserError(f"the method {method!r} of run {run.name}{of} selects nothing: it has no pyramid")
    if not phase.sparse_layers(recipe.model.layers):
        raise UserError(f"every layer of run {run.name}{of} is dense: it selects nothing")
    if not recipe.data.validation:
        raise DataError(f"run {run.name} held no text out: its data.validation is 0")
    if not steps:
        raise CheckpointError(
            f"run {run.name} keeps no checkpoint of stage 1",
            hint="if another process trains it, wait for its first one; checkpoint.keep = 0 keeps every one",
        )
    if steps[0] > end:
        raise UserError(f"{path} is of the recovery, which is dense: it selects nothing")
    # Selections of other phases may be of other sizes.
    return run, [step for step in steps if phase_at(recipe.phases, step) == phase]
