"""What follows when an attempt of a job ends: the one table that a laptop and the operator share."""

from enum import Enum

from unmask_api.exit_codes import ExitCode

__all__ = ["FINAL", "Next", "after"]

FINAL = frozenset({ExitCode.USAGE, ExitCode.DATA, ExitCode.MODEL, ExitCode.DIVERGED})
"""What another attempt cannot mend."""


class Next(Enum):
    """What to do after an attempt."""

    DONE = "done"
    FAIL = "fail"
    RESTART = "restart"
    """Again from the newest checkpoint, and count it."""
    RESUME = "resume"
    """Again from the newest checkpoint, uncounted: the attempt was stopped on request and saved."""


def after(exit_code: int, *, restarts: int, max_restarts: int) -> Next:
    """Return what follows an attempt that ended with ``exit_code`` after ``restarts`` counted restarts."""
    if exit_code == ExitCode.OK:
        return Next.DONE
    if exit_code == ExitCode.SAVED:
        return Next.RESUME
    if exit_code in FINAL or restarts >= max_restarts:
        return Next.FAIL
    return Next.RESTART
