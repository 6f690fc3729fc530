"""Which tokens are masked, and at which ratio: the forward process of masked diffusion.

With the linear schedule alpha_t = 1 - t, a token is masked with probability t, and the
weight of a masked token in the evidence bound is 1/t (LLaDA2.0, arXiv 2512.15745,
equations 1 and 2; the sign there is a misprint, the weight is positive).

Noise is a pure function of (seed, ordinal of the document in the stream, view, block).
No generator lives between calls, so ranks, restarts and other numbers of ranks agree,
and a document is corrupted alike wherever it is packed.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from unmask.diffusion.rows import PackedRows, raw, uniform

__all__ = ["Corruption", "NoiseConfig", "corrupt", "corrupt_by_count"]

_RATIOS, _TOKENS, _EMBEDDINGS = 0, 1, 2
"""Streams of randomness: for the mask ratios of blocks, for the tokens, and for their embeddings' noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseConfig:
    """How to draw masks.

    The paper discloses neither the band of its SFT nor whether t is drawn per block; the
    defaults of manifests follow the public recipe and say so.
    """

    low: float = 0.0
    """Smallest mask ratio; 0 is taken as ``smallest``."""
    high: float = 1.0
    scope: Literal["block", "document"] = "block"
    """Whether each block of a document has its own ratio, or all share one."""
    weight: Literal["elbo", "flat"] = "elbo"
    """1/t for each masked token, or 1."""
    views: int = 1
    """Noisy copies of each row, drawn independently but for ``complementary``."""
    complementary: bool = False
    """Whether views 2, 4, ... mask exactly what the view before them left, at ratio 1 - t."""
    smallest: float = 1e-3
    """Ratios are at least this, which bounds the weight 1/t; and at most 1 minus this if complementary."""

    def __post_init__(self) -> None:
        """Check the band."""
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(
                f"the mask-ratio band must satisfy 0 <= low < high <= 1, got {self.low} to {self.high}"
            )
        if self.complementary and self.views % 2:
            raise ValueError(f"complementary masks need an even number of views, got {self.views}")


@dataclass(frozen=True, slots=True)
class Corruption:
    """What the noise did to a batch of rows; arrays of shape (V views, B rows, L tokens)."""

    masked: NDArray[np.bool_]
    """Masked tokens; always among the supervised."""
    ratio: NDArray[np.float32]
    """The probability with which each token was to be masked."""
    struck: NDArray[np.bool_] | None = None
    """Tokens that the lot fell on, supervised or not; None where tokens are not drawn one by one."""
    lots: NDArray[np.int64] | None = None
    """For each token, what the disturbance of its embedding is drawn from; None: nothing disturbs them."""
    disturbance: float = 0.0
    """Standard deviation of that disturbance."""


def corrupt(
    rows: PackedRows, config: NoiseConfig, *, seed: int, block_length: int, disturbance: float = 0.0
) -> Corruption:
    """Draw the masks of ``rows``.

    Args:
        rows: Packed documents.
        config: Band, scope and views.
        seed: Of the job and stage.
        block_length: Tokens per block, which with scope "block" share a ratio; blocks count
            from each document's start.
        disturbance: Standard deviation of what is added to the embeddings of masked tokens.

    With the flat weight, a document with supervised tokens has at least one masked in
    each view that is not a complement, for else it would teach nothing; with the 1/t
    weight that would bias the bound, and is not done.
    """
    shape = (config.views, *rows.shape)
    struck, ratio = np.zeros(shape, np.bool_), np.ones(shape, np.float32)
    lots = np.zeros(shape, np.int64) if disturbance else None
    for row, start, stop in _documents(rows):
        span = (row, slice(start, stop))
        blocks = rows.position[span] // block_length
        supervised, ordinal = rows.supervised[span], int(rows.ordinal[row, start])
        for view in range(config.views):
            if config.complementary and view % 2:
                struck[view, *span] = ~struck[view - 1, *span]
                ratio[view, *span] = 1 - ratio[view - 1, *span]
            else:
                drawn = _draw(config, seed, ordinal, view, blocks, supervised)
                struck[view, *span], ratio[view, *span] = drawn
            if lots is not None:
                lots[view, *span] = raw(seed, _EMBEDDINGS, ordinal, view, stop - start).view(np.int64) | 1
    return Corruption(struck & rows.supervised, ratio, struck, lots, disturbance)


