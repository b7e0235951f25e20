"""What a recipe costs, by arithmetic alone: parameters, gathered length, FLOPs, memory. Nothing here imports torch."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from math import prod
from typing import NamedTuple

from lighthouse_core.attention.budgets import WIDEST
from lighthouse_core.attention.config import LighthouseConfig
from lighthouse_core.attention.methods.method import Method
from lighthouse_core.attention.settings import Settings
from lighthouse_core.config import Recipe
from lighthouse_core.config.phases import Phase, overlaps
from lighthouse_core.models.family import Parameters

# (pooling, levels, topk) at lengths where the published release was measured.
_MEASURED = {
    98304: (4, 3, 1536),
    131072: (4, 3, 2048),
    262144: (4, 3, 2048),
    524288: (4, 4, 2048),
    1048576: (4, 5, 2048),
}
# Takes the place of a phase's number.
DENSE = -1
# Steps of a window that grows, over which a mean is taken.
_SAMPLES = 64
# The largest share by which a measured peak may differ from the estimate: docs/memory.md has all of them.
ERROR = 0.1
# The longest sequences, in tokens, of which a peak with chosen blocks was measured, and one with budgets of them.
MOST_BLOCKED = 98304
MOST_BUDGETED = 16384
# Bytes of a GPU that are no tensors: CUDA's context and the kernels' code; and of several processes NCCL's buffers.
_CONTEXT, _BUFFERS = 2**30, 2**30


class Verdict(NamedTuple):
    """Whether a stage fits a GPU.

    Attributes:
        word: "fits", "fits by size", "close", "does not fit", or "not estimated".
        why: the reason, where that is not the size; else "".
        needed: bytes of one process, of `process_bytes`.
    """

    word: str
    why: str
    needed: int


@dataclass(frozen=True)
class Estimate:
    """Of one recipe.

    Attributes:
        parameters: exact.
        gathered: S, the most tokens that a Lighthouse layer of a phase gathers; None where no phase gathers any.
        lighthouse_flops: per token of stage 1, forward and backward; None for a dense run.
        dense_flops: per token with every layer dense.
        tokens_per_step: of the global batch.
        state_bytes: weights, gradients and two Adam moments in float32, over all processes.
        stage_bytes: of one process on a CPU beside its part of `state_bytes`, by the name of each stage.
    """

    parameters: Parameters
    gathered: int | None
    lighthouse_flops: float | None
    dense_flops: float
    tokens_per_step: int
    state_bytes: int
    stage_bytes: dict[str, int]

    @property
    def activation_bytes(self) -> int:
        """Of the stage that takes more."""
        return max(self.stage_bytes.values())


def estimate(recipe: Recipe, lengths: Sequence[int] | None = None) -> Estimate:
    """All numbers of a recipe; `lengths` are those of `flops_per_token`."""
    counts = recipe.model.kind.parameters(recipe.model)
    lighthouse = recipe.lighthouse.enabled
    return Estimate(
        parameters=counts,
        gathered=gathered(recipe) if any(phase.attention.pools for phase in recipe.sparse_phases) else None,
        lighthouse_flops=flops_per_token(recipe, "lighthouse", lengths=lengths) if lighthouse else None,
        dense_flops=flops_per_token(recipe, "dense", lengths=lengths),
        tokens_per_step=recipe.training.global_batch_size * recipe.training.seq_len,
        state_bytes=16 * counts.total,
        stage_bytes=_stage_bytes(recipe, processes=1, gpu=False),
    )


def gathered(recipe: Recipe) -> int:
    """S at the recipe's sequence length, of the phase that gathers most."""
    tokens = recipe.training.seq_len
    return max(
        phase.attention.geometry(tokens).gathered_length for phase in recipe.sparse_phases if phase.attention.pools
    )


