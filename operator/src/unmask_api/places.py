"""Where a run's files are: the folder that its uri names, or beside an object store a working copy of them.

Trainer, launchers and command line have to agree on that folder, so this is the one place that knows it.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

__all__ = ["SCRATCH", "STORES", "in_store", "model_copies", "working_folder"]

SCRATCH = "UNMASK_SCRATCH"
"""Environment variable with the folder for working copies; left out, ``~/.cache/unmask/scratch``."""

STORES = ("s3", "gs", "az", "abfs", "memory")
"""Object stores that runs and models may be in. ``memory`` is one process's own, for tests: no manifest
may name it."""


def in_store(uri: str) -> bool:
    """Whether ``uri`` is in an object store."""
    return uri.partition("://")[0] in STORES and "://" in uri


def working_folder(uri: str, environment: Mapping[str, str]) -> Path:
    """Return the folder of a run whose files are at ``uri``: that itself, unless it is in an object store.

    Two uris never share a working copy; one uri has the same in every process of a machine.
    """
    if not in_store(uri):
        return Path(uri)
    plain = uri.rstrip("/")
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", plain.partition("://")[2])[-48:].strip("-.")
    return _scratch(environment) / f"{name}-{hashlib.sha256(plain.encode()).hexdigest()[:12]}"


def model_copies(environment: Mapping[str, str]) -> Path:
    """Return the folder for copies of models that are in object stores."""
    return _scratch(environment) / "models"


def _scratch(environment: Mapping[str, str]) -> Path:
    named = environment.get(SCRATCH)
    return Path(named) if named else Path.home() / ".cache" / "unmask" / "scratch"
