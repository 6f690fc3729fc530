"""Ends a process that makes no progress: stacks of all threads to stderr, a report, exit code 70.

A thread watches, which works as long as whatever hangs has released the interpreter, as collectives, files
and sleeps have. Should the interpreter itself stand still, a timer below it writes the stacks and ends the
process with exit code 1 half a minute later.
"""

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from unmask_api.exit_codes import ExitCode

__all__ = ["Watchdog"]

_log = logging.getLogger(__name__)

_LINGER_S = 2.0
"""From the stacks to the end: the other processes hang as well, and are to write theirs."""
_REPORT_S = 10.0
"""Longest time for a report, which may hang on the same volume."""
_BACKSTOP_S = 30.0


class Watchdog:
    """A context that must hear :meth:`beat` at least every so often; without a limit it does nothing."""

    def __init__(self, limit_s: float | None, *, report: Callable[[str], None]) -> None:
        """``report`` is called with one line before the process ends, in another thread."""
        self._limit_s, self._report = limit_s, report
        self._last, self._done = time.monotonic(), "the start"
        self._stopped = threading.Event()
        self._expired = ""

    def __enter__(self) -> Self:
        self.beat("the start")
        if self._limit_s is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        if self._limit_s is not None:
            faulthandler.cancel_dump_traceback_later()

    @property
    def expired(self) -> str:
        """What was too late, once the limit has passed; empty before."""
        return self._expired

    def beat(self, done: str) -> None:
        """Say that there is progress: what is done."""
        self._last, self._done = time.monotonic(), done
        if self._limit_s is not None:
            faulthandler.dump_traceback_later(self._limit_s + _BACKSTOP_S, exit=True, file=2)

    def _watch(self) -> None:
        assert self._limit_s is not None
        while (left := self._last + self._limit_s - time.monotonic()) > 0:
            if self._stopped.wait(left):
                return
        self._expired = (
            f"no progress for {self._limit_s:g} s after {self._done} (runPolicy.hangTimeoutSeconds); the "
            "stacks are in the log; the run goes on from its newest checkpoint"
        )
        _log.critical("%s", self._expired)
        sys.stderr.flush()
        faulthandler.dump_traceback(file=2, all_threads=True)
        time.sleep(_LINGER_S)
        reporter = threading.Thread(target=self._report, args=(self._expired,), daemon=True)
        reporter.start()
        reporter.join(_REPORT_S)
        os._exit(int(ExitCode.HUNG))
