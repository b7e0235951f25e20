"""The machines of a job: their launchers meet before they start processes, and hear of each other afterwards.

The launcher of machine 0 keeps a store of torch's at the endpoint, where the processes of the job meet afterwards. Each
launcher says there what it was asked for, so that a machine with another command is refused before anything starts.
From then on each one counts up once a second, and leaves a word when it ends.
"""

import contextlib
import hashlib
import json
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lighthouse_core.errors import LighthouseError, UserError
from lighthouse_core.files import open_to_append, refuse_links
from lighthouse_core.job import network
from lighthouse_core.job.clock import RunningClock
from lighthouse_core.job.exits import killed_by
from lighthouse_core.job.plan import Asked, Plan
from lighthouse_core.job.stop import SIGNALS
from lighthouse_core.reading import read_regular
from lighthouse_core.runs.create import git_commit

_BEAT_SECONDS = 1.0
# Between two looks while machines are waited for.
_LOOK_SECONDS = 0.1
# Of one attempt to connect.
_CONNECT_SECONDS = 2.0
# What a machine that failed waits to hear whether another one is the cause.
_CAUSE_SECONDS = 5.0
# What machine 0 waits for the others to read its last word.
_LAST_WORDS_SECONDS = 4.0
# A launcher without a beat for so long is taken for one that has gone, before the job and where another one ends.
_QUIET_SECONDS = 3.0
# For the others to see what machine 0 has written into the run: file systems of a network keep what they looked up.
_SHARED_SECONDS = 15.0
# Within a run, rewritten by each job of several machines.
MARK = "logs/machines.json"
_MARK_BYTES = 1000
_SAME = "run the same command, of the same versions, on every machine, but for --node-rank"


@dataclass
class _Arrival:
    """A launcher that waits for the job to begin, as machine 0 sees it.

    Attributes:
        said: what it was asked for, and its name.
        came: seconds on machine 0's clock when it was first heard of.
        beats: the last that was heard.
        since: seconds on that clock when its beats last changed.
    """

    said: dict[str, Any]
    came: float
    beats: str
    since: float


@dataclass(frozen=True)
class Fault:
    """What has become of another machine.

    Attributes:
        error: in words.
        saves: whether the processes of all machines may be saving a checkpoint together.
        grace: seconds that the processes here have to end; 0 to be killed, None for the usual time.
    """

    error: LighthouseError
    saves: bool = False
    grace: float | None = None


