"""The run folder: what lies where, who may write to it, and how the run ended.

::

    checkpoints/step-00000100/   see docs/checkpoints.md
    metrics.jsonl                one line per step, measurement and stage
    exports/<stage>/             models of stages with `export` or `merge`
    references/<stage>/          what preference stages compare with: the model as they began
    model/                       the final model
    termination.json             how the last attempt ended
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

__all__ = ["RunFolder", "Termination"]

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
        """Remove the report of an earlier attempt."""
        (self.path / "termination.json").unlink(missing_ok=True)

    def report(self, termination: Termination) -> None:
        """Write how the attempt ended, at once or not at all; nothing if the folder could not be made."""
        if not self.path.is_dir():
            return
        scratch = self.path / ".termination.json.new"
        try:
            scratch.write_text(json.dumps(asdict(termination), indent=1) + "\n", encoding="utf-8")
            scratch.replace(self.path / "termination.json")
        except OSError as error:  # the exit code says the same, so the end is not held up
            _log.warning("termination.json cannot be written: %s", error)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
