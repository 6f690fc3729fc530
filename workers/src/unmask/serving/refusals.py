"""Why a call is refused, as a gRPC status that a program can act on (google.rpc error details)."""

from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

__all__ = ["Refused", "Violation", "invalid"]


@dataclass(frozen=True, slots=True)
class Violation:
    """One field that is wrong."""

    field: str
    """Path in the request message, such as ``diffusion.threshold``."""
    description: str
    """What was found, what is allowed, what to change."""


class Refused(Exception):
    """Ends a call with a status other than OK."""

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        violations: Sequence[Violation] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.violations = tuple(violations)
        self.retry_after_s = retry_after_s

    def status(self) -> grpc.Status:
        """The status with its details packed."""
        number, _ = self.code.value
        details = [_pack(message) for message in self._details()]
        return rpc_status.to_status(status_pb2.Status(code=number, message=self.message, details=details))

    def _details(self) -> list[Message]:
        details: list[Message] = []
        if self.violations:
            bad_request = error_details_pb2.BadRequest()
            for violation in self.violations:
                bad_request.field_violations.add(field=violation.field, description=violation.description)
            details.append(bad_request)
        if self.retry_after_s is not None:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromNanoseconds(round(self.retry_after_s * 1e9))
            details.append(retry)
        return details


def invalid(violations: Sequence[Violation]) -> Refused:
    """INVALID_ARGUMENT for these fields."""
    message = "; ".join(f"{violation.field}: {violation.description}" for violation in violations)
    return Refused(grpc.StatusCode.INVALID_ARGUMENT, message, violations=violations)


def _pack(message: Message) -> Any:
    packed = Any()
    packed.Pack(message)
    return packed
