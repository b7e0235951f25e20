"""How many tokens a second each source gives: python tests/data_speed.py FOLDER [TOKENIZER ...]

Writes about 100 MB of the standard library's text to FOLDER in every form, and prints a row a source and tokenizer:
one process, and two ranks at once (tokens of both together; where each walks the stream, both tokenize all of it). The
rows also go to FOLDER/data_speed.json.
"""

import itertools
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

TOKENS = 1 << 24
SEQ = 8192


def measure(settings: str, rank: int, ranks: int) -> float:
    """Tokens a second of one rank, from its second batch on."""
    from lighthouse_core.data.loader import build_loader

    loader = build_loader(SimpleNamespace(**json.loads(settings)), SEQ, 4, rank, ranks, 0)
    batches = iter(loader)
    next(batches)
    begun, count = time.perf_counter(), 0
    for _ in itertools.islice(batches, TOKENS // SEQ // 4):
        count += 4 * SEQ
        if time.perf_counter() - begun > 10:
            break
    return count / (time.perf_counter() - begun)


def write(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lighthouse_core.data.sources import list_documents

    texts = [document.read().decode("utf-8", "ignore") for document in list_documents(["stdlib"])]
    texts *= max(1, 100_000_000 // sum(map(len, texts)))
    for name in ("text", "lines", "tables"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"text/{number}.txt").write_text(text)
    (folder / "lines/a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pq.write_table(pa.table({"text": texts}), folder / "tables/a.parquet", row_group_size=100)


def main(folder: Path, tokenizers: list[str]) -> None:
    write(folder)
    sources = {
        "python-sources": ("python-sources", "stdlib"),
        "files, .txt": ("files", f"{folder}/text/*.txt"),
        "files, .jsonl": ("files", f"{folder}/lines/*.jsonl"),
        "files, .parquet": ("files", f"{folder}/tables/*.parquet"),
        "hf, local .jsonl": ("hf", f"{folder}/lines"),
        "tokens": ("tokens", None),
    }
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    rows = []
    for tokenizer in ["bytes", *tokenizers]:
        for name, (source, path) in sources.items():
            out = folder / f"tokens-{len(tokenizer)}-{Path(tokenizer).name}"
            if source == "tokens":
                prepare(folder, out, tokenizer)
            settings = json.dumps(
                {
                    "source": source,
                    "paths": [path or str(out)],
                    "tokenizer": tokenizer,
                    "shuffle": "auto",
                    "validation": 0.0,
                    "text_key": "text",
                    "hf_config": "",
                    "hf_split": "train",
                    "hf_revision": "",
                }
            )
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
    (folder / "data_speed.json").write_text(json.dumps({"machine": machine, "tokens_a_second": rows}, indent=1))


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
        print(measure(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
    else:
        main(Path(sys.argv[1]).resolve(), sys.argv[2:])
