"""A gateway before servers: nothing is lost or comes twice, whatever becomes of them, and all limits hold."""

import asyncio
import json
import re
import shlex
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import openai
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from parent_death import bound
from support.certificates import Authority, client_tls, server_tls
from support.folders import served_folder
from support.gateways import RunningGateway, running_gateway
from support.serving import CountingBatch, GatedBatch, RunningServer, running_server, wait_until
from unmask.cli.main import main
from unmask.client import (
    Aborted,
    AsyncClient,
    BlockCommitted,
    Client,
    Control,
    DeadlineExceeded,
    Finished,
    InvalidRequest,
    Overloaded,
    ServerFailed,
    Started,
    Unavailable,
)
from unmask.diffusion.batch import Batch, Committed, Event
from unmask.gateway.addresses import Target
from unmask.models.loading import load
from unmask.models.registry import read_config
from unmask.serving.model import ServedModel
from unmask.telemetry import metrics
from unmask.v1 import generation_pb2 as pb
from unmask.v1.generation_pb2_grpc import (
    GenerationServicer,
    GenerationStub,
    ModelsServicer,
    ModelsStub,
    add_GenerationServicer_to_server,
    add_ModelsServicer_to_server,
)

pytestmark = pytest.mark.serving

PAGE = (Path(__file__).parents[2] / "docs/how-to/put-a-gateway-in-front.md").read_text(encoding="utf-8")
BLOCK = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_folder(tmp_path_factory.mktemp("model") / "tiny", block_length=BLOCK)


@pytest.fixture(scope="module")
def model(folder: Path) -> ServedModel:
    return ServedModel.describe(folder, read_config(folder), name=None, rows=2, context_length=128)


@pytest.fixture(scope="module")
def servers(folder: Path, model: ServedModel) -> Iterator[list[RunningServer]]:
    """Two that decode the same tiny model."""
    network = load(folder)
    with (
        running_server(model.batch(network), model, http_port=0) as one,
        running_server(model.batch(network), model) as other,
    ):
        yield [one, other]


@pytest.fixture(scope="module")
def gateway(servers: list[RunningServer]) -> Iterator[RunningGateway]:
    with running_gateway(*servers, http_port=0) as running:
        yield running


@pytest.fixture
def client(gateway: RunningGateway) -> Iterator[Client]:
    with Client(gateway.address, timeout_s=60) as made:
        yield made


class HeldBatch(GatedBatch):
    """Another batch, whose forwards wait once so many blocks are committed."""

    def __init__(self, batch: Batch, blocks: int) -> None:
        super().__init__(batch)
        self.blocks = blocks

    def step(self) -> list[Event]:
        if self.blocks > 0:
            self.let(1)
        events = super().step()
        self.blocks -= sum(isinstance(event, Committed) for event in events)
        return events

    @property
    def holds(self) -> bool:
        return self.blocks <= 0 and self.begun > self.done


class Held:
    """A server whose forwards wait."""

    def __init__(self, server: RunningServer, gate: HeldBatch) -> None:
        self.server, self.gate = server, gate
        self.recorder = server.server.recorder

    @property
    def running(self) -> bool:
        return self.recorder.value(metrics.REQUESTS_RUNNING) > 0

    @property
    def taken(self) -> float:
        """Calls that it has begun with, ever."""
        return self.recorder.value(metrics.QUEUE_SECONDS)


@contextmanager
def held(
    model: ServedModel, batch: Batch | None = None, *, blocks: int = 0, **options: Any
) -> Iterator[Held]:
    """A server that waits after so many blocks, of all its requests together."""
    gate = HeldBatch(batch or CountingBatch(), blocks)
    with running_server(gate, model, **options) as server:
        yield Held(server, gate)


