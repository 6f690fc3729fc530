"""The operator's program as a process of its own, which ends with the tests that it is for."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from parent_death import bound

__all__ = ["operator_process"]

_TESTS = Path(__file__).parents[1]


@contextlib.contextmanager
def operator_process(program: str, *flags: str, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Run ``program``, Python that reads ``flags`` and may import what tests share; it adds to ``log``."""
    environment = os.environ | {"PYTHONPATH": str(_TESTS)}
    environment.pop("KUBERNETES_SERVICE_HOST", None)
    with log.open("ab") as written:
        command = bound([sys.executable, "-c", program, *flags])
        process = subprocess.Popen(command, env=environment, stderr=written)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
