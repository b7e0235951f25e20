"""lighthouse pretrain: stage 1."""

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lighthouse_cli import _caches, _complete, _machines, _options, _output, _train

if TYPE_CHECKING:
    from lighthouse_core.job.plan import Asked, Plan
    from lighthouse_core.runs.run import Newest, Run


def pretrain(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="A TOML file, or a name of `lighthouse recipes list`.",
            show_default=False,
            autocompletion=_complete.recipes,
        ),
    ] = None,
    settings: _options.Settings = None,
    resume: Annotated[
        str,
        typer.Option(
            "--resume",
            metavar="RUN",
            help="Continue a run, or 'latest', instead of RECIPE.",
            autocompletion=_complete.resumable,
        ),
    ] = "",
    origin: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="DIR|RUN",
            help="Begin with the weights of a Hugging Face directory, or of a run.",
            autocompletion=_complete.checkpoints,
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Of the new run; else the recipe and the time.")
    ] = None,
    or_resume: Annotated[
        bool,
        typer.Option(
            "--or-resume", help="Continue the run of that name where there is one; RECIPE and --set are for a new run."
        ),
    ] = False,
    measure_dense: Annotated[
        bool,
        typer.Option("--measure-dense", help="Time a dense step first, for the savings in the ledger."),
    ] = False,
    nproc: _options.Nproc = "auto",
    nnodes: _options.Nnodes = None,
    node_rank: _options.NodeRank = None,
    rdzv_endpoint: _options.RdzvEndpoint = "",
    strict: _options.Strict = False,
    dry_run: _options.DryRun = False,
    memory: _options.GpuMemory = None,
    quiet: _options.Quiet = False,
    as_json: _options.Json = False,
) -> None:
    """Train a new run with Lighthouse attention (stage 1).

    Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint and end; a second signal ends at once. Started with SIGINT or SIGHUP
    ignored, as by nohup or in a script's background, it goes on ignoring them.
    """
    from lighthouse_core.config import find_recipe, load_recipe
    from lighthouse_core.config.dump import toml_value
    from lighthouse_core.data.hub import pinned
    from lighthouse_core.errors import UserError
    from lighthouse_core.job.plan import check_plan, plan
    from lighthouse_core.runs.create import check_free, create_run, run_path
    from lighthouse_core.runs.find import find_origin, find_run
    from lighthouse_core.runs.unfinished import foreign

    _output.set_quiet(quiet)
    _train.check_gpu_memory(memory, dry_run=dry_run)
    if not dry_run:
        _caches.use_own()
    nnodes, node_rank, rdzv_endpoint = _machines.machines(nnodes, node_rank, rdzv_endpoint)
    if measure_dense:
        settings = [*(settings or ()), "metrics.measure_dense=true"]
    if name == "":
        raise UserError("--name is empty", hint="leave it out for the recipe's name and the time")
    if bool(recipe) == bool(resume):
        both = "a run that goes on has its recipe: leave RECIPE out" if recipe else ""
        raise UserError(
            "give either a RECIPE or --resume RUN", hint=both or "lighthouse pretrain recipes/quickstart.toml"
        )
    if origin == "":
        raise UserError("--from is empty", hint="leave it out to draw the weights")
    if origin is not None:
        if resume:
            raise UserError("--from is for a new run, --resume for an existing one", hint="leave out one of them")
        settings = [*(settings or ()), f"model.from={toml_value(find_origin(origin))}"]
    # What machines compare of a run that may be there or not: machine 0 looks, whenever the others do.
    common: Asked | None = None
    if or_resume:
        if resume:
            raise UserError("--or-resume is for a RECIPE, --resume for a run", hint="leave out one of them")
        wanted = load_recipe(find_recipe(recipe or ""), settings or ())
        if not (name or wanted.output.name):
            raise UserError("--or-resume needs the --name of the run")
        path = run_path(wanted, name or wanted.output.name)
        common = _train.asked("pretrain --or-resume", path, wanted, _train.values(wanted))
        if (path / "recipe.toml").is_file():
            if done := _done(find_run(str(path))):
                _output.say(f"{done}: nothing is left for pretrain to do")
                return
            if not node_rank:
                resume, name, settings = str(path), None, None
                _output.say(f"run {path} exists and goes on by its own recipe")
    if resume:
        if name is not None:
            raise UserError("--name is for a new run, --resume for an existing one")
        # Before a checkpoint is read, which can take minutes.
        check_plan(nproc, nnodes, node_rank, rdzv_endpoint, dry_run=dry_run)
        run = find_run(resume)
        run.change(settings or ())
        _train.check_titan(run.recipe)
        # Machine 0 decides, and holds the run from before it looks at its checkpoints.
        with nullcontext() if node_rank else run.lock():
            step, damaged = (0, {}) if node_rank else _unfinished(run, strict)
            found = _train.check_data(run.recipe, dry_run=dry_run)
            processes = plan(nproc, nnodes, node_rank, rdzv_endpoint, dry_run=dry_run)
            _train.check(run.recipe, processes)
            gpu = _train.gpu_to_fit(memory)
            _train.warn_of_memory(run.recipe, processes.world_size, gpu, run.stage)
            if run.stage == "lighthouse":
                _train.warn_of_whole_sequences(run.recipe)
            if dry_run:
                _train.describe(run.recipe, processes.world_size, found, gpu=gpu)
                return
            if not node_rank:
                run.set_aside(damaged)
                if settings:
                    run.write_recipe()
            words = f"run {run.path}" if node_rank else f"resuming {run.path}: steps {step + 1} to {run.end}"
            same = _train.asked("pretrain --resume", run.path, run.recipe, {"--set": settings or []})
            if common is not None:
                same = replace(same, facts=common.facts)
            _finish(run.path, None if node_rank else run, processes, words, quiet, as_json, same)
        return

    path = find_recipe(recipe or "")
    resolved = load_recipe(path, settings or ())
    _train.check_titan(resolved)
    resolved, weights = _train.check_weights(pinned(resolved), verify=not dry_run)
    found = _train.check_data(resolved, dry_run=dry_run)
    if nnodes > 1 and not (name or resolved.output.name or dry_run):
        raise UserError("a run on several machines needs a --name", hint="the same one on each")
    processes = plan(nproc, nnodes, node_rank, rdzv_endpoint, dry_run=dry_run)
    _train.check(resolved, processes)
    if dry_run:
        check_free(resolved, name or "")
    if memory is None:
        _train.check_memory(resolved, processes, dry_run=dry_run)
    gpu = _train.gpu_to_fit(memory)
    _train.warn_of_memory(resolved, processes.world_size, gpu, "lighthouse" if resolved.lighthouse.enabled else "dense")
    _train.warn_of_whole_sequences(resolved)
    _train.warn_of_keys_without_effect(resolved)
    if dry_run:
        _train.warn_of_no_savings(resolved, found)
        _train.warn_of_rotation(resolved)
        _train.describe(resolved, processes.world_size, found, weights, gpu)
        return
    if weights is not None:
        _train.say_weights(resolved, weights)
    if node_rank:
        path = run_path(resolved, name or resolved.output.name)
        same = common or _train.asked("pretrain", path, resolved, _train.values(resolved))
        _finish(path, None, processes, f"run {path}", quiet, as_json, same)
        return
    run = create_run(
        resolved, path.stem, name or "", source=str(path), weights=None if weights is None else weights.facts
    )
    try:
        with run.lock():
            _train.warn_of_no_savings(resolved, found)
            same = common or _train.asked("pretrain", run.path, resolved, _train.values(resolved))
            _finish(run.path, run, processes, f"run {run.path}", quiet, as_json, same)
    except BaseException:
        # What ends before the first step leaves nothing worth keeping, and frees the name.
        if not run.checkpoint_steps() and not _has_metrics(run):
            if other := foreign(run.path):
                _output.say(f"{run.path} is kept: it holds {other}")
            else:
                shutil.rmtree(run.path, ignore_errors=True)
                _output.say(f"{run.path} held no step and is removed")
        raise


