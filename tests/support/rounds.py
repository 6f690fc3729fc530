"""A controller's part, played in a thread: a round every tenth of a second, whatever the API server says."""

import contextlib
import threading
from collections.abc import Callable, Iterator

from unmask_operator.control.api import ApiError, Unreachable

__all__ = ["repeated"]


@contextlib.contextmanager
def repeated(one_round: Callable[[], object]) -> Iterator[None]:
    """Call ``one_round`` again and again meanwhile; it may fail as in a conflict, the next sees to it."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(0.1):
            with contextlib.suppress(ApiError, Unreachable):
                one_round()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
