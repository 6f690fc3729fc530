"""An echo through shared memory, as plainly as Linux has it: what ``shards.py`` compares its own with.

The asking side copies bytes into memory and sends one byte over a Unix socket; the other process copies them
to where answers lie and sends a byte back; the asking side copies them out. Nothing is checked.
"""

import mmap
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["bare_memory", "echo_bare_memory"]

_BELL = b"\x01"


def echo_bare_memory(listener: socket.socket, nbytes: int) -> None:
    """Answer one connection after the other, in a thread."""

    def echo() -> None:
        while True:
            connection, _ = listener.accept()
            with connection:
                _, (descriptor,), *_ = socket.recv_fds(connection, 1, 1)
                memory = memoryview(mmap.mmap(descriptor, 2 * nbytes))
                os.close(descriptor)
                while connection.recv(1):
                    memory[nbytes:] = memory[:nbytes]
                    connection.send(_BELL)

    threading.Thread(target=echo, daemon=True).start()


@contextmanager
def bare_memory(path: Path, nbytes: int) -> Iterator[Callable[[bytes], bytes]]:
    """What sends so many bytes to the process that listens at ``path``, and gives those that come back."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(path))
        descriptor = os.memfd_create("bare")
        os.ftruncate(descriptor, 2 * nbytes)
        socket.send_fds(connection, [_BELL], [descriptor])
        memory = memoryview(mmap.mmap(descriptor, 2 * nbytes))
        os.close(descriptor)

        def ask(payload: bytes) -> bytes:
            memory[:nbytes] = payload
            connection.send(_BELL)
            connection.recv(1)
            return bytes(memory[nbytes:])

        yield ask
