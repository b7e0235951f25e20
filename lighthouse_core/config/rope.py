"""[model.rope_scaling]: how the frequencies of RoPE are changed for longer sequences, by the names of a config.json."""

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from lighthouse_core.config.section import PositiveFloat, PositiveTokens, Section, conflict

_Factor = Annotated[float, Field(ge=1)]


class _Scaling(Section):
    @model_serializer(mode="wrap")
    def _without_nothing(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """TOML has no null."""
        return {key: value for key, value in handler(self).items() if value is not None}


class LinearScaling(_Scaling):
    """Every position is divided by `factor` (position interpolation, arXiv 2306.15595)."""

    rope_type: Literal["linear"]
    factor: _Factor


class Llama3Scaling(_Scaling):
    """Llama 3.1's: frequencies that turn less than `low_freq_factor` times within the original length are divided by
    `factor`, those that turn more than `high_freq_factor` times are kept, and those between are in between."""

    rope_type: Literal["llama3"]
    factor: _Factor
    original_max_position_embeddings: PositiveTokens
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0

    @model_validator(mode="after")
    def _check(self) -> "Llama3Scaling":
        if self.low_freq_factor >= self.high_freq_factor:
            raise conflict("low_freq_factor", "model.rope_scaling.low_freq_factor must be below high_freq_factor")
        return self


class YarnScaling(_Scaling):
    """YaRN (arXiv 2309.00071): frequencies that turn less than `beta_slow` (1) times within the original length are
    divided by `factor`, those that turn more than `beta_fast` (32) times are kept, and those between are in between.
    Cosine and sine are multiplied by `attention_factor` (0.1 ln(factor) + 1). `truncate` (true) rounds the borders to
    whole pairs."""

    rope_type: Literal["yarn"]
    factor: _Factor
    original_max_position_embeddings: PositiveTokens
    attention_factor: PositiveFloat | None = None
    beta_fast: PositiveFloat | None = None
    beta_slow: PositiveFloat | None = None
    truncate: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> "YarnScaling":
        if (self.beta_slow or 1.0) >= (self.beta_fast or 32.0):
            raise conflict("beta_slow", "model.rope_scaling.beta_slow must be below beta_fast")
        return self


RopeScaling = Annotated[LinearScaling | Llama3Scaling | YarnScaling, Field(discriminator="rope_type")]
