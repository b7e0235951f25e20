"""lighthouse profile: what one attention call costs on this machine."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from lighthouse_cli import _output


def profile(
    seq: Annotated[int, typer.Option("--seq", metavar="N", help="Sequence length in tokens.")],
    pooling: Annotated[int | None, typer.Option("--pooling", metavar="P", help="Pooling factor.")] = None,
    levels: Annotated[int | None, typer.Option("--levels", metavar="L", help="Pyramid levels.")] = None,
    topk: Annotated[int | None, typer.Option("--topk", metavar="K", help="Parents expanded per level.")] = None,
    tile_parents: Annotated[
        int, typer.Option("--tile-parents", metavar="M", help="Parents chosen in each tile.")
    ] = 128,
    heads: Annotated[int, typer.Option("--heads", help="Query heads.")] = 8,
    kv_heads: Annotated[
        int | None, typer.Option("--kv-heads", help="Key/value heads; as many as heads by default.")
    ] = None,
    head_dim: Annotated[int, typer.Option("--head-dim", help="Width of a head.")] = 128,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option("--dtype", help="bfloat16 on a GPU, else float32."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the JSON file goes.")] = Path("profiles"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Time Lighthouse attention against dense attention."""
    from lighthouse_core.attention.config import LighthouseConfig
    from lighthouse_core.errors import UserError
    from lighthouse_core.estimate import profile_defaults

    if seq < 1:
        raise UserError(f"--seq must be at least 1, not {seq}")
    given = (pooling, levels, topk)
    p, L, k = (default if value is None else value for value, default in zip(given, profile_defaults(seq), strict=True))
    try:
        config = LighthouseConfig(pooling=p, levels=L, topk=k, tile_parents=tile_parents)
    except ValueError as error:
        raise UserError(str(error)) from None
    _output.say(f"N = {seq}, pooling {p}, levels {L}, topk {k}")

    from lighthouse_core.profile import run

    report = run(seq, config, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype).as_json()
    text = json.dumps(report, indent=1)
    file = out / f"profile-{seq}.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}", hint="choose another --out") from None
    if as_json:
        _output.data(text)
    else:
        _show(report)
    _output.say(f"written to {file}")


def _show(report: dict) -> None:
    settings, machine = report["settings"], report["machine"]
    rows = []
    for timing in [*report["stages"], *report["calls"]]:
        forward, backward, peak = timing["forward_ms"], timing["backward_ms"], report["peak_gib"].get(timing["name"])
        rows.append(
            (
                timing["name"],
                f"{forward:.2f}",
                "-" if backward is None else f"{backward:.2f}",
                f"{forward + (backward or 0.0):.2f}",
                "-" if peak is None else f"{peak:.2f}",
            )
        )
    title = f"N = {settings['seq']}, S = {settings['gathered_length']}, {settings['dtype']}, {machine['device']}"
    _output.table(title, ("what", "forward ms", "backward ms", "sum ms", "peak GiB"), rows)
    speedup = report["speedup"]
    _output.say(
        f"against dense: {speedup['forward']:.2f}x forward, {speedup['forward_backward']:.2f}x forward and backward; "
        f"resident memory {report['resident_gib']:.2f} GiB"
    )
