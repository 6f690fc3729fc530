"""What the gRPC front makes of a client that leaves, as its calls are counted."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import grpc
import pytest
from grpc.aio import InternalError

from unmask.fronts.generating import Accounts, Ending
from unmask.fronts.generation import GenerationService
from unmask.v1 import generation_pb2 as pb


class _Answers:
    """Two events, and what becomes of their call."""

    model_name = "model"

    def __init__(self) -> None:
        self.closed = False
        self.endings: list[Ending] = []
        self._accounts = Accounts(max_request_s=60, refusal=lambda _: None, ended=self.endings.append)

    def accounted(self, remaining: Callable[[], float | None]) -> AbstractAsyncContextManager[Ending]:
        return self._accounts.accounted(remaining)

    async def events(
        self, request: pb.GenerateRequest, *, deadline: float | None = None, canvas: bool = False
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        try:
            yield pb.GenerateStreamResponse(started=pb.Started(request_id="a"))
            yield pb.GenerateStreamResponse(finished=pb.Finished(reason=pb.FINISH_REASON_LENGTH))
        finally:
            self.closed = True


class _Call:
    """What gRPC gives a servicer; fails at the write of that number, with ``error``."""

    def __init__(self, fails_at: int | None, error: Exception) -> None:
        self.written = 0
        self.status: Any = None
        self._fails_at, self._error = fails_at, error

    def time_remaining(self) -> None:
        return None

    async def write(self, event: pb.GenerateStreamResponse) -> None:
        if self.written == self._fails_at:
            raise self._error
        self.written += 1

    async def abort_with_status(self, status: Any) -> None:
        self.status = status


def _stream(answers: _Answers, call: _Call) -> None:
    asyncio.run(GenerationService(answers).GenerateStream(pb.GenerateStreamRequest(), call))


def test_a_client_that_leaves_in_the_middle_of_a_write_is_no_failure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    answers, call = _Answers(), _Call(1, InternalError("Failed grpc_call_start_batch"))
    with caplog.at_level(logging.WARNING), pytest.raises(asyncio.CancelledError):
        _stream(answers, call)
    assert [ending.code for ending in answers.endings] == [grpc.StatusCode.CANCELLED]
    assert answers.closed  # or the request would be answered to nobody
    assert call.status is None
    assert not caplog.records


def test_another_error_of_a_write_is_a_failure_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    answers, call = _Answers(), _Call(1, ValueError("no such field"))
    _stream(answers, call)
    assert [ending.code for ending in answers.endings] == [grpc.StatusCode.INTERNAL]
    assert call.status.code is grpc.StatusCode.INTERNAL
    assert "no such field" not in call.status.details
    assert "a call failed" in caplog.text


def test_a_client_that_stays_gets_every_event() -> None:
    answers, call = _Answers(), _Call(None, ValueError())
    _stream(answers, call)
    assert call.written == 2
    assert [ending.code for ending in answers.endings] == [grpc.StatusCode.OK]
    assert answers.endings[0].finish_reason == "length"