def mean_keys(recipe: Recipe, lengths: Sequence[int] | None = None) -> dict[int, float]:
    """Keys that a query sees, on average: in a Lighthouse layer by the number of each phase of stage 1, and by -1 with
    dense attention. A window that grows counts with the mean over its steps.

    Args:
        recipe: gives the attention and N.
        lengths: tokens of each document of such sequences, one behind another, where documents are kept apart; a
            document a sequence by default.
    """
    seen = _counter(recipe, lengths)
    found = {DENSE: seen(None)}
    if recipe.lighthouse.enabled:
        for phase in recipe.phases:
            found[phase.number] = _of_phase(phase, seen, phase.begin, phase.end)
    return found


def _counter(recipe: Recipe, lengths: Sequence[int] | None) -> Callable[[LighthouseConfig | None], float]:
    """Gives the mean keys of a query with such settings, None for dense attention; `lengths` as in `mean_keys`."""
    tokens = recipe.training.seq_len
    lengths = lengths or [tokens]
    total = sum(lengths)
    # How many documents are alike in their length and place: in short ones there are many.
    found = Counter(zip(lengths, (end % tokens for end in accumulate(lengths, initial=0)), strict=False))

    @cache
    def mean(cfg: LighthouseConfig | None) -> float:
        return sum(
            length * number / total * (length / 2 if cfg is None else cfg.keys(tokens, length, first))
            for (length, first), number in found.items()
        )

    return mean


def _of_phase(phase: Phase, seen: Callable[[LighthouseConfig | None], float], first: int, last: int) -> float:
    """Keys of a Lighthouse layer on average over these steps of a phase."""
    if phase.dense:
        return seen(None)
    if phase.growth is None:
        return seen(phase.attention)
    steps = _some_steps(first, last)
    return sum(seen(phase.settings(step)) for step in steps) / len(steps)


