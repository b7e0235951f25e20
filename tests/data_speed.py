"""How many tokens a second each source gives: python tests/data_speed.py FOLDER [TOKENIZER ...]

Writes about 100 MB of the standard library's text to FOLDER in every form, and prints a row a source and tokenizer:
one process, and two ranks at once (tokens of both together; where each walks the stream, both tokenize all of it). The
rows also go to FOLDER/data_speed.json.

    OMP_NUM_THREADS=1 python tests/data_speed.py FOLDER --cpu

measures instead tokens per second of processor time, all threads together, of one process with the tokenizer "bytes":
the kinds of files, each read whole; the median of three processes. Other work on the machine matters less to it.
"""

import csv
import gzip
import io
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

TOKENS = 1 << 24
SEQ = 8192
MACHINE = {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}


def measure(settings: str, rank: int, ranks: int, tokens: int = TOKENS, cpu: bool = False) -> float:
    """Tokens a second of one rank, from its second batch on; with `cpu`, a second of processor time."""
    clock = time.process_time if cpu else time.perf_counter
    from lighthouse_core.config.data import DataSection
    from lighthouse_core.data.loader import build_loader

    loader = build_loader(DataSection(**json.loads(settings)), SEQ, 4, rank, ranks, 0)
    batches = iter(loader)
    next(batches)
    begun, count = clock(), 0
    for _ in itertools.islice(batches, tokens // SEQ // 4):
        count += 4 * SEQ
        if not cpu and clock() - begun > 10:
            break
    return count / (clock() - begun)


def write(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lighthouse_core.data.sources import list_documents

    texts = [document.read().decode("utf-8", "ignore") for document in list_documents(["stdlib"])]
    texts *= max(1, 100_000_000 // sum(map(len, texts)))
    for name in ("text", "lines", "tables", "packed", "hub"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"text/{number}.txt").write_text(text)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (folder / "lines/a.jsonl").write_bytes(lines)
    (folder / "hub/a.jsonl").write_bytes(lines)
    (folder / "lines/a.json").write_text(json.dumps([{"text": text} for text in texts]))
    rows = io.StringIO(newline="")
    csv.writer(rows).writerows([["text"], *([text] for text in texts)])
    (folder / "tables/a.csv").write_bytes(table := rows.getvalue().encode())
    (folder / "packed/a.csv.gz").write_bytes(gzip.compress(table))
    (folder / "packed/a.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "packed/a.jsonl.zst").write_bytes(pa.compress(lines, codec="zstd", asbytes=True))
    pq.write_table(pa.table({"text": texts}), folder / "tables/a.parquet", row_group_size=100)


def sources_of(folder: Path) -> dict[str, tuple[str, str | None]]:
    return {
        "python-sources": ("python-sources", "stdlib"),
        "files, .txt": ("files", f"{folder}/text/*.txt"),
        "files, .jsonl": ("files", f"{folder}/lines/*.jsonl"),
        "files, .jsonl.gz": ("files", f"{folder}/packed/*.jsonl.gz"),
        "files, .jsonl.zst": ("files", f"{folder}/packed/*.zst"),
        "files, .json": ("files", f"{folder}/lines/*.json"),
        "files, .csv": ("files", f"{folder}/tables/*.csv"),
        "files, .csv.gz": ("files", f"{folder}/packed/*.csv.gz"),
        "files, .parquet": ("files", f"{folder}/tables/*.parquet"),
        "hf, local .jsonl": ("hf", f"{folder}/hub"),
        "tokens": ("tokens", None),
    }


def settings_of(source: str, path: str, tokenizer: str) -> str:
    return json.dumps(
        {
            "source": source,
            "paths": [path],
            "tokenizer": tokenizer,
            "shuffle": "auto",
            "validation": 0.0,
            "text_key": "text",
            "hf_config": "",
            "hf_split": "train",
            "hf_revision": "",
        }
    )


def main_cpu(folder: Path) -> None:
    write(folder)
    tokens = sum(file.stat().st_size for file in (folder / "text").iterdir())
    rows = []
    for name, (source, path) in sources_of(folder).items():
        if source != "files":
            continue
        command = [sys.executable, __file__, "--rank", settings_of(source, path, "bytes"), "0", "1", str(tokens)]
        runs = [float(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(3)]
        rows.append({"tokenizer": "bytes", "source": name, "runs": runs, "median": statistics.median(runs)})
        print(f"{name:18} {rows[-1]['median']:14,.0f}", flush=True)
    (folder / "data_speed.json").write_text(json.dumps({"machine": MACHINE, "tokens_a_cpu_second": rows}, indent=1))


def main(folder: Path, tokenizers: list[str]) -> None:
    write(folder)
    sources = sources_of(folder)
    rows = []
    for tokenizer in ["bytes", *tokenizers]:
        for name, (source, path) in sources.items():
            out = folder / f"tokens-{len(tokenizer)}-{Path(tokenizer).name}"
            if source == "tokens":
                prepare(folder, out, tokenizer)
            settings = settings_of(source, path or str(out), tokenizer)
            rates = []
            for ranks in (1, 2):
                command = [sys.executable, __file__, "--rank", settings]
                running = [
                    subprocess.Popen([*command, str(rank), str(ranks)], stdout=subprocess.PIPE, text=True)
                    for rank in range(ranks)
                ]
                rates.append(sum(float(process.communicate()[0]) for process in running))
                assert not any(process.returncode for process in running)
            print(f"{Path(tokenizer).name:24} {name:18} {rates[0]:14,.0f} {rates[1]:14,.0f}", flush=True)
            row = {
                "tokenizer": Path(tokenizer).name,
                "source": name,
                "one_process": rates[0],
                "two_processes": rates[1],
            }
            rows.append(row)
    (folder / "data_speed.json").write_text(json.dumps({"machine": MACHINE, "tokens_a_second": rows}, indent=1))


def prepare(folder: Path, out: Path, tokenizer: str) -> None:
    settings = [
        'data.source="files"',
        f'data.paths=["{folder}/lines/*.jsonl"]',
        f'data.tokenizer="{tokenizer}"',
        "data.validation=0.0",
        "model.vocab_size=100000",
    ]
    options = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "lighthouse_cli", "data", "prepare", "quickstart", str(out), *options]
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    print(f"prepared in {time.perf_counter() - begun:.1f} s: {done.stderr.splitlines()[-4]}")


if __name__ == "__main__":
    if sys.argv[1] == "--rank":
        settings, *numbers = sys.argv[2:]
        rank, ranks, *tokens = map(int, numbers)
        print(measure(settings, rank, ranks, *tokens, cpu=bool(tokens)))
    elif sys.argv[2:] == ["--cpu"]:
        main_cpu(Path(sys.argv[1]).resolve())
    else:
        main(Path(sys.argv[1]).resolve(), sys.argv[2:])
