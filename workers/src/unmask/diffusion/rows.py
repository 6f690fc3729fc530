"""Packed rows of documents, and the randomness that belongs to each document.

All numpy: rows are made and corrupted on the host, before any tensor exists. Shape
letters: B rows, L tokens of a row.
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

__all__ = ["PackedRows", "raw", "uniform"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRows:
    """Documents laid end to end in rows of L tokens; arrays of shape (B, L)."""

    ids: NDArray[np.int64]
    document: NDArray[np.int64]
    """Number of the document inside its row, -1 where the row is padded."""
    position: NDArray[np.int64]
    """Position inside the document."""
    supervised: NDArray[np.bool_]
    """Tokens that may be masked and are predicted; the others (a prompt) are always given."""
    ordinal: NDArray[np.int64]
    """Number of the token's document in the whole training stream: what its noise is drawn from."""
    turn: NDArray[np.int64] | None = None
    """Where several turns of a document are learnt, each by itself: which one a supervised token belongs to,
    from 0, and -1 for the others. None: all supervised tokens of a document are learnt together."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows B, tokens L)."""
        rows, length = self.ids.shape
        return rows, length

    def joined(self) -> Self:
        """The same rows with one document each, counted through from the row's start.

        What attention sees where no mask keeps packed documents apart.
        """
        real = self.document >= 0
        place = np.broadcast_to(np.arange(self.shape[1]), self.shape)
        return replace(self, document=np.where(real, 0, -1), position=np.where(real, place, 0))


def uniform(
    seed: int, stream: int, ordinal: int, view: int, count: int, *, first: int = 0
) -> NDArray[np.float64]:
    """``count`` numbers in [0, 1) that depend on nothing but the arguments; see :func:`raw`."""
    numbers = raw(seed, stream, ordinal, view, count, first=first)
    return (numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53


def raw(seed: int, stream: int, ordinal: int, view: int, count: int, *, first: int = 0) -> NDArray[np.uint64]:
    """``count`` random 64-bit numbers that depend on nothing but the arguments, from number ``first`` on.

    They come from the counter-based generator Philox (Salmon et al., SC 2011), keyed by
    ``seed`` and started at (stream, ordinal, view), so that any process draws the same
    numbers for the same document whatever it drew before. The raw outputs are used, which
    numpy guarantees never to change.
    """
    place, before = divmod(first, 4)  # each value of the counter gives four numbers
    generator = np.random.Philox(key=seed, counter=[place, view, ordinal, stream])
    return np.asarray(generator.random_raw(before + count)[before:], dtype=np.uint64)
