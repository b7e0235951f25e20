"""[data]: which text, which tokens, how much of it is held out."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lighthouse_core.config.section import Paths, PathText, Section, conflict

_Text = Annotated[str, Field(min_length=1)]


class DataSection(Section):
    """Where the training text comes from.

    Attributes:
        source: "python-sources" (folders of .py files), "files" (globs of .txt, .md, .jsonl and .parquet), "hf" (one
            data set of the Hugging Face hub or a local path, streamed), "tokens" (a directory of `data prepare`).
        paths: what the source reads: directories, globs, one data set, or one directory.
        tokenizer: "bytes", or the path of a sentencepiece .model or a tokenizer.json.
        validation: share of documents held out, 0 <= validation < 1.
        shuffle: "documents": these in a seeded order, and samples cut from one after another; "samples": these, too, so
            that a batch is of many documents even where one is longer than a batch; "auto": samples where the token
            counts are known beforehand: of prepared tokens, and of Python sources as bytes.
        packing: "concat": documents one after another, cut into samples wherever these end.
        text_key: of .jsonl objects, .parquet columns and data set rows.
        hf_config, hf_split, hf_revision: of a data set; "" is its default.
    """

    source: Literal["python-sources", "files", "hf", "tokens"] = "python-sources"
    paths: Paths = ("stdlib",)
    tokenizer: PathText = "bytes"
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.05
    shuffle: Literal["auto", "documents", "samples"] = "auto"
    packing: Literal["concat"] = "concat"
    text_key: _Text = "text"
    hf_config: str = ""
    hf_split: _Text = "train"
    hf_revision: str = ""

    @model_validator(mode="after")
    def _check(self) -> "DataSection":
        if self.source in ("hf", "tokens") and len(self.paths) != 1:
            raise conflict("paths", f'data.paths must have one entry for data.source "{self.source}"')
        if self.source in ("python-sources", "files"):
            for key, default in (("hf_config", ""), ("hf_split", "train"), ("hf_revision", "")):
                if getattr(self, key) != default:
                    raise conflict(key, f'data.{key} is for data.source "hf", not "{self.source}"')
        if self.shuffle == "samples" and self.source in ("files", "hf"):
            raise conflict("shuffle", 'data.shuffle "samples" needs token counts, as data.source "tokens" has')
        return self
