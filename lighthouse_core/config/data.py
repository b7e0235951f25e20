"""[data]: which text, which tokens, how much of it is held out."""

from typing import Annotated, Literal

from pydantic import Field

from lighthouse_core.config.section import Section, Strings


class DataSection(Section):
    """`validation` is the share of folders held out, 0 <= validation < 1."""

    source: Literal["python-sources"] = "python-sources"
    paths: Annotated[Strings, Field(min_length=1)] = ("stdlib",)
    tokenizer: Literal["bytes"] = "bytes"
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.05
