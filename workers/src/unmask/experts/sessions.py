"""Who may begin a session with a shard, and what it then gets: the same over every transport."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from google.protobuf.message import DecodeError

from unmask.experts.answering import Answering, Seen
from unmask.experts.frames import FrameError, Message
from unmask.experts.holding import Holding
from unmask.v1 import experts_pb2 as pb

__all__ = ["Refused", "Sessions"]


class Refused(Exception):
    """A session does not begin, or ends; says why."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code

    @property
    def told(self) -> str:
        """Code and message, as engines log what ends a session."""
        return f"{self.code.name}: {self}"


class Sessions:
    """The sessions of one shard.

    Args:
        holding: The experts.
        answering: Answers the frames.
        name: Of the shard.
        max_sessions: Engines at a time, one session each.
        max_tokens: Most rows in one frame.
    """

    def __init__(
        self, holding: Holding, answering: Answering, *, name: str, max_sessions: int, max_tokens: int
    ) -> None:
        self._holding = holding
        self._answering = answering
        self._name = name
        self._max_tokens = max_tokens
        self._max_sessions = max_sessions
        self._room = threading.BoundedSemaphore(max_sessions)

    def description(self) -> pb.DescribeResponse:
        """What the shard holds."""
        return pb.DescribeResponse(
            name=self._name,
            revision=self._holding.revision,
            shape=self._holding.shape.message(),
            placements=[
                pb.HeldPlacement(epoch=epoch, bounds=held.bounds, parts=sorted(held.parts))
                for epoch, held in sorted(self._holding.placements.items())
            ],
            draining=self._answering.draining,
            weight_bytes=self._holding.nbytes,
            max_tokens=self._max_tokens,
            activations=self._holding.activations,
        )

    def told(self) -> bytes:
        """The same as a session's message."""
        return pb.ShardFrame(accepted=self.description()).SerializeToString()

    @contextmanager
    def counted(self) -> Iterator[Seen]:
        """A session, from before its offer to its end; gives what remembers its frames.

        Raises:
            Refused: There are too many.
        """
        if not self._room.acquire(blocking=False):
            raise Refused(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"there are {self._max_sessions} sessions; no more are taken",
            )
        try:
            yield Seen()
        finally:
            self._room.release()

    def accepted(self, message: Message) -> bytes:
        """The answer to a session's first message, once it is known to be of the same model.

        Raises:
            Refused: It is not.
        """
        try:
            first = pb.ShardFrame.FromString(bytes(message))
        except DecodeError as error:
            raise _wrong("the first message is no ShardFrame") from error
        if first.WhichOneof("content") != "offer":
            raise _wrong("the first message must be an offer")
        if self._answering.draining:
            raise Refused(grpc.StatusCode.UNAVAILABLE, "the shard is shutting down; ask another one")
        if first.offer.revision != self._holding.revision:
            raise Refused(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"revision: the shard's weights are {self._holding.revision}, not those of the engine; start "
                "both from one model folder",
            )
        if first.offer.shape != self._holding.shape.message():
            raise Refused(
                grpc.StatusCode.FAILED_PRECONDITION, "shape: the model's experts have another shape"
            )
        return self.told()

    def answer(self, message: Message, seen: Seen, into: memoryview | None = None) -> Message:
        """The answer to a frame. See :meth:`Answering.answer`.

        Raises:
            Refused: There is not even a header to answer to.
        """
        try:
            return self._answering.answer(message, seen, into)
        except FrameError as error:
            raise _wrong(str(error)) from error


def _wrong(message: str) -> Refused:
    return Refused(grpc.StatusCode.INVALID_ARGUMENT, message)
