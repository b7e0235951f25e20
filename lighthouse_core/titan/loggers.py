"""Where the rows of metrics.jsonl go besides: event files of TensorBoard, and a run of Weights & Biases."""

import errno
import os
import secrets
import socket
import time
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torchtitan.components.metrics import BaseLogger

from lighthouse_core.config import Recipe
from lighthouse_core.errors import UserError
from lighthouse_core.files import write_atomically
from lighthouse_core.reading import RECIPE_BYTES, read_regular
from lighthouse_core.runs.run import Run

_EVENTS = "events.out.tfevents."
# Given to wandb.init where the environment has them; what wandb reads itself it is left to read.
_WANDB = {
    "entity": "WANDB_TEAM",
    "notes": "WANDB_RUN_NOTES",
    "tags": "WANDB_RUN_TAGS",
    "group": "WANDB_RUN_GROUP",
    "job_type": "WANDB_RUN_JOB_TYPE",
}


class TensorBoard(BaseLogger):
    """One event file for each launch, all in one folder, which is one run to TensorBoard.

    Every row is on the disk at once, so that `kill -9` loses none. A launch that goes on from a checkpoint first says
    so: readers then forget the steps after it, which are about to be repeated.

    Args:
        folder: of the run's event files.
        step: the last finished step of the checkpoint; 0 for none.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, folder: Path, step: int):
        folder.mkdir(exist_ok=True)
        # Readers take files by name, and so by the second in it, whatever a clock or another machine says.
        earlier = [path.name.removeprefix(_EVENTS).partition(".")[0] for path in folder.glob(f"{_EVENTS}*")]
        second = max(int(time.time()), *(int(part) + 1 for part in earlier if part.isdigit()), 0)
        name = f"{_EVENTS}{second:010d}.{socket.gethostname()}.{os.getpid()}"
        self.file = (folder / name).open("xb", buffering=0)
        self._write(Event(file_version="brain.Event:2"), 0)
        if earlier:
            self._write(Event(session_log=SessionLog(status=SessionLog.START)), step + 1)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        values = [Summary.Value(tag=tag, simple_value=float(value)) for tag, value in metrics.items()]
        self._write(Event(summary=Summary(value=values)), step)

    def _write(self, event: Event, step: int) -> None:
        event.wall_time, event.step = time.time(), step
        record = BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        content = record.getvalue()
        # A record that is cut off would hide those after it from a reader.
        if self.file.write(content) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        self.file.close()


class WeightsAndBiases(BaseLogger):
    """The same run of Weights & Biases for all launches and stages of a run, with its recipe.

    Its identity is in the run's folder; WANDB_RUN_ID is another.

    Raises:
        UserError: it cannot be set up.
    """

    def __init__(self, run: Run, recipe: Recipe):
        import wandb

        self.wandb = wandb
        # The runs of a sweep are in one folder.
        given = {"group": run.path.resolve().parent.name}
        given |= {key: os.environ[name] for key, name in _WANDB.items() if os.environ.get(name)}
        try:
            wandb.init(
                project=os.environ.get("WANDB_PROJECT") or "lighthouse",
                name=os.environ.get("WANDB_RUN_NAME") or os.environ.get("WANDB_NAME") or run.name,
                id=os.environ.get("WANDB_RUN_ID") or _identity(run.path / "wandb-id"),
                resume="allow",
                dir=str(run.path),
                config=recipe.model_dump(mode="json"),
                # A recovery, and what --set changes on the way.
                allow_val_change=True,
                **given,
            )
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(
                f"Weights & Biases cannot be set up: {reason}",
                hint="WANDB_MODE=offline keeps the records here; --set metrics.wandb=false does without",
            ) from None

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self.wandb.log(dict(metrics), step=step)

    def close(self) -> None:
        if self.wandb.run is not None:
            self.wandb.finish()


def _identity(path: Path) -> str:
    """What a file holds; made where there is none."""
    try:
        found = read_regular(path, RECIPE_BYTES).decode("ascii").strip()
    except (OSError, ValueError):
        found = ""
    if not found.isalnum():
        found = secrets.token_hex(8)
        write_atomically(path, found + "\n")
    return found
