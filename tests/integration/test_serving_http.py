"""OpenAI's own client against the HTTP front: the same answers as over gRPC, and the same limits."""

import functools
import http.client
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import web

from support.folders import served_folder
from support.serving import CountingBatch, GatedBatch, RunningServer, running_server, wait_until
from unmask.client import Client
from unmask.fronts.http_front import HttpLimits
from unmask.models.loading import load
from unmask.models.registry import read_config
from unmask.serving.model import ServedModel
from unmask.telemetry import metrics

PAGE = (Path(__file__).parents[2] / "docs/how-to/ask-over-http.md").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_folder(tmp_path_factory.mktemp("model") / "tiny", block_length=4)


@pytest.fixture(scope="module")
def model(folder: Path) -> ServedModel:
    return ServedModel.describe(folder, read_config(folder), name=None, rows=2, context_length=128)


@pytest.fixture(scope="module")
def server(folder: Path, model: ServedModel) -> Iterator[RunningServer]:
    with running_server(model.batch(load(folder)), model, http_port=0) as running:
        yield running


@pytest.fixture(scope="module")
def counting(model: ServedModel) -> Iterator[RunningServer]:
    """A server whose answers are known beforehand."""
    with running_server(CountingBatch(), model, http_port=0) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with client_of(server) as made:
        yield made


def client_of(server: RunningServer, **options: object) -> openai.OpenAI:
    url = f"http://127.0.0.1:{server.server.http_port}/v1"
    defaults = {"api_key": "none", "max_retries": 0, "timeout": 30}
    return openai.OpenAI(base_url=url, **(defaults | options))  # type: ignore[arg-type]


def connection_to(server: RunningServer) -> http.client.HTTPConnection:
    assert server.server.http_port
    return http.client.HTTPConnection("127.0.0.1", server.server.http_port, timeout=30)


def post(server: RunningServer, body: bytes, path: str = "/v1/completions") -> tuple[int, dict]:
    with closing(connection_to(server)) as connection:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def test_a_completion_is_what_grpc_answers(client: openai.OpenAI, server: RunningServer) -> None:
    with Client(server.address) as grpc_client:
        expected = grpc_client.generate("w5 w6 w7", max_tokens=10)
    given = client.completions.create(model="tiny", prompt="w5 w6 w7", max_tokens=10)
    assert given.object == "text_completion" and given.model == "tiny"
    assert given.choices[0].text == expected.text
    assert given.choices[0].finish_reason == "length"
    assert given.usage is not None
    assert (given.usage.prompt_tokens, given.usage.completion_tokens) == (3, expected.usage.completion_tokens)
    ours = given.usage.model_extra["unmask"]
    assert ours["forwards_denoise"] == expected.usage.forwards_denoise
    assert ours["tpf_decode"] == pytest.approx(expected.usage.tpf_decode)
    assert given._request_id and given.id == f"cmpl-{given._request_id}"


@pytest.mark.parametrize(
    "asked",
    [
        {"decoder": "hierarchical", "threshold": 0.3, "low_threshold": 0.01},
        {"decoder": "credit", "credit_weight": 2.5, "credit_decay": 0.5, "credit_exponent": 1.0},
        {"decoder": "entropy-bounded", "entropy_bound": 5.0},
    ],
)
def test_a_decoder_is_chosen_as_over_grpc(
    client: openai.OpenAI, server: RunningServer, asked: dict[str, object]
) -> None:
    with Client(server.address) as grpc_client:
        expected = grpc_client.generate("w5 w6 w7", max_tokens=20, **asked)  # type: ignore[arg-type]
    given = client.completions.create(
        model="tiny", prompt="w5 w6 w7", max_tokens=20, extra_body={"diffusion": asked}
    )
    assert given.choices[0].text == expected.text
    assert given.usage is not None and given.usage.model_extra is not None
    assert given.usage.model_extra["unmask"]["forwards_denoise"] == expected.usage.forwards_denoise
    with pytest.raises(openai.BadRequestError, match="DECODER_ENTROPY_BOUNDED has no such parameter"):
        client.completions.create(
            model="tiny",
            prompt="w5",
            extra_body={"diffusion": {"decoder": "entropy-bounded", "threshold": 0.5}},
        )


