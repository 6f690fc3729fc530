"""The weights that a server computes with, and how others take their place without a restart.

A checkpoint is checked whole while requests go on: its configuration, its checksums, every tensor's shape,
and that every number is finite. Only then does the engine wait until no request runs, and the new numbers are
copied over the old ones, tensor by tensor, so that no second model has to fit into memory. What can still go
wrong then (a disk that fails) leaves a model of both, and ends the server.
"""

from pathlib import Path
from typing import Literal

from unmask.diffusion.batch import Batch
from unmask.errors import ModelError, UsageError
from unmask.fronts.refusals import quoted
from unmask.models.base import LanguageModel
from unmask.models.checkpoint_files import Checkpoint
from unmask.models.int8 import check_int8
from unmask.models.loading import Quantization, digest_of, load_open
from unmask.models.replacement import Replacement

__all__ = ["ServedWeights"]


class ServedWeights:
    """The weights of one server.

    Attributes:
        network: What computes with them.
        revision: What tells them from others; None if the model came without checksums.
    """

    def __init__(
        self,
        folder: Path,
        *,
        device: str = "cpu",
        quantization: Quantization = "none",
        root: Path | None = None,
        experts: Literal["here", "elsewhere"] = "here",
    ) -> None:
        """Load the model in ``folder``.

        Args:
            folder: A model folder.
            device: Where to compute.
            quantization: What weights are kept in, those that come later as well.
            root: The folder that other weights may come from; by default the one that holds ``folder``.
            experts: Elsewhere: without the routed experts, which shards have.

        Raises:
            ModelError, UsageError: As :func:`unmask.models.loading.load`.
        """
        self._root = root.resolve() if root else folder.resolve().parent
        if quantization == "int8":  # before anything is read
            check_int8(device)
        with Checkpoint(folder) as checkpoint:
            self.network: LanguageModel = load_open(
                checkpoint, device=device, quantization=quantization, reordered=True, experts=experts
            )
            sharded = experts == "elsewhere"
            self.revision = digest_of(checkpoint) if checkpoint.checked or sharded else None
        self._replaceable = not sharded

    def check(self, folder: str) -> Replacement:
        """Open the checkpoint in ``folder`` and check all of it; takes as long as to read it.

        Raises:
            UsageError: It is no folder, or not inside the root, or the experts are elsewhere.
            ModelError: It cannot take the place of these weights; says why.
        """
        if not self._replaceable:
            raise UsageError(
                "folder: the experts of this server are in shards, which would keep the old ones; start "
                "shards and server anew with the new model"
            )
        return Replacement(self._inside(folder), self.network.config)

    def _inside(self, folder: str) -> Path:
        """Where ``folder`` is, links followed."""
        told = f"folder: got {quoted(folder)}"
        try:
            path = (self._root / folder).resolve()
            inside = path.is_relative_to(self._root)
            there = inside and path.is_dir()
        except (OSError, RuntimeError, ValueError):  # too long, links in a circle, a zero byte
            raise UsageError(f"{told}, which cannot be the name of one; name a model folder") from None
        if not inside:
            raise UsageError(
                f"{told}, must be inside {self._root}; put the model there, or start the server with another "
                "--weights-root"
            )
        if not there:
            raise UsageError(f"{told}, and there is no such folder in {self._root}; copy the model there")
        return path

    def replace(self, new: Replacement, batch: Batch) -> None:
        """Compute with ``new`` from now on. To be called between two forwards, with no request active.

        Raises:
            RuntimeError: The checkpoint could not be read any more; the weights are of both.
        """
        batch.forget_stored()
        try:
            new.fill(self.network)
        except (ModelError, OSError) as error:
            raise RuntimeError(f"the weights are half new: {error}") from error
        self.revision = new.revision
