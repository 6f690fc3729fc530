"""How likely a model holds documents to be: a bound by Monte Carlo, or the value where the model has one.

A masked-diffusion model gives no likelihood but a bound of it (LLaDA2.0, arXiv 2512.15745,
equations 1 and 2): minus the logarithm of a document's probability is at most the mean, over mask
ratios t and masks, of the sum over masked tokens of their negative log-likelihood divided by t.
Each draw is one set of masks, laid out by training's layouts. Masks are "training", drawn as training
draws them (ratios at least ``NoiseConfig.smallest``), or "counted", which gives the same mean with a
smaller error: small ratios are rare and weigh much (:func:`unmask.diffusion.noise.corrupt_by_count`). An
autoregressive model has the value itself.

Draws are independent and belong to documents, so neither packing nor the size of a forward changes
one. Shape letters: K draws, N documents, M predictions.
"""

from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from unmask.diffusion import layout
from unmask.diffusion.layout import ModelInputs
from unmask.diffusion.losses import token_nll
from unmask.diffusion.noise import Corruption, NoiseConfig, corrupt, corrupt_by_count
from unmask.diffusion.rows import PackedRows
from unmask.models.base import LanguageModel
from unmask.training.steps import micro_batches
from unmask.training.stream import Purpose, philox_key

__all__ = ["Bound", "Masks", "exact_nll", "nll_draws"]

Bound: TypeAlias = Literal["block", "full"]
Masks: TypeAlias = Literal["training", "counted"]

_POSITIONS = 4096
"""Tokens of one forward, at most, unless a row and one draw of it have more."""
_ROW = 512
"""Tokens of one row with its draws, at most: attention may cost the square of it."""


@torch.no_grad()
def nll_draws(
    model: LanguageModel,
    rows: PackedRows,
    *,
    bound: Bound,
    block_length: int,
    draws: int,
    seed: int,
    masks: Masks = "training",
    positions: int = _POSITIONS,
) -> NDArray[np.float64]:
    """Draws of each document's bound, in nats: (K, N), documents by their ``ordinal``.

    Args:
        model: A diffusion model.
        rows: Documents whose ordinals are 0 to N - 1; tokens that are not supervised are given.
        bound: Of block diffusion, or of diffusion over the whole document at once.
        block_length: Of block diffusion.
        draws: K.
        seed: What the masks follow from.
        masks: How they are drawn.
        positions: Most tokens of a forward, unless a row and one draw of it have more; no result depends
            on it.
    """
    count = int(rows.ordinal.max(initial=-1)) + 1
    found = np.zeros((draws, count))
    config = NoiseConfig(scope="block" if bound == "block" else "document", views=draws)
    key = philox_key(seed, Purpose.EVALUATION)
    length = rows.shape[1]
    views = max(1, min(_ROW, positions) // length - 1)
    together = max(1, positions // ((views + 1) * length))
    for part in micro_batches(rows, together):
        if masks == "training":
            drawn = corrupt(part, config, seed=key, block_length=block_length)
        else:
            drawn = corrupt_by_count(
                part, views=draws, seed=key, block_length=block_length if bound == "block" else None
            )
        for first in range(0, draws, views):
            some = Corruption(drawn.masked[first : first + views], drawn.ratio[first : first + views])
            if bound == "block":
                inputs = layout.two_copy(
                    part, some, block_length=block_length, mask_token_id=model.mask_token_id
                )
            else:
                inputs = layout.full_sequence(part, some, mask_token_id=model.mask_token_id)
            view, document, nll = _terms(model, inputs, part)
            np.add.at(found, (first + view - 1, document), nll)
    return found


@torch.no_grad()
def exact_nll(
    model: LanguageModel, rows: PackedRows, *, positions: int = _POSITIONS
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Each document's negative log-likelihood under an autoregressive model, and its terms: (N,) each.

    In nats; a term is a token that is predicted, which the first of a document is not: nothing precedes it.
    """
    count = int(rows.ordinal.max(initial=-1)) + 1
    found, tokens = np.zeros(count), np.zeros(count, np.int64)
    for part in micro_batches(rows, max(1, positions // rows.shape[1])):
        _, document, nll = _terms(model, layout.causal(part), part)
        np.add.at(found, document, nll)
        np.add.at(tokens, document, 1)
    return found, tokens


def _terms(
    model: LanguageModel, inputs: ModelInputs, rows: PackedRows
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """View, document and weighted negative log-likelihood of each prediction: (M,) each."""
    view = inputs.metadata.view.flatten()[inputs.predict].numpy()
    number = inputs.metadata.document.flatten()[inputs.predict].numpy()
    row = inputs.predict.numpy() // inputs.ids.shape[1]
    ordinals = np.zeros((rows.shape[0], int(rows.document.max(initial=0)) + 1), np.int64)
    real = rows.document >= 0
    ordinals[np.nonzero(real)[0], rows.document[real]] = rows.ordinal[real]
    moved = inputs.to(model.device)
    hidden = model.hidden(moved.ids, moved.metadata).flatten(0, 1).index_select(0, moved.predict)
    nll = token_nll(hidden, model.logits, moved.targets) * moved.weights
    return view, ordinals[row, number], nll.double().cpu().numpy()
