"""Experts over shared memory and torch.distributed: the same bits as over gRPC, whatever fails or harms."""

import os
import random
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch

from support import counts
from support.serving import wait_until
from support.shard_processes import shard_processes
from support.shards import (
    ScriptedLink,
    golden_folder,
    holding_of,
    in_process,
    network_without_experts,
    running_shards,
    sharded,
)
from unmask.attention import AttentionMetadata
from unmask.errors import UsageError
from unmask.experts.answering import Answering, Seen
from unmask.experts.exchange import Exchange
from unmask.experts.frames import Header, Message, WireDtype, decode_reply, encode_request, wire_dtype
from unmask.experts.holding import Holding
from unmask.experts.links import Arrived, Began, Inbox, Lost, News
from unmask.experts.sessions import Sessions
from unmask.experts.shard import Shard, ShardOptions, most_frame_bytes
from unmask.experts.shared_memory import Memory
from unmask.experts.signals import MOST_BYTES, Kind, Signal, packed, unpacked
from unmask.experts.socket_link import SLOTS, SocketLink
from unmask.models.base import LanguageModel
from unmask.models.loading import load
from unmask.telemetry import Recorder, metrics
from unmask.v1 import experts_pb2 as pb

pytestmark = pytest.mark.shards

HIDDEN, LAYER = 64, 1
PAGE = os.sysconf("SC_PAGESIZE")
FRAMES = counts.of(sample=300, full=10_000)
"""Of junk, given to a shard through shared memory."""
PATIENCE_S = 30.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden_folder(tmp_path_factory.mktemp("model") / "llada2_a", "llada2_a")


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A folder for sockets, whose paths must be short."""
    with tempfile.TemporaryDirectory(prefix="umx") as made:
        yield Path(made)


@pytest.fixture
def shard(folder: Path, sockets: Path) -> Iterator[Shard]:
    with running_shards(folder, 1, sockets=sockets) as (running,):
        yield running


def logits(network: LanguageModel) -> torch.Tensor:
    ids = torch.randint(0, 500, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        position = torch.arange(ids.shape[1]).expand_as(ids)
        metadata = AttentionMetadata.block_causal(position, torch.zeros_like(ids), block_length=8)
        return network.logits(network.hidden(ids, metadata))


def free_store() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


# The same bits


@pytest.mark.slow
@pytest.mark.parametrize("golden", ["llada2_a", "lladamoe_a"])
@pytest.mark.parametrize("rows_as", ["float32", "bfloat16"])
def test_every_transport_gives_the_same_bits(
    golden: str, rows_as: WireDtype, tmp_path: Path, sockets: Path
) -> None:
    folder = golden_folder(tmp_path / golden, golden)
    holdings = [holding_of(folder, number, shards=2) for number in range(2)]

    def links(inbox: Inbox) -> list[ScriptedLink]:
        return [ScriptedLink(str(number), holding, inbox) for number, holding in enumerate(holdings)]

    network = network_without_experts(folder)
    with sharded(network, links, rows_as=wire_dtype(rows_as)):
        expected = logits(network)
    difference = float((expected - logits(load(folder))).abs().max())
    assert (difference < 2e-4) is (rows_as == "float32"), difference  # else bfloat16 went nowhere
    with running_shards(folder, 2, sockets=sockets) as running:
        ports = [f"127.0.0.1:{shard.port}" for shard in running]
        paths = [f"unix:{sockets / f'{number}.sock'}" for number in range(2)]
        for addresses in (ports, paths, [ports[0], paths[1]]):
            with in_process(folder, addresses, rows_as=rows_as) as (network, _):
                assert torch.equal(logits(network), expected), addresses
    store = free_store()
    with (
        shard_processes(folder, 2, group=store),
        in_process(folder, [f"group:{store}?shards=2"], rows_as=rows_as) as (network, _),
    ):
        assert torch.equal(logits(network), expected)


def at_next_layer(exchange: Exchange, act: Callable[[], object], *, sent: bool) -> None:
    """Do something before the next layer's rows are sent, or once they are."""
    name = "receive" if sent else "send"
    original = getattr(exchange, name)

    def once(*given: object) -> object:
        setattr(exchange, name, original)
        act()
        return original(*given)

    setattr(exchange, name, once)


