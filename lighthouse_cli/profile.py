"""lighthouse profile: what attention, a training step and a selection cost here, and which settings to train with."""

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lighthouse_cli import _caches, _complete, _options, _output
from lighthouse_core.shown import shortened

if TYPE_CHECKING:
    from lighthouse_core.profile.report import Report

# Whose model --tune plans for where no recipe is named.
_MODEL = "530m_98k"
# Parameters of `profile` that each kind reads, beside those that say where the report goes.
_READ = {
    "--seq": "seq pooling levels topk tile_parents scorer method window backend dense_backend heads kv_heads head_dim "
    "dtype",
    "--recipe": "recipe settings nproc",
    "--tune": "tune recipe seq floor settings nproc",
    "--selection": "selection sequences",
}
_READ_BY_ALL = "out quiet as_json"


def profile(
    context: typer.Context,
    seq: Annotated[
        str, typer.Option("--seq", metavar="N[,N...]", help="Lengths in tokens: one attention call, beside dense ones.")
    ] = "",
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            metavar="RECIPE",
            help="A training step of it: a file, or a name of `lighthouse recipes list`.",
            autocompletion=_complete.recipes,
        ),
    ] = "",
    tune: Annotated[
        bool, typer.Option("--tune", help="Search pooling, levels and topk for --recipe (or 530m_98k) at --seq.")
    ] = False,
    selection: Annotated[
        str,
        typer.Option(
            "--selection",
            metavar="RUN",
            help="What a run (or latest), or one of its checkpoints/step-N, selects.",
            autocompletion=_complete.checkpoints,
        ),
    ] = "",
    pooling: Annotated[int | None, typer.Option("--pooling", metavar="P", help="Pooling factor.")] = None,
    levels: Annotated[int | None, typer.Option("--levels", metavar="L", help="Pyramid levels.")] = None,
    topk: Annotated[int | None, typer.Option("--topk", metavar="K", help="Parents expanded per level.")] = None,
    tile_parents: Annotated[
        int, typer.Option("--tile-parents", metavar="M", help="Parents chosen in each tile.")
    ] = 128,
    scorer: Annotated[str, typer.Option("--scorer", help="norm, random or block.")] = "norm",
    method: Annotated[
        str, typer.Option("--method", help="pyramid, chunked, sliding or compressed; see lighthouse.method.")
    ] = "pyramid",
    window: Annotated[int, typer.Option("--window", metavar="W", help="Tokens; see lighthouse.window.")] = 0,
    backend: Annotated[str, typer.Option("--backend", help="Of the stages: auto, triton or reference.")] = "auto",
    dense_backend: Annotated[
        str, typer.Option("--dense-backend", help="Inside the call: auto, fa4, cudnn, flash or math.")
    ] = "auto",
    heads: Annotated[int, typer.Option("--heads", max=2**16, help="Query heads.")] = 8,
    kv_heads: Annotated[
        int | None, typer.Option("--kv-heads", max=2**16, help="Key/value heads; as many as heads by default.")
    ] = None,
    head_dim: Annotated[int, typer.Option("--head-dim", max=2**16, help="Width of a head.")] = 128,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option("--dtype", help="bfloat16 on a GPU, else float32."),
    ] = None,
    # That of the paper's settings: 4 * 1536 of 98304.
    floor: Annotated[
        float, typer.Option("--floor", metavar="F", help="--tune: least share of the tokens at level 0.")
    ] = 0.0625,
    sequences: Annotated[
        int, typer.Option("--sequences", metavar="B", max=10**6, help="--selection: held-out sequences.")
    ] = 4,
    settings: _options.Settings = None,
    nproc: _options.Nproc = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Of the report; a new one in profiles/ by default.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the report, but no progress.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json instead of tables.")] = False,
) -> None:
    """Measure on this machine: an attention call, a training step, settings to train with, or a run's selection."""
    from lighthouse_core.errors import UserError

    _output.set_quiet(quiet)
    lengths = _lengths(seq) if seq else []
    kinds = {"--selection": selection, "--tune" if tune else "--recipe": recipe or tune, "--seq": seq}
    asked = [name for name, given in kinds.items() if given]
    if not asked or (selection and len(asked) > 1) or (recipe and seq and not tune):
        raise UserError(
            f"profile takes one of --seq, --recipe and --selection, not {' and '.join(asked) or 'none'}",
            hint="lighthouse profile --seq 98304 is one attention call; --tune takes --recipe and --seq together",
        )
    _refuse_others(context, "--tune" if tune else asked[0])
    _caches.use_own()
    if selection:
        _selection(selection, sequences, out, as_json)
    elif tune or recipe:
        if len(lengths) > 1:
            raise UserError(f"--tune takes one length, not {seq}")
        overrides = [*(settings or ()), *(f"training.seq_len={n}" for n in lengths)]
        _recipe(recipe or _MODEL, overrides, tune, floor, nproc, out, as_json)
    else:
        given = {"pooling": pooling, "levels": levels, "topk": topk}
        fixed = {
            "tile_parents": tile_parents,
            "scorer": scorer,
            "method": method,
            "window": window,
            "backend": backend,
            "dense_backend": dense_backend,
        }
        configs = {n: _config(n, given, fixed) for n in lengths}
        _attention(configs, (heads, heads if kv_heads is None else kv_heads, head_dim, dtype), out, as_json)


