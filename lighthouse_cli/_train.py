"""What pretrain and recover share: describing a recipe, and seeing a launch through to its end."""

import contextlib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lighthouse_cli import _output, _watch
from lighthouse_cli._source import size_of_source

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lighthouse_core.config import Recipe
    from lighthouse_core.config.phases import Phase
    from lighthouse_core.data.survey import Survey
    from lighthouse_core.estimate import Verdict
    from lighthouse_core.job.plan import Asked, Plan
    from lighthouse_core.runs.run import Run
    from lighthouse_core.seal import Verification
    from lighthouse_core.weights.origin import Weights

# How a dense step's time is known.
_HOW = {
    "recovery": "by the recovery's own steps",
    "measured": "measured at the start",
    "estimated": "estimated from FLOPs; --measure-dense measures it",
}
# Times the memory that a step is tried with on a CPU, where the estimate is rough.
_MARGIN = 1.5
# Checkpointing by what it keeps, most first.
_MODES = ("none", "selective", "attention", "full")
_VERDICTS = {"close": "is close", "not estimated": "is not estimated"}
_FUSED = 'training.dtype = "bfloat16", and a model.head_dim of at most 256'
_OFF = "the estimate may be off by 10 %"
# Seconds that a start, and a dry run of one, read for, where documents must be read to know their lengths.
_LOOK = 3.0
# Of a fault, and of the user's mistake.
_ERRORS = (1, 2)
# Of the keys of dense attention: stage 1 selects and merges besides, so that one with hardly fewer keys saves nothing.
_SAVES = 0.99
_INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


def warn_of_no_savings(recipe: "Recipe", found: "Sequence[Survey]") -> None:
    """Say so where stage 1 attends to no fewer keys than dense attention does, which short documents bring about.

    Args:
        recipe: of a new run.
        found: of `check_data`.
    """
    from lighthouse_core.estimate import DENSE, keys_of_stage_1, mean_keys

    lengths = _pieces(recipe, found)
    if not recipe.lighthouse.enabled or (recipe.alignment is not None and lengths is None):
        return
    seen = mean_keys(recipe, lengths)
    keys, dense = keys_of_stage_1(recipe, seen), seen[DENSE]
    if keys < _SAVES * dense:
        return
    # Alike as whole numbers, they may differ.
    digits = next((n for n in (0, 1) if f"{keys:.{n}f}" != f"{dense:.{n}f}"), 0)
    if lengths:
        tokens = sum(lengths) / len(lengths)
        of = f"on documents of {tokens:.0f} token{'s' * (f'{tokens:.0f}' != '1')} on average"
        other = 'use longer documents, data.packing = "concat"'
    else:
        of = f"at {recipe.training.seq_len} tokens"
        other = "use longer sequences"
    _output.warn(
        f"stage 1 saves nothing {of}: a query attends to {keys:.{digits}f} keys, and to {dense:.{digits}f} with dense "
        f"attention; {other}, a smaller lighthouse.window, or lighthouse.enabled = false"
    )


def _pieces(recipe: "Recipe", found: "Sequence[Survey]") -> "list[int] | None":
    """The lengths that `estimate.mean_keys` takes; None where documents are not kept apart, or lengths not known."""
    from lighthouse_core.data.survey import mixed_pieces

    known = recipe.alignment is not None and all(len(one.lengths) for one in found)
    return mixed_pieces(found) if known else None


def describe(
    recipe: "Recipe",
    processes: int,
    found: "Sequence[Survey]",
    weights: "Weights | None" = None,
    gpu: int | None = None,
) -> None:
    """Print the resolved recipe, with what it costs and what its data is in comments, so that the output is itself a
    recipe. Nothing is printed before all of it is known.

    Args:
        recipe: the recipe.
        processes: of the whole job.
        found: of `check_data`.
        weights: of `check_weights`, for a new run.
        gpu: bytes of the GPU that it is to fit, if there is one.

    Raises:
        DataError: the data is not there.
    """
    from lighthouse_core.config import dump_recipe

    lines = [*_costs(recipe, processes, gpu), *_of_data(recipe, found), *_of_weights(recipe, processes, weights)]
    _output.data("\n".join([dump_recipe(recipe), *lines]))


