"""The run folder: what lies where, who may write to it, and how the run ended.

::

    checkpoints/step-00000100/   see docs/checkpoints.md
    metrics.jsonl                one line per step, measurement and stage
    exports/<stage>/             models of stages with `export` or `merge`
    references/<stage>/          what preference stages compare with: the model as they began
    model/                       the final model
    termination.json             how the last attempt ended
    termination.rank-1.json      how a process other than the first failed, if one did by itself
"""

import fcntl
import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unmask.errors import UsageError

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
        if not self.path.is_dir():
            return
        scratch = self.path / f".{name}.new"
        try:
            scratch.write_text(json.dumps(asdict(termination), indent=1) + "\n", encoding="utf-8")
            scratch.replace(self.path / name)
        except OSError as error:  # the exit code says the same, so the end is not held up
            _log.warning("%s cannot be written: %s", name, error)

    def reports_of_others(self, rank: int) -> list[str]:
        """What processes other than ``rank`` said when they failed, a line each."""
        said = []
        for path in sorted(self.path.glob("termination*.json")):
            other = int(path.stem.rpartition("-")[2]) if "-" in path.stem else 0
            try:
                report = json.loads(path.read_text(encoding="utf-8"))
                if other != rank:
                    said.append(f"process {other}: {report['message']}")
            except (OSError, ValueError, KeyError):
                continue
        return said


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
