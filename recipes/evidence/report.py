"""REPORT.md of the experiments, from what `lighthouse sweep` collected:

python recipes/evidence/report.py recipes/evidence/results/*.json
"""

import argparse
import json
import math
from pathlib import Path
from statistics import fmean, median, stdev

from lighthouse_core.evaluate import compare

HERE = Path(__file__).parent
INTRODUCTION = """# Evidence: does stage 1 and a recovery match dense training?

Written by `recipes/evidence/report.py` from the JSON in [results/](results), which `lighthouse sweep` collected.
Losses are in nats per byte on held-out text, the same sequences for every run of a table, with dense attention unless
it is said otherwise; ± is the standard error over sequences. *Beside dense* is the mean paired difference from the
dense run of the same seed, whose rate decays if the other's does. *Beyond* is the loss of the tokens that have more
than a short context before them; *far context* is what they lose where they see no more than that, so more is better.
*Needles* is the share of hidden digits that are found, 0.10 by guessing. *Error of one call* is how far the output of a
layer's attention is from dense attention's of the same inputs, relative to the latter, over layers. Hypotheses: (1)
stage 1 reads the leak; (2) it lacks a neighbourhood at full resolution; (3) its function is not close to dense
attention; (4) heads that copy come late.
"""


EQUAL = """Losses on the validation text of the training, the same batches every time, that of dense as a straight line
between its validations. Steps count with their stage's median time, without compilation."""


def mean(value: dict, digits: int = 4) -> str:
    error = value["standard_error"]
    return f"{value['mean']:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def settings(run: dict, sections: tuple[str, ...], keys: tuple[str, ...]) -> str:
    """A run's recipe without those sections, what changes no result, and those keys, "a.b", of other sections."""
    left_out = ("output", "checkpoint", "metrics", *sections)
    recipe = {name: dict(part) for name, part in run["recipe"].items() if name not in left_out}
    for key in keys:
        section, name = key.split(".")
        recipe.get(section, {}).pop(name, None)
    return json.dumps(recipe, sort_keys=True)


def but_for_the_seed(run: dict) -> str:
    """The settings that repetitions of an experiment have in common."""
    return settings(run, (), ("training.seed",)) + str(run["settings"]["recover"])


def end_of(run: dict) -> dict | None:
    return run["evaluations"].get("end")


def decays(run: dict) -> bool:
    recipe = run["recipe"]
    recovers = run["settings"]["recover"] > 0 and recipe["recover"]["decay"] != "none"
    return recovers or recipe["schedule"]["decay_steps"] > 0


def dense_of(sweep: dict, run: dict) -> dict | None:
    """The run that is dense from the start and else has the same settings, and decays as this one does or does not."""

    def common(run: dict) -> str:
        return settings(
            run, ("lighthouse", "recover"), ("training.steps", "model.dense_layers", "schedule.decay_steps")
        )

    for other in sweep["runs"].values():
        enabled = other["recipe"]["lighthouse"]["enabled"]
        if not enabled and common(other) == common(run) and decays(other) == decays(run):
            return other
    return None


def beside(run: dict, dense: dict | None) -> str:
    if dense is run:
        return ""
    if dense is None or not end_of(dense):
        return "-"
    if end_of(run)["data"]["sha256"] != end_of(dense)["data"]["sha256"]:
        raise SystemExit("error: two runs of a sweep were measured on different text")
    pairs = zip(end_of(run)["loss"]["per_sequence"], end_of(dense)["loss"]["per_sequence"], strict=True)
    differences = [a - b for a, b in pairs]
    return f"{fmean(differences):+.4f} ± {stdev(differences) / math.sqrt(len(differences)):.4f}"


def needles(end: dict) -> str:
    cells = end.get("needles", {}).get("cells", [])
    return f"{fmean(cell['right'] / cell['trials'] for cell in cells):.2f}" if cells else "-"


def results(sweep: dict) -> str:
    rows = []
    for name, run in sweep["runs"].items():
        if end := end_of(run):
            context = end.get("context")
            rows.append(
                [
                    name,
                    mean(end["loss"]["nats_per_token"]),
                    beside(run, dense_of(sweep, run)),
                    mean(context["full"]) if context else "-",
                    mean(context["gain"]) if context else "-",
                    needles(end),
                    f"{curve(name, run).points[-1].seconds:.0f}",
                ]
            )
    columns = [
        "run",
        "loss at the end",
        "beside dense",
        "beyond",
        "far context",
        "needles",
        "seconds of training, one GPU",
    ]
    return table(columns, rows)


def measured(sweep: dict) -> str:
    """How much text was measured."""
    ends = [end for run in sweep["runs"].values() if (end := end_of(run))]
    if not ends:
        return "Nothing yet."
    words = f"{ends[0]['sequences']} sequences of {ends[0]['tokens']} tokens"
    context = next((end["context"]["context"] for end in ends if "context" in end), None)
    words += f"; the short context is {context} tokens." if context else "."
    left = [name for name, run in sweep["runs"].items() if not end_of(run)]
    return words + (f" Begun and not measured: {', '.join(left)}." if left else "")