def _of_weights(recipe: "Recipe", processes: int, weights: "Weights | None") -> "Iterator[str]":
    """What was read of them, what reading all of them takes, and what the recipe changes."""
    if weights is not None:
        from lighthouse_core.estimate import loading_bytes

        yield _line("weights", f"{weights.path}: {weights.about}")
        host, device = loading_bytes(recipe, processes, weights.stored)
        yield _line("loading (estimate)", f"{_gib(device)} a process, and {_gib(host)} of the machine's memory")
        yield from (_line("changed", text) for text in _changed(recipe))


def _changed(recipe: "Recipe") -> "Iterator[str]":
    """What a recipe makes other than the model that it begins with."""
    from lighthouse_core.config.origin import changes, read_origin

    origin = read_origin(recipe.model.origin)
    if origin.tokens != recipe.training.seq_len:
        yield f"length {origin.tokens} -> {recipe.training.seq_len}"
    for key, (there, here) in changes(recipe.model.origin, recipe.model.model_dump()).items():
        yield f"model.{key} {_value(there)} -> {_value(here)}"
    if origin.tokenizer not in (None, recipe.data.tokenizer):
        yield f"data.tokenizer {_value(origin.tokenizer)} -> {_value(recipe.data.tokenizer)}"


def say_weights(recipe: "Recipe", weights: "Weights") -> None:
    """Say which weights a new run begins with, and what its recipe changes."""
    _output.say(f"beginning with {weights.path}: {weights.about}; step, optimizer and place in the data are new")
    for text in _changed(recipe):
        _output.say(f"changed: {text}")
    warn_of_rotation(recipe)


def warn_of_rotation(recipe: "Recipe") -> None:
    """Say so where a model is extended to a length that its rotation is not made for."""
    from lighthouse_core.config.origin import read_origin

    model, length = recipe.model, recipe.training.seq_len
    origin = read_origin(model.origin) if model.origin else None
    if origin is None or not origin.tokens or length <= origin.tokens:
        return
    scaling, page = model.rope_scaling, "docs/extending-context.md says how to choose"
    if scaling is not None:
        reach = scaling.factor * getattr(scaling, "original_max_position_embeddings", origin.tokens)
        if reach < length:
            _output.warn(f"model.rope_scaling reaches {reach:.0f} tokens, and training.seq_len is {length}: {page}")
        return
    # The slowest pair is to turn as far as before over the longer sequence.
    least = origin.model["rope_theta"] * (length / origin.tokens) ** (model.head_dim / max(1, model.head_dim - 2))
    if model.rope_theta < least:
        _output.warn(
            f"model.rope_theta {model.rope_theta:g} is below {least:.2g}, which {length} tokens need of a model of "
            f"{origin.tokens} with {origin.model['rope_theta']:g}: {page}"
        )


