"""[lighthouse]: the attention of stage 1."""

from pydantic import model_validator

from lighthouse_core.attention.config import LighthouseConfig
from lighthouse_core.config.section import NonNegative, Section, conflict


class LighthouseSection(Section):
    """`enabled = false` trains a dense baseline. Every `dense_every`-th step of stage 1 is dense in all layers, 0 for
    none; a `metrics.every` that it divides keeps the ledger's medians fair. The other keys are LighthouseConfig's, with
    its defaults.
    """

    enabled: bool = True
    dense_every: NonNegative = 0
    pooling: int = 4
    levels: int = 3
    topk: int = 1536
    tile_parents: int = 128
    cover_prefix: bool = True
    scorer: str = "norm"
    score_block: int = 64
    backend: str = "auto"
    dense_backend: str = "auto"
    method: str = "pyramid"
    window: int = 0
    compression: int = 16
    keep: int = 0

    def attention(self) -> LighthouseConfig:
        """The same settings as the attention call takes them."""
        return LighthouseConfig(**self.model_dump(exclude={"enabled", "dense_every"}))

    @model_validator(mode="after")
    def _check(self) -> "LighthouseSection":
        try:
            self.attention()
        except ValueError as error:
            # LighthouseConfig's messages open with the name of the field.
            key = str(error).split(maxsplit=1)[0]
            raise conflict(key, f"lighthouse.{error}") from None
        return self
