"""Who holds which page, which pages are shared, and which one goes when there is none left.

A page holds one block of one sequence and is in one of three states:

* **held** by one sequence or several;
* **idle**: held by nobody, but its content has a name, and whoever needs that content can have it;
* **free**.

A sequence takes all the pages it may come to need when it is opened, so it never has to wait in the middle
of a block, nothing is ever taken away from it, and two sequences never wait for each other. It writes to its
own pages only, until it **seals** them: from then on their content is final, they have a name, and they may
be shared. A page is never both shared and unsealed.

Where free pages do not suffice, idle ones are given up, those longest idle first. A sequence's last block
becomes idle before the one before it, so of a prefix the end is given up first: a block without its
predecessors could not be found any more.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from unmask.serving.paging.runs import FreeRuns

__all__ = ["BlockPool", "Holding"]


@dataclass(slots=True, eq=False)
class Holding:
    """The pages of one sequence, by block. To be read; the pool alone changes it."""

    pages: list[int]
    sealed: int = 0
    """Blocks from the first on whose content is final."""
    closed: bool = False


class BlockPool:
    """The bookkeeping of a fixed number of pages. One thread owns a pool."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._free = FreeRuns(pages)
        self._holders = [0] * pages
        self._name_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Longest idle first."""

    @property
    def held(self) -> int:
        """Pages that sequences hold."""
        return self.pages - len(self._free) - len(self._idle)

    @property
    def idle(self) -> int:
        """Pages that nobody holds and whose content is kept."""
        return len(self._idle)

    def open(self, names: Sequence[bytes], blocks: int) -> Holding | None:
        """Hold pages for a sequence of ``blocks`` blocks, shared ones for the first that are there already.

        Args:
            names: Of its first blocks, as far as its tokens are known; at most ``blocks``.
            blocks: Most blocks that it will ever have.

        Returns:
            The pages, the shared ones sealed; None if there are not enough now.
        """
        assert len(names) <= blocks
        shared = self._known(names)
        wanted = blocks - len(shared)
        spare = len(self._idle) - sum(page in self._idle for page in shared)
        if wanted > len(self._free) + spare:
            return None
        for page in shared:
            self._hold(page)
        return Holding(shared + self._take(wanted), sealed=len(shared))

    def adopt(self, holding: Holding, name: bytes) -> bool:
        """Share the next block to be sealed with whoever has sealed the same meanwhile; says whether one has.

        The page that it had for that block is free again.
        """
        assert not holding.closed
        page = self._page_of.get(name)
        if page is None:
            return False
        own = holding.pages[holding.sealed]
        self._hold(page)
        holding.pages[holding.sealed] = page
        holding.sealed += 1
        self._let_go(own)
        return True

    def seal(self, holding: Holding, name: bytes) -> None:
        """Declare the content of the next block final. If another page has that name, this one gets none."""
        assert not holding.closed
        page = holding.pages[holding.sealed]
        assert self._holders[page] == 1 and page not in self._name_of, f"page {page} is not its holder's own"
        holding.sealed += 1
        if name not in self._page_of:
            self._name_of[page], self._page_of[name] = name, page

    def fork(self, holding: Holding) -> Holding | None:
        """A second sequence that begins with the sealed blocks, with pages of its own for the others.

        Nothing has to be copied: what is not sealed is written anew by whatever forward reads it.

        Returns:
            None if there are not enough pages now.
        """
        assert not holding.closed
        sealed = holding.pages[: holding.sealed]
        wanted = len(holding.pages) - holding.sealed
        if wanted > len(self._free) + len(self._idle):
            return None
        for page in sealed:
            self._hold(page)
        return Holding(sealed + self._take(wanted), sealed=holding.sealed)

    def close(self, holding: Holding) -> None:
        """Let all pages of a sequence go; sealed ones that nobody else holds stay for whoever needs them."""
        assert not holding.closed, "a holding is closed once"
        holding.closed = True
        for page in reversed(holding.pages):
            self._let_go(page)

    def _known(self, names: Sequence[bytes]) -> list[int]:
        """Pages of the first blocks, up to the first whose name is not known."""
        pages: list[int] = []
        for name in names:
            page = self._page_of.get(name)
            if page is None:
                break
            pages.append(page)
        return pages

    def _hold(self, page: int) -> None:
        self._idle.pop(page, None)
        self._holders[page] += 1

    def _take(self, count: int) -> list[int]:
        """Free pages, made free where need be."""
        while len(self._free) < count:
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._name_of.pop(page)]
            self._free.give(page)
        taken = self._free.take(count)
        for page in taken:
            self._holders[page] = 1
        return taken

    def _let_go(self, page: int) -> None:
        self._holders[page] -= 1
        assert self._holders[page] >= 0
        if self._holders[page]:
            return
        if page in self._name_of:
            self._idle[page] = None
        else:
            self._free.give(page)
