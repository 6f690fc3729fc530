"""``python -m unmask_operator.launch.supervisor ARGS...``: the first process of a pod, above torchrun.

It tells torchrun what differs from pod to pod, waits until the meeting point has an address, lets workers
save before torchrun's half minute of patience runs, answers ``/progress``, and says at the end what the
trainer said.

Progress is read from the run folder, not asked of the trainer: an answer then needs nothing of a process that
may hang, and every pod sees the same folder, whichever of them holds the first rank. Of a run in an object
store every pod has a working copy, in which one of its processes keeps the log.

Where the step stands still, ``/stacks`` has the workers write where they are (to files, at SIGUSR1), keeps
that in the run folder and answers with the innermost calls.
"""

import contextlib
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask_api.exit_codes import ExitCode
from unmask_api.places import working_folder
from unmask_operator.launch.report import LIMIT, CheckpointReport, Report, StackReport, Termination

__all__ = ["environment", "ending", "main", "progress", "stacks"]

_POLL_S = 0.1
_LAST_SECONDS = 15.0
"""What is left of the grace period when torchrun is told to end, whether the workers have saved or not."""
_TAIL = 65_536
"""Bytes at the end of the log that are looked at."""
_STACKS = "UNMASK_STACKS"
"""Variable with the folder in which workers write their stacks at SIGUSR1, each in ``rank-N.txt``."""
_STACKS_S = 1.0
"""Time for that: the interpreter does it between two instructions, or in a call that it waits for."""
_CALLS = 3
"""Innermost calls of a worker that are answered."""
_FRAME = re.compile(r'  File "(.+)", line (\d+) in (\S+)')
_OOM_EVENTS = Path("/sys/fs/cgroup/memory.events")
_MESSAGE = Path("/dev/termination-log")


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of torchrun in the pod that ``given`` is the environment of.

    torchrun guesses whether it is the host of the meeting from names, which on Kubernetes goes wrong.
    """
    host = "1" if given.get("JOB_COMPLETION_INDEX", "0") == "0" else "0"
    config = ",".join(filter(None, (given.get("PET_RDZV_CONF", ""), f"is_host={host}")))
    own = {"PET_RDZV_CONF": config}
    if address := given.get("POD_IP"):
        own["PET_LOCAL_ADDR"] = address
    return dict(given) | own


def progress(folder: Path, *, attempt: int, uri: str = "") -> Report | None:
    """Return how far the run in ``folder`` is; ``None`` before its first step.

    Args:
        folder: Of the run, or the working copy of one in an object store.
        attempt: The present attempt.
        uri: Where the run's files are; left out, in ``folder``.
    """
    steps = [line for line in _last_lines(folder / "metrics.jsonl") if line.get("kind") == "step"]
    if not steps:
        return None
    last, recent = steps[-1], [line for line in steps[-16:] if line.get("seconds")]
    seconds = sum(line["seconds"] for line in recent)
    return Report(
        attempt=attempt,
        step=last["step"],
        total_steps=last["total_steps"],
        stage=last.get("stage"),
        loss=_decimal(last.get("loss")),
        learning_rate=_decimal(last.get("lr")),
        tokens_per_second=_decimal(
            sum(line.get("tokens", 0) for line in recent) / seconds if seconds else None
        ),
        seconds_per_step=_decimal(seconds / len(recent) if recent else None),
        checkpoint=_checkpoint(folder / "checkpoints", f"{(uri or str(folder)).rstrip('/')}/checkpoints"),
    )


def ending(code: int, report: Mapping[str, Any] | None, *, out_of_memory: bool) -> Termination:
    """Return what to say at the end.

    Args:
        code: Exit code of torchrun, which ends with 1 whatever the workers ended with.
        report: What this attempt's trainer left in the run folder, if anything.
        out_of_memory: Whether the kernel has killed a process of this pod for want of memory.
    """
    if code == ExitCode.OK and report is None:
        return Termination(reason="Completed", exit_code=ExitCode.OK)
    if report is not None:
        with contextlib.suppress(KeyError, TypeError, ValueError):
            told = Termination(
                reason=str(report["reason"]),
                exit_code=int(report["exit_code"]),
                message=str(report["message"]),
                step=int(report["step"]),
                checkpoint=report.get("checkpoint"),
            )
            if (told.exit_code == ExitCode.OK) == (code == ExitCode.OK):
                return told
    if out_of_memory:
        return Termination(reason="OutOfMemory", exit_code=128 + signal.SIGKILL, message="out of memory")
    if code == ExitCode.OK:
        return Termination(reason="Completed", exit_code=ExitCode.OK)
    failed = code if 0 < code < 256 else ExitCode.FAILURE
    return Termination(
        reason="Failed", exit_code=failed, message="the trainer ended without a report; see the pod's log"
    )


def stacks(texts: Mapping[str, str], *, attempt: int) -> StackReport:
    """Return a line for each worker: the innermost calls of its main thread.

    Args:
        texts: What each wrote, by its name, as :mod:`faulthandler` does: the main thread comes last.
        attempt: The present attempt.
    """
    lines = []
    for name, text in sorted(texts.items()):
        main_thread = re.split(r"^(?:Current thread|Thread) ", text, flags=re.MULTILINE)[-1]
        frames = [
            f"{function} ({Path(path).name}:{number})"
            for path, number, function in _FRAME.findall(main_thread)
        ]
        where = " < ".join(frames[:_CALLS]) or "somewhere outside of Python"
        lines.append(f"{name} is in {where}"[:512])
    return StackReport(attempt=attempt, stacks=tuple(lines[:64]))


def main(args: Sequence[str]) -> int:
    """Run torchrun with ``args`` to its end and return the pod's exit code."""
    stops: list[float] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stops.append(time.monotonic()))
    uri = _run_uri(args)
    folder = working_folder(uri, os.environ)
    report = folder / "termination.json"
    before, killed = _identity(report), _oom_kills()
    own = environment(os.environ)
    _wait_for_name(own.get("PET_RDZV_ENDPOINT", ""), own, stops)
    if stops:
        code = 128 + signal.SIGTERM
    else:
        own.setdefault(_STACKS, tempfile.mkdtemp(prefix="unmask-stacks-"))
        launched: list[int] = []
        _answer(folder, uri, own, launched)
        process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *args], env=own)
        launched.append(process.pid)
        code = _watch(process.pid, stops, float(own.get("UNMASK_GRACE_SECONDS", "120")))
    said = ending(code, _changed(report, before), out_of_memory=_oom_kills() > killed)
    with contextlib.suppress(OSError):
        Path(os.environ.get("UNMASK_TERMINATION_LOG", _MESSAGE)).write_bytes(said.to_bytes())
    return said.exit_code


