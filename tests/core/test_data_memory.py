"""Streaming a file far larger than it may take in memory."""

import gzip
import json
import shutil
import subprocess
import sys

import pytest

SIZE = 2 << 30
# Resident memory before the first batch, and then every 64 MB of tokens.
SCRIPT = """
import itertools, sys, time
from lighthouse_core.config.data import DataSection
from lighthouse_core.data.loader import build_loader

def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096

source, path, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
data = DataSection(source=source, paths=[path], shuffle="documents", validation=0.01)
loader = build_loader(data, 65536, 2, 0, 1, 0)
print(resident(), 0, flush=True)
begun = time.monotonic()
for number, batch in enumerate(itertools.islice(loader, size // 2**17), 1):
    if number % 512 == 0:
        print(resident(), loader.state_dict()["epoch"], flush=True)
print(f"{number * 2**17 / (time.monotonic() - begun) / 1e6:.1f}", file=sys.stderr)
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


def measure(path, size):
    """[(resident bytes, epoch)] while `size` tokens of the file are read."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "files", str(path), str(size)], capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    rows = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    print(path.name, "resident MB:", *(f"{row[0] / 1e6:.1f}" for row in rows))
    print(path.name, "million tokens a second:", done.stderr.splitlines()[-1])
    return rows


@pytest.fixture(params=["a.jsonl", "a.jsonl.gz", "members.jsonl.gz", "a.jsonl.zst", "a.json", "a.csv.gz"])
def packed(large, request):
    """The text of `large` in another kind of file."""
    import pyarrow as pa

    path = large.with_name(request.param)
    if path == large:
        yield path
        return
    with open(large, "rb") as source, open(path, "wb") as file:
        if path.suffix == ".json":
            for number, line in enumerate(source):
                file.write((b"," if number else b"[") + line)
            file.write(b"]")
        elif path.suffix == ".zst":
            with pa.CompressedOutputStream(file, "zstd") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        elif path.name == "members.jsonl.gz":
            while block := source.read(1 << 26):
                file.write(gzip.compress(block, 1))
        else:
            with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1) as target:
                if ".csv" in path.name:
                    target.write(b"text\n")
                    for line in source:
                        target.write(b'"' + json.loads(line)["text"].encode() + b'"\n')
                else:
                    shutil.copyfileobj(source, target, 1 << 20)
    yield path
    path.unlink()


@pytest.mark.slow
def test_resident_memory_is_constant_over_2_gb_of_rows(packed):
    rows = measure(packed, SIZE)
    # The first tokens warm the buffers up.
    resident = [row[0] for row in rows][2:]
    # Escapes and keys make the file larger than its text, so this many tokens are the whole of it and a little more.
    assert len(resident) > 25 and rows[-1][1] == 1
    assert max(resident) <= 1.05 * min(resident)


@pytest.mark.slow
def test_a_large_text_is_held_in_parts(tmp_path):
    """Batches ahead, a few parts of 4 MB and their ids: not the 420 MB of the file, or its ids."""
    path = tmp_path / "a.txt"
    with open(path, "w") as f:
        for _ in range(400):
            f.write("a line of text\n" * 70_000)
    rows = measure(path, 450 << 20)
    path.unlink()
    assert rows[-1][1] == 1
    assert max(row[0] for row in rows) - rows[0][0] < 200e6
