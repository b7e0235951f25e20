"""The argv and the environment of training processes."""

import os
import sys
from pathlib import Path

from lighthouse_core.job.environment import MEETING, command, environment, ranks
from lighthouse_core.job.plan import Plan


def test_argv():
    assert command(Path("runs/a")) == [sys.executable, "-P", "-m", "lighthouse_core.worker", "runs/a"]


def test_every_process_has_its_ranks():
    assert ranks(Plan(2)) == [{"RANK": "0", "LOCAL_RANK": "0"}, {"RANK": "1", "LOCAL_RANK": "1"}]
    many = Plan(2, 3, 2, "host:29500")
    assert [own["RANK"] for own in ranks(many)] == ["4", "5"]
    named = {"GLOO_SOCKET_IFNAME": "eth9", "NCCL_SOCKET_IFNAME": "eth9"}
    shared = environment(many, {"RANK": "9", **named}, Path("/e"))
    assert shared["GLOO_SOCKET_IFNAME"] == shared["NCCL_SOCKET_IFNAME"] == "eth9"
    assert (shared["WORLD_SIZE"], shared["LOCAL_WORLD_SIZE"], shared[MEETING]) == ("6", "2", "host:29500")


def test_environment(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    found = environment(Plan(3), {"PYTHONPATH": "a:b", "X": "1"}, Path("/e"))
    assert found["OMP_NUM_THREADS"] == "2" and found["MKL_DYNAMIC"] == "FALSE"
    assert (found["PYTHONPATH"], found["X"], found["LIGHTHOUSE_JOB"], found["TMPDIR"]) == ("a:b", "1", "/e", "/e")
    assert environment(Plan(30), {}, Path("/e"))["OMP_NUM_THREADS"] == "1"
    assert found["GOMP_SPINCOUNT"] == "10000"
    # It would win over the user's own wish.
    assert "GOMP_SPINCOUNT" not in environment(Plan(3), {"OMP_WAIT_POLICY": "ACTIVE"}, Path("/e"))
    assert environment(Plan(3), {"OMP_NUM_THREADS": "7"}, Path("/e"))["OMP_NUM_THREADS"] == "7"
