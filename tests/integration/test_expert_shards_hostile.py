"""Messages to an expert shard that are made to do harm: a clear answer or the end of the session."""

import random
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import grpc
import pytest
import torch

from support import counts
from support.shards import golden_folder, holding_of, running_shards
from unmask.experts.answering import Answering, Seen
from unmask.experts.frames import (
    FrameError,
    Header,
    Status,
    decode_reply,
    encode_refusal,
    encode_reply,
    encode_request,
)
from unmask.experts.holding import Holding
from unmask.experts.shard import SERVICE, Shard
from unmask.telemetry import Recorder, metrics
from unmask.v1 import experts_pb2 as pb
from unmask.v1.experts_pb2_grpc import ExpertShardStub

pytestmark = pytest.mark.shards

FRAMES = counts.of(sample=3000, full=1_000_000, variable="UNMASK_FRAMES")
"""Given to the function behind the port; a hundredth of them goes through the port."""
HIDDEN, LAYER = 64, 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden_folder(tmp_path_factory.mktemp("model") / "llada2_a", "llada2_a")


@pytest.fixture(scope="module")
def shard(folder: Path) -> Iterator[Shard]:
    with running_shards(folder, 1) as (running,):
        yield running


def good(sequence: int, **changes: object) -> bytes:
    header = Header(epoch=1, part=0, layer=LAYER, sequence=sequence, tokens=0)
    return bytes(
        encode_request(
            replace(header, **changes),  # type: ignore[arg-type]
            torch.tensor([[0, 3], [15, -1]], dtype=torch.int16),
            torch.ones(2, 2),
            torch.ones(2, HIDDEN),
        )
    )


