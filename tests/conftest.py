"""What every test shares: where the slow truth lives, how hypothesis draws, and a small seeded call."""

import contextlib
import functools
import gc
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch
import typer.main
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    # Read when the kernels are imported, by whichever test does it first.
    os.environ["TRITON_INTERPRET"] = "1"

# Tests may be run within a job of Slurm, whose machines are not theirs.
for name in [name for name in os.environ if name.startswith("SLURM_")]:
    del os.environ[name]

# The processes of the tests share the cores, as those of a job do: threads that wait for each other spin, and take the
# cores from the other processes.
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))

# One parser for all calls of the command line in this process; a process of a user makes one, too.
typer.main.get_command = functools.cache(typer.main.get_command)

sys.path[:0] = [str(Path(__file__).parent / folder) for folder in ("kernels", "reliability")]

import children  # noqa: E402  (they lie there)
import forked  # noqa: E402

# Derandomised, so that a failure on one machine is a failure on every machine.
settings.register_profile(
    "lighthouse",
    deadline=None,
    max_examples=30,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("lighthouse")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """No test waits for ever: it fails where it is, its fixtures included, after a time that none should need."""

    def give_up(number, frame):
        raise TimeoutError(f"{item.nodeid} took more than {seconds} s")

    seconds = 7200 if item.get_closest_marker("slow") else 900
    previous = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@pytest.fixture
def small_disk():
    """Mounts a disk of its own in a new folder, of so many bytes ("64k")."""
    mounted = []

    def mount(path: Path, size: str) -> Path:
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
        if os.getuid() != 0 or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("nobody but root can mount a disk here")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def pytest_collection_modifyitems(items):
    """`-m gpu` says that it needs a GPU where there is none."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    # The longest file first, so that one of two processes has it while the other runs the rest.
    items.sort(key=lambda item: "integration" not in item.path.parts)


@pytest.fixture(scope="session", autouse=True)
def _no_process_is_left():
    """Whatever the tests start has ended when they have, or a while later; what has not is killed, and named."""
    mark = uuid.uuid4().hex
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTHOUSE_TESTS", mark)
        yield
    forked.end()

    def left() -> dict[int, str]:
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            pid = int(path.name)
            if pid != os.getpid() and children.environment(pid).get("LIGHTHOUSE_TESTS") == mark:
                words = (path / "cmdline").read_text(errors="replace").replace("\0", " ") if path.exists() else ""
                # They serve this process for as long as it lives.
                if words and "multiprocessing" not in words and "compile_worker" not in words:
                    found[pid] = words
        return found

    try:
        children.wait_until(lambda: not left(), seconds=20)
    except TimeoutError:
        found = left()
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert not found, "tests left processes behind"


@pytest.fixture(scope="session", autouse=True)
def _few_threads():
    """The processes that tests start have as many threads as this one."""
    with pytest.MonkeyPatch.context() as patch:
        if "OMP_NUM_THREADS" not in os.environ:
            patch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """What this program remembers about files goes to a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def generator():
    """A seeded CPU generator, so that a test's inputs do not depend on the tests that ran before it."""
    return torch.Generator().manual_seed(20260)


@pytest.fixture
def small(generator):
    """(q, k, v, cfg): float64, B=2, N=37, two query heads to one KV head, 23 of 37 entries kept, one token padded."""
    from lighthouse_core import LighthouseConfig

    def draw(heads):
        return torch.randn(2, 37, heads, 3, generator=generator, dtype=torch.float64)

    cfg = LighthouseConfig(pooling=2, levels=2, topk=2, tile_parents=2, backend="reference")
    return draw(4), draw(2), draw(2), cfg


@pytest.fixture(scope="session")
def golden_case():
    """(tensors, cfg) of the recorded call in tests/golden."""
    from safetensors.torch import load_file

    from lighthouse_core import LighthouseConfig

    cfg = LighthouseConfig(
        pooling=4, levels=3, topk=256, tile_parents=128, cover_prefix=False, backend="reference", dense_backend="math"
    )
    return load_file(Path(__file__).parent / "golden" / "case_a.safetensors"), cfg


def pytest_collection_finish():
    """What lives as long as the tests do is not looked at by every collection of garbage."""
    gc.collect()
    gc.freeze()
