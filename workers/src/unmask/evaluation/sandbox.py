"""Run a program that a model wrote: in a process of its own, with little time, memory and disk.

These limits keep a program from hanging the evaluation or filling the machine. They are no wall against
one that means harm: it runs as the same user, can read files, reach the network, and leave a process
behind in a session of its own. Where that matters, evaluate in a container without network and without
anything worth reading.
"""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["Limits", "Verdict", "run_program"]

Verdict: TypeAlias = Literal["passed", "failed", "timed out"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one program may use."""

    seconds: float = 10.0
    """Wall time; of the processor as much, rounded up."""
    memory_bytes: int = 1 << 30
    """Address space."""
    file_bytes: int = 1 << 20
    """Of any file that it writes."""
    processes: int = 64
    """Of the user; the kernel does not count root's."""


_GUARD = """
import os, resource, sys
token, cpu, memory, size, processes = sys.argv[1], *map(int, sys.argv[2:])
source = sys.stdin.read()
for kind, most in (
    (resource.RLIMIT_CPU, cpu),
    (resource.RLIMIT_AS, memory),
    (resource.RLIMIT_FSIZE, size),
    (resource.RLIMIT_NPROC, processes),
    (resource.RLIMIT_NOFILE, 64),
    (resource.RLIMIT_CORE, 0),
):
    resource.setrlimit(kind, (most, most))
answer = os.dup(1)
nothing = os.open(os.devnull, os.O_RDWR)
for stream in (0, 1, 2):
    os.dup2(nothing, stream)
sys.argv = ["program"]
exec(compile(source, "program", "exec"), {"__name__": "__main__"})
os.write(answer, token.encode())
"""
"""Set the limits, run the program, and say that it came to its end: leaving early is not passing."""


def run_program(source: str, limits: Limits | None = None) -> Verdict:
    """Whether the program ``source`` comes to its end without an error.

    It runs in an isolated interpreter (the standard library alone) in an empty folder, with no
    environment and no input; what it prints is thrown away, and what it started in its session is killed.
    """
    limits = limits or Limits()
    token = secrets.token_hex(16)
    command = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        _GUARD,
        token,
        *map(str, (-int(-limits.seconds // 1), limits.memory_bytes, limits.file_bytes, limits.processes)),
    ]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            command,
            cwd=folder,
            env={},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process,
    ):
        try:
            said, _ = process.communicate(source.encode(), timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            return "timed out"
        finally:
            _kill_session(process.pid)
            process.wait()
    if process.returncode == -signal.SIGXCPU:
        return "timed out"
    return "passed" if process.returncode == 0 and said == token.encode() else "failed"


def _kill_session(leader: int) -> None:
    """Kill what is left of the processes that the program started."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return
