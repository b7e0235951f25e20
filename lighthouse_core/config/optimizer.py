"""[optimizer]: AdamW."""

from typing import Annotated

from pydantic import Field

from lighthouse_core.config.section import PositiveFloat, Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSection(Section):
    """`clip_norm` bounds the norm of the whole gradient."""

    lr: PositiveFloat
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip_norm: PositiveFloat = 1.0
