"""The order in which a stage sees its documents, and its only state: how many it has seen.

A pass over the data is a permutation of all documents that depends on nothing but
(seed, stage, pass); of a mix in fixed proportions, each source has passes of its own. The
next documents go into the next step's rows, as many as fit. So a step's batch is a
function of the cursor alone, and a checkpoint holds that one number.

Permutations sort the raw outputs of the counter-based generator Philox, which numpy
guarantees never to change, where its ``permutation`` might.
"""

from enum import IntEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from unmask.diffusion.rows import uniform
from unmask.training.corpus import Corpus
from unmask.training.mixing import Mix
from unmask.training.packing import Layout, lay_out, padded

__all__ = ["DocumentStream", "Purpose", "philox_key"]


class Purpose(IntEnum):
    """What random numbers are drawn for; each purpose and stage has a stream of its own."""

    ORDER = 1
    NOISE = 2
    EVALUATION = 3
    LENGTH = 4


def philox_key(seed: int, purpose: Purpose, stage: int = 0) -> int:
    """A 128-bit key: ``seed`` (below 2^64) in the low half, purpose and stage in the high one."""
    return seed | (stage << 96) | (purpose << 64)


class DocumentStream:
    """An endless sequence of documents of one stage."""

    def __init__(self, corpus: Corpus, *, seed: int, stage: int) -> None:
        """``stage`` is the stage's number in the job."""
        self.corpus = corpus
        self._key = philox_key(seed, Purpose.ORDER, stage)
        self._length_key = philox_key(seed, Purpose.LENGTH, stage)
        self._pass = lru_cache(maxsize=2)(self._shuffled)
        self._pass_of = lru_cache(maxsize=2 * len(corpus.mix.sizes) if corpus.mix else 0)(
            self._shuffled_source
        )

    def documents(self, cursor: int, count: int) -> NDArray[np.int64]:
        """Corpus numbers of documents ``cursor`` to ``cursor + count - 1`` of the stream."""
        if self.corpus.mix is not None:
            return self._mixed(self.corpus.mix, cursor, count)
        size = len(self.corpus.once_through)
        first, last = cursor // size, (cursor + max(count, 1) - 1) // size
        passes = np.concatenate([self._pass(number) for number in range(first, last + 1)])
        return passes[cursor - first * size :][:count]

    def step(
        self, cursor: int, *, rows: int, length: int, multiple: int, random_length: float = 0.0
    ) -> Layout:
        """The layout of the step that begins with document ``cursor``; the next begins behind its last.

        Args:
            cursor: Documents of the stream before this step.
            rows: Rows to fill.
            length: Tokens of a row.
            multiple: What the width of a document is a multiple of.
            random_length: Share of the documents that are cut to a random length, see :meth:`cut`.
        """
        shortest = int(padded(self.corpus.widths(multiple).min(keepdims=True), multiple)[0])
        count = rows * (length // shortest)
        while True:
            document = self.documents(cursor, count)
            layout = lay_out(
                document,
                self.cut(document, cursor, length=length, multiple=multiple, share=random_length),
                first_ordinal=cursor,
                rows=rows,
                length=length,
                multiple=multiple,
            )
            if len(layout.document) < count or not random_length:
                return layout
            count *= 2  # documents that were cut may leave room for more

    def cut(
        self, document: NDArray[np.int64], first_ordinal: int, *, length: int, multiple: int, share: float
    ) -> NDArray[np.int64]:
        """Tokens of each document that are used: all, but for a random ``share`` of them.

        Those keep a number of tokens uniform in 1 to ``length``, if they have more, rounded up to whole
        blocks: so that a model meets texts of every length, and texts without an end (LLaDA, arXiv
        2502.09992, section 2.2, does so with 1 % of its sequences). Which, and how much of them, follows
        from the seed and the document's number in the stream alone.
        """
        lengths = self.corpus.widths(multiple)[document]
        if not share:
            return lengths
        lots, sizes = (
            uniform(self._length_key, kind, 0, 0, len(document), first=first_ordinal) for kind in (0, 1)
        )
        kept = padded(1 + (sizes * length).astype(np.int64), multiple)
        return np.where(lots < share, np.minimum(lengths, kept), lengths)

    def _mixed(self, mix: Mix, cursor: int, count: int) -> NDArray[np.int64]:
        """As :meth:`documents`: each source is passed through in an order of its own, over and over."""
        source, number = mix.drawn(cursor, count)
        sizes = np.array(mix.sizes)
        passes, place = np.divmod(number, sizes[source])
        found = np.empty(count, np.int64)
        for one in range(len(sizes)):
            for pass_number in np.unique(passes[source == one]):
                mine = (source == one) & (passes == pass_number)
                found[mine] = self._pass_of(one, int(pass_number))[place[mine]]
        found += (np.cumsum(sizes) - sizes)[source]
        return found

    def _shuffled_source(self, source: int, number: int) -> NDArray[np.int64]:
        assert self.corpus.mix is not None, "the caller's part"
        return self._order(self.corpus.mix.sizes[source], number, source + 1)

    def _order(self, count: int, number: int, source: int) -> NDArray[np.int64]:
        """Of ``count`` things, the order of pass ``number``; ``source`` counts from 1, 0: all."""
        lots = np.random.Philox(key=self._key, counter=[0, number, source, 0]).random_raw(count)
        return np.argsort(lots, kind="stable")

    def _shuffled(self, number: int) -> NDArray[np.int64]:
        once_through = self.corpus.once_through
        return once_through[self._order(len(once_through), number, 0)]
