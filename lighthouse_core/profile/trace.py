"""What a training step spends its time on, from a Chrome trace of torch's profiler. Nothing here imports torch.

A kernel leads to the call that launched it, and that to the operations and annotations around it on its thread; a
backward operation leads to the forward one of its sequence number. The first of these that knows decides:
communication; the annotation of lighthouse_core.titan.tracing; the operation's name and the shapes of its inputs; the
kernel's name. Without a GPU an operation's own time is what it and no other within it takes. On a GPU communication
costs what it takes while nothing else runs.
"""

import gzip
import json
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from lighthouse_core.annotations import (
    CATEGORIES,
    COMMUNICATION,
    DATA,
    DENSE_CALL,
    DENSE_LAYERS,
    EMBEDDING,
    GATHER,
    HEAD,
    IDLE,
    MERGE,
    MLP,
    MODEL,
    OPTIMIZER,
    OTHER,
    PROJECTIONS,
    PYRAMID,
    REST,
    SCATTER,
    SELECT,
)
from lighthouse_core.errors import LighthouseError

_STEP = "ProfilerStep#"
# Of the times in a trace, microseconds.
_ROUNDING = 0.01
_BACKWARD = "autograd::engine::evaluate_function: "
_COMMUNICATION = ("c10d::", "_c10d_functional::", "fsdp::", "FSDP::", "gloo:", "nccl:", "record_param_comms")
_MATMULS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul")
# Of operations of ours and of kernels of ours, by how their names go on after "lighthouse::" and "_".
_OURS = {
    "pyramid": PYRAMID,
    "norm_scores": PYRAMID,
    "reduce_kernel": PYRAMID,
    "select": SELECT,
    "largest_block": SELECT,
    "gather": GATHER,
    "scatter": SCATTER,
    "merge": MERGE,
}
# Of nodes of autograd without a sequence number; FSDP takes it from those that make its modules' outputs.
_NODES = {
    "torch::autograd::AccumulateGrad": OTHER,
    "_LinearCrossEntropyBackward": HEAD,
    "EmbeddingBackward0": EMBEDDING,
}
# Where these operations have their window among their arguments.
_WINDOW = {
    "lighthouse::flash4": 5,
    "lighthouse::flash4_backward": 8,
    "lighthouse::varlen": 6,
    "lighthouse::varlen_backward": 9,
}
# Of operations whose inputs are all sequences one after the other.
_FLAT = ("lighthouse::varlen", "lighthouse::varlen_backward")


@dataclass(frozen=True)
class StepShapes:
    """The sizes that tell a step's operations apart.

    Attributes:
        dim: width of the model.
        q_width, kv_width: heads and key/value heads times the width of a head.
        ffn_dim: width of the feed-forward.
        vocab_size: rows of the head.
        tokens: N, of one sequence.
        batch: sequences of a micro-batch on one process.
    """

    dim: int
    q_width: int
    kv_width: int
    ffn_dim: int
    vocab_size: int
    tokens: int
    batch: int = 1


@dataclass(frozen=True)
class Cost:
    """One category of a step.

    Attributes:
        name: of CATEGORIES, or two of them with "or" between where the shapes fit both.
        ms: of all its kernels, or of its operations' own time without a GPU; of communication on a GPU, what is not
            hidden.
        share: of the step's wall time.
        forward_ms, backward_ms: of `ms`, outside of and within the backward pass; None where it has no part in that.
        calls: kernels, or operations; a wait is none.
    """

    name: str
    ms: float
    share: float
    forward_ms: float
    backward_ms: float | None
    calls: int


@dataclass(frozen=True)
class Breakdown:
    """Where the time of one step goes.

    Attributes:
        device: "cuda" or "cpu".
        wall_ms: of the step.
        rows: what took time, in the order of CATEGORIES, idle last.
        idle_ms: of the wall time, with no kernel running; without a GPU, with the main thread in no operation. Waiting
            for data is no idle time.
        overlap_ms: counted more than once, for several streams or threads were at work; rows minus this is the wall
            time.
        hidden_ms: of communication on a GPU, while other kernels ran; in no row.
        largest: names of the three largest rows.
    """

    device: str
    wall_ms: float
    rows: list[Cost]
    idle_ms: float
    overlap_ms: float
    hidden_ms: float
    largest: list[str]

    def ms(self, name: str) -> float:
        """Of the category of that name, 0 without one."""
        return sum(cost.ms for cost in self.rows if cost.name == name)


