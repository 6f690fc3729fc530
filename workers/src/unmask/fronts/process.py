"""A process that serves: when it is asked to end, and whether its event loop turns."""

import asyncio
import signal
import threading

__all__ = ["asked_to_end", "turns"]

_TURN_S = 8.0
"""That the event loop may take to turn; probes wait ten seconds."""


def asked_to_end() -> asyncio.Event:
    """What is set by SIGTERM and SIGINT from now on, for the running event loop."""
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    return asked


def turns(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether the loop still does what it is given, as a probe over gRPC would notice by itself.

    To be asked from another thread, which waits for a while.
    """
    turned = threading.Event()
    loop.call_soon_threadsafe(turned.set)
    return turned.wait(_TURN_S)
