"""A tiny random LLaDA2 behind a real port, and clients of it."""

import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from support.folders import served_folder
from support.serving import CountingBatch, GatedBatch, RunningServer, running_server, wait_until
from unmask.client import (
    BlockCommitted,
    CanvasUpdate,
    Client,
    DeadlineExceeded,
    Decoding,
    Finished,
    InvalidRequest,
    Overloaded,
    ServerFailed,
    Started,
    Unavailable,
    UnsupportedRequest,
)
from unmask.diffusion.generation import Generation, generate
from unmask.models.base import LanguageModel
from unmask.models.loading import load
from unmask.models.registry import read_config
from unmask.serving.model import ServedModel
from unmask.serving.ragged import RaggedBatch
from unmask.telemetry import metrics
from unmask.v1 import generation_pb2 as pb
from unmask.v1.generation_pb2_grpc import GenerationStub

CONTEXT = 256
ROWS = 4
PROMPTS = [
    [5],
    [7, 8, 9],
    [20 + number for number in range(8)],
    [30 + number for number in range(13)],
    [50 + 3 * number for number in range(40)],
    [400 - number for number in range(64)],
    [100, 511, 101, 511, 511, 102],
]
"""Shorter than a block, whole blocks, with and without a tail, and one with the mask token's id in it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_folder(tmp_path_factory.mktemp("model") / "tiny", block_length=8, threshold=0.05)


@pytest.fixture(scope="module")
def network(folder: Path) -> LanguageModel:
    return load(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> ServedModel:
    return ServedModel.describe(folder, read_config(folder), name=None, rows=ROWS, context_length=CONTEXT)


def batch(network: LanguageModel, rows: int = ROWS) -> RaggedBatch:
    return RaggedBatch(network, rows=rows, capacity=CONTEXT, block_length=8)


@pytest.fixture(scope="module")
def server(network: LanguageModel, model: ServedModel) -> Iterator[RunningServer]:
    with running_server(batch(network), model) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.address, timeout_s=30) as client:
        yield client


def alone(network: LanguageModel, model: ServedModel, prompt: list[int], max_tokens: int) -> Generation:
    params = model.params(model.default_decoder, pb.DiffusionParams(), max_new_tokens=max_tokens)
    return generate(network, [prompt], params, rows=1)[0]


# What comes back


def test_different_prompts_at_once_each_get_what_they_get_alone(
    client: Client, network: LanguageModel, model: ServedModel
) -> None:
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = list(pool.map(lambda prompt: client.generate(token_ids=prompt, max_tokens=40), PROMPTS))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        expected = alone(network, model, prompt, 40)
        assert list(answer.token_ids) == expected.token_ids
        assert answer.text == model.tokenizer.decode(expected.token_ids)
        usage = answer.usage
        assert usage.prompt_tokens == len(prompt)
        assert usage.completion_tokens == expected.kept_tokens
        assert usage.forwards_denoise == expected.usage.denoise
        assert usage.forwards_persist == 0, "blocks are stored beside the next one's first step"
        # Beside those who decode it is read in parts; what others have begun with is not read at all.
        assert usage.forwards_prefill <= len(prompt) // 8
        assert usage.tpf_denoise == pytest.approx(expected.kept_tokens / expected.usage.denoise)
        assert usage.tpf <= usage.tpf_decode <= usage.tpf_denoise


def test_a_stream_tells_the_story_in_order(client: Client, model: ServedModel) -> None:
    events = list(client.stream("w5 w6 w7", canvas=True, max_tokens=30, request_id="story"))
    started, *middle, finished = events
    assert started == Started(
        request_id="story",
        model="tiny",
        prompt_tokens=3,
        queue_seconds=started.queue_seconds if isinstance(started, Started) else 0,
        block_length=8,
        max_tokens=30,
        decoding=Decoding(decoder="threshold", threshold=0.05, steps_per_block=8),
    )
    assert isinstance(finished, Finished)
    blocks = [event for event in middle if isinstance(event, BlockCommitted)]
    assert [block.offset for block in blocks] == [
        sum(len(b.token_ids) for b in blocks[:n]) for n in range(len(blocks))
    ]
    assert [block.block_index for block in blocks] == list(range(len(blocks)))
    text = "".join(block.text for block in blocks) + finished.text
    assert text == model.tokenizer.decode([token for block in blocks for token in block.token_ids])
    whole = client.generate("w5 w6 w7", max_tokens=30)
    assert (whole.text, whole.finish_reason) == (text, finished.reason)


def test_canvas_updates_add_up_to_the_committed_blocks(client: Client) -> None:
    provisional: dict[int, int] = {}
    for event in client.stream("w5 w6 w7", canvas=True, max_tokens=30):
        if isinstance(event, CanvasUpdate):
            assert {fill.position for fill in event.fills}.isdisjoint(provisional)
            provisional |= {fill.position: fill.token_id for fill in event.fills}
        if isinstance(event, BlockCommitted):
            for place, token in enumerate(event.token_ids):
                assert provisional[event.offset + place] == token
    assert min(provisional) == 0


def test_without_canvas_no_update_is_sent(client: Client) -> None:
    assert not any(isinstance(event, CanvasUpdate) for event in client.stream("w5", max_tokens=20))


def test_a_conversation_is_continued_after_the_template(client: Client) -> None:
    chat = client.generate(messages=[{"role": "user", "content": "w9 w8"}], max_tokens=16)
    raw = client.generate("user w9 w8 assistant", max_tokens=16)
    assert chat.token_ids == raw.token_ids


def test_the_mask_tokens_text_in_a_prompt_is_text(
    client: Client, network: LanguageModel, model: ServedModel
) -> None:
    """The prompt's tail, a mask token in it, shares the first block with what is generated."""
    prompt = "w100 <mask> w101 <mask> <mask> w102"
    positions = [
        fill.position
        for event in client.stream(prompt, canvas=True, max_tokens=10)
        if isinstance(event, CanvasUpdate)
        for fill in event.fills
    ]
    assert sorted(positions)[:10] == list(range(10))
    assert min(positions) >= 0
    answer = client.generate(prompt, max_tokens=10)
    assert answer.usage.prompt_tokens == 6
    assert list(answer.token_ids) == alone(network, model, [100, 511, 101, 511, 511, 102], 10).token_ids


