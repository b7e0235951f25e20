"""Single-digit retrieval: a digit hidden in random letters and digits, asked for at the end.

After "Long Context Pre-Training with Lighthouse Attention" (arXiv 2605.06554): the answer is the likeliest of the ten
digits after the last token, the depth of the needle goes from 0 to 100 %, and a cell has ten trials. A prompt is one
document, so that it is the same whether a model keeps documents apart or not.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lighthouse_core.evaluate.subject import Subject

_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
_QUESTION = "\nThe hidden digit is "
_DIGITS = "0123456789"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Cell:
    """Trials of one length and depth.

    Attributes:
        tokens: length of the prompt, N.
        depth: of the needle, 0 at the beginning and 1 just before the question.
        right, trials: how many were answered with the digit.
        low, high: Wilson's 95 % interval of the share.
    """

    tokens: int
    depth: float
    right: int
    trials: int
    low: float
    high: float


def interval(right: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z = 1.959964
    share, scale = right / trials, 1 + z * z / trials
    middle = (share + z * z / (2 * trials)) / scale
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / scale
    return max(0.0, middle - spread), min(1.0, middle + spread)


def retrieve(
    subject: Subject,
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    trials: int = 10,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> list[Cell]:
    """Ask for hidden digits; the same prompts for every model of a tokenizer.

    Args:
        subject: the model.
        lengths: of the prompts, in tokens.
        depths: of the needle.
        trials: a cell; the digits go round.
        seed: of the letters.
        tick: called after each cell.

    Raises:
        ValueError: for a length that the needle and the question do not fit, or a tokenizer that has no token of
            its own for a digit after the question.
    """
    question, answers = answer(subject)
    cells: list[Cell] = []
    for length in lengths:
        for depth in depths:
            generator = np.random.default_rng((seed, length, round(1000 * depth)))
            # They go on where the cell before ended: an answer that is always the same is right once in ten.
            digits = [trial % 10 for trial in range(len(cells) * trials, (len(cells) + 1) * trials)]
            right = 0
            for digit in digits:
                tokens = torch.from_numpy(prompt(subject, question, length, depth, digit, generator))[None]
                right += int(subject.next_logits(tokens)[0, answers].argmax().item() == digit)
            cells.append(Cell(length, depth, right, trials, *interval(right, trials)))
            tick()
    return cells


def prompt(
    subject: Subject, question: np.ndarray, length: int, depth: float, digit: int, generator: np.random.Generator
) -> np.ndarray:
    """One prompt [length] int64: BOS if there is one, letters with the needle among them, the tokens of the question.

    Raises:
        ValueError: it does not fit.
    """
    encode = subject.tokenizer.encode
    needle = encode(f"{_QUESTION}{digit}.\n")
    bos = [] if subject.tokenizer.bos_id is None else [subject.tokenizer.bos_id]
    room = length - len(bos) - len(needle) - len(question)
    if room < 0:
        raise ValueError(f"a prompt needs at least {length - room} tokens, not {length}")
    # As many letters as tokens are enough, whatever the tokenizer makes of them.
    hay = encode("".join(generator.choice(list(_ALPHABET), size=room)))[:room] if room else question[:0]
    while len(hay) < room:
        more = encode("".join(generator.choice(list(_ALPHABET), size=room)))
        hay = np.concatenate((hay, more))[:room]
    at = round(depth * room)
    return np.concatenate((bos, hay[:at], needle, hay[at:], question)).astype(np.int64)


def answer(subject: Subject) -> tuple[np.ndarray, torch.Tensor]:
    """The question's tokens, up to where the ten answers part, and the next token of each answer, [10] int64.

    Raises:
        ValueError: the tokenizer has no token for each.
    """
    answered = [[int(i) for i in subject.tokenizer.encode(_QUESTION + digit)] for digit in _DIGITS]
    common = next((i for i, ids in enumerate(zip(*answered, strict=False)) if len(set(ids)) > 1), 0)
    following = {ids[common] for ids in answered if len(ids) > common}
    if len(following) < len(_DIGITS):
        raise ValueError("the tokenizer has no token of its own for a digit after a space")
    return np.array(answered[0][:common]), torch.tensor([ids[common] for ids in answered])
