"""What a GGUF file says before its weights: metadata, and each tensor's type, shape and place.

The ``gguf`` package knows the types and their sizes, and turns quantised blocks into numbers.
Its reader is not used, for it believes what a file says about its own lengths (a count of 2^60
keeps it busy for ever) and maps the file. Here each length is compared with what is left.
"""

import math
import os
import struct
from dataclasses import dataclass
from io import BufferedReader, FileIO
from typing import Any

from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGUF_MAGIC,
    GGMLQuantizationType,
    GGUFValueType,
)

from unmask.errors import ModelError

__all__ = ["GgufHeader", "GgufTensor", "read_gguf_header"]

_VERSIONS = (2, 3)
_LONGEST_TEXT = 64 * 1024 * 1024
_MOST_ITEMS = 10_000_000
_MOST_DIMENSIONS = 4
_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor as it lies in the file."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    """Slowest dimension first (the file has it last)."""
    start: int
    """Its first byte in the file."""

    @property
    def row_bytes(self) -> int:
        """Bytes of the elements along the last dimension."""
        block, size = GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // block * size

    @property
    def rows(self) -> int:
        """How many such rows there are."""
        return math.prod(self.shape[:-1])


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """All but the weights."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf_header(file: FileIO, *, source: str) -> GgufHeader:
    """Parse the head of ``file``.

    Raises:
        ModelError: Naming ``source``, if it is no GGUF file, is cut short, or says something twice.
    """
    reader = _Reader(file, source)
    if reader.scalar(GGUFValueType.UINT32) != GGUF_MAGIC:
        raise ModelError(f"{source}: not a GGUF file")
    version = reader.scalar(GGUFValueType.UINT32)
    if version not in _VERSIONS:
        raise ModelError(f"{source}: got GGUF version {version}, known are {_VERSIONS}")
    tensor_count = reader.scalar(GGUFValueType.UINT64)
    metadata: dict[str, Any] = {}
    for _ in range(reader.scalar(GGUFValueType.UINT64)):
        key = reader.text()
        if key in metadata:
            raise ModelError(f"{source}: {ascii(key)} is there twice")
        metadata[key] = reader.value()
    infos = [reader.tensor() for _ in range(tensor_count)]
    tensors = _placed(infos, _data_start(reader, metadata), reader)
    return GgufHeader(metadata, tensors)


def _data_start(reader: "_Reader", metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise ModelError(
            f"{reader.source}: general.alignment: got {ascii(alignment)}, expected a power of two"
        )
    return -(-reader.offset // alignment) * alignment


def _placed(infos: list[GgufTensor], data_start: int, reader: "_Reader") -> dict[str, GgufTensor]:
    """The tensors by name, with places counted from the file's start."""
    tensors: dict[str, GgufTensor] = {}
    for info in infos:
        tensor = GgufTensor(info.name, info.type, info.shape, data_start + info.start)
        if tensor.name in tensors:
            raise ModelError(f"{reader.source}: tensor {tensor.name} is there twice")
        if tensor.start + tensor.rows * tensor.row_bytes > reader.size:
            raise ModelError(f"{reader.source}: truncated: tensor {tensor.name} ends behind the file")
        tensors[tensor.name] = tensor
    return tensors


class _Reader:
    """Takes one value after the other off a file."""

    def __init__(self, file: FileIO, source: str) -> None:
        self.source = source
        self.size = os.fstat(file.fileno()).st_size
        self.offset = 0
        file.seek(0)
        self._file = BufferedReader(FileIO(file.fileno(), closefd=False))

    def bytes(self, count: int) -> bytes:
        if count > self.size - self.offset:
            raise ModelError(f"{self.source}: truncated, or not a GGUF file")
        self.offset += count
        return self._file.read(count)

    def scalar(self, kind: GGUFValueType) -> Any:
        layout = _SCALARS[kind]
        return struct.unpack(layout, self.bytes(struct.calcsize(layout)))[0]

    def text(self) -> str:
        length = self.scalar(GGUFValueType.UINT64)
        if length > _LONGEST_TEXT:
            raise ModelError(f"{self.source}: got a text of {length} bytes, allowed are {_LONGEST_TEXT}")
        try:
            return self.bytes(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(f"{self.source}: got a text that is not UTF-8 ({error})") from None

    def value(self) -> Any:
        kind = self._kind()
        if kind is not GGUFValueType.ARRAY:
            return self._item(kind)
        kind = self._kind()
        count = self.scalar(GGUFValueType.UINT64)
        if kind is GGUFValueType.ARRAY or count > _MOST_ITEMS:
            raise ModelError(f"{self.source}: got a list of {count} {kind.name}, which no model has")
        return [self._item(kind) for _ in range(count)]

    def tensor(self) -> GgufTensor:
        name = self.text()
        dimensions = self.scalar(GGUFValueType.UINT32)
        if not name.isprintable() or not 0 < dimensions <= _MOST_DIMENSIONS:
            raise ModelError(f"{self.source}: {ascii(name[:100])}: got {dimensions} dimensions")
        shape = tuple(self.scalar(GGUFValueType.UINT64) for _ in range(dimensions))[::-1]
        number = self.scalar(GGUFValueType.UINT32)
        start = self.scalar(GGUFValueType.UINT64)
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise ModelError(f"{self.source}: {name}: got type {number}, which is not known") from None
        block, _ = GGML_QUANT_SIZES[kind]
        if min(shape) < 1 or shape[-1] % block:
            raise ModelError(f"{self.source}: {name}: got shape {list(shape)}, with blocks of {block}")
        return GgufTensor(name, kind, shape, start)

    def _kind(self) -> GGUFValueType:
        number = self.scalar(GGUFValueType.UINT32)
        try:
            return GGUFValueType(number)
        except ValueError:
            raise ModelError(f"{self.source}: got a value of type {number}, which is not known") from None

    def _item(self, kind: GGUFValueType) -> Any:
        return self.text() if kind is GGUFValueType.STRING else self.scalar(kind)
