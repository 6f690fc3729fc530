"""Messages made to do harm, through sockets: no crash, no INTERNAL, no UNKNOWN, no leak, then a good answer.

``tests/unit/test_serving_hostile`` gives as many as are asked for to the functions behind. Through sockets go
some more: for each thousand, 40 calls over gRPC and 20 of those who run the server, 500 of them over one
connection; 20 bodies and 10 heads of HTTP and 4 times what is no HTTP/2, each over a connection of its own.
Ten calls and five bodies go through a gateway.
"""

import asyncio
import json
import logging
import random
import re
import shutil
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import grpc
import pytest

from support import counts, hostile
from support.folders import served_folder
from support.gateways import RunningGateway, running_gateway
from support.serving import CountingBatch, RunningServer, running_server, wait_until
from unmask.client import Client, Control
from unmask.models.loading import build, save
from unmask.models.registry import read_config
from unmask.serving.model import ServedModel
from unmask.serving.weights import ServedWeights
from unmask.telemetry import metrics

pytestmark = pytest.mark.serving

_OneCall: TypeAlias = Callable[[grpc.aio.Channel], Awaitable[None]]

MESSAGES = counts.of(sample=5000, full=1_000_000, variable="UNMASK_MESSAGES")
AT_ONCE = 32
BATCH = 500
"""Messages after each of which a good request is sent."""
METHODS = {
    "/unmask.v1.Generation/Generate": hostile.message,
    "/unmask.v1.Generation/GenerateStream": hostile.stream_message,
    "/unmask.v1.Models/GetModelInfo": hostile.message,
    "/grpc.health.v1.Health/Check": hostile.message,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": hostile.message,
    "/unmask.v1.Generation/Nothing": hostile.message,
}
ALLOWED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.UNIMPLEMENTED,
}
ALLOWED_BY_CONTROL = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNIMPLEMENTED,
}
ALLOWED_OVER_HTTP = {200, 400, 404, 405, 409, 411, 413, 414, 415, 417, 431, 501, 505}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_folder(tmp_path_factory.mktemp("model") / "tiny", block_length=4)


@pytest.fixture(scope="module")
def model(folder: Path) -> ServedModel:
    return ServedModel.describe(folder, read_config(folder), name=None, rows=8, context_length=48)


@pytest.fixture
def server(model: ServedModel, caplog: pytest.LogCaptureFixture) -> Iterator[RunningServer]:
    """A server that afterwards holds nothing and has logged no error."""
    batch = CountingBatch(rows=8)
    with caplog.at_level(logging.ERROR), running_server(batch, model, http_port=0) as running:
        yield running
        holds_nothing(running, batch)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


def holds_nothing(server: RunningServer, batch: CountingBatch) -> None:
    recorder = server.server.recorder
    wait_until(lambda: recorder.value(metrics.REQUESTS_WAITING) == 0)
    wait_until(lambda: recorder.value(metrics.REQUESTS_RUNNING) == 0 and batch.active == 0)


def serves(server: RunningServer) -> None:
    with Client(server.address, timeout_s=60) as client:
        assert client.generate("w5", max_tokens=3).token_ids == (6, 7, 8)


async def in_crowds(count: int, one: Callable[[], Awaitable[None]]) -> None:
    """Run ``one`` so often, some at a time."""
    left = iter(range(count))

    async def some() -> None:
        for _ in left:
            await one()

    async with asyncio.TaskGroup() as group:
        for _ in range(min(AT_ONCE, count)):
            group.create_task(some())


def in_batches(count: int, server: RunningServer, one: Callable[[], Awaitable[None]]) -> None:
    for start in range(0, count, BATCH):
        asyncio.run(in_crowds(min(BATCH, count - start), one))
        serves(server)


def leaks(told: str) -> bool:
    return hostile.MARKER in told or "Traceback" in told or ".py" in told


