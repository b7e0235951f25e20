"""The settings of one attention call, and the error that names one. Imports no torch."""

from dataclasses import dataclass

from lighthouse_core.errors import did_you_mean


class SettingError(ValueError):
    """A setting that no call can have.

    Attributes:
        field: its name, a field of `Settings`.
        problem: what is wrong with it; follows the name in a sentence.
    """

    def __init__(self, field: str, problem: str):
        super().__init__(f"{field} {problem}")
        self.field = field
        self.problem = problem


class BackendError(ValueError):
    """A backend that cannot run here, or not on such tensors.

    Attributes:
        hint: which setting does.
    """

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Settings:
    """How one attention call pools, selects and attends. `LighthouseConfig` checks them.

    Attributes:
        pooling: tokens (or windows) pooled into one window of the next level, p; a power of two, at least 2.
        levels: pyramid levels L, level 0 being the tokens; 1 makes the call dense.
        topk: parents expanded per level, k; a multiple of ``tile_parents``.
        tile_parents: parents chosen in each tile, m; even, at least 2.
        cover_prefix: keep window 0 of every level >= 1 as a parent, so that every position has a contributor.
        scorer: how parents are chosen; lighthouse_core.attention.selectors has each.
        score_block: tokens that share one score under ``block``; a power of two.
        backend: of the pyramid's operations: ``reference`` (PyTorch), ``triton``, or ``auto``.
        dense_backend: the kernel of the dense call, or ``auto``; lighthouse_core.attention.dense has each.
        method: how stage 1 attends; lighthouse_core.attention.methods has each, and which settings it reads.
        window: tokens before each query, its own included, that it sees at full resolution. With a pyramid they are
            merged into the same softmax as what it gathers, and 0 (the paper) turns this off. Ignored when the call is
            dense.
        compression: tokens of one pooled key of ``compressed``; divides the window.
        keep: one block in every ``keep`` blocks of ``score_block`` tokens stays at full resolution under
            ``compressed``; 0 keeps none.
        rotate: when RoPE turns a pyramid's queries and keys: ``before`` they are pooled (the paper), or ``after``, each
            gathered row at the last token that its window covers (branch rope-fix of the published release).
        blocks: earlier blocks of keys that each tile of queries chooses under the method ``blocks``.
        block_size: keys of one of them.
        block_score: how they are chosen: ``mean``, ``bound`` or ``random``; lighthouse_core.attention.methods.blocks
            has each.
        tile: queries that share one choice; a multiple of ``block_size``, or a divisor.
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
    rotate: str = "before"
    blocks: int = 16
    block_size: int = 128
    block_score: str = "mean"
    tile: int = 256


def known(field: str, name: str, names: tuple[str, ...]) -> str:
    """`name`, which is one of `names`.

    Raises:
        SettingError: it is not; an unknown name stands for nothing else.
    """
    if name not in names:
        raise SettingError(field, f"must be one of {', '.join(names)}, not {name!r}{did_you_mean(name, names)}")
    return name


def is_power_of_two(number: int) -> bool:
    return number > 0 and not number & (number - 1)