def told_while_lost(
    gateway: RunningGateway, one: Held, other: Held, *, more: int = 0, **asked: Any
) -> list[Any]:
    """The events of a stream whose server ends where it is held, or so many forwards later."""
    events: list[Any] = []
    with Client(gateway.address, timeout_s=60) as client:
        listening = threading.Thread(target=lambda: events.extend(client.stream(**asked)))
        listening.start()
        wait_until(lambda: one.running or other.running)
        first, second = (one, other) if one.running else (other, one)
        second.gate.open()
        wait_until(lambda: first.gate.holds)
        begun = first.gate.begun
        if more:
            first.gate.let(more)
        wait_until(lambda: first.gate.begun == begun + more)
        leaving = threading.Thread(target=first.server.stop, args=(0,))
        leaving.start()
        listening.join(60)
        first.gate.open()  # or the server's own thread would wait for the forward
        leaving.join(60)
    return events


# What clients see


def test_answers_are_those_of_a_server(client: Client, servers: list[RunningServer]) -> None:
    with Client(servers[0].address) as direct:
        for prompt in ("w5 w6", "w9 " * 30):
            told = client.generate(prompt, max_tokens=10, logprobs=True)
            expected = direct.generate(prompt, max_tokens=10, logprobs=True)
            assert (told.token_ids, told.text, told.logprobs) == (
                expected.token_ids,
                expected.text,
                expected.logprobs,
            )
            assert told.usage.completion_tokens == expected.usage.completion_tokens
            assert told.usage.forwards_denoise == expected.usage.forwards_denoise
        assert client.model_info().name == direct.model_info().name == "tiny"
        assert client.model_info().max_running_requests == 2 * direct.model_info().max_running_requests


def test_a_stream_has_one_beginning_and_one_end(client: Client) -> None:
    events = list(client.stream("w5", max_tokens=10, canvas=True))
    assert isinstance(events[0], Started) and isinstance(events[-1], Finished)
    assert sum(isinstance(event, Started | Finished) for event in events) == 2


def test_the_last_block_says_what_the_end_says(servers: list[RunningServer]) -> None:
    """So a call whose server is lost between the two has taken what is known of it."""
    ends = set()
    with grpc.insecure_channel(servers[0].address) as channel:
        for seed in range(20):
            sampling = pb.SamplingParams(
                max_tokens=24, temperature=1.5, seed=seed, stop_token_ids=[9, 10, 11]
            )
            request = pb.GenerateRequest(text="w5 w6", sampling=sampling)
            *_, block, last = GenerationStub(channel).GenerateStream(
                pb.GenerateStreamRequest(request=request), timeout=60
            )
            assert block.block_committed.usage == last.finished.usage
            ends.add(last.finished.reason)
    assert ends == {pb.FINISH_REASON_LENGTH, pb.FINISH_REASON_STOP, pb.FINISH_REASON_END_OF_TEXT}


def test_over_http_it_says_what_a_server_says(gateway: RunningGateway, servers: list[RunningServer]) -> None:
    def answer(url: str) -> dict[str, Any]:
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as asking:
            given = asking.completions.create(model="tiny", prompt="w5 w6", max_tokens=9, logprobs=0)
            assert given.usage is not None
            pieces = asking.completions.create(model="tiny", prompt="w5 w6", max_tokens=9, stream=True)
            text = "".join(piece.choices[0].text for piece in pieces if piece.choices)
            assert [listed.id for listed in asking.models.list()] == ["tiny"]
        told = given.choices[0].model_dump()
        assert text == told["text"]
        return told | {"completion": given.usage.completion_tokens}

    expected = answer(f"http://127.0.0.1:{servers[0].server.http_port}/v1")
    told = answer(gateway.http_url)
    assert told == expected and told["logprobs"]["tokens"]


def test_errors_are_passed_on_with_what_is_wrong(gateway: RunningGateway, client: Client) -> None:
    with pytest.raises(InvalidRequest) as error:
        client.generate("w5", threshold=0, max_tokens=0)
    assert {violation.field for violation in error.value.violations} == {
        "diffusion.threshold",
        "sampling.max_tokens",
    }
    with pytest.raises(InvalidRequest, match="served here is 'tiny'"):
        client.generate("w5", model="another")
    assert gateway.has("ready") == 2  # no replica is to blame


