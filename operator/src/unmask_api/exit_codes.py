"""What a worker's exit code means: the one table that workers, the command line and the operator share."""

from enum import IntEnum

__all__ = ["ExitCode"]


class ExitCode(IntEnum):
    """Exit codes of ``unmask`` processes (64 and up follow BSD ``sysexits.h`` where a code fits)."""

    OK = 0
    FAILURE = 1
    """A defect or an unknown cause: a counted restart."""
    USAGE = 64
    """The manifest or a flag is wrong: the job fails."""
    DATA = 65
    """The data are missing or unusable: the job fails."""
    MODEL = 66
    """The checkpoint is missing or unusable: the job fails."""
    HUNG = 70
    """No progress, or a collective timed out: a counted restart."""
    DIVERGED = 71
    """The loss is not finite: the job fails."""
    SAVED = 75
    """Stopped on request after saving: an uncounted restart."""
