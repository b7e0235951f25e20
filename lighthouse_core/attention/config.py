"""The settings of one attention call, checked. Imports no torch."""

import operator
from dataclasses import dataclass, fields

from lighthouse_core.attention.backends import BACKENDS
from lighthouse_core.attention.dense import BACKENDS as DENSE_BACKENDS
from lighthouse_core.attention.methods import METHODS, Method, method_of
from lighthouse_core.attention.methods.blocks import BLOCK_SCORES
from lighthouse_core.attention.selectors import SELECTORS
from lighthouse_core.attention.settings import SettingError, Settings, is_power_of_two, known
from lighthouse_kernels.geometry import Geometry

NAMES = {
    "scorer": tuple(SELECTORS),
    "backend": BACKENDS,
    "dense_backend": tuple(DENSE_BACKENDS),
    "rotate": ("before", "after"),
    "block_score": BLOCK_SCORES,
    "method": tuple(METHODS),
}
_FIELDS = tuple(field.name for field in fields(Settings))
_INTEGERS = tuple(field.name for field in fields(Settings) if field.type is int)
assert "topk" in _INTEGERS
# A level is pooling times as coarse as the one below, so these are far beyond any sequence.
_MOST = {"pooling": 2**20, "levels": 64}


@dataclass(frozen=True)
class LighthouseConfig(Settings):
    """Settings that a call can have; `Settings` describes them.

    Raises:
        SettingError: a ValueError that names the field: a value outside the ranges there, or of settings that do not
            go together.
    """

    def __post_init__(self) -> None:
        for name in _INTEGERS:
            if type(getattr(self, name)) is not int:
                raise SettingError(name, f"must be an integer, not {getattr(self, name)!r}")
            if getattr(self, name) > (most := _MOST.get(name, 2**30)):
                raise SettingError(name, f"must be at most {most}")
        if self.pooling < 2 or not is_power_of_two(self.pooling):
            raise SettingError("pooling", f"must be a power of two and at least 2, not {self.pooling}")
        if self.levels < 1:
            raise SettingError("levels", f"must be at least 1, not {self.levels}")
        if self.tile_parents < 2 or self.tile_parents % 2:
            raise SettingError("tile_parents", f"must be even and at least 2, not {self.tile_parents}")
        if self.topk < 1 or self.topk % self.tile_parents:
            problem = f"must be a positive multiple of tile_parents ({self.tile_parents}), not {self.topk}"
            raise SettingError("topk", problem)
        if not is_power_of_two(self.score_block):
            raise SettingError("score_block", f"must be a power of two, not {self.score_block}")
        self.check_names()
        for name in ("compression", "blocks", "block_size", "tile"):
            if getattr(self, name) < 1:
                raise SettingError(name, f"must be at least 1, not {getattr(self, name)}")
        method = method_of(self.method)
        if self.window < method.needs_window:
            raise SettingError("window", f"must be a number of tokens for the method {self.method}, not {self.window}")
        if self.keep < 0 or self.keep == 1:
            raise SettingError("keep", f"must be 0 or at least 2, not {self.keep}")
        if self.keep and not method.keeps_blocks:
            problem = f"must be 0 for the method {self.method}, which keeps no blocks, not {self.keep}"
            raise SettingError("keep", problem)
        if self.rotates and not method.pools:
            problem = f"must be 'before' for the method {self.method}, which pools no queries, not {self.rotate!r}"
            raise SettingError("rotate", problem)
        method.check(self)
        kernel = DENSE_BACKENDS[self.dense_backend]
        if self.adds_parts and not kernel.lse:
            others = ", ".join(name for name, facts in DENSE_BACKENDS.items() if facts.lse)
            problem = f"{self.dense_backend!r} gives no log-sum-exp to add parts of a softmax with; use one of {others}"
            raise SettingError("dense_backend", problem)
        if method.windows and not kernel.window:
            others = ", ".join(name for name, facts in DENSE_BACKENDS.items() if facts.window)
            problem = (
                f"{self.dense_backend!r} has no windows, which the method {self.method} needs; use one of {others}"
            )
            raise SettingError("dense_backend", problem)
        if method.chooses_blocks and not kernel.blocks:
            others = ", ".join(name for name, facts in DENSE_BACKENDS.items() if facts.blocks)
            problem = (
                f"{self.dense_backend!r} attends to no chosen blocks, as the method {self.method} does; "
                f"use one of {others}"
            )
            raise SettingError("dense_backend", problem)

    def check_names(self) -> None:
        """Raise SettingError unless the method, the scorer and so on are names that there are."""
        for kind, names in NAMES.items():
            known(kind, getattr(self, kind), names)

    def constant(self) -> Settings:
        """The same settings, whose integers torch.compile holds for constants: given others, it compiles again. A
        window may vary that is no shape.

        Asked for dynamic shapes, or called with a second configuration, it would otherwise take every integer for a
        size that may vary, and no pyramid can be laid out with a number of levels that is not known.
        """
        values = {name: getattr(self, name) for name in _FIELDS}
        for name in _INTEGERS:
            if name != "window" or self.rule.window_is_a_shape:
                values[name] = operator.index(values[name])
        return Settings(**values)

    @property
    def rule(self) -> Method:
        """What is known of its method."""
        return method_of(self.method)

    @property
    def pools(self) -> bool:
        """Whether the call has a pyramid."""
        return self.rule.pools

    def geometry(self, tokens: int) -> Geometry:
        """The pyramid of a sequence of `tokens` tokens.

        Raises:
            ValueError: the method has none, or no pyramid can be so large.
        """
        return self.rule.geometry(self, tokens)

    @property
    def rotates(self) -> bool:
        """Whether the call takes q and k before RoPE, and the rotary table with them."""
        return self.rotate == "after"

    @property
    def adds_parts(self) -> bool:
        """Whether the call adds up parts of a softmax by their log-sum-exp."""
        return self.rule.adds_parts(self)

    @property
    def leaks(self) -> bool:
        """Whether later tokens take part in what a query sees."""
        return self.rule.leaks(self)

    @property
    def alignment(self) -> int:
        """Tokens of which each document of a packed sequence has to take a whole multiple."""
        return self.rule.alignment(self)

    @property
    def draws(self) -> bool:
        """Whether the call draws random numbers, and so takes a key."""
        return self.rule.draws(self)

    def keys(self, tokens: int, length: int | None = None, first: int = 0) -> float:
        """Keys that a query sees, on average over a causal sequence of `tokens`, or over a document of `length` tokens
        that begins with token `first` of such a sequence; dense attention has half of that."""
        return self.rule.keys(self, tokens, length, first)


def gathered_length(N: int, cfg: LighthouseConfig) -> int:
    """Length S of the sequence that the dense kernel sees, N'/c_(L-1) + (L-1) p k; N when the call is dense.

    Args:
        N: sequence length in tokens.
        cfg: settings of the call.

    Raises:
        ValueError: N < 1, or a method without a pyramid.
    """
    return cfg.geometry(N).gathered_length
