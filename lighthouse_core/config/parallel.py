"""[parallel]: how the processes share the model."""

from pydantic import model_validator

from lighthouse_core.config.section import Positive, Section, conflict


class ParallelSection(Section):
    """`shard` is the FSDP degree, -1 for all processes; `replicate` copies of that group train side by side."""

    shard: int = -1
    replicate: Positive = 1

    @model_validator(mode="after")
    def _check(self) -> "ParallelSection":
        if self.shard != -1 and self.shard < 1:
            raise conflict("shard", f"parallel.shard must be -1 (all processes) or at least 1, not {self.shard}")
        return self
