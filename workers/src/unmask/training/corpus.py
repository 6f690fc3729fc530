"""Documents as arrays of tokens.

All processes map all documents: which of them a process needs depends on the step. Tokens stay on disk until
a step asks for them; what is held for each document is some numbers. Shape letters: N documents,
T tokens of all of them.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from unmask.errors import DataError, ModelError, UsageError
from unmask.models.tokenizer import Tokenizer
from unmask.training.encoding import Question, question
from unmask.training.mixing import Mix
from unmask.training.records import Format, Record, Text, Tokens, records_of
from unmask.training.sources import DataFile, Location, data_files
from unmask.training.token_cache import TokenCache, TokenFile
from unmask_api.places import working_folder
from unmask_api.train_job import TrainSpec

__all__ = ["Corpus", "Joined", "Library", "Overlong", "Source", "cache_folder"]

Overlong: TypeAlias = Literal["Error", "Skip", "Split"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Source:
    """Data files, and how often each of their documents occurs in one pass over the data."""

    path: Location
    """A file, or a folder with files of several splits."""
    format: Format
    weight: int = 1
    split: str | None = None
    """Of a folder; None: train."""
    share: Fraction | None = None
    """Of the tokens of a mix; None where a pass over the data has each document ``weight`` times."""


class Joined:
    """Arrays laid end to end without being copied, as far as indexing goes."""

    def __init__(self, parts: Sequence[NDArray[Any]]) -> None:
        """One array after the other, all of one type."""
        self._parts = parts
        self._starts = np.cumsum([0, *(len(part) for part in parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: slice | NDArray[np.int64]) -> NDArray[Any]:
        """A copy of the elements: of a slice, or one for each entry of an array of indices from 0."""
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        found = np.empty(index.shape, self._parts[0].dtype)
        owner = np.searchsorted(self._starts, index, side="right") - 1
        for number in np.unique(owner):
            mine = owner == number
            found[mine] = self._parts[number][index[mine] - self._starts[number]]
        return found


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents laid end to end; of one that was split, each piece is a document."""

    ids: NDArray[np.int32] | Joined
    """(T,)"""
    starts: NDArray[np.int64]
    """(N,): where each document begins in ``ids``."""
    lengths: NDArray[np.int64]
    """(N,): tokens of each, end of text included."""
    prompt_lengths: NDArray[np.int64]
    """(N,): how many of them are given."""
    repeats: NDArray[np.int64]
    """(N,): occurrences in one pass over the data."""
    turns: NDArray[np.int16] | Joined | None = None
    """(T,): which answer of its document each token belongs to, from 0, and -1 for what is given; None where
    a document has no more than one."""
    skipped: int = 0
    """Documents, or pairs, that were left out for being too long."""
    paired: bool = False
    """Whether documents 2i and 2i + 1 are the chosen and the rejected answer of pair i, and come together:
    pairs then are what a pass over the data counts, so that ``repeats`` has one entry for each."""

    mix: Mix | None = None
    """The proportions in which sources come; None: as often as ``repeats`` says."""

    def __len__(self) -> int:
        return len(self.starts) // (2 if self.paired else 1)

    @cached_property
    def once_through(self) -> NDArray[np.int64]:
        """Numbers of the documents (or pairs) of one pass over the data, in the order of the files."""
        return np.repeat(np.arange(len(self)), self.repeats)

    def widths(self, multiple: int) -> NDArray[np.int64]:
        """Tokens of each document, or of each pair with both answers rounded up to ``multiple``: (N,)."""
        return _widths(self.lengths, multiple, paired=self.paired)