def _unfinished(run: "Run", strict: bool) -> "Newest":
    """The checkpoint to go on from."""
    from lighthouse_core.errors import RunError
    from lighthouse_core.runs.run import Newest

    if run.unsaved():
        _output.say(f"run {run.path} has no checkpoint yet: it begins at step 0")
        return Newest(0, {})
    if run.recovering:
        raise RunError(f"run {run.path} is in its recovery", hint=f"lighthouse recover {run.path} continues it")
    newest = run.newest_checkpoint(strict, _train.verify_ahead(run))
    step = newest.step
    _train.warn_of_damage(newest.damaged, step)
    if step >= run.end:
        after = "recover" if run.stage == "lighthouse" else "strip"
        raise RunError(
            f"run {run.path} is complete at step {step}",
            hint=f"go on with lighthouse {after} {run.path}{' OUT' if after == 'strip' else ''}",
        )
    return newest


def _done(run: "Run") -> str | None:
    """What has become of a run that needs no more of `pretrain`. The same on all machines."""
    if run.recovering:
        return f"run {run.path} has begun its recovery"
    return f"run {run.path} is complete at step {run.end}" if run.complete else None


def _has_metrics(run: "Run") -> bool:
    try:
        return (run.path / "metrics.jsonl").stat().st_size > 0
    except FileNotFoundError:
        return False


def _finish(
    run_dir: Path, run: "Run | None", processes: "Plan", words: str, quiet: bool, as_json: bool, same: "Asked"
) -> None:
    """Train, and say what comes next. The caller holds the run, where this machine keeps it."""
    _output.say(words)
    again = f"lighthouse pretrain --resume {run_dir}"
    _train.train(run_dir, run, processes, again, same, quiet=quiet, as_json=as_json)
    if run is not None:
        after = f"recover {run_dir}" if run.stage == "lighthouse" else f"strip {run_dir} OUT"
        _output.final(f"done; go on with: lighthouse {after}")
        if not as_json:
            _output.data(str(run_dir))
