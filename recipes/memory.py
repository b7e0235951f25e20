"""The memory estimate beside every peak that was measured, as Markdown.

    python recipes/memory.py            print the tables of docs/memory.md
    python recipes/memory.py --write    put them into that page

A measured peak is a `memory_gib` in recipes/results or in recipes/evidence/results: what torch's allocator reserved in
one process. What ran is a whole `recipe`, or the name of one with its `settings` or its `command`, and the conditions
that were noted with it.
"""

import argparse
import itertools
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lighthouse_core.config import Recipe, load_recipe
from lighthouse_core.config.phases import of_older_run
from lighthouse_core.estimate import process_bytes

_HERE = Path(__file__).parent
PAGE = _HERE.parent / "docs/memory.md"
# What a run's conditions decide whatever its recipe says today.
_CONDITIONS = ("activation_checkpointing", "local_batch_size", "compile")
# Runs whose model is not in a recipe: Llama 3.2 1B's shape, as a directory had it.
_EXTENSION = "2026-11-30-h200-extension"
_LLAMA_1B = (
    *("model.dim=2048", "model.layers=16", "model.heads=32", "model.kv_heads=8", "model.head_dim=64"),
    *("model.ffn_dim=8192", "model.vocab_size=128256", "model.tied_embeddings=true", 'data.tokenizer="bytes"'),
)
_PYRAMID = ('lighthouse.method="pyramid"', "lighthouse.phases=[]", "lighthouse.window=512", "lighthouse.topk=2048")
_MADE_WITH = (
    (),
    (*_PYRAMID, 'lighthouse.scorer="random"'),
    (*_PYRAMID, 'lighthouse.scorer="random"', 'training.activation_checkpointing="full"'),
)


class Row(NamedTuple):
    """A peak.

    Attributes:
        recipe: that ran.
        stage: "lighthouse" or "dense".
        processes: of the job.
        measured: GiB.
        source: file below recipes/.
    """

    recipe: Recipe
    stage: str
    processes: int
    measured: float
    source: str

    @property
    def estimate(self) -> float:
        """GiB."""
        return process_bytes(self.recipe, self.processes)[self.stage] / 2**30

    @property
    def error(self) -> float:
        """Of the estimate, as a share of what was measured."""
        return self.estimate / self.measured - 1


def rows() -> Iterator[Row]:
    """Every measured peak, by file."""
    results, evidence = _HERE / "results", _HERE / "evidence/results"
    files = results.glob("*.json"), results.glob("*/*/results.json"), evidence.glob("*.json")
    for path in itertools.chain.from_iterable(map(sorted, files)):
        found = json.loads(path.read_text(encoding="utf-8"))
        source = path.relative_to(_HERE).as_posix()
        for item in found if isinstance(found, list) else _items(found):
            yield from _of(item, source)


