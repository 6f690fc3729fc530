"""Documents as arrays of tokens, read once per file and kept in memory.

All processes hold all documents: which of them a process needs depends on the step, and
tokens of a fine-tuning corpus are small beside a model. Shape letters: N documents,
T tokens of all of them.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from unmask.errors import DataError, ModelError, UsageError
from unmask.models.tokenizer import Tokenizer
from unmask.training.encoding import Encoded, Question, encode, encode_pair, question
from unmask.training.records import Format, Preference, Record, Text, read_records

__all__ = ["Corpus", "Library", "Overlong", "Source"]

Overlong: TypeAlias = Literal["Error", "Skip", "Split"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Source:
    """A data file, and how often each of its documents occurs in one pass over the data."""

    path: Path
    format: Format
    weight: int = 1


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents laid end to end; of one that was split, each piece is a document."""

    ids: NDArray[np.int32]
    """(T,)"""
    starts: NDArray[np.int64]
    """(N,): where each document begins in ``ids``."""
    lengths: NDArray[np.int64]
    """(N,): tokens of each, end of text included."""
    prompt_lengths: NDArray[np.int64]
    """(N,): how many of them are given."""
    repeats: NDArray[np.int64]
    """(N,): occurrences in one pass over the data."""
    turns: NDArray[np.int16] | None = None
    """(T,): which answer of its document each token belongs to, from 0, and -1 for what is given; None where
    a document has no more than one."""
    skipped: int = 0
    """Documents, or pairs, that were left out for being too long."""
    paired: bool = False
    """Whether documents 2i and 2i + 1 are the chosen and the rejected answer of pair i, and come together:
    pairs then are what a pass over the data counts, so that ``repeats`` has one entry for each."""

    def __len__(self) -> int:
        return len(self.starts) // (2 if self.paired else 1)

    @cached_property
    def once_through(self) -> NDArray[np.int64]:
        """Numbers of the documents (or pairs) of one pass over the data, in the order of the files."""
        return np.repeat(np.arange(len(self)), self.repeats)

    def widths(self, multiple: int) -> NDArray[np.int64]:
        """Tokens of each document, or of each pair with both answers rounded up to ``multiple``: (N,)."""
        return _widths(self.lengths, multiple, paired=self.paired)


@dataclass(frozen=True, slots=True)
class _File:
    """One data file, encoded."""

    path: Path
    format: Format
    ids: NDArray[np.int32]
    lengths: NDArray[np.int64]
    prompt_lengths: NDArray[np.int64]
    lines: NDArray[np.int64]
    turns: NDArray[np.int16] | None = None

    def digest(self) -> str:
        """SHA-256 of the documents as they are learnt: a change of file or tokenizer changes it."""
        arrays = (self.ids, self.lengths, self.prompt_lengths, self.turns)
        content = b"".join(array.tobytes() for array in arrays if array is not None)
        return hashlib.sha256(content).hexdigest()

    @property
    def paired(self) -> bool:
        """Whether it holds pairs of documents."""
        return self.format == "preference"

    def widest(self, multiples: Sequence[int]) -> NDArray[np.int64]:
        """The widths (see :meth:`Corpus.widths`) with the multiple with which each is largest."""
        widths = [_widths(self.lengths, multiple, paired=self.paired) for multiple in multiples]
        most: NDArray[np.int64] = np.max(widths, axis=0)
        return most


