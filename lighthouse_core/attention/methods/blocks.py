"""A local window and the blocks of keys that each tile of queries chooses by content, causally.

Each tile of `tile` queries attends, in one softmax, to

- the last `window` tokens before each query, its own included;
- `blocks` earlier blocks of `block_size` keys for each KV head, which lie wholly before the window of the tile's first
  query. A tile that has fewer of these takes all of them.

`block_score` says which blocks these are. All that the choice reads lies before the tile, so nothing leaks.

- "mean": those whose mean key has the largest product with the mean query of the tile before. The mean is over the
  tile's tokens and over the query heads of the KV head.
- "bound": those that could have the largest product with that query, given the smallest and the largest number of each
  feature among the block's keys: the sum over d of max(q_d max_d, q_d min_d). The bound is that of Quest (Tang et al.,
  arXiv 2406.10774), which chooses pages of a cache by the present query while a model generates.
- "random": random ones, the control. They follow from the context's key, the tile and the block.

MoBA (Lu et al., arXiv 2502.13189) trains with blocks that are chosen by their mean key. There each query chooses by
itself, its own block takes part always, and blocks reach up to the query. The tile before as the chooser is ours. No
gradient goes through the choice, and there is no parameter: dense attention recovers from it as from a window.

A context may share out the blocks of a layer among its KV heads (`AttentionContext.budgets`); budgets.py has the rule.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lighthouse_core.attention.methods.method import Method, last
from lighthouse_core.attention.settings import SettingError, Settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor
    from torch._ops import OpOverload

    from lighthouse_core.attention.context import AttentionContext
    from lighthouse_core.attention.dense.kernel import DenseKernel

BLOCK_SCORES = ("mean", "bound", "random")


class Blocks(Method):
    """See the module."""

    name = "blocks"
    chooses_blocks = True
    shown = ("method", "blocks", "block_size", "block_score", "tile")
    reads = frozenset((*shown, "window", "dense_backend"))

    def check(self, settings: Settings) -> None:
        if settings.tile % settings.block_size and settings.block_size % settings.tile:
            problem = f"must be a multiple or a divisor of block_size ({settings.block_size}), not {settings.tile}"
            raise SettingError("tile", problem)

    def alignment(self, settings: Settings) -> int:
        """So that neither a tile nor a block holds two documents."""
        return max(settings.tile, settings.block_size)

    def can(self, settings: Settings) -> frozenset[str]:
        return frozenset(("documents", "budgets"))

    def draws(self, settings: Settings) -> bool:
        return settings.block_score == "random"

    def keys(self, settings: Settings, tokens: int, length: int | None = None, first: int = 0) -> float:
        """A document begins with a tile, so its place does not count. Where a context shares out the blocks, this is an
        upper bound: of layers whose KV heads use fewer blocks than they have together, it counts all."""
        s, length = settings, tokens if length is None else length
        chosen = 0
        for start in range(0, length, s.tile):
            blocks = min(s.blocks, max(0, start - s.window + 1) // s.block_size)
            chosen += min(s.tile, length - start) * blocks * s.block_size
        return last(length, s.window) + chosen / length

    def kept_numbers(
        self, settings: Settings, tokens: int, q: int, kv: int, *, mode: str, copies: int = 0, compiled: bool = True
    ) -> float:
        """With the numbers of blocks for each tile, and those of tiles for each block, in two lists each. Checkpointing
        keeps the choice alone. Heads are taken to be 64 wide, and an integer for two numbers."""
        s = settings
        lists = 2 * (tokens / s.block_size + s.blocks + (s.window + s.tile) / s.block_size)
        integers = (lists if mode == "none" else s.blocks) / s.tile
        return super().kept_numbers(settings, tokens, q, kv, mode=mode, copies=copies) + 2 * kv / 64 * integers

    def enough_tokens(self, settings: Settings) -> int:
        return settings.window + (settings.blocks + 1) * settings.block_size + settings.tile

    def examples(self, tokens: int) -> dict[str, dict[str, Any]]:
        return {"blocks": {"window": 2048}}

    def summary(self, settings: Mapping[str, Any]) -> str:
        return f"{self.name} {settings['blocks']}, window {settings['window']}"

    def check_backends(self, settings: Settings, device_type: str, dtype: torch.dtype | None, dim: int | None) -> None:
        if dtype is not None and dim is not None:
            kernel_of(settings, device_type, dtype, dim)

    def kept(self, settings: Settings, mode: str, device_type: str) -> set[OpOverload]:
        from lighthouse_core.attention.chosen import SELECTING

        return set(SELECTING)

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, settings: Settings, context: AttentionContext, *, scale: float | None
    ) -> Tensor:
        from torch.nn.functional import pad

        from lighthouse_core.attention.chosen import choose_blocks
        from lighthouse_core.attention.dense.kernel import Tiles
        from lighthouse_core.attention.documents import of_tiles

        s, (batch, tokens) = settings, q.shape[:2]
        kernel = kernel_of(s, q.device.type, q.dtype, q.shape[3])
        assert kernel.blocked is not None
        starts = None
        if context.documents is not None:
            starts = of_tiles(context.documents, batch, tokens, s.tile)
        if missing := -tokens % self.alignment(s):
            # Tokens after all others, which none of them sees. Their tiles belong to the last document.
            q, k, v = (pad(x, (0, 0, 0, 0, 0, missing)) for x in (q, k, v))
            if starts is not None:
                starts = pad(starts, (0, q.shape[1] // s.tile - starts.shape[1]), mode="replicate")
        chosen = choose_blocks(q, k, s, context, starts)
        return kernel.blocked(q, k, v, scale, Tiles(chosen, starts, s.window, s.tile, s.block_size))[:, :tokens]


def kernel_of(settings: Settings, device_type: str, dtype: torch.dtype, dim: int) -> DenseKernel:
    """The kernel of such a call; see `kernel_beyond`."""
    from lighthouse_core.attention.dense.call import blocks_kernel

    return blocks_kernel(settings.dense_backend, device_type, dtype, dim, settings.tile, settings.block_size)
