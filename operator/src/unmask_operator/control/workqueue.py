"""A queue of keys: each once in it, each worked on by one at a time, each slowed down when it fails."""

import heapq
import itertools
import random
import threading
from collections import deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from unmask_operator.control.clock import Clock

__all__ = ["TokenBucket", "WorkQueue"]

Key = TypeVar("Key", bound=Hashable)

_FIRST_DELAY = 0.05
_LONGEST_DELAY = 300.0


class TokenBucket:
    """So many a second in the long run, with bursts."""

    def __init__(self, clock: Clock, rate: float, burst: int) -> None:
        """Make a full one.

        Args:
            clock: its steady time is used.
            rate: tokens a second, above zero.
            burst: tokens it can hold, at least one.
        """
        self._clock = clock
        self._rate = rate
        self._burst = burst
        self._tokens = float(burst)
        self._then = clock.steady()
        self._lock = threading.Lock()

    def reserve(self) -> float:
        """Take a token, and return the seconds to wait until it is there."""
        with self._lock:
            now = self._clock.steady()
            self._tokens = min(self._burst, self._tokens + (now - self._then) * self._rate)
            self._then = now
            self._tokens -= 1
            return max(0.0, -self._tokens / self._rate)


class WorkQueue(Generic[Key]):
    """Keys to work on, as in client-go: a key added while it is worked on comes again when that is done."""

    def __init__(
        self,
        clock: Clock,
        *,
        retries: TokenBucket | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """Make an empty one.

        Args:
            clock: by which delays end.
            retries: bounds the retries of all keys together.
            jitter: 0 to 1; a delay is lengthened by up to a fifth, so that keys do not come back in step.
        """
        self._clock = clock
        self._retries = retries
        self._jitter = jitter
        self._ready: deque[Key] = deque()
        self._dirty: set[Key] = set()
        self._processing: set[Key] = set()
        self._later: list[tuple[float, int, Key]] = []
        self._due: dict[Key, float] = {}
        self._failures: dict[Key, int] = {}
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._closed = False
        self.adds = 0
        """How many keys were added, those that were there already aside."""
        self.retried = 0
        """How many times a key came back because it failed."""

    def __len__(self) -> int:
        """Return how many keys wait to be worked on now."""
        with self._changed:
            self._promote()
            return len(self._ready)

    def add(self, key: Key) -> None:
        """Ask for a key to be worked on."""
        with self._changed:
            self._add(key)

    def add_after(self, key: Key, seconds: float) -> None:
        """Ask for a key to be worked on later; of several times the earliest holds."""
        with self._changed:
            due = self._clock.steady() + seconds
            if self._closed or due >= self._due.get(key, float("inf")):
                return
            self._due[key] = due
            heapq.heappush(self._later, (due, next(self._order), key))
            self._changed.notify()

    def retry(self, key: Key, at_least: float = 0.0) -> float:
        """Ask for a key again after it failed: 50 ms, doubling to five minutes; return the seconds."""
        with self._changed:
            failures = self._failures.get(key, 0)
            self._failures[key] = failures + 1
            self.retried += 1
        delay: float = min(_LONGEST_DELAY, _FIRST_DELAY * 2.0 ** min(failures, 30)) * (1 + self._jitter() / 5)
        if self._retries is not None:
            delay = max(delay, self._retries.reserve())
        delay = max(delay, at_least)
        self.add_after(key, delay)
        return delay

    def forget(self, key: Key) -> None:
        """Start the key's delays anew: it went well."""
        with self._changed:
            self._failures.pop(key, None)

    def take(self, timeout: float | None = None) -> Key | None:
        """Return a key to work on, to be given to :meth:`done`; ``None`` when closed or after the timeout."""
        end = None if timeout is None else self._clock.steady() + timeout
        with self._changed:
            while True:
                self._promote()
                if self._ready:
                    key = self._ready.popleft()
                    self._dirty.discard(key)
                    self._processing.add(key)
                    return key
                now = self._clock.steady()
                if self._closed or (end is not None and now >= end):
                    return None
                times = [t for t in (end, self._later[0][0] if self._later else None) if t is not None]
                self._changed.wait(max(0.001, min(times) - now) if times else None)

    def done(self, key: Key) -> None:
        """Say that the work on a key is over."""
        with self._changed:
            self._processing.discard(key)
            if key in self._dirty:
                self._ready.append(key)
                self._changed.notify()

    def close(self) -> None:
        """Take no more keys and wake everybody who waits for one."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._later.clear()
            self._changed.notify_all()

    def next_due(self) -> float | None:
        """Return the steady time at which the next delayed key comes; ``None`` without one."""
        with self._changed:
            return min(self._due.values(), default=None)

    def _add(self, key: Key) -> None:
        if self._closed or key in self._dirty:
            return
        self._dirty.add(key)
        self.adds += 1
        if key not in self._processing:
            self._ready.append(key)
            self._changed.notify()

    def _promote(self) -> None:
        now = self._clock.steady()
        while self._later and self._later[0][0] <= now:
            due, _, key = heapq.heappop(self._later)
            if self._due.get(key) == due:
                del self._due[key]
                self._add(key)
