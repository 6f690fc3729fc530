"""Several sources in fixed proportions: which source each document of a stream is of.

Source i, with rate r_i (the rates add up to 1), gives its k-th document, from 0, at time (k + 1/2) / r_i;
the stream is all of them in order of time, and of the source's number where times are equal. So document n
follows from the rates alone: no state, no chance, and any part of the stream can be looked up. Until time t
a source has given t r_i documents to within 1/2, so that of any n documents in a row it has given n r_i to
within 1 + (S + 1) r_i, where S is the number of sources: proportions hold in every window, not on average.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Self

import numpy as np
from numpy.typing import NDArray

__all__ = ["Mix"]


@dataclass(frozen=True, slots=True)
class Mix:
    """Documents of S sources, which lie one source after the other."""

    sizes: tuple[int, ...]
    """(S,): documents of each source."""
    rates: tuple[float, ...]
    """(S,): documents of each source in one of the stream."""

    @classmethod
    def of_tokens(cls, shares: Sequence[Fraction], sizes: Sequence[int], tokens: Sequence[int]) -> Self:
        """The mix with tokens in proportion to ``shares``; documents and tokens are those of each source."""
        weights = [share * size / count for share, size, count in zip(shares, sizes, tokens, strict=True)]
        # Rounded once from exact numbers: the same on every machine.
        return cls(tuple(sizes), tuple(float(weight / sum(weights)) for weight in weights))

    def drawn(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of documents ``first`` to ``first + count - 1`` of the stream, the source, and the number in it.

        The number counts what the source gave before, over all passes through it; both are of shape (count,).
        """
        margin = len(self.rates) + 1
        start, stop = first - margin, first + count + margin
        before = 0
        times, sources, numbers = [], [], []
        for source, rate in enumerate(self.rates):
            number = np.arange(max(0, int(start * rate) - 2), max(0, int(stop * rate)) + 3)
            time = (number + 0.5) / rate
            inside = time >= start
            before += int(number[0]) + int((~inside).sum())
            times.append(time[inside])
            numbers.append(number[inside])
            sources.append(np.full(int(inside.sum()), source))
        all_sources, all_numbers = np.concatenate(sources), np.concatenate(numbers)
        order = np.lexsort((all_sources, np.concatenate(times)))[first - before :][:count]
        return all_sources[order], all_numbers[order]
