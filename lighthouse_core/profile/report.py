"""A directory that says what was measured: report.md, results.json, figures."""

import contextlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from lighthouse_core.annotations import COMMUNICATION
from lighthouse_core.attention.methods import method_of
from lighthouse_core.attention.selectors import selector_of
from lighthouse_core.attention.settings import Settings
from lighthouse_core.errors import UserError, refusal
from lighthouse_core.files import STAGING, check_output, check_replaceable, remove_empty, together, write_atomically
from lighthouse_core.profile.attention import AttentionProfile, Call, Pass
from lighthouse_core.profile.heads import HeadsView
from lighthouse_core.profile.machine import Roof
from lighthouse_core.profile.selection import SelectionView
from lighthouse_core.profile.step import StepProfile
from lighthouse_core.profile.sweep import Sweep
from lighthouse_core.profile.trace import Breakdown
from lighthouse_core.profile.tune import Advice
from lighthouse_core.reading import read_json
from lighthouse_core.shown import shown

SCHEMA = 4
# Columns that a narrow terminal can do without, the first ones first; report.md has them.
_LEAST = ("calls", "p10", "p90", "GFLOP", "peak GiB", "faster, forward", "coarsest")
_LEAK = "The scorer {} lets later tokens decide what is seen, and stage 1 learns from that; block does not."
_CHUNKS = (
    "Growing chunks in all layers, which the same report recommends by loss; at other lengths than 16384 and 65536 "
    "their windows are a guess:"
)
_DOCUMENTS = (
    "The recipe keeps documents apart, but all times here are of one document a sequence: with documents, dense and "
    "Lighthouse attention both take less. `lighthouse profile step` measures a step with documents. A pyramid without "
    "a window does not keep them apart."
)
_LOSS = "head + loss: its gradients are made in the forward pass."
_REFERENCE = "GB are what the Triton kernels would move at least; plain PyTorch divides the work otherwise."
_TRITON = "The gather's backward pass is that of the pyramid, too."
_ALONE = "One process has nobody to talk to: its communication is FSDP's copies and casts of weights and gradients."
_PRODUCTS = (
    "math inside: plain matrix products, which keep their scores, in place of FlashAttention-4; its times are others."
)
_DRIFT = "A CPU's speed drifts from call to call by more than p10 and p90 show: run it again before you use a ratio."
_FIRST = "Rows are of the first process; its communication includes waiting for the others."
_FIGURES = [f"{name}.{suffix}" for name in ("latency", "memory", "selection") for suffix in ("png", "svg")]
_LEFT = re.compile(
    rf"pretrain\.log|runs|traces|trace\.json\.gz|stacks\.folded|dense|(window|phase)-[0-9]+|\.{STAGING}[0-9a-f]+"
)
# A file that says that a profile was begun here, until its report is there: the names above may be anybody's.
_BEGUN = ".profile-begun"
_KINDS = ("attention", "step", "tune", "selection")
# A call whose p90 is so many times its p10 was not alone on the machine.
_NOISY = 1.5


