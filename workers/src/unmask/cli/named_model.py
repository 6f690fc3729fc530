"""The option ``--config``: a model's shape, from a file or by name."""

from pathlib import Path
from typing import TYPE_CHECKING

from unmask.errors import UsageError

if TYPE_CHECKING:
    from unmask.models.config import ModelConfig

__all__ = ["config_named"]


def config_named(model: str) -> "ModelConfig":
    """The configuration in a ``config.json``, or that of a published model.

    Raises:
        UsageError: There is no published model of that name.
        ModelError: The file is missing, or no configuration.
    """
    from unmask.models.published import published_config
    from unmask.models.registry import read_config

    if model.endswith(".json"):
        return read_config(Path(model).parent, Path(model).name)
    try:
        return published_config(model)
    except UsageError as error:
        raise UsageError(f"--config: {error}") from None
