"""Objects below one uri of an object store (``s3://``, ``gs://``, ...), through fsspec.

An object appears whole or not at all, and can be created on the condition that there is none of its name:
that is all that is relied on. Requests that fail are tried again, a few times; then there is an ``OSError``.
Nothing that a store tells is remembered.
"""

import logging
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TypeVar

from unmask.errors import UnmaskError
from unmask.training.sources import connected, one_line

__all__ = ["ObjectStore", "StoreError"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_TRIES = 5
_FIRST_WAIT_S = 0.5
_FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError)
"""What a store says for good."""


class StoreError(OSError):
    """A store does not do what it was asked, however often."""


class ObjectStore:
    """The objects below ``uri``; their names are relative to it."""

    def __init__(
        self, uri: str, *, tries: int = _TRIES, wait: Callable[[float], object] = time.sleep
    ) -> None:
        """Connect to the store; nothing is asked of it yet.

        Args:
            uri: Such as ``s3://bucket/prefix``.
            tries: Of each request, besides those that the store's own client makes.
            wait: Waits so many seconds between them: half a second first, then twice as long each time.

        Raises:
            UsageError: The package for such stores is not installed.
        """
        self.uri = uri.rstrip("/")
        self._tries, self._wait = tries, wait
        # An instance of its own that remembers no listing: other processes write there as well.
        self._system, root = connected(self.uri, use_listings_cache=False, skip_instance_cache=True)
        self._root = root.rstrip("/")

    def read(self, name: str) -> bytes:
        """The content of an object.

        Raises:
            FileNotFoundError: There is none.
            OSError: It cannot be read.
        """
        return self._tried("read", name, lambda: bytes(self._system.cat_file(self._path(name))))

    def write(self, name: str, content: bytes) -> None:
        """Put an object, in place of one of that name; raises ``OSError``."""
        self._tried("write", name, lambda: self._system.pipe_file(self._path(name), content))

    def create(self, name: str, content: bytes, *, before: Callable[[], None] = lambda: None) -> bool:
        """Put an object if there is none of that name; whether the one that is there is this one.

        A request may do its work although its answer is lost. So whatever goes wrong, what is there decides,
        and the content must be one that no other process would write.

        Args:
            name: Of the object.
            content: Of the object.
            before: Called before each try; what it raises ends the matter.

        Raises:
            OSError: It can neither be written nor be found.
        """

        def attempt() -> bool:
            before()
            try:
                self._system.pipe_file(self._path(name), content, mode="create")
            except (FileNotFoundError, PermissionError):
                raise
            except Exception:
                found = self._if_there(name)
                if found is None:
                    raise
                return found == content
            return True

        return self._tried("create", name, attempt)

    def upload(self, file: Path, name: str) -> None:
        """Put the content of ``file``, in place of an object of that name; raises ``OSError``."""
        self._tried("write", name, lambda: self._system.put_file(str(file), self._path(name)))

    def download(self, name: str, file: Path) -> None:
        """Write the content of an object to ``file``.

        Raises:
            FileNotFoundError: There is none.
            OSError: It cannot be read, or not written here.
        """
        self._tried("read", name, lambda: self._system.get_file(self._path(name), str(file)))

    def sizes(self, below: str = "") -> dict[str, int]:
        """Bytes of every object whose name begins with the folder ``below``, by name; raises ``OSError``."""
        top = self._path(below).rstrip("/") + "/"

        def listed() -> dict[str, int]:
            self._system.invalidate_cache()
            found = self._system.find(top.rstrip("/"), detail=True)
            start = self._root + "/"
            return {
                path.lstrip("/").removeprefix(start.lstrip("/")): int(entry["size"] or 0)
                for path, entry in found.items()
                if path.lstrip("/").startswith(top.lstrip("/")) and not path.endswith("/")
            }

        try:
            return self._tried("list", below, listed)
        except FileNotFoundError:
            return {}

    def version(self, name: str) -> str:
        """What changes when an object is written; raises ``OSError``."""
        return self._tried("look at", name, lambda: str(self._system.ukey(self._path(name))))

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects, one after the other; those that are not there are no matter. Raises ``OSError``."""
        for name in names:
            try:
                self._tried("remove", name, partial(self._system.rm_file, self._path(name)))
            except FileNotFoundError:
                continue

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _if_there(self, name: str) -> bytes | None:
        try:
            return self.read(name)
        except FileNotFoundError:
            return None

    def _tried(self, what: str, name: str, act: Callable[[], _T]) -> _T:
        wait_s = _FIRST_WAIT_S
        for left in reversed(range(self._tries)):
            try:
                return act()
            except (UnmaskError, StoreError):
                raise
            except Exception as error:
                place = f"{self.uri}/{name}".rstrip("/")
                if isinstance(error, _FINAL):
                    raise type(error)(f"cannot {what} {place}: {_said(error)}") from error
                if left == 0:
                    text = f"cannot {what} {place}: {_said(error)}; tried {self._tries} times"
                    raise StoreError(text) from error
                _log.warning("cannot %s %s: %s; trying again in %g s", what, place, _said(error), wait_s)
            self._wait(wait_s)
            wait_s *= 2
        raise AssertionError("there is at least one try")


def _said(error: Exception) -> str:
    """An error in a line. The classes of stores' errors say much, their texts little."""
    return f"{type(error).__name__}: {one_line(error)}" if str(error) else type(error).__name__