def _costs(recipe: "Recipe", processes: int, gpu: int | None) -> "Iterator[str]":
    from lighthouse_core.estimate import estimate, exchanged_bytes, process_bytes, state_bytes, verdicts

    cost = estimate(recipe)
    training, counts = recipe.training, cost.parameters
    yield _line(
        "parameters",
        f"{_short(counts.total)} (embedding {_short(counts.embedding)}, body {_short(counts.body)}, "
        f"head {_short(counts.head)})",
    )
    if cost.lighthouse_flops is not None:
        if cost.gathered is not None:
            yield _line("S", f"{cost.gathered} of {training.seq_len} tokens")
        for phase in recipe.phases if recipe.lighthouse.phases else ():
            yield _line(f"phase {phase.number}", f"steps {phase.begin}-{phase.end}: {_of_phase(phase, recipe)}")
    if recipe.data.packing == "concat":
        yield from _of_attention(recipe, None)
    yield _line("tokens per step", f"{cost.tokens_per_step}")
    first = "stage 1" if recipe.lighthouse.enabled else "training"
    for stage, steps in ((first, training.steps), ("recovery", recipe.recover.steps)):
        if steps:
            yield _line(f"tokens, {stage}", f"{_short(steps * cost.tokens_per_step)} in {steps} steps")
    found = {} if gpu is None else verdicts(recipe, processes, gpu)
    needed = {stage: verdict.needed for stage, verdict in found.items()} or process_bytes(recipe, processes)
    yield _line(
        "memory (estimate)",
        f"{', '.join(f'{_stage(recipe, stage)} {_gib(size)}' for stage, size in needed.items())} a process over "
        f"{processes}, {_gib(state_bytes(recipe, processes))} of it for weights, gradients and optimizer",
    )
    if gpu is not None:
        words = "; ".join(f"{_stage(recipe, stage)} {_verdict(verdict)}" for stage, verdict in found.items())
        yield _line(f"GPU of {gpu / 2**30:.1f} GiB", words)
    if recipe.parallel.context > 1:
        sent = f"{_mib(exchanged_bytes(recipe, dense=True))} for a dense layer"
        if recipe.lighthouse.enabled and not recipe.lighthouse.phases:
            sent += f" and {_mib(exchanged_bytes(recipe, dense=False))} for a Lighthouse layer"
        words = f"{recipe.parallel.context} processes share each sequence; in a pass, a process sends {sent}"
        yield _line("shared sequences", words)


def _of_phase(phase: "Phase", recipe: "Recipe") -> str:
    """What a phase of stage 1 attends to, in which layers, and what processes that share sequences send in a pass."""
    from lighthouse_core.estimate import exchanged_bytes

    if phase.dense:
        return phase.described()
    dense = f"; dense layers {', '.join(map(str, phase.dense_layers))}" if phase.dense_layers else ""
    gathers = phase.attention.pools and len(recipe.phases) > 1
    gathered = f", S {phase.attention.geometry(recipe.training.seq_len).gathered_length}" if gathers else ""
    sent = ""
    if recipe.parallel.context > 1:
        most = "up to " * (phase.growth is not None)
        bytes_sent = _mib(exchanged_bytes(recipe, dense=False, phase=phase))
        sent = f"; in a pass, a process sends {most}{bytes_sent} for a Lighthouse layer"
    return f"{phase.described()}{gathered}{dense}{sent}"


def _stage(recipe: "Recipe", stage: str) -> str:
    """What people call a stage, "lighthouse" or "dense"."""
    if stage == "lighthouse":
        return "stage 1"
    return "recovery" if recipe.lighthouse.enabled else "training"


def _verdict(verdict: "Verdict") -> str:
    why = verdict.why or (_OFF if verdict.word == "close" else "")
    return f"{_VERDICTS.get(verdict.word, verdict.word)}{why and f': {why}'}"


def _of_attention(recipe: "Recipe", lengths: "Sequence[int] | None") -> "Iterator[str]":
    """What attention costs; `lengths` are those of `estimate.mean_keys`."""
    from lighthouse_core.estimate import DENSE, estimate, mean_keys

    cost, seen = estimate(recipe, lengths), mean_keys(recipe, lengths)
    flops, dense = f"{_short(cost.dense_flops)}", f"{seen.pop(DENSE):.0f}"
    if cost.lighthouse_flops is not None:
        yield _line("keys a query (mean)", f"{', then '.join(f'{keys:.0f}' for keys in seen.values())}; dense {dense}")
        flops = f"{_short(cost.lighthouse_flops)} in stage 1, {flops} dense"
    elif lengths:
        yield _line("keys a query (mean)", dense)
    yield _line("FLOPs per token", flops)


def _line(name: str, text: str) -> str:
    return f"# {name:<21} {text}"


