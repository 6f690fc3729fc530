"""What a worker says of itself: at ``/progress`` while it runs, in its termination message when it ends.

Both are short JSON documents, written by :mod:`unmask_operator.launch.supervisor` and read by the operator,
which believes neither more than their schema: whoever can reach the port can answer.
"""

import json
from typing import Annotated, Self

from pydantic import Field, StringConstraints, ValidationError

from unmask_api.base import ApiModel, DecimalString

__all__ = ["LIMIT", "CheckpointReport", "Report", "StackReport", "Termination"]

LIMIT = 4096
"""Bytes that either document may have; Kubernetes cuts termination messages there."""

Whole = Annotated[int, Field(ge=0, le=2**53)]
Line = Annotated[str, StringConstraints(max_length=2048)]


class CheckpointReport(ApiModel):
    """The newest committed checkpoint, as the run folder shows it."""

    step: Whole
    """The step that it was taken after."""
    uri: Line
    """Where it lies, in the worker."""


class Report(ApiModel):
    """How far training is."""

    attempt: Whole
    """The attempt that answers."""
    step: Whole
    """Optimiser steps done, over all stages."""
    total_steps: Whole
    """Optimiser steps of all stages."""
    stage: Annotated[str, StringConstraints(max_length=64)] | None = None
    """Name of the stage of the last step."""
    loss: DecimalString | None = None
    """Training loss of the last step."""
    learning_rate: DecimalString | None = None
    """Learning rate of the last step."""
    tokens_per_second: DecimalString | None = None
    """Tokens trained on per second, over the last steps."""
    seconds_per_step: DecimalString | None = None
    """Time that a step takes, over the last steps."""
    checkpoint: CheckpointReport | None = None
    """The newest committed checkpoint."""

    @classmethod
    def read(cls, text: str | bytes) -> Self | None:
        """Read an answer; ``None`` where it is not one."""
        if len(text) > LIMIT:
            return None
        try:
            return cls.from_json(text)
        except ValidationError:
            return None


class StackReport(ApiModel):
    """What the processes of a pod are doing, one line each."""

    attempt: Whole
    """The attempt that answers."""
    stacks: Annotated[tuple[Annotated[str, StringConstraints(max_length=512)], ...], Field(max_length=64)]
    """Which process, and where it is: the innermost calls first."""

    @classmethod
    def read(cls, text: str | bytes) -> Self | None:
        """Read an answer; ``None`` where it is not one."""
        if len(text) > LIMIT:
            return None
        try:
            return cls.from_json(text)
        except ValidationError:
            return None

    def to_bytes(self) -> bytes:
        """Return the document, with as many processes as fit into :data:`LIMIT`."""
        stacks = list(self.stacks)
        while len(text := json.dumps({"attempt": self.attempt, "stacks": stacks}).encode()) > LIMIT:
            stacks.pop()
        return text


class Termination(ApiModel):
    """How a worker ended."""

    reason: Annotated[str, StringConstraints(max_length=64)]
    """One CamelCase word for programs."""
    exit_code: Annotated[int, Field(ge=0, le=255)]
    """Exit code of the worker."""
    message: str = ""
    """One line for people."""
    step: Whole = 0
    """Steps done."""
    checkpoint: Line | None = None
    """The newest committed checkpoint."""

    @classmethod
    def read(cls, text: str) -> Self | None:
        """Read a termination message; ``None`` where it is the end of a log, or cut off."""
        try:
            return cls.from_json(text)
        except ValidationError:
            return None

    def to_bytes(self) -> bytes:
        """Return the document, its message shortened so that all fits into :data:`LIMIT`."""
        document = self.to_json_dict()
        text = json.dumps(document).encode()
        while len(text) > LIMIT:
            excess = len(text) - LIMIT
            document["message"] = document["message"][: -max(1, excess // 6)]
            text = json.dumps(document).encode()
        return text
