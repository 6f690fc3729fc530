"""Direct preference optimisation on the block bound: which answer a model prefers, against a reference.

LLaDA2.0 (arXiv 2512.15745, section 5.3) puts the evidence bound of block diffusion in the place of the
log-likelihood, which a diffusion model cannot compute. With B(x | c) the weighted sum of log p over
the masked tokens of one noisy copy of answer x to prompt c,

    margin = (B(chosen) - B_ref(chosen)) - (B(rejected) - B_ref(rejected))
    loss   = -log sigmoid(beta * margin)

per pair, summed over tokens and not averaged. (The weight in the paper's equation has a sign that would
turn the preference round; B is negative, as in its text.) With V noisy copies B is their mean.

All four bounds come from as little noise as can be. Policy and reference see the very same inputs. The
chosen and the rejected answer of a pair draw from the same random numbers: with one ratio for each
document they have the same ratio, and the same places (counted from the prompt's start) are masked as far
as both answers reach; with one ratio for each block, the ratios too agree only between answers of as many
blocks. (LLaDA 1.5, arXiv 2505.19223, shares the noise between policy and reference; sharing between
answers is our choice.)
"""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from unmask.diffusion.layout import ModelInputs
from unmask.diffusion.rows import PackedRows

__all__ = ["answer_bounds", "margins", "paired", "preference_losses"]


def paired(inputs: ModelInputs, rows: PackedRows) -> ModelInputs:
    """``inputs`` that know which answer each prediction belongs to, normalised by the number of pairs.

    Args:
        inputs: Made of ``rows``.
        rows: Documents 2i and 2i + 1 of a row are the chosen and the rejected answer of one pair.
    """
    answers: NDArray[np.int64] = rows.document.max(axis=1) + 1
    before = torch.from_numpy(np.cumsum(answers) - answers)
    row = inputs.predict // inputs.ids.shape[1]
    document = inputs.metadata.document.flatten()[inputs.predict]
    count = int(answers.sum())
    return replace(inputs, answer=before[row] + document, answers=count, normaliser=count / 2)


def answer_bounds(nll_M: Tensor, inputs: ModelInputs, *, views: int) -> Tensor:
    """The bound B of each answer, in nats: (answers,), chosen and rejected in turn.

    Args:
        nll_M: Negative log-likelihood of each prediction.
        inputs: What they were computed from, with their answers (:func:`paired`).
        views: Noisy copies, whose mean is taken.
    """
    assert inputs.answer is not None, "made by paired()"
    sums = torch.zeros(inputs.answers, dtype=nll_M.dtype, device=nll_M.device)
    return sums.index_add(0, inputs.answer, -nll_M * inputs.weights / views)


def margins(policy: Tensor, reference: Tensor) -> Tensor:
    """By how many nats the policy prefers the chosen answers more than the reference does: (pairs,).

    Args:
        policy: Bounds by the model that learns (:func:`answer_bounds`).
        reference: Those by the model that it is compared with.
    """
    gains = (policy - reference).view(-1, 2)
    return gains[:, 0] - gains[:, 1]


def preference_losses(margins: Tensor, *, beta: float) -> Tensor:
    """The loss of each pair: ln 2 where policy and reference agree."""
    return F.softplus(-beta * margins)
