"""[training]: lengths, batches, steps, and how the arithmetic is done."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lighthouse_core.config.section import Positive, PositiveTokens, Section, conflict


class TrainingSection(Section):
    """Batch sizes count sequences of `seq_len` tokens; `local_batch_size` is what one process holds at a time.

    `loss_chunk` is how many tokens' logits exist at once: of all of a long sequence they fit no memory.
    `nonfinite` is what becomes of an update whose loss or gradient is NaN or infinite: "halt" ends the run there,
    "skip" leaves it out, and ends the run after `nonfinite_limit` in a row.
    `dtype` is that of the computation; weights, gradients and moments are float32. "float16" is for GPUs without
    bfloat16: the loss is scaled, and an update is left out where that made a gradient overflow, under "halt", too.
    """

    seq_len: PositiveTokens
    local_batch_size: Positive = 1
    global_batch_size: Positive
    steps: Positive
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    compile: bool = False
    loss_chunk: PositiveTokens = 1024
    activation_checkpointing: Literal["none", "selective", "attention", "full"] = "none"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    deterministic: bool = False
    nonfinite: Literal["halt", "skip"] = "halt"
    nonfinite_limit: Positive = 10

    @model_validator(mode="after")
    def _check(self) -> "TrainingSection":
        if self.global_batch_size % self.local_batch_size:
            raise conflict(
                "global_batch_size",
                f"training.global_batch_size ({self.global_batch_size}) must be a multiple of "
                f"training.local_batch_size ({self.local_batch_size})",
            )
        return self