def test_prompts_that_begin_alike_go_to_one_replica_and_others_are_spread(
    client: Client, servers: list[RunningServer]
) -> None:
    def taken() -> list[float]:
        return [server.server.recorder.value(metrics.QUEUE_SECONDS) for server in servers]

    before = taken()
    for number in range(6):
        client.generate("w7 w8 w9 w10 " * 8 + f"w{20 + number}", max_tokens=1)
    assert sorted(now - then for now, then in zip(taken(), before, strict=True)) == [0, 6]
    before = taken()

    def spread() -> bool:
        client.generate("w5", max_tokens=1)  # shorter than a block: nothing can be cached
        return all(now > then for now, then in zip(taken(), before, strict=True))

    # At once, but where a replica told its load while it had a call that had ended here: until it tells anew.
    wait_until(spread)


def test_calls_that_others_gave_a_replica_count(model: ServedModel) -> None:
    with (
        held(model) as one,
        held(model) as other,
        running_gateway(one.server, other.server) as first,
        running_gateway(one.server, other.server) as second,
        Client(first.address, timeout_s=60) as theirs,
        Client(second.address, timeout_s=60) as ours,
        grpc.insecure_channel(second.address) as channel,
    ):
        stream = theirs.stream("w5", max_tokens=4)
        next(stream)
        free = other if one.running else one
        free.gate.open()
        wait_until(lambda: ModelsStub(channel).GetLoad(pb.GetLoadRequest(), timeout=60).running == 1)
        for _ in range(4):
            assert ours.generate("w5", max_tokens=1).token_ids == (6,)
        assert free.taken == 4


# Replicas that are lost


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_a_server_that_is_lost_in_a_stream_loses_and_repeats_no_token(
    model: ServedModel, blocks: int
) -> None:
    """It ends in the middle of the block after so many."""
    with (
        held(model, blocks=blocks) as one,
        held(model, blocks=blocks) as other,
        running_gateway(one.server, other.server) as gateway,
    ):
        events = told_while_lost(gateway, one, other, more=2, prompt="w5", max_tokens=3 * BLOCK)
        tokens: list[int] = []
        for event in events:
            if isinstance(event, BlockCommitted):
                assert event.offset == len(tokens)
                tokens += event.token_ids
        assert tokens == list(range(6, 6 + 3 * BLOCK))
        assert [type(event) for event in events].count(Started) == 1
        last = events[-1]
        assert isinstance(last, Finished)
        assert "".join(event.text for event in events if isinstance(event, BlockCommitted | Finished)) == (
            " ".join(f"w{token}" for token in tokens)
        )
        assert (last.usage.completion_tokens, last.usage.forwards_denoise) == (12, 12)
        assert last.usage.tpf_denoise == 1.0
        assert (gateway.attempts("resume"), gateway.attempts("again")) == ((1, 0) if blocks else (0, 1))
        assert gateway.recorder.value(metrics.GATEWAY_STALL_SECONDS) == 1
        assert gateway.recorder.value(metrics.GATEWAY_REQUESTS_RUNNING) == 0


