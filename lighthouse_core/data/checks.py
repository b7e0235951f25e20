"""What can be found wrong with a recipe's data before any process starts."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lighthouse_core.config.origin import ORIGIN, other_end, read_origin
from lighthouse_core.data.build import build_streams, of_source, open_tokens
from lighthouse_core.data.documents import Split, TimeIsUp, Tokenizer, timely
from lighthouse_core.data.stream import WalkingStream
from lighthouse_core.data.tokenizer import build_tokenizer
from lighthouse_core.errors import DataError

if TYPE_CHECKING:
    from lighthouse_core.config import Recipe

# A source of text is read up to its first document of each split, but no longer than this.
_SECONDS = 20.0


def check(recipe: "Recipe", say: Callable[[str], None] | None = None, *, checksums: bool = True) -> list[str]:
    """Check that the tokenizer loads and fits the model, and that each split has documents; verify prepared tokens.

    Args:
        recipe: its [data], its model's vocabulary.
        say: called with a line every few seconds, should the checksums take long.
        checksums: whether prepared tokens are read and compared with theirs; their headers always are.

    Returns:
        What a user should know: what was not checked, and an EOS that the model does not end with; a sentence each.

    Raises:
        DataError: what is wrong.
        RecipeError: a description of the weights that the model begins with cannot be read.
    """
    tokenizer = checked_tokenizer(recipe)
    notes = _ends(recipe, tokenizer)
    for part in recipe.data.parts:
        if part.source == "tokens":
            tokens = open_tokens(part, tokenizer)
            if checksums:
                tokens.verify(say, remember=True)
    splits: tuple[Split, ...] = ("train", "validation") if recipe.data.validation else ("train",)
    for split in splits:
        streams, _ = build_streams(recipe.data, tokenizer, recipe.training.seed, split, align=recipe.alignment)
        for name, stream in zip(recipe.data.names, streams, strict=True):
            with of_source(recipe.data, name):
                found = not isinstance(stream, WalkingStream) or _has_document(stream)
            if not found:
                of = f" of source {name}" if recipe.data.sources else ""
                notes.append(
                    f"no document{of} for {split} found in {_SECONDS:.0f} seconds; the first batch may take long"
                )
    return notes


def checked_tokenizer(recipe: "Recipe") -> Tokenizer:
    """The recipe's tokenizer.

    Raises:
        DataError: it cannot be loaded, or has more ids than the model has rows.
    """
    tokenizer = build_tokenizer(recipe.data.tokenizer)
    if tokenizer.vocab_size > recipe.model.vocab_size:
        raise DataError(
            f"model.vocab_size = {recipe.model.vocab_size} is less than the {tokenizer.vocab_size} ids of the "
            f"tokenizer {recipe.data.tokenizer}",
            hint="the weights have no row for the other ids: name another data.tokenizer"
            if recipe.model.origin
            else f"set model.vocab_size to at least {tokenizer.vocab_size}",
        )
    return tokenizer


def _ends(recipe: "Recipe", tokenizer: Tokenizer) -> list[str]:
    """What to say where a model goes on with its own tokenizer, and documents end in an EOS that does not stop it."""
    name = recipe.model.origin
    # A run that is resumed need not have the weights any more that it began with.
    if not name or not Path(name).exists():
        return []
    origin = read_origin(name)
    folder = origin.path / ORIGIN if origin.run else origin.path
    if origin.tokenizer != recipe.data.tokenizer or not (folder / "config.json").is_file():
        return []
    note = other_end(folder, tokenizer.eos_id)
    return [note] if note else []


def _has_document(stream: WalkingStream) -> bool:
    """False when the time is over before it is known.

    Raises:
        DataError: there is none.
    """
    try:
        next(stream.documents(stream.start, timely(stream.keep, time.monotonic() + _SECONDS)))
    except TimeIsUp:
        return False
    return True
