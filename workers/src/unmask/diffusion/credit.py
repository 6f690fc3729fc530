"""Credit: a token that forward after forward finds the most probable one is accepted sooner.

At each forward of a block, the most probable token of each masked position gets credit, a power of its
probability; all credits of the position decay first. A token's logit is then raised by a multiple of
log(1 + credit), so its probability is: threshold and quota see the raised one, and so do reported confidences
(CreditDecoding, arXiv 2510.06133; in the form of dInfer, arXiv 2510.08666).

dInfer keeps the credits of a block as a float32 matrix of positions by vocabulary (20 MB for 32 positions and
157,184 tokens), though a forward adds one number to each of its rows. Here only those numbers are kept: of a
position at most as many as the block has had forwards, and none once it is filled. Nothing is left out by
that. What differs: they are added up in double precision, they end with their block, and the mask token,
which is never chosen, has none.

Shape letters: N positions, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from unmask.diffusion.decoding import Candidates, Credit, best_tokens

__all__ = ["Credits", "Ledger", "accrued", "raised"]

Credits = Mapping[int, Mapping[int, float]]
"""Of a block: by position, then by token. What is not in it is 0."""


class Ledger:
    """The credits of one request's open block.

    Attributes:
        credits: Of the positions that were masked at the last forward.
    """

    def __init__(self, rule: Credit) -> None:
        self._rule = rule
        self.credits: Credits = {}

    def book(self, logits_NV: Tensor, positions: Sequence[int], *, mask_token_id: int) -> Tensor:
        """Take a forward's most probable tokens into account; returns its scores, raised.

        Args:
            logits_NV: Scores of the positions that are still masked, all of them.
            positions: Their names, the same from forward to forward.
            mask_token_id: Never chosen.
        """
        best = best_tokens(logits_NV, mask_token_id=mask_token_id)
        self.credits = accrued(self.credits, positions, best, self._rule)
        return raised(logits_NV, [self.credits[position] for position in positions], self._rule)


def accrued(before: Credits, positions: Sequence[int], best: Candidates, rule: Credit) -> Credits:
    """Credits after a forward, of ``positions`` alone, given the most probable token (N,) of each."""
    after = {}
    tokens, probabilities = best.tokens.tolist(), best.confidence.tolist()
    for position, token, probability in zip(positions, tokens, probabilities, strict=True):
        held = {known: rule.decay * credit for known, credit in before.get(position, {}).items()}
        held[token] = held.get(token, 0.0) + probability**rule.exponent
        after[position] = held
    return after


def raised(logits_NV: Tensor, held_N: Sequence[Mapping[int, float]], rule: Credit) -> Tensor:
    """``logits_NV`` with each token's share for its credit added; ``held_N``: by token, of each position."""
    places = [(row, token) for row, held in enumerate(held_N) for token in held]
    gains = [rule.weight * math.log1p(credit) for held in held_N for credit in held.values()]
    rows, tokens = torch.tensor(places, device=logits_NV.device).T
    logits_NV = logits_NV.clone()
    logits_NV[rows, tokens] += torch.tensor(gains, dtype=logits_NV.dtype, device=logits_NV.device)
    return logits_NV