def corrupt_by_count(rows: PackedRows, *, views: int, seed: int, block_length: int | None) -> Corruption:
    """Draw how many tokens of each block are masked, then which: the same bound with less chance in it.

    Of a block of n tokens that may be masked, l are, with l uniform in 1 to n, and each weighs n / l:
    the ratio that it is masked at is l / n. On average this is what ratios uniform in 0 to 1 with weights
    1/t give (LLaDA, arXiv 2502.09992, equation 6), without the rare draws of a small ratio that
    :func:`corrupt` has, whose weight is large. For measuring; training draws ratios.

    Args:
        rows: Packed documents.
        views: Independent draws.
        seed: What they follow from.
        block_length: Tokens per block; None takes a document as one block.
    """
    shape = (views, *rows.shape)
    masked, ratio = np.zeros(shape, np.bool_), np.ones(shape, np.float32)
    for row, start, stop in _documents(rows):
        span = (row, slice(start, stop))
        supervised, ordinal = rows.supervised[span], int(rows.ordinal[row, start])
        blocks = rows.position[span] // block_length if block_length else np.zeros(stop - start, np.int64)
        sizes = np.bincount(blocks, weights=supervised).astype(np.int64)
        for view in range(views):
            shares = uniform(seed, _RATIOS, ordinal, view, len(sizes))
            counts = 1 + np.minimum((shares * sizes).astype(np.int64), np.maximum(sizes - 1, 0))
            lots = np.where(supervised, uniform(seed, _TOKENS, ordinal, view, stop - start), 2.0)
            order = np.lexsort((lots, blocks))  # those to be masked first in their block
            place = np.empty(stop - start, np.int64)
            place[order] = np.arange(stop - start) - np.searchsorted(blocks, blocks)[order]
            masked[view, *span] = supervised & (place < counts[blocks])
            ratio[view, *span] = (counts / np.maximum(sizes, 1))[blocks]
    return Corruption(masked, ratio)


def _documents(rows: PackedRows) -> list[tuple[int, int, int]]:
    """(row, first token, token after the last) of each document, in order."""
    found = []
    for row, document in enumerate(rows.document):
        edges = np.flatnonzero(np.diff(document)) + 1
        bounds = [0, *edges.tolist(), len(document)]
        spans = zip(bounds, bounds[1:], strict=False)
        found += [(row, start, stop) for start, stop in spans if document[start] >= 0]
    return found


def _draw(
    config: NoiseConfig,
    seed: int,
    ordinal: int,
    view: int,
    blocks: NDArray[np.int64],
    supervised: NDArray[np.bool_],
) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """On which of one document's tokens the lot falls in one view, supervised or not, and their ratios."""
    num_blocks = int(blocks[-1]) + 1 if config.scope == "block" else 1
    start = uniform(seed, _RATIOS, ordinal, view, 1)[0]
    # Stratified over the document's blocks: each ratio alone is uniform, together they cover the band.
    strata = (start + np.arange(num_blocks) / num_blocks) % 1.0
    ceiling = 1 - config.smallest if config.complementary else 1.0
    ratios = np.clip(config.low + (config.high - config.low) * strata, config.smallest, ceiling)
    ratio = ratios[blocks] if config.scope == "block" else np.full(len(blocks), ratios[0])
    lots = uniform(seed, _TOKENS, ordinal, view, len(blocks))
    struck = lots < ratio
    if config.weight == "flat" and supervised.any() and not (struck & supervised).any():
        struck[np.flatnonzero(supervised)[np.argmin((lots / ratio)[supervised])]] = True
    return struck, ratio.astype(np.float32)