def ready(exchange: Exchange, count: int) -> Callable[[], bool]:
    return lambda: sum(link.is_ready for link in exchange.links) == count


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["kill", "freeze"])
def test_a_shard_on_this_machine_that_fails_changes_no_bit(folder: Path, sockets: Path, fault: str) -> None:
    with (
        shard_processes(folder, 2, replication=2, sockets=sockets) as shards,
        in_process(folder, [shard.address for shard in shards]) as (network, exchange),
    ):
        expected = logits(network)
        for victim, sent in zip(shards, (False, True), strict=True):
            wait_until(ready(exchange, 2))
            at_next_layer(exchange, victim.kill if fault == "kill" else victim.freeze, sent=sent)
            assert torch.equal(logits(network), expected)
            wait_until(ready(exchange, 1))  # the session is over, though nothing was sent on it any more
            assert torch.equal(logits(network), expected)
            if fault == "kill":
                victim.start()
            else:
                victim.thaw()
        wait_until(ready(exchange, 2))
        assert torch.equal(logits(network), expected)


@pytest.mark.slow
def test_a_rank_that_is_lost_stays_lost_and_the_others_go_on(folder: Path) -> None:
    store = free_store()
    with (
        shard_processes(folder, 2, replication=2, group=store) as shards,
        in_process(folder, [f"group:{store}?shards=2"]) as (network, exchange),
    ):
        expected = logits(network)
        at_next_layer(exchange, shards[0].kill, sent=True)
        for _ in range(3):
            assert torch.equal(logits(network), expected)
        wait_until(ready(exchange, 1))
        assert [link.is_ready for link in exchange.links] == [False, True]


@pytest.mark.slow
def test_the_ranks_of_a_group_end_with_the_engine(folder: Path) -> None:
    store = free_store()
    with shard_processes(folder, 1, group=store) as (shard,):
        with in_process(folder, [f"group:{store}?shards=1"]) as (network, _):
            logits(network)
        shard.join()


# Answers in shared memory


def offer(holding: Holding, **changes: object) -> pb.SessionOffer:
    given = {"engine": "test", "revision": holding.revision, "shape": holding.shape.message(), **changes}
    return pb.SessionOffer(**given)  # type: ignore[arg-type]


def frame(sequence: int, **changes: object) -> bytes:
    header = Header(epoch=1, part=0, layer=LAYER, sequence=sequence, tokens=0)
    return bytes(
        encode_request(
            replace(header, **changes),  # type: ignore[arg-type]
            torch.tensor([[0, 3], [15, -1]], dtype=torch.int16),
            torch.ones(2, 2),
            torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(sequence)),
        )
    )


@contextmanager
def linked(folder: Path, path: Path, *, max_tokens: int = 4096) -> Iterator[tuple[SocketLink, Inbox]]:
    inbox: Inbox = SimpleQueue()
    most = most_frame_bytes(HIDDEN, max_tokens)
    link = SocketLink(path, offer(Holding(folder)), inbox, max_tokens=max_tokens, max_bytes=most)
    try:
        yield link, inbox
    finally:
        link.close()


def heard(inbox: Inbox) -> News:
    return inbox.get(timeout=PATIENCE_S)


def arrived(inbox: Inbox) -> Message:
    news = heard(inbox)
    assert isinstance(news, Arrived), news
    return news.message


def test_an_answer_stays_as_it_is_while_it_is_in_use(folder: Path, shard: Shard, sockets: Path) -> None:
    plain = Answering(holding_of(folder, 0, shards=1), Recorder(metrics.SHARD), max_tokens=64)
    frames = [frame(number) for number in range(1, 4 * SLOTS)]
    with linked(folder, sockets / "0.sock") as (link, inbox):
        assert isinstance(heard(inbox), Began)
        for one in frames:
            link.send(one)
        messages = [arrived(inbox) for _ in frames]
        held = [decode_reply(message).rows for message in messages]
        kinds = {type(message) for message in messages}
        assert kinds == {bytes, memoryview}, "some are read in place; not all, for others wait for the places"
        del messages
        for number in range(2 * SLOTS):  # at once, so that every free place is written to
            link.send(frame(10_000 + number))
        for _ in range(2 * SLOTS):
            arrived(inbox)
        for one, rows in zip(frames, held, strict=True):
            expected = decode_reply(plain.answer(one, Seen())).rows
            assert rows is not None and expected is not None and torch.equal(rows, expected)
        del held, rows
        for number in range(2 * SLOTS):
            link.send(frame(20_000 + number))
            assert isinstance(arrived(inbox), memoryview), "what is let go makes room"


