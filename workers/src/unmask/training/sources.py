"""Where data lie: one file or a folder of them, here or in an object store, plain or compressed.

A uri is a path, ``file://...``, or whatever fsspec knows (``s3://``, ``gs://``, ``memory://``, ...).
Known endings are ``.jsonl`` and ``.txt``, each also with ``.gz`` or ``.zst`` behind it, and ``.parquet``.
A folder is laid out as the Hugging Face ``datasets`` library expects it: its files say in their names, or
in the names of the folders they lie in, which split they belong to.

Everything is read as a stream: a line, or a row group of a table, at a time.
"""

import gzip
import hashlib
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

from unmask.errors import DataError, UsageError

__all__ = [
    "DataFile",
    "Location",
    "connected",
    "content_digest",
    "data_files",
    "entry_rows",
    "lines",
    "one_line",
    "signature",
]

Kind: TypeAlias = Literal["lines", "paragraphs", "table"]
Location: TypeAlias = Path | str

_KINDS: dict[str, Kind] = {".jsonl": "lines", ".txt": "paragraphs", ".parquet": "table"}
_COMPRESSIONS = (".gz", ".zst")
_KNOWN = "known are .jsonl, .jsonl.gz, .jsonl.zst, .parquet and, for text, .txt"
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
"""Words in file names by the split they mean."""
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"} | {
    "http": "aiohttp",
    "https": "aiohttp",
    "hf": "huggingface_hub",
}
"""What fsspec needs beside itself."""
_CHUNK = 1 << 20
_ROWS = 256


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file of a source."""

    uri: str
    kind: Kind
    compression: Literal["", ".gz", ".zst"] = ""

    def place(self, line: int) -> str:
        """Where ``line`` is, counted from 1, for an error: of a table, a row."""
        return f"{self.uri}, row {line}" if self.kind == "table" else f"{self.uri}:{line}"


def data_files(location: Location, *, split: str | None = None) -> tuple[DataFile, ...]:
    """The file at ``location``, or of a folder those of ``split`` (left out: train), in order of their names.

    Raises:
        DataError: There is no such file, or the folder holds none of that split.
        UsageError: What the uri names cannot be read here.
    """
    uri = _normal(location)
    below = _listing(uri)
    if below is None:
        return (_data_file(uri),)
    known = [name for name in below if _kind(name) is not None]
    if any(_kind(name) != ("paragraphs", "") for name in known):  # then a .txt is a note about the data
        known = [name for name in known if _kind(name) != ("paragraphs", "")]
    if not known:
        raise DataError(f"{uri}: the folder holds no data files; {_KNOWN}")
    chosen = _of_split(known, split or "train")
    if not chosen:
        found = sorted({name for name in _SPLITS if _of_split(known, name)})
        raise DataError(
            f"{uri}: none of its {len(known)} files is of split {split or 'train'} "
            f"(found: {', '.join(found) or 'none'}); set split, or name one file"
        )
    files = tuple(_data_file(f"{uri.rstrip('/')}/{name}") for name in chosen)
    if len({file.kind for file in files}) > 1:
        raise DataError(
            f"{uri}: holds the split {split or 'train'} both as .parquet and as lines; "
            "remove one of them, or name one file"
        )
    return files


def _normal(location: Location) -> str:
    uri = str(location)
    return uri.removeprefix("file://") if uri.startswith("file:///") else uri


def _kind(name: str) -> tuple[Kind, Literal["", ".gz", ".zst"]] | None:
    stem, ending = os.path.splitext(name.lower())
    compression: Literal["", ".gz", ".zst"] = ""
    if ending == ".gz":
        compression = ".gz"
    elif ending == ".zst":
        compression = ".zst"
    if compression:
        ending = os.path.splitext(stem)[1]
    kind = _KINDS.get(ending)
    return None if kind is None or (compression and kind == "table") else (kind, compression)


def _data_file(uri: str) -> DataFile:
    found = _kind(uri)
    # A file of another name has always been read as lines of JSON.
    return DataFile(uri, *(found or ("lines", "")))


def _of_split(names: Sequence[str], split: str) -> list[str]:
    """The names that say ``split``; all where none says any and the training split is asked for."""

    def says(name: str, words: Sequence[str]) -> bool:
        return any(re.search(rf"(?<![a-z0-9]){re.escape(word)}(?![a-z0-9])", name.lower()) for word in words)

    chosen = [name for name in names if says(name, _SPLITS.get(split, (split.lower(),)))]
    if (
        not chosen
        and split == "train"
        and not any(says(n, words) for words in _SPLITS.values() for n in names)
    ):
        return list(names)
    return chosen


def _listing(uri: str) -> list[str] | None:
    """Names of all files below a folder, sorted, hidden ones left out; None for a file."""
    with _named_errors(uri):
        if "://" in uri:
            system, path = connected(uri)
            if not system.isdir(path):
                return None
            root = path.rstrip("/") + "/"
            names = [str(name) for name in system.find(path)]
            below = [name[name.index(root) + len(root) :] for name in names if root in name]
        else:
            if not os.path.isdir(uri):
                return None
            below = [
                os.path.relpath(os.path.join(folder, name), uri)
                for folder, _, names in os.walk(uri)
                for name in names
            ]
    return sorted(name for name in below if not any(part.startswith((".", "_")) for part in name.split("/")))


@contextmanager
def opened(file: DataFile | str) -> Iterator[IO[bytes]]:
    """The bytes of a file as they are stored.

    Raises:
        DataError: It is missing or cannot be read.
        UsageError: It needs a package that is not installed.
    """
    uri = file if isinstance(file, str) else file.uri
    with _named_errors(uri):
        if "://" in uri:
            system, path = connected(uri)
            stream = system.open(path, "rb")
        else:
            stream = open(uri, "rb")
    with stream:
        yield stream


@contextmanager
def _named_errors(uri: str) -> Iterator[None]:
    """Errors of reading ``uri`` in a line. Object stores have error classes of their own."""
    try:
        yield
    except (DataError, UsageError):
        raise
    except FileNotFoundError:
        raise DataError(f"{uri}: no such file; correct the uri in data") from None
    except OSError as error:
        raise DataError(f"{uri}: cannot be read ({error.strerror or one_line(error)})") from None
    except Exception as error:
        if "://" not in uri:
            raise
        raise DataError(f"{uri}: cannot be read ({type(error).__name__}: {one_line(error)})") from None


def one_line(error: BaseException) -> str:
    """The beginning of what ``error`` says, in one line."""
    return " ".join(str(error).split())[:200]


def connected(uri: str, **options: Any) -> tuple[Any, str]:
    """The file system of ``uri``, made with fsspec's ``options``, and its path there.

    Raises:
        UsageError: There is none, or it needs a package that is not installed.
    """
    scheme = uri.partition("://")[0]
    try:
        from fsspec.core import url_to_fs
    except ModuleNotFoundError:
        raise UsageError(f"{uri}: {scheme}:// needs the package fsspec; install unmask[data]") from None
    try:
        system, path = url_to_fs(uri, **options)
    except ImportError:
        package = _PACKAGES.get(scheme, f"that fsspec names for {scheme}")
        raise UsageError(
            f"{uri}: {scheme}:// needs the package {package}, which is not installed; install it, "
            "or use a volume"
        ) from None
    except ValueError as error:
        raise UsageError(f"{uri}: {one_line(error)}; use a path, file://, s3:// or gs://") from None
    return system, path


def signature(uri: str) -> tuple[str, float]:
    """What changes when a file is written, and when that last happened, in seconds of the epoch.

    Of a local file that includes the time of its last change of state, which no copying tool sets back. Of
    a remote one it is what its file system tells of it.
    """
    with _named_errors(uri):
        if "://" in uri:
            system, path = connected(uri)
            return f"{uri} {system.ukey(path)}", 0.0
        found = os.stat(uri)
    parts = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return " ".join(map(str, parts)), max(found.st_mtime, found.st_ctime)


def content_digest(uri: str) -> str:
    """SHA-256 of the bytes of a file."""
    with opened(uri) as stream, _named_errors(uri):
        digest = hashlib.sha256()
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def lines(file: DataFile) -> Iterator[tuple[int, str]]:
    """The lines of a file of text, numbered from 1, without their ends; a byte-order mark is dropped.

    Only a line feed ends a line: JSON strings may hold the other characters that some call line ends.

    Raises:
        DataError: The file is damaged, or a line is not UTF-8.
    """
    number = 0
    for number, line in enumerate(_raw_lines(file), start=1):
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{file.place(number)}: not UTF-8 ({error.reason}); convert the file") from None


def _raw_lines(file: DataFile) -> Iterator[bytes]:
    number = 0
    with opened(file) as stream:
        plain = _decompressed(file, stream)
        rest: list[bytes] = []
        while True:
            try:
                chunk = plain.read(_CHUNK)
            except (OSError, EOFError, zlib.error) as error:
                if not file.compression:
                    with _named_errors(file.uri):
                        raise
                raise DataError(
                    f"{file.place(number + 1)}: the compressed file is damaged or cut short "
                    f"({one_line(error)}); fetch it again"
                ) from None
            if not chunk:
                break
            head, *others = chunk.split(b"\n")
            rest.append(head)
            for other in others:
                number += 1
                yield b"".join(rest)
                rest = [other]
        if any(rest):
            yield b"".join(rest)


def _decompressed(file: DataFile, stream: IO[bytes]) -> Any:
    if file.compression == ".gz":
        return gzip.GzipFile(fileobj=stream)
    if file.compression == ".zst":
        return _arrow(file).CompressedInputStream(stream, "zstd")
    return stream


def _arrow(file: DataFile) -> Any:
    try:
        import pyarrow
    except ModuleNotFoundError:
        raise UsageError(
            f"{file.uri}: reading it needs the package pyarrow; install unmask[data], "
            "or write it as .jsonl.gz"
        ) from None
    return pyarrow


def entry_rows(file: DataFile, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a table, numbered from 1, with those of ``columns`` that it has.

    Raises:
        DataError: The file is damaged, or has none of the columns.
    """
    arrow = _arrow(file)
    from pyarrow import parquet

    with opened(file) as stream:
        try:
            table = parquet.ParquetFile(stream)
            names = table.schema_arrow.names
            wanted = [name for name in columns if name in names]
            if not wanted:
                raise DataError(
                    f"{file.uri}: has the columns {', '.join(names)}, but not {columns[0]}; "
                    "rename one, or correct the format"
                )
            number = 0
            for batch in table.iter_batches(batch_size=_ROWS, columns=wanted, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
        except (arrow.ArrowException, OSError) as error:
            raise DataError(
                f"{file.uri}: not a readable Parquet file ({one_line(error)}); write it again"
            ) from None
