"""lighthouse profile: what attention, a training step and a selection cost here, and which settings to train with."""

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lighthouse_cli import _caches, _complete, _options, _output, _train
from lighthouse_core.attention.config import NAMES, LighthouseConfig
from lighthouse_core.attention.settings import SettingError, Settings
from lighthouse_core.shown import shortened

if TYPE_CHECKING:
    from lighthouse_core.config import Recipe
    from lighthouse_core.profile.report import Report


def _either(setting: str) -> str:
    """The names that a setting may have, for a help text."""
    *others, last = NAMES[setting]
    return f"{', '.join(others)} or {last}"


app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
Out = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Of the report; a new one in profiles/ by default.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the report, but no progress.")]
Json = Annotated[bool, typer.Option("--json", help="Print results.json instead of tables.")]


@app.callback()
def attention(
    context: typer.Context,
    seq: Annotated[
        str, typer.Option("--seq", metavar="N[,N...]", help="Lengths in tokens: one attention call, beside dense ones.")
    ] = "",
    pooling: Annotated[int | None, typer.Option("--pooling", metavar="P", help="Pooling factor.")] = None,
    levels: Annotated[int | None, typer.Option("--levels", metavar="L", help="Pyramid levels.")] = None,
    topk: Annotated[int | None, typer.Option("--topk", metavar="K", help="Parents expanded per level.")] = None,
    tile_parents: Annotated[
        int | None,
        typer.Option(
            "--tile-parents",
            metavar="M",
            help=f"Parents chosen in each tile; {Settings.tile_parents} by default, fewer for a short N.",
        ),
    ] = None,
    scorer: Annotated[
        str, typer.Option("--scorer", help=f"How parents are chosen: {_either('scorer')}.")
    ] = Settings.scorer,
    method: Annotated[
        str, typer.Option("--method", help=f"{_either('method')}; see lighthouse.method.")
    ] = Settings.method,
    window: Annotated[
        int, typer.Option("--window", metavar="W", help="Tokens; see lighthouse.window.")
    ] = Settings.window,
    backend: Annotated[str, typer.Option("--backend", help=f"Of the stages: {_either('backend')}.")] = Settings.backend,
    dense_backend: Annotated[
        str, typer.Option("--dense-backend", help=f"Inside the call: {_either('dense_backend')}.")
    ] = Settings.dense_backend,
    heads: Annotated[int, typer.Option("--heads", min=1, max=2**16, help="Query heads.")] = 8,
    kv_heads: Annotated[
        int | None, typer.Option("--kv-heads", min=1, max=2**16, help="Key/value heads; as many as heads by default.")
    ] = None,
    head_dim: Annotated[int, typer.Option("--head-dim", min=1, max=2**16, help="Width of a head.")] = 128,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option("--dtype", help="bfloat16 on a GPU, else float32."),
    ] = None,
    out: Out = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure on this machine, or search settings to train with.

    --seq measures one attention call. The commands measure the rest, each with options of its own.
    """
    from lighthouse_core.errors import UserError

    if context.invoked_subcommand is not None:
        _refuse_options_before(context, context.invoked_subcommand)
        return
    if not seq:
        raise UserError(
            "profile takes --seq N or a command: step, tune or selection",
            hint="lighthouse profile --seq 98304 is one attention call; lighthouse profile --help has the others",
        )
    lengths = _lengths(seq)
    _begin(quiet)
    given = {"pooling": pooling, "levels": levels, "topk": topk, "tile_parents": tile_parents}
    fixed = {
        "scorer": scorer,
        "method": method,
        "window": window,
        "backend": backend,
        "dense_backend": dense_backend,
    }
    configs = {n: _config(n, given, fixed) for n in lengths}
    _attention(configs, (heads, heads if kv_heads is None else kv_heads, head_dim, dtype), out, as_json)


@app.command()
def step(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A file, or a name of `lighthouse recipes list`.",
            autocompletion=_complete.recipes,
        ),
    ],
    settings: _options.Settings = None,
    nproc: _options.Nproc = "auto",
    out: Out = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure where a training step of a recipe goes."""
    from lighthouse_core.config import find_recipe, load_recipe

    _begin(quiet)
    overrides = list(settings or ())
    path = find_recipe(recipe)
    resolved = load_recipe(path, overrides)
    processes = _processes(resolved, nproc)
    from lighthouse_core.profile import run

    with _folder(out, "step", path.stem) as folder:
        _finish(run.step(path, resolved, overrides, folder, processes, _output.say), folder, as_json)


