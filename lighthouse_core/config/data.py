"""[data]: which text, which tokens, how much of it is held out."""

import math
import os
import re
from fractions import Fraction
from itertools import chain, count
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from pydantic_core import PydanticCustomError

from lighthouse_core.config.section import MOST_TOKENS, Paths, PathText, PositiveFloat, Section, conflict

_Text = Annotated[str, Field(min_length=1)]
_LONGEST_NAME = 40


def _plain(name: str) -> str:
    if not re.fullmatch(r"([A-Za-z0-9_][A-Za-z0-9._+-]*)?", name) or len(name) > _LONGEST_NAME:
        raise PydanticCustomError(
            "name", "a name has up to {most} letters, digits and . _ + -", {"most": _LONGEST_NAME}
        )
    return name


class Origin(Section):
    """Where the text of one source comes from.

    Attributes:
        source: "python-sources" (folders of .py files), "files" (globs of .txt, .md, .parquet, and of .jsonl, .json and
            .csv, these also as .gz or .zst), "hf" (one data set of the Hugging Face hub or a local path, streamed),
            "tokens" (a directory of `data prepare` or `data import`).
        paths: what the source reads: directories, globs, one data set, or one directory.
        text_key: of JSON objects, columns of .csv and .parquet, and data set rows.
        hf_config, hf_split, hf_revision: of a data set; "" is its default.
    """

    # What an error calls the table.
    _table: ClassVar[str] = "data"

    source: Literal["python-sources", "files", "hf", "tokens"] = "python-sources"
    paths: Paths = ("stdlib",)
    text_key: _Text = "text"
    hf_config: str = ""
    hf_split: _Text = "train"
    hf_revision: str = ""

    @model_validator(mode="after")
    def _check_origin(self) -> "Origin":
        table = self._table
        if self.source in ("hf", "tokens") and len(self.paths) != 1:
            more = "" if table == "data.sources" else ": several sources have a [[data.sources]] table each"
            raise conflict("paths", f'{table}.paths must have one entry for {table}.source "{self.source}"{more}')
        if self.source in ("python-sources", "files"):
            for key, default in (("hf_config", ""), ("hf_split", "train"), ("hf_revision", "")):
                if getattr(self, key) != default:
                    raise conflict(key, f'{table}.{key} is for {table}.source "hf", not "{self.source}"')
        return self


class SourceSection(Origin):
    """One source of a mixture, a `[[data.sources]]` table.

    Attributes:
        weight: what share of the sequences is of this source, relative to the weights of the others.
        name: of the source in reports; by default from its first path.
    """

    _table: ClassVar[str] = "data.sources"

    weight: PositiveFloat
    name: Annotated[str, AfterValidator(_plain)] = ""

    @model_validator(mode="after")
    def _check_paths(self) -> "SourceSection":
        if "paths" not in self.model_fields_set and self.source != "python-sources":
            raise conflict("source", f'data.sources.paths is missing for data.sources.source "{self.source}"')
        return self


