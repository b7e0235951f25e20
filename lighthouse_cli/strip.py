"""lighthouse strip: the trained model as an ordinary one of its family."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from lighthouse_cli import _caches, _complete, _options, _output


def strip(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CKPT", help="A run, or one of its checkpoints/step-N.", autocompletion=_complete.checkpoints
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write.")],
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        typer.Option(
            "--dtype",
            help="Of the written weights; else of those that training began with, or the 16 bits it ran in.",
        ),
    ] = None,
    allow_unrecovered: Annotated[
        bool, typer.Option("--allow-unrecovered", help="Also a checkpoint that never ran with dense attention.")
    ] = False,
    verify_length: Annotated[
        int | None,
        typer.Option(
            "--verify-length",
            metavar="N",
            min=1,
            max=_options.MOST_TOKENS,
            help="One more length, in tokens, at which logits are compared.",
        ),
    ] = None,
    average: Annotated[
        int,
        typer.Option(
            "--average",
            metavar="N",
            min=1,
            max=_options.MOST,
            help="The mean of the last N checkpoints up to CKPT, in place of its own weights.",
        ),
    ] = 1,
) -> None:
    """Write a checkpoint as a Hugging Face model of its family, verified."""
    from lighthouse_core.runs.find import find_checkpoint

    source = find_checkpoint(checkpoint)

    _caches.use_own()
    from lighthouse_core.export import strip as export

    report = export(
        source, out, dtype=dtype, allow_unrecovered=allow_unrecovered, verify_length=verify_length, average=average
    )
    _output.say(f"step {report.step}, {report.parameters} parameters, {report.dtype}")
    for fact in report.verified:
        _output.say(f"verified: {fact}")
    for fact in report.skipped:
        _output.warn(f"not verified: {fact}")
    for text in report.warnings:
        _output.warn(text)
    _output.data(str(out))
