"""Checkpoints that are written beside the training: copied to memory at once, written by a thread.

The copy is all that training waits for. At most one checkpoint is being written; whoever wants the next
waits for it. The buffers are kept from one to the next: memory that is not asked for again cannot be lacking
in the middle of a run.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from unmask.training.boxes import Box
from unmask.training.checkpoints import Checkpoint

__all__ = ["BackgroundWriter"]

_log = logging.getLogger(__name__)


class BackgroundWriter:
    """Runs one save at a time beside the caller."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._saved: Checkpoint | None = None
        self._error: BaseException | None = None
        self._buffers: dict[str, Tensor] = {}
        self.seconds = 0.0
        """Time that the last save took, from its start to its commit."""

    @property
    def failed(self) -> bool:
        """Whether the save at hand has ended with an error that :meth:`wait` will raise."""
        return self._error is not None

    def copy(self, boxes: Iterable[tuple[str, Box]]) -> list[tuple[str, Box]]:
        """A copy in host memory of those of ``boxes`` that this process is to write.

        Call it only when no save is at hand: the one before is overwritten.
        """
        assert self._thread is None, "wait for the save at hand"
        return [(name, self._copy(name, box)) for name, box in boxes if box.kept]

    def start(self, save: Callable[[], Checkpoint | None]) -> None:
        """Begin ``save``, whose result :meth:`wait` returns."""
        assert self._thread is None, "wait for the save at hand"
        # A daemon, so that a process that must end does not wait for a volume that hangs.
        self._thread = threading.Thread(target=self._run, args=(save,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> Checkpoint | None:
        """Wait for the save at hand, if there is one, and return what it has committed.

        Raises:
            UnmaskError: It could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        saved, self._saved = self._saved, None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return saved

    def settle(self, limit_s: float) -> Checkpoint | None:
        """Like :meth:`wait`, at the end of a run that has failed already: no error, and not for ever."""
        if self._thread is not None:
            self._thread.join(limit_s)
            if self._thread.is_alive():
                _log.warning("a checkpoint is still being written after %g s, and is given up", limit_s)
                return None
        try:
            return self.wait()
        except Exception as error:
            _log.warning("the last checkpoint failed: %s", error)
            return None

    def _run(self, save: Callable[[], Checkpoint | None]) -> None:
        started = time.monotonic()
        try:
            self._saved = save()
        except BaseException as error:
            self._error = error
        self.seconds = time.monotonic() - started

    def _copy(self, name: str, box: Box) -> Box:
        own = self._buffers.get(name)
        if own is None or (own.shape, own.dtype) != (box.tensor.shape, box.tensor.dtype):
            own = torch.empty(box.tensor.shape, dtype=box.tensor.dtype, device="cpu")
            self._buffers[name] = own
        own.copy_(box.tensor.detach())
        return replace(box, tensor=own)
