"""Streaming a file far larger than it may take in memory."""

import json
import subprocess
import sys

import pytest

SIZE = 2 << 30
# Resident memory every 64 MB of tokens, from the second on: the first warms the buffers up.
SCRIPT = """
import itertools, sys
from types import SimpleNamespace
from lighthouse_core.data.loader import build_loader

def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096

source, path, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
data = SimpleNamespace(
    source=source, paths=[path], tokenizer="bytes", validation=0.01, text_key="text",
    hf_config="", hf_split="train", hf_revision="",
)
loader = build_loader(data, 65536, 2, 0, 1, 0)
for number, batch in enumerate(itertools.islice(loader, size // 2**17), 1):
    if number % 512 == 0:
        print(resident(), loader.state_dict()["epoch"], flush=True)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "a.jsonl"
    block = "".join(json.dumps({"text": "a line of text\n" * (i % 400)}) + "\n" for i in range(2000))
    with open(path, "w") as f:
        while f.tell() < SIZE:
            f.write(block)
    yield path
    path.unlink()


@pytest.mark.slow
def test_resident_memory_is_constant_over_2_gb_of_lines(large):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "files", str(large), str(SIZE)], capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    rows = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    resident = [row[0] for row in rows][1:]
    print("resident MB:", *(f"{one / 1e6:.1f}" for one in resident))
    # Escapes and keys make the file larger than its text, so this many tokens are the whole of it and a little more.
    assert len(resident) > 25 and rows[-1][1] == 1
    assert max(resident) <= 1.05 * min(resident)
