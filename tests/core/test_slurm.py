"""What Slurm's environment says of the machines of a job."""

import pytest

from lighthouse_core.errors import UserError
from lighthouse_core.job.slurm import Step, machines_of_job, step

# Of the second of three tasks, as srun sets it.
TASK = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NNODES": "4",
    "SLURM_JOB_NUM_NODES": "4",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
    "SLURM_JOB_NODELIST": "gpu[01-04]",
    "SLURM_STEP_NODELIST": "login,gpu2,gpu3",
}
# As a batch script has it, on the first machine.
BATCH = {
    "SLURM_JOB_ID": "1",
    "SLURM_PROCID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NNODES": "4",
    "SLURM_NTASKS_PER_NODE": "2",
}


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A scontrol that answers so, and what it was asked."""

    def answer(script: str):
        program = tmp_path / "scontrol"
        program.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/asked\n{script}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return tmp_path / "asked"

    return answer


def without(*names: str) -> dict[str, str]:
    return {name: value for name, value in TASK.items() if name not in names}


def test_a_task_of_several_machines():
    assert step(TASK) == Step(3, 1, "login", 15000 + (7919 * 123456 + 2) % 15000)
    # Of another step of the same job, and of old versions.
    assert step(TASK | {"SLURM_STEP_ID": "3"}).port == step(TASK).port + 1
    assert step(without("SLURM_STEP_NUM_NODES")).nnodes == 4
    assert machines_of_job(TASK) == 1


def test_an_abbreviated_list_is_for_scontrol(scontrol):
    asked = scontrol("printf 'gpu01\\ngpu02\\n'")
    assert step(without("SLURM_STEP_NODELIST")).host == "gpu01"
    assert asked.read_text() == "show hostnames gpu[01-04]\n"
    scontrol("echo no such list >&2; exit 1")
    with pytest.raises(UserError, match=r"which machine is the first of .*: no such list") as caught:
        step(without("SLURM_STEP_NODELIST"))
    assert "--rdzv-endpoint" in caught.value.hint


def test_without_scontrol_the_endpoint_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert step(TASK).host == "login"
    with pytest.raises(UserError, match="no scontrol") as caught:
        step(without("SLURM_STEP_NODELIST"))
    assert "--rdzv-endpoint" in caught.value.hint
    with pytest.raises(UserError, match="first of ''"):
        step(without("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"))


@pytest.mark.parametrize("tasks", ["2(x3)", "1,2", "1(x2),4", "8"])
def test_several_tasks_a_machine_are_refused(tasks):
    with pytest.raises(
        UserError, match=f"starts {max(map(int, tasks.replace('(x3)', '').replace('(x2)', '').split(',')))} tasks"
    ):
        step(TASK | {"SLURM_STEP_TASKS_PER_NODE": tasks})
    with pytest.raises(UserError, match="starts 8 tasks") as caught:
        step(without("SLURM_STEP_TASKS_PER_NODE") | {"SLURM_NTASKS_PER_NODE": "8"})
    assert "--ntasks-per-node=1" in caught.value.hint


def test_outside_of_srun_nothing_is_taken():
    assert step({}) is None and machines_of_job({}) == 1
    assert step(BATCH) is None and machines_of_job(BATCH) == 4
    assert machines_of_job(BATCH | {"SLURM_NNODES": "1"}) == 1
    # One task of one machine.
    assert step(TASK | {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}) is None


def test_the_shell_of_salloc_is_no_step():
    shell = TASK | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
    assert step(shell) is None and machines_of_job(shell) == 4
    # A step that srun starts there has a number of its own.
    assert step(shell | TASK).nnodes == 3 and machines_of_job(shell | TASK) == 1


def test_jobs_that_follow_each_other_have_ports_of_their_own():
    jobs = [(job, number) for job in range(100, 130) for number in range(30)]
    ports = {step(TASK | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(number)}).port for job, number in jobs}
    assert len(ports) == len(jobs) and min(ports) >= 15000 and max(ports) < 30000


def test_a_number_that_is_none():
    with pytest.raises(UserError, match="SLURM_NODEID of Slurm is 'x'"):
        step(TASK | {"SLURM_NODEID": "x"})
