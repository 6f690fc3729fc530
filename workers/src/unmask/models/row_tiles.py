"""Matrix products whose rows come out the same whoever else is in the batch.

A product of many rows by a weight computes each row by itself, but with which instructions, and so in which
order it adds up, may depend on how many rows there are. Of float32 products on a CPU this was found (torch
2.15 with MKL, on an AMD EPYC with AVX2, one thread and two): up to three rows that a thread is left with are
computed in another way than the rest, and everything else is the same bit for bit, whatever the number of
rows and the place of a row among them. So products of whole tiles of 4 rows do not differ, and rows that
fill up a tile are all it takes. Of oneDNN's products (:mod:`unmask.models.onednn`) that holds as well, with
AVX-512 and with AVX2; there only a product of a single row was found to differ. What another machine does,
``tests/unit/test_row_tiles.py`` says.
"""

import torch
from torch import Tensor

__all__ = ["TILE_ROWS", "missing_rows", "tiled", "tiled_rows"]

TILE_ROWS = 4


def missing_rows(rows: int) -> int:
    """How many rows fill up the last tile."""
    return -rows % TILE_ROWS


def tiled(rows: int) -> int:
    """So many rows, and those that fill up the last tile."""
    return rows + missing_rows(rows)


def tiled_rows(x_PD: Tensor) -> Tensor:
    """``x``, and rows of zeros up to a whole number of tiles."""
    return torch.nn.functional.pad(x_PD, (0, 0, 0, missing_rows(len(x_PD))))
