"""Another checkpoint of a model that exists already, checked before any of its numbers are put in place."""

from pathlib import Path
from typing import Self

from unmask.errors import ModelError
from unmask.models.base import LanguageModel
from unmask.models.checkpoint_files import Checkpoint, matching_slots
from unmask.models.config import ModelConfig
from unmask.models.loading import check_finite, digest_of, fill
from unmask.models.registry import CONFIG

__all__ = ["Replacement"]


class Replacement:
    """A checkpoint, open, of which every tensor is known to fit and to be finite; a context manager.

    Attributes:
        revision: As :func:`unmask.models.loading.weights_digest`.
    """

    def __init__(self, path: Path, config: ModelConfig) -> None:
        """Read the whole checkpoint in the folder ``path``, for a model of ``config``.

        Raises:
            ModelError: As :func:`unmask.models.loading.load`, or if its configuration is another one.
        """
        self._checkpoint = Checkpoint(path)
        try:
            _check_config(self._checkpoint, config)
            self._slots = matching_slots(self._checkpoint)
            for slot in self._slots:
                check_finite(self._checkpoint, slot.name)
            self.revision = digest_of(self._checkpoint)
        except BaseException:
            self._checkpoint.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._checkpoint.close()

    def fill(self, model: LanguageModel) -> None:
        """Copy the numbers into the tensors of ``model``, in their dtype and on their device.

        Raises:
            ModelError: The files have changed since they were checked.
        """
        fill(model, self._slots, self._checkpoint)


def _check_config(checkpoint: Checkpoint, config: ModelConfig) -> None:
    ours, theirs = config.to_json_dict(), checkpoint.config.to_json_dict()
    differing = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if differing:
        key = differing[0]
        raise ModelError(
            f"{checkpoint.path / CONFIG}: {key}: got {theirs.get(key)!r}, the model has {ours.get(key)!r}"
            + (f" ({len(differing)} keys differ)" if len(differing) > 1 else "")
            + "; its weights can only be replaced by those of the same configuration"
        )