@pytest.mark.parametrize("blocks", [1, 3])
def test_drawn_tokens_and_their_probabilities_are_those_of_one_server(
    folder: Path, model: ServedModel, servers: list[RunningServer], blocks: int
) -> None:
    """A real decoder."""
    network = load(folder)
    asked = {"prompt": "w5 w6 w7", "max_tokens": 20, "temperature": 0.9, "seed": 7, "logprobs": True}
    with (
        held(model, model.batch(network), blocks=blocks) as one,
        held(model, model.batch(network), blocks=blocks) as other,
        running_gateway(one.server, other.server) as gateway,
    ):
        events = told_while_lost(gateway, one, other, **asked)
        assert gateway.attempts("resume") == 1
    started, last = events[0], events[-1]
    assert isinstance(started, Started) and isinstance(last, Finished)
    with Client(servers[0].address, timeout_s=60) as direct:
        expected = direct.generate(**asked)  # type: ignore[arg-type]
    committed = [event for event in events if isinstance(event, BlockCommitted)]
    assert tuple(token for event in committed for token in event.token_ids) == expected.token_ids
    assert [number for event in committed for number in event.logprobs] == pytest.approx(expected.logprobs)
    assert "".join(event.text for event in committed) + last.text == expected.text
    assert last.usage.completion_tokens == expected.usage.completion_tokens
    # The rest was decoded as before; what was committed had to be read once more.
    assert last.usage.forwards_denoise == expected.usage.forwards_denoise
    assert last.usage.forwards_prefill > expected.usage.forwards_prefill


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_process_that_is_killed_or_frozen_loses_and_repeats_no_token(
    folder: Path, model: ServedModel, how: signal.Signals
) -> None:
    command = [sys.executable, "-m", "support.counting_server", str(folder), "2", "16"]
    with (
        subprocess.Popen(
            bound(command),
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
        held(model) as other,
    ):
        assert process.stdin and process.stdout
        port = json.loads(process.stdout.readline())["port"]
        looking = Looking(set())
        with running_gateway(
            f"127.0.0.1:{port}", "dns:others:1", looking=looking, ready=1, pool={"resolve_s": 0.05}
        ) as gateway:
            with Client(gateway.address, timeout_s=60) as client:
                stream = client.stream("w5", max_tokens=3 * BLOCK)
                assert isinstance(next(stream), Started)
                print(BLOCK + 1, file=process.stdin, flush=True)
                first = next(stream)
                looking.found.add(other.server.address)
                wait_until(lambda: gateway.has("ready") == 2)
                other.gate.open()
                process.send_signal(how)
                events = [first, *stream]
            wait_until(lambda: gateway.has("out") == 1)
        process.kill()
    tokens = [token for event in events if isinstance(event, BlockCommitted) for token in event.token_ids]
    assert tokens == list(range(6, 6 + 3 * BLOCK))


def test_a_model_that_fails_is_one_replica_s_fault_and_one_that_fails_again_the_call_s(
    model: ServedModel, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        running_server(CountingBatch(fails_at=5), model) as one,
        running_server(CountingBatch(), model) as sound,
        running_gateway(one, sound) as gateway,
        Client(gateway.address, timeout_s=60) as client,
    ):
        for _ in range(2):  # whichever is asked first
            told = client.generate("w5", max_tokens=12)
            assert told.token_ids == tuple(range(6, 18)) and told.usage.completion_tokens == 12
    with (
        running_server(CountingBatch(fails_at=1), model) as one,
        running_server(CountingBatch(fails_at=1), model) as other,
        running_server(CountingBatch(fails_at=1), model) as third,
        running_gateway(one, other, third) as gateway,
        Client(gateway.address, timeout_s=60) as client,
    ):
        with pytest.raises(ServerFailed, match="the server has failed"):
            client.generate("w5", max_tokens=12)
        assert gateway.recorder.value(metrics.GATEWAY_REPLICA_FAILURES) == 2
    assert any("the model came apart" in str(record.exc_info) for record in caplog.records)


class Crooked(GenerationServicer):
    """Says what it is told to say once it may, and then ends the call so."""

    def __init__(self, script: list[pb.GenerateStreamResponse], code: grpc.StatusCode) -> None:
        self.script, self.code = script, code
        self.asked = 0
        self.may = threading.Event()

    def GenerateStream(self, request: Any, context: Any) -> Iterator[pb.GenerateStreamResponse]:  # type: ignore[override]  # noqa: N802
        self.asked += 1
        assert self.may.wait(60)
        yield from self.script
        if self.code is not grpc.StatusCode.OK:
            context.abort(self.code, "crooked")


class Named(ModelsServicer):
    def GetModelInfo(self, request: Any, context: Any) -> pb.GetModelInfoResponse:  # type: ignore[override]  # noqa: N802
        return pb.GetModelInfoResponse(name="tiny", block_length=BLOCK)


@contextmanager
def crooked(script: list[pb.GenerateStreamResponse], code: grpc.StatusCode) -> Iterator[tuple[str, Crooked]]:
    service, checked = Crooked(script, code), health.HealthServicer()
    checked.set("unmask.v1.Generation", health_pb2.HealthCheckResponse.SERVING)
    server = grpc.server(ThreadPoolExecutor(8))
    add_GenerationServicer_to_server(service, server)
    add_ModelsServicer_to_server(Named(), server)
    health_pb2_grpc.add_HealthServicer_to_server(checked, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}", service
    finally:
        server.stop(0).wait()


GAP = pb.GenerateStreamResponse(block_committed=pb.BlockCommitted(offset=8, token_ids=[14], text_delta="w14"))


@pytest.mark.parametrize(
    ("told", "more", "code", "elsewhere"),
    [
        (5, [], grpc.StatusCode.UNAVAILABLE, False),
        (2, [], grpc.StatusCode.UNAVAILABLE, True),
        (2, [], grpc.StatusCode.CANCELLED, True),
        (2, [], grpc.StatusCode.OK, True),
        (2, [GAP], grpc.StatusCode.OK, True),
        (0, [], grpc.StatusCode.RESOURCE_EXHAUSTED, True),
    ],
    ids=["lost after its end", "lost", "cancelled", "no end", "a gap", "full"],
)
def test_a_stream_that_is_not_as_it_should_be_is_finished_elsewhere(
    model: ServedModel,
    told: int,
    more: list[pb.GenerateStreamResponse],
    code: grpc.StatusCode,
    elsewhere: bool,
) -> None:
    """The whole stream has five messages: the beginning, three blocks, the end."""
    request = pb.GenerateStreamRequest(
        request=pb.GenerateRequest(text="w5", sampling=pb.SamplingParams(max_tokens=3 * BLOCK))
    )
    with running_server(CountingBatch(), model) as sound:
        with grpc.insecure_channel(sound.address) as channel:
            whole = list(GenerationStub(channel).GenerateStream(request, timeout=60))
        assert len(whole) == 5
        looking = Looking(set())
        with (
            crooked(whole[:told] + more, code) as (address, service),
            running_gateway(
                address, "dns:others:1", looking=looking, ready=1, pool={"resolve_s": 0.02}
            ) as gateway,
        ):
            before = sound.server.recorder.value(metrics.QUEUE_SECONDS)
            with grpc.insecure_channel(gateway.address) as channel:
                call = GenerationStub(channel).GenerateStream(request, timeout=60)
                wait_until(lambda: service.asked == 1)
                looking.found.add(sound.address)
                wait_until(lambda: gateway.has("ready") == 2)
                service.may.set()
                events = list(call)
            asked = sound.server.recorder.value(metrics.QUEUE_SECONDS) - before
        assert (asked, service.asked) == (elsewhere, 1)
    tokens = [token for event in events for token in event.block_committed.token_ids]
    assert tokens == list(range(6, 6 + 3 * BLOCK))
    assert [event.WhichOneof("event") for event in events].count("started") == 1
    assert [event.WhichOneof("event") for event in events].count("finished") == 1
    assert events[-1].finished.usage == whole[-1].finished.usage


def test_an_answer_is_not_continued_with_other_weights(model: ServedModel) -> None:
    def weights(revision: str) -> Any:
        return SimpleNamespace(revision=revision)

    with (
        held(model, blocks=1, weights=weights("a")) as one,
        held(model, blocks=1, weights=weights("b")) as other,
        running_gateway(one.server, other.server, relay={"wait_s": 0.5}) as gateway,
    ):
        with Client(gateway.address, timeout_s=60) as client:
            stream = client.stream("w5", max_tokens=3 * BLOCK)
            assert isinstance(next(stream), Started) and isinstance(next(stream), BlockCommitted)
            first, second = (one, other) if one.running else (other, one)
            second.gate.open()
            leaving = threading.Thread(target=first.server.stop, args=(0,))
            leaving.start()
            with pytest.raises(Unavailable, match="weights that the answer began with"):
                next(stream)
            first.gate.open()
            leaving.join(60)
            assert client.generate("w5", max_tokens=2).token_ids == (6, 7)  # a new one begins there
        assert second.taken == 1


# Replicas that come and go


class Looking:
    """A name that has the addresses it is given."""

    def __init__(self, found: set[str]) -> None:
        self.found = found

    async def __call__(self, target: Target) -> frozenset[str]:
        if not self.found:
            raise OSError("no such name")
        return frozenset(self.found)


def test_a_server_that_drains_gets_nothing_new(model: ServedModel) -> None:
    with (
        held(model, control_port=0) as one,
        held(model, control_port=0) as other,
        running_gateway(one.server, other.server) as gateway,
        Client(gateway.address, timeout_s=60) as client,
        Control(f"127.0.0.1:{one.server.server.control_port}", timeout_s=60) as control,
    ):
        one.gate.open()
        other.gate.open()
        assert list(control.drain())[-1].running == 0
        wait_until(lambda: gateway.has("ready") == 1)
        before = one.taken
        for _ in range(6):
            assert client.generate("w5", max_tokens=2).token_ids == (6, 7)
        assert one.taken == before
        assert one.recorder.value(metrics.ADMISSION_REJECTIONS, reason="stopped") == 0
        control.resume()
        wait_until(lambda: gateway.has("ready") == 2)
        for _ in range(6):
            client.generate("w5", max_tokens=2)
        assert one.taken > before


def test_a_draining_server_ends_as_soon_as_its_calls_have_though_a_gateway_watches_it(
    model: ServedModel,
) -> None:
    with held(model) as one, held(model) as other, running_gateway(one.server, other.server) as gateway:
        one.gate.open()
        leaving = threading.Thread(target=one.server.stop, args=(3600,))
        leaving.start()
        leaving.join(60)
        assert not leaving.is_alive()
        wait_until(lambda: gateway.has("out") == 1)


def test_names_are_looked_up_again(model: ServedModel) -> None:
    looking = Looking(set())
    with running_gateway(
        "dns:replicas:1", looking=looking, ready=0, pool={"resolve_s": 0.02}, relay={"wait_s": 0.2}
    ) as gateway:
        with Client(gateway.address, timeout_s=60) as client:
            with pytest.raises(Unavailable, match="no replica took calls"):
                client.generate("w5")
            with pytest.raises(Unavailable, match="no replica has answered yet"):
                client.model_info()
            assert not serves(gateway)
            with held(model) as one:
                one.gate.open()
                looking.found.add(one.server.address)
                wait_until(lambda: serves(gateway))
                assert client.generate("w5", max_tokens=1).token_ids == (6,)
                with held(model) as other:
                    other.gate.open()
                    looking.found.add(other.server.address)
                    wait_until(lambda: gateway.has("ready") == 2)
                    looking.found.discard(one.server.address)
                    wait_until(lambda: gateway.has("ready") == 1 and gateway.has("out") == 0)
                    before = one.taken
                    for _ in range(3):
                        client.generate("w5", max_tokens=1)
                    assert one.taken == before
                    looking.found.clear()  # a name that cannot be resolved keeps what it had
                    for _ in range(3):
                        client.generate("w5", max_tokens=1)
                wait_until(lambda: not serves(gateway))


def serves(gateway: RunningGateway) -> bool:
    """What health says, over gRPC and HTTP, which is the same."""
    with grpc.insecure_channel(gateway.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        said = stub.Check(health_pb2.HealthCheckRequest(service="unmask.v1.Generation"), timeout=60).status
        alive = stub.Check(health_pb2.HealthCheckRequest(), timeout=60).status
    assert alive == health_pb2.HealthCheckResponse.SERVING
    try:
        with urllib.request.urlopen(gateway.health_url, timeout=60) as answer:
            status = answer.status
    except urllib.error.HTTPError as error:
        status = error.code
    return said == health_pb2.HealthCheckResponse.SERVING and status == 200


def test_a_replica_of_another_model_gets_nothing(model: ServedModel, tmp_path: Path) -> None:
    folder = served_folder(tmp_path / "stranger", block_length=BLOCK)
    stranger = ServedModel.describe(folder, read_config(folder), name=None, rows=2, context_length=128)
    looking = Looking(set())
    with (
        running_server(CountingBatch(), model) as own,
        held(stranger) as other,
        running_gateway(own, "dns:others:1", looking=looking, ready=1, pool={"resolve_s": 0.02}) as gateway,
        Client(gateway.address, timeout_s=60) as client,
    ):
        looking.found.add(other.server.address)
        wait_until(lambda: gateway.has("out") == 1)
        for _ in range(4):
            assert client.generate("w5", max_tokens=1).token_ids == (6,)
        assert other.taken == 0 and client.model_info().name == "tiny"


# Ends and limits


def test_a_call_that_is_cancelled_late_or_ended_leaves_its_replica(model: ServedModel) -> None:
    with (
        held(model, control_port=0) as server,
        running_gateway(server.server) as gateway,
        Client(gateway.address, timeout_s=60) as client,
    ):
        tasks = gateway.tasks()
        stream = client.stream("w5", max_tokens=100)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        wait_until(lambda: server.recorder.value(metrics.CANCELLED, by="client") == 1)
        with pytest.raises(DeadlineExceeded):
            client.generate("w6", max_tokens=100, timeout_s=0.5)
        wait_until(lambda: server.recorder.value(metrics.REQUESTS_WAITING) == 0)
        stream = client.stream("w7", max_tokens=100, request_id="mine")
        listening = threading.Thread(target=lambda: next(stream, None))
        listening.start()
        server.gate.let(2)  # with the first one, those that are gone leave their rows
        listening.join(60)
        with pytest.raises(InvalidRequest, match="a request named 'mine' is running"):
            client.generate("w5", request_id="mine")
        with Control(f"127.0.0.1:{server.server.server.control_port}", timeout_s=60) as control:
            assert control.abort(["mine"]) == ("mine",)
        with pytest.raises(Aborted):
            list(stream)
        server.gate.open()
        wait_until(lambda: server.gate.active == 0)
        wait_until(lambda: gateway.recorder.value(metrics.GATEWAY_REQUESTS_RUNNING) == 0)
        wait_until(lambda: gateway.tasks() <= tasks)
        for code in ("CANCELLED", "DEADLINE_EXCEEDED", "ALREADY_EXISTS", "ABORTED"):
            counted = gateway.recorder.value(metrics.GATEWAY_REQUESTS, code=code, finish_reason="")
            assert counted == 1, code


def test_where_one_replica_is_full_another_takes_the_call_and_where_all_are_it_is_refused(
    model: ServedModel,
) -> None:
    async def ask(address: str, calls: int) -> list[BaseException | Any]:
        async with AsyncClient(address, timeout_s=60) as client:
            asked = [asyncio.create_task(client.generate(f"w{5 + n}", max_tokens=2)) for n in range(calls)]
            await asyncio.wait(asked, return_when=asyncio.FIRST_EXCEPTION)
            one.gate.open()
            other.gate.open()
            return await asyncio.gather(*asked, return_exceptions=True)

    with (
        held(model, max_queue_requests=1) as one,
        held(model, max_queue_requests=1) as other,
        running_gateway(one.server, other.server) as gateway,
    ):
        answers = asyncio.run(ask(gateway.address, 7))  # two rows and one place to wait at each
        refused = [answer for answer in answers if isinstance(answer, BaseException)]
        assert len(refused) == 1 and isinstance(refused[0], Overloaded), refused
        assert refused[0].retry_after_s is not None and "all replicas are full" in str(refused[0])
        assert one.taken == other.taken == 3
        assert gateway.has("ready") == 2  # to be full is no failure


def test_a_gateway_takes_so_many_calls_and_no_more(model: ServedModel) -> None:
    with (
        held(model) as server,
        running_gateway(server.server, relay={"max_calls": 1}) as gateway,
        Client(gateway.address, timeout_s=60) as client,
    ):
        stream = client.stream("w5", max_tokens=4)
        next(stream)
        with pytest.raises(Overloaded, match="all that it may have") as error:
            client.generate("w6")
        assert error.value.retry_after_s == 1
        server.gate.open()
        list(stream)


def test_a_client_that_does_not_read_holds_up_neither_others_nor_its_row(model: ServedModel) -> None:
    """What it does not read stays where it is made, within what connections hold."""
    with (
        held(model, CountingBatch(rows=2)) as server,
        running_gateway(server.server) as gateway,
        grpc.insecure_channel(gateway.address) as channel,
        Client(gateway.address, timeout_s=60) as client,
    ):
        request = pb.GenerateStreamRequest(
            request=pb.GenerateRequest(text="w5", sampling=pb.SamplingParams(max_tokens=100)),
            options=pb.StreamOptions(canvas=pb.CANVAS_MODE_DIFF),
        )
        slow = [GenerationStub(channel).GenerateStream(request, timeout=60) for _ in range(4)]
        server.gate.open()
        assert client.generate("w5", max_tokens=50).token_ids == tuple(range(6, 56))
        wait_until(lambda: server.recorder.value(metrics.REQUESTS_RUNNING) == 0)
        for call in slow:
            tokens = [
                token
                for message in call
                if message.HasField("block_committed")
                for token in message.block_committed.token_ids
            ]
            assert tokens == list(range(6, 106))


def test_a_gateway_that_is_asked_to_end_lets_calls_end(model: ServedModel) -> None:
    with held(model) as server, running_gateway(server.server) as gateway:
        with Client(gateway.address, timeout_s=60) as client:
            stream = client.stream("w5", max_tokens=8)
            next(stream)
            leaving = threading.Thread(target=gateway.stop, args=(60,))
            leaving.start()
            with grpc.insecure_channel(gateway.address) as channel:
                with pytest.raises(grpc.RpcError) as refused:
                    while True:
                        ModelsStub(channel).GetModelInfo(pb.GetModelInfoRequest(), timeout=60)
                assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
            server.gate.open()
            assert isinstance(list(stream)[-1], Finished)
            leaving.join(60)


# TLS


def test_tls_on_both_sides(model: ServedModel, tmp_path: Path) -> None:
    """Clients are let in by name at the gateway, the gateway at the replicas, which DNS has found."""
    outside, inside = Authority("outside"), Authority("inside")
    engine = server_tls(
        tmp_path / "engine", inside.issue("engine.example"), inside.pem, allow=("gateway.example",)
    )
    front = server_tls(tmp_path / "front", outside.issue("127.0.0.1"), outside.pem, allow=("client.example",))
    to_replicas = client_tls(tmp_path / "gateway", inside.pem, inside.issue("gateway.example"))
    with running_server(CountingBatch(), model, tls=engine) as server:
        looking = Looking({server.address})
        with running_gateway(
            "dns:engine.example:1", looking=looking, ready=1, tls=front, pool={"tls": to_replicas}
        ) as gateway:
            known = client_tls(tmp_path / "client", outside.pem, outside.issue("client.example"))
            with Client(gateway.address, timeout_s=60, tls=known) as client:
                assert client.generate("w5", max_tokens=2).token_ids == (6, 7)
            with Client(gateway.address, timeout_s=10) as plain, pytest.raises(Unavailable):
                plain.generate("w5")


# The command


@pytest.fixture
def started(servers: list[RunningServer]) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The command of the page, at other ports; its address, and the process."""
    line = re.search(r"^unmask gateway .*", PAGE, re.MULTILINE)
    assert line
    arguments = shlex.split(line[0])[1:]
    places = iter(servers)
    arguments = [next(places).address if re.match(r"127\.0\.0\.1:", each) else each for each in arguments]
    arguments[arguments.index("--http-port") + 1] = "0"
    command = [sys.executable, "-m", "unmask.cli.main", *arguments, "--port=0", "--metrics-port=0"]
    with subprocess.Popen(bound(command), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            ready = re.search(r" on (127\.0\.0\.1:\d+), OpenAI", process.stdout.readline())
            assert ready
            yield ready[1], process
        finally:
            process.kill()


def test_the_page_s_commands(
    started: tuple[str, subprocess.Popen[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    address, process = started
    line = re.search(r"^unmask generate .*", PAGE, re.MULTILINE)
    assert line
    arguments = [address if each.startswith("127.0.0.1:") else each for each in shlex.split(line[0])[1:]]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0, capsys.readouterr()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["engine"], "expected HOST:PORT or dns:HOST:PORT"),
        (["a:1", "--tls-allow=b"], "--tls-allow: without TLS nobody can be asked"),
        (["a:1", "--replica-tls-ca=/nowhere"], "--replica-tls-ca"),
    ],
)
def test_what_cannot_be_is_refused_at_the_start(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["gateway", *arguments, "--port=0", "--metrics-port=0"])
    assert ended.value.code == 64
    assert message in capsys.readouterr().err