@app.command()
def tune(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="[RECIPE]",
            help="Whose model: a file, or a name of `lighthouse recipes list`.",
            autocompletion=_complete.recipes,
        ),
    ] = "530m_98k",
    seq: Annotated[
        int | None,
        typer.Option(
            "--seq", metavar="N", min=1, max=_options.MOST_TOKENS, help="Length in tokens; the recipe's by default."
        ),
    ] = None,
    # That of the paper's settings: 4 * 1536 of 98304.
    floor: Annotated[
        float, typer.Option("--floor", metavar="F", help="Least share of the tokens at level 0.")
    ] = 0.0625,
    settings: _options.Settings = None,
    nproc: _options.Nproc = "auto",
    out: Out = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Search the fastest pooling, levels and topk for a recipe's model."""
    from lighthouse_core.config import find_recipe, load_recipe
    from lighthouse_core.errors import UserError

    _begin(quiet)
    overrides = [*(settings or ()), *([] if seq is None else [f"training.seq_len={seq}"])]
    path = find_recipe(recipe)
    # The recipe's own pyramid may not suit another length, and the search replaces it.
    resolved = load_recipe(path, [*overrides, "lighthouse.enabled=false"])
    if not 0 < floor < 1:
        raise UserError(f"--floor must lie between 0 and 1, not {floor}")
    processes = _processes(resolved, nproc)
    from lighthouse_core.profile import run

    with _folder(out, "tune", path.stem) as folder:
        report = run.tune(path, resolved, overrides, floor, folder, processes, _output.say)
        _finish(report, folder, as_json)


@app.command()
def selection(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="A run (or latest), or one of its checkpoints/step-N.",
            autocompletion=_complete.checkpoints,
        ),
    ],
    sequences: Annotated[
        int, typer.Option("--sequences", metavar="B", max=10**6, help="Held-out sequences to select in.")
    ] = 4,
    out: Out = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show what a run's checkpoint of stage 1 selects."""
    from lighthouse_core.errors import UserError
    from lighthouse_core.runs.find import find_checkpoint, split_checkpoint

    _begin(quiet)
    if sequences < 1:
        raise UserError(f"--sequences must be at least 1, not {sequences}")
    path = find_checkpoint(target)
    from lighthouse_core.profile import run

    folder, number = split_checkpoint(path)
    name = folder.name if number is None else f"{folder.name}-{path.name}"
    with _folder(out, "selection", name) as folder:
        _finish(run.selection(path, sequences, _output.say), folder, as_json)


def _begin(quiet: bool) -> None:
    """What each kind of measurement does before its first import of torch."""
    _output.set_quiet(quiet)
    _caches.use_own()


def _refuse_options_before(context: typer.Context, command: str) -> None:
    """Raise for an option that stands before a command's name: the command would not see it."""
    from lighthouse_core.errors import UserError

    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name)
        if source is not None and source.name == "COMMANDLINE":
            raise UserError(
                f"{parameter.opts[0]} stands before the command {command}",
                hint=f"options of lighthouse profile {command} follow it; its --help lists them",
            )


def _processes(recipe: "Recipe", nproc: str) -> int:
    """How many processes train a step of a recipe, which has been checked against them."""
    from lighthouse_core.job.plan import check_world, plan

    _train.check_titan(recipe)
    processes = plan(nproc).nproc
    check_world(recipe, processes)
    return processes


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


def _config(tokens: int, given: dict[str, int | None], fixed: dict[str, Any]) -> LighthouseConfig:
    from lighthouse_core.errors import UserError
    from lighthouse_core.estimate import profile_defaults

    defaults = dict(zip(given, (*profile_defaults(tokens), Settings.tile_parents), strict=True))
    chosen: dict[str, Any] = {key: defaults[key] if value is None else value for key, value in given.items()}
    try:
        config = LighthouseConfig(**chosen, **fixed)
    except SettingError as error:
        option = error.field.replace("_", "-")
        hints = {
            "topk": f"--tile-parents is {Settings.tile_parents} unless you give another",
            "compression": "use a --window that is a multiple of it",
        }
        raise UserError(str(error), hint=hints.get(option, f"see --{option}")) from None
    if given["topk"] is None and given["tile_parents"] is None:
        config = _selecting(config, tokens)
    what = f"pooling {config.pooling}, levels {config.levels}, topk {config.topk}"
    if config.tile_parents != Settings.tile_parents:
        what += f", tile_parents {config.tile_parents}"
    if not config.pools:
        what = f"{config.method}, window {config.window}"
    _output.say(f"N = {tokens}: {what}")
    return config


def _selecting(config: LighthouseConfig, tokens: int) -> LighthouseConfig:
    """The settings with so few parents that at least a third of the tokens is saved; unchanged where no number does."""
    smaller = config
    # What no pyramid can be is refused with the reason, later.
    with contextlib.suppress(ValueError):
        while smaller.pools and 3 * smaller.geometry(tokens).gathered_length > 2 * tokens:
            smaller = replace(smaller, topk=smaller.topk // 2, tile_parents=smaller.tile_parents // 2)
        return smaller
    return config


def _attention(
    configs: dict[int, LighthouseConfig], shape: tuple[int, int, int, str | None], out: Path | None, as_json: bool
) -> None:
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
