"""Messages made to do harm, read in this process: refused in few words, or carried out to their end.

Functions read the bytes of a request before it may wait for anything, one of the wire and one of the HTTP
front. They are given half of the messages each of two kinds of models, four of the wire for one of HTTP; some
more go through sockets in ``tests/integration/test_serving_hostile``.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from support import counts, hostile
from support.folders import served_folder
from unmask.diffusion.batch import Finished
from unmask.fronts.generation import check_canvas
from unmask.fronts.openai_wire import ChatRequest, CompletionRequest, error_of, read_body
from unmask.fronts.refusals import Refused
from unmask.models.loading import load
from unmask.models.registry import read_config
from unmask.serving.engine import Engine, Request
from unmask.serving.model import ServedModel
from unmask.serving.narration import Narration
from unmask.serving.outbox import Outbox
from unmask.serving.requests import Order, read_order
from unmask.serving.tracing import TraceLog
from unmask.telemetry import Recorder
from unmask.v1 import generation_pb2 as pb

pytestmark = pytest.mark.serving

MESSAGES = counts.of(sample=5000, full=1_000_000, variable="UNMASK_MESSAGES")
CONTEXT = 48
CARRIED_OUT = 1 / 250
"""Share of the accepted requests that are decoded to their end; all others are admitted and released."""
ALLOWED = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNIMPLEMENTED}
LONGEST = 3000
"""Bytes of a status in its metadata: peers refuse a call whose metadata exceed 8 KiB."""


class Served:
    """A model, and an engine that is turned by hand."""

    def __init__(self, folder: Path) -> None:
        self.model = ServedModel.describe(
            folder, read_config(folder), name="tiny", rows=2, context_length=CONTEXT
        )
        self.batch = self.model.batch(load(folder))
        self.engine = Engine(self.batch, Recorder())

    def admit(self, order: Order) -> None:
        """What is accepted may not be refused, or fail, later."""
        if (
            order.params.eos_token_id in order.committed
            or len(order.committed) >= order.params.max_new_tokens
        ):
            return
        self.batch.release(
            self.batch.admit(order.prompt, order.params, order.committed, cache_salt=order.cache_salt)
        )

    def carry_out(self, order: Order) -> None:
        """Decode a request to its end, and tell it."""
        narration = Narration(order, self.model)
        request = Request(
            prompt=order.prompt,
            committed=order.committed,
            params=order.params,
            cache_salt=order.cache_salt,
            priority=order.priority,
            canvas=True,
            trace=TraceLog() if order.trace else None,
            outbox=Outbox(lambda: None),
        )
        self.engine.submit(request)
        for _ in range(10_000):
            for item in request.outbox.take():
                event = narration.tell(item)
                assert event is None or event.ByteSize() > 0
                if narration.stopped:
                    self.engine.cancel(request)
                    self.engine.turn()
                    return
                if isinstance(item, Finished):
                    return
            self.engine.turn()
        raise AssertionError("it goes on without end")


@pytest.fixture(scope="module", params=["llada2_a", "lladamoe_a"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = served_folder(
        tmp_path_factory.mktemp("model") / "tiny", golden=request.param, block_length=8, threshold=0.05
    )
    made = Served(folder)
    yield made
    assert (made.batch.active, made.batch.cache_usage) == (0, 0)


def check(refused: Refused) -> None:
    """A refusal is short, one line, and holds nothing of the request's texts."""
    status = refused.status()
    assert status.code in ALLOWED, status
    packed = dict(status.trailing_metadata or ()).get("grpc-status-details-bin", b"")
    told = status.details + str(error_of(refused))
    assert len(status.details.encode()) + len(packed) < LONGEST
    assert hostile.MARKER not in told and hostile.MARKER.encode() not in packed
    assert "\n" not in status.details and "Traceback" not in told and ".py" not in told


