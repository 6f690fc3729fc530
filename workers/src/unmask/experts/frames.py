"""Frames: what an engine and an expert shard send each other, byte by byte.

A frame is the ``raw`` field of a protobuf ``ShardFrame``, so whoever has the generated code can read and
write it; here the field's tag and length are put before it by hand, which saves parsing and copying rows. (A
length of fewer bytes is as good; such a message is copied once.) Numbers are little-endian; every section is
filled up with zeros to a multiple of 8 bytes. ::

    bytes     what
    1 + 5     tag of the field, and its length as a varint of always five bytes
    58        header: see ``_HEADER``
    T x K x 2 request: which of the part's experts each choice of each token is, int16; -1: another part's
    T x K x 4 request: the weight of each choice, float32
    T x D x s rows: hidden states in a request, weighted sums in a reply; float32 (s = 4) or bfloat16 (s = 2)
    n         reply that is a refusal: its message, UTF-8, in place of rows

So rows begin at a multiple of 8 bytes of a message, as vector instructions like it.

The checksum is a sum of 64-bit words, and the CRC-32 of the header: it tells a flipped bit, a piece that is
missing, a frame that is another one's. A CRC of all bytes would cost more. It is no protection
against an attacker, which is what TLS is for.

Shape letters: T tokens of the frame, K choices per token, D hidden size.
"""

import struct
import warnings
import zlib
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, TypeAlias

import numpy as np
import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from unmask.v1 import experts_pb2 as pb

__all__ = [
    "ABSENT",
    "Frame",
    "FrameError",
    "Header",
    "Message",
    "Reply",
    "Request",
    "Status",
    "WireDtype",
    "decode_reply",
    "decode_request",
    "encode_refusal",
    "encode_reply",
    "encode_request",
    "header_of",
    "wire_dtype",
]

Message: TypeAlias = bytes | memoryview
"""A frame as it comes or goes; where memory is shared, a view of it."""

WireDtype: TypeAlias = Literal["float32", "bfloat16"]
"""What rows are sent as."""

ABSENT = -1
"""Stands for an expert of another part."""

_TAG = b"\x0a"  # field 1, length-delimited
_PREFIX = 6
_MAGIC = b"UMX1"
_HEADER = struct.Struct("<4sBBBBHHHHIIIQQII6x")
_START = _PREFIX + _HEADER.size
_CHECKSUM = slice(36, 44)
"""Where it lies in the header."""
_DTYPES: dict[int, torch.dtype] = {0: torch.float32, 1: torch.bfloat16}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_REQUEST, _REPLY = 1, 2
_WORDS = (1 << 64) - 1
_WORD = np.dtype("<u8")
_MOST_MESSAGE_BYTES = 512

assert _START == 64

with warnings.catch_warnings():
    # Received bytes are read in place and never written; torch warns of that once in a process.
    warnings.simplefilter("ignore", UserWarning)
    torch.frombuffer(bytes(8), dtype=torch.int64)


class Status(IntEnum):
    """What became of a frame."""

    OK = 0
    MALFORMED = 1
    """The frame contradicts itself, or the model's shape."""
    STALE = 2
    """No such placement, or the part is not held: ask what is."""
    DUPLICATE = 3
    """The session has had a frame of this number; order does not matter, for frames depend on nothing."""
    NOT_FINITE = 4
    """Sums came out infinite or not a number."""
    DRAINING = 5
    """The shard is shutting down."""
    FAILED = 6
    """A defect; the shard's log has it."""


_STATUSES = {int(status): status for status in Status}


class FrameError(Exception):
    """Bytes that are no frame, or not the one expected; says what is wrong, in one line."""

    def __init__(self, message: str, header: "Header | None" = None) -> None:
        super().__init__(message)
        self.header = header
        """Of the frame, where that much of it could be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The numbers of a frame."""

    epoch: int
    """Of the placement."""
    part: int
    layer: int
    """Number in the model, dense layers counted."""
    sequence: int
    """Of the engine, over all its sessions; the reply has that of its request."""
    tokens: int
    """T."""
    choices: int = 0
    """K; 0 in a reply."""
    hidden_size: int = 0
    """D."""
    micro_batch: int = 0
    dtype: torch.dtype = torch.float32
    status: Status = Status.OK
    queue_us: int = 0
    """Of a reply: from the frame's arrival to its turn."""
    compute_us: int = 0
    """Of a reply: from then on to its sums."""


@dataclass(frozen=True, slots=True)
class Request:
    """Rows for the experts of one part of one layer."""

    header: Header
    slots: Tensor
    """int16 (T, K): number of the expert in its part, or :data:`ABSENT`."""
    weights: Tensor
    """float32 (T, K)."""
    rows: Tensor
    """(T, D)."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the part's experts made of the rows, weighted and added up; or why there is nothing."""

    header: Header
    rows: Tensor | None
    """(T, D)."""
    message: str = ""


