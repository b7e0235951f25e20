"""lighthouse compare: runs side by side."""

from pathlib import Path
from typing import Annotated

import typer

from lighthouse_cli import _complete, _output


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Directories, or names under runs/.", autocompletion=_complete.runs),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the page goes.")] = Path("compare"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare runs by steps, tokens, time and FLOPs.

    The first run that was dense from the start is what the others are held against.
    """
    from lighthouse_core.errors import RunError, refusal
    from lighthouse_core.evaluate import compare as core
    from lighthouse_core.files import check_output, check_replaceable, check_writable, together, write_atomically
    from lighthouse_core.runs.find import find_run
    from lighthouse_core.runs.rows import clock

    check_output(out)
    check_replaceable(out, "compare.json", core.is_comparison, core.FIGURES)
    check_writable(out)
    curves, texts = [], {}
    for name in runs:
        run = find_run(name)
        curve = core.read(run)
        if not curve.points:
            raise RunError(f"run {name} has no logged step in {run.path / 'metrics.jsonl'}")
        curves.append(curve)
        texts[run.path] = curve.name, run.ledger["stages"][0].get("data")
    if unlike := core.unlike_texts(texts.values()):
        _output.warn(unlike)
    dense = next((curve for curve in curves if curve.dense), None)
    summaries = [core.summarize(curve, dense) for curve in curves]
    try:
        with together(out) as place:
            write_atomically(place / "compare.json", core.as_json(summaries) + "\n")
            drawn = core.plot(curves, place)
    except OSError as error:
        raise refusal(error, f"cannot write {out}", "choose another --out") from None
    if as_json:
        _output.data(core.as_json(summaries))
    else:

        def number(value: float | None, signed: bool = False) -> str:
            return "-" if value is None else f"{value:+.4f}" if signed else f"{value:.4f}"

        rows = [
            (
                s.name,
                str(s.step),
                f"{s.tokens:.3g}",
                clock(s.seconds),
                f"{s.flops:.3g}",
                number(s.loss),
                number(s.val_loss) + (" (leaky)" if s.leaky else ""),
                number(s.jump, True),
                number(s.spike, True),
                "-" if s.back is None else str(s.back),
                "-" if s.below_dense is None else str(s.below_dense),
            )
            for s in summaries
        ]
        spent, losses = ("step", "tokens", "time", "FLOPs"), ("mean loss", "validation", "jump", "spike")
        names = ("run", *spent, *losses, "back", "below dense")
        _output.table("", names, rows)
    _output.say(
        f"written to {out}" + ("" if drawn is not None else "; the page needs matplotlib: pip install -e '.[plot]'")
    )
