"""Frames of bytes: what is written is read again, and nothing else is."""

import random

import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from support import counts
from unmask.experts.frames import (
    Frame,
    FrameError,
    Header,
    Status,
    decode_reply,
    decode_request,
    encode_refusal,
    encode_reply,
    encode_request,
    header_of,
)
from unmask.v1 import experts_pb2 as pb

DTYPES = [torch.float32, torch.bfloat16]
FLIPS = counts.of(sample=2000, full=20_000)


def a_request(
    tokens: int = 5, choices: int = 3, hidden: int = 6, dtype: torch.dtype = torch.float32
) -> bytes:
    return bytes(a_frame(tokens, choices, hidden, dtype))


def a_frame(tokens: int, choices: int, hidden: int, dtype: torch.dtype) -> Frame:
    generator = torch.Generator().manual_seed(tokens + hidden)
    slots = torch.randint(-1, 4, (tokens, choices), generator=generator, dtype=torch.int16)
    weights = torch.rand(tokens, choices, generator=generator)
    rows = torch.randn(tokens, hidden, generator=generator).to(dtype)
    return encode_request(Header(epoch=7, part=2, layer=11, sequence=1 << 40, tokens=0), slots, weights, rows)


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 9), st.sampled_from(DTYPES))
def test_a_request_is_read_as_it_was_written(
    tokens: int, choices: int, hidden: int, dtype: torch.dtype
) -> None:
    frame = a_request(tokens, choices, hidden, dtype)
    request = decode_request(frame)
    header = request.header
    assert (header.epoch, header.part, header.layer, header.sequence) == (7, 2, 11, 1 << 40)
    assert (header.tokens, header.choices, header.hidden_size) == (tokens, choices, hidden)
    assert request.slots.shape == request.weights.shape == (tokens, choices)
    assert request.rows.shape == (tokens, hidden) and request.rows.dtype == dtype
    again = bytes(encode_request(header, request.slots, request.weights, request.rows))
    assert again == frame
    assert header_of(frame) == header


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from(DTYPES))
def test_a_reply_is_read_as_it_was_written(tokens: int, hidden: int, dtype: torch.dtype) -> None:
    asked = decode_request(a_request(tokens, 2, hidden, dtype)).header
    rows = torch.randn(tokens, hidden).to(dtype)
    reply = decode_reply(encode_reply(asked, rows, queue_us=12, compute_us=1 << 40))
    assert reply.rows is not None and torch.equal(reply.rows, rows)
    assert (reply.header.sequence, reply.header.layer) == (asked.sequence, asked.layer)
    assert (reply.header.queue_us, reply.header.compute_us) == (12, (1 << 32) - 1)


def test_a_refusal_says_why() -> None:
    asked = header_of(a_request())
    reply = decode_reply(encode_refusal(asked, Status.STALE, "epoch: got 7, held are [8]"))
    assert reply.rows is None and reply.message == "epoch: got 7, held are [8]"
    assert (reply.header.status, reply.header.sequence) == (Status.STALE, asked.sequence)


@pytest.mark.parametrize("spare", [-1, 0, 7])
def test_a_frame_may_lie_in_memory_that_others_share(spare: int) -> None:
    frame = a_request()
    shared = memoryview(bytearray(frame)).toreadonly()
    one, other = decode_request(shared), decode_request(frame)
    assert one.header == other.header and torch.equal(one.rows, other.rows)
    expected = encode_reply(one.header, one.rows)
    place = memoryview(bytearray(len(expected) + spare))
    reply = encode_reply(one.header, one.rows, into=place)
    assert isinstance(reply, bytes) == (spare < 0), "what does not fit in comes as bytes"
    assert reply == expected
    found = decode_reply(reply)
    assert found.rows is not None and torch.equal(found.rows, one.rows)
    refusal = memoryview(encode_refusal(one.header, Status.STALE, "epoch: got 7"))
    assert decode_reply(refusal).message == "epoch: got 7"


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 9), st.sampled_from(DTYPES), st.integers(0, 9))
def test_a_frame_is_written_as_it_is_joined(
    tokens: int, choices: int, hidden: int, dtype: torch.dtype, spare: int
) -> None:
    frame = a_frame(tokens, choices, hidden, dtype)
    joined = bytes(frame)
    assert len(joined) == len(frame)
    place = memoryview(bytearray(b"\xff" * (len(frame) + spare)))
    frame.write(place)
    assert place == joined + b"\xff" * spare


