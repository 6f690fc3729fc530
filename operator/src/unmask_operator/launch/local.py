"""Runs a job on this machine: the job's own TorchX application on the ``local_cwd`` scheduler.

A node of the job is a torchrun agent on localhost. The scheduler has no retries, so restarts are
decided here, from the exit code that the trainer leaves in ``<run>/termination.json`` (torchrun itself
always ends with 1). A first SIGINT or SIGTERM is passed on, and the run ends when the workers have:
torchrun gives them half a minute.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torchx.runner import Runner
from torchx.schedulers.local_scheduler import CWDImageProvider, LocalScheduler
from torchx.specs import AppDef, AppState, is_terminal

from unmask_api.exit_codes import ExitCode
from unmask_api.places import working_folder
from unmask_api.train_job import DiffusionTrainJob
from unmask_operator.launch.application import of_job
from unmask_operator.launch.attempts import Next, after
from unmask_operator.launch.job_file import canonical

__all__ = ["Outcome", "application", "run"]

_POLL_S = 0.2
_WORKER = "unmask.cli.main"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended."""

    exit_code: int
    message: str
    """One line for people; empty after success."""
    logs: Path
    """Folder of the last attempt's output."""
    restarts: int = 0
    """Counted restarts that it took."""
    stopped: bool = False
    """Whether a signal ended it; ``exit_code`` is then what shells make of the signal."""


def application(job: DiffusionTrainJob, job_file: Path, *, module: str = _WORKER) -> AppDef:
    """Return the application of ``job``, whose canonical form is at ``job_file``."""
    return of_job(job, str(job_file), python=sys.executable, module=module, elastic=False)


def run(
    job: DiffusionTrainJob, *, observe: Callable[[], None] = lambda: None, module: str = _WORKER
) -> Outcome:
    """Run ``job``, whose paths are resolved, to its end; to be called from the main thread.

    ``observe`` is called several times a second while it runs; ``module`` is what the workers execute.
    """
    restarts = 0
    policy = job.spec.run_policy
    with _stop_requests() as stops:
        for attempt in range(sys.maxsize):
            outcome = _attempt(job, attempt, stops, observe, module)
            following = after(outcome.exit_code, restarts=restarts, max_restarts=policy.max_restarts)
            if stops or following in (Next.DONE, Next.FAIL):
                break
            restarts += following is Next.RESTART
            job = _resuming(job)
    if stops and outcome.exit_code != ExitCode.OK:
        return replace(outcome, exit_code=128 + stops[0], restarts=restarts, stopped=True)
    return replace(outcome, restarts=restarts)


def _attempt(
    job: DiffusionTrainJob, attempt: int, stops: list[int], observe: Callable[[], None], module: str
) -> Outcome:
    folder = working_folder(job.spec.checkpoint.uri, os.environ)
    report = folder / "termination.json"
    report.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="unmask-") as scratch, _runner(stops) as runner:
        job_file = Path(scratch) / "job.json"
        job_file.write_bytes(canonical(job))
        app = application(job, job_file, module=module)
        app.roles[0].env.update(_environment(job, attempt))
        handle = runner.run(app, scheduler="local_cwd", cfg={"log_dir": str(folder / "logs")})
        while not is_terminal(state := _state(runner, handle)):
            if stops:
                runner.cancel(handle)
            observe()
            time.sleep(_POLL_S)
    observe()
    logs = folder / "logs" / "unmask" / handle.rpartition("/")[2]
    code, message = _report(report, succeeded=state is AppState.SUCCEEDED)
    return Outcome(exit_code=code, message=message, logs=logs)


def _state(runner: Runner, handle: str) -> AppState:
    status = runner.status(handle)
    assert status is not None, f"{handle} was started by this runner"
    return status.state


def _environment(job: DiffusionTrainJob, attempt: int) -> dict[str, str]:
    """Return what the agents need to find each other here, and their fair share of the cores."""
    parallelism = job.spec.parallelism
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "PET_RDZV_ENDPOINT": f"localhost:{_free_port() if parallelism.nodes > 1 else 0}",
        "PET_RDZV_ID": f"{job.metadata.name}-a{attempt}",
        "PET_LOCAL_ADDR": "localhost",
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // parallelism.processes)),
    }


def _free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def _resuming(job: DiffusionTrainJob) -> DiffusionTrainJob:
    """Return ``job`` for a further attempt, which goes on from what the attempts before have saved."""
    checkpoint = job.spec.checkpoint.model_copy(update={"resume": "Auto"})
    return job.model_copy(update={"spec": job.spec.model_copy(update={"checkpoint": checkpoint})})


def _report(path: Path, *, succeeded: bool) -> tuple[int, str]:
    """Return the exit code and message that the trainer left at ``path``."""
    if succeeded:
        return ExitCode.OK, ""
    try:
        report = json.loads(path.read_bytes())
        return int(report["exit_code"]) or ExitCode.FAILURE, str(report["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return ExitCode.FAILURE, "the trainer ended without a report"


class _PatientScheduler(LocalScheduler):  # type: ignore[misc]  # torchx has no type information
    """``local_cwd`` that lets processes end in their own time: they may be saving a checkpoint."""

    def _cancel_existing(self, app_id: str) -> None:
        replicas = [one for group in self._apps[app_id].role_replicas.values() for one in group]
        for replica in replicas:
            replica.terminate()
        for replica in replicas:
            replica.proc.wait()
        super()._cancel_existing(app_id)


@contextlib.contextmanager
def _runner(stops: list[int]) -> Iterator[Runner]:
    """Yield a runner for this machine; TorchX's handlers, which raise, give way to ours again."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    scheduler = _PatientScheduler("unmask", CWDImageProvider)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    with Runner("unmask", {"local_cwd": lambda *_, **__: scheduler}) as runner:
        yield runner


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collect the numbers of SIGINT and SIGTERM in a list instead of acting on them."""
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
