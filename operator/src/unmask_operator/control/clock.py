"""The two clocks of the operator, in one place so that tests can turn them."""

import threading
import time
from typing import Protocol

__all__ = ["Clock", "SystemClock"]

# On Linux it goes on while the machine is suspended, so a lease does not outlive a closed lid.
_STEADY = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class Clock(Protocol):
    """Tells the time and waits."""

    def now(self) -> float:
        """Return seconds since 1970-01-01 UTC; may jump."""

    def steady(self) -> float:
        """Return seconds that only ever grow, at the rate of real time."""

    def wait(self, seconds: float, stop: threading.Event) -> bool:
        """Wait so long or until ``stop`` is set; return whether it is."""


class SystemClock:
    """The clocks of the machine."""

    def now(self) -> float:
        """Return seconds since 1970-01-01 UTC."""
        return time.time()

    def steady(self) -> float:
        """Return seconds since the machine started, sleep included."""
        return time.clock_gettime(_STEADY)

    def wait(self, seconds: float, stop: threading.Event) -> bool:
        """Wait so long or until ``stop`` is set; return whether it is."""
        return stop.wait(seconds)
