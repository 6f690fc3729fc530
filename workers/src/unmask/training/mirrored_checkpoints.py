"""Checkpoints in an object store, with a working copy on each machine; see :mod:`unmask.training.mirror`.

Every process puts the files that it wrote, the leader then creates the manifest. On each machine the newest
checkpoint is kept as well, so that going back to it brings no weights again. A checkpoint is verified by all
processes together: each reads a share of its files, those that it wrote if there are as many processes as
then. What a process needs beyond its share is brought when it is read.
"""

import json
import logging
import shutil
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path

from unmask.errors import ModelError, UnmaskError
from unmask.training.checkpoints import MANIFEST, Checkpoint, CheckpointStore, checkpoint_name
from unmask.training.distributed import World
from unmask.training.manifest import CheckpointManifest
from unmask.training.mirror import Mirror, node_lock

__all__ = ["MirroredCheckpoints"]

_log = logging.getLogger(__name__)


class MirroredCheckpoints(CheckpointStore):
    """The checkpoints of one run in an object store; a folder holds what this machine needs of them."""

    _remedy = "see to the object store and its credentials"

    def __init__(self, mirror: Mirror, folder: Path, *, keep_last: int) -> None:
        """Keep the ``keep_last`` newest in the store of ``mirror``, and the newest in ``folder``."""
        super().__init__(folder, keep_last=keep_last)
        self._mirror = mirror

    def place(self, step: int) -> str:
        """See :class:`CheckpointStore`."""
        return self._mirror.place(f"checkpoints/{checkpoint_name(step)}")

    def steps(self) -> list[int]:
        """Steps that have a committed checkpoint in the store, damaged or not, oldest first.

        Raises:
            UnmaskError: The store does not answer.
        """
        try:
            return self._mirror.steps()
        except OSError as error:
            raise self._unread(error) from error

    def agreed(self, world: World) -> Checkpoint | None:
        """See :class:`CheckpointStore`; all read a share of the files, and the leader brings the log.

        Raises:
            ModelError: There are checkpoints, and all are damaged.
            UnmaskError: The store does not answer.
        """
        with world.together():
            steps = self.steps() if world.leads else []
        steps = json.loads(world.all_bytes(json.dumps(steps).encode())[0])
        for step in reversed(steps):
            with world.together():
                content = self._read_manifest(step) if world.leads else b""
            content = world.all_bytes(content)[0]
            with world.together():
                checkpoint, damage = self._brought(step, content, world)
            found = [one.decode() for one in world.all_bytes(damage.encode()) if one]
            if not found and checkpoint is not None:
                return checkpoint
            self._mirror.note_damaged(step, content)
            shutil.rmtree(self.folder / checkpoint_name(step), ignore_errors=True)
            if world.leads:
                _log.warning("%s is damaged and skipped: %s", self.place(step), found[0])
        if steps:
            raise ModelError(
                f"{self._mirror.place('checkpoints')}: all {len(steps)} checkpoints are damaged; restore "
                "one, or remove them to begin anew"
            )
        return None

    def present(self, step: int) -> Path:
        """See :class:`CheckpointStore`; brings what is not there.

        Raises:
            ModelError: It is damaged.
            UnmaskError: The store does not answer.
        """
        try:
            content = self._mirror.manifest(step)
            checkpoint = self._opened(step, content)
            for name, expected in checkpoint.manifest.files.items():
                self._mirror.download(step, name, expected, checkpoint.path)
        except (ValueError, FileNotFoundError) as error:
            raise ModelError(f"{self.place(step)}: damaged: {error}") from None
        except OSError as error:
            raise self._unread(error) from error
        return checkpoint.path

    # Reading

    def _read_manifest(self, step: int) -> bytes:
        """The manifest as it is stored; nothing if it has been removed since."""
        try:
            return self._mirror.manifest(step)
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise self._unread(error) from error

    def _brought(self, step: int, content: bytes, world: World) -> tuple[Checkpoint | None, str]:
        """The checkpoint whose manifest is ``content``, or what of this process's share is damaged."""
        try:
            checkpoint = self._opened(step, content)
            names = sorted(checkpoint.manifest.files)
            for place, name in enumerate(names):
                if place * world.size // len(names) != world.rank:
                    continue
                self._mirror.download(step, name, checkpoint.manifest.files[name], checkpoint.path)
            if world.leads and not (self._mirror.folder / "metrics.jsonl").exists():
                self._mirror.restore_log(step, checkpoint.manifest)
        except (ValueError, RecursionError, FileNotFoundError) as error:
            return None, str(error)
        except OSError as error:
            raise self._unread(error) from error
        return checkpoint, ""

    def _opened(self, step: int, content: bytes) -> Checkpoint:
        """The checkpoint of ``step``, its manifest in the working copy; raises ``ValueError``."""
        try:
            manifest = CheckpointManifest.from_bytes(content)
        except ValueError as error:
            raise ValueError(f"{MANIFEST}: {error}") from None
        if manifest.step != step:
            raise ValueError(f"{MANIFEST} is that of step {manifest.step}")
        path = self.folder / checkpoint_name(step)
        with node_lock(self._mirror.folder, "fetch"):
            path.mkdir(parents=True, exist_ok=True)
            scratch = path / f".{MANIFEST}.part"
            scratch.write_bytes(content)
            scratch.replace(path / MANIFEST)
        return self._checkpoint(path, manifest)

    def _checkpoint(self, path: Path, manifest: CheckpointManifest) -> Checkpoint:
        return Checkpoint(
            path, manifest, fetch=partial(self._fetch, path, manifest), uri=self.place(manifest.step)
        )

    def _fetch(self, path: Path, manifest: CheckpointManifest, name: str) -> None:
        """Bring a file when it is read; raises ``ModelError`` or ``UnmaskError``."""
        try:
            self._mirror.download(manifest.step, name, manifest.files[name], path)
        except ValueError as error:
            raise ModelError(f"{self.place(manifest.step)}: damaged: {error}") from None
        except OSError as error:
            raise self._unread(error) from error

    def _unread(self, error: OSError) -> UnmaskError:
        return UnmaskError(f"{error}; {self._remedy}; what is committed stands")

    # Writing

    def _new_prefix(self) -> str:
        return self._mirror.new_prefix()

    def _have_scratch(self, scratch: Path) -> None:
        scratch.mkdir(parents=True, exist_ok=True)  # on another machine than the leader's it is not there

    def _hand_over(self, step: int, scratch: Path, files: Iterable[str]) -> None:
        self._mirror.upload(step, scratch, files)

    def _commit(self, scratch: Path, manifest: CheckpointManifest) -> Checkpoint:
        content = manifest.to_bytes()
        self._mirror.commit(manifest.step, manifest, content)
        super()._commit(scratch, manifest)
        self._mirror.put_log()
        return self._checkpoint(self.folder / checkpoint_name(manifest.step), manifest)

    def _follow(self, world: World, scratch: Path, checkpoint: Checkpoint | None) -> None:
        """On machines other than the leader's, make what lies there a checkpoint, too."""
        manifest = CheckpointManifest.from_bytes(
            world.all_bytes(checkpoint.manifest.to_bytes() if checkpoint else b"")[0]
        )
        with world.together(), self._refusals(manifest.step):
            if not world.leads:
                with node_lock(self._mirror.folder, "fetch"):
                    if scratch.is_dir():
                        super()._commit(scratch, manifest)
                        self._keep_newest()

    def _prune(self, newest: int, spared: Collection[int]) -> None:
        self._mirror.prune(newest, self._keep_last, spared)
        self._keep_newest()

    def _keep_newest(self) -> None:
        """Remove all but the newest checkpoint of the working copy."""
        for step in super().steps()[:-1]:
            shutil.rmtree(self.folder / checkpoint_name(step), ignore_errors=True)