def _of_data(recipe: "Recipe", found: "Sequence[Survey]") -> "Iterator[str]":
    """The size of each source, and how long documents are and what keeping them apart costs."""
    for one in found:
        size, tokens, epochs = size_of_source(one)
        facts = "its size is not known" if size == "?" else f"{size} bytes"
        facts += f", {tokens} tokens, {epochs} epochs in the run" if one.complete else ""
        facts += "" if one.complete else "; tokens and epochs are not known beforehand"
        share = f"{one.share:.2%} of the sequences; " if recipe.data.sources else ""
        yield _line(f"source {one.source}" if recipe.data.sources else "data", share + facts)
    if recipe.alignment is not None:
        yield from _of_documents(recipe, found)


def _of_documents(recipe: "Recipe", found: "Sequence[Survey]") -> "Iterator[str]":
    """How long documents are, of each source; their padding and what attention costs, of all by their shares of the
    sequences."""
    from lighthouse_core.data.survey import mixed_ignored, mixed_padding, quantiles

    for one in found:
        of = f" of {one.source}" if recipe.data.sources else ""
        count = f"{len(one.lengths)}{'' if one.complete else f' in the first {_LOOK:g} seconds of reading'}"
        if len(one.lengths):
            tokens = quantiles(one.lengths)
            count += f"; tokens: median {tokens.median}, mean {one.lengths.mean():.0f}, 90% {tokens.p90}"
            count += f", longest {tokens.longest}"
            count += f"; {one.longer} longer than training.seq_len"
            if of and one.align != 1:
                count += f"; padding {one.padding:.2%}"
        yield _line(f"documents{of}", count)
    lengths, ignored = _pieces(recipe, found), f"{mixed_ignored(found):.2%}"
    if lengths is None:
        yield _line("attention", "lengths are not known: one document a sequence is counted")
    elif recipe.alignment is not None and recipe.alignment > 1:
        padding = f"{mixed_padding(found):.2%} of the tokens, each document to a multiple of {recipe.alignment}"
        yield _line("padding", f"{padding}; {ignored} of the labels are ignored")
    else:
        yield _line("labels", f"{ignored} are ignored")
    yield from _of_attention(recipe, lengths)


def values(recipe: "Recipe") -> "dict[str, Any]":
    """Every value of a recipe, by its key."""
    from lighthouse_core.config.positions import flatten, spelled

    table = flatten(recipe.model_dump(mode="json", by_alias=True))
    return {spelled(key): value for key, value in table.items() if not isinstance(value, dict)}


def asked(command: str, run_dir: Path, recipe: "Recipe", more: "dict[str, Any]") -> "Asked":
    """What the machines of a job must have been asked for alike.

    Args:
        command: of the command line.
        run_dir: of the run.
        recipe: of the run, with the limits.
        more: what decides the run besides, by name.
    """
    from lighthouse_core.job.plan import MEET_SECONDS, Asked

    facts = {"the command": command, "the run": run_dir.name} | more
    seconds = recipe.titan.get("comm", {}).get("init_timeout_seconds", MEET_SECONDS)
    return Asked(facts, recipe.parallel.hang_seconds, seconds, _output.say)


def train(
    run_dir: Path,
    run: "Run | None",
    plan: "Plan",
    resume: str,
    asked: "Asked",
    *,
    quiet: bool = False,
    as_json: bool = False,
) -> None:
    """Launch the run's last stage. The caller holds the run's lock.

    Args:
        run_dir: of the run.
        run: None on a machine other than the first: that one keeps the run.
        plan: the processes.
        resume: the command that goes on after an interruption.
        asked: of this machine, where there are several.
        quiet: show errors only.
        as_json: print every logged row on stdout.

    Raises:
        typer.Exit: with the job's exit code, unless it is 0.
    """
    from lighthouse_core.errors import LighthouseError
    from lighthouse_core.job.launch import launch

    if run is not None:
        # The run that was trained last is the newest, whenever it was made.
        with contextlib.suppress(OSError):
            os.utime(run_dir)
    watcher = _watch.watcher(run, plan, quiet=quiet, as_json=as_json) if run is not None else _watch.Silence(quiet)
    outcome = "failed"
    try:
        code = launch(run_dir, plan, watcher, *([asked] if plan.nnodes > 1 else ()))
        outcome = "done" if code == 0 else "stopped" if code in _INTERRUPTED else outcome
    except LighthouseError as error:
        if run is not None and (steps := run.checkpoint_steps()):
            error.hint = f"{error.hint}; " if error.hint else ""
            error.hint += f"step {steps[-1]} is saved; continue with: {resume}"
        raise
    finally:
        watcher.end(outcome)
        if run is not None:
            _settle(run)
    if run is not None and code in _INTERRUPTED:
        steps = run.checkpoint_steps()
        if steps and steps[-1] >= run.end:
            _output.final(f"interrupted after the last step, {steps[-1]}, which is saved")
        elif steps:
            _output.final(f"interrupted; step {steps[-1]} is saved. Continue with: {resume}")
        else:
            _output.final("interrupted before the first checkpoint")
    elif run is not None and code in _ERRORS and (steps := run.checkpoint_steps()):
        _output.final(f"step {steps[-1]} is saved. Continue with: {resume}")
    if code:
        raise typer.Exit(code)


