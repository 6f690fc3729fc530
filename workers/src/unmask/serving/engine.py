"""One model thread that decodes whatever requests there are, one forward at a time.

Any thread submits and cancels; the model thread alone touches the batch. Between two forwards it lets
cancelled requests go, takes up waiting ones where there is room (the highest priority first, of one priority
first come, first served: none overtakes one that is too large for the cache just now), and hands out what the
last forward brought about. So a request never waits for another one's block to end, and a cancelled request
takes part in at most the forward that is running.

What does not fit the queue is turned away at once, and so is what would wait past its deadline: waiting in
vain is worse than being told to come back.

What needs the batch for itself (new weights) waits until no request runs; others then wait for that.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import NoReturn

from unmask.diffusion.batch import (
    Batch,
    Committed,
    Event,
    Filled,
    Finished,
    FinishReason,
    ForwardCounts,
    ForwardLost,
    NoRoom,
    Persisted,
    Prefilled,
    Reused,
)
from unmask.diffusion.decoding import DecodingParams
from unmask.errors import UnmaskError, UsageError
from unmask.serving.outbox import Admitted, Failed, Outbox, TracedBlock
from unmask.serving.tracing import Traced, TraceLog
from unmask.serving.waiting import WaitingLine
from unmask.telemetry import Recorder, metrics

__all__ = ["Engine", "EngineStopped", "Interrupted", "ModelFailed", "QueueFull", "Request"]

logger = logging.getLogger(__name__)

PHASES = ("prefill", "denoise", "persist", "fused")
"""What a row may do in a forward."""

_NO_TICKET = -1
_DELAY_S = (0.1, 30.0)
"""Shortest and longest time to ask a rejected client to wait."""


class QueueFull(Exception):
    """No room to wait, or no time; ``retry_after_s`` is when it may be otherwise."""

    def __init__(self, why: str, retry_after_s: float) -> None:
        super().__init__(f"the queue is {why}; retry in {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


class EngineStopped(Exception):
    """The engine takes nothing more: it drains, has stopped, or has failed."""


class ModelFailed(EngineStopped):
    """A forward raised; the log has the traceback."""


class Interrupted(Exception):
    """The request's forward was lost with a machine; what it had committed stands."""


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """One request from submission to its end; the engine's own, but for what it is made from."""

    prompt: Sequence[int]
    params: DecodingParams
    outbox: Outbox
    committed: Sequence[int] = ()
    cache_salt: str = ""
    """It shares cached blocks only with requests of the same salt."""
    priority: int = 0
    """It waits behind those of a higher one."""
    deadline: float | None = None
    """On the monotonic clock; by then the answer has to be complete."""
    canvas: bool = False
    """Whether provisional updates go to the outbox."""
    trace: TraceLog | None = None
    """Takes what each forward does, which then goes to the outbox with each block."""
    arrived: float = field(default_factory=time.monotonic)
    admitted: float = 0.0
    last_block: float | None = None
    """When the last block was committed."""
    ticket: int | None = None

    @property
    def tokens(self) -> int:
        """Cache positions it may come to use."""
        return len(self.prompt) + self.params.max_new_tokens

    def outcome(self) -> FinishReason | None:
        """How it has ended already, if the committed tokens leave nothing to generate."""
        if self.params.eos_token_id in self.committed:
            return "eos"
        return "length" if len(self.committed) >= self.params.max_new_tokens else None


@dataclass(frozen=True, slots=True)
class _Work:
    """What needs the batch for itself."""

    what: Callable[[Batch], None]
    done: "Future[None]"

    def do(self, batch: Batch) -> None:
        """Do it, and say how it went."""
        try:
            self.what(batch)
        except BaseException as error:
            self.done.set_exception(error)
            if not isinstance(error, UnmaskError):
                raise
        else:
            self.done.set_result(None)


