"""How the KV heads of a layer share out the blocks that they choose, by their need. Imports no torch.

A head that hardly attends beyond its window needs no chosen blocks. It keeps the window alone, and the other heads of
its layer get its blocks.
"""

from collections.abc import Sequence

# A head has at most this many times `blocks`. The lists of blocks are as wide as that in every head, so that another
# sharing compiles nothing anew, and they take memory. With 4 no block is lost until fewer than a quarter of the heads
# choose.
WIDEST = 4


def share_out(shares: Sequence[float], threshold: float, blocks: int) -> list[int]:
    """The number of blocks of each KV head of a layer.

    Heads below the threshold have none. The others share `blocks` times the number of all heads evenly, up to
    `WIDEST * blocks` a head. What is left over goes to those with the largest shares, one block each; of equal shares
    the earlier head comes first.

    Args:
        shares: of each head's attention, that beyond the window, 0 to 1.
        threshold: a head with at least this share chooses blocks.
        blocks: of a head, where all heads have as many.
    """
    choosing = [head for head, share in enumerate(shares) if share >= threshold]
    found = [0] * len(shares)
    if not choosing:
        return found
    each, rest = divmod(blocks * len(shares), len(choosing))
    choosing.sort(key=lambda head: (-shares[head], head))
    for place, head in enumerate(choosing):
        found[head] = min(each + (place < rest), WIDEST * blocks)
    return found