@dataclass(slots=True)
class _Patience:
    """Whom to tell to end, and when: first the workers, then torchrun."""

    launcher: int
    grace: float
    told_workers: bool = False
    told_launcher: bool = False

    def act(self, waited: float) -> None:
        if not self.told_workers:
            self.told_workers = True
            workers = _children(self.launcher)
            _signal(workers or [self.launcher])
        elif waited >= self.grace - _LAST_SECONDS and not self.told_launcher:
            self.told_launcher = True
            _signal([self.launcher])


def _watch(launcher: int, stops: list[float], grace: float) -> int:
    """Wait for ``launcher`` and bury whatever else dies; the first process of a pod inherits all orphans."""
    patience = _Patience(launcher, grace)
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == launcher:
            code = os.waitstatus_to_exitcode(status)
            return 128 - code if code < 0 else code
        if stops:
            patience.act(time.monotonic() - stops[0])
        if pid == 0:
            time.sleep(_POLL_S)


def _children(parent: int) -> list[int]:
    path = Path(f"/proc/{parent}/task/{parent}/children")
    try:
        return [int(one) for one in path.read_text().split()]
    except OSError:
        return []


def _signal(pids: Sequence[int], number: signal.Signals = signal.SIGTERM) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _wait_for_name(endpoint: str, own: Mapping[str, str], stops: list[float]) -> None:
    """Wait until the meeting point has an address, or for as long as others would wait for us."""
    settings = dict(one.partition("=")[::2] for one in own.get("PET_RDZV_CONF", "").split(","))
    host = endpoint.rpartition(":")[0]
    until = time.monotonic() + float(settings.get("join_timeout", "600"))
    while host and not stops and time.monotonic() < until:
        with contextlib.suppress(OSError):
            socket.getaddrinfo(host, None)
            return
        time.sleep(1.0)