@dataclass(eq=False)
class _Event:
    """Of a thread: an operation, an annotation or a call of CUDA's; times in microseconds."""

    name: str
    kind: str
    thread: tuple[Any, Any]
    start: float
    end: float
    args: dict[str, Any]
    parent: "_Event | None" = None
    own: float = 0.0
    context: "_Context | None" = field(default=None, repr=False)


class _Context(NamedTuple):
    """What is known where an event is: the category so far, whether it is backward, the outermost operation."""

    category: str | None
    backward: bool
    op: str
    within_op: bool


_Span = tuple[float, float]


class _Sample(NamedTuple):
    category: str
    backward: bool
    op: str
    kernel: str
    us: float


class _Step(NamedTuple):
    device: str
    wall: float
    samples: list[_Sample]
    idle: float
    overlap: float
    hidden: float = 0.0


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of a Chrome trace, .json or .json.gz.

    Raises:
        LighthouseError: the file is none.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            return json.load(file, strict=False)["traceEvents"]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise LighthouseError(f"{path} is no trace of torch's profiler: {error}") from None


def breakdown(events: list[dict[str, Any]], shapes: StepShapes) -> Breakdown:
    """The costs of the trace's last whole step.

    Raises:
        LighthouseError: there is none.
    """
    step = _measure(events, shapes)
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    calls: dict[str, int] = defaultdict(int)
    for sample in step.samples:
        sums[sample.category][sample.backward] += sample.us / 1e3
        calls[sample.category] += bool(sample.kernel)
    sums[IDLE][0] = step.idle / 1e3
    wall = step.wall / 1e3
    rows = [
        Cost(name, forward + backward, (forward + backward) / wall, forward, backward or None, calls[name])
        for name, (forward, backward) in sorted(sums.items(), key=lambda item: _place(item[0]))
    ]
    largest = [row.name for row in sorted(rows, key=lambda row: -row.ms)[:3]]
    return Breakdown(step.device, wall, rows, step.idle / 1e3, step.overlap / 1e3, step.hidden / 1e3, largest)


def folded(events: list[dict[str, Any]], shapes: StepShapes) -> list[str]:
    """The same as lines `step;category;op;kernel MICROSECONDS`, for flame graphs. Without a GPU the last frame is the
    operation whose own time it is; `op` is the outermost one, in the backward pass autograd's node."""
    step = _measure(events, shapes)
    sums: dict[tuple[str, ...], float] = defaultdict(float)
    for sample in step.samples:
        frames = (sample.category, sample.op, sample.kernel)
        sums[tuple(frame for i, frame in enumerate(frames) if frame and frame != frames[i - 1])] += sample.us
    sums[(IDLE,)] = step.idle
    return [
        f"{';'.join(frame.replace(';', ',') for frame in ('step', *frames))} {us:.0f}"
        for frames, us in sorted(sums.items())
        if us >= 0.5
    ]


def _place(name: str) -> tuple[int, str]:
    return CATEGORIES.index(name.partition(" or ")[0]), name


def _measure(events: list[dict[str, Any]], shapes: StepShapes) -> _Step:
    nested = _nest(events)
    steps = [event for event in nested if event.name.startswith(_STEP)]
    if not steps:
        raise LighthouseError(f"the trace holds no whole step: no {_STEP}N")
    step = max(steps, key=lambda event: event.start)
    nested = [event for event in nested if step.start <= event.start < step.end]
    contexts = _Contexts(nested, step.thread, shapes)
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if any(e["cat"] == "kernel" for e in kernels):
        return _on_gpu(step, nested, contexts, kernels)
    return _on_cpu(step, nested, contexts)


def _on_cpu(step: _Event, nested: list[_Event], contexts: "_Contexts") -> _Step:
    samples, spans, waits = [], [], []
    for event in nested:
        category, backward, op, within_op = contexts.of(event)
        if within_op:
            samples.append(_Sample(_final(category), backward, op, event.name.removeprefix(_BACKWARD), event.own))
        elif category == COMMUNICATION:
            waits.append((event.start, event.end))
        if event.thread == step.thread and event.kind == "cpu_op":
            spans.append((event.start, event.end))
    return _whole("cpu", step, samples, spans, {DATA: _waits_for_data(nested), COMMUNICATION: waits})


