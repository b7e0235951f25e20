"""[parallel]: how the processes share the model."""

from typing import Annotated

from pydantic import Field, model_validator

from lighthouse_core.config.section import Section, conflict


class ParallelSection(Section):
    """`context` processes share each sequence. `shard` is the FSDP degree over groups of such, -1 for all of them;
    `replicate` copies of all that train side by side. Weights are sharded over shard x context processes.

    A process, or a machine, that does not answer for `hang_seconds` ends the job.
    """

    shard: Annotated[int, Field(le=10**6)] = -1
    replicate: Annotated[int, Field(gt=0, le=10**6)] = 1
    context: Annotated[int, Field(gt=0, le=10**6)] = 1
    hang_seconds: Annotated[int, Field(gt=0, le=10**7)] = 60

    @model_validator(mode="after")
    def _check(self) -> "ParallelSection":
        if self.shard != -1 and self.shard < 1:
            raise conflict("shard", f"parallel.shard must be -1 (all processes) or at least 1, not {self.shard}")
        return self
