"""What the processes of a job let their launcher know while they live: their id, their step, and that they answer.

Each one counts up once a second in a file that it shares with the launcher. One that is stopped, or never gives back
the interpreter's lock, misses its beats, while the others wait for it in a collective and go on beating.
"""

import mmap
import os
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from lighthouse_core.job.clock import RunningClock

BEAT_SECONDS = 1.0
# Process id, beats, step in progress, seconds without a beat after which the process is given up.
_RECORD = struct.Struct("<qqqq")
_beating: "Heartbeat | None" = None


class Heartbeat:
    """Of this process.

    Args:
        folder: of the job, the launcher's.
        rank: of this process, in the whole job.
        patience: seconds without a beat after which the launcher is to give this process up.
    """

    def __init__(self, folder: Path, rank: int, patience: int):
        self.path = folder / f"rank{rank}"
        self.patience = patience
        self.step = self.beats = 0
        self.ended = False
        with self.path.open("wb+") as file:
            file.truncate(_RECORD.size)
            self._shared = mmap.mmap(file.fileno(), _RECORD.size)
        self._lock = threading.Lock()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def _beat(self) -> None:
        while not self.ended:
            self.write()
            time.sleep(BEAT_SECONDS)

    def write(self) -> None:
        with self._lock:
            self.beats += 1
            pid = 0 if self.ended else os.getpid()
            _RECORD.pack_into(self._shared, 0, pid, self.beats, self.step, self.patience)


def beat(folder: Path, rank: int, patience: int) -> None:
    """Begin to beat, for as long as this process lives; see Heartbeat."""
    global _beating
    _beating = Heartbeat(folder, rank, patience)


def note_step(step: int) -> None:
    """Let the launcher know which step this process is about to train."""
    if _beating is not None:
        _beating.step = step
        _beating.write()


def end_beat() -> None:
    """Let the launcher know that this process is about to end."""
    if _beating is not None:
        _beating.ended = True
        _beating.write()


@dataclass(frozen=True)
class Pulse:
    """The last that was heard of a process."""

    rank: int
    pid: int
    beats: int
    step: int
    patience: int

    def __str__(self) -> str:
        place = f"in step {self.step}" if self.step else "before its first step"
        return f"rank {self.rank} (process {self.pid}), {place},"


class Listener:
    """The launcher's side: the processes on this machine that have begun to beat."""

    def __init__(self, folder: Path):
        self.folder = folder
        # Rank: the beats when they last changed, and the clock's seconds then.
        self._heard: dict[int, tuple[int, float]] = {}
        self._clock = RunningClock()

    def pulses(self) -> list[Pulse]:
        """Of every process that lives, by rank."""
        found = []
        for path in self.folder.glob("rank*"):
            record = path.read_bytes()
            if len(record) < _RECORD.size:
                continue
            pulse = Pulse(int(path.name[4:]), *_RECORD.unpack(record))
            # One that was killed misses its beats, too.
            if pulse.pid and _lives(pulse.pid):
                found.append(pulse)
        return sorted(found, key=lambda pulse: pulse.rank)

    def silent(self) -> list[Pulse]:
        """Processes that have not answered for longer than their patience. To be called several times a second."""
        now = self._clock()
        given_up = []
        for pulse in self.pulses():
            beats, since = self._heard.get(pulse.rank, (None, now))
            if beats != pulse.beats:
                self._heard[pulse.rank] = pulse.beats, now
            elif now - since > pulse.patience:
                given_up.append(pulse)
        return given_up


def _lives(pid: int) -> bool:
    """Whether a process of ours runs, or could; not one that has ended and that its parent has yet to hear of."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except ProcessLookupError:
        return False
    except OSError:
        # Without /proc.
        return True
