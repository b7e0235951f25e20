"""[output]: where runs live."""

from typing import Annotated

from pydantic import Field

from lighthouse_core.config.section import Section


class OutputSection(Section):
    """`name` empty: the recipe's stem and the UTC time."""

    dir: Annotated[str, Field(min_length=1)] = "runs"
    name: str = ""
