"""Where the processes of a job meet, and on which network interfaces they listen meanwhile."""

import ipaddress
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import children
import pytest

from lighthouse_core.errors import LighthouseError, UserError
from lighthouse_core.job import network
from lighthouse_core.job.environment import environment
from lighthouse_core.job.plan import Plan, plan

WORKER = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
import torch
from lighthouse_core.job.meeting import meeting

here, rank = Path(__file__).parent, int(os.environ["RANK"])
with meeting():
    torch.distributed.init_process_group(backend="gloo", timeout=timedelta(seconds=60))
group = torch.distributed.new_group(backend="gloo")
total = torch.tensor(rank + 1)
torch.distributed.all_reduce(total, group=group)
(here / f"sum{rank}").write_text(f"{total.item()} of {torch.distributed.get_world_size()}")
while not (here / "go").exists():
    time.sleep(0.02)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
os._exit(0)  # torch takes seconds to be torn down
"""
LAUNCHER = """
import os, sys
from pathlib import Path
from lighthouse_core.job import launch
launch.command = lambda run_dir: [sys.executable, str(run_dir / "worker.py")]
os._exit(launch.launch(Path(sys.argv[1]), launch.Plan(*eval(sys.argv[2]))))
"""


@pytest.fixture
def machines(tmp_path):
    """Starts a launcher for each plan, and lets its processes sum their ranks; returns the launchers."""
    started = []

    def start(*plans: Plan):
        (tmp_path / "worker.py").write_text(textwrap.dedent(WORKER))
        (tmp_path / "run").write_text(LAUNCHER)
        for one in plans:
            words = repr((one.nproc, one.nnodes, one.node_rank, one.rdzv_endpoint))
            command = [sys.executable, tmp_path / "run", tmp_path, words]
            started.append(children.start(command))
        for rank in range(plans[0].world_size):
            children.wait_for(tmp_path / f"sum{rank}", started[0])
        return started

    yield start
    for process in started:
        process.terminate()
        process.wait(30)


def finish(processes, folder: Path) -> None:
    (folder / "go").touch()
    assert [process.wait(60) for process in processes] == [0] * len(processes)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_several_machines_listen_where_the_user_says(machines, tmp_path):
    where = f"127.0.0.1:{free_port()}"
    launchers = machines(*(Plan(1, 2, number, where) for number in (0, 1)))
    assert {(tmp_path / f"sum{rank}").read_text() for rank in (0, 1)} == {"3 of 2"}
    places = [children.listening(children.tree(launcher.pid)) for launcher in launchers]
    assert ("127.0.0.1", int(where.partition(":")[2])) in places[0]
    assert {address for found in places for address, _ in found} == {"127.0.0.1"}
    finish(launchers, tmp_path)


def test_the_interface_of_an_endpoint(monkeypatch):
    assert network.loopback() in dict(socket.if_nameindex()).values()
    assert network.interface_towards("127.0.0.1", 1) == network.loopback()
    assert network.interface_towards("no such name", 1) is None
    monkeypatch.setattr(network, "interface_towards", lambda host, port: {"node7": "ib0"}[host])
    found = environment(Plan(1, 2, 1, "node7:29500"), {}, Path("/e"))
    assert (found["GLOO_SOCKET_IFNAME"], found["NCCL_SOCKET_IFNAME"]) == ("ib0", "=ib0")
    # Of several networks, the user may know a faster one.
    assert environment(Plan(1, 2, 1, "node7:1"), {"NCCL_SOCKET_IFNAME": "ib"}, Path("/e"))["NCCL_SOCKET_IFNAME"] == "ib"
    # One that cannot be told is for the user to name: gloo and NCCL would take any.
    monkeypatch.setattr(network, "interface_towards", lambda host, port: None)
    for given, named in (({}, "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"), ({"GLOO_SOCKET_IFNAME": "e"}, "by NCCL_")):
        with pytest.raises(UserError, match="no network interface of machine 1 is known to lead to node7:1") as caught:
            environment(Plan(1, 2, 1, "node7:1"), given, Path("/e"))
        assert named in caught.value.hint
    both = {"NCCL_SOCKET_IFNAME": "ib", "GLOO_SOCKET_IFNAME": "ib"}
    assert environment(Plan(1, 2, 1, "node7:1"), both, Path("/e")).items() >= both.items()
    alone = environment(Plan(2), {"NCCL_SOCKET_IFNAME": "ib", "GLOO_SOCKET_IFNAME": "ib"}, Path("/e"))
    assert (alone["GLOO_SOCKET_IFNAME"], alone["NCCL_SOCKET_IFNAME"]) == (network.loopback(), f"={network.loopback()}")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the interface is left to torch")
def test_every_address_of_this_machine_has_its_interface():
    found = {}
    for _, name in socket.if_nameindex():
        for line in os.popen(f"ip -o addr show dev {name} 2>/dev/null").read().splitlines():
            address = line.split()[3]
            if not address.startswith("fe80"):
                found[address.partition("/")[0]] = name
    if not found:
        pytest.skip("there is no `ip` to ask")
    for address, name in found.items():
        # The first address of the loopback interface is all that collectives take of it.
        away = name == network.loopback() and not ipaddress.ip_address(address).is_loopback
        assert network.interface_of(address) == (None if away else name)


@pytest.mark.parametrize(
    "where",
    ["", "host", "host:", ":1", "host:0", "host:65536", "host:99999999", "host:-1", "host:1.5", "a b:1", "host:\uff11"],
)
def test_a_place_that_is_none(where):
    with pytest.raises(UserError, match="--rdzv-endpoint HOST:PORT"):
        plan("1", 2, 1, where)


@pytest.mark.parametrize(
    ("host", "address", "words"),
    [
        ("no-such-machine.invalid", None, "this machine knows no no-such-machine.invalid"),
        ("192.0.2.1", "192.0.2.1", "is no address of this machine, which is machine 0"),
        ("0.0.0.0", None, "every network interface"),
        ("0", None, "every network interface"),
        ("[::]", None, "every network interface"),
        ("node0", "127.0.1.1", "node0 is 127.0.1.1 here, which other machines cannot reach"),
    ],
)
def test_machine_0_must_have_the_address_that_the_others_are_given(monkeypatch, host, address, words):
    if address:
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 29500))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **named: found)
    with pytest.raises(UserError, match="--rdzv-endpoint") as caught:
        plan("1", 2, 0, f"{host}:29500")
    assert words in str(caught.value) and "interface of machine 0" in caught.value.hint
    # The others do not have it, and a name may be known later.
    assert plan("1", 2, 1, f"{host}:29500").rdzv_endpoint == f"{host}:29500"


def test_of_several_addresses_machine_0_takes_the_one_that_others_reach(monkeypatch):
    outside = [str(own) for name, own in network._addresses() if name != network.loopback() and own.version == 4]
    if not outside:
        pytest.skip("this machine has the loopback interface alone")
    own, known = outside[0], socket.getaddrinfo

    def look_up(host, port, *given, type=0, **named):
        if host != "node0":
            return known(host, port, *given, type=type, **named)
        # As Debian's /etc/hosts has it, and an address of another machine.
        return [(socket.AF_INET, type, 0, "", (address, port)) for address in ("127.0.1.1", "192.0.2.2", own)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert network.own_address("node0", 29500) == (socket.AF_INET, own)
    with network.listen("node0", free_port(), 2) as listening:
        assert listening.getsockname()[0] == own
    interface = network.interface_of(own)
    assert interface not in (None, network.loopback())
    found = environment(Plan(1, 2, 0, "node0:29500"), {}, Path("/e"))
    assert (found["GLOO_SOCKET_IFNAME"], found["LIGHTHOUSE_MEETING"]) == (interface, f"{own}:29500")
    assert network.interface_towards("node0", 29500) == interface


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the interface is left to torch")
def test_secondary_addresses_and_those_of_the_loopback_interface():
    script = """
        ip link set lo up && ip address add 10.9.9.9/32 dev lo
        ip link add one type bridge && ip link set one up
        ip address add 10.1.1.1/24 dev one && ip address add 10.1.1.2/24 dev one && ip address add fd00::7/64 dev one
        exec "$@"
    """
    code = """
        from lighthouse_core.job.network import interface_of
        places = "127.0.0.1", "10.1.1.1", "10.1.1.2", "fd00::7", "10.9.9.9", "10.8.8.8"
        print(*map(interface_of, places))
    """
    command = ["unshare", "--net", "sh", "-ec", textwrap.dedent(script), "sh", sys.executable, "-c"]
    answer = subprocess.run([*command, textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    if answer.returncode and "Traceback" not in answer.stderr:
        pytest.skip(f"no network namespace can be made: {answer.stderr.strip()}")
    assert answer.stdout == "lo one one one None None\n", answer.stderr


def test_an_ipv6_endpoint():
    assert network.endpoint("[::1]:29500") == ("::1", 29500)
    assert network.endpoint("node-0.cluster:1") == ("node-0.cluster", 1)


def test_a_port_that_is_taken_is_one_line(tmp_path, monkeypatch):
    import datetime

    from lighthouse_core.job import meeting

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen at 127.0.0.1, port {port}: Address already in use"):
            network.listen("127.0.0.1", port, 2)
    with pytest.raises(LighthouseError, match=f"machine 0 does not answer at 127.0.0.1, port {port}"):
        meeting._store(f"127.0.0.1:{port}", 2, datetime.timedelta(seconds=1))