def outcomes(
    served: Served,
    count: int,
    drawn: Callable[[random.Random], tuple[bytes, Callable[[], pb.GenerateRequest]]],
) -> Counter[str]:
    """Give ``count`` messages to the server's reading; how each ended."""
    dice, found = random.Random(11), Counter[str]()
    for number in range(count):
        content, read = drawn(dice)
        try:
            order = read_order(read(), served.model)
            served.admit(order)
            if dice.random() < CARRIED_OUT:
                served.carry_out(order)
                found["carried out"] += 1
            found["accepted"] += 1
        except DecodeError:
            found["unreadable"] += 1
        except Refused as refused:
            check(refused)
            found[refused.code.name] += 1
        except Exception as error:
            raise AssertionError(f"message {number}, {content[:2000]!r}: {error!r}") from error
    return found


def values_in(message: Message, way: str = "") -> Iterator[str]:
    """The names of all that is set in a message, with those of the messages that it is in."""
    for field, value in message.ListFields():
        name = f"{way}{field.name}"
        if field.message_type is None:
            yield name
        else:
            for inside in value if field.is_repeated else [value]:
                yield from values_in(inside, f"{name}.")


REQUESTS: dict[str, tuple[Descriptor, Callable[[random.Random], bytes]]] = {
    "Generate": (pb.GenerateRequest.DESCRIPTOR, hostile.message),
    "GenerateStream": (pb.GenerateStreamRequest.DESCRIPTOR, hostile.stream_message),
    **{
        method.rpartition("/")[2]: (descriptor, partial(hostile.control, method))
        for method, descriptor in hostile.CONTROL.items()
    },
}


@pytest.mark.parametrize("method", REQUESTS)
def test_no_field_of_a_request_is_left_in_peace(method: str) -> None:
    descriptor, drawn = REQUESTS[method]
    dice, found = random.Random(1), set[str]()
    for _ in range(4000):
        try:
            found.update(values_in(GetMessageClass(descriptor).FromString(drawn(dice))))
        except DecodeError:
            continue
    assert found == {".".join(field.name for field in path) for path in hostile.fields_of(descriptor)}


def test_nor_is_one_of_a_body() -> None:
    dice = random.Random(2)
    bodies = [hostile.body(dice)[1] for _ in range(4000)]
    names = {*CompletionRequest.model_fields, *ChatRequest.model_fields}
    names.update(pb.DiffusionParams.DESCRIPTOR.fields_by_name)
    assert {name for name in names if not any(b'"%s":' % name.encode() in body for body in bodies)} == set()


@pytest.mark.timeout(1800)
def test_messages_of_the_wire(served: Served, record_measurement: Callable[[str, float | str], None]) -> None:
    def drawn(dice: random.Random) -> tuple[bytes, Callable[[], pb.GenerateRequest]]:
        if dice.random() < 0.5:
            content = hostile.message(dice)
            return content, lambda: pb.GenerateRequest.FromString(content)
        content = hostile.stream_message(dice)

        def read() -> pb.GenerateRequest:
            request = pb.GenerateStreamRequest.FromString(content)
            check_canvas(request.options)
            return request.request

        return content, read

    found = outcomes(served, MESSAGES * 2 // 5, drawn)
    record_measurement("messages", str(dict(found)))
    assert min(found[kind] for kind in ("unreadable", "accepted", "INVALID_ARGUMENT")) > 10, found


@pytest.mark.timeout(1800)
def test_bodies_of_the_http_front(
    served: Served, record_measurement: Callable[[str, float | str], None]
) -> None:
    def drawn(dice: random.Random) -> tuple[bytes, Callable[[], pb.GenerateRequest]]:
        path, content = hostile.body(dice)
        kind = ChatRequest if "chat" in path else CompletionRequest
        return content, lambda: read_body(kind, content).told()

    found = outcomes(served, MESSAGES // 10, drawn)
    record_measurement("bodies", str(dict(found)))
    assert min(found[kind] for kind in ("accepted", "INVALID_ARGUMENT")) > 10, found
