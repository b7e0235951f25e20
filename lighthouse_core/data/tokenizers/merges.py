"""The rules of a sentencepiece BPE model as a list of merges, for programs that know only merges.

sentencepiece has no merges. Of all neighbours whose texts together are a piece it joins those with the highest score,
and of equal scores the leftmost. Other programs have a list of pairs: of all neighbours that are in the list they join
the pair that stands first in the list, and of equal pairs the leftmost. Four facts make one out of the other.

1. A piece is always joined from the same two parts. Whatever ends up inside of one piece was never joined with anything
   outside of it, so it was joined as if that text stood alone. The last pair of that is the only merge of the piece;
   a piece that its own text does not lead to never occurs, and needs none.
2. Pieces of different scores are therefore merges in the order of their scores.
3. Of equal scores the leftmost comes first. A list says so where, for any two such merges (x, y) and (y, z), (x, y)
   stands before (y, z). That is possible where these demands do not run in a circle. Besides, no piece of that score
   may be a part of a piece of the same score or a higher one, which would be joined in between.
4. Runs of one character may be: models of the Llama family have runs of spaces that share a score. sentencepiece takes
   such a run from its left end: what has been joined so far comes before two characters that have not been, and in a
   list (c, c) therefore comes after all other merges of runs of c. This holds where all runs of c have that score, and
   where nothing else is joined with a run, or with c at that score.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from graphlib import CycleError, TopologicalSorter
from heapq import heapify, heappop, heappush
from math import isfinite

from lighthouse_core.data.tokenizers.model_file import NORMAL, Piece


def merge_list(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """The merges that give the ids of sentencepiece on every text, first to last.

    Args:
        pieces: all rows of the vocabulary. Every character of a piece of kind NORMAL must be such a piece itself.

    Raises:
        ValueError: there is no such list: a score is not finite, or pieces of one score compete. The words name them.
    """
    scores = {piece.text: piece.score for piece in pieces if piece.kind == NORMAL and len(piece.text) > 1}
    for text, score in scores.items():
        if not isfinite(score):
            raise ValueError(f"its piece {text!r} has no finite score")
    made = {text: pair for text in scores if (pair := _last_merge(text, scores))}
    # The best score of all pieces that a piece is a part of.
    onward: dict[str, float] = {}
    for text, pair in made.items():
        for part in pair:
            onward[part] = max(scores[text], onward.get(part, scores[text]))
    equals = defaultdict(list)
    for text in made:
        equals[scores[text]].append(text)
    return [
        made[text]
        for score in sorted(equals, reverse=True)
        for text in _in_order(equals[score], score, made, scores, onward)
    ]


def shared_scores(pieces: Iterable[Piece]) -> bool:
    """Whether pieces that are made by merges share a score, or have none: else merge_list cannot fail."""
    scores = [piece.score for piece in pieces if piece.kind == NORMAL and len(piece.text) > 1]
    return len(set(scores)) < len(scores) or not all(map(isfinite, scores))


def _in_order(
    texts: list[str],
    score: float,
    made: dict[str, tuple[str, str]],
    scores: dict[str, float],
    onward: dict[str, float],
) -> Sequence[str]:
    """Pieces of one score, so that of two that overlap in a text the left one comes first."""
    if len(texts) == 1:
        return texts
    runs = _runs(texts, score, made, scores)
    for text in texts:
        if onward.get(text, -float("inf")) >= score and text not in runs:
            whole = next(whole for whole in made if text in made[whole] and scores[whole] >= score)
            raise ValueError(f"its pieces {text!r} and {whole!r} have scores that other pieces compete with")
    # A merge is an edge from its left part to its right one: where parts have an order, the merges have it too.
    parts: TopologicalSorter[str] = TopologicalSorter()
    for text in texts:
        left, right = made[text]
        if left != right:
            parts.add(right, left)
        if text in runs and left != text[0]:
            parts.add(text[0], left)
    try:
        place = {part: number for number, part in enumerate(parts.static_order())}
    except CycleError as error:
        first, second, third = (*error.args[1], error.args[1][1])[:3]
        raise ValueError(
            f"its pieces {first + second!r} and {second + third!r} have the same score, so that their places in a text "
            "decide which of them is used"
        ) from None
    return sorted(texts, key=lambda text: [place.get(part, -1) for part in made[text]])


def _runs(texts: list[str], score: float, made: dict[str, tuple[str, str]], scores: dict[str, float]) -> set[str]:
    """Those of `texts`, all of one score, that are runs of a character and have fact 4 for them."""
    of_one = {text: text[0] for text in made if text == text[0] * len(text)}
    found = {text for text in texts if text in of_one}
    if not found:
        return found
    apart = {char for text, char in of_one.items() if scores[text] != score}
    for text, pair in made.items():
        if text not in of_one and scores[text] >= score:
            apart.update(of_one[part] for part in pair if part in of_one)
            if scores[text] == score:
                apart.update(pair)
    return {text for text in found if of_one[text] not in apart}


def _last_merge(text: str, scores: dict[str, float]) -> tuple[str, str] | None:
    """The two parts that become `text` where it stands alone; None where it does not become one piece."""
    size = len(text)
    # By the place of their first character: where a symbol ends, or 0 for what is inside of one.
    end = list(range(1, size + 1))
    # By where a symbol ends: where it begins.
    begin = list(range(-1, size))
    waiting = [(-scores[text[i : i + 2]], i, i + 1, i + 2) for i in range(size - 1) if text[i : i + 2] in scores]
    heapify(waiting)
    while waiting:
        _, start, middle, stop = heappop(waiting)
        if end[start] != middle or end[middle] != stop:
            continue
        if stop - start == size:
            return text[:middle], text[middle:]
        end[start], end[middle], begin[stop] = stop, 0, start
        for first in (begin[start], start) if start else (start,):
            second = end[first]
            if second < size and (score := scores.get(text[first : end[second]])) is not None:
                heappush(waiting, (-score, first, second, end[second]))
    return None
