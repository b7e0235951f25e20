"""Several machines on the command line: what is compared, what comes from Slurm, and the examples of the docs."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import children
import pytest
import yaml

from lighthouse_core.errors import UserError
from lighthouse_core.job.plan import Plan

EXAMPLES = Path(__file__).parents[2] / "docs/examples"
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_STEP_NODELIST": "node1,node2",
}
START = ("pretrain", "tiny.toml", "--name", "a")
SEVERAL = ("--nnodes", "2", "--node-rank", "1", "--rdzv-endpoint", "host:29500")


@pytest.fixture
def slurm(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def trainer(trainer):
    trainer.code = 1  # on another machine than the first it would look for the run
    return trainer


def test_what_is_missing_comes_from_slurm(lighthouse, trainer, slurm):
    answer = lighthouse(*START)
    port = 15000 + 7919 * 7 % 15000
    assert f"from Slurm: --nnodes 2 --node-rank 1 --rdzv-endpoint node1:{port}\n" in answer.err
    assert trainer.launches == [("runs/a", Plan(1, 2, 1, f"node1:{port}"))]
    # What is given wins, whatever else is missing.
    assert "from Slurm: --node-rank 1\n" in lighthouse(*START, "--nnodes", "4", "--rdzv-endpoint", "host:1").err
    assert "Slurm" not in lighthouse(*START, *SEVERAL).err
    assert [plan for _, plan in trainer.launches[1:]] == [Plan(1, 4, 1, "host:1"), Plan(1, 2, 1, "host:29500")]


def test_a_task_may_train_alone(lighthouse, trainer, slurm, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "2(x2)")
    assert "srun starts 2 tasks on a machine" in lighthouse(*START).error and not trainer.launches
    trainer.code = 0
    assert lighthouse(*START, "--nnodes", "1").code == 0
    assert trainer.launches == [("runs/a", Plan(1))] and trainer.asked is None


def test_a_script_of_slurm_is_told_of_srun(lighthouse, trainer, slurm, monkeypatch):
    monkeypatch.setenv("SLURM_NNODES", "2")
    trainer.code = 0
    # The shell of salloc is a step that srun did not start.
    monkeypatch.setenv("SLURM_STEP_ID", "4294967290")
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "1")
    answer = lighthouse(*START)
    assert answer.code == 0 and "warning: this job of Slurm has 2 machines, and this one alone trains" in answer.err
    monkeypatch.delenv("SLURM_STEP_ID")
    assert "warning: this job of Slurm has 2 machines" in lighthouse(*START[:3], "b").err
    monkeypatch.setenv("SLURM_NNODES", "1")
    assert "Slurm" not in lighthouse("recover", "a").err


def test_torchrun_is_refused(lighthouse, trainer, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert "torchrun" in lighthouse(*START).error and not trainer.launches


def test_what_machines_compare(lighthouse, trainer):
    set_titan = ("--set", "titan.comm.init_timeout_seconds=9", "--set", "parallel.hang_seconds=8")
    lighthouse(*START, *SEVERAL, *set_titan)
    new = trainer.asked
    assert (new.seconds, new.patience) == (9, 8)
    assert (new.facts["the command"], new.facts["the run"], new.facts["optimizer.lr"]) == ("pretrain", "a", 1e-3)
    lighthouse(*START, *SEVERAL, *set_titan, "--set", "optimizer.lr=1e-4")
    facts = trainer.asked.facts
    assert {name for name in facts if facts[name] != new.facts[name]} == {"optimizer.lr"}
    json.dumps(facts)
    trainer.stop, trainer.code = 40, 143
    assert lighthouse(*START).code == 143
    trainer.code = 1
    lighthouse("pretrain", "--resume", "a", *SEVERAL, "--set", "checkpoint.keep=7")
    assert trainer.asked.facts == {"the command": "pretrain --resume", "the run": "a", "--set": ["checkpoint.keep=7"]}
    assert trainer.asked.seconds == 300
    lighthouse("recover", "a", "--steps", "5", *SEVERAL)
    facts = trainer.asked.facts
    assert (facts["the command"], facts["--steps"], facts["--extend"], facts["--set"]) == ("recover", 5, None, [])


# The examples of docs/machines.md.


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Puts scripts on PATH; what `lighthouse` was given is in calls.txt, a line each."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def put(**scripts: str) -> None:
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/bin/bash\n{script}\n")
            (folder / name).chmod(0o755)

    put(lighthouse=f'printf "%q " "$@" >>{tmp_path}/calls.txt; echo >>{tmp_path}/calls.txt')
    return put


def calls(folder: Path) -> list[list[str]]:
    return [shlex.split(line) for line in (folder / "calls.txt").read_text().splitlines()]


def test_the_script_for_slurm_is_sound():
    # Beside Python, which a test may be run by without its folder in PATH.
    program = Path(sys.executable).with_name("shellcheck")
    answer = subprocess.run([program, EXAMPLES / "slurm.sh"], capture_output=True, text=True)
    assert (answer.returncode, answer.stdout) == (0, "")


def run_script(folder: Path, *arguments: str, **environment: str):
    command = ["bash", EXAMPLES / "slurm.sh", *arguments]
    return children.start(command, cwd=folder, env={**os.environ, "SLURM_JOB_ID": "7", **environment})


def test_the_script_for_slurm_goes_on_and_queues_again(lighthouse, trainer, here, programs, monkeypatch):
    # srun of today does not take the CPUs of a task from the job.
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "64")
    programs(
        srun='[ "$1" = --cpus-per-task=64 ] && shift && "$@"',
        scontrol=f'echo "$@" >>{here}/scontrol.txt',
        scancel=f'echo "$@" >>{here}/scancel.txt',
    )
    assert run_script(here, "tiny.toml", "a").wait(20) == 0
    [command] = calls(here)
    # The command line takes it, and takes it again after an end before the first checkpoint, and after one.
    trainer.rows = [{"step": 1, "stage": "lighthouse", "leaky": True, "loss": 1.0}]
    for trainer.code, trainer.stop in ((1, None), (143, 40), (0, None)):
        assert lighthouse(*command).code == trainer.code
    assert [name for name, _ in trainer.launches] == ["runs/a"] * 3
    # Before the time limit Slurm tells the script, which has the launchers end, and then queues itself.
    programs(srun=f"trap 'exit 143' TERM; touch {here}/ready; while :; do sleep 0.05; done")
    programs(scancel=f'echo "$@" >>{here}/scancel.txt; kill -TERM $(pgrep -P $PPID -f srun)')
    script = run_script(here, "tiny.toml", "a")
    children.wait_until((here / "ready").exists, script)
    script.send_signal(10)
    assert script.wait(20) == 143
    assert (here / "scancel.txt").read_text() == "--signal=TERM 7\n"
    assert (here / "scontrol.txt").read_text() == "requeue 7\n"
    # Not where it is cancelled.
    (here / "ready").unlink()
    script = run_script(here, "tiny.toml", "a")
    children.wait_until((here / "ready").exists, script)
    subprocess.run(["pkill", "-TERM", "-P", str(script.pid), "-f", "srun"], check=True)
    assert script.wait(20) == 143 and (here / "scontrol.txt").read_text() == "requeue 7\n"


def test_the_script_for_slurm_recovers_and_exports(lighthouse, trainer, here, programs, monkeypatch):
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    options = f'while [[ "$1" == --* ]]; do echo "$1" >>{here}/options.txt; shift; done'
    programs(srun=f'{options}; "$@"', scontrol=f'echo "$@" >>{here}/scontrol.txt', scancel="")
    assert run_script(here, "tiny.toml", "a", "model").wait(20) == 0
    pretrain, recover, strip = calls(here)
    # One machine writes the model.
    assert strip == ["strip", "a", "model"]
    assert (here / "options.txt").read_text().split() == ["--nodes=1", "--ntasks=1"]
    # The command line takes both, and again once they are complete.
    for trainer.code, trainer.stop in ((143, 40), (0, None)):
        assert lighthouse(*pretrain).code == trainer.code
    for trainer.code, trainer.stop in ((143, 110), (0, None)):
        assert lighthouse(*pretrain).code == 0 and lighthouse(*recover).code == trainer.code
    assert [name for name, _ in trainer.launches] == ["runs/a"] * 4
    assert lighthouse(*pretrain).code == 0 and lighthouse(*recover).code == 0 and len(trainer.launches) == 4
    # What fails is the last command.
    (here / "calls.txt").unlink()
    programs(srun=f'{options}; "$@"; [ "$2" != recover ] || exit 3')
    assert run_script(here, "tiny.toml", "a", "model").wait(20) == 3
    assert [call[0] for call in calls(here)] == ["pretrain", "recover"] and not (here / "scontrol.txt").exists()
    # Near the time limit no other command begins, though the one before has ended well.
    (here / "calls.txt").unlink()
    programs(srun=f"""trap 'exit 0' TERM; "$@"; touch {here}/ready; while :; do sleep 0.05; done""")
    programs(scancel="kill -TERM $(pgrep -P $PPID -f srun)")
    script = run_script(here, "tiny.toml", "a", "model")
    children.wait_until((here / "ready").exists, script)
    script.send_signal(10)
    assert script.wait(20) == 143 and (here / "scontrol.txt").read_text() == "requeue 7\n"
    assert [call[0] for call in calls(here)] == ["pretrain"]
    # The last command may end well before scancel returns: then there is nothing to queue again.
    (here / "ready").unlink()
    (here / "scontrol.txt").unlink()
    programs(scancel="kill -TERM $(pgrep -P $PPID -f srun); sleep 0.5")
    script = run_script(here, "tiny.toml", "a")
    children.wait_until((here / "ready").exists, script)
    script.send_signal(10)
    assert script.wait(20) == 0 and not (here / "scontrol.txt").exists()


def test_the_job_for_kubernetes(lighthouse, trainer, here, programs, monkeypatch):
    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    environment = {one["name"]: one["value"] for one in container["env"]}
    # The name of the first pod: JOB-0, in the domain of the service.
    name, namespace = service["metadata"]["name"], "default"
    assert service["spec"]["clusterIP"] == "None" and pod["subdomain"] == name
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    host = f"{job['metadata']['name']}-0.{name}.{namespace}.svc.cluster.local"
    assert environment["ENDPOINT"].partition(":")[0] == host
    assert job["spec"]["completionMode"] == "Indexed"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    for index in ("0", "1"):
        given = {**os.environ, **environment, "RECIPE": "tiny.toml", "JOB_COMPLETION_INDEX": index}
        subprocess.run([*container["command"], *container["args"]], cwd=here, env=given, check=True)
    count = job["spec"]["completions"]
    assert job["spec"]["parallelism"] == count
    first, second = calls(here)
    # The command line takes it, on pod 1 and, after ends before a checkpoint and after one, on pod 0.
    lighthouse(*second)
    assert trainer.launches == [("runs/my-run", Plan(1, count, 1, environment["ENDPOINT"]))]
    asked = [trainer.asked.facts]
    place = first.index(environment["ENDPOINT"])
    first[place] = "127.0.0.1:29500"
    trainer.rows = [{"step": 1, "stage": "lighthouse", "leaky": True, "loss": 1.0}]
    for trainer.code, trainer.stop in ((1, None), (143, 40), (0, None)):
        assert lighthouse(*first).code == trainer.code
        asked.append(trainer.asked.facts)
    assert asked == [asked[0]] * 4
    # The longest pause between two pods of an index, which the others wait for.
    assert trainer.asked.seconds > 600


def test_the_job_for_kubernetes_ends_with_a_users_mistake():
    _, job = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    rules = job["spec"]["podFailurePolicy"]["rules"]
    [container] = job["spec"]["template"]["spec"]["containers"]
    [found] = [rule["onExitCodes"] for rule in rules if rule["action"] == "FailJob"]
    assert found == {"containerName": container["name"], "operator": "In", "values": [UserError.exit_code]}
    # Kubernetes takes such a policy with this alone.
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"


SRUN = """
[ "$1" = --cpus-per-task=1 ] && shift
tasks=() ranks=(0 1)
[ "$1 $2" = "--nodes=1 --ntasks=1" ] && ranks=(0) && shift 2
for task in "${ranks[@]}"; do
  SLURM_STEP_ID=0 SLURM_STEP_NUM_NODES=${#ranks[@]} SLURM_STEP_TASKS_PER_NODE="1(x${#ranks[@]})" \
    SLURM_STEP_NODELIST='node[1-2]' \
    SLURM_PROCID=$task SLURM_NODEID=$task "$@" &
  tasks+=($!)
done
code=0
for task in "${tasks[@]}"; do wait $task || code=$?; done
exit $code
"""


@pytest.mark.slow
def test_two_machines_train_by_the_script_for_slurm(here, programs):
    programs(
        srun=SRUN,
        scontrol="[ \"$*\" = 'show hostnames node[1-2]' ] && printf '127.0.0.1\\n127.0.0.2\\n'",
        lighthouse=f'exec {sys.executable} -P -m lighthouse_cli "$@"',
    )
    text = (here / "tiny.toml").read_text()
    data = '[data]\nsource = "files"\npaths = ["text.txt"]\nvalidation = 0.0\n'
    (here / "text.txt").write_text("".join(f"line {number} of a text\n" for number in range(2000)))
    text = text.replace("steps = 100", "steps = 2").replace("steps = 20", "steps = 2").replace("[data]\n", data)
    (here / "tiny.toml").write_text(text.replace("[data]\n", "[metrics]\nevery = 1\n[data]\n"))
    job = str(time.time_ns() % 10**8)
    threads = {"SLURM_CPUS_PER_TASK": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    script = run_script(here, "tiny.toml", "a", "model", SLURM_JOB_ID=job, **threads)
    assert script.wait(230) == 0
    rows = [json.loads(line) for line in (here / "runs/a/metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows if "loss" in row] == ["lighthouse"] * 2 + ["dense"] * 2
    assert (here / "runs/a/checkpoints/step-4").is_dir() and (here / "runs/a/logs/rank1.log").exists()
    assert (here / "model/model.safetensors").exists()