class Frame:
    """A request that is not in one piece yet: its rows are copied once, to where a transport wants them.

    ``len`` says how many bytes it has, and ``bytes`` makes them. The tensors that it was made of must stay as
    they are until then.
    """

    __slots__ = ("_length", "_parts")

    def __init__(self, parts: list[Message]) -> None:
        """``parts`` are its bytes, one after the other."""
        self._parts = parts
        self._length = sum(map(len, parts))

    def __len__(self) -> int:
        return self._length

    def __bytes__(self) -> bytes:
        return b"".join(self._parts)

    def write(self, place: memoryview) -> None:
        """Write its bytes to the beginning of ``place``, which has room for them."""
        end = 0
        for part in self._parts:
            place[end : end + len(part)] = part
            end += len(part)


def wire_dtype(name: WireDtype) -> torch.dtype:
    """The number format that ``name`` stands for."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def encode_request(header: Header, slots_TK: Tensor, weights_TK: Tensor, rows_TD: Tensor) -> Frame:
    """A request.

    Args:
        header: ``tokens``, ``choices``, ``hidden_size`` and ``dtype`` are set from the tensors.
        slots_TK: int16.
        weights_TK: float32.
        rows_TD: float32 or bfloat16.
    """
    tokens, hidden = rows_TD.shape
    small = b"".join(_filled(_bytes_of(slots_TK)) + _filled(_bytes_of(weights_TK)))
    packed = _packed(
        _REQUEST, header, rows_TD.dtype, tokens=tokens, choices=slots_TK.shape[1], hidden_size=hidden
    )
    return Frame(_parts(packed, [small, *_filled(_bytes_of(rows_TD))]))


def encode_reply(
    header: Header,
    rows_TD: Tensor,
    *,
    queue_us: int = 0,
    compute_us: int = 0,
    into: memoryview | None = None,
) -> Message:
    """The answer to the request of ``header`` as one message, which is written to ``into`` if it fits in."""
    packed = _packed(
        _REPLY,
        header,
        rows_TD.dtype,
        tokens=header.tokens,
        hidden_size=header.hidden_size,
        times=(_capped(queue_us), _capped(compute_us)),
    )
    frame = Frame(_parts(packed, _filled(_bytes_of(rows_TD))))
    if into is None or len(into) < len(frame):
        return bytes(frame)
    frame.write(into)
    return into[: len(frame)]


def encode_refusal(header: Header, status: Status, message: str) -> bytes:
    """Says that there is no answer to the request of ``header``."""
    packed = _packed(_REPLY, header, torch.float32, status=status)
    return bytes(Frame(_parts(packed, _filled(memoryview(message.encode()[:_MOST_MESSAGE_BYTES])))))


def header_of(message: Message) -> Header:
    """The numbers of a frame, without a look at what follows them.

    Raises:
        FrameError: There are none.
    """
    return _read(_framed(message))[0]


def decode_request(message: Message) -> Request:
    """Read a request; its tensors share the message's memory and must not be written.

    Raises:
        FrameError: It is none, or damaged.
    """
    message = _framed(message)
    header, kind, checksum = _read(message)
    if kind != _REQUEST:
        raise FrameError(f"kind: got {kind}, a request is {_REQUEST}", header)
    tokens, choices, hidden = header.tokens, header.choices, header.hidden_size
    if not (tokens and choices and hidden):
        raise FrameError(f"got {tokens} tokens x {choices} choices x {hidden} numbers, none may be 0", header)
    sizes = [tokens * choices * 2, tokens * choices * 4, tokens * hidden * header.dtype.itemsize]
    slots, weights, rows = _sections(message, header, sizes)
    _check_sum(message, header, checksum)
    return Request(
        header,
        torch.frombuffer(slots, dtype=torch.int16).view(tokens, choices),
        torch.frombuffer(weights, dtype=torch.float32).view(tokens, choices),
        torch.frombuffer(rows, dtype=header.dtype).view(tokens, hidden),
    )


def decode_reply(message: Message) -> Reply:
    """Read a reply; its rows share the message's memory and must not be written.

    Raises:
        FrameError: It is none, or damaged.
    """
    message = _framed(message)
    header, kind, checksum = _read(message)
    if kind != _REPLY:
        raise FrameError(f"kind: got {kind}, a reply is {_REPLY}", header)
    if header.status is not Status.OK:
        _check_sum(message, header, checksum)
        return Reply(header, None, bytes(message[_START:]).rstrip(b"\0").decode(errors="replace"))
    if not (header.tokens and header.hidden_size):
        raise FrameError(f"got {header.tokens} tokens x {header.hidden_size} numbers, none may be 0", header)
    (rows,) = _sections(message, header, [header.tokens * header.hidden_size * header.dtype.itemsize])
    _check_sum(message, header, checksum)
    return Reply(header, torch.frombuffer(rows, dtype=header.dtype).view(header.tokens, header.hidden_size))


def _parts(packed: bytes, sections: list[Message]) -> list[Message]:
    """A frame's bytes in pieces: what comes before its sections, with their checksum, and the sections."""
    total = zlib.crc32(packed) + sum(map(_sum_of_words, sections))
    length = _HEADER.size + sum(map(len, sections))
    head = _TAG + _varint(length) + packed[: _CHECKSUM.start]
    head += (total & _WORDS).to_bytes(8, "little") + packed[_CHECKSUM.stop :]
    return [head, *sections]


