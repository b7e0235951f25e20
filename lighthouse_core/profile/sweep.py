"""Attention profiles of several lengths: how time and memory grow, and from where on Lighthouse is faster."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from lighthouse_core.attention import LighthouseConfig
from lighthouse_core.errors import UserError
from lighthouse_core.profile.attention import AttentionProfile, Call, check_size, profile_attention
from lighthouse_core.profile.fits import Crossover, PowerLaw, crossover, fit
from lighthouse_core.profile.machine import Roof
from lighthouse_core.profile.work import Shape


@dataclass(frozen=True)
class Curve:
    """One call over the lengths, forward and backward.

    Attributes:
        name: of the call.
        label: what it is.
        tokens: lengths, growing.
        calls: at each of them.
        law: fitted to what was measured; None for fewer than two lengths of that.
        varied: whether each length had settings of its own, so that no law is to be expected.
    """

    name: str
    label: str
    tokens: list[int]
    calls: list[Call]
    law: PowerLaw | None
    varied: bool = False

    @property
    def measured(self) -> list[tuple[int, Call]]:
        """Lengths and calls that were not worked out from shorter ones."""
        return [(n, call) for n, call in zip(self.tokens, self.calls, strict=True) if not call.extrapolated]


@dataclass(frozen=True)
class Sweep:
    """What several lengths show together.

    Attributes:
        profiles: of each length, shortest first.
        curves: of Lighthouse, then of every dense kernel.
        crossovers: of Lighthouse and each dense kernel, by its name.
        notes: what is missing, and why.
        shares: of the tokens at level 0, for each length, where they or the levels differ; else none.
    """

    profiles: list[AttentionProfile]
    curves: list[Curve]
    crossovers: dict[str, Crossover]
    notes: tuple[str, ...] = ()
    shares: tuple[float, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        return {
            "profiles": [profile.as_json() for profile in self.profiles],
            "slopes": {curve.name: curve.law.slope if curve.law else None for curve in self.curves},
            "shares": list(self.shares),
            "crossovers": {name: asdict(found) for name, found in self.crossovers.items()},
            "notes": list(self.notes),
        }


def profile_lengths(
    shapes: Sequence[tuple[Shape, LighthouseConfig]],
    roof: Callable[[], Roof],
    device: torch.device,
    say: Callable[[str], None],
    *,
    repeats: int = 20,
    done: Callable[["Sweep", Roof], None] = lambda found, limits: None,
) -> tuple[Sweep, Roof]:
    """Profile every shape, shortest first, and put them together. One that fills the GPU's memory is the last; what
    came before it counts.

    Args:
        shapes: of distinct lengths, with the settings at each.
        roof: measures the machine's; called once nothing is wrong with the shapes.
        device: a GPU, or the CPU.
        say: told what begins.
        repeats: see `profile_attention`.
        done: given what there is after each length.

    Raises:
        UserError: a shape that makes no call or does not fit, before anything is measured; or the first one fills the
            memory.
        LighthouseError: what would be timed disagrees with plain PyTorch.
    """
    shapes = sorted(shapes, key=lambda pair: pair[0].tokens)
    for shape, cfg in shapes:
        check_size(shape, cfg, device)
    say("measuring the machine: a copy and a matrix product")
    limits = roof()
    profiles: list[AttentionProfile] = []
    notes = []
    for shape, cfg in shapes:
        say(f"N = {shape.tokens}: comparing with plain PyTorch, then timing")
        last = profiles[-1] if profiles else None
        known: dict[str, Any] = (
            {"before": {call.name: call for call in last.dense}, "before_tokens": last.tokens} if last else {}
        )
        try:
            profiles.append(profile_attention(shape, cfg, limits, device, repeats=repeats, **known))
        except torch.OutOfMemoryError:
            notes.append(f"N = {shape.tokens} filled the GPU's memory")
            break
        calls = (profiles[-1].lighthouse, *profiles[-1].dense)
        say("  forward and backward: " + ", ".join(f"{call.label} {call.both_ms.median:.2f} ms" for call in calls))
        done(together(profiles), limits)
    if not profiles:
        raise UserError(notes[0], hint="use a smaller --seq, or fewer --heads: the times of heads add up")
    return together(profiles, tuple(notes)), limits


def together(profiles: list[AttentionProfile], notes: tuple[str, ...] = ()) -> Sweep:
    """Curves and crossovers of profiles, shortest first."""
    ours = [profile.lighthouse for profile in profiles]
    tokens = [profile.tokens for profile in profiles]
    shares = _shares(profiles)
    curves = [replace(_curve(tokens, ours), varied=bool(shares))]
    crossovers = {}
    for name in dict.fromkeys(call.name for profile in profiles for call in profile.dense):
        found = [
            (profile.tokens, profile.lighthouse, call)
            for profile in profiles
            for call in profile.dense
            if call.name == name
        ]
        curves.append(_curve([n for n, _, _ in found], [call for _, _, call in found]))
        crossovers[name] = crossover(
            [n for n, _, _ in found],
            [own.both_ms.median for _, own, _ in found],
            [call.both_ms.median for _, _, call in found],
        )
    return Sweep(profiles, curves, crossovers, notes, shares)


def _shares(profiles: list[AttentionProfile]) -> tuple[float, ...]:
    shares = tuple(profile.level_0 for profile in profiles if profile.level_0 is not None)
    return shares if len({(profile.level_0, profile.settings["levels"]) for profile in profiles}) > 1 else ()


def _curve(tokens: list[int], calls: list[Call]) -> Curve:
    curve = Curve(calls[0].name, calls[0].label, tokens, calls, None)
    lengths = [n for n, _ in curve.measured]
    return replace(curve, law=fit(lengths, [call.both_ms.median for _, call in curve.measured]))
