"""What the stages of a call must at least do, by arithmetic: bytes moved and floating-point operations.

Batch 1. N tokens, H query heads, Hkv key/value heads, D head dimension, S entries. Nothing here imports torch.
"""

from dataclasses import dataclass, replace

from lighthouse_core.attention.config import LighthouseConfig
from lighthouse_core.attention.selectors import selector_of
from lighthouse_core.errors import UserError


@dataclass(frozen=True)
class Shape:
    """Of the inputs of one attention call, batch 1.

    Attributes:
        tokens: N.
        heads: H.
        kv_heads: Hkv.
        head_dim: D.
        dtype: of q, k and v: `float32`, `bfloat16` or `float16`.

    Raises:
        UserError: no call has such inputs.
    """

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        if min(self.tokens, self.heads, self.kv_heads, self.head_dim) < 1 or self.heads % self.kv_heads:
            raise UserError(
                f"no attention call has N = {self.tokens}, {self.heads} heads, {self.kv_heads} KV heads and "
                f"D = {self.head_dim}: the heads must be a multiple of the KV heads, and none of them 0"
            )

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def q_row(self) -> int:
        """Bytes of one token's queries."""
        return self.heads * self.head_dim * self.itemsize

    @property
    def qk_row(self) -> int:
        """Bytes of one token's queries and keys."""
        return self.q_row + self.kv_heads * self.head_dim * self.itemsize

    @property
    def row(self) -> int:
        """Bytes of one token's queries, keys and values."""
        return self.q_row + 2 * self.kv_heads * self.head_dim * self.itemsize


@dataclass(frozen=True)
class Work:
    """Of one stage, in one direction.

    Attributes:
        bytes: that have to be read or written.
        flops: floating-point operations; 0 where memory is the limit.
    """

    bytes: int
    flops: int = 0


def attention_flops(shape: Shape, keys: float) -> tuple[int, int]:
    """Forward and backward, where a query sees so many keys in the mean: 4 and 10 H D keys a token."""
    products = shape.tokens * keys * shape.heads * shape.head_dim
    return round(4 * products), round(10 * products)


def dense_work(shape: Shape) -> tuple[Work, Work]:
    """Dense causal attention, forward and backward."""
    forward, backward = attention_flops(shape, shape.tokens / 2)
    read = shape.tokens * (shape.row + shape.q_row)
    return Work(read, forward), Work(2 * read, backward)


def stage_work(shape: Shape, cfg: LighthouseConfig) -> dict[str, tuple[Work, Work | None]]:
    """Forward and backward of every stage of a pyramid's call, in order; None where a stage has no gradient of its own.

    As the Triton kernels divide it: wide windows are pooled once and stored, the others averaged where they are kept.
    With w stored rows, r stored rows and tokens that the kept windows are made of, and H = Hkv, the stages but the
    dense call move at least 4N + 3w + 3r + 4S rows of one tensor forward and 4N + 4S backward, and the scores. Where
    no row is stored, the first pass reads what it scores, q and k, or does nothing.
    """
    g = cfg.geometry(shape.tokens)
    tokens, entries, first = g.tokens, g.gathered_length, g.stored_from
    stored = sum(-(-tokens // g.window(level)) for level in range(first, g.levels))
    if stored:
        # The coarsest level is kept whole, of every other one the children of k parents.
        kept = -(-tokens // g.window(g.levels - 1)) + (g.levels - 1 - first) * g.pooling * g.topk
        read = min(stored, kept) + min(tokens, g.topk * g.window(first))
    else:
        read = tokens
    by_norm = selector_of(cfg.scorer).in_pass
    scored = 4 * (shape.heads + shape.kv_heads) * (g.pyramid_length - g.padded)
    # Of the coarsest level all windows are candidates, of the others above 0 the children of the parents chosen before.
    candidates = g.windows(g.levels - 1) + (g.levels - 2) * g.pooling * g.topk
    compared = 4 * (shape.heads + shape.kv_heads) * candidates
    pooled = (tokens + stored) * shape.row if stored else tokens * shape.qk_row * by_norm
    chosen = 4 * shape.kv_heads * (entries + g.pyramid_length)
    gathered = replace(shape, tokens=entries)
    scattered = Work((entries + tokens) * shape.q_row)
    return {
        "pyramid + score": (Work(pooled + scored * by_norm), None),
        "select": (Work(compared * by_norm + chosen), None),
        "gather": (Work((read + entries) * shape.row), Work((entries + tokens) * shape.row)),
        "dense call": dense_work(gathered),
        "scatter": (scattered, scattered),
    }
