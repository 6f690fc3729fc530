"""Programs that end when the one who started them ends, however that ends.

:func:`bound` puts this module in front of a command line. It asks the kernel for a signal when its parent is
gone (``prctl(2)``, ``PR_SET_PDEATHSIG``) and becomes the program, so nothing stays behind to keep watch: the
process has its id from the beginning to the program's end. What the program starts in turn is its own affair.

To the kernel, the parent is the *thread* that started it: start from one that lives as long as the program
should. Linux alone has this; elsewhere the command line stays as it is. Only the standard library is used.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

__all__ = ["bound"]

_PR_SET_PDEATHSIG = 1


def bound(command: Sequence[str | os.PathLike[str]], number: int = signal.SIGKILL) -> list[str]:
    """Return ``command`` as a program to which the kernel sends signal ``number`` when this process ends."""
    given = [os.fspath(part) for part in command]
    if not sys.platform.startswith("linux"):
        return given
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(int(number)), *given]


def main() -> None:
    """Become the program that the command line names, behind the id of its parent and the signal."""
    parent, number = (int(text) for text in sys.argv[1:3])
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it ended before the kernel was asked
        os.kill(os.getpid(), number)
    for changed in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and a program inherits that
        signal.signal(changed, signal.SIG_DFL)
    os.execvp(sys.argv[3], sys.argv[3:])


if __name__ == "__main__":
    main()