def test_a_prompt_may_be_tokens_or_a_list_of_one_text(client: openai.OpenAI) -> None:
    texts = {
        client.completions.create(model="tiny", prompt=prompt, max_tokens=6).choices[0].text
        for prompt in ("w5 w6", [5, 6], ["w5 w6"])
    }
    assert len(texts) == 1


def test_a_chat_is_what_grpc_answers(client: openai.OpenAI, server: RunningServer) -> None:
    messages = [
        {"role": "user", "content": "w5"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "w7", "tool_call_id": "1"},
        {"role": "user", "content": [{"type": "text", "text": "w8 "}, {"type": "text", "text": "w9"}]},
    ]
    given = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=6)  # type: ignore[arg-type]
    assert given.choices[0].message.role == "assistant"
    plain = [
        {"role": "user", "content": "w5"},
        messages[1],
        {"role": "tool", "content": "w7", "tool_call_id": "1"},
        {"role": "user", "content": "w8 w9"},
    ]
    again = client.chat.completions.create(model="tiny", messages=plain, max_tokens=6)  # type: ignore[arg-type]
    assert given.choices[0].message.content == again.choices[0].message.content
    with Client(server.address) as grpc_client:
        short = grpc_client.generate(messages=[{"role": "user", "content": "w5"}], max_tokens=6)
    over_http = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "w5"}], max_tokens=6
    )
    assert over_http.choices[0].message.content == short.text


@pytest.mark.parametrize("usage", [False, True], ids=["without usage", "with usage"])
def test_a_stream_is_the_whole_in_pieces_one_for_each_block(counting: RunningServer, usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if usage else {}
    with client_of(counting) as client:
        chunks = list(
            client.completions.create(model="tiny", prompt="w5", max_tokens=10, stream=True, **options)  # type: ignore[call-overload]
        )
    texts = [chunk.choices[0].text for chunk in chunks if chunk.choices]
    assert "".join(texts) == "w6 w7 w8 w9 w10 w11 w12 w13 w14 w15"
    assert len(texts) == 3 + 1  # blocks, and the end
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices] == [None] * 3 + ["length"]
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == [10] * usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_chat_stream_begins_with_its_role(counting: RunningServer) -> None:
    with client_of(counting) as client:
        messages = [{"role": "user", "content": "w5"}]
        chunks = list(
            client.chat.completions.create(model="tiny", messages=messages, max_tokens=4, stream=True)  # type: ignore[call-overload]
        )
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert "".join(delta.content or "" for delta in deltas).count("w") == 4
    assert chunks[-1].choices[0].finish_reason == "length"