def _settle(run: "Run") -> None:
    """Bring the ledger up to date, and say what the run has cost."""
    from lighthouse_core.errors import LighthouseError
    from lighthouse_core.runs.rows import clock

    try:
        run.settle()
    except (OSError, LighthouseError) as error:
        _output.warn(f"the costs in {run.path / 'ledger.json'} are not up to date: {error}")
    spent = [stage for stage in run.ledger["stages"] if "steps" in stage]
    if not spent:
        return
    steps, seconds, flops = (sum(stage[key] for stage in spent) for key in ("steps", "seconds", "flops"))
    line = f"{steps} steps in {clock(seconds)}, {_short(flops)} FLOPs"
    if "dense" in run.ledger:
        dense, how = run.ledger["dense"], _HOW[run.ledger["dense_step"]["how"]]
        line += f"; as many dense ones {clock(dense['seconds'])} ({how}), {_short(dense['flops'])} FLOPs: "
        line += f"{dense['seconds'] / seconds:.2f}x"
    _output.say(line)
    drawn = run.ledger["stages"][-1].get("sources_since_start", {})
    total = sum(one["samples"] for one in drawn.values())
    if len(drawn) > 1 or any(one["epoch"] > 1 for one in drawn.values()):
        parts = (
            f"{name} {one['samples']:,} ({one['samples'] / max(total, 1):.1%}), in its epoch {one['epoch']}"
            for name, one in drawn.items()
        )
        _output.say(f"sequences by source since step 1: {'; '.join(parts)}")


def verify_ahead(run: "Run") -> "Verification | None":
    """Have the run's newest checkpoint read while this process imports torch, which it needs for its GPUs."""
    from lighthouse_core.job.plan import local_gpus

    ahead = run.verify_ahead()
    local_gpus()
    return ahead


def warn_of_damage(damaged: dict[int, str], step: int) -> None:
    """Say which checkpoints were passed over for the one of `step`."""
    for text in damaged.values():
        _output.warn(text)
    if damaged:
        _output.warn(f"going on from step {step}; --strict refuses to")


def check_data(recipe: "Recipe", *, dry_run: bool = False) -> "list[Survey]":
    """Meet what is wrong with the data here, rather than after the processes have started; of a start and of a dry run.

    Args:
        recipe: the recipe.
        dry_run: whether it is one. Prepared tokens are then not compared with their checksums; the lengths of their
            documents are read, where they are kept apart.

    Returns:
        What the first seconds of reading show of each source's training text.

    Raises:
        DataError: what is wrong.
    """
    from lighthouse_core.data import check
    from lighthouse_core.data.survey import survey

    for note in check(recipe, _output.say, checksums=not dry_run):
        _output.warn(note)
    lengths = dry_run and recipe.alignment is not None
    return survey(recipe, "train", seconds=_LOOK, samples=0, lengths=lengths)


