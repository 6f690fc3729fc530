"""The run folder: what lies where, who may write to it, and how the run ended.

::

    checkpoints/step-00000100/   see docs/checkpoints.md
    metrics.jsonl                one line per step, measurement and stage
    exports/<stage>/             models of stages with `export` or `merge`
    references/<stage>/          what preference stages compare with: the model as they began
    model/                       the final model
    termination.json             how the last attempt ended
    termination.rank-1.json      how a process other than the first failed, if one did by itself

A run in an object store has such a folder as a working copy, see :mod:`unmask.training.mirror`.
"""

import fcntl
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unmask.errors import UnmaskError, UsageError
from unmask.training.mirror import Mirror
from unmask.training.object_store import ObjectStore
from unmask_api.places import in_store, working_folder

__all__ = ["RunFolder", "Termination", "write_termination_log"]

_log = logging.getLogger(__name__)

_LOCK_WAIT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Termination:
    """How an attempt ended; for whoever decides what follows."""

    reason: str
    """One CamelCase word for programs."""
    exit_code: int
    step: int
    """Steps done."""
    message: str
    """One line for people."""
    checkpoint: str | None
    """The newest committed checkpoint."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of one run; may not exist yet."""

    path: Path
    mirror: Mirror | None = None
    """The run in an object store of which this is a working copy; None: the folder is all there is."""

    @classmethod
    def of(cls, uri: str, environment: Mapping[str, str]) -> "RunFolder":
        """The folder of the run whose files are at ``uri``.

        Raises:
            UsageError: They are in an object store, and the package for such is not installed.
        """
        path = working_folder(uri, environment)
        return cls(path, Mirror(ObjectStore(uri), path) if in_store(uri) else None)

    def place(self, name: str) -> str:
        """Where people find the file or folder ``name`` of the run."""
        return self.mirror.place(name) if self.mirror else str(self.path / name)

    @property
    def checkpoints(self) -> Path:
        """Holds one folder per checkpoint."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The log."""
        return self.path / "metrics.jsonl"

    @property
    def model(self) -> Path:
        """The final model."""
        return self.path / "model"

    def export(self, stage: str) -> Path:
        """The model at the end of ``stage``."""
        return self.path / "exports" / stage

    def reference(self, stage: str) -> Path:
        """The model at the beginning of ``stage``, a preference stage."""
        return self.path / "references" / stage

    def log_lines(self) -> Iterator[dict[str, Any]]:
        """The entries of the log; what is not one, as the last line of a killed process, is left out.

        Raises:
            UsageError: There is no log.
        """
        try:
            text = self.metrics.read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(
                f"{self.metrics}: cannot be read ({error.strerror}); name a run folder"
            ) from None
        for line in text.split("\n"):
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and {"kind", "step", "stage"} <= entry.keys():
                yield entry

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only writer.

        An earlier attempt that was killed may still be ending: its last process is waited for.

        Raises:
            UsageError: The folder cannot be made, or another run has held it for a minute.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("w")
        except OSError as error:
            raise UsageError(
                f"spec.checkpoint.uri: cannot write to {self.path} ({error.strerror}); name another folder"
            ) from None
        with file:
            deadline = time.monotonic() + _LOCK_WAIT_S
            while not _try_lock(file.fileno()):
                if time.monotonic() > deadline:
                    raise UsageError(
                        f"spec.checkpoint.uri: another run writes to {self.path}; wait for it, "
                        "or name another folder"
                    )
                time.sleep(0.1)
            yield

    @contextmanager
    def locked_beside(self) -> Iterator[bool]:
        """Be the only writer of the working copy on a machine that is not the leader's, if it can be."""
        with (self.path / ".lock").open("w") as file:
            yield _try_lock(file.fileno())

    def holds(self, path: Path) -> bool:
        """Whether the model that belongs in the folder ``path`` of the run is complete.

        Raises:
            UnmaskError: It is in an object store, which does not answer. So do the two that follow.
        """
        return self.mirror.holds(self._name(path)) if self.mirror else path.exists()

    def publish(self, path: Path) -> None:
        """Bring the model that was written to the folder ``path`` to where the run's files are."""
        if self.mirror:
            self.mirror.publish(self._name(path))

    def bring(self, path: Path) -> None:
        """Have the model that belongs in the folder ``path`` there, on this machine."""
        if self.mirror:
            self.mirror.bring(self._name(path))

    def publish_log(self) -> None:
        """Bring the log to where the run's files are.

        Raises:
            UnmaskError: That is an object store, which refuses.
        """
        if self.mirror:
            try:
                self.mirror.put_log()
            except OSError as error:
                raise UnmaskError(f"{error}; the run goes on from its newest checkpoint") from error

    def _name(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix()

    def remove_leftovers(self) -> None:
        """Remove what exports that were cut off have left behind."""
        for parent in (self.path, self.path / "exports", self.path / "references"):
            for path in parent.glob(".*-*"):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)

    def forget_termination(self) -> None:
        """Remove the reports of an earlier attempt."""
        for path in self.path.glob("termination*.json"):
            path.unlink(missing_ok=True)

    def report(self, termination: Termination, *, rank: int = 0) -> None:
        """Write how the attempt of process ``rank`` ended, at once or not at all.

        Nothing is written if the folder could not be made.
        """
        name = "termination.json" if rank == 0 else f"termination.rank-{rank}.json"
        if not self._write_report(termination, name) or not self.mirror or not self.mirror.number:
            return
        try:
            if rank == 0 and self.metrics.exists():
                self.mirror.put_log()
            self.mirror.report(name)
        except (OSError, UnmaskError) as error:
            _log.warning("%s cannot be put into the store: %s", name, error)

    def report_beside(self, termination: Termination) -> None:
        """Write how an attempt ended into the working copy only: for the launcher of this machine."""
        self._write_report(termination, "termination.json")

    def _write_report(self, termination: Termination, name: str) -> bool:
        if not self.path.is_dir():
            return False
        scratch = self.path / f".{name}.new"
        try:
            scratch.write_text(json.dumps(asdict(termination), indent=1) + "\n", encoding="utf-8")
            scratch.replace(self.path / name)
        except OSError as error:  # the exit code says the same, so the end is not held up
            _log.warning("%s cannot be written: %s", name, error)
            return False
        return True

    def reports_of_others(self, rank: int) -> list[str]:
        """What processes other than ``rank`` said when they failed, a line each."""
        said = []
        for name, text in sorted(self._reports().items()):
            stem = name.removesuffix(".json")
            other = int(stem.rpartition("-")[2]) if "-" in stem else 0
            try:
                if other != rank:
                    said.append(f"process {other}: {json.loads(text)['message']}")
            except (ValueError, KeyError):
                continue
        return said

    def _reports(self) -> dict[str, bytes]:
        if self.mirror:
            try:
                return self.mirror.reports()
            except OSError as error:
                _log.warning("the other processes' reports cannot be read: %s", error)
        found = {}
        for path in self.path.glob("termination*.json"):
            with suppress(OSError):
                found[path.name] = path.read_bytes()
        return found


def write_termination_log(path: Path, termination: Termination) -> None:
    """Write ``termination`` to the file from which a container's supervisor reads why it ended.

    Kubernetes takes 4096 bytes of it; a longer message is cut. A lost peer is no news beside a reason.
    """
    content = asdict(termination)
    content["message"] = content["message"][:2048]
    try:
        if termination.reason == "PeerLost" and path.exists() and path.stat().st_size:
            return
        path.write_text(json.dumps(content) + "\n", encoding="utf-8")
    except OSError as error:
        _log.warning("%s cannot be written: %s", path, error)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
