"""A frame and its answer: what a shard does with bytes, without a connection.

Whatever the bytes are, the answer is a frame, or an error that ends the session; the shard lives on.
"""

import logging
import math
import threading
import time
from collections import deque

from torch import Tensor

from unmask.experts.frames import (
    FrameError,
    Header,
    Message,
    Request,
    Status,
    decode_request,
    encode_refusal,
    encode_reply,
)
from unmask.experts.holding import Held, Holding, NotHeld, weighted_sums
from unmask.telemetry import Recorder, metrics

__all__ = ["MOST_CHOICES", "Answering", "Seen", "all_finite"]

logger = logging.getLogger(__name__)

MOST_CHOICES = 64
"""Experts per token; more than any model has."""
_REMEMBERED = 4096
"""Frames of a session whose numbers are known."""


class Seen:
    """The last numbers of a session's frames."""

    def __init__(self) -> None:
        self._order: deque[int] = deque()
        self._numbers: set[int] = set()

    def add(self, number: int) -> bool:
        """Take up a number; False if it is known."""
        if number in self._numbers:
            return False
        self._numbers.add(number)
        self._order.append(number)
        if len(self._order) > _REMEMBERED:
            self._numbers.remove(self._order.popleft())
        return True


class Answering:
    """Answers the frames of all sessions of one shard, computing one at a time.

    Args:
        holding: The experts.
        recorder: Takes the metrics.
        max_tokens: Most rows in one frame.
    """

    def __init__(self, holding: Holding, recorder: Recorder, *, max_tokens: int) -> None:
        self._holding = holding
        self._recorder = recorder
        self._max_tokens = max_tokens
        self._turn = threading.Lock()
        self.draining = False
        """Whether frames are refused, for the shard is about to end."""

    def answer(self, message: Message, seen: "Seen", into: memoryview | None = None) -> Message:
        """The answer to one message.

        Args:
            message: As it came in.
            seen: Numbers of the session's frames so far; takes up this one.
            into: Where to write the answer; if it does not fit in, and if it is a refusal, it comes as bytes.

        Raises:
            FrameError: There is not even a header to answer to.
        """
        arrived = time.perf_counter()
        try:
            request = decode_request(message)
        except FrameError as error:
            if error.header is None:
                self._count(Status.MALFORMED)
                raise
            return self._refuse(error.header, Status.MALFORMED, str(error))
        if not seen.add(request.header.sequence):
            told = f"sequence: {request.header.sequence} was answered already; number frames anew"
            return self._refuse(request.header, Status.DUPLICATE, told)
        return self._computed(request, arrived, into)

    def _computed(self, request: Request, arrived: float, into: memoryview | None) -> Message:
        header = request.header
        if self.draining:
            return self._refuse(header, Status.DRAINING, "the shard is shutting down; ask another one")
        try:
            held = self._holding.find(header.epoch, header.part)
            self._check(request, held)
            with self._turn:
                started = time.perf_counter()
                sums_TD = weighted_sums(
                    held.layers[header.layer], request.slots, request.weights, request.rows
                )
                self._holding.note(held, request.slots)
        except NotHeld as error:
            return self._refuse(header, Status.STALE, str(error))
        except FrameError as error:
            return self._refuse(header, Status.MALFORMED, str(error))
        except Exception:
            # One frame must not end the sessions of others; whoever sent it asks another shard.
            logger.exception("a frame of layer %s failed", header.layer)
            return self._refuse(header, Status.FAILED, "the shard failed; its log says why")
        if not all_finite(sums_TD):
            told = "the sums are infinite or not a number; so may be the rows"
            return self._refuse(header, Status.NOT_FINITE, told)
        ended = time.perf_counter()
        self._count(Status.OK)
        self._recorder.observe(metrics.SHARD_SECONDS, started - arrived, phase="queue")
        self._recorder.observe(metrics.SHARD_SECONDS, ended - started, phase="compute")
        self._recorder.count(metrics.SHARD_ROWS, header.tokens)
        return encode_reply(
            header,
            sums_TD.to("cpu", header.dtype),
            queue_us=round((started - arrived) * 1e6),
            compute_us=round((ended - started) * 1e6),
            into=into,
        )

    def _check(self, request: Request, held: Held) -> None:
        """See to it that the frame is one of this model's.

        Raises:
            FrameError: It is not.
        """
        header, shape = request.header, self._holding.shape
        limits = {
            "tokens": (header.tokens, self._max_tokens),
            "choices": (header.choices, min(MOST_CHOICES, shape.num_experts)),
        }
        for name, (got, most) in limits.items():
            if got > most:
                raise FrameError(f"{name}: got {got}, at most {most} are taken in a frame")
        if header.hidden_size != shape.hidden_size:
            raise FrameError(f"hidden size: got {header.hidden_size}, the model's is {shape.hidden_size}")
        if header.layer not in held.layers:
            raise FrameError(f"layer: got {header.layer}, layers with experts are {list(held.layers)[:100]}")
        low, high = (int(bound) for bound in request.slots.aminmax())
        if low < -1 or high >= held.num_experts:
            raise FrameError(
                f"experts: got {low} to {high}, the part's are 0 to {held.num_experts - 1}, or -1"
            )

    def _refuse(self, header: Header, status: Status, message: str) -> bytes:
        self._count(status)
        return encode_refusal(header, status, message)

    def _count(self, status: Status) -> None:
        self._recorder.count(metrics.SHARD_FRAMES, status=status.name.lower())


def all_finite(rows_TD: Tensor) -> bool:
    """Whether all numbers are finite; finite ones whose sum is not, do not count as such."""
    return math.isfinite(rows_TD.sum().item())  # added up as float32, without a copy that is one
