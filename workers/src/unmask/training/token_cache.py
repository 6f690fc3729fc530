"""Documents as tokens on disk: encoded once, mapped into memory ever after.

An entry is a folder named by its fingerprint: a digest of the content of the data files, the tokenizer and
its chat template, how documents are read, and the version of the encoding. It holds plain little-endian
arrays and ``index.json``, which has their sizes and digests and its own. Shape letters: N documents, T
tokens of all of them.

* An entry is made in a folder beside its own and moved there whole: what has the name is complete.
* One process makes it, others wait for its lock and find it made. Where a file system has no locks, all make
  it, the first move wins, and the others' is thrown away.
* Each entry is checked against its digests before it is used, and made anew if it does not match.

Making an entry streams: memory is that of some hundred documents, however large the data.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from unmask.errors import DataError, ModelError, UsageError
from unmask.models.tokenizer import Tokenizer
from unmask.training.encoding import ENCODING_VERSION, Encoded, encode, encode_pair, encode_texts
from unmask.training.records import Format, Preference, Record, Text, records_of
from unmask.training.sources import DataFile, content_digest, signature

__all__ = ["TokenCache", "TokenFile"]

_log = logging.getLogger(__name__)

_LAYOUT_VERSION = 1
_BATCH_CHARACTERS = 1 << 20
_BATCH_RECORDS = 1024
_WORTH_TELLING_S = 10.0
_SETTLED_S = 2.0
"""A file that was written to more recently may be written to again without its times changing."""

_COLUMNS: Mapping[str, DTypeLike] = {
    "ids": np.dtype("<i4"),
    "lengths": np.dtype("<i8"),
    "prompt_lengths": np.dtype("<i8"),
    "turns": np.dtype("<i2"),
    "lines": np.dtype("<i8"),
    "files": np.dtype("<i4"),
}
_LEARNT = ("ids", "lengths", "prompt_lengths", "turns")
"""The columns that decide what is learnt, in the order in which they are digested."""

_Entry: TypeAlias = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFile:
    """The documents of one source, encoded; large arrays are mapped, not read."""

    files: tuple[DataFile, ...]
    format: Format
    ids: NDArray[np.int32]
    """(T,)"""
    lengths: NDArray[np.int64]
    """(N,)"""
    prompt_lengths: NDArray[np.int64]
    """(N,)"""
    lines: NDArray[np.int64]
    """(N,): where in its file each begins."""
    file_numbers: NDArray[np.int32]
    """(N,): which of ``files`` that is."""
    turns: NDArray[np.int16] | None
    """(T,): as :attr:`unmask.training.corpus.Corpus.turns`."""
    digest: str
    """SHA-256 of the documents as they are learnt: a change of file or tokenizer changes it."""
    content: str
    """SHA-256 of the content of the files, whatever their names."""
    tokenizer: str
    """The tokenizer's fingerprint."""

    @property
    def paired(self) -> bool:
        """Whether it holds pairs of documents: the chosen and the rejected answer of each record."""
        return self.format == "preference"

    def place(self, document: int) -> str:
        """Where a document comes from, for an error."""
        file = self.files[int(self.file_numbers[document])]
        return file.place(int(self.lines[document]))