def test_the_model_is_listed_and_described(client: openai.OpenAI) -> None:
    assert [one.id for one in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "unmask"
    with pytest.raises(openai.NotFoundError, match="served here is 'tiny'"):
        client.models.retrieve("large")


def test_a_text_ends_before_its_stop(counting: RunningServer) -> None:
    with client_of(counting) as client:
        for stop in ("w9", ["w12", "8 w9"]):
            given = client.completions.create(model="tiny", prompt="w5", max_tokens=40, stop=stop)
            assert given.choices[0].finish_reason == "stop"
            assert given.choices[0].text == {"w9": "w6 w7 w8 "}.get(str(stop), "w6 w7 w")


def test_draws_are_repeated_by_their_seed(client: openai.OpenAI) -> None:
    def text(seed: int) -> str:
        given = client.completions.create(
            model="tiny", prompt="w5 w6", max_tokens=16, temperature=1.5, top_p=0.9, seed=seed
        )
        return given.choices[0].text

    assert text(1) == text(1) != text(2)


def test_several_answers_are_those_of_several_calls_and_read_their_prompt_once(
    folder: Path, model: ServedModel
) -> None:
    prompt = " ".join(f"w{n}" for n in range(5, 45))
    ask = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 1.2}
    with (
        running_server(model.batch(load(folder)), model, http_port=0) as server,
        client_of(server) as client,
    ):
        alone = [
            client.completions.create(seed=5 + n, extra_body={"cache_salt": str(n)}, **ask)  # type: ignore[call-overload]
            for n in range(3)
        ]
        positions = server.server.recorder.value(metrics.POSITIONS_EVALUATED)
        hits = server.server.recorder.value(metrics.PREFIX_HIT_TOKENS)
        assert hits == 0  # they have different salts
        together = client.completions.create(seed=5, n=3, **ask)  # type: ignore[call-overload]
        assert [choice.text for choice in together.choices] == [one.choices[0].text for one in alone]
        assert len({choice.text for choice in together.choices}) > 1
        assert [choice.index for choice in together.choices] == [0, 1, 2]
        usages = [one.usage for one in alone]
        assert together.usage.prompt_tokens == 40
        assert together.usage.completion_tokens == sum(usage.completion_tokens for usage in usages)
        assert server.server.recorder.value(metrics.PREFIX_HIT_TOKENS) == 2 * 40
        spent = server.server.recorder.value(metrics.POSITIONS_EVALUATED) - positions
        assert spent == positions - 2 * 40
        pieces: dict[int, str] = {}
        for chunk in client.completions.create(  # type: ignore[call-overload]
            seed=5, n=3, stream=True, stream_options={"include_usage": True}, **ask
        ):
            for choice in chunk.choices:
                pieces[choice.index] = pieces.get(choice.index, "") + choice.text
        assert chunk.usage.completion_tokens == together.usage.completion_tokens
        assert pieces == {choice.index: choice.text for choice in together.choices}


def test_of_several_answers_one_that_cannot_be_had_ends_all(model: ServedModel) -> None:
    batch = GatedBatch(CountingBatch(rows=1))
    with (
        running_server(batch, model, http_port=0, max_queue_requests=1) as server,
        client_of(server) as client,
    ):
        with pytest.raises(openai.RateLimitError, match="queue is full"):
            client.completions.create(model="tiny", prompt="w5", max_tokens=50, temperature=1, n=3)
        batch.open()
        wait_until(lambda: server.server.engine.load == (0, 0))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_probabilities_of_tokens_are_those_of_grpc(
    client: openai.OpenAI, server: RunningServer, stream: bool
) -> None:
    with Client(server.address) as grpc_client:
        expected = grpc_client.generate("w5 w6", max_tokens=10, logprobs=True)
        chat = grpc_client.generate(
            messages=[{"role": "user", "content": "w5"}], max_tokens=10, logprobs=True
        )
    options = {"model": "tiny", "max_tokens": 10, "stream": stream}
    given = client.completions.create(prompt="w5 w6", logprobs=0, **options)  # type: ignore[call-overload]
    found = [one.choices[0].logprobs for one in (given if stream else [given])]
    told = [one for one in found if one is not None]
    assert [value for one in told for value in one.token_logprobs] == pytest.approx(expected.logprobs)
    tokens = [token for one in told for token in one.tokens]
    offsets = [offset for one in told for offset in one.text_offset]
    assert len(tokens) == len(expected.token_ids)
    assert offsets == [len("".join(tokens[:n])) for n in range(len(tokens))]
    messages = [{"role": "user", "content": "w5"}]
    given = client.chat.completions.create(messages=messages, logprobs=True, **options)  # type: ignore[call-overload]
    found = [one.choices[0].logprobs for one in (given if stream else [given])]
    content = [token for one in found if one is not None for token in one.content]
    assert [token.logprob for token in content] == pytest.approx(chat.logprobs)
    assert all(bytes(token.bytes).decode() == token.token for token in content)


def untimed(trace: dict[str, Any]) -> dict[str, Any]:
    """A trace but for what differs from call to call: its name and its times."""
    started = trace["started"] | {"request_id": "", "queue_seconds": 0.0}
    forwards = [forward | {"end_seconds": 0.0, "seconds": 0.0} for forward in trace["forwards"]]
    return trace | {"started": started, "forwards": forwards}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
