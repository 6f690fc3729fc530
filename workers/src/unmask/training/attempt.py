"""One attempt of a job, as a process: prepare, train, and say how it ended.

However the attempt ends, short of being killed, ``termination.json`` says so: with the
exit code that decides whether trying again can help. A process other than the first that
fails by itself leaves ``termination.rank-N.json``, and the first one passes on what it says.
"""

import faulthandler
import json
import os
import signal
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from unmask.errors import DataError, HungError, LostPeerError, UnmaskError, UsageError
from unmask.training.distributed import World, joined_world, lost_peer, rank_from_environment
from unmask.training.exporting import Exporter
from unmask.training.identity import first_difference
from unmask.training.model_copies import ModelCopies
from unmask.training.preparation import prepare
from unmask.training.run_folder import RunFolder, Termination, write_termination_log
from unmask.training.trainer import Ending, Observer, Trainer
from unmask.training.watchdog import Watchdog
from unmask_api.exit_codes import ExitCode
from unmask_api.places import SCRATCH, working_folder
from unmask_api.train_job import DiffusionTrainJob

__all__ = ["attempt"]

_REASONS = {
    ExitCode.USAGE: "UsageError",
    ExitCode.DATA: "DataError",
    ExitCode.MODEL: "ModelError",
    ExitCode.HUNG: "Hung",
    ExitCode.DIVERGED: "Diverged",
}
_STACKS = "UNMASK_STACKS"
"""Environment variable with the folder of the files in which stacks are written at SIGUSR1."""
_TERMINATION_LOG = "UNMASK_TERMINATION_LOG"
"""Environment variable with the file that a container's supervisor reads, as Kubernetes does."""


def attempt(job: DiffusionTrainJob, *, observe: Observer = lambda line: None) -> Termination:
    """Train ``job`` from where its run folder has come to; every process of the job calls this.

    SIGTERM and SIGINT ask all processes to save at the next step's end; they stay ignored
    otherwise until the process ends. To be called from the main thread.

    Raises:
        UnmaskError: What a person can mend, the same in all processes but where one has died.
    """
    own = _Attempt(job, observe)
    try:
        with joined_world() as world, ExitStack() as locks:
            return own.run(world, locks)
    except Exception as error:
        lost = lost_peer(error)
        if lost is None:
            own.failed_by(error)
            raise
        known = own.explained(lost)
        own.failed_by(known)
        raise known from error


class _Attempt:
    """The attempt of one process, and what it says of its end."""

    def __init__(self, job: DiffusionTrainJob, observe: Observer) -> None:
        self._job, self._observe = job, observe
        self._rank = rank_from_environment()
        self._folder = RunFolder(working_folder(job.spec.checkpoint.uri, os.environ))
        self._models = ModelCopies(job.spec, os.environ)
        self._keeps = False
        """Whether this process writes what the launcher of its machine reads of a run in an object store."""
        self._trainer: Trainer | None = None
        self._said = False
        limit_s = job.spec.run_policy.hang_timeout_seconds
        self._exporter = Exporter(hang_timeout_s=limit_s)
        self._watchdog = Watchdog(
            limit_s,
            report=lambda message: self.failed_by(HungError(message)),
        )

    def run(self, world: World, locks: ExitStack) -> Termination:
        """Train, while the first process holds the folder's lock in ``locks``."""
        stop_requested = _collect_stop_requests()
        locks.callback(_write_stacks_on_request(self._rank))
        _make_deterministic()
        try:
            with world.together():
                self._folder = RunFolder.of(self._job.spec.checkpoint.uri, os.environ)
                if world.leads:
                    locks.enter_context(self._folder.locked())
                    self._folder.forget_termination()
            self._join_attempt(world, locks)
            _refuse_different(self._job.to_json_dict(), world, "manifest", UsageError)
            with world.together():
                spec = self._models.described()
            with world.together():
                preparation = prepare(spec, world)
            _refuse_different(preparation.identity, world, "data or model", DataError)
            with world.together():
                if world.leads:
                    locks.enter_context(self._exporter.listening(self._job.spec.telemetry.port))
            self._trainer = Trainer(
                preparation,
                world,
                self._folder,
                stop_requested=stop_requested,
                observe=self._seen,
                progress=self._progress,
                keeps_log=self._keeps,
                fetch_first_model=self._models.complete,
            )
            with self._watchdog:
                ending = self._trainer.run()
                with world.together():
                    if world.leads:
                        self._folder.publish_log()
        except Exception as error:
            # Before this process leaves the others, so that they find out why.
            if lost_peer(error) is None:
                self.failed_by(error)
            raise
        termination = _ended(self._job, self._folder, self._trainer, ending)
        self._report(termination)
        world.wait_for_all()
        return termination

    def _join_attempt(self, world: World, locks: ExitStack) -> None:
        """Number the attempt of a run in an object store, and have a working copy on each machine."""
        mirror = self._folder.mirror
        if mirror is None:
            return
        with world.together():
            claim = mirror.claim() if world.leads else ""
        attempt = world.all_bytes(claim.encode())[0].decode()
        with world.together():
            try:
                mirror.join(attempt)
                if not world.leads and os.environ.get("LOCAL_RANK", "0") == "0":
                    self._keeps = locks.enter_context(self._folder.locked_beside())
            except OSError as error:
                raise UsageError(
                    f"{SCRATCH}: cannot write to {self._folder.path} ({error.strerror}); name another folder"
                ) from None

    def _seen(self, line: Mapping[str, Any]) -> None:
        self._exporter.observe(line)
        self._observe(line)

    def _progress(self, done: str) -> None:
        self._watchdog.beat(done)
        self._exporter.progress()

    def explained(self, lost: UnmaskError) -> UnmaskError:
        """``lost``, with the reason for it where that is known."""
        if self._watchdog.expired:
            return HungError(self._watchdog.expired)
        others = self._folder.reports_of_others(self._rank)
        return LostPeerError(f"{lost}: {'; '.join(others)}") if others else lost

    def failed_by(self, error: Exception) -> None:
        """Report that ``error`` has ended the attempt; the first report counts."""
        if isinstance(error, UnmaskError):
            # All processes raise the same, so that of the first one will do.
            reason = (
                "PeerLost" if isinstance(error, LostPeerError) else _REASONS.get(error.exit_code, "Failed")
            )
            self._failed(reason, error.exit_code, str(error), alone=False)
        else:
            self._failed("Failed", ExitCode.FAILURE, f"{type(error).__name__}: {error}", alone=True)

    def _failed(self, reason: str, code: ExitCode, message: str, *, alone: bool) -> None:
        if self._said:
            return
        trainer = self._trainer
        checkpoint = trainer.checkpoint if trainer else None
        self._report(
            Termination(
                reason=reason,
                exit_code=code,
                step=trainer.step if trainer else 0,
                message=" ".join(message.split()),
                checkpoint=checkpoint.place if checkpoint else None,
            ),
            alone=alone,
        )

    def _report(self, termination: Termination, *, alone: bool = False) -> None:
        self._said = True
        if self._rank == 0 or alone:
            self._folder.report(termination, rank=self._rank)
        if self._keeps:
            self._folder.report_beside(termination)
        log = os.environ.get(_TERMINATION_LOG)
        if log and (os.environ.get("LOCAL_RANK", "0") == "0" or alone):
            write_termination_log(Path(log), termination)


