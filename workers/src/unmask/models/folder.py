"""A model's folder on disk: what may be opened in it, and how a new one appears.

A model folder comes from somewhere else, so nothing in it is trusted. Every file of it is
opened here, and only if it is a regular file that lies inside: a link or a name that leads
out is refused, not followed. Where a folder has ``checksums.json`` (those we write do), it
lists the SHA-256 of every file of the model.

A folder that we write is complete or absent: its files are written under a temporary name
beside it, and one rename makes it appear. No torch is needed here.
"""

import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from unmask.errors import ModelError

__all__ = [
    "CHECKSUMS",
    "NewFolder",
    "exists_inside",
    "new_folder",
    "open_file",
    "open_inside",
    "parse_json_object",
    "read_inside",
    "read_json_inside",
    "verify_checksums",
]

CHECKSUMS = "checksums.json"
_LARGEST_TEXT = 256 * 1024 * 1024
"""Bytes of the largest JSON or text file that is read; tokenizers of big vocabularies have some 20 MB."""

# Reading


def open_file(path: Path) -> FileIO:
    """Open the regular file at ``path``, unbuffered.

    Raises:
        ModelError: If there is none, or it is a device, a pipe or a folder.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait for somebody to write to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ModelError(f"{path}: not a regular file")
    return os.fdopen(descriptor, "rb", buffering=0)


def open_inside(folder: Path, name: str) -> FileIO:
    """Open the file ``name`` of ``folder``, unbuffered.

    Raises:
        ModelError: If there is none, or its name or a link leads out of the folder.
    """
    path = folder / _plain(folder, name)
    real = _real_path(path)
    if not real.is_relative_to(_real_path(folder)):
        raise ModelError(f"{path}: is a link to outside the folder; copy the file itself (cp -L)")
    return open_file(real)


def exists_inside(folder: Path, name: str) -> bool:
    """Whether ``folder`` has an entry ``name``, be it a file or a link.

    Raises:
        ModelError: If the name leads out of the folder.
    """
    return os.path.lexists(folder / _plain(folder, name))


def read_inside(folder: Path, name: str) -> bytes:
    """The content of the file ``name`` of ``folder``, a text and thus of limited size.

    Raises:
        ModelError: As :func:`open_inside`, or if the file is too large for a text.
    """
    with open_inside(folder, name) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _LARGEST_TEXT:
            raise ModelError(f"{folder / name}: got {size} bytes, allowed are {_LARGEST_TEXT}")
        return file.read()


def read_json_inside(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in the file ``name`` of ``folder``.

    Raises:
        ModelError: As :func:`read_inside` and :func:`parse_json_object`.
    """
    return parse_json_object(read_inside(folder, name), source=str(folder / name))


def parse_json_object(content: bytes | bytearray, *, source: str) -> dict[str, Any]:
    """The JSON object in ``content``, each of whose keys stands there once.

    Raises:
        ModelError: If it is not valid UTF-8 or JSON, not an object, or says a key twice. (Which of two
            values counts differs from one JSON reader to the next, so such a file has no one meaning.)
    """
    try:
        data = json.loads(content.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant)
        if b"\\ud" in content.lower():  # half a character, as an escape, could not be written again
            json.dumps(data, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{source}: cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise ModelError(f"{source}: got a JSON {type(data).__name__}, expected an object")
    return data


def verify_checksums(folder: Path) -> frozenset[str] | None:
    """Compare each file that ``checksums.json`` lists with its SHA-256; returns their names.

    Returns:
        None if the folder has no ``checksums.json``.

    Raises:
        ModelError: Naming the file that is missing or differs.
    """
    if not exists_inside(folder, CHECKSUMS):
        return None
    digests = read_json_inside(folder, CHECKSUMS)
    for name, digest in digests.items():
        if not exists_inside(folder, name):
            raise ModelError(f"{folder / name}: no such file, though {CHECKSUMS} names it")
        with open_inside(folder, name) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != digest:
            raise ModelError(
                f"{folder / name}: corrupted: its SHA-256 is not the one in {CHECKSUMS}; "
                "copy the folder again"
            )
    return frozenset(digests)


def _plain(folder: Path, name: str) -> str:
    """``name`` itself, which must be that of a file right in ``folder``."""
    if not name or name.startswith(".") or not name.isprintable() or "/" in name or os.sep in name:
        raise ModelError(f"{folder}: got file name {ascii(name)}, allowed are names of files in the folder")
    return name


def _real_path(path: Path) -> Path:
    try:
        return path.resolve(strict=True)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise ModelError(f"{path}: cannot be read: {error}") from None


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is there twice")
        found[name] = value
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


# Writing


@dataclass(frozen=True, slots=True)
class NewFolder:
    """A folder that is being written; the digest of each of its files is kept."""

    path: Path
    """Where its files lie for now."""
    digests: dict[str, str] = field(default_factory=dict)
    """File name -> SHA-256; whoever writes a file by other means than :meth:`write` adds it."""

    def write(self, name: str, content: bytes) -> None:
        """Add the file ``name``."""
        with (self.path / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self.digests[name] = hashlib.sha256(content).hexdigest()

    def write_json(self, name: str, content: object) -> None:
        """Add the JSON file ``name``."""
        self.write(name, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


@contextmanager
def new_folder(path: Path) -> Iterator[NewFolder]:
    """Let the caller write files; when the block ends, they are the folder ``path``, in one step.

    What stood there is replaced. If the block raises, ``path`` is as it was. ``checksums.json`` is added.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        folder = NewFolder(scratch)
        yield folder
        folder.write_json(CHECKSUMS, dict(folder.digests))
        scratch.chmod(0o755)
        _replace(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _replace(new: Path, path: Path) -> None:
    """Rename ``new`` to ``path``; what stood there is moved aside first and removed after."""
    if not path.exists():
        new.rename(path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}-old-", dir=path.parent))
    path.rename(aside / path.name)
    new.rename(path)
    shutil.rmtree(aside)
