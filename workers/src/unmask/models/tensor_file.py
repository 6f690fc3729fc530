"""One safetensors file: read by pieces and distrusted, written by pieces.

The format: 8 bytes with the header's length N (little endian), N bytes of JSON that give each
tensor's dtype, shape and place, then the tensors, back to back.

The ``safetensors`` library is not used for models since it lacks what conversion and hostile
files need: it writes only what is all in memory, takes a file that names a tensor twice (the
last one counts), and maps files, so that one cut short while in use kills the process. Tests
hold the two against each other. No torch is needed here.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, TypeAlias

from unmask.errors import ModelError
from unmask.models.folder import parse_json_object

__all__ = [
    "ITEM_BYTES",
    "PIECE_BYTES",
    "Piece",
    "StoredTensor",
    "read_header",
    "read_pieces",
    "write_tensor_file",
]

Piece: TypeAlias = bytes | bytearray | memoryview
ITEM_BYTES: Mapping[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}
"""The format's dtypes, and the size of an element."""
PIECE_BYTES = 32 * 1024 * 1024
"""How much of a tensor is in memory at a time."""
_LONGEST_HEADER = 32 * 1024 * 1024
_MOST_DIMENSIONS = 8
_LONGEST_NAME = 512
_FAR = 2**50
"""More than the length of any dimension, and than any place in a file."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file."""

    name: str
    dtype: str
    """A key of :data:`ITEM_BYTES`."""
    shape: tuple[int, ...]
    start: int = 0
    """Its first byte in the file."""

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def read_header(file: FileIO, *, source: str) -> dict[str, StoredTensor]:
    """The tensors of a file, by name.

    Raises:
        ModelError: Naming ``source``, if the file is not exactly what the format says: each byte behind
            the header must belong to one tensor, and no tensor may be empty or there twice.
    """
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    if len(start) < 8:
        raise ModelError(f"{source}: truncated, or not a safetensors file (it has {size} bytes)")
    (length,) = struct.unpack("<Q", start)
    if length > min(size - 8, _LONGEST_HEADER):
        raise ModelError(
            f"{source}: truncated, or not a safetensors file (its header has {length} bytes of {size}; "
            f"allowed are {_LONGEST_HEADER})"
        )
    header = parse_json_object(_read_exactly(file, length, source), source=source)
    header.pop("__metadata__", None)
    data_start = 8 + length
    tensors = {name: _tensor(name, entry, data_start, source) for name, entry in header.items()}
    end = data_start
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.start):
        if tensor.start != end:
            raise ModelError(f"{source}: {tensor.name}: got data that starts at {tensor.start}, not at {end}")
        end += tensor.nbytes
    if end != size:
        raise ModelError(f"{source}: truncated, or not a safetensors file (got {size} bytes, expected {end})")
    return tensors


def read_pieces(file: FileIO, start: int, nbytes: int, *, source: str) -> Iterator[bytearray]:
    """``nbytes`` of ``file`` from byte ``start``, at most :data:`PIECE_BYTES` at a time.

    Raises:
        ModelError: If the file has become shorter.
    """
    for offset in range(0, nbytes, PIECE_BYTES):
        file.seek(start + offset)
        yield _read_exactly(file, min(PIECE_BYTES, nbytes - offset), source)


def write_tensor_file(
    path: Path,
    tensors: Sequence[StoredTensor],
    pieces_of: Callable[[StoredTensor], Iterable[Piece]],
) -> str:
    """Write ``tensors`` (whose ``start`` does not matter), each from its pieces; returns the SHA-256.

    Tensors with wide elements come first, so that each starts at a multiple of its element's size.
    """
    ordered = sorted(tensors, key=lambda tensor: -ITEM_BYTES[tensor.dtype])
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in _content(ordered, pieces_of):
            digest.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _content(
    tensors: Sequence[StoredTensor],
    pieces_of: Callable[[StoredTensor], Iterable[Piece]],
) -> Iterator[Piece]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        place = [end, end + tensor.nbytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": place}
        end = place[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for tensor in tensors:
        written = 0
        for piece in pieces_of(tensor):
            written += memoryview(piece).nbytes
            yield piece
        assert written == tensor.nbytes, f"{tensor.name}: {written} bytes, not {tensor.nbytes}"


def _tensor(name: str, entry: object, data_start: int, source: str) -> StoredTensor:
    if not name.isprintable() or len(name) > _LONGEST_NAME:
        raise ModelError(f"{source}: {ascii(name[:100])} is not the name of a tensor")
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(end)]}:
            pass
        case _:
            raise ModelError(
                f"{source}: {name}: got {ascii(entry)[:100]}, not a dtype, a shape and an extent"
            )
    if dtype not in ITEM_BYTES:
        raise ModelError(
            f"{source}: {name}: got dtype {ascii(dtype[:20])}, known are {', '.join(ITEM_BYTES)}"
        )
    if len(shape) > _MOST_DIMENSIONS or not all(type(count) is int and 0 < count < _FAR for count in shape):
        raise ModelError(f"{source}: {name}: got shape {ascii(shape)[:100]}, expected positive whole numbers")
    tensor = StoredTensor(name, dtype, tuple(shape), data_start + start)
    if not 0 <= start < end < _FAR:
        raise ModelError(f"{source}: {name}: got an extent that does not lie in the file")
    if end - start != tensor.nbytes:
        raise ModelError(
            f"{source}: {name}: got {end - start} bytes, its shape and dtype need {tensor.nbytes}"
        )
    return tensor


def _read_exactly(file: FileIO, length: int, source: str) -> bytearray:
    content = bytearray(length)
    rest = memoryview(content)
    while rest:
        count = file.readinto(rest)
        if not count:
            raise ModelError(f"{source}: truncated while it was read")
        rest = rest[count:]
    return content
