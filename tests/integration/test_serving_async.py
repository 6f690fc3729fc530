"""The asyncio client does what the blocking one does."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from support.folders import served_folder
from support.serving import CountingBatch, GatedBatch, RunningServer, running_server, wait_until
from unmask.client import (
    AsyncClient,
    BlockCommitted,
    CanvasUpdate,
    DeadlineExceeded,
    Finished,
    InvalidRequest,
    Started,
    Unavailable,
)
from unmask.models.registry import read_config
from unmask.serving.model import ServedModel
from unmask.telemetry import metrics

T = TypeVar("T")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    folder: Path = served_folder(tmp_path_factory.mktemp("model") / "tiny", block_length=4)
    return ServedModel.describe(folder, read_config(folder), name=None, rows=2, context_length=256)


@pytest.fixture(scope="module")
def server(model: ServedModel) -> Iterator[RunningServer]:
    with running_server(CountingBatch(), model) as running:
        yield running


def ask(address: str | list[str], question: Callable[[AsyncClient], Awaitable[T]]) -> T:
    async def main() -> T:
        async with AsyncClient(address, timeout_s=30) as client:
            return await question(client)

    return asyncio.run(main())


def test_a_whole_generation(server: RunningServer) -> None:
    answer = ask(server.address, lambda client: client.generate("w5", max_tokens=6))
    assert answer.token_ids == (6, 7, 8, 9, 10, 11)
    assert answer.text == "w6 w7 w8 w9 w10 w11"


def test_many_generations_at_once(server: RunningServer) -> None:
    async def question(client: AsyncClient) -> list[tuple[int, ...]]:
        answers = await asyncio.gather(*(client.generate(f"w{n}", max_tokens=5) for n in range(10, 40)))
        return [answer.token_ids for answer in answers]

    assert ask(server.address, question) == [tuple(range(n + 1, n + 6)) for n in range(10, 40)]


def test_a_stream(server: RunningServer) -> None:
    async def question(client: AsyncClient) -> list[object]:
        return [event async for event in client.stream("w5", canvas=True, max_tokens=6)]

    events = ask(server.address, question)
    assert isinstance(events[0], Started) and isinstance(events[-1], Finished)
    assert [event.token_ids for event in events if isinstance(event, BlockCommitted)] == [
        (6, 7, 8, 9),
        (10, 11),
    ]
    fills = [fill for event in events if isinstance(event, CanvasUpdate) for fill in event.fills]
    assert [(fill.position, fill.token_id) for fill in fills] == [(n, n + 6) for n in range(6)]


def test_the_model_s_description(server: RunningServer) -> None:
    assert ask(server.address, lambda client: client.model_info()).name == "tiny"


def test_errors_are_typed(server: RunningServer) -> None:
    with pytest.raises(InvalidRequest) as error:
        ask(server.address, lambda client: client.generate("w5", threshold=0))
    assert [violation.field for violation in error.value.violations] == ["diffusion.threshold"]
    with pytest.raises(Unavailable, match="running there"):
        ask("127.0.0.1:1", lambda client: client.generate("w5"))


def test_another_address_is_tried_where_nobody_answers(server: RunningServer) -> None:
    addresses = ["127.0.0.1:1", server.address]
    assert ask(addresses, lambda client: client.generate("w5", max_tokens=1)).token_ids == (6,)


def test_leaving_and_running_out_of_time_free_the_row(model: ServedModel) -> None:
    gate = GatedBatch(CountingBatch(rows=2))

    async def question(client: AsyncClient) -> None:
        stream = client.stream("w5", max_tokens=100)
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        with pytest.raises(DeadlineExceeded):
            await client.generate("w6", max_tokens=100, timeout_s=1)
        # The server may learn of it later than the client; what waits next must be the third request.
        await asyncio.to_thread(wait_until, lambda: recorder.value(metrics.REQUESTS_WAITING) == 0)
        waiting = asyncio.create_task(client.generate("w7", max_tokens=100))
        await asyncio.to_thread(wait_until, lambda: recorder.value(metrics.REQUESTS_WAITING) == 1)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()

    with running_server(gate, model) as server:
        try:
            recorder = server.server.recorder
            ask(server.address, question)
            wait_until(lambda: recorder.value(metrics.CANCELLED, by="client") == 2)
            wait_until(lambda: recorder.value(metrics.CANCELLED, by="deadline") == 1)
            gate.let(1)
            wait_until(lambda: gate.active == 0)
            assert gate.done == 1
        finally:
            gate.open()


def test_a_stream_goes_on_at_another_server(model: ServedModel, server: RunningServer) -> None:
    gate = GatedBatch(CountingBatch())

    async def question(client: AsyncClient) -> list[int]:
        tokens: list[int] = []
        async for event in client.stream("w5", max_tokens=12):
            if isinstance(event, BlockCommitted):
                assert event.offset == len(tokens)
                tokens += event.token_ids
                if len(tokens) == 8:
                    loop = asyncio.get_running_loop()
                    leaving.append(loop.run_in_executor(None, first.stop, 0))
        gate.open()
        await asyncio.gather(*leaving)
        return tokens

    leaving: list[asyncio.Future[None]] = []
    with running_server(gate, model) as first:
        gate.let(9)
        assert ask([first.address, server.address], question) == list(range(6, 18))
