"""Several machines, as network namespaces of this one that a bridge joins: starts, ends, faults and mistakes.

    python tests/reliability/machines.py [--only WORD] [--json FILE]

Each machine has its own network namespace, host name and launcher, and one training process (gloo). They share the
folder of the run, as on a cluster's file system. Prints a row for each situation: what was wanted, what was seen, and
seconds. Ends with 1 if one of them is wrong, and with 2 where network namespaces cannot be made, which takes root. The
namespaces are removed at the end, also after Ctrl-C or SIGTERM. `--only` leaves out the situations whose names lack the
word, of which a file that is there keeps the rows; `--words` prints what the commands of a wrong one printed.
"""

import argparse
import atexit
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import children
import torch
from jobs import Job, newest, options, rows

from lighthouse_core.runs.listing import checkpoint_steps
from lighthouse_core.seal import damage

MACHINES = 3
HANG = 8  # parallel.hang_seconds
MEET = 15  # seconds within which the machines must meet
GRACE = 12  # for ending what runs, on busy cores
START = 30  # for a command to start there
# No situation waits longer for a job to end.
LIMIT = 75
PORT = 29500
ADDRESSES = [f"10.213.7.{number + 1}" for number in range(MACHINES)]
RECIPE = """\
[model]
dim = 64
layers = 2
heads = 2
ffn_dim = 96
vocab_size = 320

[lighthouse]
topk = 16
tile_parents = 8
scorer = "random"  # by scores that differ in the last bit another window may be selected

[training]
seq_len = 512
global_batch_size = 6
steps = 12
dtype = "float32"
deterministic = true

[optimizer]
lr = 1e-3

[recover]
steps = 4

[data]
source = "files"
paths = ["text.txt"]
validation = 0.0
packing = "concat"

[metrics]
every = 1

[checkpoint]
interval = 5

[parallel]
hang_seconds = {hang}

[titan.comm]
init_timeout_seconds = {meet}
"""