def at_the_switch(sweep: dict) -> str:
    rows = []
    for name, run in sweep["runs"].items():
        if switch := run["evaluations"].get("switch"):
            leak = next((row for row in switch.get("leak", []) if row["distance"] == 0), None)
            errors = [row["relative_error"] for row in switch["switch"]["attention_errors"]]
            rows.append(
                [
                    name,
                    mean(switch["loss"]["nats_per_token"]) + (" (leaky)" if switch["leaky"] else ""),
                    mean(switch["switch"]["dense"]),
                    f"{switch['switch']['jump']['mean']:+.4f}",
                    f"{leak['mean']:+.4f} ± {leak['standard_error']:.4f}" if leak else "-",
                    f"{median(errors):.2f} ({min(errors):.2f} to {max(errors):.2f})",
                ]
            )
    columns = [
        "run",
        "loss as trained",
        "loss dense",
        "jump",
        "leak at distance 0",
        "error of one call, median (range)",
    ]
    return table(columns, rows)


def same_time(sweep: dict) -> str:
    """Validation losses of dense runs at the seconds that the others took; not of those that decay."""
    rows = []
    for name, run in sweep["runs"].items():
        dense = dense_of(sweep, run)
        if dense is None or dense is run or decays(run) or not end_of(run):
            continue
        ours, theirs = validated(run), validated(dense)
        if not ours:
            continue
        spent, loss = ours[-1]
        after = next((i for i, (seconds, _) in enumerate(theirs) if seconds >= spent), 0)
        if after:
            (x, low), (y, high) = theirs[after - 1 : after + 1]
            then = low + (high - low) * (spent - x) / (y - x)
            rows.append([name, f"{spent:.0f}", f"{loss:.4f}", f"{then:.4f}", f"{loss - then:+.4f}"])
    columns = ["run", "seconds", "validation loss", "of dense then", "difference"]
    return table(columns, rows) if rows else ""


def validated(run: dict) -> list[tuple[float, float]]:
    """(seconds of training, validation loss), oldest first."""
    whole = curve("", run)
    seconds = {point.step: point.seconds for point in whole.points}
    return [(seconds[step], loss) for step, loss, _ in whole.validation if step in seconds]


def curve(name: str, run: dict) -> compare.Curve:
    """Each stage at the median seconds of its steps: what compiles, and how often it did, is no part of a method."""
    stages = run["ledger"]["stages"]
    flops = {stage["stage"]: stage["flops"] / stage["steps"] for stage in stages if stage.get("steps")}
    # Of a stage whose costs are not in the ledger yet, nothing is said.
    rows = [dict(row) for row in run["rows"] if row["stage"] in flops]
    for stage in flops:
        timed = [row for row in rows if "loss" in row and row["stage"] == stage]
        settled = [row["seconds"] for row in timed if "first_of_launch" not in row]
        typical = median(settled or [row["seconds"] for row in timed])
        for row in timed:
            row["seconds"] = typical
    return compare.curve(name, rows, stages, flops)


def repetitions(sweeps: list[dict]) -> str:
    """The spread between seeds of runs that differ in nothing else."""
    groups: dict[str, list[tuple[str, float]]] = {}
    for sweep in sweeps:
        for name, run in sweep["runs"].items():
            if end_of(run):
                loss = end_of(run)["loss"]["nats_per_token"]["mean"]
                groups.setdefault(but_for_the_seed(run), []).append((name, loss))
    rows = [
        [
            ", ".join(name for name, _ in group),
            ", ".join(f"{x:.4f}" for _, x in group),
            f"{stdev(x for _, x in group):.4f}",
        ]
        for group in groups.values()
        if len(group) > 1
    ]
    return table(["runs", "losses at the end", "standard deviation"], rows) if rows else ""


def machines(sweep: dict) -> str:
    found = {}
    for run in sweep["runs"].values():
        device = run["ledger"]["stages"][0].get("conditions", {}).get("device", "?")
        versions = ", ".join(f"{name} {run['versions'][name]}" for name in ("torch", "triton", "flash-attn-4"))
        python = f"Python {run['python']}, " if "python" in run else ""
        found[f"commit {str(run['git_commit'])[:10]}; {device}; {python}{versions}"] = None
    return "; or ".join(found)


def write(files: list[Path], out: Path) -> None:
    sweeps = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    text = [INTRODUCTION]
    conclusions = out / "conclusions.md"
    if conclusions.exists():
        text.append(conclusions.read_text(encoding="utf-8").strip() + "\n")
    if spread := repetitions(sweeps):
        text.append(f"## Noise between seeds\n\n{spread}\n")
    for name, sweep in zip((file.stem for file in files), sweeps, strict=True):
        figures = out / "figures" / name
        figures.mkdir(parents=True, exist_ok=True)
        curves = [drawn for run_name, run in sweep["runs"].items() if (drawn := curve(run_name, run)).points]
        drawn = [file for file in compare.plot(curves, figures) or () if file.suffix == ".svg"]
        text.append(f"## {name}\n\n{sweep['about'].strip()}\n")
        text.append(f"`lighthouse sweep recipes/evidence/{sweep['sweep']}.toml` of {machines(sweep)}\n")
        text.append(f"### After recovery\n\n{measured(sweep)}\n\n{results(sweep)}\n")
        text.append(f"### At the switch\n\n{at_the_switch(sweep)}\n")
        if equal := same_time(sweep):
            text.append(f"### At equal wall-clock\n\n{EQUAL}\n\n{equal}\n")
        text += [f"![losses]({file.relative_to(out)})\n" for file in drawn]
    (out / "REPORT.md").write_text("\n".join(text), encoding="utf-8")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("files", nargs="+", type=Path)
    options.add_argument("--out", type=Path, default=HERE, help="where REPORT.md and figures/ go")
    args = options.parse_args()
    write(args.files, args.out)


if __name__ == "__main__":
    main()
