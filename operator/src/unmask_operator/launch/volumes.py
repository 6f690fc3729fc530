"""Volumes: ``pvc://NAME/path`` in manifests, a folder where the processes run.

Resolving gives the same job with absolute paths, which is what the trainer reads; it never meets a
``pvc://``.
"""

import posixpath
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unmask.errors import UsageError
from unmask_api.base import ApiModel
from unmask_api.train_job import DiffusionTrainJob
from unmask_operator.launch.admission import FieldPath, field_path

__all__ = ["claim_of", "claims", "resolve"]

_SCHEME = "pvc://"


def claims(job: DiffusionTrainJob) -> list[str]:
    """Return the names of the volumes that ``job`` mentions, in order."""
    return sorted({_claim(uri)[0] for _, uri in _uris(job, ()) if uri.startswith(_SCHEME)})


def claim_of(uri: str, field: str) -> tuple[str, str] | None:
    """Split ``pvc://NAME/path`` into name and path; ``None`` where ``uri`` is on no volume.

    Raises:
        UsageError: The path leaves its volume; the message blames ``field``.
    """
    if not uri.startswith(_SCHEME):
        return None
    name, below = _claim(uri)
    if below.split("/")[0] == "..":
        raise UsageError(f"{field}: the path leaves volume {name}; drop the '..'")
    return name, below


def resolve(job: DiffusionTrainJob, folders: Mapping[str, Path]) -> DiffusionTrainJob:
    """Return ``job`` with each ``pvc://NAME/path`` made a path in ``folders[NAME]``.

    Raises:
        UsageError: A volume of the manifest has no folder, a folder belongs to no volume of the
            manifest, a path leaves its volume, or the model is another job's, which only a cluster knows.
    """
    if (source := job.spec.model.init.job) is not None:
        raise UsageError(
            f"spec.model.init.job: job {source.name} is known to a cluster only; set init.uri to its model,"
            " which lies in the folder model below its checkpoint.uri"
        )
    claims = {path: _claim(uri) for path, uri in _uris(job, ()) if uri.startswith(_SCHEME)}
    names = sorted({name for name, _ in claims.values()})
    if unknown := sorted(set(folders) - set(names)):
        raise UsageError(
            f"--volume {unknown[0]}: the manifest has no such volume, it has: {', '.join(names) or 'none'}"
        )
    document: Any = job.to_json_dict()
    for path, (name, below) in claims.items():
        if name not in folders:
            raise UsageError(f"{field_path(path)}: volume {name} has no folder here; add --volume {name}=DIR")
        if below.split("/")[0] == "..":
            raise UsageError(f"{field_path(path)}: the path leaves volume {name}; drop the '..'")
        target = document
        for part in path[:-1]:
            target = target[part]
        target[path[-1]] = str(folders[name].absolute() / below)
    return DiffusionTrainJob.model_validate(document, strict=False)


def _uris(value: object, path: FieldPath) -> Iterator[tuple[FieldPath, str]]:
    """Yield every URI in ``value`` and its path; what free-form fields hold is not looked at."""
    if isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _uris(item, (*path, index))
    elif isinstance(value, ApiModel):
        for name, field in type(value).model_fields.items():
            yield from _uris(getattr(value, name), (*path, field.alias or name))
    elif isinstance(value, str) and path[-1] == "uri":
        yield path, value


def _claim(uri: str) -> tuple[str, str]:
    """Split ``pvc://NAME/path`` into the name and the path in normal form, ``.`` for the volume itself."""
    name, _, below = uri.removeprefix(_SCHEME).partition("/")
    return name, posixpath.normpath(below)