class Library:
    """The job's data, each source read and encoded when it is first asked for."""

    def __init__(self, tokenizer: Tokenizer, *, eos_token_id: int, cache: Path | None = None) -> None:
        """Encode with ``tokenizer``, end documents with ``eos_token_id``; keep the result in ``cache``."""
        self._tokenizer = tokenizer
        self._eos = eos_token_id
        self._cache = TokenCache(tokenizer, eos_token_id=eos_token_id, folder=cache)
        self._tokens: dict[tuple[str, str | None, Format, bool], TokenFile] = {}

    def corpus(
        self,
        sources: Sequence[Source],
        *,
        length: int,
        overlong: Overlong,
        turns: bool = False,
        multiples: Sequence[int] = (1,),
    ) -> Corpus:
        """The documents of ``sources`` that fit rows of ``length`` tokens, or their pieces that do.

        With ``turns``, every turn of a conversation is an answer, and not only the last. Of a pair, both
        answers are rounded up to each of ``multiples``, and fit a row together.

        Raises:
            DataError: A file is not what it should be, or a document is too long and ``overlong`` is Error,
                or is Split and the document holds an answer.
        """
        files = [self.tokens(source, turns=turns) for source in sources]
        if overlong == "Split":
            files = [_split(file, length) if _is_plain(file) else file for file in files]
        if overlong != "Skip":
            for file in files:
                _refuse_overlong(file, length, multiples)
        paired = files[0].paired
        assert all(file.paired == paired for file in files), "the manifest's rules"
        what = "pairs" if paired else "documents"
        whole = np.concatenate([_widest(file, multiples) for file in files]) <= length
        if not whole.any():
            raise DataError(
                f"{sources[0].path}: all {len(whole)} {what} are longer than {length} tokens; raise length"
            )
        skipped = int((~whole).sum())
        if skipped:
            _log.warning(
                "%d of %d %s are longer than %d tokens and left out", skipped, len(whole), what, length
            )
        weights = [
            np.full(len(_widest(file, multiples)), source.weight)
            for file, source in zip(files, sources, strict=True)
        ]
        lengths = np.concatenate([file.lengths for file in files])
        fits = np.repeat(whole, 2) if paired else whole
        return Corpus(
            ids=_joined([file.ids for file in files]),
            turns=_joined([file.turns for file in files if file.turns is not None]) if turns else None,
            starts=(np.cumsum(lengths) - lengths)[fits],
            lengths=lengths[fits],
            prompt_lengths=np.concatenate([file.prompt_lengths for file in files])[fits],
            repeats=np.concatenate(weights)[whole],
            skipped=skipped,
            paired=paired,
            mix=_mix(sources, files, lengths, whole, paired=paired),
        )

    def questions(self, sources: Sequence[Source], *, count: int) -> list[Question]:
        """The first ``count`` prompts of the sources that hold any, with their answers."""
        questions: list[Question] = []
        for source in sources:
            if source.format in ("text", "tokens"):
                continue
            for file in data_files(source.path, split=source.split):
                for record in islice(records_of(file, source.format), count - len(questions)):
                    questions.append(self._question(record, file))
        return questions

    def digest(self, source: Source, *, turns: bool = False) -> str:
        """SHA-256 of the encoded documents of ``source``."""
        return self.tokens(source, turns=turns).digest

    def tokens(self, source: Source, *, turns: bool = False) -> TokenFile:
        """The encoded documents of ``source``; raises as :meth:`corpus`."""
        key = (str(source.path), source.split, source.format, turns)
        if key not in self._tokens:
            files = data_files(source.path, split=source.split)
            self._tokens[key] = self._cache.tokens(files, source.format, turns=turns)
        return self._tokens[key]

    def _question(self, record: Record, file: DataFile) -> Question:
        assert not isinstance(record, Text | Tokens), "it asks nothing"
        try:
            found = question(record, self._tokenizer, eos_token_id=self._eos)
        except (UsageError, ModelError) as error:
            raise DataError(f"{file.place(record.line)}: {error}") from None
        if not found.prompt:
            raise DataError(f"{file.place(record.line)}: the prompt has no tokens, so nothing can be asked")
        return found


def cache_folder(spec: TrainSpec) -> Path:
    """Where a job keeps its encoded data: where it says, else in its run folder."""
    if spec.data.cache:
        return Path(spec.data.cache.uri)
    return working_folder(spec.checkpoint.uri, os.environ) / "data"


def _mix(
    sources: Sequence[Source],
    files: Sequence[TokenFile],
    lengths: NDArray[np.int64],
    kept: NDArray[np.bool_],
    *,
    paired: bool,
) -> Mix | None:
    """The proportions that the sources ask for, by what is left of them; ``kept``: per document or pair."""
    shares = [source.share for source in sources if source.share is not None]
    if not shares:
        return None
    assert len(shares) == len(sources), "the manifest's rules"
    if paired:
        lengths = lengths.reshape(-1, 2).sum(1)
    ends = np.cumsum([len(file.lengths) // (2 if paired else 1) for file in files])[:-1]
    sizes = [int(part.sum()) for part in np.split(kept, ends)]
    tokens = [int(part.sum()) for part in np.split(lengths * kept, ends)]
    for source, size in zip(sources, sizes, strict=True):
        if not size:
            raise DataError(
                f"{source.path}: has a share of the mix, but no document that fits a row; raise length, "
                "or drop the source"
            )
    return Mix.of_tokens(shares, sizes, tokens)


def _joined(parts: Sequence[NDArray[Any]]) -> NDArray[Any] | Joined:
    return parts[0] if len(parts) == 1 else Joined(parts)


def _is_plain(file: TokenFile) -> bool:
    """Whether its documents are nothing but learnt, so that each piece of one is worth learning."""
    return file.format == "text" or (
        file.format == "tokens" and file.turns is None and not file.prompt_lengths.any()
    )


def _split(file: TokenFile, length: int) -> TokenFile:
    """The same tokens, documents longer than ``length`` cut into pieces of it; the last one has the rest."""
    pieces = -(-file.lengths // length)
    lengths = np.full(pieces.sum(), length)
    lengths[np.cumsum(pieces) - 1] = file.lengths - (pieces - 1) * length
    return replace(
        file,
        lengths=lengths,
        prompt_lengths=np.zeros_like(lengths),
        lines=np.repeat(file.lines, pieces),
        file_numbers=np.repeat(file.file_numbers, pieces),
    )


def _widths(lengths: NDArray[np.int64], multiple: int, *, paired: bool) -> NDArray[np.int64]:
    if not paired:
        return lengths
    both: NDArray[np.int64] = (-(-lengths // multiple) * multiple).reshape(-1, 2).sum(1)
    return both


def _widest(file: TokenFile, multiples: Sequence[int]) -> NDArray[np.int64]:
    """The widths (see :meth:`Corpus.widths`) with the multiple with which each is largest."""
    widths = [_widths(file.lengths, multiple, paired=file.paired) for multiple in multiples]
    most: NDArray[np.int64] = np.max(widths, axis=0)
    return most


def _refuse_overlong(file: TokenFile, length: int, multiples: Sequence[int]) -> None:
    way_out = "Skip or Split" if _is_plain(file) else "Skip"
    widths = _widest(file, multiples)
    what = "tokens with both answers in whole blocks" if file.paired else "tokens"
    for place in np.flatnonzero(widths > length)[:1]:
        raise DataError(
            f"{file.place(place * 2 if file.paired else place)}: {widths[place]} {what}, "
            f"but rows hold {length}; "
            f"shorten it, raise length, or set data.overlong to {way_out}"
        )
