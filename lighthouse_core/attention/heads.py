"""How many processes can share out the heads of a layer. Imports no torch."""


def shares_heads(heads: int, kv_heads: int, processes: int) -> bool:
    """Whether so many processes can share out the heads: each gets as many query heads, and all of their KV heads."""
    return heads % processes == 0 and (kv_heads % processes == 0 or processes % kv_heads == 0)


def nearest_shares(heads: int, kv_heads: int, processes: int) -> list[int]:
    """The numbers of processes next below and above that can share out the heads."""
    possible = [count for count in range(1, heads + 1) if shares_heads(heads, kv_heads, count)]
    below, above = [n for n in possible if n < processes], [n for n in possible if n > processes]
    return [*below[-1:], *above[:1]]
