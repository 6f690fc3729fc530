"""How many positions, predictions and pairs of tokens one step of a stage computes.

Everything is stated for rows filled with documents of one length, since no data are read:
by default each row is one document without a prompt, which is the most that rows of that
length can cost. Shape letters as in :mod:`unmask.diffusion.layout`; d tokens of a document,
q of them prompt, B of a block, n = d / B blocks, V views.

===========  ====================================  =======================================  ===========
objective    positions                             pairs that may attend                    predictions
===========  ====================================  =======================================  ===========
ar           d                                     d (d + 1) / 2                            d - 1
mdlm         V d                                   V d^2                                    V r (d - q)
bdlm, sft    V d' (noisy) + d - B (clean)          V sum of B^2 (k + 1) over kept blocks    V r (d - q)
                                                   + B^2 n (n - 1) / 2
dpo          as sft, for each of the two answers of a pair
===========  ====================================  =======================================  ===========

with r the mean mask ratio, d' the tokens of blocks that hold something to predict, and k
a block's number. The last clean block and noisy blocks of nothing but prompt are left out of
the forward, as training does.
"""

from dataclasses import dataclass
from fractions import Fraction

from unmask.diffusion.noise import NoiseConfig
from unmask.errors import UsageError
from unmask_api.train_job import Stage

__all__ = ["Documents", "Work", "work_of_row"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """What the data are assumed to be: documents of one length."""

    tokens: int
    """Of a document, end of text included; of a preference, of the prompt with one of the answers."""
    prompt: int = 0
    """Of them given, where a stage learns from answers alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What goes through a model."""

    tokens: int
    """Tokens of the data."""
    positions: int
    """Tokens that the layers compute, noisy and clean copies counted."""
    predictions: float
    """Positions at which the output layer is computed, on average over masks."""
    pairs: int
    """Pairs of a query and a key that it may attend to."""

    def times(self, count: int) -> "Work":
        """``count`` of it."""
        return Work(
            tokens=self.tokens * count,
            positions=self.positions * count,
            predictions=self.predictions * count,
            pairs=self.pairs * count,
        )


def work_of_row(stage: Stage, documents: Documents | None, *, block_length: int | None) -> Work:
    """What one row of ``stage`` costs in a step with blocks of ``block_length`` (None: no blocks).

    Raises:
        UsageError: The documents do not fit the rows, or have no answer.
    """
    answers = 2 if stage.objective == "dpo" else 1
    documents = documents or Documents(tokens=stage.length // answers)
    if not 0 < documents.tokens <= stage.length:
        raise UsageError(
            f"document length: got {documents.tokens} tokens, but rows of stage {stage.name} hold "
            f"{stage.length}; give a shorter length"
        )
    if not 0 <= documents.prompt < documents.tokens:
        raise UsageError(
            f"prompt length: got {documents.prompt} tokens of a document of {documents.tokens}; "
            "at least one token must be left to learn from"
        )
    given = documents.prompt if stage.supervise != "All" else 0
    width = documents.tokens
    if block_length is not None:
        width = -(-width // block_length) * block_length
    if answers * width > stage.length:
        raise UsageError(
            f"document length: got {documents.tokens} tokens, but a row of stage {stage.name} holds "
            f"{stage.length} and both answers of a pair; give a shorter length"
        )
    one = _document(stage, width, given, block_length)
    return one.times(stage.length // (answers * width) * answers)


def _document(stage: Stage, width: int, given: int, block_length: int | None) -> Work:
    if stage.objective == "ar":
        return Work(
            tokens=width,
            positions=width,
            predictions=width - max(1, given),
            pairs=width * (width + 1) // 2,
        )
    assert stage.noise is not None, "every other objective has noise"
    views = stage.noise.views
    predictions = float(views * _mean_ratio(stage) * (width - given))
    if block_length is None:
        return Work(tokens=width, positions=views * width, predictions=predictions, pairs=views * width**2)
    blocks, first = width // block_length, given // block_length
    kept = range(first, blocks)
    noisy_pairs = views * sum(block_length**2 * (block + 1) for block in kept)
    clean_pairs = block_length**2 * blocks * (blocks - 1) // 2
    return Work(
        tokens=width,
        positions=views * len(kept) * block_length + (blocks - 1) * block_length,
        predictions=predictions,
        pairs=noisy_pairs + clean_pairs,
    )


def _mean_ratio(stage: Stage) -> Fraction:
    """Of the tokens that may be masked, the share that is: the mean of a uniform draw, clipped below."""
    assert stage.noise is not None, "the caller's part"
    low, high = Fraction(stage.noise.low), Fraction(stage.noise.high)
    if stage.noise.complementary:
        return Fraction(1, 2)
    smallest = Fraction(NoiseConfig().smallest).limit_denominator(10**6)
    clipped = max(Fraction(0), min(smallest, high) - low)  # of the band, what lies below the smallest
    return ((low + high) / 2 * (high - low) + clipped**2 / 2) / (high - low)
