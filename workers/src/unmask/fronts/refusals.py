"""Why a call is refused, as a gRPC status that a program can act on (google.rpc error details).

A refusal is read by others than who asked: proxies log it, and a gRPC status has to fit a few KiB of
metadata. So it is short, and it repeats nothing of a request but numbers and names.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

__all__ = ["Refused", "Violation", "invalid", "quoted"]

_MOST_VIOLATIONS = 20
_MOST_TOLD_BYTES = 750
"""As many are told; whoever mends them hears of the next. What is told goes into a status three times."""
_NAME = re.compile(r"[A-Za-z0-9._:/@+-]{1,128}")


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
    """INVALID_ARGUMENT for these fields, or as many of them as a status has room for."""
    sizes = accumulate(len(f"{one.field}: {one.description}; ".encode()) for one in violations)
    fitting = sum(size <= _MOST_TOLD_BYTES for size in sizes)
    told = violations[: max(1, min(fitting, _MOST_VIOLATIONS))]
    message = "; ".join(f"{violation.field}: {violation.description}" for violation in told)
    if len(violations) > len(told):
        message += f"; and {len(violations) - len(told)} more"
    return Refused(grpc.StatusCode.INVALID_ARGUMENT, message, violations=told)


def quoted(word: str) -> str:
    """A word of the request's as an error may repeat it: a name as it is, anything else by its length."""
    return repr(word) if _NAME.fullmatch(word) else f"a text of {len(word)} characters"


def _pack(message: Message) -> Any:
    packed = Any()
    packed.Pack(message)
    return packed