def _refuse_others(context: typer.Context, kind: str) -> None:
    """Raise for an option that was given and that this kind does not read."""
    from lighthouse_core.errors import UserError

    read = {*_READ[kind].split(), *_READ_BY_ALL.split()}
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in read and source is not None and source.name == "COMMANDLINE":
            option = "--set" if name == "settings" else f"--{name.replace('_', '-')}"
            raise UserError(f"{option} is of no use with {kind}")


def _lengths(seq: str) -> list[int]:
    from lighthouse_core.errors import UserError

    try:
        lengths = sorted({int(part) for part in seq.split(",")})
    except ValueError:
        raise UserError(
            f"--seq takes numbers of tokens with commas between them, not {shortened(seq, 60)!r}",
            hint="as in --seq 8192,32768",
        ) from None
    if lengths[0] < 1:
        raise UserError(f"--seq must be at least 1, not {lengths[0]}")
    if lengths[-1] > _options.MOST_TOKENS:
        raise UserError(f"--seq must be at most {_options.MOST_TOKENS}, not {shortened(lengths[-1], 40)}")
    return lengths


def _config(tokens: int, given: dict[str, int | None], fixed: dict):
    from lighthouse_core.attention.config import LighthouseConfig
    from lighthouse_core.errors import UserError
    from lighthouse_core.estimate import profile_defaults

    defaults = dict(zip(given, profile_defaults(tokens), strict=True))
    chosen = {key: defaults[key] if value is None else value for key, value in given.items()}
    try:
        config = LighthouseConfig(**chosen, **fixed)
    except ValueError as error:
        option = str(error).split(maxsplit=1)[0].replace("_", "-")
        hints = {
            "topk": "--tile-parents is 128 unless you give another",
            "compression": "use a --window that is a multiple of it",
        }
        raise UserError(str(error), hint=hints.get(option, f"see --{option}")) from None
    what = "pooling {pooling}, levels {levels}, topk {topk}".format(**chosen)
    if config.method != "pyramid":
        what = f"{config.method}, window {config.window}"
    _output.say(f"N = {tokens}: {what}")
    return config


