"""Drawn tokens, stops and logprobs over gRPC, and what a server that goes on makes of them."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.folders import served_folder
from support.serving import CountingBatch, GatedBatch, RunningServer, running_server, wait_until
from unmask.client import BlockCommitted, Client, Finished, Started
from unmask.models.loading import load
from unmask.models.registry import read_config
from unmask.serving.model import ServedModel
from unmask.telemetry import metrics


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_folder(tmp_path_factory.mktemp("model") / "tiny", block_length=4, threshold=0.05)


@pytest.fixture(scope="module")
def model(folder: Path) -> ServedModel:
    return ServedModel.describe(folder, read_config(folder), name=None, rows=4, context_length=128)


@pytest.fixture(scope="module")
def client(folder: Path, model: ServedModel) -> Iterator[Client]:
    with running_server(model.batch(load(folder)), model) as server, Client(server.address) as made:
        yield made


@pytest.fixture(scope="module")
def counting(model: ServedModel) -> Iterator[RunningServer]:
    with running_server(CountingBatch(), model) as running:
        yield running


def test_a_seed_repeats_a_text_and_is_told_where_none_is_given(client: Client) -> None:
    def drawn(**options: int) -> tuple[int, ...]:
        return client.generate("w5 w6", max_tokens=24, temperature=1.5, top_p=0.95, **options).token_ids  # type: ignore[arg-type]

    assert drawn(seed=4) == drawn(seed=4) != drawn(seed=5)
    assert drawn() != drawn()
    events = list(client.stream("w5 w6", max_tokens=24, temperature=1.5, top_p=0.95))
    assert isinstance(events[0], Started) and events[0].seed is not None
    tokens = tuple(
        token for event in events if isinstance(event, BlockCommitted) for token in event.token_ids
    )
    assert drawn(seed=events[0].seed) == tokens
    cold = next(iter(client.stream("w5", max_tokens=4)))
    assert isinstance(cold, Started) and cold.seed is None


def test_a_trace_ends_where_a_stop_ends_its_request(client: Client) -> None:
    whole = client.generate("w5 w6", max_tokens=40).token_ids
    stop = next(token for token in whole[6:] if token not in whole[:6])
    answer = client.generate("w5 w6", max_tokens=40, stop_token_ids=[stop], trace=True)
    assert answer.token_ids == whole[: whole.index(stop) + 1]
    assert answer.trace is not None
    assert len(answer.trace.forwards) == answer.usage.forwards_prefill + answer.usage.forwards_denoise
    committed = sum(forward.committed_tokens or 0 for forward in answer.trace.forwards)
    assert len(answer.token_ids) <= committed < len(answer.token_ids) + 4, "the stop's block is the last"
    assert answer.trace.forwards[-1].committed_tokens and answer.trace.forwards_left_out == 0


def test_a_penalty_keeps_a_text_from_repeating_itself(client: Client) -> None:
    plain = client.generate("w5 w6", max_tokens=40)
    varied = client.generate("w5 w6", max_tokens=40, repetition_penalty=50.0)
    assert len(set(varied.token_ids)) > len(set(plain.token_ids))


def test_logprobs_are_told_if_asked_for(client: Client) -> None:
    told = client.generate("w5 w6", max_tokens=13, logprobs=True)
    assert len(told.logprobs) == len(told.token_ids)
    assert all(one <= 0 and math.isfinite(one) for one in told.logprobs)
    assert client.generate("w5 w6", max_tokens=13).logprobs == ()


@pytest.mark.parametrize(
    ("stop", "text", "tokens", "found"),
    [
        (["w9"], "w6 w7 w8 ", 4, "w9"),
        (["8 w9 w10 w11"], "w6 w7 w", 6, "8 w9 w10 w11"),
        (["w99", "w12", "w7"], "w6 ", 2, "w7"),
        ([], "w6 w7 w8", 4, 9),
    ],
    ids=["inside a block", "across blocks", "the first of several", "a token"],
)
def test_an_answer_ends_before_its_stop(
    counting: RunningServer, stop: list[str], text: str, tokens: int, found: str | int
) -> None:
    ids = [9] if not stop else []
    with Client(counting.address) as client:
        whole = client.generate("w5", max_tokens=60, stop=stop, stop_token_ids=ids)
        assert (whole.text, whole.finish_reason, whole.stop) == (text, "stop", found)
        assert whole.token_ids == tuple(range(6, 6 + tokens))
        assert whole.usage.completion_tokens == tokens - isinstance(found, int)
        events = list(client.stream("w5", max_tokens=60, stop=stop, stop_token_ids=ids))
    pieces = [event.text for event in events if isinstance(event, BlockCommitted | Finished)]
    assert "".join(pieces) == text
    last = events[-1]
    assert isinstance(last, Finished) and (last.reason, last.stop) == ("stop", found)


def test_a_stop_that_never_comes_changes_nothing(counting: RunningServer) -> None:
    with Client(counting.address) as client:
        plain = client.generate("w5", max_tokens=9)
        given = client.generate("w5", max_tokens=9, stop=["w15", "14 w1"])
    assert (given.text, given.token_ids, given.finish_reason) == (plain.text, plain.token_ids, "length")


def test_a_stop_frees_its_row_within_one_forward_and_counts_as_complete(model: ServedModel) -> None:
    batch = GatedBatch(CountingBatch(rows=1))
    with running_server(batch, model) as server, Client(server.address) as client:
        batch.let(4)
        assert client.generate("w5", max_tokens=100, stop=["w9"]).finish_reason == "stop"
        batch.let(1)  # the forward that may have begun before the stop was found
        wait_until(lambda: batch.active == 0)
        assert batch.done <= 5
        wait_until(
            lambda: server.server.recorder.value(metrics.REQUESTS, code="OK", finish_reason="stop") == 1
        )
        batch.open()


@pytest.mark.parametrize(("done", "text"), [(4, " w10 w11 w12 "), (8, "")])
def test_a_server_that_goes_on_finds_the_stop_where_the_first_would_have(
    counting: RunningServer, done: int, text: str
) -> None:
    """Of the stop one server has told the first half; the text that it held back comes from the other."""
    with Client(counting.address) as client:
        committed = list(range(6, 6 + done))
        rest = client.generate("w5", max_tokens=60, stop=["w13 w14"], committed=committed)
        assert rest.stop == "w13 w14"
        assert rest.token_ids == tuple(range(6 + done, 15))
        assert rest.text == text


def test_a_continuation_draws_what_the_whole_would_have(client: Client) -> None:
    options = {"max_tokens": 20, "temperature": 1.0, "seed": 8}
    whole = client.generate("w5 w6", **options)  # type: ignore[arg-type]
    block = 2  # the first block begins with the prompt's two tokens
    rest = client.generate("w5 w6", committed=whole.token_ids[:block], **options)  # type: ignore[arg-type]
    assert whole.token_ids[:block] + rest.token_ids == whole.token_ids
