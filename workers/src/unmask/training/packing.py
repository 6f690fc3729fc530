"""Documents laid into rows: which goes where (cheap, for all rows), and the rows themselves.

Next-fit: documents are laid end to end in stream order; one that does not fit the rest
of a row starts the next one. For the block objectives every document takes a multiple of
the block size, so that blocks never straddle documents, and the places behind its end
hold the end of text and are learnt as such: a model that fills whole blocks must know how
to fill the rest of the last one (LLaDA2.0 trains the same places, arXiv 2512.15745,
section 5.1).

Every process lays out the whole step and makes its own rows alone, so that the rows
do not depend on how many processes there are. Shape letters: N documents of a step,
B rows, L tokens of a row, T tokens of all rows' documents.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unmask.diffusion.rows import PackedRows
from unmask.training.corpus import Corpus

__all__ = ["Layout", "lay_out", "make_rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where each document of a step goes; arrays of shape (N,)."""

    document: NDArray[np.int64]
    """Number in the corpus, of a document or of a pair."""
    ordinal: NDArray[np.int64]
    """Number in the stream."""
    tokens_used: NDArray[np.int64]
    """Its first tokens, which are used; fewer than it has where it is cut."""
    row: NDArray[np.int64]
    start: NDArray[np.int64]
    """First token in the row."""
    width: NDArray[np.int64]
    """Tokens that it takes up, padding to a multiple of the block size included."""
    rows: int
    length: int
    multiple: int
    """What widths are multiples of."""

    @property
    def tokens(self) -> int:
        """Tokens of all documents, the padding of their last blocks included, that of rows left out."""
        return int(self.width.sum())


def padded(lengths: NDArray[np.int64], multiple: int) -> NDArray[np.int64]:
    """``lengths`` rounded up to multiples of ``multiple``."""
    return -(-lengths // multiple) * multiple


def lay_out(
    document: NDArray[np.int64],
    lengths: NDArray[np.int64],
    *,
    first_ordinal: int,
    rows: int,
    length: int,
    multiple: int,
) -> Layout:
    """Fill at most ``rows`` rows with documents from the front; those that found no place are not part of it.

    Args:
        document: Numbers in the corpus, in stream order.
        lengths: Tokens to use of each; none exceeds ``length`` when rounded up to ``multiple``.
        first_ordinal: Number of the first in the stream.
        rows: Rows to fill.
        length: Tokens of a row.
        multiple: What the width of a document is a multiple of.
    """
    width = padded(lengths, multiple)
    ends = np.cumsum(width)
    firsts, first, base = [0], 0, 0
    for _ in range(rows):
        first = int(np.searchsorted(ends, base + length, side="right"))
        firsts.append(first)
        base = int(ends[first - 1]) if first else 0
        if first == len(ends):
            break
    counts = np.diff(firsts)
    row = np.repeat(np.arange(len(counts)), counts)
    bases = (ends - width)[np.array(firsts[:-1])]
    return Layout(
        document=document[:first],
        ordinal=first_ordinal + np.arange(first),
        tokens_used=lengths[:first],
        row=row,
        start=(ends - width)[:first] - bases[row],
        width=width[:first],
        rows=len(counts),
        length=length,
        multiple=multiple,
    )


def make_rows(
    layout: Layout,
    corpus: Corpus,
    *,
    rank: int,
    world: int,
    responses_only: bool,
    eos_token_id: int,
    pad_token_id: int,
) -> PackedRows:
    """Rows ``rank``, ``rank + world``, ... of ``layout``.

    Of a pair, the chosen answer comes first, behind it the rejected one: two documents of one number in
    the stream, so that both are masked by the same random numbers.
    """
    if corpus.paired:
        layout = _both(layout, corpus)
    mine = layout.row % world == rank
    document, width, row = layout.document[mine], layout.width[mine], layout.row[mine] // world
    number = np.arange(len(row)) - np.searchsorted(row, row)  # of the document inside its row
    within = np.arange(width.sum()) - np.repeat(np.cumsum(width) - width, width)
    target = np.repeat(row * layout.length + layout.start[mine], width) + within

    lengths = np.repeat(layout.tokens_used[mine], width)
    source = np.repeat(corpus.starts[document], width) + np.minimum(within, lengths - 1)
    ids = np.where(within < lengths, corpus.ids[source], eos_token_id)
    turn = None if corpus.turns is None else corpus.turns[source]
    given = np.repeat(corpus.prompt_lengths[document], width) if responses_only else 0
    shape = (len(range(rank, layout.rows, world)), layout.length)

    def spread(values: NDArray[Any], filler: int) -> NDArray[np.int64]:
        laid = np.full(shape, filler, np.int64)
        laid.ravel()[target] = values
        return laid

    return PackedRows(
        ids=spread(ids, pad_token_id),
        document=spread(np.repeat(number, width), -1),
        position=spread(within, 0),
        supervised=spread(within >= given if turn is None else turn >= 0, 0).astype(np.bool_),
        ordinal=spread(np.repeat(layout.ordinal[mine], width), 0),
        turn=None if turn is None else spread(turn, -1),
    )


def _both(layout: Layout, corpus: Corpus) -> Layout:
    """The same with each pair's two documents in its place."""
    document = (2 * layout.document[:, None] + np.arange(2)).ravel()
    used = corpus.lengths[document]
    width = padded(used, layout.multiple)
    second = np.stack([np.zeros_like(layout.start), width[::2]], axis=1).ravel()
    return replace(
        layout,
        document=document,
        ordinal=np.repeat(layout.ordinal, 2),
        row=np.repeat(layout.row, 2),
        start=np.repeat(layout.start, 2) + second,
        width=width,
        tokens_used=used,
    )