def test_rows_that_change_after_their_checksum_was_made_are_found() -> None:
    rows = torch.ones(5, 6)
    header = Header(epoch=7, part=2, layer=11, sequence=1, tokens=0)
    frame = encode_request(header, torch.zeros(5, 3, dtype=torch.int16), torch.ones(5, 3), rows)
    assert torch.equal(decode_request(bytes(frame)).rows, rows)
    rows[2, 3] = 2.0
    with pytest.raises(FrameError, match="damaged"):
        decode_request(bytes(frame))


def test_rows_that_do_not_lie_one_behind_the_other_are_sent_as_they_read() -> None:
    wide = torch.arange(60.0).view(5, 12)
    header = Header(epoch=7, part=2, layer=11, sequence=1, tokens=0)
    slots, weights = torch.zeros(3, 5, dtype=torch.int16).t(), torch.rand(3, 5).t()
    for rows in (wide[:, ::2], wide[:, 3:9], wide[:, ::2].bfloat16(), wide.bfloat16()[:, ::2]):
        request = decode_request(bytes(encode_request(header, slots, weights, rows)))
        assert torch.equal(request.rows, rows)
        assert torch.equal(request.slots, slots) and torch.equal(request.weights, weights)


def test_rows_lie_where_vector_instructions_like_them() -> None:
    frame = a_request(tokens=3, choices=3, hidden=5)
    assert len(frame) % 8 == 0
    assert decode_request(frame).rows.data_ptr() % 8 == 0


def test_a_frame_is_the_raw_field_of_a_protobuf_message() -> None:
    frame = a_request()
    parsed = pb.ShardFrame.FromString(frame)
    assert parsed.WhichOneof("content") == "raw"
    written_by_others = parsed.SerializeToString()
    assert written_by_others != frame, "protobuf writes the length in as few bytes as it takes"
    one, other = decode_request(frame), decode_request(written_by_others)
    assert one.header == other.header and torch.equal(one.rows, other.rows)


def test_no_byte_of_a_frame_can_be_another_one() -> None:
    dice = random.Random(1)
    frames = [
        (decode_request, a_request()),
        (decode_reply, encode_reply(header_of(a_request()), torch.ones(5, 6))),
    ]
    for read, frame in frames:
        for _ in range(FLIPS // len(frames)):
            place = dice.randrange(len(frame))
            damaged = bytearray(frame)
            damaged[place] ^= 1 << dice.randrange(8)
            with pytest.raises(FrameError):
                read(bytes(damaged))


@settings(max_examples=counts.of(sample=200, full=2000))
@given(st.binary(max_size=200), st.integers(0, 400), st.integers(0, 400))
def test_whatever_the_bytes_are_there_is_a_frame_error_at_most(junk: bytes, start: int, stop: int) -> None:
    frame = a_request()
    for message in (junk, frame[:start], frame[:start] + junk + frame[stop:]):
        if same_field(message, frame):
            continue
        for read in (decode_request, decode_reply, header_of):
            try:
                read(message)
            except FrameError:
                continue
            assert read is header_of, "only a look at the numbers takes what the checksum would not"


def same_field(message: bytes, frame: bytes) -> bool:
    """Whether protobuf reads the same from both: it passes over fields that it does not know."""
    try:
        return pb.ShardFrame.FromString(message).raw == pb.ShardFrame.FromString(frame).raw
    except DecodeError:
        return False


def test_a_frame_of_another_kind_says_so() -> None:
    with pytest.raises(FrameError, match="kind: got 1, a reply is 2"):
        decode_reply(a_request())
    with pytest.raises(FrameError, match="kind: got 2, a request is 1"):
        decode_request(encode_reply(header_of(a_request()), torch.ones(5, 6)))
