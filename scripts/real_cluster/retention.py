"""Which of the images that were built stay, and how a process says that it is about to run some of them.

A tree's images go once newer ones have come and nobody holds them, so what is kept is bounded however many
trees are built. The note ``unpacked.json`` beside the images has the names of all that a node would have, and
when each was last built or found to be built. It is only replaced as a whole, and names nothing that is not
there, so it is read without a lock.

Whoever will run images holds them: a shared lock on a file of each, which ends with the process. Only the
standard library is used.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

__all__ = ["OTHERS", "forget", "hold", "note", "noted", "superseded", "unheld"]

OTHERS = 2
"""Images of one name that stay beside the current one, as two checkouts may take turns."""


def superseded(
    used: Mapping[str, float], *, current: Collection[str], held: Collection[str], others: int = OTHERS
) -> set[str]:
    """Return which images go: of each name all but the current one, those held, and the newest ``others``.

    Args:
        used: References of the images that there are, and when each was last wanted, in seconds.
        current: Those of the tree that is being built.
        held: Those that a process holds.
        others: How many more of a name stay.
    """
    gone: set[str] = set()
    for name in {_name(one) for one in used}:
        rest = [one for one in used if _name(one) == name and one not in current and one not in held]
        rest.sort(key=lambda one: (used[one], one), reverse=True)
        gone.update(rest[others:])
    return gone


def noted(home: Path) -> dict[str, float]:
    """Return the images that are unpacked below ``home``, and when each was last wanted, in seconds."""
    try:
        told = json.loads((home / "unpacked.json").read_text())
    except FileNotFoundError:
        return {}
    # Checkouts of an older version write a list, and read this as one.
    return dict(told) if isinstance(told, dict) else dict.fromkeys(told, 0.0)


def note(home: Path, used: Mapping[str, float]) -> None:
    """Write what :func:`noted` returns."""
    written = home / ".unpacked.json"
    written.write_text(json.dumps(dict(sorted(used.items())), indent=1))
    written.replace(home / "unpacked.json")


def hold(home: Path, references: Iterable[str]) -> list[int]:
    """Have images stay while the files that are returned are open, as they are until this process ends."""
    files = []
    for one in references:
        files.append(_file(home, one))
        fcntl.flock(files[-1], fcntl.LOCK_SH)
    return files


@contextlib.contextmanager
def unheld(home: Path, references: Iterable[str]) -> Iterator[set[str]]:
    """Yield those of ``references`` that no process holds; one that would begin to waits until the end."""
    with contextlib.ExitStack() as stack:
        free = set()
        for one in references:
            file = _file(home, one)
            stack.callback(os.close, file)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free.add(one)
        yield free


def forget(home: Path, references: Iterable[str]) -> None:
    """Remove the files by which images were held that are gone."""
    for one in references:
        _path(home, one).unlink(missing_ok=True)


def _name(reference: str) -> str:
    return reference.rpartition(":")[0]


def _path(home: Path, reference: str) -> Path:
    return home / "held" / quote(reference, safe="")


def _file(home: Path, reference: str) -> int:
    path = _path(home, reference)
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
