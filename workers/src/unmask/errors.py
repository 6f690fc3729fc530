"""The errors a person can mend, and the exit codes they end a process with.

::

    UnmaskError
    +-- UsageError      64  manifest, flag or argument
    +-- DataError       65  training or evaluation data
    +-- ModelError      66  checkpoint, weights, config.json, tokenizer
    +-- HungError       70  no progress for too long
    +-- DivergedError   71  training cannot go on: the loss is not finite
    +-- LostPeerError    1  another process of the job has ended

A message is one line: what is wrong and where (field, file, line), what was
found, what is allowed, and what to change. Anything that is not an
:class:`UnmaskError` is a defect of ours and keeps its traceback.
"""

from typing import ClassVar

from unmask_api.exit_codes import ExitCode

__all__ = [
    "DataError",
    "DivergedError",
    "HungError",
    "LostPeerError",
    "ModelError",
    "UnmaskError",
    "UsageError",
]


class UnmaskError(Exception):
    """Something the caller can mend; ``exit_code`` is what a command ends with."""

    exit_code: ClassVar[ExitCode] = ExitCode.FAILURE


class UsageError(UnmaskError):
    """A manifest, flag or argument is wrong."""

    exit_code = ExitCode.USAGE


class DataError(UnmaskError):
    """A data file is missing, empty, or holds something that cannot be used."""

    exit_code = ExitCode.DATA


class ModelError(UnmaskError):
    """A checkpoint, its weights, its configuration or its tokenizer cannot be used."""

    exit_code = ExitCode.MODEL


class DivergedError(UnmaskError):
    """Training produced a loss or gradient that is not finite."""

    exit_code = ExitCode.DIVERGED


class HungError(UnmaskError):
    """Nothing has happened for longer than it may."""

    exit_code = ExitCode.HUNG


class LostPeerError(UnmaskError):
    """Another process of the job has ended, and this one cannot go on without it."""