def test_a_trace_is_the_one_that_grpc_tells(
    client: openai.OpenAI, server: RunningServer, chat: bool, stream: bool
) -> None:
    asked = {"messages": [{"role": "user", "content": "w5"}]} if chat else {"prompt": "w5 w6"}
    diffusion = {"decoder": "joint-edit", "threshold": 0.05, "edit_threshold": 0.01}
    with Client(server.address) as grpc_client:
        told = grpc_client.generate(**asked, max_tokens=10, trace=True, **diffusion).trace  # type: ignore[arg-type]
    assert told is not None and any(forward.edited for forward in told.forwards)
    create: Any = client.chat.completions.create if chat else client.completions.create
    extra = {"diffusion": diffusion, "trace": True}
    given = create(model="tiny", max_tokens=10, stream=stream, extra_body=extra, **asked)
    choices = [choice for answer in (given if stream else [given]) for choice in answer.choices]
    assert [choice.finish_reason for choice in choices if "trace" in choice.model_extra] == ["length"]
    trace = choices[-1].model_extra["trace"]
    assert trace.keys() == asdict(told).keys() and trace["started"]["request_id"]
    assert untimed(trace) == untimed(json.loads(json.dumps(asdict(told))))
    assert 0 < trace["forwards"][0]["seconds"] <= trace["forwards"][-1]["end_seconds"]


def test_each_of_several_answers_has_a_trace_of_its_own_and_none_without_asking(
    client: openai.OpenAI,
) -> None:
    ask = {"model": "tiny", "prompt": "w5 w6", "max_tokens": 8, "temperature": 1.2, "seed": 5, "n": 2}
    traced = client.completions.create(**ask, extra_body={"trace": True})  # type: ignore[call-overload]
    plain = client.completions.create(**ask)  # type: ignore[call-overload]
    assert [choice.text for choice in traced.choices] == [choice.text for choice in plain.choices]
    traces = [choice.model_extra["trace"] for choice in traced.choices]
    assert [trace["started"]["seed"] for trace in traces] == [5, 6]
    for choice, trace in zip(traced.choices, traces, strict=True):
        filled = {fill["position"]: fill["text"] for step in trace["forwards"] for fill in step["filled"]}
        assert " ".join(filled[place] for place in range(8)) == choice.text
    assert not any("trace" in choice.model_extra for choice in plain.choices)


def test_how_to_decode_is_said_under_diffusion(client: openai.OpenAI) -> None:
    def forwards(**diffusion: object) -> int:
        given = client.completions.create(
            model="tiny", prompt="w5 w6", max_tokens=8, extra_body={"diffusion": diffusion}
        )
        assert given.usage is not None
        count: int = given.usage.model_extra["unmask"]["forwards_denoise"]
        return count

    assert forwards(decoder="fixed-steps", steps_per_block=1) < forwards(
        decoder="fixed-steps", steps_per_block=4
    )


@pytest.mark.parametrize(
    ("wrong", "param", "text"),
    [
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1000}, "sampling.max_tokens", "the context holds 128"),
        ({"temperature": -1}, "sampling.temperature", "0 to 100"),
        ({"n": 2}, "n", "all answers are the same"),
        ({"n": 17, "temperature": 1}, "n", "less than or equal to 16"),
        ({"extra_body": {"priority": 101}}, "priority", "-100 to 100"),
        ({"extra_body": {"cache_salt": "a" * 129}}, "cache_salt", "at most 128 bytes"),
        ({"extra_body": {"trace": "yes"}}, "trace", "valid boolean"),
        ({"top_p": 1.5}, "sampling.top_p", "at most 1"),
        ({"presence_penalty": 0.1}, "presence_penalty", "0"),
        ({"stop": ["w7", ""]}, "sampling.stop[1]", "1 to 256 bytes"),
        ({"logprobs": 1}, "logprobs", "should be 0"),
        ({"extra_body": {"guided_regex": "a"}}, "guided_regex", "leave it out"),
        ({"extra_body": {"diffusion": {"decoder": "magic"}}}, "diffusion.decoder", "allowed are threshold"),
        ({"extra_body": {"diffusion": {"thresh": 1}}}, "diffusion", "thresh"),
        ({"extra_body": {"diffusion": {"threshold": 2}}}, "diffusion.threshold", "at most 1"),
        ({"prompt": ""}, "text", "no tokens"),
        ({"prompt": ["a", "b"]}, "prompt", "at most 1"),
        ({"prompt": [10**9]}, "token_ids.ids[0]", "ids run from 0"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    client: openai.OpenAI, wrong: dict, param: str | None, text: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**{"model": "tiny", "prompt": "w5", "max_tokens": 4} | wrong)
    assert refused.value.param == param
    assert text in str(refused.value)


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="served here is 'tiny'"):
        client.completions.create(model="large", prompt="w5")


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"model": "tiny", "prompt": {"a": 1}}', b"\xff\xfe", b"[" * 100_000]
)
def test_a_body_that_is_no_request_is_refused(server: RunningServer, body: bytes) -> None:
    status, answer = post(server, body)
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error" and answer["error"]["message"]