@dataclass(frozen=True)
class Table:
    """Rows of text below a title; the first `text_columns` are words, the others numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1

    def narrowed(self, width: int) -> "Table":
        """Without the columns that matter least, if it is wider than so many characters."""
        table = self
        for column in _LEAST:
            if table._width() > width and column in table.columns:
                at = list(table.columns).index(column)
                columns, *rows = ([*row[:at], *row[at + 1 :]] for row in (table.columns, *table.rows))
                table = replace(table, columns=columns, rows=rows)
        return table

    def _width(self) -> int:
        return sum(max(map(len, column)) + 3 for column in zip(self.columns, *self.rows, strict=True))


@dataclass(frozen=True)
class Report:
    """What a profile says.

    Attributes:
        title: of the report.
        kind: `attention`, `step`, `tune` or `selection`.
        machine: device, processor and versions.
        parts: tables and sentences, in order.
        results: for results.json.
        roof: of the machine, where times are compared with it.
        draw: writes the figures into a folder and returns their files.
    """

    title: str
    kind: str
    machine: dict[str, Any]
    parts: list[Table | str]
    results: dict[str, Any]
    roof: Roof | None = None
    draw: Callable[[Path], list[Path]] = lambda folder: []

    def as_json(self) -> dict[str, Any]:
        """What results.json holds: `schema`, `kind`, `machine`, `roof` and the results."""
        roof = asdict(self.roof) if self.roof else None
        return {"schema": SCHEMA, "kind": self.kind, "machine": self.machine, "roof": roof, **self.results}

    def write(self, folder: Path) -> None:
        """Write report.md, results.json and the figures; those of an earlier report go.

        Raises:
            UserError: the folder cannot be written to.
        """
        try:
            with together(folder) as place:
                drawn = [path.name for path in self.draw(place)]
                write_atomically(place / "results.json", json.dumps(self.as_json(), indent=1) + "\n")
                write_atomically(place / "report.md", self._markdown(drawn))
            for name in set(_FIGURES) - set(drawn):
                (folder / name).unlink(missing_ok=True)
            (folder / _BEGUN).unlink(missing_ok=True)
        except OSError as error:
            raise refusal(error, f"cannot write to {folder}", "choose another --out") from None

    def _markdown(self, drawn: Sequence[str]) -> str:
        lines = [f"# {_text(self.title)}", "", _text(_machine_line(self.machine))]
        if self.roof:
            lines += ["", roof_line(self.roof)]
        for part in self.parts:
            lines.append("")
            lines += _markdown_table(part) if isinstance(part, Table) else [part]
        for name in drawn:
            if name.endswith(".png"):
                lines += ["", f"![{Path(name).stem}]({name})"]
        return "\n".join(lines) + "\n"


def prepare(folder: Path, kind: str) -> list[Path]:
    """Make the folder of a report of this kind, before anything is measured.

    Returns:
        The folders that were made, innermost first.

    Raises:
        UserError: it cannot be made, or holds something else.
    """
    check_output(folder)
    ours = (folder / "results.json").exists() or _cut_off(folder)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not ours)):
        raise UserError(f"{folder} is there and is no report", hint="choose another --out")
    if (there := _kind(folder)) not in (None, kind):
        raise UserError(f"{folder} has a report of another kind: {there}", hint="choose another --out")
    check_replaceable(folder, "results.json", _is_profile, ("report.md", *_FIGURES))
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / _BEGUN, "")
    except OSError as error:
        remove_empty(made)
        raise refusal(error, f"cannot make {folder}", "choose another --out") from None
    return made


def give_up(folder: Path, made: Sequence[Path]) -> None:
    """Leave nothing of a report that was begun and has nothing in it, and no mark in an earlier one.

    Args:
        folder: of the report.
        made: what `prepare` returned.
    """
    with contextlib.suppress(OSError):
        # In a report that is whole, the mark would call ours whatever somebody puts beside it.
        if os.listdir(folder) == [_BEGUN] or (folder / "results.json").exists():
            (folder / _BEGUN).unlink()
    remove_empty(made)


def _cut_off(folder: Path) -> bool:
    """Whether a folder holds what a profile leaves that was cut off before its report, and nothing else."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    begun = _BEGUN in names and (folder / _BEGUN).is_file() and not (folder / _BEGUN).is_symlink()
    return begun and all(_LEFT.fullmatch(name) for name in names - {_BEGUN})


def _is_profile(content: dict[str, Any]) -> bool:
    return content.get("kind") in _KINDS and "machine" in content


