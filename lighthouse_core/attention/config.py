"""The settings of one Lighthouse attention call. Imports nothing heavier than dataclasses."""

import operator
from dataclasses import dataclass

METHODS = ("pyramid", "compressed", "sliding", "chunked")
SCORERS = ("norm", "random", "block")
BACKENDS = ("auto", "reference", "triton")
DENSE_BACKENDS = ("auto", "fa4", "cudnn", "flash", "math")
_NAMES = {"scorer": SCORERS, "backend": BACKENDS, "dense_backend": DENSE_BACKENDS, "method": METHODS}
_INTEGERS = ("pooling", "levels", "topk", "tile_parents", "score_block", "window", "compression", "keep")


def known(kind: str, name: str, names: tuple[str, ...]) -> str:
    """`name`, which is one of `names`.

    Raises:
        ValueError: it is not; an unknown name stands for nothing else.
    """
    if name not in names:
        raise ValueError(f"{kind} must be one of {', '.join(names)}, not {name!r}")
    return name


# A level is pooling times as coarse as the one below, so these are far beyond any sequence.
_MOST = {"pooling": 2**20, "levels": 64}


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
        method: ``pyramid`` (the paper's); ours are ``compressed``, ``sliding`` and ``chunked``, which leak nothing: see
            lighthouse_core.attention.methods. Of the settings above they read dense_backend, and ``compressed`` scorer
            and score_block where it keeps blocks.
        window: tokens that every query sees at full resolution. With ``pyramid``, in addition to what it gathers, as
            one average weighted by their sums of exponentials; 0 is the paper's. A call that is dense needs none.
        compression: tokens of one pooled key of ``compressed``; divides the window.
        keep: of so many blocks of ``score_block`` tokens one stays as it is under ``compressed``; 0 for none.

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
    method: str = "pyramid"
    window: int = 0
    compression: int = 16
    keep: int = 0

    def __post_init__(self) -> None:
        for name in _INTEGERS:
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name} must be an integer, not {getattr(self, name)!r}")
            if getattr(self, name) > (most := _MOST.get(name, 2**30)):
                raise ValueError(f"{name} must be at most {most}")
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
        self.check_names()
        if self.compression < 1:
            raise ValueError(f"compression must be at least 1, not {self.compression}")
        if self.window < (self.method != "pyramid"):
            raise ValueError(f"window must be a number of tokens for the method {self.method}, not {self.window}")
        if self.keep < 0 or self.keep == 1:
            raise ValueError(f"keep must be 0 or at least 2, not {self.keep}")
        if self.keep and self.method != "compressed":
            raise ValueError(f"keep must be 0 for the method {self.method}, which keeps no blocks, not {self.keep}")
        if self.method == "compressed" and (self.compression < 2 or self.window % self.compression):
            raise ValueError(
                f"compression must be at least 2 and divide the window of {self.window}, not {self.compression}"
            )
        if self.adds_parts and self.dense_backend in ("cudnn", "flash"):
            raise ValueError(
                f"dense_backend {self.dense_backend!r} gives no log-sum-exp to add parts of a softmax with; use auto, "
                f"fa4 or math for a window"
            )

    def check_names(self) -> None:
        """Raise ValueError unless method, scorer and backends are names that there are."""
        for kind, names in _NAMES.items():
            known(kind, getattr(self, kind), names)

    def constant(self) -> "LighthouseConfig":
        """The same settings, whose integers torch.compile holds for constants: given others, it compiles again.

        Asked for dynamic shapes, or called with a second configuration, it would otherwise take every integer for a
        size that may vary, and no pyramid can be laid out with a number of levels that is not known.
        """
        integers = {name: operator.index(getattr(self, name)) for name in _INTEGERS}
        names = {kind: getattr(self, kind) for kind in _NAMES}
        return LighthouseConfig(**integers, **names, cover_prefix=self.cover_prefix)

    @property
    def adds_parts(self) -> bool:
        """Whether the call adds up parts of a softmax by their log-sum-exp."""
        return self.method in ("compressed", "sliding") or (self.method == "pyramid" and self.window > 0)

    @property
    def leaks(self) -> bool:
        """Whether later tokens take part in what a query sees: the paper's rule decides by their norms."""
        return self.method == "pyramid" and self.scorer == "norm"

    @property
    def draws(self) -> bool:
        """Whether the call draws random numbers, and so takes a key."""
        if self.method == "compressed":
            return self.keep > 0 and self.scorer != "norm"
        return self.method == "pyramid" and self.scorer != "norm"

    def keys(self, tokens: int) -> float:
        """Keys that a query sees, on average over a causal sequence of `tokens`; dense attention has tokens / 2.

        The pyramid's gathered queries are fewer than the tokens, which is counted here: S^2 / (2 N).
        """
        if self.method == "pyramid":
            from lighthouse_core.backends import gathered_length

            gathered = gathered_length(tokens, self)
            return gathered**2 / (2 * tokens) + (self._last(tokens) if gathered < tokens else 0.0)
        known("method", self.method, METHODS)
        if self.window >= tokens:
            return tokens / 2
        if self.method == "chunked":
            whole, rest = divmod(tokens, self.window)
            return (whole * self.window**2 + rest**2) / (2 * tokens)
        if self.method == "sliding":
            return self._last(tokens)
        beyond = (tokens - self.window) ** 2 / (2 * tokens * self.compression)
        return self._last(tokens) + beyond + (self._kept(tokens) if self.keep else 0.0)

    def _last(self, tokens: int) -> float:
        window = min(self.window, tokens)
        return window * (1 - window / (2 * tokens))

    def _kept(self, tokens: int) -> float:
        return max(0, tokens - self.keep * self.blocks_behind) ** 2 / (2 * tokens * self.keep)

    @property
    def blocks_behind(self) -> int:
        """Of the keys of kept blocks, how far the newest one that a query sees lies behind its own place: a group, and
        then the window."""
        return self.score_block - (-self.window // self.keep)