def test_a_path_or_method_that_is_not_there(server: RunningServer) -> None:
    status, answer = post(server, b"{}", "/v1/embeddings")
    assert status == 404 and answer["error"]["code"] == "not_found"
    with closing(connection_to(server)) as connection:
        connection.request("GET", "/v1/completions")
        refused = connection.getresponse()
        assert refused.status == 405 and refused.headers["Allow"] == "POST"


def test_a_body_that_is_too_large_is_refused(server: RunningServer) -> None:
    status, answer = post(server, b" " * (5 << 20))
    assert status == 413 and "4194304 bytes" in answer["error"]["message"]


def test_a_full_queue_says_when_to_come_again(model: ServedModel) -> None:
    batch = GatedBatch(CountingBatch(rows=1))
    with (
        running_server(batch, model, http_port=0, max_queue_requests=1) as server,
        client_of(server) as client,
    ):
        waiting = [
            threading.Thread(
                target=client.completions.create, kwargs={"model": "tiny", "prompt": "w5", "max_tokens": 2}
            )
            for _ in range(2)
        ]
        queued = functools.partial(server.server.recorder.value, metrics.REQUESTS_WAITING)
        waiting[0].start()
        # The first one waits for a moment, too: only once it is taken up is the second the one that waits.
        wait_until(lambda: batch.begun == 1 and queued() == 0)
        waiting[1].start()
        wait_until(lambda: queued() == 1)
        with pytest.raises(openai.RateLimitError, match="queue is full") as refused:
            client.completions.create(model="tiny", prompt="w5", max_tokens=2)
        assert float(refused.value.response.headers["Retry-After"]) >= 1
        batch.open()
        for thread in waiting:
            thread.join()


def test_a_client_that_leaves_frees_its_row_within_one_forward(model: ServedModel) -> None:
    batch = GatedBatch(CountingBatch(rows=1))
    with running_server(batch, model, http_port=0) as server, client_of(server) as client:
        stream = client.completions.create(model="tiny", prompt="w5", max_tokens=100, stream=True)
        wait_until(lambda: batch.begun == 1)
        stream.close()
        wait_until(lambda: server.server.recorder.value(metrics.CANCELLED, by="client") == 1)
        batch.let(1)
        wait_until(lambda: batch.active == 0)
        assert batch.done == 1
        batch.open()


@pytest.mark.parametrize(("at", "code"), [("w6", "CANCELLED"), ("w10", "CANCELLED"), ("[DONE]", "OK")])
def test_a_client_that_leaves_while_it_is_being_written_to_has_left_and_nothing_has_failed(
    model: ServedModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    at: str,
    code: str,
) -> None:
    """As a rule the handler is cancelled before it writes again; here the connection ends just before."""
    written = web.StreamResponse.write

    async def write(self: web.StreamResponse, data: bytes) -> None:
        if at.encode() in data:
            assert self._req is not None and self._req.transport is not None
            self._req.transport.abort()
        await written(self, data)

    monkeypatch.setattr(web.StreamResponse, "write", write)
    with running_server(CountingBatch(), model, http_port=0) as server:
        body = {"model": "tiny", "prompt": "w5", "max_tokens": 8, "stream": True}
        with closing(connection_to(server)) as connection:
            connection.request("POST", "/v1/completions", json.dumps(body))
            with pytest.raises((http.client.HTTPException, ConnectionError)):
                connection.getresponse().read()
        reason = "length" if code == "OK" else ""
        recorder = server.server.recorder
        wait_until(lambda: recorder.value(metrics.REQUESTS, code=code, finish_reason=reason) == 1)
        wait_until(lambda: recorder.value(metrics.CANCELLED, by="client") == (code == "CANCELLED"))
        wait_until(lambda: recorder.value(metrics.REQUESTS_RUNNING) == 0)
    assert [record for record in caplog.records if record.exc_info] == []