def _refuse_different(own: Mapping[str, Any], world: World, what: str, kind: type[UnmaskError]) -> None:
    """Refuse to train if a process was given other things than the first.

    Raises:
        UnmaskError: Of ``kind``, in all processes, naming the first that differs and its first field.
    """
    given = [json.loads(one) for one in world.all_bytes(json.dumps(own).encode())]
    for rank, theirs in enumerate(given):
        if (difference := first_difference(theirs, given[0])) is not None:
            field, other, first = difference
            raise kind(
                f"process {rank} has another {what} than process 0: {field} is {other}, not {first}; give "
                "all processes the same job and the same files"
            )


def _ended(job: DiffusionTrainJob, folder: RunFolder, trainer: Trainer, ending: Ending) -> Termination:
    checkpoint, model = trainer.checkpoint, folder.place(folder.model.name)
    messages = {
        Ending.COMPLETED: f"{job.metadata.name} is complete: the model is in {model}",
        Ending.ALREADY_COMPLETE: f"{job.metadata.name} was complete already: the model is in {model}",
        Ending.STOPPED: f"stopped on request after step {trainer.step}, and {_what_is_saved(trainer)}",
    }
    stopped = ending is Ending.STOPPED
    return Termination(
        reason=ending.value,
        exit_code=ExitCode.SAVED if stopped else ExitCode.OK,
        step=trainer.step,
        message=messages[ending],
        checkpoint=checkpoint.place if checkpoint else None,
    )


def _what_is_saved(trainer: Trainer) -> str:
    checkpoint = trainer.checkpoint
    if checkpoint is None:
        return "nothing is saved: all steps were skipped"
    if checkpoint.manifest.step == trainer.step:
        return "saved"
    return f"goes on from step {checkpoint.manifest.step}: the steps since were being skipped"


def _collect_stop_requests() -> Callable[[], bool]:
    """Note SIGTERM and SIGINT instead of dying of them; whoever wants an end at once has SIGKILL."""
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: received.append(number))
    return lambda: bool(received)


def _write_stacks_on_request(rank: int) -> Callable[[], object]:
    """At SIGUSR1 write the stacks of all threads, where a supervisor has named a folder; return what ends it.

    That works while the interpreter waits for a collective or a file, since it runs below it.
    """
    if not (folder := os.environ.get(_STACKS)):
        return lambda: None
    file = (Path(folder) / f"rank-{rank}.txt").open("w")
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)

    def end() -> None:
        faulthandler.unregister(signal.SIGUSR1)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # one that was asked for just now must not end it
        file.close()

    return end


def _make_deterministic() -> None:
    """Same inputs, processes and threads: the same bits."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