@pytest.mark.parametrize("prompt", PROMPTS[1::2], ids=len)
def test_going_on_from_any_committed_block_gives_the_undisturbed_answer(
    client: Client, prompt: list[int]
) -> None:
    blocks = [
        event for event in client.stream(token_ids=prompt, max_tokens=36) if isinstance(event, BlockCommitted)
    ]
    assert len(blocks) > 2
    for kept in range(1, len(blocks) + 1):
        committed = [token for block in blocks[:kept] for token in block.token_ids]
        *rest, finished = client.stream(token_ids=prompt, max_tokens=36, committed=committed)
        again = [event for event in rest if isinstance(event, BlockCommitted)]
        assert [(b.offset, b.token_ids, b.text) for b in again] == [
            (b.offset, b.token_ids, b.text) for b in blocks[kept:]
        ]
        assert isinstance(finished, Finished) and finished.reason == "length"
        assert finished.usage.completion_tokens == sum(len(b.token_ids) for b in again)


def test_the_model_says_what_it_is(client: Client) -> None:
    info = client.model_info()
    assert (info.name, info.architecture, info.vocab_size) == ("tiny", "LLaDA2MoeModelLM", 512)
    assert (info.context_length, info.block_length, info.max_running_requests) == (CONTEXT, 8, ROWS)
    assert info.default_decoding == Decoding(decoder="threshold", threshold=0.05, steps_per_block=8)
    assert info.decoders == (
        "threshold",
        "fixed-steps",
        "joint-edit",
        "hierarchical",
        "credit",
        "entropy-bounded",
    )
    assert info.has_chat_template
    assert (info.eos_token_id, info.mask_token_id) == (510, 511)


# What is refused


def test_a_wrong_request_comes_back_with_its_fields(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="must be above 0 and at most 1") as error:
        client.generate("w5", threshold=1.5, steps_per_block=99)
    assert [violation.field for violation in error.value.violations] == [
        "diffusion.threshold",
        "diffusion.steps_per_block",
    ]
    assert error.value.exit_code == 64
    with pytest.raises(InvalidRequest, match="the context holds 256"):
        list(client.stream(token_ids=[5] * 300))


