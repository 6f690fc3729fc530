"""Logs of containers, as a kubelet answers for them: times, a start, a length, lines that are still to come.

A test prints lines and ends logs; it can have a stream cut in the middle, as a load balancer would.
"""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from unmask_operator.transport import Unreachable

__all__ = ["PodLogs", "waiting"]

Json = dict[str, Any]
_LONGEST_WAIT_S = 30.0


@dataclass
class _Log:
    lines: list[tuple[str, str]] = field(default_factory=list)
    ended: bool = False


class PodLogs:
    """The log of each pod by its UID; one container prints."""

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self._logs: dict[str, _Log] = {}
        self.cuts: list[int] = []
        """The next streams break after so many lines, one entry each."""
        self.streams = 0
        """Streams that were asked for."""

    def write(self, uid: str, text: str, *, stamp: str) -> None:
        """Print a line at ``stamp``, such as ``2026-11-27T10:00:00.5Z``."""
        with self._changed:
            self._logs.setdefault(uid, _Log()).lines.append((stamp, text))
            self._changed.notify_all()

    def end(self, uid: str) -> None:
        """The container has ended: followers come to an end."""
        with self._changed:
            self._logs.setdefault(uid, _Log()).ended = True
            self._changed.notify_all()

    def read(self, uid: str, query: Json, *, wait: bool) -> Iterator[bytes]:
        """Yield lines as the parameters of ``pods/log`` ask for them."""
        self.streams += 1
        cut = self.cuts.pop(0) if self.cuts else None
        start = 0
        with self._changed:
            there = list(self._logs.setdefault(uid, _Log()).lines)
        if since := query.get("sinceTime"):
            start = sum(stamp[:19] < since[:19] for stamp, _ in there)
        if "tailLines" in query:
            start = max(start, len(there) - int(query["tailLines"]))
        end = time.monotonic() + _LONGEST_WAIT_S
        told = 0
        while True:
            with self._changed:
                log = self._logs[uid]
                new, ended = log.lines[start:], log.ended
            for stamp, text in new:
                if told == cut:
                    raise Unreachable("planned: the log was cut")
                told += 1
                yield (f"{stamp} {text}\n" if query.get("timestamps") == "true" else f"{text}\n").encode()
            start += len(new)
            if told == cut:
                raise Unreachable("planned: the log was cut")
            follows = query.get("follow") == "true" and wait and not ended
            if not follows or time.monotonic() >= end:
                return
            with self._changed:
                if len(self._logs[uid].lines) == start and not self._logs[uid].ended:
                    self._changed.wait(0.5)


def waiting(pod: Json, container: str) -> str | None:
    """Return what a kubelet says of a container that has printed nothing yet; ``None`` if it has started."""
    name = pod["metadata"]["name"]
    for state in pod.get("status", {}).get("containerStatuses", ()):
        if state["name"] == container:
            now = state.get("state") or {}
            # A container that is to be started again still has the log of its last try.
            if "waiting" not in now or "terminated" in (state.get("lastState") or {}):
                return None
            return (
                f'container "{container}" in pod "{name}" is waiting to start: {now["waiting"].get("reason")}'
            )
    return f'container "{container}" in pod "{name}" is waiting to start: ContainerCreating'