class Library:
    """The job's data files, each read and encoded when it is first asked for."""

    def __init__(self, tokenizer: Tokenizer, *, eos_token_id: int) -> None:
        """Encode with ``tokenizer``; documents end with ``eos_token_id``."""
        self._tokenizer = tokenizer
        self._eos = eos_token_id
        self._files: dict[tuple[Path, Format, bool], _File] = {}

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
        files = [self._file(source, turns=turns) for source in sources]
        if overlong == "Split":
            files = [_split(file, length) if file.format == "text" else file for file in files]
        if overlong != "Skip":
            for file in files:
                _refuse_overlong(file, length, multiples)
        paired = files[0].paired
        assert all(file.paired == paired for file in files), "the manifest's rules"
        what = "pairs" if paired else "documents"
        whole = np.concatenate([file.widest(multiples) for file in files]) <= length
        if not whole.any():
            raise DataError(
                f"{files[0].path}: all {len(whole)} {what} are longer than {length} tokens; raise length"
            )
        skipped = int((~whole).sum())
        if skipped:
            _log.warning(
                "%d of %d %s are longer than %d tokens and left out", skipped, len(whole), what, length
            )
        weights = [
            np.full(len(file.widest(multiples)), source.weight)
            for file, source in zip(files, sources, strict=True)
        ]
        lengths = np.concatenate([file.lengths for file in files])
        fits = np.repeat(whole, 2) if paired else whole
        return Corpus(
            ids=np.concatenate([file.ids for file in files]),
            turns=np.concatenate([file.turns for file in files if file.turns is not None]) if turns else None,
            starts=(np.cumsum(lengths) - lengths)[fits],
            lengths=lengths[fits],
            prompt_lengths=np.concatenate([file.prompt_lengths for file in files])[fits],
            repeats=np.concatenate(weights)[whole],
            skipped=skipped,
            paired=paired,
        )

    def questions(self, sources: Sequence[Source], *, count: int) -> list[Question]:
        """The first ``count`` prompts of the sources that hold any, with their answers."""
        questions: list[Question] = []
        for source in sources:
            if source.format == "text" or len(questions) >= count:
                continue
            for record in read_records(source.path, source.format)[: count - len(questions)]:
                questions.append(self._question(record, source.path))
        return questions

    def digest(self, source: Source, *, turns: bool = False) -> str:
        """SHA-256 of the encoded documents of ``source``."""
        return self._file(source, turns=turns).digest()

    def _file(self, source: Source, *, turns: bool) -> _File:
        key = (source.path, source.format, turns)
        if key not in self._files:
            self._files[key] = self._read(source, turns=turns)
        return self._files[key]

    def _read(self, source: Source, *, turns: bool) -> _File:
        records = read_records(source.path, source.format)
        parts = [self._encode(record, source.path, turns=turns) for record in records]
        encoded = [document for documents in parts for document in documents]
        return _File(
            path=source.path,
            format=source.format,
            ids=np.concatenate([np.array(one.ids, np.int32) for one in encoded]),
            lengths=np.array([len(one.ids) for one in encoded], np.int64),
            prompt_lengths=np.array([one.prompt_length for one in encoded], np.int64),
            lines=np.array(
                [record.line for record, part in zip(records, parts, strict=True) for _ in part], np.int64
            ),
            turns=np.concatenate([_turn_of_each_token(one) for one in encoded]) if turns else None,
        )

    def _encode(self, record: Record, path: Path, *, turns: bool) -> tuple[Encoded, ...]:
        """The document of a record, or the two of a preference."""
        try:
            if isinstance(record, Preference):
                return encode_pair(record, self._tokenizer, eos_token_id=self._eos)
            return (encode(record, self._tokenizer, eos_token_id=self._eos, turns=turns),)
        except (UsageError, ModelError) as error:
            raise DataError(f"{path}:{record.line}: {error}") from None

    def _question(self, record: Record, path: Path) -> Question:
        assert not isinstance(record, Text), "text asks nothing"
        try:
            found = question(record, self._tokenizer, eos_token_id=self._eos)
        except (UsageError, ModelError) as error:
            raise DataError(f"{path}:{record.line}: {error}") from None
        if not found.prompt:
            raise DataError(f"{path}:{record.line}: the prompt has no tokens, so nothing can be asked")
        return found


def _turn_of_each_token(document: Encoded) -> NDArray[np.int16]:
    """-1 for what is given, and the number of its answer for every other token."""
    numbers = np.full(len(document.ids), -1, np.int16)
    for number, (start, stop) in enumerate(document.turns):
        numbers[start:stop] = number
    return numbers


def _split(file: _File, length: int) -> _File:
    """The same tokens, documents longer than ``length`` cut into pieces of it; the last one has the rest."""
    pieces = -(-file.lengths // length)
    lengths = np.full(pieces.sum(), length)
    lengths[np.cumsum(pieces) - 1] = file.lengths - (pieces - 1) * length
    return replace(
        file, lengths=lengths, prompt_lengths=np.zeros_like(lengths), lines=np.repeat(file.lines, pieces)
    )


def _widths(lengths: NDArray[np.int64], multiple: int, *, paired: bool) -> NDArray[np.int64]:
    if not paired:
        return lengths
    both: NDArray[np.int64] = (-(-lengths // multiple) * multiple).reshape(-1, 2).sum(1)
    return both


def _refuse_overlong(file: _File, length: int, multiples: Sequence[int]) -> None:
    way_out = "Skip or Split" if file.format == "text" else "Skip"
    widths, lines = file.widest(multiples), file.lines[:: 2 if file.paired else 1]
    what = "tokens with both answers in whole blocks" if file.paired else "tokens"
    for place in np.flatnonzero(widths > length)[:1]:
        raise DataError(
            f"{file.path}:{lines[place]}: {widths[place]} {what}, but rows hold {length}; "
            f"shorten it, raise length, or set data.overlong to {way_out}"
        )
