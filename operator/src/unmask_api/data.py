"""The data that a job learns from and is measured on."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from unmask_api.base import ApiModel, DataUri, DecimalString, FileWord, Rule, Uri

__all__ = ["Data", "DataCache", "DataSource", "StageData"]


class DataSource(ApiModel):
    """One file of documents, or a folder of files."""

    rules: ClassVar = (
        Rule(
            rule="!has(self.share) || double(self.share) > 0.0",
            message="share must be above 0: drop the source instead",
            field_path=".share",
        ),
        Rule(
            rule="!has(self.share) || self.weight == 1",
            message="share and weight are two ways to say how much of a source is learnt: drop one",
            field_path=".weight",
        ),
    )

    uri: DataUri
    """A ``.jsonl``, ``.jsonl.gz``, ``.jsonl.zst``, ``.parquet`` or ``.txt`` file, or a folder of such files.

    The files of a folder say in their names which split they belong to, as ``train-00000-of-00002.parquet``.
    """
    format: Literal["text", "messages", "completion", "preference", "tokens"]
    """What a document is.

    Plain ``text``, chat ``messages``, a prompt and its ``completion``, a ``preference``: a prompt (or the
    messages before the answer) with the answer ``chosen`` and the answer ``rejected``; or ``tokens`` already.
    """
    split: FileWord | None = None
    """Of a folder; left out, ``train`` for documents to learn from and ``validation`` for the others."""
    weight: Annotated[int, Field(ge=1, le=1000)] = 1
    """How many times the documents of this file occur in one pass over the data."""
    share: DecimalString | None = None
    """Of the tokens that are learnt, relative to the shares of the other sources.

    Sources then come in these proportions at any time, however large they are: a small one is passed through
    more often, in another order each time. Either all sources to learn from have one, or none.
    """


class StageData(ApiModel):
    """What a stage learns from and is measured on."""

    rules: ClassVar = (
        Rule(
            rule="self.train.all(source, has(source.share)) || self.train.all(source, !has(source.share))",
            message="either all sources to learn from have a share, or none: add or drop one",
            field_path=".train",
        ),
        Rule(
            rule="self.validation.all(source, !has(source.share))",
            message="a share is of what is learnt: drop it from validation",
            field_path=".validation",
        ),
    )

    train: Annotated[tuple[DataSource, ...], Field(min_length=1, max_length=32)]
    """Documents to learn from."""
    validation: Annotated[tuple[DataSource, ...], Field(max_length=32)] = ()
    """Documents to measure on; none: no evaluation."""


class DataCache(ApiModel):
    """A folder in which runs that read the same data with the same tokenizer share what they encoded."""

    uri: Uri
    """The folder; every process of the job must see it."""


class Data(StageData):
    """The data of the job, and how they are read."""

    seed: Annotated[int, Field(ge=0, le=2**53 - 1)] = 0
    """The one seed of the run: random weights, order of the documents, and noise follow from it."""
    overlong: Literal["Error", "Skip", "Split"] = "Error"
    """What to do with a document longer than a row.

    ``Error``: stop. ``Skip``: leave it out and count it. ``Split``: cut ``text``, and ``tokens`` that are all
    learnt, into pieces of a row each, and stop at anything else, since an answer without its prompt teaches
    nothing.
    """
    cache: DataCache | None = None
    """Where data are kept as tokens; left out, in the run folder (of a run in an object store, its copy)."""