class TokenCache:
    """Encodes data files, each content once for all runs that share the folder."""

    def __init__(self, tokenizer: Tokenizer, *, eos_token_id: int, folder: Path | None) -> None:
        """Keep entries in ``folder``; without one, make them anew in a temporary place."""
        self._tokenizer = tokenizer
        self._eos = eos_token_id
        self._folder = folder

    def tokens(self, files: Sequence[DataFile], format: Format, *, turns: bool) -> TokenFile:  # noqa: A002
        """The documents of ``files``, in their order.

        Raises:
            DataError: A file is not what it should be, or holds no documents together with the others.
            UsageError: The folder cannot be written to.
        """
        if self._folder is None:
            with tempfile.TemporaryDirectory(prefix="unmask-data-") as made:
                content = _digest_of([content_digest(file.uri) for file in files])
                self._make(Path(made), files, format, turns=turns)
                found = _Opened(Path(made))
                return self._token_file(files, format, found, content)  # mapped files outlive their names
        with self._writable():
            before = [signature(file.uri)[0] for file in files]
            content = _digest_of([self._content(file.uri) for file in files])
            folder = self._folder / self._fingerprint(content, format, turns=turns)
            entry = self._checked(folder)
            if entry is None:
                with self._locked(folder):
                    entry = self._checked(folder) or self._replaced(
                        folder, files, before, format, turns=turns
                    )
            return self._token_file(files, format, entry, content)

    def _fingerprint(self, content: str, format: Format, *, turns: bool) -> str:  # noqa: A002
        decides = {
            "content": content,
            "format": format,
            "turns": turns,
            "eos": self._eos,
            "tokenizer": self._tokenizer.fingerprint,
            "encoding": ENCODING_VERSION,
            "layout": _LAYOUT_VERSION,
        }
        return _digest_of(decides)[:32]

    def _token_file(
        self,
        files: Sequence[DataFile],
        format: Format,  # noqa: A002
        found: "_Opened",
        content: str,
    ) -> TokenFile:
        columns = found.columns
        return TokenFile(
            files=tuple(files),
            format=format,
            ids=columns["ids"],
            lengths=columns["lengths"],
            prompt_lengths=columns["prompt_lengths"],
            lines=columns["lines"],
            file_numbers=columns["files"],
            turns=columns.get("turns"),
            digest=found.digest,
            content=content,
            tokenizer=self._tokenizer.fingerprint,
        )

    # Making an entry

    def _replaced(
        self,
        folder: Path,
        files: Sequence[DataFile],
        signatures: Sequence[str],
        format: Format,  # noqa: A002
        *,
        turns: bool,
    ) -> "_Opened":
        """A new entry at ``folder``, where there is none, or a damaged one."""
        started = time.monotonic()
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            os.chmod(made, 0o755)
            self._make(made, files, format, turns=turns)
            for file, known in zip(files, signatures, strict=True):
                if signature(file.uri)[0] != known:
                    raise DataError(f"{file.uri}: was changed while it was read; start again when it is done")
            if folder.exists():
                os.rename(folder, made / "damaged")
            with contextlib.suppress(OSError):  # another process was first
                os.rename(made, folder)
            shutil.rmtree(folder / "damaged", ignore_errors=True)
        finally:
            shutil.rmtree(made, ignore_errors=True)
        found = self._checked(folder)
        if found is None:
            raise UsageError(f"{folder}: what was written reads back differently; check the disk")
        seconds = time.monotonic() - started
        _log.log(
            logging.INFO if seconds > _WORTH_TELLING_S else logging.DEBUG,
            "encoded %s: %d documents of %d tokens in %.1f s, kept in %s",
            files[0].uri if len(files) == 1 else f"{files[0].uri} and {len(files) - 1} files beside it",
            len(found.columns["lengths"]),
            len(found.columns["ids"]),
            seconds,
            folder,
        )
        return found

    def _make(
        self,
        folder: Path,
        files: Sequence[DataFile],
        format: Format,  # noqa: A002
        *,
        turns: bool,
    ) -> None:
        columns = {
            name: _Column(folder / f"{name}.bin", dtype)
            for name, dtype in _COLUMNS.items()
            if turns or name != "turns"
        }
        documents = 0
        try:
            for number, file in enumerate(files):
                for batch in self._encoded(file, format, turns=turns):
                    encoded = [document for _, document in batch]
                    documents += len(encoded)
                    columns["ids"].add([token for one in encoded for token in one.ids])
                    columns["lengths"].add([len(one.ids) for one in encoded])
                    columns["prompt_lengths"].add([one.prompt_length for one in encoded])
                    columns["lines"].add([record.line for record, _ in batch])
                    columns["files"].add([number] * len(batch))
                    if turns:
                        columns["turns"].add(np.concatenate([_turn_of_each_token(one) for one in encoded]))
        finally:
            for column in columns.values():
                column.close()
        if not documents:
            raise DataError(f"{files[0].uri}: holds no documents; a data file needs at least one")
        index = {
            "columns": {name: column.described() for name, column in columns.items()},
            "digest": _digest_of_files([columns[name].path for name in _LEARNT if name in columns]),
        }
        text = json.dumps({"index": index, "sha256": _digest_of(index)}, indent=1)
        with (folder / "index.json").open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())

    def _encoded(
        self,
        file: DataFile,
        format: Format,  # noqa: A002
        *,
        turns: bool,
    ) -> Iterator[list[tuple[Record, Encoded]]]:
        """The documents of ``file`` in batches of bounded size."""
        for records in _batches(records_of(file, format)):
            texts = [record for record in records if isinstance(record, Text)]
            if len(texts) == len(records):
                with contextlib.suppress(UsageError, ModelError):  # one by one, they say which it is
                    many = encode_texts(texts, self._tokenizer, eos_token_id=self._eos, turns=turns)
                    yield list(zip(records, many, strict=True))
                    continue
            yield [
                (record, document)
                for record in records
                for document in self._encode(record, file, turns=turns)
            ]

    def _encode(self, record: Record, file: DataFile, *, turns: bool) -> tuple[Encoded, ...]:
        """The document of a record, or the two of a preference."""
        try:
            if isinstance(record, Preference):
                return encode_pair(record, self._tokenizer, eos_token_id=self._eos)
            return (encode(record, self._tokenizer, eos_token_id=self._eos, turns=turns),)
        except (UsageError, ModelError, DataError) as error:
            raise DataError(f"{file.place(record.line)}: {error}") from None

    # Trusting what is there

    def _checked(self, folder: Path) -> "_Opened | None":
        """The entry at ``folder`` if it is whole."""
        if not folder.exists():
            return None
        try:
            found = _Opened(folder)
            for path, digest in found.digests.items():
                if self._content(str(path)) != digest:
                    raise ValueError(f"{path.name} is not what was written")
        except (OSError, ValueError, KeyError, TypeError, DataError) as error:
            _log.warning("%s is damaged (%s) and is made anew", folder, error)
            return None
        return found

    def _content(self, uri: str) -> str:
        """SHA-256 of a file, remembered until the file's signature changes."""
        assert self._folder is not None, "the caller's part"
        known, written = signature(uri)
        memory = self._folder / "digests" / hashlib.sha256(known.encode()).hexdigest()[:32]
        with contextlib.suppress(OSError):
            text = memory.read_text(encoding="ascii")
            if len(text) == 64:
                return text
        digest = content_digest(uri)
        settled = time.time() - written > _SETTLED_S and signature(uri)[0] == known
        if settled:
            memory.parent.mkdir(parents=True, exist_ok=True)
            _write_whole(memory, digest)
        return digest

    @contextmanager
    def _writable(self) -> Iterator[None]:
        assert self._folder is not None, "the caller's part"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            raise UsageError(
                f"{self._folder}: cannot keep encoded data there ({error.strerror or error}); free space, or "
                "name another folder in data.cache.uri"
            ) from None

    @contextmanager
    def _locked(self, folder: Path) -> Iterator[None]:
        """Be the only process that makes the entry at ``folder``."""
        with (folder.parent / f".{folder.name}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:  # no locks on this file system: others may make it too
                yield
                return
            for left_over in folder.parent.glob(f".{folder.name}.*"):  # by a process that was killed
                if left_over.is_dir():
                    shutil.rmtree(left_over, ignore_errors=True)
            yield


class _Column:
    """One array, written piece by piece."""

    def __init__(self, path: Path, dtype: DTypeLike) -> None:
        self.path = path
        self._dtype = np.dtype(dtype)
        self._stream = path.open("wb")
        self._digest = hashlib.sha256()
        self._bytes = 0

    def add(self, values: Sequence[int] | NDArray[Any]) -> None:
        content = np.asarray(values, self._dtype).tobytes()
        self._stream.write(content)
        self._digest.update(content)
        self._bytes += len(content)

    def close(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()

    def described(self) -> Mapping[str, Any]:
        return {"dtype": self._dtype.str, "bytes": self._bytes, "sha256": self._digest.hexdigest()}


class _Opened:
    """An entry's arrays, mapped; their content is not checked, their sizes are."""

    def __init__(self, folder: Path) -> None:
        """Raise ValueError, KeyError, TypeError or OSError if it is not an entry."""
        whole = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        index = whole["index"]
        if whole["sha256"] != _digest_of(index):
            raise ValueError("index.json is not what was written")
        self.digest: str = index["digest"]
        self.digests = {folder / f"{name}.bin": one["sha256"] for name, one in index["columns"].items()}
        self.columns: dict[str, NDArray[Any]] = {}
        for name, one in index["columns"].items():
            path, dtype = folder / f"{name}.bin", np.dtype(_COLUMNS[name])
            size = path.stat().st_size
            if (size, dtype.str) != (one["bytes"], one["dtype"]):
                raise ValueError(f"{path.name} has {size} bytes, not {one['bytes']}")
            # The plain array on the mapping: indexing the mapping itself gives more mappings.
            self.columns[name] = np.asarray(np.memmap(path, dtype, "r"))


def _batches(records: Iterator[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    characters = 0
    for record in records:
        batch.append(record)
        characters += len(record.text) if isinstance(record, Text) else _BATCH_CHARACTERS // _BATCH_RECORDS
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_RECORDS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _turn_of_each_token(document: Encoded) -> NDArray[np.int16]:
    """-1 for what is given, and the number of its answer for every other token."""
    numbers = np.full(len(document.ids), -1, np.int16)
    for number, (start, stop) in enumerate(document.turns):
        numbers[start:stop] = number
    return numbers


def _digest_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _digest_of_files(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _write_whole(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", encoding="ascii", dir=path.parent, delete=False) as stream:
        stream.write(text)
    os.replace(stream.name, path)