def test_an_unknown_decoder_is_refused(server: RunningServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        request = pb.GenerateRequest(text="w5", diffusion=pb.DiffusionParams(decoder=42))  # type: ignore[arg-type]
        with pytest.raises(grpc.RpcError, match="got 42, allowed are DECODER_THRESHOLD"):
            GenerationStub(channel).Generate(request, timeout=10)


def test_drawing_tokens_that_are_to_be_edited_is_unsupported(server: RunningServer) -> None:
    from unmask.client.errors import error_of

    with grpc.insecure_channel(server.address) as channel:
        request = pb.GenerateRequest(
            text="w5",
            sampling=pb.SamplingParams(temperature=1),
            diffusion=pb.DiffusionParams(decoder=pb.DECODER_JOINT_EDIT),
        )
        with pytest.raises(grpc.RpcError) as failed:
            GenerationStub(channel).Generate(request, timeout=10)
    assert isinstance(error_of(failed.value, server.address), UnsupportedRequest)


def test_a_message_over_the_limit_is_refused(client: Client) -> None:
    with pytest.raises(Overloaded, match="larger than max"):
        client.generate("w5 " * 2_000_000)


# Who leaves


class Gated:
    """A server of one row whose forwards the test lets through."""

    def __init__(self, server: RunningServer, batch: GatedBatch) -> None:
        self.server, self.batch = server, batch
        self.recorder = server.server.recorder

    def cancelled(self, by: str) -> bool:
        return self.recorder.value(metrics.CANCELLED, by=by) == 1


@pytest.fixture
def gated(network: LanguageModel, model: ServedModel) -> Iterator[Gated]:
    gate = GatedBatch(batch(network, rows=1))
    with running_server(gate, model, max_queue_requests=1) as server:
        try:
            yield Gated(server, gate)
        finally:
            gate.open()


def test_a_client_that_goes_away_frees_its_row_within_one_forward(gated: Gated) -> None:
    with Client(gated.server.address, timeout_s=30) as client:
        stream = client.stream("w5 w6", canvas=True, max_tokens=200)
        gated.batch.let(2)
        next(event for event in stream if isinstance(event, CanvasUpdate))
        wait_until(lambda: gated.batch.begun == 3)
        stream.close()  # type: ignore[attr-defined]
    wait_until(lambda: gated.cancelled("client"))
    assert gated.batch.active == 1
    gated.batch.let(10)
    wait_until(lambda: gated.batch.active == 0)
    assert gated.batch.done == 3


def test_the_next_in_the_queue_has_the_row_at_the_next_forward(gated: Gated) -> None:
    with Client(gated.server.address, timeout_s=30) as client, ThreadPoolExecutor(1) as pool:
        stream = client.stream("w5 w6", max_tokens=200)
        next(stream)
        waiting = pool.submit(client.generate, "w7 w8", max_tokens=1)
        wait_until(lambda: gated.recorder.value(metrics.REQUESTS_WAITING) == 1)
        stream.close()  # type: ignore[attr-defined]
        wait_until(lambda: gated.cancelled("client"))
        done = gated.batch.done
        gated.batch.let(1 + 8)
        assert waiting.result(10).finish_reason == "length"
        assert gated.batch.done - done <= 1 + 8


@pytest.mark.parametrize("streamed", [False, True], ids=["unary", "stream"])
def test_a_deadline_that_passes_frees_the_row_within_one_forward(gated: Gated, streamed: bool) -> None:
    with Client(gated.server.address) as client, pytest.raises(DeadlineExceeded):
        if streamed:
            list(client.stream("w5", max_tokens=200, timeout_s=1))
        else:
            client.generate("w5", max_tokens=200, timeout_s=1)
    wait_until(lambda: gated.cancelled("deadline"))
    begun = gated.batch.begun
    gated.batch.let(10)
    wait_until(lambda: gated.batch.active == 0)
    assert gated.batch.done == begun == 1


def test_one_who_leaves_the_queue_is_forgotten(gated: Gated) -> None:
    with Client(gated.server.address) as client:
        running = client.stream("w5", max_tokens=8)
        next(running)
        with pytest.raises(DeadlineExceeded):
            client.generate("w6", timeout_s=0.3)
        wait_until(lambda: gated.recorder.value(metrics.REQUESTS_WAITING) == 0)
        gated.batch.open()
        assert isinstance(list(running)[-1], Finished)
    assert gated.recorder.value(metrics.PROMPT_TOKENS) == 1


def test_a_full_queue_says_when_to_come_back(gated: Gated) -> None:
    with Client(gated.server.address, timeout_s=30) as client, ThreadPoolExecutor(1) as pool:
        running = client.stream("w5", max_tokens=8)
        next(running)
        waiting = pool.submit(client.generate, "w6", max_tokens=8)
        wait_until(lambda: gated.recorder.value(metrics.REQUESTS_WAITING) == 1)
        with pytest.raises(Overloaded, match="at most 1 requests") as error:
            client.generate("w7")
        assert error.value.retry_after_s is not None and error.value.retry_after_s > 0
        gated.batch.open()
        assert isinstance(list(running)[-1], Finished)
        assert waiting.result(10).finish_reason == "length"


def test_two_running_calls_cannot_have_one_name(gated: Gated) -> None:
    with Client(gated.server.address, timeout_s=30) as client:
        running = client.stream("w5", max_tokens=8, request_id="same")
        next(running)
        with pytest.raises(InvalidRequest, match="a request named 'same' is running") as error:
            client.generate("w6", request_id="same")
        assert error.value.code == "ALREADY_EXISTS"
        gated.batch.open()
        list(running)
        assert client.generate("w5", max_tokens=8, request_id="same").request_id == "same"


# The server's own life


def health(server: RunningServer, service: str) -> int:
    with grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status


@pytest.mark.parametrize("service", ["", "unmask.v1.Generation", "unmask.v1.Models"])
def test_a_server_that_answers_is_healthy(server: RunningServer, service: str) -> None:
    assert health(server, service) == health_pb2.HealthCheckResponse.SERVING


def test_the_services_can_be_found_by_reflection(server: RunningServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        (answer,) = stub.ServerReflectionInfo(asked, timeout=10)
    names = {service.name for service in answer.list_services_response.service}
    assert names >= {"unmask.v1.Generation", "unmask.v1.Models", "grpc.health.v1.Health"}


def test_metrics_are_exported_as_text(client: Client, server: RunningServer) -> None:
    before = server.server.recorder.value(metrics.TOKENS_PER_FORWARD_DENOISE)
    client.generate("w5", max_tokens=8)
    with pytest.raises(InvalidRequest):
        client.generate("")
    with urllib.request.urlopen(server.metrics_url, timeout=10) as response:
        lines = response.read().decode().splitlines()
    assert f"unmask_tokens_per_forward_denoise_count {before + 1}" in lines
    for name in ("unmask_tokens_per_forward_bucket", "unmask_tokens_per_forward_decode_bucket"):
        assert any(line.startswith(name) for line in lines), name
    assert any(line.startswith('unmask_requests_total{code="OK",finish_reason="length"}') for line in lines)
    assert any(
        line.startswith('unmask_requests_total{code="INVALID_ARGUMENT",finish_reason=""}') for line in lines
    )
    assert any(line.startswith('unmask_forwards_total{kind="denoise"}') for line in lines)


def test_a_server_that_ends_lets_running_calls_finish_and_takes_no_new_ones(gated: Gated) -> None:
    with Client(gated.server.address, timeout_s=30) as client:
        stream = client.stream("w5", max_tokens=8)
        next(stream)
        stopping = threading.Thread(target=gated.server.stop, args=(30,))
        stopping.start()

        def refused() -> bool:
            try:
                client.generate("w6", max_tokens=1, timeout_s=1)
            except (Unavailable, DeadlineExceeded):
                return True
            return False

        gate_was_shut = refused()
        with pytest.raises(urllib.error.HTTPError) as unwell:
            urllib.request.urlopen(gated.server.health_url, timeout=10)
        assert unwell.value.code == 503 and b"draining" in unwell.value.read()
        gated.batch.open()
        assert gate_was_shut
        assert isinstance(list(stream)[-1], Finished)
        stopping.join(30)
        assert not stopping.is_alive()


def test_whoever_watches_hears_that_a_server_ends_before_its_calls_have_ended(gated: Gated) -> None:
    with Client(gated.server.address, timeout_s=30) as client:
        stream = client.stream("w5", max_tokens=8)
        next(stream)
        with grpc.insecure_channel(gated.server.address) as channel:
            watched = health_pb2_grpc.HealthStub(channel).Watch(
                health_pb2.HealthCheckRequest(service="unmask.v1.Generation"), timeout=30
            )
            assert next(watched).status == health_pb2.HealthCheckResponse.SERVING
            stopping = threading.Thread(target=gated.server.stop, args=(30,))
            stopping.start()
            assert next(watched).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert gated.batch.done < 8
            watched.cancel()
        gated.batch.open()
        assert isinstance(list(stream)[-1], Finished)
        stopping.join(30)
        assert not stopping.is_alive()


def test_an_old_connection_is_given_up_and_the_call_on_it_comes_to_its_end(model: ServedModel) -> None:
    batch = GatedBatch(CountingBatch())
    with (
        running_server(batch, model, max_connection_age_s=1.0) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        seen: list[grpc.ChannelConnectivity] = []
        channel.subscribe(seen.append)
        request = pb.GenerateRequest(text="w5")
        request.sampling.max_tokens = 8
        stream = GenerationStub(channel).GenerateStream(pb.GenerateStreamRequest(request=request), timeout=60)
        next(stream)
        # It is told after the stream may have begun.
        wait_until(lambda: grpc.ChannelConnectivity.READY in seen)
        wait_until(
            lambda: grpc.ChannelConnectivity.IDLE in seen[seen.index(grpc.ChannelConnectivity.READY) :]
        )
        assert batch.done == 0
        batch.open()
        assert list(stream)[-1].WhichOneof("event") == "finished"
        assert GenerationStub(channel).Generate(request, timeout=60).finish_reason


def test_a_model_that_fails_ends_every_call_and_is_told(model: ServedModel) -> None:
    with running_server(CountingBatch(fails_at=3), model) as server, Client(server.address) as client:
        with pytest.raises(ServerFailed, match="its log says why") as error:
            client.generate("w5", max_tokens=20)
        assert error.value.code == "INTERNAL"
        assert "came apart" not in str(error.value)
        server.wait_failed()
        with pytest.raises(Unavailable, match="the model has failed"):
            client.generate("w5")


def test_a_stream_goes_on_at_another_server_where_the_first_one_ended(
    network: LanguageModel, model: ServedModel, server: RunningServer
) -> None:
    with Client(server.address) as client:
        undisturbed = list(client.stream("w5 w6", max_tokens=40))
    before = server.server.recorder.value(metrics.QUEUE_SECONDS)
    gate = GatedBatch(batch(network, rows=1))
    with (
        running_server(gate, model) as first,
        Client([first.address, server.address], timeout_s=30) as client,
    ):
        gate.let(20)
        events = []
        stopping = threading.Thread(target=first.stop, args=(0,))
        for event in client.stream("w5 w6", max_tokens=40):
            events.append(event)
            if isinstance(event, BlockCommitted) and event.block_index == 1:
                stopping.start()
        gate.open()
        stopping.join(30)
    blocks = [
        (event.offset, event.token_ids, event.text) for event in events if isinstance(event, BlockCommitted)
    ]
    assert blocks == [
        (event.offset, event.token_ids, event.text)
        for event in undisturbed
        if isinstance(event, BlockCommitted)
    ]
    assert sum(isinstance(event, Started) for event in events) == 1
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert server.server.recorder.value(metrics.QUEUE_SECONDS) == before + 1
    expected = undisturbed[-1]
    assert isinstance(expected, Finished)
    assert finished.usage.completion_tokens == expected.usage.completion_tokens == 40
    assert finished.usage.forwards_denoise == expected.usage.forwards_denoise
