"""torchtitan's checkpoints, published as a whole: written under a temporary name, sealed, renamed."""

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components.checkpoint import MODEL, AsyncMode, CheckpointManager

from lighthouse_core.checkpoint import Contents, read_contents
from lighthouse_core.checkpoint_reader import load
from lighthouse_core.errors import PatchError, StorageError
from lighthouse_core.job.clock import RunningClock
from lighthouse_core.runs.listing import checkpoint_steps
from lighthouse_core.seal import publish, read_manifest, seal, sealed_bytes
from lighthouse_core.weights.checkpoint import BUDGET

logger = logging.getLogger(__name__)
# The name of the part of a checkpoint that float16 training alone has.
LOSS_SCALE = "loss_scale"
# For a save of processes whose launcher was killed.
_PATIENCE_SECONDS = 240
_POLL_SECONDS = 0.2


class Checkpointer(CheckpointManager):
    """Saves to `.step-N.saving`; what is named `step-N` is complete and sealed."""

    # torchtitan's, of the save in progress.
    save_future: Future[Any] | None

    def __init__(self, *parts: Any, **named: Any):
        super().__init__(*parts, **named)
        self.path = Path(self.folder)
        self.rank = torch.distributed.get_rank()
        # For agreements that must not wait for an accelerator.
        self.group = torch.distributed.new_group(backend="gloo")
        # What has to be known of the steps before a checkpoint may hold them.
        self.before_save = lambda: None
        # Steps that are saved besides every `interval`-th.
        self.also: Sequence[int] = ()
        # Of the checkpoint that is about to be loaded, where they have been read.
        self.contents: Contents | None = None
        # The step of the last save that began, in our way; and of the one at hand.
        self.saved: int | None = None
        self._step = 0
        # Keeps the time of saves.
        self.during_save = contextlib.nullcontext
        self.finisher = ThreadPoolExecutor(1, "finish-checkpoint")
        self._agree(self._hold)

    def _hold(self) -> str | None:
        """Keep other jobs from saving here for as long as this process lives, and clear away what they left behind."""
        self.path.mkdir(parents=True, exist_ok=True)
        # Never closed. The launcher's lock is not enough: its processes outlive one that is killed, and save.
        held = os.open(self.path, os.O_RDONLY)
        clock = RunningClock()
        while not _lock(held):
            waited = clock()
            if waited > _PATIENCE_SECONDS:
                return f"another process still holds {self.path} after {_PATIENCE_SECONDS} s"
            if waited < _POLL_SECONDS:
                logger.warning("waiting for the processes of an earlier launch, which still hold %s", self.path)
            time.sleep(_POLL_SECONDS)
        for leftover in (*self.path.glob(".step-*.saving"), *self.path.glob(".step-*.deleting")):
            # Of a link, the link alone.
            leftover.unlink() if leftover.is_symlink() else shutil.rmtree(leftover)
        return None

    def _should_save(self, curr_step: int, last_step: bool = False) -> bool:
        return super()._should_save(curr_step, last_step or curr_step in self.also)

    def save(self, curr_step: int, last_step: bool = False) -> None:
        due, self._step = self._should_save(curr_step, last_step), curr_step
        with self.during_save() if due else contextlib.nullcontext():
            super().save(curr_step, last_step)
        if due and self.saved != curr_step:
            raise PatchError(f"torchtitan saved step {curr_step} in its own way, and not in ours, or not at all")

    def dcp_save(
        self, state_dict: dict[str, Any], checkpoint_id: str, async_mode: AsyncMode, *rest: Any, **named: Any
    ) -> Future[Any] | None:
        name = Path(checkpoint_id)
        temporary = name.with_name(f".{name.name}.saving")
        self.before_save()
        self.saved = self._step
        self._agree(self._lacks_space)
        try:
            saved = super().dcp_save(state_dict, str(temporary), async_mode, *rest, **named)
        except CheckpointException as error:
            self._discard(temporary)
            raise _storage_error(name, error) from error
        if async_mode == AsyncMode.DISABLED:
            self._agree(lambda: self._publish(temporary, name))
            return None
        return self.finisher.submit(self._finish, saved, temporary, name)

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, *rest: Any, **named: Any) -> None:
        # torch's own way runs what the pickles of a checkpoint ask for.
        contents = self.contents or read_contents(Path(checkpoint_id))
        for part in (LOSS_SCALE, BUDGET):
            if not any(name.startswith(f"{part}.") for name in contents.values):
                # Of training in another dtype, or without budgets. The scale begins anew, and so does measuring.
                state_dict.pop(part, None)
        load(state_dict, Path(checkpoint_id), contents)
        self.states[MODEL].load_state_dict(state_dict)

    def _finish(self, saved: Future[Any], temporary: Path, name: Path) -> None:
        try:
            saved.result()
        except CheckpointException as error:
            self._discard(temporary)
            raise _storage_error(name, error) from error
        # All processes have written their files once the coordinator's part is done.
        failure = self._publish(temporary, name) if self.rank == 0 else None
        if failure:
            raise StorageError(failure)

    def _publish(self, temporary: Path, name: Path) -> str | None:
        try:
            seal(temporary, name.name)
            publish(temporary, name)
        except OSError as error:
            self._discard(temporary)
            return f"checkpoint {name} could not be written: {error.strerror}"
        return None

    def _discard(self, temporary: Path) -> None:
        """Give back the room that a failed save takes."""
        if self.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)

    def _lacks_space(self) -> str | None:
        steps = checkpoint_steps(self.path.parent)
        needed = sealed_bytes(Path(self._create_checkpoint_id(steps[-1]))) if steps else None
        if needed is None:
            # Weights and AdamW's two moments in float32.
            needed = 12 * sum(weight.numel() for weight in self.states[MODEL].state_dict().values())
        free = shutil.disk_usage(self.path).free
        if free < needed:
            return f"a checkpoint needs {needed / 1e9:.3g} GB, but {self.path} has {free / 1e9:.3g} GB free"
        return None

    def _agree(self, action) -> None:
        """Run `action` on the first process; all processes fail with what it returns, or with what stopped it."""
        answer: list[str | None] = [None]
        try:
            answer = [action() if self.rank == 0 else None]
        except OSError as error:
            answer = [f"{self.path} cannot be used: {error}"]
        torch.distributed.broadcast_object_list(answer, src=0, group=self.group)
        if answer[0]:
            raise StorageError(answer[0])

    def maybe_wait_for_staging(self) -> None:
        # Called once a step: a save that failed meanwhile ends the run now, not at the next save.
        self._settle()
        super().maybe_wait_for_staging()

    def _async_wait(self) -> None:
        if self.save_future is not None:
            wait([self.save_future])
            self._settle()
        super()._async_wait()

    def _settle(self) -> None:
        """Agree on how the asynchronous save in progress stands: the processes end theirs at different times."""
        if self.save_future is None:
            return
        failure = self.save_future.exception() if self.save_future.done() else None
        stands = torch.tensor([not self.save_future.done(), failure is not None])
        torch.distributed.all_reduce(stands, op=torch.distributed.ReduceOp.MAX, group=self.group)
        pending, failed = stands.tolist()
        if failed:
            words: list[str | None] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(words, failure and str(failure), group=self.group)
            raise failure or StorageError(next(filter(None, words)))
        if not pending:
            self.save_future = None

    def close(self) -> None:
        if getattr(self, "finisher", None) is not None:
            self.finisher.shutdown()
            del self.finisher
        super().close()

    def _find_load_step(self, folder: str = "") -> int:
        # The first process decides: a shared file system may show them different files.
        step = [next(reversed(checkpoint_steps(self.path.parent)), -1)]
        torch.distributed.broadcast_object_list(step, src=0, group=self.group)
        return step[0]

    def _save_last_step(self, curr_step: int) -> None:
        super()._save_last_step(curr_step)
        # torchtitan lets the last one come on top of those that are kept.
        self._purge_stale_checkpoints()

    def _purge_stale_checkpoints(self) -> None:
        """Delete what is sealed and older than the newest that are to be kept, but for the steps of `also`."""
        if self.rank or not self.keep_latest_k:
            return
        folders = [Path(self._create_checkpoint_id(step)) for step in checkpoint_steps(self.path.parent)]
        kept = {Path(self._create_checkpoint_id(step)) for step in self.also}
        sound = [folder for folder in folders if folder not in kept and not isinstance(read_manifest(folder), str)]
        for folder in sound[: -self.keep_latest_k]:
            # Out of the way at once, so that nothing half deleted has the name of a checkpoint.
            doomed = folder.with_name(f".{folder.name}.deleting")
            try:
                folder.rename(doomed)
            except OSError as error:
                logger.warning("%s cannot be deleted: %s", folder, error.strerror)
                continue
            self.purge_queue.put(str(doomed))


def _lock(directory: int) -> bool:
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _disk_is_full(cause: BaseException | None) -> bool:
    """Whether that is behind an exception; torch.save raises another where it then cannot end its archive."""
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _storage_error(name: Path, error: CheckpointException) -> StorageError:
    causes = [failure[0] for failure in error.failures.values()]
    full = any(map(_disk_is_full, causes))
    words = str(causes[0]).strip().splitlines() or [type(causes[0]).__name__]
    reason = "no space left on the device" if full else words[-1]
    return StorageError(f"checkpoint {name} could not be written: {reason}")
