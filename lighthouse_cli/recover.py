"""lighthouse recover: stage 2."""

from contextlib import nullcontext
from typing import Annotated

import typer

from lighthouse_cli import _caches, _complete, _machines, _options, _output, _train


def recover(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN",
            help="Directory, or name under runs/; else the newest.",
            show_default=False,
            autocompletion=_complete.runs,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", metavar="N", max=_options.MOST, help="Length; else the recipe's recover.steps."),
    ] = None,
    extend: Annotated[
        int | None,
        typer.Option(
            "--extend",
            metavar="M",
            max=_options.MOST,
            help="Add M steps to a recovery begun before; one that decays needs --set recover.decay, too.",
        ),
    ] = None,
    or_done: Annotated[
        bool,
        typer.Option("--or-done", help="End with exit code 0 where the recovery is complete, instead of an error."),
    ] = False,
    settings: _options.Settings = None,
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
    """Continue a run with every layer dense (stage 2). One that was dense from the start has to be named.

    Repeated after an interruption, it finishes the steps that were begun.
    """
    from lighthouse_core.errors import UserError
    from lighthouse_core.job.plan import check_plan, plan
    from lighthouse_core.runs.find import find_run
    from lighthouse_core.runs.recovery import check_request, plan_recovery

    _output.set_quiet(quiet)
    _train.check_gpu_memory(memory, dry_run=dry_run)
    if not dry_run:
        _caches.use_own()
    nnodes, node_rank, rdzv_endpoint = _machines.machines(nnodes, node_rank, rdzv_endpoint)
    if run is None and nnodes > 1 and not dry_run:
        raise UserError("name the RUN when several machines recover it")
    # Before a checkpoint is read, which can take minutes.
    check_plan(nproc, nnodes, node_rank, rdzv_endpoint, dry_run=dry_run)
    found = find_run(run)
    if run is None:
        if found.stage == "dense" and not found.recovering:
            # A baseline gets no more steps by mistake.
            raise UserError(
                f"the newest run, {found.path}, was dense from the start", hint=f"lighthouse recover {found.path}"
            )
        _output.say(f"newest run: {found.path}")
    if or_done and extend is not None:
        raise UserError("--or-done and --extend exclude each other", hint="--extend adds to a complete recovery")
    if or_done and found.recovering and found.complete and steps in (None, found.end - found.start):
        _output.say(f"the recovery of run {found.path} is complete at step {found.end}: nothing is left to do")
        return
    asked = {"--steps": steps, "--extend": extend, "--set": settings or []}
    if node_rank and not dry_run:
        check_request(steps, extend, settings or ())
        found.change(settings or ())
        _train.check_titan(found.recipe)
        _train.check_data(found.recipe)
        # Machine 0 keeps the ledger; the workers read it after they have met there.
        same = _train.asked("recover", found.path, found.recipe, asked)
        _train.train(found.path, None, plan(nproc, nnodes, node_rank, rdzv_endpoint), "", same, quiet=quiet)
        return
    with nullcontext() if dry_run else found.lock():
        ahead = _train.verify_ahead(found)
        recovery = plan_recovery(found, steps, extend, settings or (), strict, ahead)
        _train.check_titan(recovery.recipe)
        _train.warn_of_damage(recovery.damaged, recovery.step)
        if recovery.stopped_early:
            _output.warn(f"{found.path} stopped at step {recovery.start} of {found.end}; recovery begins there")
            if theta := found.recipe.other_rope_theta(recovery.start):
                _output.warn(f"rope_theta goes from {theta:g} to {found.recipe.model.rope_theta:g}")
        if recovery.rates:
            before, after = recovery.rates
            then = "and then to zero" if recovery.recipe.recover.decay != "none" else "and stays there"
            _output.warn(
                f"the learning rate goes from {before:.3g} (step {recovery.step}) to {after:.3g} (step "
                f"{recovery.step + 1}), {then} until step {recovery.end}"
            )
        processes = plan(nproc, nnodes, node_rank, rdzv_endpoint, dry_run=dry_run)
        found_data = _train.check_data(recovery.recipe, dry_run=dry_run)
        _train.check(recovery.recipe, processes, dense=True)
        gpu = _train.gpu_to_fit(memory)
        _train.warn_of_memory(recovery.recipe, processes.world_size, gpu, "dense")
        if dry_run:
            _train.describe(recovery.recipe, processes.world_size, found_data, gpu=gpu)
            return
        found.set_aside(recovery.damaged)
        found.write_recovery(recovery)
        _output.say(f"recovering {found.path}: steps {recovery.step + 1} to {recovery.end}, every layer dense")
        again = f"lighthouse recover {found.path}"
        same = _train.asked("recover", found.path, recovery.recipe, asked)
        _train.train(found.path, found, processes, again, same, quiet=quiet, as_json=as_json)
    _output.final(f"done; go on with: lighthouse strip {found.path} OUT")
    if not as_json:
        _output.data(str(found.path))