def test_a_call_has_an_end_even_if_its_client_has_none(model: ServedModel) -> None:
    batch = GatedBatch(CountingBatch(rows=1))
    with running_server(batch, model, http_port=0, max_request_s=0.3) as server, client_of(server) as client:
        with pytest.raises(openai.InternalServerError, match="time is over") as late:
            client.completions.create(model="tiny", prompt="w5", max_tokens=100)
        assert late.value.status_code == 504
        batch.open()


def test_a_model_that_fails_in_mid_stream_ends_it_with_an_error(model: ServedModel) -> None:
    with running_server(CountingBatch(fails_at=6), model, http_port=0) as server, client_of(server) as client:
        stream = client.completions.create(model="tiny", prompt="w5", max_tokens=20, stream=True)
        texts = []
        with pytest.raises(openai.APIError, match="its log says why"):
            texts.extend(chunk.choices[0].text for chunk in stream)
        server.wait_failed()
        with pytest.raises(openai.APIStatusError):
            client.completions.create(model="tiny", prompt="w5", max_tokens=2)


def test_a_server_that_drains_says_so(model: ServedModel) -> None:
    with running_server(CountingBatch(), model, http_port=0) as server, client_of(server) as client:
        server.server.engine.drain()
        with pytest.raises(openai.InternalServerError, match="shutting down") as refused:
            client.completions.create(model="tiny", prompt="w5", max_tokens=2)
        assert refused.value.status_code == 503


def test_whoever_says_nothing_or_drips_is_let_go(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "unmask.serving.server.HttpLimits", lambda **given: HttpLimits(request_s=0.3, **given)
    )
    with running_server(CountingBatch(), model, http_port=0) as server:
        assert server.server.http_port
        head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n"
        for sent in (b"", b"POST /v1/comp", head):
            with socket.create_connection(("127.0.0.1", server.server.http_port), timeout=30) as connection:
                connection.sendall(sent)
                assert connection.recv(100) == b""
        with socket.create_connection(("127.0.0.1", server.server.http_port), timeout=30) as connection:
            connection.sendall(head + b"\r\n{")
            assert connection.recv(100).startswith(b"HTTP/1.1 504")


def test_connections_are_bounded(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "unmask.serving.server.HttpLimits", lambda **given: HttpLimits(connections=2, **given)
    )
    with running_server(CountingBatch(), model, http_port=0) as server:
        assert server.server.http_port
        address = ("127.0.0.1", server.server.http_port)
        with socket.create_connection(address, timeout=30), socket.create_connection(address, timeout=30):
            with socket.create_connection(address, timeout=30) as third:
                assert third.recv(1) == b""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                assert post(server, b'{"model": "tiny", "prompt": "w5", "max_tokens": 1}')[0] == 200
                break
            except (http.client.HTTPException, OSError):
                continue  # the server has not yet seen the others go
        else:
            pytest.fail("no connection came free")


def test_the_page_s_commands_and_code_do_what_they_say(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = re.search(r"^unmask serve \S+ (.*)$", PAGE, re.MULTILINE)
    code = re.search(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert command and code
    options = [*command[1].replace("8000", "0").split(), "--port=0", "--metrics-port=0", "--name=model"]
    serve = [sys.executable, "-m", "unmask.cli.main", "serve", str(folder), *options]
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready = re.search(r"OpenAI-style HTTP on (\S+)/v1,", process.stdout.readline())
            assert ready
            exec(compile(code[1].replace("http://127.0.0.1:8000", ready[1]), "page", "exec"), {})
        finally:
            process.kill()
    assert re.fullmatch(r".*\S \d+\.\d+\n", capsys.readouterr().out, re.DOTALL)
