"""A run in an object store: which attempt may write there, and how what it writes becomes valid.

A store has no locks and no renames. It has objects that appear whole, and the condition that there is none of
a name yet. All follows from these two:

- *Attempts are numbered.* An attempt creates ``attempts/NNNNN.json`` with the next number. From then on every
  attempt of a lower number is over: its leader looks before each write that counts, and ends.
- *Nothing is overwritten that counts.* The files of a checkpoint have the attempt's number in their names.
- *The manifest is the commit.* It is created last, on the condition that there is none. A checkpoint without
  one does not exist. Of two attempts that come to a step at once one commits, and the other ends.
- *The log of a checkpoint lies beside it*, so that a log and a checkpoint of two attempts never mix.
- *A model's* ``config.json`` *is written last* and removed first, its ``checksums.json`` before that. So what
  has no ``config.json`` is no model, and one whose files were exchanged while it was read does not verify.

The folder of the run, on a disk of each machine, is a working copy. What the store says holds.
docs/adr/0009-runs-in-object-stores.md has the reasons.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from unmask.errors import ModelError, UnmaskError, UsageError
from unmask.models.folder import CHECKSUMS, parse_json_object
from unmask.models.registry import CONFIG
from unmask.training.manifest import CheckpointFile, CheckpointManifest
from unmask.training.object_store import ObjectStore

__all__ = ["GRACE_S", "Mirror", "checkpoint_folder", "node_lock"]

_log = logging.getLogger(__name__)

GRACE_S = 900.0
"""How long an attempt leaves alone what earlier ones have left: longer than any write of theirs can take that
was begun before they could know that they are over."""
_MANIFEST = "manifest.json"
_METRICS = "metrics.jsonl"
_COMMITTED = re.compile(rf"checkpoints/step-(\d{{8,}})/{re.escape(_MANIFEST)}")
_ATTEMPT = re.compile(r"attempts/(\d+)\.json")
_OWNED = re.compile(r"checkpoints/step-\d{8,}/a(\d+)-\d+-.+")
_REPORTS = re.compile(r"termination(\.rank-\d+)?\.json")
_PREFIX = re.compile(r"a\d+-\d+-")


def checkpoint_folder(step: int) -> str:
    """Name of the folder of the checkpoint of ``step``, below the run."""
    return f"checkpoints/step-{step:08d}"


@contextmanager
def node_lock(folder: Path, name: str) -> Iterator[None]:
    """Be the only process of this machine in the block of that ``name``."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Mirror:
    """One attempt's view of a run in an object store; the leader alone decides and commits."""

    def __init__(
        self,
        store: ObjectStore,
        folder: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        grace_s: float = GRACE_S,
    ) -> None:
        """Mirror the run in ``store`` in ``folder``, a working copy on this machine."""
        self.store, self.folder = store, folder
        self._clock, self._grace_s = clock, grace_s
        self.number = 0
        """Of this attempt; 0 before :meth:`join`."""
        self._claimed = clock()
        self._saves = 0
        self._damaged: dict[int, bytes] = {}
        self._verified: set[Path] = set()

    def place(self, name: str) -> str:
        """Where people find ``name``."""
        return f"{self.store.uri}/{name}"

    # Whose run it is

    def claim(self) -> str:
        """Take the run over from earlier attempts; the leader calls this once. Returns what to :meth:`join`.

        Raises:
            UsageError: The store cannot be written to, or does not keep the conditions that all relies on.
            UnmaskError: The store does not answer.
        """
        try:
            number = max(self._attempts(), default=0) + 1
            while not self.store.create(_attempt_name(number), claim := _claim()):
                number += 1
            if self.store.create(_attempt_name(number), _claim()):
                raise UsageError(
                    f"spec.checkpoint.uri: {self.store.uri} overwrites objects that were to be created only "
                    "if there is none (If-None-Match), so two attempts could spoil each other's checkpoints; "
                    "use a store that heeds it, or a volume"
                )
            self.store.remove(name for name in self.store.sizes() if _REPORTS.fullmatch(name))
        except (FileNotFoundError, PermissionError) as error:
            raise UsageError(f"spec.checkpoint.uri: {error}; correct the uri, or the credentials") from error
        except OSError as error:
            raise UnmaskError(f"{error}; the run goes on from its newest checkpoint") from error
        self._claimed = self._clock()
        _log.info("attempt %d of %s", number, self.store.uri)
        return f"{number} {hashlib.sha256(claim).hexdigest()}"

    def join(self, attempt: str) -> None:
        """Be part of ``attempt``, and clear the working copy of what others have left in it."""
        self.number = int(attempt.partition(" ")[0])
        mark, own = self.folder / ".attempt", f"{attempt}\n"
        with node_lock(self.folder, "node"):
            if mark.exists() and mark.read_text(encoding="utf-8") == own:
                return
            for path in self.folder.glob("termination*.json"):
                path.unlink(missing_ok=True)
            (self.folder / _METRICS).unlink(missing_ok=True)
            for name in ("model", "exports", "references"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            for path in (self.folder / "checkpoints").glob(".writing-*"):
                shutil.rmtree(path, ignore_errors=True)
            mark.write_text(own, encoding="utf-8")

    def insist(self) -> None:
        """Make sure that no later attempt has taken the run over.

        Raises:
            UsageError: One has.
            OSError: The store does not say.
        """
        if max(self._attempts(), default=0) > self.number:
            raise UsageError(
                f"spec.checkpoint.uri: another attempt has taken {self.store.uri} over, so this one ends; if"
                " that was no restart of this job, give one of the two another uri"
            )

    def _attempts(self) -> list[int]:
        names = map(_ATTEMPT.fullmatch, self.store.sizes("attempts"))
        return [int(match[1]) for match in names if match]

    # Checkpoints

    def new_prefix(self) -> str:
        """What the names of the next checkpoint's files begin with, which no other attempt's do."""
        self._saves += 1
        return f"a{self.number:05d}-{self._saves:05d}-"

    def steps(self) -> list[int]:
        """Steps that have a committed checkpoint, oldest first; raises ``OSError``."""
        names = map(_COMMITTED.fullmatch, self.store.sizes("checkpoints"))
        return sorted(int(match[1]) for match in names if match)

    def manifest(self, step: int) -> bytes:
        """The manifest of the checkpoint of ``step``, as it is stored; raises ``OSError``."""
        return self.store.read(f"{checkpoint_folder(step)}/{_MANIFEST}")

    def upload(self, step: int, folder: Path, names: Iterable[str]) -> None:
        """Put files of the checkpoint of ``step``, which lie in ``folder``; every process does its own.

        Raises:
            OSError: The store does not take one.
        """
        for name in names:
            self.store.upload(folder / name, f"{checkpoint_folder(step)}/{name}")

    def commit(self, step: int, manifest: CheckpointManifest, content: bytes) -> None:
        """Make the checkpoint valid whose files all processes have put.

        Args:
            step: Of the checkpoint.
            manifest: Of the checkpoint.
            content: The manifest as it is stored.

        Raises:
            UnmaskError: There is one of this step already, which another attempt has committed.
            UsageError: A later attempt has taken the run over.
            OSError: The store refuses, or has lost a file.
        """
        folder, name = checkpoint_folder(step), f"{checkpoint_folder(step)}/{_MANIFEST}"
        self._put_log(folder, _prefix_of(manifest))
        there = self.store.sizes(folder)
        for file, entry in manifest.files.items():
            if there.get(f"{folder}/{file}") != entry.size:
                raise OSError(f"{self.place(folder)}/{file} is not there as it was written")
        if self.store.create(name, content, before=self.insist):
            self._damaged.pop(step, None)
            return
        known = self._damaged.pop(step, None)
        if known is not None and self.manifest(step) == known:
            self.insist()
            self.store.remove([name])
            if self.store.create(name, content, before=self.insist):
                return
        self.store.remove(self._of_save(step, _prefix_of(manifest)))
        raise UnmaskError(
            f"{self.place(folder)}: another attempt has committed this step first; the run goes on from there"
        )

    def note_damaged(self, step: int, content: bytes) -> None:
        """Remember that the checkpoint of ``step`` is damaged, so that it may be replaced."""
        self._damaged[step] = content

    def download(self, step: int, name: str, expected: CheckpointFile, folder: Path) -> None:
        """Bring a file of the checkpoint of ``step`` into ``folder``, unless it is there already.

        Raises:
            ValueError: It is missing, or not what was written.
            OSError: The store does not answer.
        """
        with node_lock(self.folder, "fetch"):
            target = folder / name
            if target.is_file() and (target in self._verified or _is(target, expected)):
                self._verified.add(target)
                return
            folder.mkdir(parents=True, exist_ok=True)
            scratch = folder / f".{name}.part"
            try:
                self.store.download(f"{checkpoint_folder(step)}/{name}", scratch)
                if not _is(scratch, expected):
                    raise ValueError(f"{name} does not have the size and digest that the manifest names")
                scratch.replace(target)
                self._verified.add(target)
            except FileNotFoundError:
                raise ValueError(f"{name} is missing") from None
            finally:
                scratch.unlink(missing_ok=True)

    def prune(self, newest: int, keep_last: int, spared: Iterable[int]) -> None:
        """Remove what is too old, manifests first: what is left is no checkpoint. Raises ``OSError``."""
        committed = [step for step in self.steps() if step <= newest]
        for step in sorted(set(committed[:-keep_last]) - set(spared)):
            try:
                prefix = _prefix_of(CheckpointManifest.from_bytes(self.manifest(step)))
            except ValueError:
                prefix = ""
            self.store.remove([f"{checkpoint_folder(step)}/{_MANIFEST}"])
            self.store.remove(self._of_save(step, prefix))
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """Remove files that belong to no checkpoint and were put by attempts that are over, after a while."""
        if self._clock() - self._claimed < self._grace_s:
            return
        self.insist()
        there = self.store.sizes("checkpoints")
        kept: set[str] = set()
        for match in filter(None, map(_COMMITTED.fullmatch, there)):
            try:
                prefix = _prefix_of(CheckpointManifest.from_bytes(self.store.read(match[0])))
            except (ValueError, FileNotFoundError):
                prefix = ""  # whatever lies there may be what it was about
            start = match[0].removesuffix(_MANIFEST) + prefix
            kept.update(name for name in there if name.startswith(start))
        over = [match for match in map(_OWNED.fullmatch, there) if match and int(match[1]) < self.number]
        self.store.remove(match[0] for match in over if match[0] not in kept)
        self.store.remove(_attempt_name(number) for number in self._attempts() if number < self.number)
        self._claimed = self._clock()

    def _of_save(self, step: int, prefix: str) -> list[str]:
        folder = checkpoint_folder(step)
        return [name for name in self.store.sizes(folder) if prefix and name.startswith(f"{folder}/{prefix}")]

    # The log

    def _put_log(self, folder: str, prefix: str) -> None:
        content = _whole_lines(self.folder / _METRICS)
        digest = hashlib.sha256(content).hexdigest()[:32]
        self.store.write(f"{folder}/{prefix}metrics-{digest}.jsonl", content)

    def put_log(self) -> None:
        """Put the log where people look for it; raises ``OSError``."""
        self.insist()
        self.store.write(_METRICS, _whole_lines(self.folder / _METRICS))

    def restore_log(self, step: int, manifest: CheckpointManifest) -> None:
        """Bring the log that was committed with a checkpoint into the working copy.

        The one at the top of the run is taken instead where it says the same and then more.

        Raises:
            ValueError: It is missing or damaged.
            OSError: The store does not answer.
        """
        found = [
            name
            for name in self._of_save(step, _prefix_of(manifest))
            if name.rpartition("/")[2].startswith(f"{_prefix_of(manifest)}metrics-")
        ]
        if not found:
            raise ValueError("its log is missing")
        content = self.store.read(found[0])
        if hashlib.sha256(content).hexdigest()[:32] != found[0].rpartition("-")[2].removesuffix(".jsonl"):
            raise ValueError("its log is damaged")
        with suppress(FileNotFoundError):
            top = self.store.read(_METRICS)
            content = top if top.startswith(content) else content
        target = self.folder / _METRICS
        scratch = target.with_name(f".{_METRICS}.part")
        scratch.write_bytes(content)
        scratch.replace(target)

    # Reports

    def report(self, name: str) -> None:
        """Put a report of the working copy, unless a later attempt writes its own; raises ``OSError``."""
        self.insist()
        self.store.upload(self.folder / name, name)

    def reports(self) -> dict[str, bytes]:
        """What processes of this attempt have reported, by file name; raises ``OSError``."""
        return {name: self.store.read(name) for name in self.store.sizes() if _REPORTS.fullmatch(name)}

    # Models

    def holds(self, name: str) -> bool:
        """Whether the model ``name``, such as ``exports/blocks``, is complete in the store.

        Raises:
            UnmaskError: The store does not answer.
        """
        with _named("read"):
            there = self.store.sizes(name)
            if f"{name}/{CHECKSUMS}" not in there:
                return False
            return all(f"{name}/{file}" in there for file in self._listed(name))

    def publish(self, name: str) -> None:
        """Put the model ``name`` of the working copy; the leader calls this.

        Raises:
            UnmaskError: The store refuses, or a later attempt has taken the run over.
        """
        with _named("written"):
            own = (self.folder / name / CHECKSUMS).read_bytes()
            there = self.store.sizes(name)
            files = sorted(path.name for path in (self.folder / name).iterdir() if path.is_file())
            sizes = {f"{name}/{file}": _size(self.folder / name / file) for file in files}
            if sizes.items() <= there.items() and self.store.read(f"{name}/{CHECKSUMS}") == own:
                return
            self.insist()
            last = [file for file in (CHECKSUMS, CONFIG) if file in files]
            self.store.remove(f"{name}/{file}" for file in (CONFIG, CHECKSUMS))
            for file in [*(file for file in files if file not in last), *last]:
                self.store.upload(self.folder / name / file, f"{name}/{file}")
            self.store.remove(f"{name}/{file}" for file in self._names(there, name) if file not in files)

    def bring(self, name: str) -> None:
        """Have the model ``name`` in the working copy of this machine; every process may call this.

        Raises:
            ModelError: It is missing or damaged.
            UnmaskError: The store does not answer.
        """
        target = self.folder / name
        with node_lock(self.folder, "model"), _named("read"):
            if target.is_dir():
                return
            scratch = target.with_name(f".{target.name}-part")
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            try:
                digests = self._listed(name)
                for file, digest in digests.items():
                    self.store.download(f"{name}/{file}", scratch / file)
                    if _sha256(scratch / file) != digest:
                        raise ModelError(
                            f"{self.place(name)}/{file}: corrupted: its SHA-256 is not the one in "
                            f"{CHECKSUMS}; restore it, or begin the run anew"
                        )
                self.store.download(f"{name}/{CHECKSUMS}", scratch / CHECKSUMS)
                scratch.replace(target)
            except FileNotFoundError as error:
                raise ModelError(f"{error}; restore it, or begin the run anew") from None
            finally:
                shutil.rmtree(scratch, ignore_errors=True)

    def _listed(self, name: str) -> Mapping[str, str]:
        place = f"{name}/{CHECKSUMS}"
        digests = parse_json_object(self.store.read(place), source=self.place(place))
        if wrong := [file for file in digests if "/" in file or file.startswith(".")]:
            raise ModelError(f"{self.place(place)}: got file name {ascii(wrong[0])}, allowed are plain names")
        return digests

    def _names(self, there: Iterable[str], name: str) -> list[str]:
        return [path.removeprefix(f"{name}/") for path in there if path.startswith(f"{name}/")]


def _attempt_name(number: int) -> str:
    return f"attempts/{number:05d}.json"


def _claim() -> bytes:
    """Who takes the run over; the random number makes it like no other."""
    about = {"host": socket.gethostname(), "pid": os.getpid(), "at": time.time(), "nonce": uuid.uuid4().hex}
    return json.dumps(about).encode() + b"\n"


def _prefix_of(manifest: CheckpointManifest) -> str:
    """What the names of a checkpoint's files begin with; nothing if they are no attempt's."""
    found = _PREFIX.match(next(iter(sorted(manifest.files)), ""))
    return found[0] if found else ""


def _whole_lines(path: Path) -> bytes:
    """A log without the line that is being written; nothing if there is no log."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return b""
    return content[: content.rfind(b"\n") + 1]


def _is(file: Path, expected: CheckpointFile) -> bool:
    return _size(file) == expected.size and _sha256(file) == expected.sha256


def _size(file: Path) -> int:
    return file.stat().st_size


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def _named(done: str) -> Iterator[None]:
    """Say of a store that refuses what that means for the run."""
    try:
        yield
    except OSError as error:
        raise UnmaskError(
            f"cannot be {done}: {error}; see to the object store and its credentials; earlier checkpoints "
            "stand"
        ) from error