class Harm:
    """Frames that are wrong in one way or in several, from a seed."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self._sequence = 0

    def frame(self) -> bytes:
        dice = self._dice
        self._sequence += 1
        ways = [self._numbers, self._tensors, self._bytes, self._not_finite, self._kind, self._good]
        return dice.choice(ways)()

    def _good(self) -> bytes:
        return good(self._sequence - self._dice.randint(0, 2))

    def _numbers(self) -> bytes:
        most = {
            "epoch": 1 << 32,
            "part": 1 << 16,
            "layer": 1 << 16,
            "sequence": 1 << 64,
            "micro_batch": 1 << 16,
        }
        name = self._dice.choice(list(most))
        return (
            good(self._sequence)
            if name == "sequence"
            else good(self._sequence, **{name: self._dice.randrange(most[name])})
        )

    def _tensors(self) -> bytes:
        dice = self._dice
        tokens, choices = dice.randint(1, 40), dice.choice([1, 2, 5, 17, 70])
        hidden = dice.choice([1, 8, HIDDEN, HIDDEN, 2 * HIDDEN])
        low, high = dice.choice([(-1, 15), (-9, 99), (-(1 << 15), (1 << 15) - 1)])
        slots = [[dice.randint(low, high) for _ in range(choices)] for _ in range(tokens)]
        return bytes(
            encode_request(
                Header(epoch=1, part=0, layer=LAYER, sequence=self._sequence, tokens=0),
                torch.tensor(slots, dtype=torch.int16),
                torch.ones(tokens, choices),
                torch.ones(tokens, hidden, dtype=dice.choice([torch.float32, torch.bfloat16])),
            )
        )

    def _bytes(self) -> bytes:
        dice, frame = self._dice, bytearray(good(self._sequence))
        match dice.randrange(4):
            case 0:
                frame[dice.randrange(len(frame))] ^= 1 << dice.randrange(8)
            case 1:
                del frame[dice.randrange(len(frame)) :]
            case 2:
                frame += dice.randbytes(dice.randint(1, 64))
            case 3:
                frame = bytearray(dice.randbytes(dice.randint(0, 300)))
        return bytes(frame)

    def _not_finite(self) -> bytes:
        wrong = self._dice.choice([torch.nan, torch.inf, -torch.inf, 3e38])
        weights, rows = torch.ones(1, 2), torch.ones(1, HIDDEN)
        self._dice.choice([weights, rows])[0, 0] = wrong
        header = Header(epoch=1, part=0, layer=LAYER, sequence=self._sequence, tokens=0)
        return bytes(encode_request(header, torch.zeros(1, 2, dtype=torch.int16), weights, rows))

    def _kind(self) -> bytes:
        header = Header(epoch=1, part=0, layer=LAYER, sequence=self._sequence, tokens=1, hidden_size=HIDDEN)
        if self._dice.random() < 0.5:
            return encode_refusal(header, Status.FAILED, "x" * 600)
        return encode_reply(header, torch.ones(1, HIDDEN))


def test_every_harmful_frame_gets_a_clear_answer(folder: Path) -> None:
    recorder = Recorder(metrics.SHARD)
    answering = Answering(holding_of(folder, 0, shards=1), recorder, max_tokens=32)
    harm, seen, ended = Harm(1), Seen(), Counter[str]()
    expected = decode_reply(answering.answer(good(1), Seen())).rows
    assert expected is not None
    for number in range(FRAMES):
        try:
            reply = decode_reply(answering.answer(harm.frame(), seen))
        except FrameError:
            ended["no answer"] += 1
            continue
        ended[reply.header.status.name] += 1
        assert reply.header.status is not Status.FAILED, reply.message
        assert (reply.rows is None) == (reply.header.status is not Status.OK)
        assert len(reply.message) <= 512
        if number % 100 == 0:
            again = decode_reply(answering.answer(good(1), Seen())).rows
            assert again is not None and torch.equal(again, expected)
    kinds = {"no answer", *(status.name for status in Status)} - {"FAILED", "DRAINING"}
    assert set(ended) == kinds, "each kind of harm is among them"
    assert recorder.value(metrics.SHARD_FRAMES, status="failed") == 0


class Session:
    """A session by hand."""

    def __init__(self, shard: Shard) -> None:
        self._channel = grpc.insecure_channel(f"127.0.0.1:{shard.port}")
        self._outgoing: SimpleQueue[bytes | None] = SimpleQueue()
        call = self._channel.stream_stream(f"/{SERVICE}/Session")
        self.answers = call(iter(self._outgoing.get, None), timeout=60)

    def say(self, message: bytes | None) -> None:
        self._outgoing.put(message)

    def ask(self, message: bytes) -> bytes:
        self.say(message)
        return next(self.answers)

    def code(self) -> grpc.StatusCode:
        """How it ends."""
        try:
            list(self.answers)
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)
            assert error.details() and "Exception" not in error.details()
            return error.code()
        return grpc.StatusCode.OK

    def close(self) -> None:
        self.say(None)
        self._channel.close()


def offer(holding: Holding, **changes: object) -> bytes:
    given = {"engine": "test", "revision": holding.revision, "shape": holding.shape.message(), **changes}
    return pb.ShardFrame(offer=pb.SessionOffer(**given)).SerializeToString()  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def holding(folder: Path) -> Holding:
    return Holding(folder)


def test_a_session_survives_what_can_be_answered_and_ends_clearly_otherwise(
    shard: Shard, holding: Holding
) -> None:
    harm, session, ends = Harm(2), None, Counter[grpc.StatusCode]()
    for _ in range(max(300, FRAMES // 100)):
        if session is None:
            session = Session(shard)
            assert pb.ShardFrame.FromString(session.ask(offer(holding))).HasField("accepted")
        try:
            decode_reply(session.ask(harm.frame()))
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)
            ends[error.code()] += 1
            session.close()
            session = None
    assert set(ends) == {grpc.StatusCode.INVALID_ARGUMENT}
    last = Session(shard)
    last.ask(offer(holding))
    assert decode_reply(last.ask(good(1))).rows is not None
    last.close()


@pytest.mark.parametrize(
    ("first", "code"),
    [
        (b"", grpc.StatusCode.INVALID_ARGUMENT),
        (b"\xff" * 40, grpc.StatusCode.INVALID_ARGUMENT),
        (good(1), grpc.StatusCode.INVALID_ARGUMENT),
        (None, grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
def test_a_session_must_begin_with_an_offer(shard: Shard, first: bytes | None, code: grpc.StatusCode) -> None:
    session = Session(shard)
    session.say(first)
    assert session.code() is code
    session.close()


def test_an_engine_of_other_weights_or_another_shape_is_refused(shard: Shard, holding: Holding) -> None:
    other = pb.ExpertShape(hidden_size=1, expert_width=2, num_experts=3, layers=[4])
    for changes in ({"revision": "0" * 64}, {"shape": other}):
        session = Session(shard)
        session.say(offer(holding, **changes))
        assert session.code() is grpc.StatusCode.FAILED_PRECONDITION
        session.close()


def test_sessions_beyond_the_limit_are_refused_and_room_is_made_when_one_ends(
    folder: Path, holding: Holding
) -> None:
    def small(held: Holding, options: object) -> Shard:
        return Shard(held, replace(options, max_sessions=2))  # type: ignore[type-var]

    with running_shards(folder, 1, make=small) as (shard,):
        sessions = [Session(shard) for _ in range(2)]
        for session in sessions:
            session.ask(offer(holding))
        third = Session(shard)
        third.say(offer(holding))
        assert third.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        sessions[0].close()
        for _ in range(100):
            again = Session(shard)
            again.say(offer(holding))
            try:
                next(again.answers)
            except grpc.RpcError:
                again.close()
                continue
            break
        else:
            pytest.fail("a session that ended still counts")


def test_other_calls_refuse_what_is_wrong(shard: Shard) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{shard.port}") as channel:
        stub = ExpertShardStub(channel)

        def code(call: object, *given: object) -> grpc.StatusCode:
            with pytest.raises(grpc.RpcError) as error:
                call(*given, timeout=30)  # type: ignore[operator]
            return error.value.code()

        placement = pb.HeldPlacement(epoch=1, bounds=[0, 3, 16], parts=[0])
        assert code(stub.Load, pb.LoadRequest(placement=placement)) is grpc.StatusCode.INVALID_ARGUMENT
        assert code(stub.Load, pb.LoadRequest()) is grpc.StatusCode.INVALID_ARGUMENT
        assert code(stub.Probe, pb.ProbeRequest(answer_bytes=1 << 31)) is grpc.StatusCode.INVALID_ARGUMENT
        raw = channel.unary_unary(f"/{SERVICE}/Describe")
        assert code(raw, b"\xff\xff\xff") is grpc.StatusCode.INVALID_ARGUMENT
        described = stub.Describe(pb.DescribeRequest(), timeout=30)
        assert [(one.epoch, list(one.parts)) for one in described.placements] == [(1, [0])]
        assert stub.Unload(pb.UnloadRequest(epochs=[7]), timeout=30).description == described
        assert len(stub.Probe(pb.ProbeRequest(payload=b"x", answer_bytes=5), timeout=30).payload) == 5


def test_a_shard_that_ends_says_so_first(folder: Path, holding: Holding) -> None:
    with running_shards(folder, 1) as (shard,):
        session = Session(shard)
        session.ask(offer(holding))
        health = f"http://127.0.0.1:{shard.metrics_port}/healthz"
        assert urllib.request.urlopen(health, timeout=10).status == 200
        shard.drain()
        assert decode_reply(session.ask(good(1))).header.status is Status.DRAINING
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(health, timeout=10)
        late = Session(shard)
        late.say(offer(holding))
        assert late.code() is grpc.StatusCode.UNAVAILABLE
        late.close()
        session.close()