class Engine:
    """The scheduler of one batch.

    Args:
        batch: What runs the forwards.
        recorder: Takes the metrics.
        max_queue_requests: Requests that may wait beyond those for which a row is free.
        max_queue_tokens: Prompt and ``max_new_tokens`` of waiting requests together; one alone may exceed it.
        on_failure: Called once, on the model thread, when a forward raised and the engine has ended for it.
    """

    def __init__(
        self,
        batch: Batch,
        recorder: Recorder,
        *,
        max_queue_requests: int = 256,
        max_queue_tokens: int = 1_000_000,
        on_failure: Callable[[], object] = lambda: None,
    ) -> None:
        self._batch = batch
        self._recorder = recorder
        self._max_queue_requests = max_queue_requests
        self._max_queue_tokens = max_queue_tokens
        self._on_failure = on_failure
        self._changed = threading.Condition()
        # All below is guarded by _changed.
        self._waiting: WaitingLine[Request] = WaitingLine()
        self._running: dict[int, Request] = {}
        self._cancelled: set[int] = set()
        self._works: deque[_Work] = deque()
        self._refusal: str | None = None
        self._stopping = False
        self._ended = False
        """Whether it has been stopped, or has failed."""
        self._service_seconds: float | None = None
        """How long a request has a row, in the mean of late; None before the first has ended."""
        self._thread = threading.Thread(target=self._run, name="unmask-model", daemon=True)

    # Any thread.

    def start(self) -> None:
        """Start the model thread."""
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request; what comes of it goes to its outbox.

        Raises:
            QueueFull: There is no room to wait, or its deadline would be over before its turn.
            EngineStopped: The engine takes nothing more.
        """
        with self._changed:
            self._check_room(request)
            outcome = request.outcome()
            if outcome is None:
                self._waiting.join(request)
                self._gauge()
                self._changed.notify()
                return
        request.outbox.put(Admitted(queue_seconds=0.0))
        request.outbox.put(Finished(_NO_TICKET, outcome, ForwardCounts(), kept_tokens=0))

    def cancel(self, request: Request) -> bool:
        """Let a request go, and say whether it was there; nothing happens if it has ended."""
        with self._changed:
            waited = self._waiting.leave(request)
            runs = not waited and request.ticket in self._running
            if runs and request.ticket is not None:
                self._cancelled.add(request.ticket)
            self._gauge()
            self._changed.notify()
        return waited or runs

    def conclude(self, request: Request, usage: ForwardCounts, *, kept: int) -> None:
        """Let a request go that has all it wanted, and count it as complete.

        Args:
            request: Whose caller found the end that the batch does not know of.
            usage: What it had taken by then; a forward that runs meanwhile is not its own.
            kept: Tokens that it kept.
        """
        if self.cancel(request):
            self._record_end(request, usage, kept)

    @property
    def load(self) -> tuple[int, int]:
        """Requests that run, and that wait."""
        with self._changed:
            return len(self._running), len(self._waiting)

    def alone(self, work: Callable[[Batch], None]) -> "Future[None]":
        """Have the model thread do ``work`` with the batch once no request runs; those that wait wait for it.

        An :class:`~unmask.errors.UnmaskError` that it raises is the future's. Any other means that the batch
        can be used no more: the engine ends, as when a forward fails.

        Raises:
            EngineStopped: The engine has stopped, or failed.
        """
        done: Future[None] = Future()
        with self._changed:
            if self._ended:
                raise EngineStopped(self._refusal)
            self._works.append(_Work(work, done))
            self._changed.notify()
        return done

    def drain(self) -> None:
        """Refuse what is new and go on with what is there."""
        with self._changed:
            self._refusal = self._refusal or "the server is shutting down; go on elsewhere"

    def resume(self) -> None:
        """Take what is new again, unless the engine has ended."""
        with self._changed:
            if not self._ended:
                self._refusal = None

    def stop(self) -> None:
        """End the model thread after the forward it is in; requests that are left fail."""
        with self._changed:
            self._refusal = self._refusal or "the server has stopped; go on elsewhere"
            self._stopping = self._ended = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()
        self._fail_all(EngineStopped)

    # The model thread.

    def _run(self) -> None:
        try:
            while self._wait():
                self.turn()
        except Exception:
            # Whatever a forward raises, the batch's state is unknown after it: end, and let all callers know.
            logger.exception("a forward failed; the engine ends")
            with self._changed:
                self._refusal = "the model has failed; go on elsewhere"
                self._ended = True
            self._fail_all(ModelFailed)
            self._on_failure()

    def _wait(self) -> bool:
        """Sleep until there is something to do; False to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._waiting or self._running or self._works)
            return not self._stopping

    def turn(self) -> None:
        """Let cancelled requests go, take waiting ones up, and run one forward if any request is active."""
        with self._changed:
            self._release_cancelled()
            work = self._works.popleft() if self._works and not self._running else None
            if not self._works and work is None:
                self._admit_waiting()
            self._gauge()
        if work is not None:
            work.do(self._batch)
        if self._batch.active:
            self._forward()
        self._recorder.gauge(metrics.CACHE_USAGE, self._batch.cache_usage)

    def _forward(self) -> None:
        started = time.monotonic()
        try:
            events = self._batch.step()
        except ForwardLost as error:
            self._interrupt(error)
            return
        ended = time.monotonic()
        self._record_forward(events, ended - started)
        self._trace(events, started, ended)
        for event in events:
            self._deliver(event)

    def _interrupt(self, error: ForwardLost) -> None:
        """Let all running requests go; those that wait may have better luck."""
        logger.error("a forward was lost, and with it its requests: %s", error)
        with self._changed:
            lost = dict(self._running)
            self._running.clear()
            self._gauge()
        for ticket, request in lost.items():
            self._batch.release(ticket)
            request.outbox.put(
                Failed(error=Interrupted("a part of the model cannot be had; go on elsewhere"))
            )

    def _release_cancelled(self) -> None:
        for ticket in self._cancelled:
            if self._running.pop(ticket, None):
                self._batch.release(ticket)
        self._cancelled.clear()

    def _admit_waiting(self) -> None:
        while self._waiting and self._batch.free_rows:
            request = self._waiting.first
            try:
                request.ticket = self._batch.admit(
                    request.prompt, request.params, request.committed, cache_salt=request.cache_salt
                )
            except NoRoom:
                return
            except UsageError as error:
                request.outbox.put(Failed(error=error))
                self._waiting.leave(request)
                continue
            self._waiting.leave(request)
            self._running[request.ticket] = request
            request.admitted = time.monotonic()
            queue_seconds = request.admitted - request.arrived
            self._recorder.observe(metrics.QUEUE_SECONDS, queue_seconds)
            self._recorder.count(metrics.PROMPT_TOKENS, len(request.prompt))
            request.outbox.put(Admitted(queue_seconds=queue_seconds))

    def _trace(self, events: Sequence[Event], started: float, ended: float) -> None:
        """Note what a forward did for the requests that want to know."""
        for ticket in {event.ticket for event in events}:
            request = self._running[ticket]
            if request.trace is not None:
                request.trace.note(
                    Traced(
                        end_seconds=ended - request.arrived,
                        seconds=ended - started,
                        rows=phases(events).total(),
                        events=tuple(event for event in events if event.ticket == ticket),
                    )
                )

    def _deliver(self, event: Event) -> None:
        request = self._running[event.ticket]
        match event:
            case Reused():
                self._recorder.count(metrics.PREFIX_HIT_TOKENS, event.tokens)
            case Filled():
                accepted = len(event.positions) - event.edited
                self._recorder.observe(metrics.TOKENS_ACCEPTED_PER_STEP, accepted)
                self._recorder.count(metrics.TOKENS_EDITED, event.edited)
                if request.canvas and request.outbox.put(event):
                    self._recorder.count(metrics.CANVAS_UPDATES_MERGED)
            case Committed():
                self._record_block(request, event)
                if request.trace is not None:
                    request.outbox.put(TracedBlock(forwards=request.trace.take()))
                request.outbox.put(event)
            case Finished():
                self._finish(request, event)

    def _finish(self, request: Request, event: Finished) -> None:
        now = time.monotonic()
        with self._changed:
            del self._running[event.ticket]
            served = now - request.admitted
            before = served if self._service_seconds is None else self._service_seconds
            self._service_seconds = before + 0.1 * (served - before)
            self._gauge()
        kept = event.kept_tokens - len(request.committed)
        self._record_end(request, event.usage, kept)
        request.outbox.put(replace(event, kept_tokens=kept))

    def _record_end(self, request: Request, usage: ForwardCounts, kept: int) -> None:
        self._recorder.observe(metrics.E2E, time.monotonic() - request.arrived)
        self._recorder.observe(metrics.TOKENS_PER_FORWARD, usage.tpf(kept))
        self._recorder.observe(metrics.TOKENS_PER_FORWARD_DECODE, usage.tpf_decode(kept))
        self._recorder.observe(metrics.TOKENS_PER_FORWARD_DENOISE, usage.tpf_denoise(kept))
        self._recorder.count(metrics.POSITIONS_EVALUATED, usage.positions)

    def _fail_all(self, kind: type[EngineStopped]) -> None:
        with self._changed:
            requests = [*self._waiting, *self._running.values()]
            works = [*self._works]
            self._waiting.clear()
            self._running.clear()
            self._works.clear()
            self._gauge()
        for work in works:
            work.done.set_exception(kind(self._refusal))
        for request in requests:
            request.outbox.put(Failed(error=kind(self._refusal)))

    def _check_room(self, request: Request) -> None:
        if self._refusal is not None:
            self._recorder.count(metrics.ADMISSION_REJECTIONS, reason="stopped")
            raise EngineStopped(self._refusal)
        served = 1.0 if self._service_seconds is None else self._service_seconds
        next_row_s = served / self._batch.rows
        shortest, longest = _DELAY_S
        retry_after = min(longest, max(shortest, next_row_s))
        room = self._max_queue_requests + self._batch.rows - len(self._running)
        if len(self._waiting) >= room:
            why = f"full: it holds at most {self._max_queue_requests} requests"
            self._reject("requests", why, retry_after)
        if self._waiting and self._waiting.tokens + request.tokens > self._max_queue_tokens:
            self._reject("tokens", f"full: it holds at most {self._max_queue_tokens} tokens", retry_after)
        if request.deadline is None or self._service_seconds is None:
            return
        ahead = self._waiting.ahead_of(request.priority)
        rows_wanted = ahead + 1 + len(self._running) - self._batch.rows
        wait, left = rows_wanted * next_row_s, request.deadline - time.monotonic()
        if wait > left:
            why = f"about {wait:.1f} s long, and the call has {left:.1f} s left"
            self._reject("deadline", why, retry_after)

    def _reject(self, reason: str, why: str, retry_after_s: float) -> NoReturn:
        self._recorder.count(metrics.ADMISSION_REJECTIONS, reason=reason)
        raise QueueFull(why, retry_after_s)

    def _gauge(self) -> None:
        self._recorder.gauge(metrics.REQUESTS_RUNNING, len(self._running))
        self._recorder.gauge(metrics.REQUESTS_WAITING, len(self._waiting))

    def _record_forward(self, events: Sequence[Event], seconds: float) -> None:
        rows = phases(events)
        for phase in PHASES:
            self._recorder.gauge(metrics.BATCH_ROWS, rows[phase], phase=phase)
        kind = forward_kind(rows)
        self._recorder.count(metrics.FORWARDS, kind=kind)
        self._recorder.observe(metrics.FORWARD_SECONDS, seconds, kind=kind)

    def _record_block(self, request: Request, event: Committed) -> None:
        now = time.monotonic()
        if request.last_block is None:
            self._recorder.observe(metrics.TIME_TO_FIRST_BLOCK, now - request.arrived)
        else:
            self._recorder.observe(metrics.INTER_BLOCK, now - request.last_block)
        request.last_block = now
        self._recorder.count(metrics.BLOCKS_COMMITTED)
        self._recorder.count(metrics.COMMITTED_TOKENS, len(event.token_ids))
        self._recorder.observe(metrics.FORWARDS_PER_BLOCK, event.forwards)


def phases(events: Sequence[Event]) -> Counter[str]:
    """How many rows of one forward did what: "prefill", "denoise", "persist" or both of these, "fused"."""
    filled = {event.ticket for event in events if isinstance(event, Filled)}
    persisted = {event.ticket for event in events if isinstance(event, Persisted)}
    return Counter(
        prefill=sum(isinstance(event, Prefilled) for event in events),
        denoise=len(filled - persisted),
        persist=len(persisted - filled),
        fused=len(filled & persisted),
    )


def forward_kind(rows: Counter[str]) -> str:
    """What one forward was: "prefill", "denoise" (fused or not), "persist", or "mixed" if rows differed."""
    kinds = {"denoise" if phase == "fused" else phase for phase in rows.elements()}
    return kinds.pop() if len(kinds) == 1 else "mixed"
