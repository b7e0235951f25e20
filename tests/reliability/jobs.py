"""What the scripts share: jobs of the real command line that are killed, and what such jobs leave behind."""

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import children
import torch

RECIPE = Path(__file__).parents[2] / "recipes/quickstart.toml"
# A small model with a Lighthouse layer, whose every step is logged.
TINY = [
    "model.dim=64",
    "model.heads=2",
    "model.kv_heads=1",
    "model.ffn_dim=96",
    "model.layers=3",
    "model.dense_layers=[0]",
    "lighthouse.topk=16",
    "training.seq_len=512",
    "metrics.every=1",
    "metrics.validation_batches=1",
]
_POLL_SECONDS = 0.02


def write_texts(path: Path) -> None:
    """Documents of 2 to 2048 characters, always the same."""
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(400):
            text = "".join(draw.choices("abcdefgh ", k=round(2 ** draw.uniform(1, 11))))
            file.write(json.dumps({"text": text}) + "\n")


def options(*settings: str) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


class Job:
    """One `lighthouse` command in progress. What it prints, and leaves of temporary files, goes to the folder `cwd`.

    `within` is a command that replaces itself by the one that follows it, as `ip netns exec NAME` does.
    """

    number = 0

    def __init__(
        self,
        *arguments: str,
        cwd: Path,
        environment: Mapping[str, str] | None = None,
        within: Sequence[str] = (),
    ):
        Job.number += 1
        self.words_path = cwd / f"words-{Job.number}.txt"
        self.begun = time.monotonic()
        with self.words_path.open("wb") as file:
            self.process = children.start(
                [*within, *children.LIGHTHOUSE, *arguments],
                # The scripts have limits of their own.
                seconds=24 * 3600,
                cwd=cwd,
                env={**os.environ, "TMPDIR": str(cwd), **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )

    @property
    def words(self) -> str:
        return self.words_path.read_text(errors="replace")

    def wait(self, seconds: float = 240) -> int:
        """Its exit code. It is killed if it takes longer."""
        try:
            return self.process.wait(seconds)
        except BaseException:
            self.kill()
            raise

    def wait_until(self, reached: Callable[[], Any], seconds: float = 120) -> bool:
        """Wait for `reached`; False if the job ends before. It is killed if neither comes."""
        end = time.monotonic() + seconds
        while not reached():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"{self.words}\nthe job did not come that far in {seconds} seconds")
            time.sleep(_POLL_SECONDS)
        return True

    def pids(self) -> list[int]:
        """The launcher, and all processes that come from it, parents before children."""
        return children.tree(self.process.pid)

    def workers(self) -> list[int]:
        """The training processes, by rank."""
        ranks = {}
        for pid in self.pids():
            rank = children.environment(pid).get("RANK")
            if rank is not None:
                ranks[int(rank)] = pid
        return [ranks[rank] for rank in sorted(ranks)]

    def kill(self) -> int:
        """kill -9 of all its processes at one instant. Returns how many they were.

        They are stopped first, parents before children: none starts another or hears of another's end, upon which the
        training processes would save a checkpoint.
        """
        stopped: list[int] = []
        while fresh := [pid for pid in self.pids() if pid not in stopped]:
            for pid in fresh:
                _send(pid, signal.SIGSTOP)
            stopped += fresh
        for pid in reversed(stopped):
            _send(pid, signal.SIGKILL)
        self.process.wait(60)
        children.wait_until(lambda: all(children.state(pid) in "ZX" for pid in stopped))
        return len(stopped)


def succeed(*arguments: str, cwd: Path, seconds: float = 240) -> Job:
    """Run a command to its end, which comes within so many seconds.

    Raises:
        RuntimeError: it did not end with 0.
    """
    job = Job(*arguments, cwd=cwd)
    code = job.wait(seconds)
    if code:
        raise RuntimeError(f"{job.words}\nlighthouse {' '.join(arguments)} ended with {code}")
    return job


def lines(run: Path) -> list[dict[str, Any]]:
    """The complete rows of a run's metrics.jsonl.

    Raises:
        ValueError: one of them is not JSON.
    """
    path = run / "metrics.jsonl"
    content = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]


def rows(run: Path, key: str = "loss") -> dict[int, dict[str, Any]]:
    """The rows that have `key`, by step.

    Raises:
        AssertionError: a step has two.
    """
    found = [row for row in lines(run) if key in row]
    steps = {row["step"]: row for row in found}
    assert len(steps) == len(found), f"{run} has rows of the same step"
    return steps


def newest(run: Path) -> int:
    """The newest step of metrics.jsonl; 0 for none."""
    return max((row["step"] for row in lines(run)), default=0)


def load(checkpoint: Path) -> dict[str, Any]:
    """Every tensor and every other value of a checkpoint, by its place in it."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, Any] = {}
    reader, planner = FileSystemReader(checkpoint), _EmptyStateDictLoadPlanner()
    _load_state_dict(state, storage_reader=reader, planner=planner, no_dist=True)
    return dict(_leaves(state, ""))


def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, int]:
    """The numbers of each tensor, and the other values, that are not the same to the last bit."""
    missing = {place: 1 for place in one.keys() ^ other.keys()}
    return missing | {place: n for place in one.keys() & other.keys() if (n := _differing(one[place], other[place]))}


def _leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
    if parts is None:
        yield place, value
        return
    for key, part in parts:
        yield from _leaves(part, f"{place}/{key}" if place else str(key))


def _differing(one: Any, other: Any) -> int:
    if not isinstance(one, torch.Tensor):
        return int(type(one) is not type(other) or one != other)
    if not isinstance(other, torch.Tensor) or (one.dtype, one.shape) != (other.dtype, other.shape):
        return max(1, one.numel())
    bits = (x.detach().contiguous().view(-1).view(torch.uint8).view(x.numel(), -1) for x in (one, other))
    return int((next(bits) != next(bits)).any(1).sum())


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