def check_weights(recipe: "Recipe", *, verify: bool) -> "tuple[Recipe, Weights | None]":
    """Meet what does not fit of the weights that a run begins with, if it begins with any.

    Args:
        recipe: of a new run.
        verify: compare every byte of a run's checkpoint with its seal.

    Returns:
        The recipe, which names one checkpoint of a run; and the weights.

    Raises:
        UserError: there are no such weights, they cannot be used, or the recipe contradicts them.
    """
    if not recipe.model.origin:
        return recipe, None
    from lighthouse_core.config.origin import changes
    from lighthouse_core.weights.origin import find_weights

    changes(recipe.model.origin, recipe.model.model_dump())
    if verify:
        _output.say(f"reading every weight of {recipe.model.origin}")
    weights = find_weights(recipe.model, verify=verify)
    model = recipe.model.model_copy(update={"origin": str(weights.path)})
    return recipe.model_copy(update={"model": model}), weights


def _value(value: Any) -> str:
    """Of a key of [model], as a recipe has it; "none" where there is none."""
    from lighthouse_core.config.dump import toml_value

    return toml_value(value) if value else "none"


def check_titan(recipe: "Recipe") -> None:
    """Meet what is wrong with a [titan] table before anything is made of its recipe.

    Raises:
        RecipeError: torchtitan has no such setting, or it cannot be set, or not to this value.
    """
    if recipe.titan:
        from lighthouse_core.titan import check_overrides

        check_overrides(recipe)


def check(recipe: "Recipe", plan: "Plan", *, dense: bool = False) -> None:
    """Meet what does not fit this machine here, rather than after the processes have started.

    Args:
        recipe: the recipe.
        plan: the processes.
        dense: whether every layer is.

    Raises:
        UserError: the batch does not divide among the processes, a package is missing, or a
            backend is not there.
    """
    from lighthouse_core.attention import check_backends
    from lighthouse_core.errors import UserError
    from lighthouse_core.job.plan import check_loggers, check_world, local_gpus

    check_world(recipe, plan.world_size)
    check_loggers(recipe)
    try:
        device = "cuda" if local_gpus() else "cpu"
        check_backends(recipe.lighthouse.dense_attention, device, pooled=False)
        for phase in () if dense else recipe.phases:
            check_backends(phase.attention, device, pooled=not phase.dense)
    except ValueError as error:
        raise UserError(str(error), hint=getattr(error, "hint", None)) from None


def check_memory(recipe: "Recipe", plan: "Plan", *, dry_run: bool) -> None:
    """Refuse a step that is far too large for a machine without GPUs, before it fills the memory. A dry run only says
    so: it may be about another machine.

    Raises:
        UserError: by the estimate of `--dry-run`.
    """
    from lighthouse_core.errors import UserError
    from lighthouse_core.estimate import estimate
    from lighthouse_core.job.plan import local_gpus

    if local_gpus():
        # An accelerator says itself what does not fit.
        return
    cost = estimate(recipe)
    needed = cost.state_bytes / plan.nnodes + cost.activation_bytes * plan.nproc
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > _MARGIN * there:
        text = f"a step takes about {_gib(needed)}, and this machine has no GPU and {_gib(there)}"
        if not dry_run:
            raise UserError(text, hint="use a smaller model, shorter sequences or a smaller training.local_batch_size")
        _output.warn(text)


def check_gpu_memory(asked: float | None, *, dry_run: bool) -> None:
    """Raise UserError where a start names another GPU than this machine's."""
    from lighthouse_core.errors import UserError

    if asked is not None and not dry_run:
        raise UserError("--gpu-memory is for --dry-run", hint="a start compares with this machine's GPUs")


def gpu_to_fit(asked: float | None) -> int | None:
    """Bytes of the GPU that a run has to fit: as asked for in GiB, else of this machine; None where there is none."""
    from lighthouse_core.job.plan import gpu_memory

    return gpu_memory() if asked is None else int(asked * 2**30)