class Machines:
    """The launchers of a job, seen from one of them.

    Args:
        plan: the processes, of several machines.
        asked: what this machine was asked for.
    """

    def __init__(self, plan: Plan, asked: Asked):
        self.plan, self.asked = plan, asked
        self.host, self.port = network.endpoint(plan.rdzv_endpoint)
        self.patience = asked.patience
        own = {"--nnodes": plan.nnodes, "--nproc": plan.nproc, **asked.facts, **_versions()}
        self._facts = {name: json.dumps(value, default=str) for name, value in own.items()}
        self._token = secrets.token_hex(8)
        self._hosts = {plan.node_rank: socket.gethostname()}
        self._clock = RunningClock()
        # What the thread that talks to the store leaves for the others.
        self._verdict: dict[str, Any] | None = None
        self._here: list[int] = []
        self._arrival = 0
        self._beats = 0
        self._states: list[tuple[int, tuple[int, str] | None]] = []
        self._broken: str | None = None
        # And what they leave for it.
        self._end: tuple[int, str] | None = None
        self._refusal: LighthouseError | None = None
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._talk, name="machines", daemon=True)
        self._listening: socket.socket | None = None
        # By machine: its beats when they last changed, and the clock's seconds then.
        self._heard: dict[int, tuple[int, float]] = {}

    def __str__(self) -> str:
        return self.plan.rdzv_endpoint

    def name(self, rank: int) -> str:
        """A machine in words."""
        return f"machine {rank} ({self._hosts[rank]})" if rank in self._hosts else f"machine {rank}"

    # Before the job.

    def meet(self, run_dir: Path, stopping: Callable[[], bool]) -> bool:
        """Wait until all machines are here and asked for the same.

        Args:
            run_dir: of the run, which machine 0 has made; the others see whether they share it.
            stopping: whether to give up.

        Returns:
            False where it was given up.

        Raises:
            UserError: machine 0 cannot listen there, a machine was asked for something else, or does not share the run.
            LighthouseError: a machine did not come in time.
        """
        rank, others = self.plan.node_rank, [n for n in range(self.plan.nnodes) if n != self.plan.node_rank]
        if rank == 0:
            self._listening = network.listen(self.host, self.port, 2 * self.plan.world_size)
            self._mark(run_dir)
        self.asked.say(f"waiting for {_machines(others if rank == 0 else [0])} at {self}{self._own_address()}")
        self._thread.start()
        limit, arrived = self._clock() + self.asked.seconds, rank == 0
        while self._verdict is None and self._broken is None:
            time.sleep(_LOOK_SECONDS)
            if self._arrival and not arrived:
                # Machine 0 has a limit of its own.
                limit, arrived = self._clock() + self.asked.seconds + _LAST_WORDS_SECONDS, True
            if stopping():
                self._refusal = LighthouseError(f"{self.name(rank)} was stopped before the job began")
                return False
            if self._clock() > limit:
                self._refusal = self._missing(others)
                raise self._refusal
        if self._verdict is None:
            raise LighthouseError(f"{self.name(0)} does not answer at {self}: {self._broken}")
        if words := self._verdict.get("error"):
            kind = UserError if self._verdict["code"] == UserError.exit_code else LighthouseError
            raise kind(words, hint=self._verdict["hint"])
        self._hosts = dict(enumerate(self._verdict["hosts"]))
        self.patience = self._verdict["patience"]
        if rank:
            self._check_shared(run_dir, stopping)
        self.asked.say("; ".join(self.name(n) for n in sorted(self._hosts)))
        return True

    def _own_address(self) -> str:
        """On machine 0, in words, the address at which it listens, where the endpoint has a name in its place."""
        address = self.host if self._listening is None else self._listening.getsockname()[0]
        return f" ({address})" * (address != self.host)

    def _missing(self, others: list[int]) -> LighthouseError:
        seconds = f"within {self.asked.seconds} s"
        hint = "--set titan.comm.init_timeout_seconds=N has this machine wait for N seconds"
        if self.plan.node_rank == 0:
            absent = [n for n in others if n not in self._here]
            return LighthouseError(f"{_machines(absent)} did not come to {self} {seconds}", hint=hint)
        return LighthouseError(f"machine 0 did not answer at {self} {seconds}", hint=hint)

    def _mark(self, run_dir: Path) -> None:
        """Leave in the run what the others look for."""
        refuse_links(run_dir, "logs")
        with contextlib.suppress(FileNotFoundError):
            (run_dir / "logs").mkdir(exist_ok=True)
            # Not replaced: what is opened anew has its newest content on a network's file system, too.
            with open_to_append(run_dir / MARK) as file:
                file.truncate(0)
                file.write(json.dumps({"meeting": self._token, "of": _contents(run_dir)}).encode())

    def _check_shared(self, run_dir: Path, stopping: Callable[[], bool]) -> None:
        assert self._verdict is not None
        limit = self._clock() + _SHARED_SECONDS
        while self._clock() < limit and not stopping():
            with contextlib.suppress(OSError):
                mark = read_regular(run_dir / MARK, _MARK_BYTES).decode(errors="replace")
                if self._verdict["mark"] in mark and _contents(run_dir) in mark:
                    return
            time.sleep(_LOOK_SECONDS)
        if not stopping():
            raise UserError(
                f"{self.name(self.plan.node_rank)} does not share the run {run_dir} with {self.name(0)}",
                hint="output.dir must lie on a file system that all machines share",
            )

    # While the processes train. Called several times a second.

    def fault(self) -> Fault | None:
        """What has become of another machine, if that concerns the processes here."""
        now = self._note()
        ends = {rank: end for rank, end in self._ends().items() if end[0]}
        stopped = [rank for rank, (code, _) in ends.items() if killed_by(code) in SIGNALS]
        # One that says why it failed is the cause, rather than one that does not.
        for rank in sorted(ends.keys() - stopped, key=lambda rank: not ends[rank][1]):
            code, words = ends[rank]
            what = words or f"exit code {code}; its own output says why"
            kind = UserError if code == UserError.exit_code else LighthouseError
            return Fault(kind(f"{self.name(rank)} has ended: {what}"), grace=self.patience if words else None)
        if stopped:
            return Fault(LighthouseError(f"{self.name(stopped[0])} was stopped"), saves=True)
        # Machine 0 takes the store with it when it ends.
        if 0 in self._ends():
            return None
        if self._broken is not None:
            return Fault(LighthouseError(f"{self.name(0)} has ended without a word"), saves=True)
        return self._silence(now, self.patience, "parallel.hang_seconds is how long it may take")

    def cause(self) -> Fault | None:
        """What has become of another machine, once a process here has failed, as it may of that: waits a few seconds
        for the word."""
        limit = self._note() + _CAUSE_SECONDS
        before = dict(self._heard)
        while self._clock() < limit:
            if found := self.fault():
                return found
            # Of the first beat machine 0 may have heard before.
            if all(self._heard[rank][0] > before[rank][0] + 1 for rank in before.keys() - self._ends().keys()):
                return None
            time.sleep(_LOOK_SECONDS)
        return self._silence(self._note(), _QUIET_SECONDS)

    def _note(self) -> float:
        now = self._clock()
        for rank, (beats, _) in enumerate(self._states):
            if rank != self.plan.node_rank and self._heard.get(rank, (None,))[0] != beats:
                self._heard[rank] = beats, now
        return now

    def _ends(self) -> dict[int, tuple[int, str]]:
        """Exit code and last words of each other machine that has ended."""
        return {n: end for n, (_, end) in enumerate(self._states) if end is not None and n != self.plan.node_rank}

    def _silence(self, now: float, patience: float, hint: str | None = None) -> Fault | None:
        ends = self._ends()
        silent = [n for n, (_, since) in sorted(self._heard.items()) if n not in ends and now - since > patience]
        if not silent:
            return None
        # What is heard of the others comes from machine 0.
        silent = silent[:1] if silent[0] == 0 else silent
        names = " and ".join(map(self.name, silent))
        text = f"{names} did not answer for {round(patience)} s"
        return Fault(LighthouseError(text, hint=hint), grace=0.0)

    def leave(self, code: int, words: str = "") -> None:
        """Tell the others how this machine ends, and talk no more."""
        self._end = code, words
        self._wake.set()
        if self._thread.is_alive():
            # One that waits for a network that is down is left behind.
            self._thread.join(_QUIET_SECONDS + (0 if self.plan.node_rank else _LAST_WORDS_SECONDS))
        elif self._listening is not None:
            self._listening.close()

    # The thread that talks to the store: a call may wait as long as the network is down.

    def _talk(self) -> None:
        try:
            while (store := self._open()) is not None:
                if self.plan.node_rank == 0:
                    self._receive(store)
                elif not self._arrive(store):
                    continue
                break
            if store is None:
                return
            while self._end is None and self._begun():
                self._exchange(store)
                self._wake.wait(_BEAT_SECONDS)
            self._part(store)
        except Exception as error:
            # The store of a machine 0 that has gone, or what is no store at all.
            self._broken = str(error).partition("\n")[0]

    def _begun(self) -> bool:
        return self._verdict is not None and "error" not in self._verdict

    def _open(self) -> dist.Store | None:
        """The store; None once there is nothing to wait for."""
        if self._listening is not None:
            address = self._listening.getsockname()[0]
            return dist.PrefixStore(
                "machines",
                dist.TCPStore(
                    address,
                    self.port,
                    is_master=True,
                    wait_for_workers=False,
                    # torch closes it.
                    master_listen_fd=self._listening.detach(),
                ),
            )
        while self._end is None:
            # torch would tell stderr of every attempt.
            with contextlib.suppress(OSError, UnicodeError):
                socket.create_connection((self.host, self.port), _CONNECT_SECONDS).close()
                wait = timedelta(seconds=self.asked.seconds)
                return dist.PrefixStore("machines", connect(self.host, self.port, wait))
            self._wake.wait(_CONNECT_SECONDS / 4)
        return None

    def _state(self) -> str:
        self._beats += 1
        return json.dumps([self._beats, self._end])

    def _arrive(self, store: dist.Store) -> bool:
        """Say what this machine was asked for, and wait for the word of machine 0.

        Returns:
            False where machine 0 has gone before it gave its word. It may come again.
        """
        rank, number = self.plan.node_rank, 0
        try:
            number = store.add("arrivals", 1)
            arrival = {"rank": rank, "host": self._hosts[rank], "token": self._token, "facts": self._facts}
            beats = 0
            store.set(f"waiting/{number}", str(beats))
            store.set(f"arrival/{number}", json.dumps(arrival))
            self._arrival = number
            while not store.check(["verdict"]):
                if self._wake.wait(_LOOK_SECONDS):
                    return True
                beats += 1
                store.set(f"waiting/{number}", str(beats))
            verdict = json.loads(store.get("verdict"))
            if "tokens" in verdict and self._token not in verdict["tokens"]:
                verdict = self._too_late(store, verdict["hosts"])
        except RuntimeError:
            # What never counted arrivals is no store of ours.
            if not number or self._wake.wait(_CONNECT_SECONDS / 4):
                raise
            return False
        self._verdict = verdict
        return True

    def _too_late(self, store: dist.Store, hosts: list[str]) -> dict[str, Any]:
        """The refusal of this machine by a job that has begun without it."""
        rank = self.plan.node_rank
        text = f"the job at {self} has begun"
        if rank >= len(hosts):
            return _refusal(UserError(f"{text}: it has {len(hosts)} machines", hint="give each machine its own number"))
        clock, beats = RunningClock(), self._beats_of(store, rank)
        while clock() < _QUIET_SECONDS and not self._wake.wait(_LOOK_SECONDS):
            if self._beats_of(store, rank) != beats:
                taken = f"{text}: --node-rank {rank} is {hosts[rank]}"
                return _refusal(UserError(taken, hint="give each machine its own number"))
        hint = "start this machine again when that job has ended, which it does after parallel.hang_seconds"
        return _refusal(LighthouseError(f"{text}, and its machine {rank} ({hosts[rank]}) has gone", hint=hint))

    @staticmethod
    def _beats_of(store: dist.Store, rank: int) -> Any:
        """The beats of a machine of a job that has begun, as machine 0 has heard them."""
        return json.loads(store.get("news"))[rank][0]

    def _receive(self, store: dist.Store) -> None:
        """Wait for the others, and give all of them the word."""
        store.set("state/0", self._state())
        clock = RunningClock()
        arrivals: dict[int, _Arrival] = {}
        # Announced, and not yet read. A machine that dies between the two leaves its number here for good.
        announced: set[int] = set()
        last = 0
        verdict: dict[str, Any] | None = None
        while verdict is None:
            now, number = clock(), store.add("arrivals", 0)
            announced |= set(range(last + 1, number + 1))
            last = number
            for number in sorted(announced):
                if verdict is None and store.check([f"arrival/{number}"]):
                    announced.remove(number)
                    arrival = json.loads(store.get(f"arrival/{number}"))
                    arrivals[number] = _Arrival(arrival, now, "", now)
                    verdict = self._compare(arrival)
            here = self._alive(store, arrivals, now)
            self._here = sorted({one.said["rank"] for one in here})
            verdict = verdict or self._twice(here)
            if verdict is None and self._complete(here):
                said = {one.said["rank"]: one.said for one in here}
                others = [said[rank] for rank in self._here]
                verdict = {
                    "hosts": [self._hosts[0], *(one["host"] for one in others)],
                    "tokens": [self._token, *(one["token"] for one in others)],
                    "patience": self.asked.patience,
                    "mark": self._token,
                }
                # The others say how they are once they have the word: one that comes too late is none of them.
                for rank in self._here:
                    store.set(f"state/{rank}", json.dumps([0, None]))
                self._exchange(store)
            elif verdict is None:
                self._wake.wait(_LOOK_SECONDS)
                if self._end is not None:
                    error = self._refusal or LighthouseError(f"{self.name(0)} has ended before the job began")
                    verdict = _refusal(error)
        store.set("verdict", json.dumps(verdict))
        self._verdict = verdict

    @staticmethod
    def _alive(store: dist.Store, arrivals: dict[int, _Arrival], now: float) -> list[_Arrival]:
        """Those that have not left and are not silent. A network that comes back brings its machines back."""
        for number in list(arrivals):
            if store.check([f"left/{number}"]):
                del arrivals[number]
        beats = store.multi_get([f"waiting/{number}" for number in arrivals]) if arrivals else []
        for arrival, count in zip(arrivals.values(), beats, strict=True):
            if (text := count.decode()) != arrival.beats:
                arrival.beats, arrival.since = text, now
        return [one for one in arrivals.values() if now - one.since <= _QUIET_SECONDS]

    @staticmethod
    def _twice(here: list[_Arrival]) -> dict[str, Any] | None:
        """The refusal of two machines of one number that are both alive; None where no number is taken twice.

        A machine that died while it waited may come again: only one that beats after the other came is there.
        """
        for n, later in enumerate(here):
            for earlier in here[:n]:
                came = max(earlier.came, later.came)
                if earlier.said["rank"] == later.said["rank"] and min(earlier.since, later.since) > came:
                    both = f"{earlier.said['host']} and {later.said['host']}"
                    text = f"two machines have --node-rank {later.said['rank']}: {both}"
                    return _refusal(UserError(text, hint="number the machines from 0"))
        return None

    def _complete(self, here: list[_Arrival]) -> bool:
        """Whether each of the other machines is here once, and has beaten since the last one of them came."""
        came = max((one.came for one in here), default=0.0)
        ranks = {one.said["rank"] for one in here}
        return len(ranks) == len(here) == self.plan.nnodes - 1 and all(one.since > came for one in here)

    def _compare(self, arrival: dict[str, Any]) -> dict[str, Any] | None:
        """The refusal of a machine that was asked for something else; None where there is nothing to refuse."""
        rank, host = arrival["rank"], arrival["host"]
        other = f"machine {rank} ({host})"
        facts = arrival["facts"]
        differing = [n for n in {**self._facts, **facts} if facts.get(n) != self._facts.get(n)]
        if differing:
            there, here = (table.get(differing[0], "not given") for table in (facts, self._facts))
            more = f" (and {len(differing) - 1} more)" * (len(differing) > 1)
            text = f"{differing[0]} is {there} on {other} and {here} on {self.name(0)}{more}"
            return _refusal(UserError(text, hint=_SAME))
        return None

    def _exchange(self, store: dist.Store) -> None:
        """Say that this machine is there, and hear of the others. Machine 0 passes on what each one says."""
        rank = self.plan.node_rank
        store.set(f"state/{rank}", self._state())
        if rank == 0:
            states = [json.loads(text) for text in store.multi_get([f"state/{n}" for n in range(self.plan.nnodes)])]
            store.set("news", json.dumps(states))
        else:
            states = json.loads(store.get("news"))
        self._states = [(beats, end and tuple(end)) for beats, end in states]

    def _part(self, store: dist.Store) -> None:
        """The last word of this machine. Machine 0 stays until the others have read it."""
        if self.plan.node_rank:
            if self._begun():
                self._exchange(store)
            else:
                store.set(f"left/{self._arrival}", "")
            return
        limit = self._clock() + _LAST_WORDS_SECONDS
        while self._clock() < limit:
            if not self._begun():
                left = [f"left/{n + 1}" for n in range(store.add("arrivals", 0))]
                if all(store.check([one]) for one in left):
                    return
            else:
                self._exchange(store)
                now = self._note()
                lively = [n for n, (_, since) in self._heard.items() if now - since < _QUIET_SECONDS]
                if not set(lively) - self._ends().keys():
                    return
            time.sleep(_LOOK_SECONDS)


def connect(host: str, port: int, timeout: timedelta) -> dist.Store:
    """The store of machine 0.

    Raises:
        torch.distributed.DistError: it does not answer.
    """
    return dist.TCPStore(host, port, wait_for_workers=False, timeout=timeout)


def _versions() -> dict[str, Any]:
    return {
        "the version of lighthouse": git_commit() or metadata.version("lighthouse-pretrain"),
        "the version of torch": torch.__version__,
    }


def _contents(run_dir: Path) -> str:
    """Checksum of what the processes read of a run, besides its checkpoints."""
    digest = hashlib.sha256()
    for name in ("recipe.toml", "recover.toml", "ledger.json"):
        with contextlib.suppress(FileNotFoundError):
            digest.update(read_regular(run_dir / name))
    return digest.hexdigest()


def _refusal(error: LighthouseError) -> dict[str, Any]:
    return {"error": str(error), "hint": error.hint, "code": error.exit_code}


def _machines(numbers: list[int]) -> str:
    """Machines by their numbers, in words."""
    if len(numbers) == 1:
        return f"machine {numbers[0]}"
    return f"machines {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