def _on_gpu(step: _Event, nested: list[_Event], contexts: "_Contexts", kernels: list[dict[str, Any]]) -> _Step:
    calls = {e.args["correlation"]: e for e in nested if "correlation" in e.args and e.parent}
    ops = {e.args["External id"]: e for e in nested if "External id" in e.args and e.kind == "cpu_op"}
    samples, spans = [], []
    for kernel in kernels:
        start, end = max(kernel["ts"], step.start), min(kernel["ts"] + kernel["dur"], step.end)
        if start >= end:
            continue
        args = kernel.get("args", {})
        launch = calls.get(args.get("correlation")) or ops.get(args.get("External id"))
        category, backward, op, _ = contexts.of(launch)
        category = _by_kernel(kernel["name"], category)
        samples.append(_Sample(_final(category), backward, op, _short(kernel["name"]), end - start))
        spans.append((start, end))
    shown = _without_hidden(samples, spans)
    hidden = sum(sample.us for sample in samples) - sum(sample.us for sample in shown)
    return _whole("cuda", step, shown, spans, {DATA: _waits_for_data(nested)})._replace(hidden=hidden)


def _without_hidden(samples: list[_Sample], spans: list[_Span]) -> list[_Sample]:
    """The samples, those of communication with the part of their spans in which no kernel of another category and no
    communication that began before runs."""
    shown = list(samples)
    busy = _joined(span for sample, span in zip(samples, spans, strict=True) if sample.category != COMMUNICATION)
    starts, ends, reached = [start for start, _ in busy], [end for _, end in busy], float("-inf")
    for i in sorted(range(len(samples)), key=spans.__getitem__):
        if samples[i].category != COMMUNICATION:
            continue
        start, end = spans[i]
        start, reached = min(max(start, reached), end), max(reached, end)
        near = busy[bisect_right(ends, start) : bisect_left(starts, end)]
        shown[i] = samples[i]._replace(us=_outside(near, (start, end)))
    return shown


def _joined(spans: Iterable[_Span]) -> list[_Span]:
    """The same times as spans apart from each other, in order."""
    joined: list[_Span] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return joined


def _waits_for_data(nested: list[_Event]) -> list[_Span]:
    return [(event.start, event.end) for event in nested if event.name == DATA]


def _whole(
    device: str, step: _Event, samples: list[_Sample], spans: list[_Span], waits: dict[str, list[_Span]]
) -> _Step:
    """The step, with the idle time outside of `spans` that is spent waiting for something."""
    within = (step.start, step.end)
    wall, idle = step.end - step.start, _outside(spans, within)
    for category, more in waits.items():
        spans = spans + more
        left = _outside(spans, within)
        if left < idle:
            samples.append(_Sample(category, False, "", "", idle - left))
        idle = left
    return _Step(device, wall, samples, idle, sum(sample.us for sample in samples) + idle - wall)


def _outside(spans: list[_Span], within: _Span) -> float:
    """How much of a time lies outside of all spans."""
    reached, last = within
    total = 0.0
    for start, end in sorted(spans):
        total += max(0.0, min(start, last) - reached)
        reached = max(reached, min(end, last))
    return total + last - reached


def _nest(events: list[dict[str, Any]]) -> list[_Event]:
    """The events of threads, in the order of time, each with its parent and its own time."""
    found = [
        _Event(e["name"], e["cat"], (e["pid"], e["tid"]), e["ts"], e["ts"] + e["dur"], e.get("args", {}), own=e["dur"])
        for e in events
        if e.get("ph") == "X" and e.get("cat") in ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")
    ]
    found.sort(key=lambda event: (event.start, -event.end))
    innermost: dict[tuple[Any, Any], _Event | None] = {}
    for event in found:
        parent = innermost.get(event.thread)
        # What begins an annotation may be an operation that the annotation outlives.
        while parent is not None and parent.end + _ROUNDING < event.end:
            parent = parent.parent
        if parent is not None:
            event.parent = parent
            parent.own = max(0.0, parent.own - (event.end - event.start))
        innermost[event.thread] = event
    return found