def test_a_frame_that_is_larger_than_a_place_goes_elsewhere(
    folder: Path, shard: Shard, sockets: Path
) -> None:
    rows = 4000
    large = bytes(
        encode_request(
            Header(epoch=1, part=0, layer=LAYER, sequence=1, tokens=0),
            torch.zeros(rows, 2, dtype=torch.int16),
            torch.ones(rows, 2),
            torch.ones(rows, HIDDEN),
        )
    )
    with linked(folder, sockets / "0.sock", max_tokens=8) as (link, inbox):
        assert isinstance(heard(inbox), Began) and link.max_tokens == 8
        link.send(large)
        assert "at most" in decode_reply(arrived(inbox)).message
        link.send(frame(2))
        assert decode_reply(arrived(inbox)).rows is not None, "the session goes on"


def test_what_a_shard_holds_is_known_while_a_session_goes_on(
    folder: Path, shard: Shard, sockets: Path
) -> None:
    with linked(folder, sockets / "0.sock") as (link, inbox):
        assert isinstance(heard(inbox), Began)
        assert set(link.held) == {1}
        shard.holding.load(2, (0, 8, 16), [1])
        wait_until(lambda: set(link.held) == {1, 2})
        shard.drain()
        assert isinstance(heard(inbox), Lost), "an engine that waits for nothing leaves a shard that ends"
        assert not link.is_ready


# Harm to a shard


