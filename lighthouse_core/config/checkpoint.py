"""[checkpoint]: how often, and how many are kept."""

from typing import Annotated

from pydantic import Field, model_validator

from lighthouse_core.config.section import NonNegative, Positive, Section, conflict


class CheckpointSection(Section):
    """`interval` in steps; `also` lists further steps that are saved and kept, 0 for the state before the first one;
    `keep` the newest 2 or more, or 0 for all."""

    interval: Positive = 500
    also: Annotated[tuple[NonNegative, ...], Field(strict=False)] = ()
    keep: NonNegative = 2
    async_save: bool = False

    @model_validator(mode="after")
    def _check(self) -> "CheckpointSection":
        if self.keep == 1:
            raise conflict("keep", "checkpoint.keep must be 0 (all) or at least 2: writing one may cost another")
        return self