class _Contexts:
    """What is known of events, each worked out once.

    Args:
        nested: the events of a step, in the order of time.
        main: the thread of the step.
        shapes: of the step.
    """

    def __init__(self, nested: list[_Event], main: tuple[Any, Any], shapes: StepShapes):
        self.main, self.shapes = main, shapes
        self.forward: dict[tuple[Any, int], _Event] = {}
        self.main_number: int | None = None
        for event in nested:
            number = event.args.get("Sequence number")
            if number is None:
                continue
            if thread := event.args.get("Fwd thread id"):
                # The backward pass begins at the loss, which the main thread made.
                self.main_number = self.main_number or thread
            else:
                # Of several, the last one has the node: the others are around it, or make none.
                self.forward[event.thread, number] = event

    def of(self, event: _Event | None) -> _Context:
        if event is None:
            return _Context(None, False, "", False)
        if event.context is None:
            event.context = self._work_out(event, self.of(event.parent))
        return event.context

    def _work_out(self, event: _Event, around: _Context) -> _Context:
        category, backward, op, within_op = around
        name = event.name
        if name.startswith(_COMMUNICATION):
            category = COMMUNICATION
        elif event.kind == "user_annotation":
            if name in CATEGORIES or name == MODEL:
                category = name
            elif name.startswith("Optimizer."):
                category = OPTIMIZER
        elif name.startswith(_BACKWARD):
            origin, backward = self._origin(event), True
            category = self.of(origin).category if origin else _NODES.get(name.removeprefix(_BACKWARD), MODEL)
        elif category in (None, MODEL):
            category = self._by_op(event) or category
        if event.kind == "cpu_op":
            within_op = True
            if not op and "Compiled" not in name:
                op = name.removeprefix(_BACKWARD)
        return _Context(category, backward, op, within_op)

    def _origin(self, event: _Event) -> _Event | None:
        """The forward operation of a backward one. What checkpointing makes again, the backward thread itself makes."""
        thread = self.main if event.args.get("Fwd thread id") == self.main_number else event.thread
        return self.forward.get((thread, event.args.get("Sequence number", -1)))

    def _by_op(self, event: _Event) -> str | None:
        name, dims = event.name, event.args.get("Input Dims") or [[]]
        if name in _WINDOW:
            given = event.args.get("Concrete Inputs") or []
            window = given[_WINDOW[name] :][:1]
            longest = [int(x) for x in given[_WINDOW[name] - 2 :][:1] if x.isdigit()]
            length = longest if name in _FLAT else dims[0][1:2]
            return self._attention(length, windowed=window not in ([], ["0"], [""]))
        if "scaled_dot_product" in name:
            return self._attention(dims[0][2:3])
        if name.startswith("lighthouse::"):
            return _ours(name.removeprefix("lighthouse::"))
        if name in _MATMULS:
            return self._by_product([size for size in dims if len(size) > 1])
        if name.startswith("aten::embedding"):
            return EMBEDDING
        return HEAD if name == "_LinearCrossEntropy" else None

    def _attention(self, length: list[int], windowed: bool = False) -> str:
        """Lighthouse layers attend over fewer tokens than there are, or over a window."""
        return DENSE_LAYERS if length == [self.shapes.tokens] and not windowed else DENSE_CALL

    def _by_product(self, matrices: list[list[int]]) -> str | None:
        if len(matrices) < 2:
            return None
        s, sizes = self.shapes, [*matrices[0][-2:], matrices[1][-1]]
        if s.batch * s.tokens in sizes:
            sizes.remove(s.batch * s.tokens)
        pairs = {frozenset(pair) for pair in combinations(sizes, 2)}
        widths = {PROJECTIONS: (s.q_width, s.kv_width), MLP: (s.ffn_dim,), HEAD: (s.vocab_size,)}
        fits = [name for name, wide in widths.items() if any(frozenset((s.dim, width)) in pairs for width in wide)]
        return " or ".join(fits) or None


def _final(category: str | None) -> str:
    return REST if category == MODEL else category or OTHER


def _ours(name: str) -> str | None:
    return next((category for prefix, category in _OURS.items() if name.startswith(prefix)), None)


def _by_kernel(name: str, category: str | None) -> str | None:
    """The category of a kernel, where `category` is that of what launched it."""
    if name.startswith("nccl"):
        return COMMUNICATION
    if category not in (None, MODEL):
        return category
    if name.startswith("triton_") and ("silu" in name or "sigmoid" in name):
        return MLP
    return _ours(name[1:]) if name.startswith("_") and _ours(name[1:]) else category


def _short(kernel: str) -> str:
    """A kernel's name without its types."""
    return (
        kernel.replace("(anonymous namespace)::", "").removeprefix("void ").partition("<")[0].partition("(")[0].strip()
    )