class Network:
    """Namespaces that a bridge joins, in one more namespace: the network of this machine stays as it is."""

    def __init__(self) -> None:
        self.names = [f"lighthouse-{os.getpid()}-{number}" for number in range(MACHINES)]
        self.hub = f"lighthouse-{os.getpid()}-hub"
        atexit.register(self.remove)
        for name in (self.hub, *self.names):
            self._ip("netns", "add", name)
            self._ip("-n", name, "link", "set", "lo", "up")
        self._ip("-n", self.hub, "link", "add", "bridge", "type", "bridge")
        self._ip("-n", self.hub, "link", "set", "bridge", "up")
        for number, name in enumerate(self.names):
            port = f"port{number}"
            self._ip("-n", self.hub, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
            self._ip("-n", self.hub, "link", "set", port, "master", "bridge", "up")
            self._ip("-n", name, "address", "add", f"{ADDRESSES[number]}/24", "dev", "eth0")
            self._ip("-n", name, "link", "set", "eth0", "up")

    @staticmethod
    def _ip(*arguments: str) -> None:
        subprocess.run(("ip", *arguments), check=True, capture_output=True, text=True)

    def remove(self) -> None:
        for name in (*self.names, self.hub):
            subprocess.run(("ip", "netns", "delete", name), capture_output=True)

    def within(self, number: int) -> list[str]:
        """What starts a command on a machine, under the host name machine-N."""
        rename = f'echo machine-{number} >/proc/sys/kernel/hostname && exec "$@"'
        return ["ip", "netns", "exec", self.names[number], "unshare", "--uts", "sh", "-c", rename, "sh"]

    def link(self, number: int, state: str) -> None:
        """Have the cable of a machine "up" or "down", at the switch: the machine's own interface stays."""
        self._ip("-n", self.hub, "link", "set", f"port{number}", state)

    def listening(self, number: int) -> list[tuple[str, int]]:
        """The addresses and ports on a machine that others may connect to, of TCP and UDP."""
        command = ("ip", "netns", "exec", self.names[number], "ss", "-lntuH")
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        return sorted(
            (place.rpartition(":")[0], int(place.rpartition(":")[2])) for place in (x.split()[4] for x in lines)
        )


@dataclass
class Row:
    """What one situation showed.

    Attributes:
        situation: what was done.
        wanted: what should follow.
        seen: what followed.
        wrong: the checks that failed.
    """

    situation: str
    wanted: str
    seen: str
    seconds: float
    wrong: list[str]


class Drill:
    """The situations, which share the network and a folder."""

    def __init__(self, network: Network, folder: Path):
        self.network, self.folder = network, folder
        self.jobs: list[Job] = []
        self.made = 0
        (folder / "recipe.toml").write_text(RECIPE.format(hang=HANG, meet=MEET))
        lines = (f"line {n} of a text to be learned: {n * 7919 % 1000} and {n * 31 % 97}\n" for n in range(4000))
        (folder / "text.txt").write_text("".join(lines))

    # What the situations are made of.

    def start(
        self,
        machine: int,
        count: int,
        *arguments: str,
        rank: int | None = None,
        port: int = PORT,
        host: str = "",
        **more,
    ) -> Job:
        """One launcher of `count` machines, with one process, or of one machine with --nproc in `arguments`."""
        where = f"{host or ADDRESSES[0]}:{port}"
        several = (
            "--nnodes",
            str(count),
            "--node-rank",
            str(machine if rank is None else rank),
            "--rdzv-endpoint",
            where,
        )
        if "--nproc" not in arguments:
            arguments = (*arguments, "--nproc", "1")
        job = Job(
            *arguments,
            *(several if count > 1 else ()),
            within=self.network.within(machine),
            environment={"OMP_NUM_THREADS": "1"},
            **{"cwd": self.folder} | more,
        )
        self.jobs.append(job)
        return job

    def start_all(self, count: int, *arguments: str) -> list[Job]:
        return [self.start(machine, count, *arguments) for machine in range(count)]

    def new(self, *settings: str) -> list[str]:
        """Arguments that begin a new run; it is `self.run`."""
        self.made += 1
        self.run = self.folder / f"runs/run{self.made}"
        return ["pretrain", "recipe.toml", "--name", self.run.name, *options(*settings)]

    def trains(self, jobs: list[Job], step: int) -> bool:
        """Wait for a step."""
        with contextlib.suppress(TimeoutError):
            return jobs[0].wait_until(lambda: newest(self.run) >= step, LIMIT)
        return False

    def end(self, jobs: list[Job], limit: float = LIMIT) -> list[int | None]:
        """Exit codes; None for a job that had not ended in that time and was killed."""
        until, codes = time.monotonic() + limit, []
        for job in jobs:
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.process.wait(max(0.1, until - time.monotonic()))
            codes.append(job.process.poll())
        for job in jobs:
            if job.process.poll() is None:
                job.kill()
        return codes

    def error(self, job: Job) -> str:
        """The line of error that a job printed last."""
        found = re.findall(r"^error: (.*)$", job.words, re.M)
        return found[-1] if found else "no line of error"

    def losses(self, run: Path | None = None) -> dict[int, float]:
        return {step: row["loss"] for step, row in rows(run or self.run).items()}

    def alone(self, processes: int, *settings: str) -> dict[int, float]:
        """The losses of a new run of one machine."""
        job = self.start(0, 1, *self.new(*settings), "--nproc", str(processes))
        self.end([job])
        return self.losses()

    def goes_on(self, count: int, *settings: str) -> tuple[bool, str]:
        """Whether the run goes on, from its newest checkpoint, on so many machines, and is then stopped in order."""
        saved = checkpoint_steps(self.run)[-1:]
        at = newest(self.run)
        jobs = self.start_all(count, "pretrain", "--resume", self.run.name, *options(*settings))
        went = jobs[0].wait_until(lambda: f"steps {saved[0] + 1} to" in jobs[0].words, LIMIT) if saved else False
        went = went and self.trains(jobs, max(at, saved[0]) + 3)
        for job in jobs:
            job.process.terminate()
        codes = self.end(jobs)
        sound = all(damage(self.run / f"checkpoints/step-{step}") is None for step in checkpoint_steps(self.run))
        return went and codes == [143] * count and sound, f"a restart went on from step {saved[0] if saved else None}"

    def refused(self, jobs: list[Job], words: str, *, within: float, code: int = 2) -> tuple[str, dict[str, bool]]:
        begun = time.monotonic()
        codes = self.end(jobs)
        lines = [self.error(job) for job in jobs]
        return f"exit codes {codes}; {lines[-1]}", {
            f"exit codes {codes}": codes == [code] * len(jobs),
            f"the lines {lines}": all(re.search(words, line) for line in lines),
            "more than one line of error": all(job.words.count("error: ") == 1 for job in jobs),
            "a traceback": not any("Traceback" in job.words for job in jobs),
            f"more than {within:.0f} seconds": time.monotonic() - begun < within,
        }

    # The situations: the name, what is wanted, and what makes it.

    def situations(self) -> Iterator[tuple[str, str, Callable[[], tuple[str, dict[str, bool]]]]]:
        for count in (2, 3):
            yield (
                f"start on {count} machines",
                f"the losses of one machine with {count} processes",
                lambda count=count: self._starts(count),
            )
        yield "who listens", "each machine on its own address alone", self._listens
        yield (
            "SIGTERM to machine 1, then to all at once; resumed on 3 machines, on 1; recover, strip",
            "every machine saves and ends with 143; the losses of an uninterrupted run within 1e-5",
            self._signals,
        )
        yield "kill -9 of machine 1", "machine 0 ends and names it; a restart goes on", lambda: self._kill(1, "all")
        yield "kill -9 of machine 0", "machine 1 ends and names it; a restart goes on", lambda: self._kill(0, "all")
        yield (
            "kill -9 of the training process of machine 1",
            "both end and name it; a restart goes on",
            lambda: self._kill(1, "worker"),
        )
        yield (
            "kill -9 of the launcher of machine 1",
            "all save and end; a restart goes on",
            lambda: self._kill(1, "launcher"),
        )
        yield (
            "kill -9 of the launcher of machine 0",
            "all save and end; a restart goes on",
            lambda: self._kill(0, "launcher"),
        )
        yield "machine 1 starts 20 s late", "the run begins when it is there", lambda: self._late(1)
        yield "machine 0 starts 20 s late", "the run begins when it is there", lambda: self._late(0)
        yield (
            "kill -9 of machine 1 while it waits, and it comes again",
            "the run begins when machine 2 is there too",
            lambda: self._again(1),
        )
        yield (
            "kill -9 of machine 0 while the others wait, and it comes again",
            "the run begins when machine 2 is there too",
            lambda: self._again(0),
        )
        yield (
            "kill -9 of machine 1 while it waits, and it does not come again",
            "no run without it: an end that names it",
            self._gone,
        )
        yield (
            "kill -9 of machine 1 before the first checkpoint; all start again with --or-resume",
            "the run begins at step 0, with the losses of an uninterrupted run",
            self._before_a_checkpoint,
        )
        yield "machine 1 never comes", "an end after 15 s that names it", self._never
        yield "another value of the recipe on machine 1", "both refuse and name the key", self._recipe
        yield "another name on machine 1", "both refuse and name both", self._name
        yield "another --set on machine 1, resuming", "both refuse and name it", self._set
        yield "another --nproc on machine 1", "both refuse and name it", self._nproc
        yield "another --nnodes on machine 1", "both refuse and name it", self._nnodes
        yield "two machines with --node-rank 1", "all refuse and name both", self._ranks
        yield "a run directory that is not shared", "both refuse", self._unshared
        yield (
            "another host as endpoint on machine 1",
            "both end after 15 s, and say where they waited",
            self._host,
        )
        yield (
            "another port as endpoint on machine 1",
            "both end after 15 s, and say where they waited",
            self._port,
        )
        yield "an endpoint that is not machine 0's", "machine 0 refuses at once", self._foreign
        yield "a port in use", "machine 0 refuses at once, and leaves no run", self._busy
        yield "link down for 10 s, hang_seconds = 40", "the run goes on with the same losses", self._blink
        yield "link down for good", f"both end within {HANG + GRACE} s and name the other; a restart goes on", self._cut

    def _starts(self, count: int):
        jobs = self.start_all(count, *self.new())
        codes = self.end(jobs)
        losses = self.losses()
        wanted = self.alone(count)
        most = max((abs(losses[step] - wanted[step]) for step in losses.keys() & wanted.keys()), default=float("nan"))
        return f"exit codes {codes}, {len(losses)} losses, largest difference {most}", {
            f"exit codes {codes}": codes == [0] * count,
            f"{len(losses)} losses": len(losses) == len(wanted) == 12,
            f"losses differ by {most}": losses == wanted,
        }

    def _listens(self):
        jobs = self.start_all(2, *self.new("training.steps=100000"))
        began = self.trains(jobs, 3)
        found = [self.network.listening(number) for number in (0, 1)]
        for job in jobs:
            job.process.terminate()
        self.end(jobs)
        named = [sum(port == PORT for _, port in places) for places in found]
        hosts = [sorted({host for host, _ in places}) for places in found]
        return (
            f"machine 0: {hosts[0]}, port {PORT} and {len(found[0]) - named[0]} others; machine 1: {hosts[1]}, "
            f"{len(found[1])} ports",
            {
                "it did not train": began,
                f"{hosts}": hosts == [[ADDRESSES[0]], [ADDRESSES[1]]],
                f"{named} times the port": named == [1, 0],
            },
        )

    def _signals(self):
        settings = "training.steps=30", "checkpoint.keep=0"
        jobs = self.start_all(2, *self.new(*settings))
        run = self.run
        first = self.trains(jobs, 5)
        jobs[1].process.terminate()
        one = self.end(jobs)
        saved = [checkpoint_steps(run)[-1:] == [newest(run)]]
        jobs = self.start_all(3, "pretrain", "--resume", run.name)
        second = self.trains(jobs, newest(run) + 5)
        for pid in [pid for job in jobs for pid in job.pids()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        all_ = self.end(jobs)
        saved.append(checkpoint_steps(run)[-1:] == [newest(run)])
        stopped = newest(run)
        last = self.end([self.start(0, 1, "pretrain", "--resume", run.name)])
        losses, wanted = self.losses(), self.alone(1, *settings)
        most = max((abs(losses[n] - wanted[n]) for n in losses.keys() & wanted.keys()), default=float("nan"))
        recovered = self.end(self.start_all(2, "recover", run.name))
        strip = Job("strip", f"runs/{run.name}", f"out-{run.name}", cwd=self.folder)
        self.jobs.append(strip)
        exported = self.end([strip])
        return (
            f"exit codes {one}, {all_}; stopped at step {stopped} of 30; losses differ by {most:.1e}; recover "
            f"{recovered}, strip {exported}",
            {
                "it did not train": first and second,
                f"exit codes {one} and {all_}": one == [143] * 2 and all_ == [143] * 3,
                "the last step is not saved": all(saved),
                f"exit code {last} of the end": last == [0],
                f"{len(losses)} losses that differ by {most}": len(losses) == len(wanted) == 30 and most < 1e-5,
                f"recover {recovered}, strip {exported}": recovered == [0, 0] and exported == [0],
            },
        )

    def _kill(self, machine: int, what: str):
        jobs = self.start_all(2, *self.new("training.steps=100000"))
        began = self.trains(jobs, 12)
        hit, other = jobs[machine], jobs[1 - machine]
        orphans = hit.workers()
        if what == "all":
            hit.kill()
        else:
            os.kill(hit.process.pid if what == "launcher" else orphans[0], signal.SIGKILL)
        begun = time.monotonic()
        codes = self.end(jobs)
        gone = all(children.ends(pid, 20) for pid in orphans)
        seconds = time.monotonic() - begun
        steps, last = checkpoint_steps(self.run), newest(self.run)
        line = self.error(other)
        went, words = self.goes_on(2) if began else (False, "nothing to go on from")
        checks = {"it did not train": began, f"{seconds:.0f} seconds": seconds < HANG + GRACE, words: went}
        checks["a training process lives on"] = gone
        if what == "launcher":
            checks[f"exit code {codes[1 - machine]}"] = codes[1 - machine] == 143
            checks[f"step {steps[-1:]} is saved, of {last}"] = steps[-1:] == [last]
        else:
            checks[f"exit code {codes[1 - machine]}"] = codes[1 - machine] == 1
            checks[f"the line: {line}"] = bool(re.search(rf"machine {machine} \(machine-{machine}\)", line))
        return f"exit code {codes[1 - machine]} after {seconds:.1f} s; {line}; {words}", checks

    def _late(self, machine: int):
        arguments = self.new(f"titan.comm.init_timeout_seconds={LIMIT}")
        jobs = [self.start(1 - machine, 2, *arguments)]
        time.sleep(20)
        early = jobs[0].process.poll()
        jobs.append(self.start(machine, 2, *arguments))
        codes = self.end(jobs)
        return f"exit codes {codes}, {len(self.losses())} losses", {
            f"the first ended with {early}": early is None,
            f"exit codes {codes}": codes == [0, 0],
            "not every step": len(self.losses()) == 12,
        }

    def _waits(self, jobs: list[Job]) -> bool:
        """Wait until machines have said that they wait, and machine 0 has had time to hear of them."""
        for one in jobs:
            with contextlib.suppress(TimeoutError):
                one.wait_until(lambda one=one: "waiting for" in one.words, 2 * LIMIT)
        time.sleep(2)
        return all("waiting for" in one.words and one.process.poll() is None for one in jobs)

    def _again(self, machine: int):
        arguments = [*self.new(f"titan.comm.init_timeout_seconds={LIMIT}"), "--or-resume"]
        jobs = [self.start(number, 3, *arguments) for number in (0, 1)]
        waited = self._waits(jobs)
        jobs[machine].kill()
        jobs[machine] = self.start(machine, 3, *arguments)
        jobs.append(self.start(2, 3, *arguments))
        codes = self.end(jobs, 2 * LIMIT)
        return f"exit codes {codes}, {len(self.losses())} losses", {
            "they did not wait": waited,
            f"exit codes {codes}": codes == [0, 0, 0],
            "not every step": len(self.losses()) == 12,
        }

    def _gone(self):
        arguments = self.new(f"titan.comm.init_timeout_seconds={LIMIT}")
        jobs = [self.start(number, 3, *arguments) for number in (0, 1)]
        waited = self._waits(jobs)
        jobs[1].kill()
        jobs[1] = self.start(2, 3, *arguments)
        begun = time.monotonic()
        codes, line = self.end(jobs, 2 * LIMIT), self.error(jobs[0])
        seconds = time.monotonic() - begun
        return f"exit codes {codes} after {seconds:.0f} s; {line}", {
            "they did not wait": waited,
            f"exit codes {codes}": codes == [1, 1],
            f"the line: {line}": "machine 1 did not come" in line,
            "a run is left": not self.run.exists(),
        }

    def _before_a_checkpoint(self):
        settings = "checkpoint.interval=1000", "training.steps=60"
        arguments = [*self.new(*settings), "--or-resume"]
        jobs = self.start_all(2, *arguments)
        began = self.trains(jobs, 5)
        jobs[1].kill()
        codes = self.end(jobs)
        saved = checkpoint_steps(self.run)
        jobs = self.start_all(2, *arguments)
        again = self.end(jobs, 2 * LIMIT)
        said = "no checkpoint yet: it begins at step 0" in jobs[0].words
        losses, wanted = self.losses(), self.alone(2, *settings)
        most = max((abs(losses[n] - wanted[n]) for n in losses.keys() & wanted.keys()), default=float("nan"))
        return f"exit codes {codes[:1]}, then {again}, {len(losses)} losses, largest difference {most}", {
            "it did not train": began,
            f"steps {saved} were saved": not saved,
            "nothing is said of step 0": said,
            f"exit codes {codes[:1]}, {again}": codes[0] == 1 and again == [0, 0],
            f"losses differ by {most}": losses == wanted and len(losses) == 60,
        }

    def _never(self):
        begun = time.monotonic()
        job = self.start(0, 2, *self.new())
        codes, line = self.end([job]), self.error(job)
        seconds = time.monotonic() - begun
        return f"exit code {codes[0]} after {seconds:.0f} s; {line}", {
            f"exit code {codes[0]}": codes == [1],
            f"the line: {line}": "machine 1 " in line and f"within {MEET} s" in line,
            f"{seconds:.0f} seconds": seconds < MEET + START,
            "a run is left": not self.run.exists(),
        }

    def _pair(self, words: str, first: list[str], second: list[str]):
        seen, checks = self.refused([self.start(0, 2, *first), self.start(1, 2, *second)], words, within=MEET + START)
        return seen, checks | {"a run is left": not self.run.exists()}

    def _recipe(self):
        first = self.new()
        return self._pair(r"optimizer\.lr .*0\.002.*0\.001|optimizer\.lr .*0\.001.*0\.002", first, [
            *first, *options("optimizer.lr=0.002")
        ])  # fmt: skip

    def _name(self):
        first = self.new()
        return self._pair(rf"{self.run.name}.*other|other.*{self.run.name}", first, [*first[:3], "other"])

    def _nproc(self):
        first = self.new()
        return self._pair("--nproc", [*first, "--nproc", "1"], [*first, "--nproc", "3"])

    def _set(self):
        self.alone(1, "checkpoint.interval=4")
        for name in ("checkpoints/step-12", "recover.toml"):
            with contextlib.suppress(OSError):
                shutil.rmtree(self.run / name)
        resume = ["pretrain", "--resume", self.run.name]
        jobs = [self.start(0, 2, *resume), self.start(1, 2, *resume, *options("checkpoint.keep=7"))]
        return self.refused(jobs, "--set", within=MEET + START)

    def _nnodes(self):
        first = self.new()
        return self.refused([self.start(0, 2, *first), self.start(1, 3, *first)], "--nnodes", within=MEET + START)

    def _ranks(self):
        first = self.new()
        jobs = [self.start(0, 3, *first), self.start(1, 3, *first, rank=1), self.start(2, 3, *first, rank=1)]
        return self.refused(jobs, r"machine-1.*machine-2|machine-2.*machine-1", within=MEET + START)

    def _unshared(self):
        first = self.new()
        other = self.folder / "elsewhere"
        other.mkdir(exist_ok=True)
        for name in ("recipe.toml", "text.txt"):
            shutil.copy(self.folder / name, other / name)
        jobs = [self.start(0, 2, *first), self.start(1, 2, *first, cwd=other)]
        return self.refused(jobs, "not shared|share", within=MEET + START)

    def _host(self):
        first = self.new()
        jobs = [self.start(0, 2, *first), self.start(1, 2, *first, host="10.213.7.99")]
        return self.refused(jobs, r"machine [01] .*(10\.213\.7\.1|10\.213\.7\.99)", within=MEET + START, code=1)

    def _port(self):
        first = self.new()
        jobs = [self.start(0, 2, *first), self.start(1, 2, *first, port=PORT + 1)]
        return self.refused(jobs, rf"machine [01] .*({PORT}|{PORT + 1})", within=MEET + START, code=1)

    def _foreign(self):
        job = self.start(0, 2, *self.new(), host="10.213.7.2")
        seen, checks = self.refused([job], "no address of this machine", within=START)
        return seen, checks | {"a run is left": not self.run.exists()}

    def _busy(self):
        place = ADDRESSES[0], PORT
        code = f"import socket, time; s = socket.create_server({place}); print(1, flush=True); time.sleep(99)"
        with subprocess.Popen([*self.network.within(0), sys.executable, "-c", code], stdout=subprocess.PIPE) as taker:
            assert taker.stdout is not None and taker.stdout.readline()
            try:
                job = self.start(0, 2, *self.new())
                seen, checks = self.refused([job], f"port {PORT}: Address already in use", within=START)
            finally:
                taker.kill()
        return seen, checks | {"a run is left": not self.run.exists()}

    def _blink(self):
        settings = "parallel.hang_seconds=40", "training.steps=60"
        jobs = self.start_all(2, *self.new(*settings))
        began = self.trains(jobs, 5)
        self.network.link(1, "down")
        at = newest(self.run)
        time.sleep(10)
        still = newest(self.run) - at
        self.network.link(1, "up")
        codes = self.end(jobs)
        losses, wanted = self.losses(), self.alone(2, *settings)
        most = max((abs(losses[n] - wanted[n]) for n in losses.keys() & wanted.keys()), default=float("nan"))
        return f"{still} steps meanwhile; exit codes {codes}, {len(losses)} losses, largest difference {most}", {
            "it did not train": began,
            f"{still} steps without a link": still <= 1,
            f"exit codes {codes}": codes == [0, 0],
            f"losses differ by {most}": losses == wanted and len(losses) == 60,
        }

    def _cut(self):
        jobs = self.start_all(2, *self.new("training.steps=100000"))
        began = self.trains(jobs, 12)
        self.network.link(1, "down")
        begun = time.monotonic()
        codes = self.end(jobs)
        seconds = time.monotonic() - begun
        self.network.link(1, "up")
        lines = [self.error(job) for job in jobs]
        went, words = self.goes_on(2) if began else (False, "nothing to go on from")
        return f"exit codes {codes} after {seconds:.1f} s; {lines[0]}; {words}", {
            "it did not train": began,
            f"exit codes {codes}": codes == [1, 1],
            f"{seconds:.0f} seconds": seconds < HANG + GRACE,
            f"the lines {lines}": all(f"machine {1 - n} (machine-{1 - n})" in line for n, line in enumerate(lines)),
            words: went,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="leave out the situations whose names lack this")
    parser.add_argument("--words", action="store_true", help="print what the commands of wrong ones printed")
    parser.add_argument("--json", help="file to write")
    arguments = parser.parse_args()
    # What is left of jobs and namespaces is cleared away then, too.
    signal.signal(signal.SIGTERM, lambda *given: sys.exit(143))
    try:
        network = Network()
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or error
        print(f"error: cannot make network namespaces: {str(reason).strip()}\nhint: run this as root", file=sys.stderr)
        return 2
    found: list[Row] = []
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        drill = Drill(network, Path(name))
        for situation, wanted, make in drill.situations():
            if arguments.only not in situation:
                continue
            since = time.monotonic()
            drill.jobs.clear()
            try:
                seen, checks = make()
                wrong = [what for what, well in checks.items() if not well]
            except Exception as error:
                seen = f"{type(error).__name__}: {error}".partition("\n")[0]
                wrong = [seen]
            finally:
                for job in drill.jobs:
                    if job.process.poll() is None:
                        job.kill()
            row = Row(situation, wanted, seen.replace(name, ""), round(time.monotonic() - since, 1), wrong)
            found.append(row)
            print(
                f"{'wrong' if wrong else 'well':<6} {row.seconds:5.1f} s  {situation}\n    wanted: {wanted}",
                flush=True,
            )
            print(f"    seen: {row.seen}", flush=True)
            if wrong:
                print(f"    WRONG: {'; '.join(wrong)}", flush=True)
                for job in drill.jobs if arguments.words else ():
                    print("      | " + job.words[-1500:].replace("\n", "\n      | "), flush=True)
    network.remove()
    failed = sum(bool(row.wrong) for row in found)
    seconds = time.monotonic() - begun
    print(f"{len(found) - failed} of {len(found)} situations are as wanted; {seconds:.0f} s")
    if arguments.json:
        figures = {
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "hang_seconds": HANG,
            "seconds": round(seconds),
            "situations": [asdict(row) for row in found],
        }
        if arguments.only and Path(arguments.json).exists():
            again = {row.situation for row in found}
            earlier = json.loads(Path(arguments.json).read_text())
            kept = [row for row in earlier["situations"] if row["situation"] not in again]
            order = [situation for situation, *_ in drill.situations()]
            together = sorted([*kept, *figures["situations"]], key=lambda row: order.index(row["situation"]))
            figures = earlier | {"situations": together}
        Path(arguments.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return int(failed > 0 or not found)


if __name__ == "__main__":
    sys.exit(main())
