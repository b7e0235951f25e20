"""What every section shares: strictness, the types of its numbers, and how a check names the key it is about."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

# TOML gives lists; the outer type is lax so that a list becomes a tuple, the items stay strict.
Ints = Annotated[tuple[int, ...], Field(strict=False)]
Strings = Annotated[tuple[str, ...], Field(strict=False)]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """One table of a recipe. An integer is accepted for a float (TOML writes 1 for 1.0); nothing else is converted."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


def conflict(key: str, message: str) -> PydanticCustomError:
    """An error of a check over several keys, blamed on one of them.

    Args:
        key: relative to the model that raises: `heads` inside a section, `training.seq_len` in the recipe.
        message: a whole sentence that names keys in full.
    """
    return PydanticCustomError("conflict", "{message}", {"key": key, "message": message})