def _filled(section: memoryview) -> list[Message]:
    """The section, and what fills it up to a multiple of 8 bytes."""
    if len(section) % 8 == 0:
        return [section]
    whole = len(section) & ~7
    return [section[:whole], bytes(section[whole:]).ljust(8, b"\0")]


def _packed(
    kind: int,
    header: Header,
    dtype: torch.dtype,
    *,
    status: Status = Status.OK,
    tokens: int = 0,
    choices: int = 0,
    hidden_size: int = 0,
    times: tuple[int, int] = (0, 0),
) -> bytes:
    """The header with zeros for its checksum."""
    return _HEADER.pack(
        _MAGIC,
        kind,
        _CODES[dtype],
        status,
        0,
        header.part,
        header.layer,
        header.micro_batch,
        choices,
        header.epoch,
        tokens,
        hidden_size,
        header.sequence,
        0,
        *times,
    )


def _framed(message: Message) -> Message:
    """The message with tag and length as they are written here."""
    own = len(message) >= _PREFIX and message[:1] == _TAG
    if own and message[1:_PREFIX] == _varint(len(message) - _PREFIX):
        return message
    try:
        raw = pb.ShardFrame.FromString(bytes(message)).raw
    except DecodeError as error:
        raise FrameError("the message is no ShardFrame") from error
    return b"".join([_TAG, _varint(len(raw)), raw])


def _read(message: Message) -> tuple[Header, int, int]:
    """Header, kind and checksum."""
    if len(message) < _START:
        raise FrameError(f"got {len(message)} bytes, a frame has at least {_START}")
    magic, kind, dtype, status, flags, *numbers = _HEADER.unpack_from(message, _PREFIX)
    part, layer, micro_batch, choices, epoch, tokens, hidden, sequence, checksum, queue, compute = numbers
    if magic != _MAGIC:
        raise FrameError(f"got a frame of {magic!r}, this is {_MAGIC!r}; run one version on both sides")
    known = dtype in _DTYPES and status in _STATUSES and not flags
    header = Header(
        epoch=epoch,
        part=part,
        layer=layer,
        sequence=sequence,
        tokens=tokens,
        choices=choices,
        hidden_size=hidden,
        micro_batch=micro_batch,
        dtype=_DTYPES[dtype] if known else torch.float32,
        status=_STATUSES[status] if known else Status.OK,
        queue_us=queue,
        compute_us=compute,
    )
    if not known:
        raise FrameError(f"dtype, status, flags: got {dtype}, {status}, {flags}: unknown ones", header)
    return header, kind, checksum


def _sections(message: Message, header: Header, sizes: list[int]) -> list[memoryview]:
    """What follows the header, cut into sections of so many bytes."""
    view = memoryview(message)
    found, start = [], _START
    for size in sizes:
        found.append(view[start : start + size])
        start += size + -size % 8
    if start != len(message):
        raise FrameError(f"got {len(message)} bytes, the header's numbers make it {start}", header)
    return found


def _check_sum(message: Message, header: Header, expected: int) -> None:
    total = _sum_of_words(memoryview(message)[_START:]) + _crc(bytes(message[_PREFIX:_START]))
    if total & _WORDS != expected:
        raise FrameError("the checksum is not that of the frame: it was damaged on its way", header)


def _crc(packed: bytes) -> int:
    """Of a packed header, but for its checksum."""
    return zlib.crc32(packed[: _CHECKSUM.start] + bytes(8) + packed[_CHECKSUM.stop :])


def _sum_of_words(section: Message) -> int:
    """The sum of the section's 64-bit words, the last one filled up with zeros, modulo 2^64."""
    rest = len(section) % 8
    if rest:
        whole = len(section) - rest
        return _sum_of_words(section[:whole]) + int.from_bytes(section[whole:], "little")
    return int(np.add.reduce(np.frombuffer(section, dtype=_WORD)))


def _bytes_of(tensor: Tensor) -> memoryview:
    # In few calls: each takes ten microseconds or so where its code is not in the processor's cache.
    known_to_numpy = tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor
    return np.ascontiguousarray(known_to_numpy.numpy()).reshape(-1).view(np.uint8).data


def _varint(number: int) -> bytes:
    """Always five bytes, so that all frames begin alike; enough for 32 GiB."""
    return bytes(
        (
            number & 0x7F | 0x80,
            number >> 7 & 0x7F | 0x80,
            number >> 14 & 0x7F | 0x80,
            number >> 21 & 0x7F | 0x80,
            number >> 28,
        )
    )


def _capped(microseconds: int) -> int:
    return max(0, min(microseconds, (1 << 32) - 1))