class Client:
    """An engine by hand."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(PATIENCE_S)
        self._socket.connect(str(path))

    def say(self, packet: bytes, descriptors: Sequence[int] = ()) -> None:
        if descriptors:
            socket.send_fds(self._socket, [packet], list(descriptors))
        else:
            self._socket.send(packet)

    def hear(self) -> Signal | None:
        """What comes back; None where the connection ends."""
        try:
            packet = self._socket.recv(MOST_BYTES)
        except ConnectionResetError:  # closed with something unread; what was sent before is still to come
            packet = self._socket.recv(MOST_BYTES)
        return unpacked(packet) if packet else None

    def begin(self, holding: Holding, slots: int = 4, slot_bytes: int = 16 * PAGE) -> Memory:
        """Begin a session as it should be."""
        descriptor = Memory.created(slots, slot_bytes)
        self.say(offering(holding, slots, slot_bytes), [descriptor])
        memory = Memory(descriptor, slots, slot_bytes)
        os.close(descriptor)
        assert self.hear_kind() == Kind.ACCEPTED
        return memory

    def hear_kind(self) -> int | None:
        signal = self.hear()
        return None if signal is None else signal.kind

    def ask(self, memory: Memory, message: bytes, slot: int = 0) -> Message | None:
        """The answer to a frame; None where the session ends."""
        memory.request(slot)[: len(message)] = message
        self.say(packed(Signal(Kind.FRAME, slot, len(message))))
        signal = self.hear()
        if signal is None or signal.kind != Kind.FRAME:
            return None
        return bytes(memory.reply(signal.slot)[: signal.length])

    def close(self) -> None:
        self._socket.close()


def offering(holding: Holding, slots: int, slot_bytes: int, **changes: object) -> bytes:
    body = pb.ShardFrame(offer=offer(holding, **changes)).SerializeToString()
    return packed(Signal(Kind.OFFER, slots, slot_bytes, body))


@contextmanager
def client(sockets: Path) -> Iterator[Client]:
    made = Client(sockets / "0.sock")
    try:
        yield made
    finally:
        made.close()


def assert_answers(shard: Shard, sockets: Path) -> None:
    """See to it that the shard does what it should."""
    with client(sockets) as good:
        memory = good.begin(shard.holding)
        answer = good.ask(memory, frame(1))
        assert answer is not None and decode_reply(answer).rows is not None


def unsealed(size: int) -> int:
    descriptor = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    return descriptor


def ordinary_file(size: int) -> int:
    with tempfile.TemporaryFile() as file:
        os.ftruncate(file.fileno(), size)
        return os.dup(file.fileno())


SIZE = 2 * 4 * PAGE
MEMORY: dict[str, tuple[list[Callable[[], int]], int, int, str]] = {
    "no descriptor": ([], 4, PAGE, "got 0 descriptors"),
    "two descriptors": ([lambda: Memory.created(4, PAGE)] * 2, 4, PAGE, "got 2 descriptors"),
    "many descriptors": ([lambda: Memory.created(4, PAGE)] * 9, 4, PAGE, "descriptors"),
    "a device": ([lambda: os.open("/dev/null", os.O_RDWR)], 4, PAGE, "not one of memory"),
    "a file": ([lambda: ordinary_file(SIZE)], 4, PAGE, "memory"),
    "not sealed": ([lambda: unsealed(SIZE)], 4, PAGE, "must be sealed"),
    "smaller than told": ([lambda: Memory.created(4, PAGE)], 8, PAGE, f"the memory has {SIZE} bytes"),
    "no places": ([lambda: Memory.created(4, PAGE)], 0, PAGE, "slots: got 0"),
    "too many places": ([lambda: Memory.created(4, PAGE)], 65, PAGE, "slots: got 65"),
    "places of no bytes": ([lambda: Memory.created(4, PAGE)], 4, 0, "bytes of a slot: got 0"),
    "crooked places": ([lambda: Memory.created(4, PAGE)], 4, PAGE + 8, "bytes of a slot: got"),
    "huge places": ([lambda: Memory.created(4, PAGE)], 4, 1 << 31, "bytes of a slot: got"),
}


@pytest.mark.parametrize("case", MEMORY)
def test_memory_that_is_none_is_refused(shard: Shard, sockets: Path, case: str) -> None:
    make, slots, slot_bytes, told = MEMORY[case]
    before = open_descriptors()
    with client(sockets) as harmful:
        descriptors = [one() for one in make]
        harmful.say(offering(shard.holding, slots, slot_bytes), descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        signal = harmful.hear()
        assert signal is not None and signal.kind == Kind.REFUSED
        assert signal.body.decode().startswith("INVALID_ARGUMENT: ") and told in signal.body.decode()
        assert harmful.hear() is None
    wait_until(lambda: open_descriptors() == before)
    assert_answers(shard, sockets)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    ("first", "told"),
    [
        (b"\x01", "got a packet of 1 bytes"),
        (b"\xff" * 300, "got a signal of kind 255, expected an offer"),
        (packed(Signal(Kind.FRAME, 0, 10)), "got a signal of kind 4, expected an offer"),
        (packed(Signal(Kind.OFFER, 4, PAGE, b"\xff" * 9)), "the first message is no ShardFrame"),
        (packed(Signal(Kind.OFFER, 4, PAGE, b"")), "the first message must be an offer"),
    ],
)
def test_a_connection_must_begin_with_an_offer(shard: Shard, sockets: Path, first: bytes, told: str) -> None:
    with client(sockets) as harmful:
        descriptor = Memory.created(4, PAGE)
        harmful.say(first, [descriptor])
        os.close(descriptor)
        signal = harmful.hear()
        assert signal is not None and signal.kind == Kind.REFUSED and told in signal.body.decode()
        assert harmful.hear() is None
    assert_answers(shard, sockets)


def test_an_engine_of_other_weights_is_refused_as_over_grpc(shard: Shard, sockets: Path) -> None:
    with client(sockets) as other:
        descriptor = Memory.created(4, PAGE)
        other.say(offering(shard.holding, 4, PAGE, revision="0" * 64), [descriptor])
        os.close(descriptor)
        signal = other.hear()
        assert signal is not None and signal.body.startswith(b"FAILED_PRECONDITION: revision: ")


@pytest.mark.parametrize(
    "bell",
    [
        packed(Signal(Kind.FRAME, 4, 100)),
        packed(Signal(Kind.FRAME, 65535, 100)),
        packed(Signal(Kind.FRAME, 0, 16 * PAGE + 1)),
        packed(Signal(Kind.FRAME, 0, (1 << 32) - 1)),
        packed(Signal(Kind.FRAME, 0, 0)),
        packed(Signal(Kind.FRAME, 0, 16 * PAGE)),
        packed(Signal(Kind.ACCEPTED)),
        packed(Signal(Kind.ASK)),
        b"\x04",
        b"\x00" * 400,
    ],
)
def test_a_doorbell_that_makes_no_sense_ends_the_session(shard: Shard, sockets: Path, bell: bytes) -> None:
    with client(sockets) as harmful:
        harmful.begin(shard.holding)
        harmful.say(bell)
        signal = harmful.hear()
        assert signal is not None and signal.kind == Kind.REFUSED
        assert signal.body.startswith(b"INVALID_ARGUMENT: ")
        assert harmful.hear() is None
    assert_answers(shard, sockets)


def test_frames_of_junk_and_frames_that_change_while_they_are_read_do_no_harm(
    shard: Shard, sockets: Path
) -> None:
    dice = random.Random(3)
    places: list[Memory] = []
    done = threading.Event()

    def scribble() -> None:
        noise = random.Random(4)
        while not done.wait(0.0001):
            for memory in places[-1:]:
                place = memory.request(noise.randrange(4))
                at = noise.randrange(len(frame(1)))
                place[at] = noise.randrange(256)

    writer = threading.Thread(target=scribble, daemon=True)
    writer.start()
    made: Client | None = None
    for number in range(1, FRAMES):
        if made is None:
            made = Client(sockets / "0.sock")
            places.append(made.begin(shard.holding))
        message = bytearray(frame(number))
        if dice.random() < 0.7:
            message[dice.randrange(len(message))] = dice.randrange(256)
        answer = made.ask(places[-1], bytes(message), slot=number % 4)
        if answer is None:
            made.close()
            made = None
            continue
        decode_reply(answer)  # whatever it says, it is a reply, and whole
    done.set()
    writer.join()
    if made is not None:
        made.close()
    assert len(places) > 1, "some of them end a session"
    assert_answers(shard, sockets)


def test_who_says_nothing_is_let_go(shard: Shard, sockets: Path) -> None:
    with client(sockets) as silent:
        assert silent.hear() is None


def test_there_is_a_limit_to_sessions_and_to_connections(folder: Path, sockets: Path) -> None:
    def small(holding: Holding, options: ShardOptions) -> Shard:
        return Shard(holding, replace(options, max_sessions=2))

    with running_shards(folder, 1, sockets=sockets, make=small) as (shard,):
        clients = [Client(sockets / "0.sock") for _ in range(2)]
        for one in clients:
            one.begin(shard.holding)
        with client(sockets) as third:
            descriptor = Memory.created(4, PAGE)
            third.say(offering(shard.holding, 4, PAGE), [descriptor])
            os.close(descriptor)
            signal = third.hear()
            assert signal is not None and signal.body.startswith(b"RESOURCE_EXHAUSTED: there are 2 sessions")
        clients.pop().close()
        wait_until(lambda: begins(shard, sockets))
        most = 2 * (2 + 16)
        told = None
        while len(clients) <= most and (told is None or told.kind == Kind.ACCEPTED):
            clients.append(Client(sockets / "0.sock"))
            with suppress(BrokenPipeError):
                clients[-1].say(packed(Signal(Kind.ASK)))  # who asks may stay
            told = clients[-1].hear()
        assert told is not None and b"too many connections" in told.body
        assert len(clients) > most - 3, "a session that has just ended may still count"
        for one in clients:
            one.close()


def begins(shard: Shard, sockets: Path) -> bool:
    with client(sockets) as one:
        descriptor = Memory.created(4, PAGE)
        one.say(offering(shard.holding, 4, PAGE), [descriptor])
        os.close(descriptor)
        return one.hear_kind() == Kind.ACCEPTED


def test_other_users_are_refused(
    folder: Path,
    shard: Shard,
    sockets: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert (sockets / "0.sock").stat().st_mode & 0o777 == 0o600
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 12345)
        with client(sockets) as other:
            assert other.hear() is None
        with linked(folder, sockets / "0.sock") as (link, _):
            wait_until(lambda: "this process of 12345; run both as one" in caplog.text)
            assert not link.is_ready
    assert_answers(shard, sockets)


def test_a_path_that_is_in_use_is_refused_and_one_that_was_left_behind_is_not(
    folder: Path, sockets: Path
) -> None:
    path = sockets / "0.sock"
    with running_shards(folder, 1, sockets=sockets) as (first,):
        second = Shard(holding_of(folder, 0, shards=1), ShardOptions(port=0, metrics_port=0, socket=path))
        with pytest.raises(UsageError, match="--socket: cannot listen on .*in use"):
            second.start()
        second.stop(0)
        assert_answers(first, sockets)
    assert not path.exists()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
        left.bind(str(path))
    with running_shards(folder, 1, sockets=sockets) as (third,):
        assert_answers(third, sockets)
    path.write_text("something else")
    with pytest.raises(UsageError, match="--socket"), running_shards(folder, 1, sockets=sockets):
        pass
    assert path.read_text() == "something else"


# Harm to an engine


@contextmanager
def harmful_shard(folder: Path, path: Path, *packets: bytes, mute: bool = False) -> Iterator[None]:
    """A shard that accepts sessions and answers frames with packets; if mute, it says nothing between."""
    holding = holding_of(folder, 0, shards=1)
    answering = Answering(holding, Recorder(metrics.SHARD), max_tokens=64)
    sessions = Sessions(holding, answering, name="harmful", max_sessions=9, max_tokens=64)
    accepted = packed(Signal(Kind.ACCEPTED, body=sessions.told()))
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen()

    def serve(connection: socket.socket) -> None:
        answers = {Kind.OFFER: [accepted], Kind.ASK: [] if mute else [accepted], Kind.FRAME: packets}
        with connection, suppress(OSError):
            while packet := connection.recv(MOST_BYTES):
                for one in answers[Kind(unpacked(packet).kind)]:
                    connection.send(one)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@pytest.mark.parametrize(
    ("packet", "why"),
    [
        (packed(Signal(Kind.FRAME, 0, 100)), "a doorbell of kind 4 for place 0, which has no frame"),
        (packed(Signal(Kind.FRAME, 65535, 100)), "which has no frame"),
        (packed(Signal(Kind.FRAME, SLOTS - 1, 1 << 31)), "an answer of 2147483648 bytes"),
        (packed(Signal(Kind.ASK)), "a doorbell of kind 5"),
        (packed(Signal(Kind.REFUSED, body=b"UNAVAILABLE: enough")), "UNAVAILABLE: enough"),
        (b"\x04", "got a packet of 1 bytes"),
    ],
)
def test_an_engine_lets_go_of_a_shard_whose_doorbells_make_no_sense(
    folder: Path, sockets: Path, packet: bytes, why: str
) -> None:
    with (
        harmful_shard(folder, sockets / "0.sock", packet),
        linked(folder, sockets / "0.sock") as (link, inbox),
    ):
        assert isinstance(heard(inbox), Began)
        link.send(frame(1))  # at the last place
        news = heard(inbox)
        assert isinstance(news, Lost) and why in news.why, news


def test_an_engine_lets_go_of_a_shard_that_gives_no_sign_of_life(folder: Path, sockets: Path) -> None:
    with (
        harmful_shard(folder, sockets / "0.sock", mute=True),
        linked(folder, sockets / "0.sock") as (_, inbox),
    ):
        assert isinstance(heard(inbox), Began)
        began = time.monotonic()
        news = heard(inbox)
        assert isinstance(news, Lost) and "no sign of life" in news.why
        assert time.monotonic() - began < PATIENCE_S / 2


def test_an_engine_waits_for_a_socket_that_is_not_there_yet(
    folder: Path, sockets: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with linked(folder, sockets / "0.sock") as (link, _):
        wait_until(lambda: "No such file" in caplog.text)
        with running_shards(folder, 1, sockets=sockets):
            wait_until(lambda: link.is_ready)