def _kind(folder: Path) -> str | None:
    """Of the report in a folder; None where there is none that can be read."""
    try:
        return read_json(folder / "results.json")["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _markdown_table(table: Table) -> list[str]:
    lines = [f"## {_text(table.title)}", ""] if table.title else []
    rule = ["---"] * table.text_columns + ["--:"] * (len(table.columns) - table.text_columns)
    texts = ([_text(cell) for cell in row] for row in (table.columns, *table.rows))
    columns, *rows = (f"| {' | '.join(row)} |" for row in texts)
    return [*lines, columns, f"| {' | '.join(rule)} |", *rows]


def _text(text: str) -> str:
    """A line of text in Markdown, in which a name from outside begins no cell, link or element."""
    return re.sub(r"[|<\[\]`]", r"\\\g<0>", shown(text))


def _machine_line(machine: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    commit = f"; commit {machine['git_commit']}" if machine["git_commit"] else ""
    return f"{machine['device']}, {machine['memory_gib']} GiB; {packages}; Python {machine['python']}{commit}."


def roof_line(roof: Roof) -> str:
    """The machine's roof in words."""
    return (
        f"Roof of this machine, measured in the same process: a copy {_rate(roof.bytes_per_second, 'B/s')}, a "
        f"{roof.dtype} matrix product {_rate(roof.flops_per_second, 'FLOP/s')}."
    )


def _rate(rate: float, unit: str) -> str:
    return f"{rate / 1e12:.3g} T{unit}" if rate >= 1e12 else f"{rate / 1e9:.3g} G{unit}"


def attention_parts(sweep: Sweep) -> list[Table | str]:
    """Tables and sentences of the profiles of one or several lengths."""
    parts: list[Table | str] = []
    for profile in sweep.profiles:
        parts += _profile_parts(profile)
    if len(sweep.profiles) > 1:
        rows = [
            (curve.label, f"{curve.law.slope:.2f}" if curve.law else "-", str(len(curve.measured)))
            for curve in sweep.curves
        ]
        parts.append(
            Table(
                "Growth: time forward and backward goes with this power of the length",
                ("call", "slope", "lengths"),
                rows,
            )
        )
        if sweep.shares:
            shares = ", ".join(f"{share:.2%}" for share in sweep.shares)
            parts.append(f"The pyramid is another one at each length, and holds {shares} of the tokens at level 0.")
        labels = {curve.name: curve.label for curve in sweep.curves}
        parts += [
            f"Against {labels[name]}, forward and backward: {found.note}." for name, found in sweep.crossovers.items()
        ]
    return [*parts, *(f"{note}." for note in sweep.notes)]


def _profile_parts(profile: AttentionProfile) -> list[Table | str]:
    settings = profile.settings
    method = method_of(settings["method"])
    keys = method.shown
    chosen = ", ".join(f"{key} {settings[key]}" for key in (*keys, "window") if settings[key])
    length = f", S = {settings['gathered_length']}" if "gathered_length" in settings else ""
    shape = f"N = {profile.tokens}{length}, {settings['heads']}/{settings['kv_heads']} heads of {settings['head_dim']}"
    title = f"{shape}, {settings['dtype']}; {chosen}"
    if profile.level_0 is not None:
        title += f", {profile.level_0:.2%} of the tokens at level 0"
    parts: list[Table | str] = []
    if profile.stages:
        parts += _stage_parts(profile, title)
    calls = (profile.lighthouse, *profile.others, *profile.dense)
    columns = ("call", "forward ms", "both ms", "p10", "p90", "calls", "peak GiB", "faster, forward", "faster, both")
    rows = [(*_call_cells(call), *_faster_cells(profile, call)) for call in calls]
    parts.append(Table(f"Calls, {title}", columns, rows))
    if profile.dense:
        parts.append("Faster: times that the first row is faster than this one.")
    worst = max(profile.checks.values())
    parts.append(
        f"Checked before it was timed: output and gradients of all of these differ from plain PyTorch in float32 by "
        f"{worst:.1e} at most (relative; results.json has each, and on how many tokens)."
    )
    if profile.lighthouse.peak_gib is None:
        parts.append(_DRIFT)
    known = {one.name: settings[one.name] for one in fields(Settings) if one.name in settings}
    parted = method.windows or method.chooses_blocks or method.adds_parts(Settings(**known))
    if parted and settings["dense_backend"] == "math":
        parts.append(_PRODUCTS)
    noisy = [call.label for call in calls if call.both_ms.p90 > _NOISY * call.both_ms.p10]
    if noisy:
        parts.append(
            f"Noisy (p90 above {_NOISY} times p10): {'; '.join(noisy)}. Something else was at work on this machine. "
            "Profile again when it is idle, before you use these times."
        )
    odd = [call.label for call in calls if call.forward_ms.median > call.both_ms.median]
    if odd:
        parts.append(f"Not to be used, as slower forward than both ways: {'; '.join(odd)}.")
    if profile.absent:
        parts.append("Not timed: " + "; ".join(f"{name} {why}" for name, why in profile.absent.items()) + ".")
    return parts


def _stage_parts(profile: AttentionProfile, title: str) -> list[Table | str]:
    inside = f"{profile.settings['backend']}, {profile.settings['dense_backend']} inside"
    rows = [
        (stage.name, direction, *_pass_cells(found))
        for stage in profile.stages
        for direction, found in (("forward", stage.forward), ("backward", stage.backward))
        if found is not None
    ]
    columns = ("stage", "pass", "ms", "p10", "p90", "GB", "GFLOP", "reached", "of roof")
    passes = [one for stage in profile.stages for one in (stage.forward, stage.backward) if one]
    together = sum(one.ms.median for one in passes)
    return [
        Table(f"Stages ({inside}), {title}", columns, rows, text_columns=2),
        f"Timed one after the other, as in the call: together {together:.2f} ms, where the call takes "
        f"{profile.lighthouse.both_ms.median:.2f}.",
        _REFERENCE if profile.settings["backend"] == "reference" else _TRITON,
    ]


def _call_cells(call: Call) -> tuple[str, ...]:
    both = call.both_ms
    return (
        call.label + (f" (worked out from {call.extrapolated} tokens)" if call.extrapolated else ""),
        f"{call.forward_ms.median:.2f}",
        f"{both.median:.2f}",
        *((f"{both.p10:.2f}", f"{both.p90:.2f}") if both.calls > 1 and not call.extrapolated else ("-", "-")),
        "-" if call.extrapolated else str(both.calls),
        "-" if call.peak_gib is None else f"{call.peak_gib:.2f}",
    )


def _faster_cells(profile: AttentionProfile, call: Call) -> tuple[str, str]:
    found = profile.speedup.get(call.name)
    return (f"{found['forward']:.2f}x", f"{found['forward_backward']:.2f}x") if found else ("", "")


def _pass_cells(found: Pass) -> tuple[str, ...]:
    seconds = found.ms.median / 1e3
    if found.gigaflops:
        reached = _rate(found.gigaflops * 1e9 / seconds, "FLOP/s")
    else:
        reached = "-" if found.gigabytes is None else _rate(found.gigabytes * 1e9 / seconds, "B/s")
    return (
        f"{found.ms.median:.3f}",
        *((f"{found.ms.p10:.3f}", f"{found.ms.p90:.3f}") if found.ms.calls > 1 else ("-", "-")),
        "-" if found.gigabytes is None else f"{found.gigabytes:.3g}",
        f"{found.gigaflops:.1f}" if found.gigaflops else "-",
        reached,
        "-" if found.of_roof is None else f"{found.of_roof:.0%}",
    )


def tune_parts(advice: Advice) -> list[Table | str]:
    """The candidates and the fragments to paste."""
    rows = []
    for one, prediction in zip(advice.timed, advice.predictions, strict=True):
        settings = one.settings
        pyramid = one.gathered is not None
        own = pyramid and advice.own == (settings["pooling"], settings["levels"], settings["topk"])
        rows.append(
            (
                method_of(settings["method"]).summary(settings)
                + " (the recipe's)" * own
                + ", no dense layers" * (not one.dense_layers),
                settings["dense_backend"],
                str(one.gathered) if pyramid else "-",
                f"{one.share:.2%}" if pyramid else "-",
                str(one.coarsest) if pyramid else "-",
                f"{one.both_ms:.2f}",
                f"{prediction.step_ms:.0f}",
                f"{prediction.stage_1:.2f}x",
                f"{prediction.total:.2f}x",
            )
        )
    columns = ("stage 1", "dense kernel", "S", "level 0", "coarsest", "call ms", "step ms", "stage 1", "total")
    plan, bound = advice.plan, advice.bound
    dense = ", ".join(f"{name} {both:.2f} ms" for name, (_, both) in plan.dense.items())
    step = min(map(plan.dense_step_ms, plan.dense))
    title = f"{advice.recipe} at N = {advice.tokens}, times faster than dense, predicted"
    scorer = advice.timed[0].settings["scorer"]
    # No kernel may be there for a window that grows.
    chunks = advice.timed[-1].gathered is None
    return [
        Table(title, columns, rows, text_columns=2),
        f"Searched: pyramids that gather at least {advice.floor:.2%} of the tokens at level 0, in windows of at most "
        f"{advice.coarsest} tokens. The floor is no promise of a loss: recipes/evidence/REPORT.md has what was "
        "measured.",
        f"A dense call takes {dense}. All calls were timed alone, a few times each: what is a few per cent apart may "
        "change places in the next search.",
        f"A step with {plan.layers} dense layers takes {step:.0f} ms, {plan.rest_ms:.0f} of them no attention "
        f"(measured: a step of one micro-batch takes {advice.measured_step_ms:.0f} ms).",
        f"If Lighthouse calls took no time (Amdahl's bound), stage 1, with {plan.dense_layers} dense layers, would be "
        f"{bound.stage_1:.2f} times as fast, and {plan.steps} + {plan.recover_steps} steps {bound.total:.2f} times.",
        *([_LEAK.format(scorer)] if selector_of(scorer).leaks else []),
        *([_DOCUMENTS] if advice.documents else []),
        f"The pyramid with the shortest run:\n\n```toml\n{advice.fragment(0)}\n```",
        *([_CHUNKS + f"\n\n```toml\n{advice.fragment(len(advice.timed) - 1)}\n```"] if chunks else []),
    ]


def _noted(notes: Mapping[str, str]) -> list[str]:
    return [f"{name.capitalize()}: {note}" for name, note in notes.items()]


def selection_parts(view: SelectionView) -> list[Table | str]:
    """A row for each layer, and what the figures mean."""
    title = (
        f"{view.run} step {view.step}, scorer {view.scorer}, p {view.pooling}, L {view.levels}, k {view.topk}, "
        f"N = {view.tokens}, S = {view.gathered_length}: means over {view.kv_heads} KV heads (lowest to highest)"
    )
    return [
        Table(title, view.columns(), view.rows()),
        "level l: share of the tokens whose finest kept window is of that level. overlap l: of the parents that the "
        "queries alone would choose there, those that the keys would, too."
        + " kept: of the tokens at level 0 at one checkpoint, those at level 0 at the next." * bool(view.drift)
        + f" Held-out sequences: {view.sequences}.",
        *_noted(view.notes),
    ]


def heads_parts(view: HeadsView) -> list[Table | str]:
    """A row for each layer, and what the figures mean."""
    title = f"{view.run} step {view.step}, {view.method}, window {view.window}, N = {view.tokens}: each KV head"
    if view.threshold is None:
        rule = "Every head chooses as many blocks: lighthouse.budget.every is 0, the default."
    elif view.measured_step is None:
        rule = "Every head chooses as many blocks: this phase has measured nothing yet."
    else:
        rule = (
            f"The numbers follow from what training measured in step {view.measured_step}, with "
            f"lighthouse.budget.threshold {view.threshold:g}."
        )
    return [
        Table(title, view.columns(), view.rows()),
        "First the share of the head's attention beyond the window, by exact rows of the softmax, then the number of "
        f"blocks that the head chooses. Held-out sequences: {view.sequences}, {view.queries} queries of the second "
        "half of each.",
        rule,
        *_noted(view.notes),
    ]


def _hidden(costs: Breakdown) -> str:
    whole = costs.hidden_ms + costs.ms(COMMUNICATION)
    return f"Communication took {whole:.2f} ms, {costs.hidden_ms:.2f} of them beside other kernels, in no row."


def _sent(profile: StepProfile) -> str:
    each = (f"{sent / 2**20:.1f} MiB in a {kind} layer" for kind, sent in profile.exchanged.items())
    return f"Shared sequences, by their sizes: a process sends {' and '.join(each)}, forward and again backward."


def step_parts(profiles: Sequence[StepProfile]) -> list[Table | str]:
    """Where the time of each step goes, and how they compare."""
    parts: list[Table | str] = []
    for profile in profiles:
        costs = profile.breakdown
        rows = [
            (
                cost.name,
                f"{cost.ms:.2f}",
                f"{cost.share:.1%}",
                f"{cost.forward_ms:.2f}",
                "-" if cost.backward_ms is None else f"{cost.backward_ms:.2f}",
                str(cost.calls),
            )
            for cost in costs.rows
        ]
        what = f"{profile.recipe}, {profile.stage} step"
        what += f" of phase {profile.phase}" if profile.stage == "lighthouse" and len(profiles) > 2 else ""
        what += f", window {profile.window}" if profile.window else ""
        low, high = (f"{1e3 * seconds:.0f}" for seconds in (min(profile.timed), max(profile.timed)))
        title = (
            f"{what}: {costs.wall_ms:.0f} ms under the profiler, {profile.seconds * 1e3:.0f} ms without (median of "
            f"{len(profile.timed)}, {low} to {high})"
        )
        columns = ("what", "ms", "of the step", "forward ms", "backward ms", "calls")
        parts.append(Table(title, columns, rows))
        alone = profile.processes == 1 and any(cost.name == COMMUNICATION for cost in costs.rows)
        mfu = "" if profile.mfu is None else f", MFU {profile.mfu:.1%}"
        parts += [
            f"{profile.tokens} tokens a step on {profile.processes} process{'es' * (profile.processes > 1)}, "
            f"{profile.tokens_per_second:,.0f} tokens/s{mfu}, {profile.memory_gib:.2f} GiB at the peak; packing: "
            f"{profile.packing}.",
            "The three largest costs: " + "; ".join(costs.largest) + ".",
            _LOSS,
            *([_sent(profile)] if profile.exchanged else []),
            *([_hidden(costs)] if costs.hidden_ms >= 0.005 else []),
            *([_ALONE] if alone else []),
            *([_FIRST] if profile.processes > 1 else []),
            *(note[0].upper() + note[1:] + "." for note in profile.notes),
            f"Trace for Perfetto: {profile.trace}; folded stacks: {profile.stacks}.",
        ]
    if profiles[-1].stage == "dense" and len(profiles) > 1:
        *stage_1, dense = profiles
        ratios = ", ".join(f"{dense.seconds / profile.seconds:.2f}" for profile in stage_1)
        if len(stage_1) == 1:
            faster = f"The step of stage 1 is {ratios} times as fast as the dense one"
        else:
            phases, steps = ", ".join(str(profile.phase) for profile in stage_1), sum(one.steps for one in stage_1)
            mean = sum(profile.seconds * profile.steps for profile in stage_1) / steps
            faster = (
                f"Steps of phases {phases} are {ratios} times as fast as the dense one, and all of these phases "
                f"together {dense.seconds / mean:.2f} times"
            )
        parts.append(f"{faster}, all without the profiler.")
        if dense.breakdown.device == "cpu":
            parts.append(_DRIFT)
    return parts
