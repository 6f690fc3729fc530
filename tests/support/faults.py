"""Training in which some documents make bad gradients, and what it must come to, said without that."""

import ctypes
import errno
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from support.ranks import redirect, start
from unmask.errors import UnmaskError
from unmask_api.train_job import DiffusionTrainJob

Span = tuple[int, int]


def start_faulty(
    job: DiffusionTrainJob, bad: Mapping[int, Span], *, ranks: int = 1, kind: str = "nan"
) -> list[BaseProcess]:
    """Start ranks; a step of stage ``s`` that begins with a document in ``bad[s]`` has a bad gradient.

    Its kind is ``nan``, ``spike`` (a thousand times as long), or what should come of it: ``left out`` (the
    step is computed, and changes nothing), ``jumped`` (the documents are not in the stream).
    """
    text = job.model_dump_json(by_alias=True, exclude_none=True)
    return start(_faulty, text, dict(bad), kind, ranks=ranks)


def _faulty(text: str, bad: Mapping[int, Span], kind: str) -> None:
    from unmask.training.attempt import attempt
    from unmask.training.learner import Learner
    from unmask.training.stream import DocumentStream

    job = DiffusionTrainJob.from_json(text)
    redirect(2, Path(f"{job.spec.checkpoint.uri}.rank-{os.environ['RANK']}.log"))
    is_bad = False
    lay_out: Callable[..., Any] = DocumentStream.step
    norm: Callable[..., float] = Learner.gradient_norm
    step: Callable[..., None] = Learner.step

    def watched(self: DocumentStream, cursor: int, **values: Any) -> Any:
        nonlocal is_bad
        first, end = bad.get((self._key >> 96) & 0xFF, (0, 0))
        is_bad = first <= cursor < end
        return lay_out(self, cursor + (end - first if kind == "jumped" and cursor >= first else 0), **values)

    def spoilt(self: Learner, totals: Any) -> float:
        if is_bad and kind in {"nan", "spike"}:
            self.weights.gradient.mul_(float("nan") if kind == "nan" else 1000.0)
        return norm(self, totals)

    def left_out(self: Learner, *values: Any, **options: Any) -> None:
        if is_bad and kind == "left out":
            self.weights.changed()
        else:
            step(self, *values, **options)

    DocumentStream.step = watched  # type: ignore[method-assign]
    Learner.gradient_norm = spoilt  # type: ignore[method-assign]
    Learner.step = left_out  # type: ignore[method-assign]
    try:
        sys.exit(attempt(job).exit_code)
    except UnmaskError as error:
        sys.exit(error.exit_code)


def start_patched(
    job: DiffusionTrainJob, patch: Callable[..., None], *values: Any, ranks: int = 1, **environment: str
) -> list[BaseProcess]:
    """Start ranks that first call ``patch(rank, *values)``, a function of a module, to spoil something."""
    text = job.model_dump_json(by_alias=True, exclude_none=True)
    return start(_patched, text, patch, values, environment, ranks=ranks)


def _patched(
    text: str, patch: Callable[..., None], values: tuple[Any, ...], environment: dict[str, str]
) -> None:
    from unmask.training.attempt import attempt

    job = DiffusionTrainJob.from_json(text)
    os.environ.update(environment)
    redirect(2, Path(f"{job.spec.checkpoint.uri}.rank-{os.environ['RANK']}.log"))
    patch(int(os.environ["RANK"]), *values)
    try:
        sys.exit(attempt(job).exit_code)
    except UnmaskError as error:
        sys.exit(error.exit_code)


def nothing(rank: int) -> None:
    """Spoil nothing."""


def no_room(rank: int, victim: int, after: int) -> None:
    """From file number ``after`` on, ``victim`` has no room for files of tensors."""
    from unmask.training import checkpoints

    write, written = checkpoints.save_file, 0

    def save_file(*values: Any, **options: Any) -> None:
        nonlocal written
        written += 1
        if rank == victim and written > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(*values, **options)

    checkpoints.save_file = save_file


def slow_writes(rank: int, log: str, steps: int, limit_s: float) -> None:
    """No file of tensors is written before the log has ``steps`` more lines, or ``limit_s`` have passed."""
    from unmask.training import checkpoints

    write = checkpoints.save_file

    def save_file(*values: Any, **options: Any) -> None:
        wanted, deadline = _lines(log) + steps, time.monotonic() + limit_s
        while _lines(log) < wanted and time.monotonic() < deadline:
            time.sleep(0.002)
        write(*values, **options)

    checkpoints.save_file = save_file


def at_step(rank: int, victim: int, step: int, what: str) -> None:
    """In its attempt's step number ``step``, ``victim`` is to ``die``, ``raise``, ``sleep`` or ``seize``.

    To seize is to hold the interpreter's lock, so that no thread of it runs any more.
    """
    from unmask.training import trainer, watchdog

    if rank != victim:
        return
    if what == "seize":
        watchdog._BACKSTOP_S = 1.0
    gradient_step, taken = trainer.gradient_step, 0

    def spoilt(*values: Any, **options: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == step:
            match what:
                case "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "raise":
                    raise ValueError("a defect of rank 1")
                case "sleep":
                    time.sleep(1000)
                case "seize":
                    ctypes.PyDLL(None).sleep(1000)
        return gradient_step(*values, **options)

    trainer.gradient_step = spoilt


def small_files(rank: int, victim: int, size: int) -> None:
    """``victim`` may write no file longer than ``size`` bytes."""
    if rank == victim:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def in_folder(rank: int, folders: list[str]) -> None:
    """Each rank looks for relative paths in a folder of its own."""
    os.chdir(folders[rank])


def start_unlike(jobs: list[DiffusionTrainJob]) -> list[BaseProcess]:
    """Start one rank for each of ``jobs``."""
    texts = [job.model_dump_json(by_alias=True, exclude_none=True) for job in jobs]
    return start(_unlike, texts, ranks=len(jobs))


def _unlike(texts: list[str]) -> None:
    _patched(texts[int(os.environ["RANK"])], nothing, (), {})


def _lines(path: str) -> int:
    try:
        return Path(path).read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0
