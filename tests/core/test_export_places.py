"""Where a model can be exported to, and what is left where it cannot: nothing."""

import os
import signal
import stat
import subprocess

import children
import pytest
from test_export import nothing_left, run, weights  # noqa: F401 (fixtures)

from lighthouse_cli._signals import as_exits
from lighthouse_core import checkpoint_reader
from lighthouse_core.errors import SystemFault, UserError
from lighthouse_core.export import publish, verify
from lighthouse_core.export.publish import strip

pytestmark = pytest.mark.usefixtures("short_samples")


@pytest.fixture
def disk(tmp_path, small_disk):
    """A disk of 32 kB, which a model does not fit on."""
    return small_disk(tmp_path / "disk", "32k")


def test_the_place_of_a_mounted_disk_is_refused_before_anything_is_read(run, disk, monkeypatch):  # noqa: F811
    monkeypatch.setattr(publish, "load_mean", None)
    with pytest.raises(UserError, match="is the place of a mounted disk") as error:
        strip(run, disk)
    assert f"{disk}/model" in error.value.hint and not list(disk.iterdir())


@pytest.mark.parametrize("out", ["out", "deeper/out"])
def test_a_full_disk(run, disk, out):  # noqa: F811
    with pytest.raises(SystemFault, match=r"No space left on device|cannot be written"):
        strip(run, disk / out)
    assert not list(disk.iterdir())


def test_a_read_only_disk(run, disk):  # noqa: F811
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(UserError, match="Read-only file system"):
        strip(run, disk / "out")


@pytest.mark.parametrize("out", ["n" * 300, "file/out", "loop/out", "file", "pipe", "loop"])
def test_a_place_that_cannot_be_one(run, tmp_path, out):  # noqa: F811
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    os.symlink("loop", tmp_path / "loop")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((UserError, OSError)) as error:
        strip(run, tmp_path / out)
    assert isinstance(error.value, UserError) or error.value.strerror
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_out_keeps_its_mode(run, tmp_path):  # noqa: F811
    (tmp_path / "out").mkdir(mode=0o700)
    strip(run, tmp_path / "out")
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700
    assert (tmp_path / "out/model.safetensors").is_file()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing(run, tmp_path, monkeypatch, number):  # noqa: F811
    def interrupt(*args):
        os.kill(os.getpid(), number)

    monkeypatch.setattr(verify, "compare_logits", interrupt)
    with children.default_signals():
        before = signal.getsignal(number)
        with pytest.raises(SystemExit) as end, as_exits():
            strip(run, tmp_path / "out")
        assert end.value.code == 128 + number and nothing_left(tmp_path)
        assert signal.getsignal(number) == before


def test_a_signal_that_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with as_exits():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_lengths_that_no_model_knows(run, tmp_path):  # noqa: F811
    for length in (5000, 10**18):
        with pytest.raises(UserError, match=f"verify length {length} is above 4096"):
            strip(run, tmp_path / "out", verify_length=length)
    assert nothing_left(tmp_path)


def test_a_signal_while_the_weights_are_read_is_one(run, tmp_path, monkeypatch):  # noqa: F811
    def interrupt(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(checkpoint_reader.Reader, "read_data", interrupt)
    with children.default_signals(), pytest.raises(SystemExit) as end, as_exits():
        strip(run, tmp_path / "out")
    assert end.value.code == 143 and nothing_left(tmp_path)
