"""Copies of what is in an object store: a model, a checkpoint, or a whole run, verified as far as can be."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

from unmask.errors import ModelError, UnmaskError, UsageError
from unmask.models.folder import CHECKSUMS, verify_checksums
from unmask.training.checkpoints import MANIFEST, Checkpoint
from unmask.training.manifest import CheckpointManifest
from unmask.training.object_store import ObjectStore
from unmask_api.places import in_store

__all__ = ["Fetched", "fetch"]


@dataclass(frozen=True, slots=True)
class Fetched:
    """What was copied."""

    files: int
    nbytes: int
    verified: int
    """Of the files, those that were compared with a digest of theirs."""


@overload
def fetch(uri: str, target: Path, *, if_missing: Literal[False] = False) -> Fetched: ...


@overload
def fetch(uri: str, target: Path, *, if_missing: bool) -> Fetched | None: ...


def fetch(uri: str, target: Path, *, if_missing: bool = False) -> Fetched | None:
    """Copy all objects below ``uri`` into the folder ``target``, which appears when all are there and right.

    Args:
        uri: A place in an object store.
        target: The folder; its parents are made.
        if_missing: Do nothing, and return ``None``, where it exists, also where another process has made it
            meanwhile: several may share a volume.

    Raises:
        UsageError: ``target`` exists, and that is not allowed; or ``uri`` is in no object store.
        ModelError: There is nothing, or a file is not what its checksums or manifest say.
        UnmaskError: The store does not answer.
    """
    if not in_store(uri):
        raise UsageError(f"{uri}: not in an object store; give a uri such as s3://bucket/path")
    if target.exists() and if_missing:
        return None
    if target.exists():
        raise UsageError(f"{target}: exists already; choose another folder, or remove it")
    store = ObjectStore(uri)
    try:
        sizes = store.sizes()
        if not sizes:
            raise ModelError(f"{uri}: holds nothing; correct the uri")
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            for name in sizes:
                _refuse_to_leave(scratch, name)
                (scratch / name).parent.mkdir(parents=True, exist_ok=True)
                store.download(name, scratch / name)
            verified = _verify(scratch, store)
            scratch.chmod(0o755)
            try:
                scratch.replace(target)
            except OSError:
                if if_missing and target.is_dir():  # another process was faster
                    return None
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise UnmaskError(f"{error}; see to the store, its credentials and this machine's disk") from error
    return Fetched(len(sizes), sum(sizes.values()), verified)


def _refuse_to_leave(folder: Path, name: str) -> None:
    if ".." in name.split("/") or name.startswith("/"):
        raise ModelError(f"{folder / name}: the name leads out of the folder; rename the object")


def _verify(folder: Path, store: ObjectStore) -> int:
    """Compare files with the digests there are; how many have one."""
    verified = 0
    for path in sorted(folder.rglob(CHECKSUMS)):
        verified += len(verify_checksums(path.parent) or ())
    for path in sorted(folder.rglob(MANIFEST)):
        try:
            manifest = CheckpointManifest.from_bytes(path.read_bytes())
            Checkpoint(path.parent, manifest).verify()
        except ValueError as error:
            place = f"{store.uri}/{path.parent.relative_to(folder).as_posix()}".removesuffix("/.")
            raise ModelError(f"{place}: damaged: {error}; fetch another, or restore it") from None
        verified += len(manifest.files)
    return verified
