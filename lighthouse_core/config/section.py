"""What every section shares: strictness, the types of its numbers, and how a check names the key it is about."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from lighthouse_core.config.positions import KeyPath

# TOML gives lists; the outer type is lax so that a list becomes a tuple, the items stay strict.
Ints = Annotated[tuple[int, ...], Field(strict=False)]
Strings = Annotated[tuple[str, ...], Field(strict=False)]


def _path(text: str) -> str:
    if "\0" in text:
        raise PydanticCustomError("nul", "a path cannot hold the character NUL")
    if len(text.encode("utf-8", "surrogatepass")) > _LONGEST_PATH:
        raise PydanticCustomError("long", "a path has at most {most} bytes", {"most": _LONGEST_PATH})
    return text


# Linux's PATH_MAX, less the byte that ends a path.
_LONGEST_PATH = 4095
PathText = Annotated[str, Field(min_length=1), AfterValidator(_path)]
PathOrNothing = Annotated[str, AfterValidator(_path)]
Paths = Annotated[tuple[PathText, ...], Field(strict=False, min_length=1)]
# Of steps, batches and the like: far beyond use, and far below what arithmetic in 64 bits can hold.
MOST = 10**9
# Of tokens in a sequence, a part of one, or an evaluation.
MOST_TOKENS = 2**30
Positive = Annotated[int, Field(gt=0, le=MOST)]
NonNegative = Annotated[int, Field(ge=0, le=MOST)]
PositiveTokens = Annotated[int, Field(gt=0, le=MOST_TOKENS)]
PositiveFloat = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """One table of a recipe. An integer is accepted for a float (TOML writes 1 for 1.0); nothing else is converted."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, serialize_by_alias=True, validate_by_name=False
    )

    @classmethod
    def names_of_keys(cls) -> list[str]:
        """Of the table, in order."""
        return [field.alias or name for name, field in cls.model_fields.items()]


def conflict(key: str | KeyPath, message: str) -> PydanticCustomError:
    """An error of a check over several keys, blamed on one of them.

    Args:
        key: relative to the model that raises: `heads` inside a section, `training.seq_len` in the recipe; the parts
            where an index is one of them.
        message: a whole sentence that names keys in full.
    """
    path = tuple(key.split(".")) if isinstance(key, str) else key
    return PydanticCustomError("conflict", "{message}", {"path": path, "message": message})
