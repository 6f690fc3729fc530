"""What a server may answer instead of a result.

::

    RequestError
    +-- InvalidRequest      a field is wrong (``violations``), or names a model or request that cannot be
    +-- UnsupportedRequest  a valid wish that this server cannot meet
    +-- NotAllowed          the server knows who this client is, and does not let it in
    +-- Overloaded          the queue is full: wait ``retry_after_s``, then ask again
    +-- Unavailable         nobody answers there, or the server is going away: go on elsewhere
    +-- DeadlineExceeded    the time is over
    +-- Cancelled           this side gave up
    +-- Aborted             whoever runs the server has ended the call
    +-- ServerFailed        a defect of the server's
"""

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from unmask.errors import UnmaskError, UsageError

__all__ = [
    "Aborted",
    "Cancelled",
    "DeadlineExceeded",
    "FieldViolation",
    "InvalidRequest",
    "NotAllowed",
    "Overloaded",
    "RequestError",
    "ServerFailed",
    "Unavailable",
    "UnsupportedRequest",
    "error_of",
]


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field that is wrong."""

    field: str
    """Path in ``unmask.v1.GenerateRequest``, such as ``diffusion.threshold``."""
    description: str


class RequestError(UnmaskError):
    """A call that ended without a result.

    Attributes:
        code: Name of the gRPC status code.
        violations: What is wrong with the request, field by field.
        retry_after_s: How long the server asks to wait before the next attempt; None if it does not say.
    """

    retryable: ClassVar[bool] = False
    """Whether the same call may succeed later, or elsewhere."""

    def __init__(
        self,
        message: str,
        *,
        code: str,
        violations: tuple[FieldViolation, ...] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.violations = violations
        self.retry_after_s = retry_after_s


class InvalidRequest(RequestError):
    """The request is wrong as it stands."""

    exit_code = UsageError.exit_code


class UnsupportedRequest(RequestError):
    """The server does not do this."""

    exit_code = UsageError.exit_code


class NotAllowed(RequestError):
    """The server does not let this client in, by the names in its certificate."""

    exit_code = UsageError.exit_code


class Overloaded(RequestError):
    """Too many requests wait already."""

    retryable = True


class Unavailable(RequestError):
    """No server there, or one that is going away."""

    retryable = True


class DeadlineExceeded(RequestError):
    """The time for the call is over."""


class Cancelled(RequestError):
    """The call was cancelled."""


class Aborted(RequestError):
    """Whoever runs the server has ended the call."""


class ServerFailed(RequestError):
    """The server failed in a way that it did not foresee."""


_KINDS: dict[grpc.StatusCode, type[RequestError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: InvalidRequest,
    grpc.StatusCode.ALREADY_EXISTS: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.FAILED_PRECONDITION: InvalidRequest,
    grpc.StatusCode.UNIMPLEMENTED: UnsupportedRequest,
    grpc.StatusCode.PERMISSION_DENIED: NotAllowed,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.ABORTED: Aborted,
}
"""What is not in the table is a :class:`ServerFailed`."""

_OUR_OWN = ("Locally cancelled", "Channel closed")
"""How grpc begins to say that this side cancelled. Otherwise the server did, as one does that shuts down."""

_Call: TypeAlias = grpc.Call | grpc.aio.AioRpcError


def error_of(error: grpc.RpcError, address: str) -> RequestError:
    """The typed error that a failed call stands for."""
    assert isinstance(error, _Call), error
    code = error.code()
    details = error.details() or code.name
    kind = _KINDS.get(code, ServerFailed)
    if kind is Cancelled and not details.startswith(_OUR_OWN):
        kind = Unavailable
    violations, retry_after_s = _details(error)
    return kind(
        f"{address}: {details}{_hint(details)}",
        code=code.name,
        violations=violations,
        retry_after_s=retry_after_s,
    )


def _hint(details: str) -> str:
    """What to look for where there was no connection, from what grpc and its TLS library say of it."""
    if not details.startswith("failed to connect"):
        return ""
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return "; has a CA in --tls-ca signed the server's certificate, and is it still valid?"
    if "Hostname Verification Check failed" in details:
        return "; its certificate is for another name: give that one with --tls-server-name"
    if "WRONG_VERSION_NUMBER" in details:
        return "; it does not speak TLS: leave --tls-ca out"
    if "Socket closed" in details or "andshake" in details:
        return (
            "; it hung up: does it speak TLS (--tls-ca), and has its CA for clients signed this one's "
            "certificate (--tls-cert)?"
        )
    return "; is `unmask serve` running there?"


def _details(error: _Call) -> tuple[tuple[FieldViolation, ...], float | None]:
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]  # it asks for what both have
    except ValueError:  # details that contradict the status, as a proxy might make them
        status = None
    violations: list[FieldViolation] = []
    retry_after_s = None
    for detail in (status or status_pb2.Status()).details:
        bad_request, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(bad_request):
            violations += [
                FieldViolation(item.field, item.description) for item in bad_request.field_violations
            ]
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
    return tuple(violations), retry_after_s