def _items(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What was run, of a file that holds an object."""
    runs = found.get("runs", found.get("steps", []))
    yield from runs.values() if isinstance(runs, dict) else runs


def _of(item: dict[str, Any], source: str) -> Iterator[Row]:
    """The peak of each stage."""
    if "memory_gib" in item:
        made, conditions = _recipe(item, source), item.get("conditions", item.get("machine", {}))
        stage = item.get("stage", "lighthouse" if made.lighthouse.enabled else "dense")
        yield Row(_under(made, conditions), stage, conditions["devices"], item["memory_gib"], source)
        return
    peaks: dict[str, float] = {}
    for row in item.get("rows", ()):
        if "memory_gib" in row:
            peaks[row["stage"]] = max(row["memory_gib"], peaks.get(row["stage"], 0.0))
    for stage, peak in peaks.items():
        kept = [one["conditions"] for one in item.get("ledger", {}).get("stages", ()) if one["stage"] == stage]
        conditions = kept[-1] if kept else {}
        yield Row(_under(_recipe(item, source), conditions), stage, conditions.get("devices", 1), peak, source)


def _recipe(item: dict[str, Any], source: str) -> Recipe:
    """What ran."""
    ran, command = item.get("recipe"), item.get("command", [])
    if isinstance(ran, dict):
        return Recipe.model_validate(of_older_run(ran))
    if source == f"results/{_EXTENSION}.json":
        about = item.get("about", "")
        made = _MADE_WITH[0 if not about else 2 if "full checkpointing" in about else 1]
        return load_recipe(_HERE / "extend_131072.toml", (*_LLAMA_1B, *made))
    words = shlex.split(command) if isinstance(command, str) else command
    settings = item.get("settings") or [value for name, value in itertools.pairwise(words) if name == "--set"]
    # As an earlier release named the phases that a setting took away.
    settings = [setting.replace("lighthouse.windows=[]", "lighthouse.phases=[]") for setting in settings]
    # `lighthouse pretrain RECIPE ...`
    return load_recipe(_HERE / f"{ran or Path(words[2]).stem}.toml", settings)


def _under(recipe: Recipe, conditions: dict[str, Any]) -> Recipe:
    """The recipe under the conditions that were noted."""
    changed = {key: conditions[key] for key in _CONDITIONS if key in conditions}
    parallel = {"context": conditions["context"]} if "context" in conditions else {}
    return recipe.model_copy(
        update={
            "training": recipe.training.model_copy(update=changed),
            "parallel": recipe.parallel.model_copy(update=parallel),
        }
    )


def _attention(row: Row) -> str:
    """Of stage 1, in a few words."""
    if row.stage == "dense":
        return "dense"
    # Of several methods, that of the last phase that is not dense.
    cfg = row.recipe.sparse_phases[-1].attention
    window = ", ".join(phase.window_words for phase in row.recipe.phases if phase.window_words)
    kept = f", keep {cfg.keep}" if cfg.rule.keeps_blocks and cfg.keep else ""
    budget = ", budget" if cfg.rule.chooses_blocks and row.recipe.lighthouse.budget.every else ""
    return f"{cfg.method}{kept}{budget}" + (f", window {window}" if window else "")


def measured_table() -> str:
    """Estimate and measurement. Runs that differ in nothing here are one line."""
    lines = [
        "| attention | dense layers | parameters | tokens | checkpointing | GPUs | share a sequence | estimate GiB "
        "| measured GiB | error | runs | source |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    found: Counter[str] = Counter()
    for row in rows():
        recipe, training = row.recipe, row.recipe.training
        every = recipe.model.layers
        dense = every if row.stage == "dense" else len(recipe.model.dense_layers)
        millions = recipe.model.kind.parameters(recipe.model).total / 1e6
        batch = f"{training.local_batch_size} x " if training.local_batch_size > 1 else ""
        name = row.source.removesuffix("/results.json").removeprefix("results/").removesuffix(".json")
        name = name.removeprefix("evidence/results/")
        line = (
            f"| {_attention(row)} | {dense} of {every} | {millions:.0f}M | {batch}{training.seq_len} "
            f"| {training.activation_checkpointing} | {row.processes} | {recipe.parallel.context} "
            f"| {row.estimate:.1f} | {row.measured:.1f} | {row.error:+.1%} | {{runs}} "
            f"| [{name}](../recipes/{row.source}) |"
        )
        found[line] += 1
    return "\n".join([*lines, *(line.replace("{runs}", str(count)) for line, count in found.items())])


_EFFECTS: tuple[tuple[str, str, int], ...] = (
    ("as it is", "", 1),
    ('`training.activation_checkpointing = "none"`', 'training.activation_checkpointing="none"', 1),
    ('`training.activation_checkpointing = "attention"`', 'training.activation_checkpointing="attention"', 1),
    ('`training.activation_checkpointing = "full"`', 'training.activation_checkpointing="full"', 1),
    ("`training.local_batch_size = 2`", "training.local_batch_size=2", 1),
    ("`training.loss_chunk = 8192`", "training.loss_chunk=8192", 1),
    ("eight GPUs, `parallel.shard = -1` (FSDP, the default)", "", 8),
    ("eight GPUs, `parallel.replicate = 2` (HSDP)", "parallel.replicate=2", 8),
    ("eight GPUs, `parallel.shard = 1`, `parallel.replicate = 8` (DDP)", "parallel={shard=1, replicate=8}", 8),
    ("eight GPUs, `parallel.context = 8`", "parallel.context=8", 8),
)


def effects_table() -> str:
    """What settings do to one recipe."""
    lines = ["| `530m_98k` with | stage 1, GiB | recovery, GiB |", "|---|---|---|"]
    for words, setting, processes in _EFFECTS:
        recipe = load_recipe(_HERE / "530m_98k.toml", [setting] if setting else [])
        sizes = process_bytes(recipe, processes)
        lines.append(f"| {words} | {sizes['lighthouse'] / 2**30:.1f} | {sizes['dense'] / 2**30:.1f} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with its tables made anew."""
    for name, table in (("effects", effects_table()), ("measured", measured_table())):
        text, count = re.subn(rf"(<!-- {name} -->\n).*?(\n<!-- end -->)", rf"\g<1>{table}\g<2>", text, flags=re.DOTALL)
        assert count == 1, name
    return text


def main() -> None:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(f"{effects_table()}\n\n{measured_table()}")


if __name__ == "__main__":
    main()
