"""The settings of one Lighthouse attention call. Imports nothing heavier than dataclasses."""

from dataclasses import dataclass

SCORERS = ("norm", "random", "block")
BACKENDS = ("auto", "reference", "triton")
DENSE_BACKENDS = ("auto", "fa4", "cudnn", "flash", "math")


@dataclass(frozen=True)
class LighthouseConfig:
    """How one attention call pools, selects and attends.

    Attributes:
        pooling: tokens (or windows) pooled into one window of the next level, p; a power of two, at least 2.
        levels: pyramid levels L, level 0 being the tokens; 1 makes the call dense.
        topk: parents expanded per level, k; a multiple of ``tile_parents``.
        tile_parents: parents chosen in each tile, m; even, at least 2.
        cover_prefix: keep window 0 of every level >= 1 as a parent, so that every position has a contributor.
        scorer: ``norm`` (the paper's rule), ``random`` or ``block`` (content-free).
        score_block: tokens that share one score under ``block``; a power of two.
        backend: ``reference`` (PyTorch), ``triton``, or ``auto``.
        dense_backend: the kernel of the dense call, or ``auto``.

    Raises:
        ValueError: for a value outside the ranges above.
    """

    pooling: int = 4
    levels: int = 3
    topk: int = 1536
    tile_parents: int = 128
    cover_prefix: bool = True
    scorer: str = "norm"
    score_block: int = 64
    backend: str = "auto"
    dense_backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("pooling", "levels", "topk", "tile_parents", "score_block"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name} must be an integer, not {getattr(self, name)!r}")
        if self.pooling < 2 or self.pooling & (self.pooling - 1):
            raise ValueError(f"pooling must be a power of two and at least 2, not {self.pooling}")
        if self.levels < 1:
            raise ValueError(f"levels must be at least 1, not {self.levels}")
        if self.tile_parents < 2 or self.tile_parents % 2:
            raise ValueError(f"tile_parents must be even and at least 2, not {self.tile_parents}")
        if self.topk < 1 or self.topk % self.tile_parents:
            raise ValueError(f"topk must be a positive multiple of tile_parents ({self.tile_parents}), not {self.topk}")
        if self.score_block < 1 or self.score_block & (self.score_block - 1):
            raise ValueError(f"score_block must be a power of two, not {self.score_block}")
        for name, allowed in (("scorer", SCORERS), ("backend", BACKENDS), ("dense_backend", DENSE_BACKENDS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
