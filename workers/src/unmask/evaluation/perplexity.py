"""The perplexity of a data set, or a bound of it, with the error that Monte Carlo makes."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from unmask.diffusion.rows import PackedRows
from unmask.errors import UsageError
from unmask.evaluation.likelihood import Bound, Masks, exact_nll, nll_draws
from unmask.evaluation.subject import Subject
from unmask.training.corpus import Library, Overlong, Source
from unmask.training.packing import lay_out, make_rows, padded

__all__ = ["Perplexity", "data_rows", "perplexity"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """What was measured; logarithms are natural."""

    bound: str
    """"block" or "full": an upper bound by that; "exact": the value, of an autoregressive model."""
    block_length: int | None
    masks: str
    """How they were drawn: "training", "counted" or "none"."""
    draws: int
    """Sets of masks; 1 where there are none."""
    seed: int
    documents: int
    skipped: int
    """Documents that were too long."""
    tokens: int
    """That the figures are per: those learnt from, end of text included, padding not."""
    nll_per_token: float
    nll_standard_error: float
    """Of ``nll_per_token``, over draws; it says nothing about other documents."""
    perplexity: float
    perplexity_standard_error: float
    bits_per_token: float

    def to_json_dict(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


def perplexity(
    subject: Subject,
    sources: Sequence[Source],
    *,
    bound: Bound | None = None,
    block_length: int | None = None,
    masks: Masks = "training",
    draws: int = 32,
    seed: int = 0,
    length: int | None = None,
    overlong: Overlong = "Error",
    responses_only: bool = False,
) -> Perplexity:
    """The perplexity of ``subject`` on the documents of ``sources``.

    Args:
        subject: What is measured.
        sources: Data files.
        bound: Which bound; left out, that of what the model's tokens see. An autoregressive model has none.
        block_length: Of the bound "block"; left out, the block that the model is decoded with.
        masks: How masks are drawn.
        draws: Sets of masks, at least 2: one alone has no error to tell.
        seed: What they follow from.
        length: Most tokens of a document; left out, the model's context.
        overlong: What to do with longer ones.
        responses_only: Take prompts as given.

    Raises:
        UsageError: The model has no such bound, or a number makes no sense.
        DataError: A file is not what it should be.
    """
    model = subject.model
    if model.causal and (bound or block_length):
        raise UsageError(f"bound: {subject.name} is autoregressive and has a likelihood; leave it out")
    if not model.causal and draws < 2:
        raise UsageError(f"draws: got {draws}, expected at least 2; a standard error needs them")
    chosen: Bound = bound or ("full" if model.attends == "canvas" else "block")
    if model.attends == "canvas" and chosen == "block":
        raise UsageError(
            f"bound: {subject.name} attends to the whole canvas and has no bound by blocks; use full"
        )
    size = block_length or subject.defaults.block_length
    if not 1 <= size <= (length or subject.context):
        raise UsageError(f"block length: got {size}, expected 1 to {length or subject.context}")
    multiple = size if chosen == "block" and not model.causal else 1
    rows, tokens, skipped = data_rows(
        subject,
        sources,
        length=length or subject.context,
        multiple=multiple,
        overlong=overlong,
        responses_only=responses_only,
    )
    if model.causal:
        nll, counted = exact_nll(model, rows)
        totals, tokens = nll.sum(keepdims=True), int(counted.sum())
    else:
        totals = nll_draws(
            model, rows, bound=chosen, block_length=size, draws=draws, seed=seed, masks=masks
        ).sum(1)
    mean = float(totals.mean()) / tokens
    error = float(totals.std(ddof=1)) / len(totals) ** 0.5 / tokens if len(totals) > 1 else 0.0
    return Perplexity(
        bound="exact" if model.causal else chosen,
        block_length=multiple if chosen == "block" and not model.causal else None,
        masks="none" if model.causal else masks,
        draws=len(totals),
        seed=seed,
        documents=int(rows.ordinal.max()) + 1,
        skipped=skipped,
        tokens=tokens,
        nll_per_token=mean,
        nll_standard_error=error,
        perplexity=_exp(mean),
        perplexity_standard_error=_exp(mean) * error,
        bits_per_token=mean / math.log(2),
    )


def data_rows(
    subject: Subject,
    sources: Sequence[Source],
    *,
    length: int,
    multiple: int,
    overlong: Overlong,
    responses_only: bool,
) -> tuple[PackedRows, int, int]:
    """The documents of ``sources`` once each, in rows of up to ``length`` tokens as training packs them.

    Also how many tokens are to be predicted, padding of last blocks left out, and how many documents were
    too long.
    """
    config = subject.model.config
    library = Library(subject.tokenizer, eos_token_id=config.eos_token_id)
    room = length // multiple * multiple
    corpus = library.corpus(sources, length=room, overlong=overlong)
    document = np.arange(len(corpus))
    lengths = corpus.lengths
    width = int(padded(lengths, multiple).max())
    rows = lay_out(document, lengths, first_ordinal=0, rows=len(corpus), length=width, multiple=multiple)
    packed = make_rows(
        rows,
        corpus,
        rank=0,
        world=1,
        responses_only=responses_only,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    given = corpus.prompt_lengths if responses_only else 0
    return packed, int((lengths - given).sum()), corpus.skipped


def _exp(value: float) -> float:
    """Infinity where a float cannot hold the result: a random model on few tokens."""
    return math.exp(value) if value < 700 else math.inf
