"""[recover]: stage 2, every layer dense."""

from typing import Literal

from lighthouse_core.config.schedule import DecayShape
from lighthouse_core.config.section import NonNegative, Section


class RecoverSection(Section):
    """`steps` 0 leaves the length to `lighthouse recover --steps`; a `decay` goes to zero over the whole recovery."""

    steps: NonNegative = 0
    decay: Literal["none", DecayShape] = "none"
