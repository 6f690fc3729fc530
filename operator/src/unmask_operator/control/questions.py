"""Asks pods how far they are: short answers, soon or not at all, and never to be believed unread."""

import http.client
import ipaddress
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from unmask_operator.control.clock import Clock
from unmask_operator.decision import Answer, Question

__all__ = ["Questions"]

_log = logging.getLogger(__name__)

_SECONDS = 2.0
_BYTES = 4096
_REMEMBERED = 4096


class Questions:
    """The last answer of each pod that was asked."""

    def __init__(self, clock: Clock) -> None:
        """Make one that knows nothing."""
        self._clock = clock
        self._answers: OrderedDict[str, Answer] = OrderedDict()
        self._lock = threading.Lock()

    def answers(self) -> Mapping[str, Answer]:
        """Return the last answers by the pod's UID."""
        with self._lock:
            return dict(self._answers)

    def ask(self, questions: Sequence[Question]) -> None:
        """Ask one after the other; what is not answered in two seconds keeps its former answer."""
        for question in questions:
            try:
                text = _get(question.url)
            except (OSError, ValueError, http.client.HTTPException) as error:
                _log.debug("%s: %s", question.url, error)
                continue
            with self._lock:
                self._answers.pop(question.uid, None)
                self._answers[question.uid] = Answer(text, self._clock.now())
                while len(self._answers) > _REMEMBERED:
                    self._answers.popitem(last=False)


def _get(url: str) -> bytes:
    """Return what is at an address that is a number: names could lead anywhere."""
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname is None:
        raise ValueError("not an http address")
    ipaddress.ip_address(parts.hostname)
    end = time.monotonic() + _SECONDS
    connection = http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=_SECONDS)
    try:
        connection.request("GET", parts.path or "/", headers={"Connection": "close"})
        # A redirect is an answer like any other that is not 200: none.
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"status {response.status}")
        text = b""
        while len(text) < _BYTES and (piece := response.read1(_BYTES - len(text))):
            text += piece
            if time.monotonic() > end:
                raise ValueError("too slow")
        return text
    finally:
        connection.close()
