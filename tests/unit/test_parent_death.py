"""Programs that end with the process that started them."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import parent_death
from parent_death import bound

# Starts `sleep`, says its id, and waits.
STARTER = """
import subprocess, sys, time
from parent_death import bound
print(subprocess.Popen(bound(["sleep", "600"])).pid, flush=True)
time.sleep(600)
"""
SCRIPTS = Path(parent_death.__file__).parent


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def test_a_program_is_killed_when_its_starter_is() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STARTER],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(SCRIPTS)},
    ) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        until(lambda: name(pid) == "sleep")
        starter.kill()
        starter.wait()
        until(lambda: not is_alive(pid))


def test_a_program_whose_starter_is_gone_before_it_begins_does_not_begin(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    command = bound(["touch", str(begun)], signal.SIGTERM)
    before = command.index(str(os.getpid()))
    command[before] = "1"  # some other process
    assert subprocess.run(command).returncode == -signal.SIGTERM
    assert not begun.exists()


def test_what_is_started_is_the_program_itself() -> None:
    assert subprocess.run(bound(["sh", "-c", "exit 7"])).returncode == 7
    with subprocess.Popen(bound(["sh", "-c", "kill -s PIPE $$; sleep 600"])) as process:
        # Python ignores this signal, and the program must not.
        assert process.wait(timeout=60) == -signal.SIGPIPE


def test_the_signal_comes_when_the_thread_ends_that_started_the_program() -> None:
    """What the docstring warns of."""
    started: list[subprocess.Popen[bytes]] = []
    go_on = threading.Event()

    def start() -> None:
        started.append(subprocess.Popen(bound(["sleep", "600"], signal.SIGTERM)))
        go_on.wait()

    thread = threading.Thread(target=start)
    thread.start()
    until(lambda: bool(started) and name(started[0].pid) == "sleep")
    assert started[0].poll() is None
    go_on.set()
    thread.join()
    assert started[0].wait(timeout=60) == -signal.SIGTERM