class DataSection(Origin):
    """Where the training text comes from: one source, or several, of which the sequences are mixed.

    Attributes:
        tokenizer: "bytes", or the path of a sentencepiece .model, of a tokenizer.json, or of a directory with one.
        validation: share of documents held out, 0 <= validation < 1.
        shuffle: "documents": these in a seeded order, and samples cut from one after another; "samples": these, too, so
            that a batch is of many documents even where one is longer than a batch; "auto": samples where the token
            counts are known beforehand: of prepared tokens, and of Python sources as bytes.
        packing: "documents": attention, positions and labels stay inside a document; a method that pools has each one
            padded to whole windows. "concat" (the paper): they go from one document to the next. Samples are cut from
            documents one after another either way, and one that is cut goes on in the next sample.
        align: tokens of which each document takes a whole multiple where they are kept apart; 0 is what the method of
            stage 1 needs. Runs see the same sequences only with the same number.
        sources: the sources of a mixture, in place of the keys that name one source; empty for one source.
    """

    tokenizer: PathText = "bytes"
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.05
    shuffle: Literal["auto", "documents", "samples"] = "auto"
    packing: Literal["documents", "concat"] = "documents"
    align: Annotated[int, Field(ge=0, le=MOST_TOKENS)] = 0
    sources: Annotated[tuple[SourceSection, ...], Field(strict=False, min_length=1)] = ()

    @model_validator(mode="after")
    def _check(self) -> "DataSection":
        if self.align and self.packing == "concat":
            raise conflict("align", 'data.align is for data.packing "documents", which pads each of them')
        if self.sources and (both := [key for key in Origin.model_fields if key in self.model_fields_set]):
            raise conflict(
                both[0],
                f"data.{both[0]} is for one source, and data.sources for several: use [[data.sources]] alone for a "
                "mixture, or leave it out",
            )
        for number, name in enumerate(one.name for one in self.sources):
            if name and name in [one.name for one in self.sources[:number]]:
                raise conflict("sources", f'data.sources has two of the name "{name}": each needs its own')
        if self.shuffle == "samples":
            for part in self.parts:
                if part.source in ("files", "hf"):
                    raise conflict("shuffle", 'data.shuffle "samples" needs token counts, as data.source "tokens" has')
        return self

    @model_serializer(mode="wrap")
    def _one_form(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What a recipe may hold: the keys of one source, or those of several."""
        return {
            key: value
            for key, value in handler(self).items()
            if not (key in Origin.model_fields if self.sources else key == "sources")
        }

    @property
    def parts(self) -> "tuple[DataSection, ...]":
        """A section of each source alone; this one, where it has one source."""
        if not self.sources:
            return (self,)
        return tuple(
            self.model_copy(update={key: getattr(one, key) for key in Origin.model_fields} | {"sources": ()})
            for one in self.sources
        )

    @property
    def origin(self) -> dict[str, Any]:
        """What a report says of where its text is from."""
        parts: list[dict[str, Any]] = [{"source": part.source, "paths": list(part.paths)} for part in self.parts]
        if self.sources:
            mixed = [part | {"weight": one.weight} for part, one in zip(parts, self.sources, strict=True)]
            return {"sources": mixed, "validation": self.validation}
        return parts[0] | {"validation": self.validation}

    @property
    def names(self) -> tuple[str, ...]:
        """What reports call each of the parts; no two are the same."""
        given = {one.name for one in self.sources} - {""}
        taken, names = set(given), []
        for one in self.sources or (self,):
            if not (name := getattr(one, "name", "")):
                # A name that was given to another source is no hint of this one.
                free = [short for short in (_short_name(one), _short_name(one, 2)) if short not in given]
                own = free[0] if free else one.source
                name = next(name for name in chain([own], (f"{own}-{i}" for i in count(2))) if name not in taken)
            taken.add(name)
            names.append(name)
        return tuple(names)

    @property
    def weights(self) -> tuple[int, ...]:
        """Of the parts, in the ratio of the recipe's decimal numbers."""
        exact = [Fraction(repr(one.weight)) for one in self.sources] or [Fraction(1)]
        scale = math.lcm(*(weight.denominator for weight in exact))
        return tuple(int(weight * scale) for weight in exact)

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the parts in the sequences; they add up to 1."""
        total = sum(self.weights)
        return tuple(weight / total for weight in self.weights)


def _short_name(origin: Origin, parts: int = 1) -> str:
    """The last parts of a source's first path that are no patterns, so many of them, without the suffix."""
    plain = [part for part in origin.paths[0].split("/") if part.strip(".~") and not set(part) & set("*?[")]
    name = re.sub(r"[^A-Za-z0-9._+-]+", "-", os.path.splitext("-".join(plain[-parts:]))[0]).lstrip(".+-")
    return name[: _LONGEST_NAME - 5] or origin.source
