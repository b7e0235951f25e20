"""[recover]: stage 2, every layer dense."""

from typing import Literal

from lighthouse_core.config.section import NonNegative, Section


class RecoverSection(Section):
    """`steps` 0 leaves the length to `lighthouse recover --steps`; decay `linear` goes to zero over the recovery."""

    steps: NonNegative = 0
    decay: Literal["none", "linear"] = "none"
