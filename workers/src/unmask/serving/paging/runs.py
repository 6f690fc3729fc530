"""Free pages, kept as runs of neighbours, so that a request's pages lie side by side where that is possible.

Pages that lie side by side are one piece of memory, which attention reads in place; others are copied
together first.
"""

from bisect import bisect_left, bisect_right

__all__ = ["FreeRuns"]


class FreeRuns:
    """A set of page numbers as maximal runs: neither empty, nor overlapping, nor touching each other."""

    def __init__(self, pages: int) -> None:
        """Pages 0 to ``pages`` - 1, all free."""
        self._starts = [0] if pages else []
        self._stops = [pages] if pages else []
        self._count = pages

    def __len__(self) -> int:
        return self._count

    def __contains__(self, page: int) -> bool:
        place = bisect_right(self._starts, page) - 1
        return place >= 0 and page < self._stops[place]

    def take(self, count: int) -> list[int]:
        """Take ``count`` pages: from the smallest run that has them all, or else the longest runs first.

        There must be as many.
        """
        assert 0 <= count <= self._count, f"{count} of {self._count} free pages"
        taken: list[int] = []
        while len(taken) < count:
            wanted = count - len(taken)
            lengths = [stop - start for start, stop in zip(self._starts, self._stops, strict=True)]
            fitting = [length for length in lengths if length >= wanted]
            place = lengths.index(min(fitting) if fitting else max(lengths))
            taken += self._cut(place, min(wanted, lengths[place]))
        return taken

    def give(self, page: int) -> None:
        """Put a page back that is not free."""
        place = bisect_left(self._starts, page)
        behind = place < len(self._starts) and self._starts[place] == page + 1
        before = place > 0 and self._stops[place - 1] == page
        assert page not in self, f"page {page} is free already"
        if before and behind:
            self._stops[place - 1] = self._stops.pop(place)
            self._starts.pop(place)
        elif before:
            self._stops[place - 1] += 1
        elif behind:
            self._starts[place] -= 1
        else:
            self._starts.insert(place, page)
            self._stops.insert(place, page + 1)
        self._count += 1

    def _cut(self, place: int, count: int) -> range:
        """The first ``count`` pages of run number ``place``."""
        start = self._starts[place]
        self._starts[place] += count
        if self._starts[place] == self._stops[place]:
            self._starts.pop(place)
            self._stops.pop(place)
        self._count -= count
        return range(start, start + count)