def warn_of_memory(recipe: "Recipe", processes: int, gpu: int | None, stage: str) -> None:
    """Say so where a stage, or the recovery that follows it, may take more than a GPU has. Where it fits by an estimate
    that no measurement covers, a dry run alone says so.

    Args:
        recipe: the recipe.
        processes: of the whole job.
        gpu: of `gpu_to_fit`.
        stage: that is about to be trained, "lighthouse" or "dense".
    """
    from lighthouse_core.estimate import usable, verdicts

    if gpu is None:
        return
    found = verdicts(recipe, processes, gpu)
    stages = {stage: ("stage 1" if stage == "lighthouse" else "training with every layer dense", "set")}
    if stage == "lighthouse" and recipe.recover.steps:
        stages["dense"] = "the recovery that follows", "recover with"
    for name, (words, do) in stages.items():
        word, why, needed = found[name]
        if word == "not estimated":
            _output.warn(f"{words} may not fit, for its memory is not estimated: {why}")
        elif word in ("close", "does not fit"):
            _output.warn(
                f"{words} {word if word == 'does not fit' else 'may not fit'}: it takes about {_gib(needed)} a "
                f"process, and the GPU has {_gib(gpu)}, {_gib(usable(gpu, processes))} of it for tensors; "
                f"{do} {_smaller(recipe, processes, name, gpu)}"
            )


def warn_of_keys_without_effect(recipe: "Recipe") -> None:
    """Say which keys are given that nothing reads."""
    for key, why in recipe.lighthouse.without_effect.items():
        _output.warn(f"{key} has no effect: {why}")


def warn_of_whole_sequences(recipe: "Recipe") -> None:
    """Say so where processes exchange whole sequences in a pyramid's layer, and which settings have them exchange what
    is gathered."""
    from lighthouse_core.estimate import exchanged_bytes, whole_sequences

    found = whole_sequences(recipe)
    if found is None:
        return
    why, nearest = found
    ways = []
    for key, value in nearest.items():
        section = "training" if key == "seq_len" else "lighthouse"
        part = getattr(recipe, section).model_copy(update={key: value})
        less = exchanged_bytes(recipe.model_copy(update={section: part}), dense=False)
        ways.append(f"{section}.{key} = {value} ({_mib(less)})")
    _output.warn(
        f"a Lighthouse layer sends whole sequences, as a dense one does ({_mib(exchanged_bytes(recipe, dense=True))} a "
        f"pass): {why}" + (f"; with {' or '.join(ways)} it sends what is gathered" if ways else "")
    )


def _smaller(recipe: "Recipe", processes: int, stage: str, gpu: int) -> str:
    """Settings with which a stage takes less, and how much it then takes."""
    from lighthouse_core.estimate import all_scores, process_bytes, usable, verdict

    training, ways = recipe.training, []
    if all_scores(recipe, recipe.lighthouse.dense_backend):
        # Which no other setting makes up for.
        other = 'lighthouse.dense_backend = "auto"' if recipe.lighthouse.dense_backend == "math" else _FUSED
        ways.append(f"{other}, for plain matrix products hold the scores of all pairs")

    def changed(**keys: Any) -> int:
        other = recipe.model_copy(update={"training": training.model_copy(update=keys)})
        return process_bytes(other, processes)[stage]

    now = changed()
    modes = {mode: size for mode in _MODES if (size := changed(activation_checkpointing=mode)) < now}
    if modes:
        best = next(
            (mode for mode, size in modes.items() if verdict(size, usable(gpu, processes)) == "fits"),
            min(modes, key=modes.__getitem__),
        )
        ways.append(f'training.activation_checkpointing = "{best}" ({_gib(modes[best])})')
    local = training.local_batch_size
    fewer = max((count for count in range(1, local) if local % count == 0), default=local)
    for key, value in (("local_batch_size", fewer), ("loss_chunk", min(1024, training.loss_chunk))):
        if (size := changed(**{key: value})) < now:
            ways.append(f"training.{key} = {value} ({_gib(size)})")
    return ", ".join([*ways, "or more processes that share weights (parallel.shard) or sequences (parallel.context)"])


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def _mib(count: float) -> str:
    return f"{count / 2**20:.1f} MiB"


def _short(number: float) -> str:
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"