def _some_steps(first: int, last: int) -> list[int]:
    """Of many steps, some at equal distances."""
    count = last + 1 - first
    some = min(_SAMPLES, count)
    return [first + count * (2 * i + 1) // (2 * some) for i in range(some)]


def keys_of_stage_1(recipe: Recipe, seen: dict[int, float]) -> float:
    """Keys that a query sees in a Lighthouse layer, on average over stage 1: phases count with their steps.

    Args:
        recipe: gives the phases.
        seen: of `mean_keys`.
    """
    steps = recipe.training.steps
    return sum((phase.end - phase.begin + 1) / steps * seen[phase.number] for phase in recipe.phases)


def flops_per_token(
    recipe: Recipe, stage: str, steps: tuple[int, int] | None = None, lengths: Sequence[int] | None = None
) -> float:
    """Forward and backward, causal work counted once.

    6 (body + head) + 6 d N for each dense layer + 6 d S^2 / N for each Lighthouse layer, d = heads * head_dim; or 12 d
    times the keys that a query sees there. The phases of stage 1 count with their steps.

    Args:
        recipe: gives the model and N.
        stage: "lighthouse" or "dense".
        steps: the first and the last one that it is the mean over; all of stage 1 by default.
        lengths: as in `mean_keys`.
    """
    model, seen = recipe.model, _counter(recipe, lengths)
    counts = model.kind.parameters(model)
    # Keys of all layers.
    keys = model.layers * seen(None)
    if stage == "lighthouse":
        first, last = steps or (1, recipe.training.steps)
        keys = 0.0
        for phase, own in overlaps(recipe.phases, first, last).items():
            of_layer = _of_phase(phase, seen, max(first, phase.begin), min(last, phase.end))
            sparse = phase.sparse_layers(model.layers)
            keys += own / (last + 1 - first) * (sparse * of_layer + (model.layers - sparse) * seen(None))
    return float(6 * (counts.body + counts.head) + 12 * model.heads * model.head_dim * keys)


def profile_defaults(tokens: int) -> tuple[int, int, int]:
    """(pooling, levels, topk) for a sequence length: measured ones, else topk near N / 32 in whole tiles of 128."""
    return _MEASURED.get(tokens, (4, 3, max(128, tokens // 32 // 128 * 128)))


def exchanged_bytes(recipe: Recipe, *, dense: bool, phase: Phase | None = None) -> int:
    """Bytes that a process sends to those it shares sequences with, in one layer's forward pass. The backward pass
    sends as many, and so does a forward pass that is computed anew.

    (R - 1) B (N / R) (2 h + 2 c) D bytes a number: queries and the output of h = H / R query heads, keys and values of
    c = max(Hkv, R) / R KV heads, for each of the R - 1 others.

    Of a pyramid whose shards are whole tiles (R - 1) B ((S / R) (2 h + 2 c) + (L - 1) h) D bytes a number: S gathered
    rows, and outputs of L - 1 rows of the shard before. With a window also (R - 1) B (S / R + L - 1) h bytes of a
    float32, the log-sum-exps. Of a window, beside a pyramid or alone, B window 2 Hkv D bytes a number: keys and values
    for the next shard. Of chunks that fill the shards nothing.

    Scores and entries that are exchanged, too, are not counted.

    Args:
        recipe: gives sizes and settings.
        dense: of a dense layer; else of a Lighthouse layer in stage 1.
        phase: of the layer; by default the one that takes most. Of a window that grows, the largest figure of 64 of its
            steps and the last one counts: chunks that do not fill the shares take more than longer ones that do.
    """
    model, training, context = recipe.model, recipe.training, recipe.parallel.context
    width = 4 if training.dtype == "float32" else 2
    heads, more = model.heads // context, max(model.kv_heads, context) // context
    others = (context - 1) * training.local_batch_size

    def by_rows(cfg: LighthouseConfig) -> int:
        g = cfg.geometry(training.seq_len)
        rows, edge = g.gathered_length // context, g.levels - 1
        sent = others * (rows * 2 * (heads + more) + edge * heads) * model.head_dim * width
        if cfg.window:
            sent += others * (rows + edge) * heads * 4
        return sent

    def bytes_of(cfg: LighthouseConfig | None) -> int:
        if cfg is not None and cfg.rule.whole(cfg, training.seq_len, context) is None:
            previous = cfg.rule.previous(cfg) * 2 * model.kv_heads * model.head_dim * width
            return training.local_batch_size * previous + (by_rows(cfg) if cfg.pools else 0)
        return others * training.seq_len // context * 2 * (heads + more) * model.head_dim * width

    if context == 1:
        return 0
    if dense:
        return bytes_of(None)
    phases = recipe.sparse_phases if phase is None else [phase]
    return max(bytes_of(cfg) for one in phases for cfg in _attentions_of(one))


def _attentions_of(phase: Phase) -> set[LighthouseConfig]:
    """Settings of a phase that is not dense: of a window that grows, of some steps and the last one."""
    steps = _some_steps(phase.begin, phase.end) if phase.growth else []
    return {phase.attention, *map(phase.settings, steps)}


def whole_sequences(recipe: Recipe) -> tuple[str, dict[str, int]] | None:
    """Why processes exchange whole sequences in a pyramid's layer, where gathered rows would do: `Method.whole`. And
    the nearest settings each of which alone changes that, by their keys. None where they exchange rows or share no
    sequences, and for methods without a pyramid."""
    tokens, context = recipe.training.seq_len, recipe.parallel.context
    if context > 1 and recipe.lighthouse.enabled:
        for cfg in (phase.attention for phase in recipe.sparse_phases):
            if cfg.pools and (why := cfg.rule.whole(cfg, tokens, context)):
                return why, cfg.rule.nearest(cfg, tokens, context)
    return None


def process_bytes(recipe: Recipe, processes: int, *, gpu: bool = True) -> dict[str, int]:
    """Peak of one process, by the name of each stage: what torch's allocator reserves on a GPU.

    Args:
        recipe: gives the model and how processes share it.
        processes: of the whole job.
        gpu: whether the kernels are those of a GPU.
    """
    state = state_bytes(recipe, processes)
    return {name: state + size for name, size in _stage_bytes(recipe, processes, gpu=gpu).items()}


def state_bytes(recipe: Recipe, processes: int) -> int:
    """Weights, gradients and moments of one process of a job: its shard of them.

    DDP, which is `replicate` alone, shards nothing, and holds gradients twice: in their place and in what is sent.
    """
    a_weight = 20 if _ddp(recipe, processes) else 16
    return a_weight * recipe.model.kind.parameters(recipe.model).total // _shards(recipe, processes)


def _ddp(recipe: Recipe, processes: int) -> bool:
    """Whether each process holds all weights, and autocast casts them."""
    return recipe.parallel.replicate > 1 and _shards(recipe, processes) == 1


def _shards(recipe: Recipe, processes: int) -> int:
    """Processes that share out one copy of the weights."""
    parallel = recipe.parallel
    return processes // parallel.replicate if parallel.shard == -1 else parallel.shard * parallel.context


def loading_bytes(recipe: Recipe, processes: int, stored: str) -> tuple[int, int]:
    """Peak of one process while it reads the weights that a run begins with: of the machine's memory and of the GPU's.

    One tensor is in the machine's memory at a time: as its file has it, once more while it is checked or put into the
    trainer's order, and in float32 or as flags. On the GPU there is that tensor in float32, and a shard of the model.

    Args:
        recipe: gives the model and how processes share it.
        processes: of the whole job.
        stored: type of most weights, "bfloat16", "float16" or "float32".
    """
    model = recipe.model
    largest = max(prod(entry.shape) for entry in model.kind.entries(model))
    width = 4 if stored == "float32" else 2
    return (2 * width + 4) * largest, 4 * model.kind.parameters(model).total // _shards(recipe, processes) + 4 * largest


def usable(gpu: int, processes: int) -> int:
    """Bytes for tensors on a GPU that has `gpu` bytes, where the job has so many processes."""
    return max(1, gpu - _CONTEXT - (_BUFFERS if processes > 1 else 0))


def verdict(needed: float, there: float) -> str:
    """Whether a process that is estimated to need so many bytes fits where there are so many of `usable`: "fits",
    "close" or "does not fit". It is close where the estimate is within its error of what is there."""
    if needed < there * (1 - ERROR):
        return "fits"
    return "does not fit" if needed > there * (1 + ERROR) else "close"


def verdicts(recipe: Recipe, processes: int, gpu: int) -> dict[str, Verdict]:
    """Whether each stage fits a GPU that has `gpu` bytes: what `verdict` says, or "not estimated". What fits by an
    estimate that no measurement covers, "fits by size"."""
    found = {}
    for stage, needed in process_bytes(recipe, processes).items():
        word, why = verdict(needed, usable(gpu, processes)), ""
        if word != "does not fit" and (left_out := not_estimated(recipe, stage)):
            word, why = "not estimated", left_out
        elif word == "fits" and (without := unmeasured(recipe, processes, stage)):
            word, why = "fits by size", f"no run with {' or '.join(without)} was measured"
        found[stage] = Verdict(word, why, needed)
    return found


def unmeasured(recipe: Recipe, processes: int, stage: str) -> list[str]:
    """Settings of a stage, "lighthouse" or "dense", that no measured peak of docs/memory.md has."""
    training, parallel, cfgs = recipe.training, recipe.parallel, _attentions(recipe, stage)
    rows = all(cfg is not None and cfg.pools and not cfg.window for cfg in cfgs)
    chooses = next((cfg.method for cfg in cfgs if cfg is not None and cfg.rule.chooses_blocks), "")
    tokens = training.seq_len
    kernels = {recipe.lighthouse.dense_backend if cfg is None else cfg.dense_backend for cfg in cfgs}
    settings = {
        "training.compile = false": not training.compile,
        f'training.dtype = "{training.dtype}"': training.dtype != "bfloat16",
        "attention by plain matrix products": any(all_scores(recipe, kernel) for kernel in kernels),
        "DDP" if _ddp(recipe, processes) else "parallel.replicate": parallel.replicate > 1,
        f"parallel.context and {'this method' if stage == 'lighthouse' else 'every layer dense'}": (
            parallel.context > 1 and not rows
        ),
        f'lighthouse.method = "{chooses}" and more than {MOST_BLOCKED} tokens': chooses and tokens > MOST_BLOCKED,
        f"lighthouse.budget and more than {MOST_BUDGETED} tokens": (
            chooses and recipe.lighthouse.budget.every > 0 and tokens > MOST_BUDGETED
        ),
    }
    return [name for name, there in settings.items() if there]


def not_estimated(recipe: Recipe, stage: str) -> str:
    """Which operations of a stage hold more than is counted; "" for none."""
    for cfg in _attentions(recipe, stage):
        if cfg is not None and cfg.pools and cfg.backend == "reference":
            return 'lighthouse.backend = "reference" holds more than is counted'
        kernel = recipe.lighthouse.dense_backend if cfg is None else cfg.dense_backend
        if kernel == "math" and not _plain(recipe, cfg):
            return 'of lighthouse.dense_backend = "math", windows, chunks and documents hold more than is counted'
    return ""


def _attentions(recipe: Recipe, stage: str) -> list[LighthouseConfig | None]:
    """Settings of the Lighthouse layers of a stage in each phase, None for dense ones."""
    if stage == "dense":
        return [None]
    return [None if phase.dense else phase.attention for phase in recipe.phases]


def _plain(recipe: Recipe, cfg: LighthouseConfig | None) -> bool:
    """Whether a layer, None for a dense one, attends by causal calls alone, without windows, chunks and documents."""
    return (cfg is None or (cfg.pools and not cfg.window)) and recipe.data.packing != "documents"


def all_scores(recipe: Recipe, kernel: str) -> bool:
    """Whether a dense call by that kernel makes the scores of all pairs at once on a GPU. torch takes plain matrix
    products where none of its fused kernels takes the tensors: for grouped heads all of these want 16 bits, and D of at
    most 256."""
    model = recipe.model
    grouped = model.heads != max(model.kv_heads, recipe.parallel.context)
    unfused = grouped and (recipe.training.dtype == "float32" or model.head_dim > 256)
    return kernel == "math" or (kernel == "auto" and unfused and recipe.data.packing != "documents")


def _stage_bytes(recipe: Recipe, processes: int, *, gpu: bool) -> dict[str, int]:
    """What a process needs beside weights, gradients and optimizer, by the name of each stage.

    What is kept of all layers is there at the peak. Besides, the larger of two things. In the last layer's backward
    pass: everything of that layer which was not kept, the gradients of its feed-forward and of two rows of the model's
    width, the hidden states around the head, and weights of the head and of a layer in the compute type, with their
    gradients. In the loss: the logits of a chunk, hidden states and their gradient, and the head's weights in the
    compute type, with their gradient, which is float32 there. Derived from what torch.compile keeps, with the number of
    rows fitted to measured peaks (docs/memory.md).

    The rotary table is there besides, whole on every process, and again for each sequence of documents.
    """
    model, training = recipe.model, recipe.training
    width = 4 if training.dtype == "float32" else 2
    # Processes that share sequences attend to whole ones, for some of the heads: per token of theirs, as for all heads.
    context = recipe.parallel.context
    dense, q, kv = Method(), model.heads * model.head_dim, model.kv_heads * model.head_dim
    copies = max(1, context // model.kv_heads) if context > 1 else 0
    tokens, plain = training.seq_len, recipe.phases[-1].attention

    # Autocast casts what matrix products take, and leaves the hidden states in float32: a row more, of 16 bits.
    autocast = width == 2 and _ddp(recipe, processes)
    residual = model.dim if autocast else 0

    def by_rows(cfg: LighthouseConfig | None) -> bool:
        return cfg is not None and copies > 0 and cfg.pools and cfg.rule.whole(cfg, tokens, context) is None

    def share(cfg: LighthouseConfig | None) -> float:
        """Of the tokens, the rows that are exchanged."""
        return cfg.geometry(tokens).gathered_length / tokens if cfg is not None and by_rows(cfg) else 1

    @cache  # layers share few methods
    def kept(cfg: LighthouseConfig | None, mode: str) -> float:
        """Numbers a token that are kept of one layer with such settings, None for a dense one."""
        method, settings = (dense, plain) if cfg is None else (cfg.rule, cfg)
        if mode == "full":
            return model.dim + residual
        eager = not training.compile
        # Where only gathered rows are exchanged, those are there twice, and nothing else.
        of_tokens = 0 if by_rows(cfg) else copies
        counted: Settings = settings
        if recipe.lighthouse.budget.every and method.chooses_blocks:
            # The lists of all KV heads are as wide as that of the head with most blocks could become.
            counted = replace(settings.constant(), blocks=WIDEST * settings.blocks)
        attention = method.kept_numbers(counted, tokens, q, kv, mode=mode, copies=of_tokens, compiled=not eager)
        if mode == "attention":
            return attention + model.dim + residual
        if by_rows(cfg) and mode == "none":
            attention += share(cfg) * (q + 2 * kv * (copies - 1))
        # The layer's input; besides, of selective the first product of the feed-forward, else all and three rows more.
        # Eager mode also keeps the feed-forward's last product, or what was normed and what the gate makes.
        if mode == "selective":
            return attention + model.dim * (1 + eager) + model.ffn_dim + residual
        return attention + model.dim * (4 + 2 * eager) + model.ffn_dim * (3 + eager) + residual

    def exchanged(cfg: LighthouseConfig | None) -> float:
        """Numbers a token that are sent and received at once, beside what attention keeps."""
        return share(cfg) * 2 * (q + 2 * kv * copies) if copies else 0

    @cache
    def scores(cfg: LighthouseConfig | None) -> int:
        """Bytes of the scores of all pairs of a layer, which plain matrix products make in float32. Those of windows,
        chunks and documents are made in rows."""
        kernel = recipe.lighthouse.dense_backend if cfg is None else cfg.dense_backend
        every_pair = all_scores(recipe, kernel) if gpu else kernel == "math"
        if not every_pair or not _plain(recipe, cfg):
            return 0
        rows = cfg.geometry(tokens).gathered_length if cfg is not None and cfg.pools else tokens
        return 4 * training.local_batch_size * max(1, model.heads // context) * rows**2

    mode = training.activation_checkpointing
    stages: dict[str, list[list[LighthouseConfig | None]]] = {"dense": [[None] * model.layers]}
    if recipe.lighthouse.enabled:
        each: list[list[LighthouseConfig | None]] = []
        for phase in recipe.phases:
            sparse = phase.sparse_layers(model.layers)
            each.append([phase.attention] * sparse + [None] * (model.layers - sparse))
        stages = {"lighthouse": each, **stages}
    counts = model.kind.parameters(model)
    rows = training.local_batch_size * tokens // context
    logits = min(rows, training.loss_chunk) * model.vocab_size * width
    loss = rows * 4 * (model.dim + residual) * width + logits + counts.head * (2 * width + 4)
    table = 4 * tokens * model.head_dim * (1 + training.local_batch_size * (recipe.data.packing == "documents"))
    # Of all layers the backward pass needs the weights as autocast cast them, but where it casts them anew.
    cast = 2 * counts.body if autocast and (mode == "none" or not training.compile) else 0

    def needed(layers: list[LighthouseConfig | None]) -> int:
        numbers = max(kept(layer, "none") - kept(layer, mode) + exchanged(layer) for layer in layers)
        numbers += 3 * model.ffn_dim + 5 * model.dim
        weights = 2 * counts.head * width + counts.body // model.layers * (2 * width + 4)
        # Of one layer there are the scores' softmax and two gradients, beside what the others keep.
        of_pairs = 3 * max(map(scores, layers))
        if mode == "none":
            of_pairs += sum(map(scores, layers)) - max(map(scores, layers))
        last = rows * numbers * width + weights + of_pairs
        return int(rows * sum(kept(layer, mode) for layer in layers) * width + max(last, loss) + table + cast)

    # Of a stage, the phase that takes most.
    return {name: max(map(needed, phases)) for name, phases in stages.items()}
