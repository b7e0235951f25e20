"""What may be deleted of a run that came to nothing: what no run makes itself is somebody else's. No torch here."""

import re
from pathlib import Path

from lighthouse_core.config.origin import DESCRIPTIONS, ORIGIN, TOKENIZER
from lighthouse_core.data.tokenizers.huggingface import COMPANIONS

# What `pretrain` makes of files before the first checkpoint, below a run, with the temporary names that they may have.
_OWN = re.compile(
    rf"(recipe\.toml|environment\.json|ledger\.json|metrics\.jsonl|tokenizer\.(json|model)|wandb-id"
    rf"|{'|'.join(map(re.escape, COMPANIONS))}"
    rf"|{ORIGIN}/({'|'.join(map(re.escape, DESCRIPTIONS))})|{TOKENIZER}/({'|'.join(map(re.escape, DESCRIPTIONS))})"
    r"|logs/(rank[0-9]+\.log|machines\.json)|tb/([^/]+/)?events\.out\.tfevents\.[^/]+|wandb/.*"
    r"|\.(recipe\.toml|environment\.json|ledger\.json|metrics\.jsonl|wandb-id)\.[0-9a-f]+"
    r"|checkpoints/\.step-[0-9]+\.(saving|deleting)/.*)"
)


def foreign(path: Path) -> str | None:
    """The first thing in the folder of a run that no run makes before its first checkpoint.

    Weights & Biases makes links in its folder. They go with it, and what they lead to stays.
    """
    for found in sorted(path.rglob("*")):
        name = found.relative_to(path).as_posix()
        linked = found.is_symlink() and not name.startswith("wandb/")
        if linked or (not found.is_dir() and not _OWN.fullmatch(name)):
            return name
        # Of folders, only those of a checkpoint tell anything.
        if found.is_dir() and re.fullmatch(r"checkpoints/[^.][^/]*", name):
            return name
    return None
