"""The client of those who run a server."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

import grpc

from unmask.client.channels import DEFAULT_TIMEOUT_S, Connecting
from unmask.client.errors import error_of
from unmask.transport_security import ClientTls
from unmask.v1 import control_pb2 as pb
from unmask.v1.control_pb2_grpc import ControlStub

__all__ = ["Control", "Load"]

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class Load:
    """Calls that a server has."""

    running: int
    waiting: int


class Control:
    """Talks to the control port of one server. Thread-safe.

    Args:
        address: ``HOST:PORT``.
        timeout_s: Time for a call, unless the call says otherwise.
        tls: Files to connect with, which are read now; plaintext if None.

    Raises:
        UsageError: The files cannot be used.

    Every call raises :class:`~unmask.client.errors.RequestError` where the server does not do as it is asked.
    """

    def __init__(
        self, address: str, *, timeout_s: float = DEFAULT_TIMEOUT_S, tls: ClientTls | None = None
    ) -> None:
        self._address, self._timeout_s = address, timeout_s
        self._channel = Connecting.reading(tls).channel(address)
        self._stub = ControlStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def abort(self, request_ids: Sequence[str]) -> tuple[str, ...]:
        """End calls by name; returns the names of those that were there."""
        request = pb.AbortRequest(request_ids=request_ids)
        return tuple(self._ask(lambda: self._stub.Abort(request, timeout=self._timeout_s)).request_ids)

    def abort_all(self) -> tuple[str, ...]:
        """End all calls; returns their names."""
        request = pb.AbortRequest(all=True)
        return tuple(self._ask(lambda: self._stub.Abort(request, timeout=self._timeout_s)).request_ids)

    def drain(self, *, timeout_s: float | None = None) -> Iterator[Load]:
        """Have the server take nothing new; yields what is left each time that it changes, until nothing is.

        The server goes on refusing until :meth:`resume`, even if the iterator is closed early.
        """
        call = self._stub.Drain(pb.DrainRequest(), timeout=timeout_s or self._timeout_s)
        try:
            for message in call:
                yield Load(message.running, message.waiting)
        except grpc.RpcError as error:
            raise error_of(error, self._address) from None
        finally:
            call.cancel()

    def resume(self) -> None:
        """Have the server take calls again."""
        self._ask(lambda: self._stub.Resume(pb.ResumeRequest(), timeout=self._timeout_s))

    def update_weights(self, folder: str, *, timeout_s: float | None = None) -> str:
        """Replace the weights by those in ``folder``, a path that the server can read.

        Returns their revision.

        The server finishes running calls first. An update that was begun goes on if the time is over.
        """
        request = pb.UpdateWeightsRequest(folder=folder)
        answer = self._ask(
            lambda: self._stub.UpdateWeights(request, timeout=timeout_s or self._timeout_s),
        )
        return answer.revision

    def _ask(self, call: Callable[[], _Answer]) -> _Answer:
        try:
            return call()
        except grpc.RpcError as error:
            raise error_of(error, self._address) from None
