"""One attempt of a job, as a process: prepare, train, and say how it ended.

However the attempt ends, short of being killed, ``termination.json`` says so: with the
exit code that decides whether trying again can help.
"""

import logging
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from unmask.errors import UnmaskError
from unmask.training.distributed import World, joined_world
from unmask.training.preparation import prepare
from unmask.training.run_folder import RunFolder, Termination
from unmask.training.trainer import Ending, Observer, Trainer
from unmask_api.exit_codes import ExitCode
from unmask_api.train_job import DiffusionTrainJob

__all__ = ["attempt"]

_log = logging.getLogger(__name__)

_REASONS = {
    ExitCode.USAGE: "UsageError",
    ExitCode.DATA: "DataError",
    ExitCode.MODEL: "ModelError",
    ExitCode.DIVERGED: "Diverged",
}


def attempt(job: DiffusionTrainJob, *, observe: Observer = lambda line: None) -> Termination:
    """Train ``job`` from where its run folder has come to; every process of the job calls this.

    SIGTERM and SIGINT ask all processes to save at the next step's end; they stay ignored
    otherwise until the process ends. To be called from the main thread.

    Raises:
        UnmaskError: What a person can mend, the same in all processes.
    """
    stop_requested = _collect_stop_requests()
    _make_deterministic()
    folder = RunFolder(Path(job.spec.checkpoint.uri))
    with joined_world() as world, ExitStack() as locks:
        trainer: Trainer | None = None
        try:
            with world.together():
                if world.leads:
                    locks.enter_context(folder.locked())
                    folder.forget_termination()
            with world.together():
                preparation = prepare(job.spec, world)
            trainer = Trainer(preparation, world, folder, stop_requested=stop_requested, observe=observe)
            ending = trainer.run()
        except UnmaskError as error:
            _report(world, folder, trainer, error.exit_code, str(error))
            raise
        except Exception as error:
            _report(world, folder, trainer, ExitCode.FAILURE, f"{type(error).__name__}: {error}")
            raise
        termination = _ended(job, folder, trainer, ending)
        if world.leads:
            folder.report(termination)
        world.wait_for_all()
        return termination


def _ended(job: DiffusionTrainJob, folder: RunFolder, trainer: Trainer, ending: Ending) -> Termination:
    checkpoint = trainer.checkpoint
    messages = {
        Ending.COMPLETED: f"{job.metadata.name} is complete: the model is in {folder.model}",
        Ending.ALREADY_COMPLETE: f"{job.metadata.name} was complete already: the model is in {folder.model}",
        Ending.STOPPED: f"stopped on request after step {trainer.step}, and {_what_is_saved(trainer)}",
    }
    stopped = ending is Ending.STOPPED
    return Termination(
        reason=ending.value,
        exit_code=ExitCode.SAVED if stopped else ExitCode.OK,
        step=trainer.step,
        message=messages[ending],
        checkpoint=str(checkpoint.path) if checkpoint else None,
    )


def _what_is_saved(trainer: Trainer) -> str:
    checkpoint = trainer.checkpoint
    if checkpoint is None:
        return "nothing is saved: all steps were skipped"
    if checkpoint.manifest.step == trainer.step:
        return "saved"
    return f"goes on from step {checkpoint.manifest.step}: the steps since were being skipped"


def _report(world: World, folder: RunFolder, trainer: Trainer | None, code: ExitCode, message: str) -> None:
    if world.leads:
        checkpoint = trainer.checkpoint if trainer else None
        folder.report(
            Termination(
                reason=_REASONS.get(code, "Failed"),
                exit_code=code,
                step=trainer.step if trainer else 0,
                message=" ".join(message.split()),
                checkpoint=str(checkpoint.path) if checkpoint else None,
            )
        )


def _collect_stop_requests() -> Callable[[], bool]:
    """Note SIGTERM and SIGINT instead of dying of them; whoever wants an end at once has SIGKILL."""
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: received.append(number))
    return lambda: bool(received)


def _make_deterministic() -> None:
    """Same inputs, processes and threads: the same bits."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