def _write_stacks(launcher: Sequence[int], folder: Path, own: Mapping[str, str]) -> dict[str, str]:
    """Have the workers write their stacks, keep them in the run folder, and return them by rank.

    Only workers that have made their file are asked: before that, the signal would end them.
    """
    sizes = {path: path.stat().st_size for path in Path(own[_STACKS]).glob("rank-*.txt")}
    workers = _children(launcher[0]) if launcher else []
    if len(sizes) < len(workers) or not workers:
        return {}
    _signal(workers, signal.SIGUSR1)
    time.sleep(_STACKS_S)
    texts = {}
    for path, size in sizes.items():
        text = path.read_bytes()[size:][-_TAIL:].decode(errors="replace")
        texts[path.stem.replace("-", " ")] = text
        with contextlib.suppress(OSError):
            kept = folder / "stacks"
            kept.mkdir(exist_ok=True)
            (kept / f"attempt-{own.get('UNMASK_ATTEMPT', '0')}-{path.name}").write_text(
                text, encoding="utf-8"
            )
    return texts


def _answer(folder: Path, uri: str, own: Mapping[str, str], launcher: Sequence[int]) -> None:
    """Answer ``GET /progress`` and ``GET /stacks``, one request at a time, five seconds each."""
    attempt = int(own.get("UNMASK_ATTEMPT", "0"))

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 5

        def do_GET(self) -> None:
            body = b""
            if self.path == "/progress" and (report := progress(folder, attempt=attempt, uri=uri)):
                body = json.dumps(report.to_json_dict()).encode()
            elif self.path == "/stacks" and (texts := _write_stacks(launcher, folder, own)):
                body = stacks(texts, attempt=attempt).to_bytes()
            known = self.path in ("/progress", "/stacks")
            self.send_response(404 if not known else 200 if body else 503)
            body = body or b"{}"
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body[:LIMIT])))
            self.end_headers()
            self.wfile.write(body[:LIMIT])

        def log_message(self, *args: object) -> None:
            pass

    port = int(own.get("UNMASK_PROGRESS_PORT", "9091"))
    server = http.server.HTTPServer(("", port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True, name="progress").start()


def _run_uri(args: Sequence[str]) -> str:
    """Return where the run of the job file is that ``args`` name; the workers say what is wrong with it."""
    try:
        job = json.loads(Path(args[args.index("--job") + 1]).read_bytes())
        return str(job["spec"]["checkpoint"]["uri"])
    except (OSError, ValueError, LookupError, TypeError):
        return "/nonexistent"


def _last_lines(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            text = file.read()
    except OSError:
        return []
    lines = []
    for line in text.rpartition(b"\n")[0].splitlines():
        with contextlib.suppress(ValueError):  # the first may be cut off
            record = json.loads(line)
            if isinstance(record, dict):
                lines.append(record)
    return lines


def _checkpoint(folder: Path, place: str) -> CheckpointReport | None:
    """Return the newest checkpoint in ``folder``, which people find at ``place``.

    A folder has its name only once the checkpoint is committed, wherever the run's files are.
    """
    steps = {}
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            digits = path.name.rpartition("-")[2]
            if digits.isdecimal() and (path / "manifest.json").exists():
                steps[int(digits)] = path
    return CheckpointReport(step=max(steps), uri=f"{place}/{steps[max(steps)].name}") if steps else None


def _decimal(value: object) -> str | None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1e99:
        return None
    return f"{value:.6g}"


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _changed(path: Path, before: tuple[int, int] | None) -> Mapping[str, Any] | None:
    """Return what ``path`` holds, unless it is what an earlier attempt left."""
    if _identity(path) in (None, before):
        return None
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _oom_kills() -> int:
    try:
        lines = dict(line.split() for line in _OOM_EVENTS.read_text().splitlines())
        return int(lines.get("oom_kill", "0"))
    except (OSError, ValueError):
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