def _attention(configs: dict, shape: tuple[int, int, int, str | None], out: Path | None, as_json: bool) -> None:
    from lighthouse_core.profile import run
    from lighthouse_core.profile.work import Shape

    heads, kv_heads, head_dim, dtype = shape
    number = dtype or ("bfloat16" if run.device().type == "cuda" else "float32")
    shapes = [(Shape(tokens, heads, kv_heads, head_dim, number), cfg) for tokens, cfg in configs.items()]
    columns = 0 if as_json else shutil.get_terminal_size((100, 24)).columns
    colour = _output.is_terminal(sys.stdout) and _output.can_redraw()
    with _folder(out, "attention", str(max(configs))) as folder:
        report, plot = run.attention(shapes, folder, _output.say, columns=columns, colour=colour)
        _finish(report, folder, as_json, plot)


def _recipe(
    name: str, overrides: list[str], tune: bool, floor: float, nproc: str, out: Path | None, as_json: bool
) -> None:
    from lighthouse_core.config import find_recipe, load_recipe
    from lighthouse_core.errors import UserError
    from lighthouse_core.launch import check_world, plan

    path = find_recipe(name)
    # Its pyramid may not suit another length, and another one is looked for.
    resolved = load_recipe(path, [*overrides, "lighthouse.enabled=false"] if tune else overrides)
    if not 0 < floor < 1:
        raise UserError(f"--floor must lie between 0 and 1, not {floor}")
    if resolved.titan:
        from lighthouse_core.titan import check_overrides

        check_overrides(resolved)
    processes = plan(nproc).nproc
    check_world(resolved, processes)
    from lighthouse_core.profile import run

    with _folder(out, "tune" if tune else "step", path.stem) as folder:
        if tune:
            report = run.tune(path, resolved, overrides, floor, folder, processes, _output.say)
        else:
            report = run.step(path, resolved, overrides, folder, processes, _output.say)
        _finish(report, folder, as_json)


def _selection(target: str, sequences: int, out: Path | None, as_json: bool) -> None:
    from lighthouse_core.errors import UserError
    from lighthouse_core.runs import find_checkpoint, split_checkpoint

    if sequences < 1:
        raise UserError(f"--sequences must be at least 1, not {sequences}")
    path = find_checkpoint(target)

    from lighthouse_core.profile import run

    folder, step = split_checkpoint(path)
    name = folder.name if step is None else f"{folder.name}-{path.name}"
    with _folder(out, "selection", name) as folder:
        _finish(run.selection(path, sequences, _output.say), folder, as_json)


@contextlib.contextmanager
def _folder(out: Path | None, kind: str, name: str) -> Iterator[Path]:
    """Where the report goes, made; an empty one is not left behind."""
    from lighthouse_core.files import check_writable
    from lighthouse_core.profile.report import give_up, prepare

    folder = out or Path("profiles") / f"{kind}-{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    if not folder.is_file():
        check_writable(folder)
    made = prepare(folder, kind)
    if (folder / "results.json").exists():
        _output.say(f"replacing the report in {folder}")
    try:
        yield folder
    except BaseException as error:
        give_up(folder, made)
        if (folder / "report.md").exists():
            _output.say(f"what there is of the report is in {folder}")
        elif isinstance(error, KeyboardInterrupt):
            _output.say("interrupted, and nothing is reported")
        raise


def _finish(report: "Report", folder: Path, as_json: bool, plot: str | None = None) -> None:
    """Write the report and show it."""
    from lighthouse_core.errors import LighthouseError
    from lighthouse_core.profile.report import Table, roof_line

    fault = None
    try:
        report.write(folder)
    except LighthouseError as error:
        # What was measured is shown all the same.
        fault = error
    if as_json:
        _output.data(json.dumps(report.as_json(), indent=1))
    else:
        if report.roof:
            _output.say(roof_line(report.roof))
        for part in report.parts:
            if isinstance(part, Table):
                if _output.is_terminal(sys.stdout):
                    part = part.narrowed(shutil.get_terminal_size().columns)
                _output.table(part.title, part.columns, part.rows, text_columns=part.text_columns)
            else:
                _output.data(part.replace("```toml\n", "").replace("\n```", "\n"))
        if plot:
            _output.drawing(plot)
    if fault is not None:
        raise fault
    _output.final(f"written to {folder}")