async def call(
    channel: grpc.aio.Channel, method: str, content: bytes, *, allowed: set[grpc.StatusCode]
) -> grpc.StatusCode:
    """Call with these bytes, hear all of the answer, and say how it ended."""
    ask = channel.stream_stream if "Reflection" in method else channel.unary_stream
    asked = iter([content]) if "Reflection" in method else content
    stream = ask(method, request_serializer=None, response_deserializer=None)(asked, timeout=60)
    try:
        async for _ in stream:
            pass
    except grpc.aio.AioRpcError as error:
        trailing = error.trailing_metadata()
        told = f"{error.details()} {[value for _, value in trailing] if trailing else ''}"
        assert not leaks(told), (method, content[:2000], told)
    code = await stream.code()
    assert code in allowed, (method, content[:2000], code, await stream.details())
    return code


def call_in_batches(count: int, address: str, one: _OneCall, between: Callable[[], None]) -> None:
    """Call so often, each batch over a channel of its own."""

    async def crowd(count: int) -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            await in_crowds(count, lambda: one(channel))

    for start in range(0, count, BATCH):
        asyncio.run(crowd(min(BATCH, count - start)))
        between()


@pytest.mark.timeout(1800)
def test_any_bytes_over_grpc_are_answered_with_a_status_that_tells_why(
    server: RunningServer, record_measurement: Callable[[str, float | str], None]
) -> None:
    dice, found = random.Random(5), Counter[str]()

    async def one(channel: grpc.aio.Channel) -> None:
        method = dice.choice([*METHODS, *list(METHODS)[:2] * 4])
        code = await call(channel, method, METHODS[method](dice), allowed=ALLOWED)
        found[code.name] += 1

    call_in_batches(MESSAGES // 25, server.address, one, lambda: serves(server))
    record_measurement("calls", str(dict(found)))
    assert min(found["OK"], found["INVALID_ARGUMENT"], found["UNIMPLEMENTED"]) > 0, found
    refused = server.server.recorder.value(metrics.REQUESTS, code="INVALID_ARGUMENT", finish_reason="")
    assert refused > 0


@pytest.fixture
def others(folder: Path) -> None:
    """Beside the served folder: one that may take its place, one cut short, one empty, a link to itself."""
    place = folder.parent
    save(build(read_config(folder), seed=7), place / "other")
    shutil.copytree(place / "other", place / "cut")
    weights = place / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (place / "empty").mkdir()
    (place / "circle").symlink_to("circle")


@pytest.mark.usefixtures("others")
@pytest.mark.timeout(1800)
def test_any_bytes_to_the_port_of_those_who_run_the_server_are_answered_too(
    folder: Path,
    model: ServedModel,
    caplog: pytest.LogCaptureFixture,
    record_measurement: Callable[[str, float | str], None],
) -> None:
    """Calls that end all others, drain, resume and replace weights: the server goes on to answer."""
    dice, found = random.Random(9), Counter[str]()
    batch, weights = CountingBatch(rows=8), ServedWeights(folder)
    methods = [*hostile.CONTROL, "/unmask.v1.Control/Nothing", "/unmask.v1.Generation/Generate"]

    async def one(channel: grpc.aio.Channel) -> None:
        method = dice.choice(methods)
        content = hostile.control(method, dice) if method in hostile.CONTROL else hostile.message(dice)
        code = await call(channel, method, content, allowed=ALLOWED_BY_CONTROL)
        found[f"{method.rpartition('/')[2]} {code.name}"] += 1

    with (
        caplog.at_level(logging.INFO),
        running_server(batch, model, weights=weights, control_port=0) as server,
        Control(f"127.0.0.1:{server.server.control_port}", timeout_s=60) as control,
    ):

        def between() -> None:
            control.resume()
            serves(server)

        address = f"127.0.0.1:{server.server.control_port}"
        call_in_batches(MESSAGES // 50, address, one, between)
        assert control.update_weights("other") == weights.revision
        holds_nothing(server, batch)
    record_measurement("calls of those who run it", str(dict(found)))
    ended = {method.rpartition("/")[2] for method in hostile.CONTROL}
    assert {name.partition(" ")[0] for name in found if name.endswith(" OK")} == ended, found
    assert min(found["Abort INVALID_ARGUMENT"], found["UpdateWeights INVALID_ARGUMENT"]) > 0, found
    assert min(found["Nothing UNIMPLEMENTED"], found["Generate UNIMPLEMENTED"]) > 0, found
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("unmask")]
    assert lines and not any("\n" in line or hostile.MARKER in line for line in lines)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def exchanged(server: RunningServer, content: bytes, *, patience_s: float) -> bytes:
    """What answers ``content`` until the connection ends, which is ended from here after a while."""
    assert server.server.http_port
    return await exchanged_at(server.server.http_port, content, patience_s=patience_s)


async def exchanged_at(port: int, content: bytes, *, patience_s: float) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = b""
    try:
        writer.write(content)
        async with asyncio.timeout(patience_s):
            while piece := await reader.read(1 << 16):
                answer += piece
    except TimeoutError:
        pass
    except ConnectionError:  # it need not read to the end what it has refused already
        pass
    finally:
        writer.transport.abort()
    return answer


def statuses(answer: bytes) -> list[int]:
    return [int(code) for code in re.findall(rb"HTTP/1\.[01] (\d{3}) ", answer)]


def checked(content: bytes, answer: bytes, found: Counter[str]) -> None:
    codes = statuses(answer)
    assert set(codes) <= ALLOWED_OVER_HTTP, (content[:2000], answer)
    if set(codes) != {200}:
        assert not leaks(answer.decode("latin-1")), (content[:2000], answer)
    found.update(map(str, codes or ["no answer"]))


def framed(path: str, body: bytes, *headers: str) -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: a",
        f"Content-Length: {len(body)}",
        "Connection: close",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


@pytest.mark.timeout(1800)
def test_any_body_over_http_is_answered_with_a_status_that_tells_why(
    server: RunningServer, record_measurement: Callable[[str, float | str], None]
) -> None:
    dice, found = random.Random(6), Counter[str]()

    async def one() -> None:
        path, body = hostile.body(dice)
        content = framed(path, body)
        answer = await exchanged(server, content, patience_s=60)
        assert len(statuses(answer)) == 1, (content[:2000], answer)
        checked(content, answer, found)

    in_batches(MESSAGES // 50, server, one)
    record_measurement("bodies", str(dict(found)))
    assert min(found["200"], found["400"]) > 0, found


@pytest.mark.timeout(1800)
def test_any_head_over_http_is_answered_or_let_go(
    server: RunningServer, record_measurement: Callable[[str, float | str], None]
) -> None:
    """Of a head or a body that is not complete nothing may come until the client ends the connection."""
    dice, found = random.Random(7), Counter[str]()

    async def one() -> None:
        content = hostile.head(dice)
        checked(content, await exchanged(server, content, patience_s=0.2), found)

    in_batches(MESSAGES // 100, server, one)
    record_measurement("heads", str(dict(found)))
    assert found["400"] > 0, found


SMUGGLED = framed("/v1/completions", json.dumps({"model": "tiny", "prompt": "w5", "max_tokens": 1}).encode())
BODY = json.dumps({"model": hostile.MARKER, "prompt": "w5"}).encode()
AMBIGUOUS = {
    "two lengths": ["Content-Length: 0", f"Content-Length: {len(BODY)}"],
    "two lengths in one": [f"Content-Length: 0, {len(BODY)}"],
    "a length and chunks": ["Content-Length: 5", "Transfer-Encoding: chunked"],
    "chunks and a length": ["Transfer-Encoding: chunked", "Content-Length: 5"],
    "chunks that are not the last coding": ["Transfer-Encoding: chunked, identity"],
    "chunks with a space before the colon": ["Transfer-Encoding : chunked"],
    "a signed length": [f"Content-Length: +{len(BODY)}"],
    "a negative length": ["Content-Length: -1"],
    "a length of another base": ["Content-Length: 0x10"],
    "a length without an end": ["Content-Length: " + "9" * 40],
    "a folded line": ["X: a", f" Content-Length: {len(BODY)}"],
    "a line without a colon": ["Content-Length"],
    "a zero byte": ["X: a\0b"],
}


@pytest.mark.parametrize("lines", AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
def test_a_length_that_can_be_read_in_two_ways_lets_nothing_through_behind_it(
    server: RunningServer, lines: list[str]
) -> None:
    head = "\r\n".join(["POST /v1/completions HTTP/1.1", "Host: a", *lines, "", ""]).encode()
    answer = asyncio.run(exchanged(server, head + BODY + SMUGGLED, patience_s=20))
    assert 200 not in statuses(answer), answer
    assert len(statuses(answer)) <= 1 and not leaks(answer.decode("latin-1")), answer
    assert server.server.recorder.value(metrics.REQUESTS, code="OK", finish_reason="length") == 0
    serves(server)


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        (["Transfer-Encoding: chunked"], b"zz\r\nno\r\n"),
        (["Transfer-Encoding: chunked"], b"ffffffffffffffffff\r\n{}"),
        (["Content-Encoding: gzip", "Content-Length: 9"], b"\x1f\x8b no gz"),
        (["Content-Encoding: deflate", "Content-Length: 9"], b"no flate!"),
    ],
    ids=["a chunk without a size", "a chunk without an end", "gzip that is none", "deflate that is none"],
)
def test_a_body_that_is_not_what_its_headers_say_is_the_client_s_fault(
    server: RunningServer, headers: list[str], body: bytes
) -> None:
    lines = ["POST /v1/completions HTTP/1.1", "Host: a", "Connection: close", *headers, "", ""]
    answer = asyncio.run(exchanged(server, "\r\n".join(lines).encode() + body, patience_s=20))
    assert statuses(answer) == [400], answer
    serves(server)


def test_what_is_no_http_2_does_not_disturb_the_others(server: RunningServer) -> None:
    dice = random.Random(8)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.server.port)
        try:
            writer.write(
                dice.choice([b"", preface, b"GET / HTTP/1.1\r\n\r\n"]) + dice.randbytes(dice.randrange(99))
            )
            async with asyncio.timeout(0.05):
                await reader.read(100)
        except (TimeoutError, ConnectionError):
            pass
        finally:
            writer.transport.abort()

    in_batches(MESSAGES // 250, server, one)


@pytest.fixture
def gateway(server: RunningServer) -> Iterator[RunningGateway]:
    """One that afterwards holds nothing and holds nothing against its replica."""
    with running_gateway(server, http_port=0) as running:
        yield running
        wait_until(lambda: running.recorder.value(metrics.GATEWAY_REQUESTS_RUNNING) == 0)
        assert running.recorder.value(metrics.GATEWAY_REPLICA_FAILURES) == 0


def serves_through(gateway: RunningGateway) -> None:
    with Client(gateway.address, timeout_s=60) as client:
        assert client.generate("w5", max_tokens=3).token_ids == (6, 7, 8)


@pytest.mark.timeout(1800)
def test_any_bytes_to_a_gateway_are_answered_with_a_status_that_tells_why(
    gateway: RunningGateway, record_measurement: Callable[[str, float | str], None]
) -> None:
    dice, found = random.Random(10), Counter[str]()

    async def one(channel: grpc.aio.Channel) -> None:
        method = dice.choice([*METHODS, *list(METHODS)[:2] * 4])
        code = await call(channel, method, METHODS[method](dice), allowed=ALLOWED)
        found[code.name] += 1

    call_in_batches(MESSAGES // 100, gateway.address, one, lambda: serves_through(gateway))
    record_measurement("calls through a gateway", str(dict(found)))
    assert min(found["OK"], found["INVALID_ARGUMENT"], found["UNIMPLEMENTED"]) > 0, found


@pytest.mark.timeout(1800)
def test_any_body_over_http_to_a_gateway_is_answered_with_a_status_that_tells_why(
    gateway: RunningGateway, record_measurement: Callable[[str, float | str], None]
) -> None:
    dice, found = random.Random(11), Counter[str]()

    async def one() -> None:
        assert gateway.gateway.http_port
        content = framed(*hostile.body(dice))
        answer = await exchanged_at(gateway.gateway.http_port, content, patience_s=60)
        assert len(statuses(answer)) == 1, (content[:2000], answer)
        checked(content, answer, found)

    asyncio.run(in_crowds(MESSAGES // 200, one))
    serves_through(gateway)
    record_measurement("bodies through a gateway", str(dict(found)))
    assert min(found["200"], found["400"]) > 0, found
