"""[parallel]: how the processes share the model."""

from pydantic import model_validator

from lighthouse_core.config.section import Positive, Section, conflict


class ParallelSection(Section):
    """`shard` is the FSDP degree, -1 for all processes; `replicate` copies of that group train side by side.

    A process that does not answer for `hang_seconds` ends the job.
    """

    shard: int = -1
    replicate: Positive = 1
    hang_seconds: Positive = 60

    @model_validator(mode="after")
    def _check(self) -> "ParallelSection":
        if self.shard != -1 and self.shard < 1:
            raise conflict("shard", f"parallel.shard must be -1 (all processes) or at least 1, not {self.shard}")
        return self
