"""One process of a training job, which lighthouse_core.job.launch starts."""

import io
import logging
import os
import signal
import sys
from pathlib import Path

from lighthouse_core.files import RUN_FOLDERS, open_to_append, refuse_links
from lighthouse_core.job.stop import Interrupted, is_training, listen_for_stop
from lighthouse_core.shown import shown, shown_lines


class _Shown(logging.Formatter):
    """Escapes what a terminal would obey: the text of a record may hold a name from outside."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return shown_lines(text) if record.exc_info else shown(text)


def _set_up_logging(run_dir: Path, rank: int, quiet: bool) -> None:
    """Everything goes to the run's log file; what we say ourselves also goes to stderr, on rank 0."""
    refuse_links(run_dir, *RUN_FOLDERS)
    logs = run_dir / "logs"
    logs.mkdir(exist_ok=True)
    log = io.TextIOWrapper(open_to_append(logs / f"rank{rank}.log"), encoding="utf-8", write_through=True)
    everything = logging.StreamHandler(log)
    everything.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [everything]
    root.setLevel(logging.INFO)
    # A log that cannot be written, on a full disk, is no reason for a traceback a line.
    logging.raiseExceptions = False
    logging.captureWarnings(True)
    if rank == 0:
        ours = logging.StreamHandler(sys.stderr)
        ours.setFormatter(_Shown("%(message)s"))
        ours.setLevel(logging.ERROR if quiet else logging.INFO)
        logging.getLogger("lighthouse_core").addHandler(ours)


def _log_torch() -> None:
    """Have what torch's compiler and collectives say go to the run's log, rather than to stderr; TORCH_LOGS asks for
    it there."""
    if "TORCH_LOGS" not in os.environ:
        ours = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == "torch"]
        # What TORCH_TRACE asks for is written elsewhere.
        for name in set(ours) - {"torch.__trace"}:
            logger = logging.getLogger(name)
            logger.handlers.clear()
            logger.propagate = True


def _fix_arithmetic() -> None:
    """Have MKL, which reads this when it is loaded, give the same bits in every process: else it promises none."""
    os.environ.setdefault("MKL_CBWR", "AVX2")


def main(run_dir: str) -> int:
    """Train the last stage of the run.

    Returns:
        The exit code of the process: 0 done, 1 a fault, 2 the user's mistake, 143 stopped on request after a
        checkpoint.
    """
    from lighthouse_core.errors import LighthouseError
    from lighthouse_core.job.environment import JOB_FOLDER, QUIET
    from lighthouse_core.job.exits import follow_parent, report_exit
    from lighthouse_core.job.heartbeat import beat, end_beat
    from lighthouse_core.runs.run import Run

    rank = int(os.environ.get("RANK", 0))
    follow_parent()
    try:
        run = Run(Path(run_dir))
        _set_up_logging(run.path, rank, QUIET in os.environ)
        if run.recipe.training.deterministic:
            _fix_arithmetic()
        from lighthouse_core.titan import train

        _log_torch()
        # Importing torch from a slow disk may hold the interpreter's lock for longer than any step.
        if folder := os.environ.get(JOB_FOLDER):
            beat(Path(folder), rank, run.recipe.parallel.hang_seconds)
        train(run)
    except LighthouseError as error:
        # Every process may have met the same mistake; the first to report it is the one that prints it.
        if report_exit(error.exit_code):
            print(f"error: {shown(error)}", file=sys.stderr)
            if error.hint:
                print(f"hint: {shown(error.hint)}", file=sys.stderr)
        return error.exit_code
    except Interrupted:
        return 128 + signal.SIGTERM
    except Exception:
        # Before that, it may be another process's end by a signal that is met here.
        if is_training():
            report_exit(LighthouseError.exit_code)
        raise
    finally:
        end_beat()
    return 0


if __name__ == "__main__":
    # Before what takes time to import: until then a signal ends this process in its own way.
    listen_for_stop()
    from lighthouse_core.job.exits import end_with

    end_with(lambda: main(sys.argv[1]))
