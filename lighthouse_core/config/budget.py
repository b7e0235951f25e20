"""[lighthouse.budget]: how many blocks each KV head chooses, by what it attends to. Imports no torch."""

from collections.abc import Sequence
from typing import Annotated, NamedTuple

from pydantic import Field

from lighthouse_core.attention.budgets import share_out
from lighthouse_core.config.phases import Phase, phase_at
from lighthouse_core.config.section import NonNegative, Positive, Section


class Measurement(NamedTuple):
    """The last measurement of a run.

    Attributes:
        step: that it was made in; 0 for none yet.
        shares: [layer][KV head], of the attention, that beyond the window; 0 in dense layers.
    """

    step: int
    shares: list[list[float]]

    @classmethod
    def none(cls, layers: int, kv_heads: int) -> "Measurement":
        """That of a run which has measured nothing yet."""
        return cls(0, [[0.0] * kv_heads for _ in range(layers)])


class BudgetSection(Section):
    """Every `every` steps (0, the default, is never) it is measured which share of each KV head's attention lies beyond
    its window. Until the next measurement a head below `threshold` keeps the window alone, and the others of its layer
    share out its blocks (`share_out`). `queries` rows of the softmax are measured.

    It acts in the phases whose method chooses blocks for each KV head. Each begins with `blocks` blocks in every head.
    """

    every: NonNegative = 0
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.02
    queries: Positive = 256

    def acts_in(self, phase: Phase | None) -> bool:
        """Whether the heads of a phase have budgets; None stands for a dense stage."""
        return bool(self.every) and phase is not None and not phase.dense and phase.attention.rule.chooses_blocks

    def due(self, phase: Phase | None, step: int) -> bool:
        """Whether `step`, which belongs to `phase`, measures. Nothing else decides it."""
        return self.acts_in(phase) and step % self.every == 0

    def blocks(self, phases: Sequence[Phase], step: int, last: Measurement) -> list[list[int]]:
        """The number of blocks of each KV head, [layer][head], in a step of a phase in which it acts.

        Args:
            phases: of the run.
            step: of training.
            last: measurement before this step. One of another phase says nothing of this one's window.
        """
        phase = phase_at(phases, step)
        if not last.step or phase_at(phases, last.step) != phase:
            return [[phase.attention.blocks] * len(heads) for heads in last.shares]
        return [share_out(heads, self.threshold, phase.attention.blocks) for heads in last.shares]
