"""The loader: cuts the token stream into samples and hands one rank the batches that are its own."""

from collections.abc import Iterator
from typing import Literal

import torch

from lighthouse_core.data.sources import DataSettings, documents_of, fingerprint
from lighthouse_core.data.stream import Position, TokenStream
from lighthouse_core.data.tokenizer import build_tokenizer
from lighthouse_core.errors import DataError


class TokenLoader:
    """Batches of one rank from the endless global sequence of samples.

    Sample i holds tokens [i*seq_len, (i+1)*seq_len] of the stream; its last token is a label only. A global micro-batch
    is the next world_size * local_batch_size samples, of which rank r has the r-th run of local_batch_size.

    The data position is global: `samples` handed out so far by all ranks together, and the stream position (`epoch`,
    `document`, `offset`) at which the next one begins. No rank or batch size is in it, so any of them may change on
    resume. The last three follow from `samples` while token counts are known without reading; keeping them means that
    seeking never has to pass over text, whatever the tokenizer or source.

    Attributes:
        first_sample: global index of the first row of the batch last yielded; None before the first.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        seq_len: int,
        local_batch_size: int,
        rank: int,
        world_size: int,
        fingerprint: int,
        restart: bool,
    ):
        assert seq_len > 0 and local_batch_size > 0 and 0 <= rank < world_size
        self.stream = stream
        self.seq_len = seq_len
        self.local_batch_size = local_batch_size
        self.rank = rank
        self.world_size = world_size
        self.fingerprint = fingerprint
        self.restart = restart
        self.first_sample: int | None = None
        self._samples = 0
        self._position = Position()

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """Yields ({"input": int64 [local_batch_size, seq_len]}, labels int64 [local_batch_size, seq_len]), for ever.

        Training goes on from the data position; validation begins anew with each iterator.

        Raises:
            DataError: a document cannot be read as it was listed.
        """
        if self.restart:
            self._samples, self._position = 0, Position()
        return self._batches()

    def _batches(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        shape = (self.local_batch_size, self.seq_len)
        local_tokens = self.local_batch_size * self.seq_len
        while True:
            start = self.stream.advance(self._position, self.rank * local_tokens)
            tokens = torch.from_numpy(self.stream.read(start, local_tokens + 1))
            self.first_sample = self._samples + self.rank * self.local_batch_size
            self._samples += self.world_size * self.local_batch_size
            self._position = self.stream.advance(self._position, self.world_size * local_tokens)
            # The clone keeps a write into the inputs from reaching the labels.
            yield {"input": tokens[:-1].view(shape)}, tokens[1:].clone().view(shape)

    def state_dict(self) -> dict[str, int]:
        """The position after the batch last yielded, and what it holds for; plain integers, equal on every rank."""
        return {"samples": self._samples, **self._position._asdict(), **self._stream_identity()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Seek to a position that `state_dict` gave; reads no document.

        Raises:
            DataError: the position belongs to other data, another order of it, or another sequence length, so that
                the run would not see the tokens that an uninterrupted one would.
        """
        for key, here in self._stream_identity().items():
            there = state_dict[key]
            if there != here:
                raise DataError(*_mismatch(key, there, here))
        self._samples = state_dict["samples"]
        self._position = Position(state_dict["epoch"], state_dict["document"], state_dict["offset"])

    def _stream_identity(self) -> dict[str, int]:
        return {"seq_len": self.seq_len, "seed": self.stream.seed, "fingerprint": self.fingerprint}


def _mismatch(key: str, there: int, here: int) -> tuple[str, str]:
    if key == "fingerprint":
        return (
            "the training data changed since the checkpoint was written (documents, files or their sizes)",
            "restore the files (or the Python installation) that the run started with, or start a new run",
        )
    return (
        f"the checkpoint's place in the data was taken with training.{key} = {there}, not {here}",
        f"resume with training.{key} = {there}, or start a new run",
    )


def build_loader(
    data: DataSettings,
    seq_len: int,
    local_batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
    split: Literal["train", "validation"] = "train",
) -> TokenLoader:
    """The loader of one rank for the `[data]` section of a recipe.

    `rank` and `world_size` count data-parallel ranks. The validation order does not depend on `seed`, so runs with
    different seeds are measured on the same tokens.

    Raises:
        DataError: unknown source or tokenizer, missing directory, no documents, or none in this split.
    """
    assert split in ("train", "validation")
    tokenizer = build_tokenizer(data.tokenizer)
    documents = documents_of(data, split)
    return TokenLoader(
        TokenStream(documents, tokenizer, seed if split == "train" else 0),
        seq_len=seq_len,
        local_batch_size=local_batch_size,
        rank=rank,
        world_size=world_size,
        fingerprint=fingerprint(documents),
        restart=split == "validation",
    )
