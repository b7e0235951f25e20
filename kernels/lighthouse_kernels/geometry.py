"""The shape of one call's pyramid, in plain integers.

Level l holds windows of c_l = pooling**l tokens; window i covers tokens [i c_l, (i+1) c_l - 1]. The sequence is padded
to N' tokens so that every tile of the coarsest level is whole and holds at least `tile_parents` windows. Flat pyramid
index: all windows of level 0, then level 1, and so on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

# The Triton kernels pool a window this wide once, for all; their gather averages narrower ones from the tokens.
STORED_TOKENS = 16


@dataclass(frozen=True)
class Geometry:
    """Pyramid of one sequence.

    Attributes:
        tokens: sequence length N.
        pooling: p, windows merged into one of the next level.
        levels: L.
        topk: k, parents expanded per level over all tiles.
        tile_parents: m, parents per tile.
        cover_prefix: window 0 of every level above 0 is always a parent.
        first: of a shard, the place of its first token in the whole sequence.
        whole: of a shard, the tokens of the whole sequence; 0 for a sequence that is no shard.
    """

    tokens: int
    pooling: int
    levels: int
    topk: int
    tile_parents: int
    cover_prefix: bool = True
    first: int = 0
    whole: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"the sequence must hold at least one token, not {self.tokens}")
        if self.padded >= 2**30 and not self.dense and self.pyramid_length >= 2**31:
            raise ValueError(
                f"a pyramid of {self.pyramid_length} windows is too large, indices have 32 bits; "
                f"its coarsest level holds at least topk = {self.topk} windows of {self.window(self.levels - 1)} tokens"
            )

    @classmethod
    def of(cls, shape: Sequence[int]) -> "Geometry":
        """The pyramid that `shape` stands for."""
        tokens, pooling, levels, topk, tile_parents, cover_prefix, first, whole = shape
        return cls(tokens, pooling, levels, topk, tile_parents, bool(cover_prefix), first, whole)

    @property
    def shape(self) -> list[int]:
        """The fields as integers, which is what an operation of torch can take."""
        cover = int(self.cover_prefix)
        return [self.tokens, self.pooling, self.levels, self.topk, self.tile_parents, cover, self.first, self.whole]

    def shard(self, number: int, count: int) -> "Geometry":
        """The pyramid of one of `count` shards of the sequence, each of whole tiles. Its entries are those of the whole
        sequence that are in it."""
        assert self.padded == self.tokens and self.tiles % count == 0
        tokens = self.tokens // count
        return replace(
            self,
            tokens=tokens,
            topk=self.topk // count,
            cover_prefix=self.cover_prefix and number == 0,
            first=number * tokens,
            whole=self.tokens,
        )

    @property
    def sequence(self) -> int:
        """Tokens of the whole sequence."""
        return self.whole or self.tokens

    @property
    def tiles(self) -> int:
        """Number of contiguous tiles T the coarsest level is split into."""
        return self.topk // self.tile_parents

    def window(self, level: int) -> int:
        """Tokens per window of `level`, c_l."""
        return self.pooling**level

    @property
    def padded(self) -> int:
        """N': the smallest multiple of c_(L-1) T that is at least max(N, c_(L-1) k)."""
        coarsest = self.window(self.levels - 1)
        unit = coarsest * self.tiles
        return -(-max(self.tokens, coarsest * self.topk) // unit) * unit

    def windows(self, level: int) -> int:
        """Number of windows of `level`, padding included."""
        return self.padded // self.window(level)

    def offset(self, level: int) -> int:
        """Flat pyramid index of window 0 of `level`."""
        return sum(self.windows(j) for j in range(level))

    @property
    def pyramid_length(self) -> int:
        """M, the number of windows of all levels."""
        return self.offset(self.levels)

    @property
    def stored_from(self) -> int:
        """The first level whose pooled rows the Triton kernels store; L where they store none."""
        return next((level for level in range(1, self.levels) if self.window(level) >= STORED_TOKENS), self.levels)

    @property
    def selected_length(self) -> int:
        """N'/c_(L-1) + (L-1) p k, the number of entries the selection keeps."""
        return self.windows(self.levels - 1) + (self.levels - 1) * self.pooling * self.topk

    @property
    def dense(self) -> bool:
        """Whether the call is plain dense attention: one level, or a selection no shorter than the sequence."""
        return self.levels == 1 or self.selected_length >= self.tokens

    @property
    def gathered_length(self) -> int:
        """S, the length of the sequence the dense kernel sees."""
        return self.tokens if self.dense else self.selected_length
