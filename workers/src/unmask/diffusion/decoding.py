"""The rule that says which masked positions of a block are filled after a forward.

LLaDA2.0's confidence threshold with a quota (arXiv 2512.15745, section 5.4, and the
published ``generate``): every masked position whose best token has a probability
strictly greater than the threshold is filled; if those are fewer than the step's quota,
the quota's most confident positions are filled instead. So a block of B positions is
full after at most ``steps`` forwards. Filled positions are final.

Ties: equal logits choose the smaller token id, equal confidences the earlier position.
The mask token is never chosen, where the published code lets it win and go round again.

With an edit threshold, LLaDA2.1's joint decoding (arXiv 2602.08676): each step also
replaces generated tokens of the block whose best token is another one with a probability
strictly greater than that threshold. The block is final when a forward fills and edits
nothing, or after so many steps beyond the last fill.

Shape letters: R rows, B positions of a block, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Candidates",
    "DecodingParams",
    "Sampling",
    "Vicinity",
    "accept",
    "best_tokens",
    "best_tokens_at",
    "edits",
    "quota",
]

SCORES_AT_ONCE = 1 << 24
"""Most float32 scores that exist at a time: 64 MiB, where 8 blocks of 32 and 157,184 tokens would be 154."""
_SCORES_IN_CACHE = 1 << 19
"""Most float32 scores to choose from at a time on a CPU: 2 MiB, which are gone over several times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the tokens of a request are chosen; see :mod:`unmask.diffusion.sampling`."""

    temperature: float = 0.0
    """What logits are divided by; 0 takes the most probable token, whatever the rest says."""
    top_k: int | None = None
    """Draw from so many most probable tokens; None: from all."""
    top_p: float = 1.0
    """Draw from the fewest most probable tokens that have this probability together, at ``temperature``."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that are in the text become less probable (Keskar et al., arXiv 1909.05858): positive
    logits are divided by it, negative ones multiplied. It holds at temperature 0, too."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what cannot be drawn from."""
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")

    @property
    def is_plain(self) -> bool:
        """Whether the most probable token is taken, whatever has been said."""
        return self.temperature == 0 and self.repetition_penalty == 1


@dataclass(frozen=True, slots=True)
class Vicinity:
    """What is recomputed around a block of a canvas while it is denoised."""

    before: int = 16
    """Positions before the block. The default, here and behind, is dInfer's (arXiv 2510.08666)."""
    after: int = 16
    """Positions behind it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodingParams:
    """How one request is decoded."""

    max_new_tokens: int
    block_length: int
    threshold: float = 0.95
    """Probability above which a position is filled at once; above 1 only the quota fills."""
    steps: int | None = None
    """Most forwards per block; by default ``block_length``, that is at least one token each."""
    edit_threshold: float | None = None
    """Probability above which a generated token is replaced by a better one; None never edits."""
    max_post_edit_steps: int = 16
    """Most editing forwards per block once nothing is masked."""
    vicinity: Vicinity | None = None
    """Where the whole canvas is attended to: decode with the approximate cache; None is exact."""
    sampling: Sampling = Sampling()
    """How a position's token is chosen."""
    eos_token_id: int = 156_892
    mask_token_id: int = 156_895

    def __post_init__(self) -> None:
        """Check what no forward could make sense of."""
        if self.max_new_tokens < 1 or self.block_length < 1:
            raise ValueError(
                "max_new_tokens and block_length must be positive, "
                f"got {self.max_new_tokens} and {self.block_length}"
            )
        if self.threshold <= 0:
            raise ValueError(f"threshold must be above 0, got {self.threshold}")
        if self.edit_threshold is not None and self.edit_threshold < 0:
            raise ValueError(f"edit_threshold must not be negative, got {self.edit_threshold}")
        if self.max_post_edit_steps < 0:
            raise ValueError(f"max_post_edit_steps must not be negative, got {self.max_post_edit_steps}")
        if self.steps is not None and not 1 <= self.steps <= self.block_length:
            raise ValueError(f"steps must be 1 to block_length {self.block_length}, got {self.steps}")


@dataclass(frozen=True, slots=True)
class Candidates:
    """The best token of each position, and how sure the model is of it."""

    tokens: Tensor
    """int64 (..., B)."""
    confidence: Tensor
    """float32 (..., B): probability under the softmax at temperature 1."""


def best_tokens(logits: Tensor, *, mask_token_id: int) -> Candidates:
    """Greedy candidates from ``logits`` (..., B, V); choice and softmax exclude the mask token.

    The softmax is torch's, which computes each position by itself. ``logsumexp`` is not: of a single position
    it has several threads add up parts, and so comes out otherwise than in company.
    """
    allowed = logits.clone()
    allowed[..., mask_token_id] = float("-inf")
    tokens = allowed.argmax(dim=-1, keepdim=True)
    confidence = torch.softmax(allowed, dim=-1).gather(-1, tokens)
    return Candidates(tokens.squeeze(-1), confidence.squeeze(-1).float())


def best_tokens_at(
    hidden_PD: Tensor,
    logits: Callable[[Tensor], Tensor],
    *,
    vocab_size: int,
    mask_token_id: int,
    at_once: int = SCORES_AT_ONCE,
) -> Candidates:
    """Greedy candidates of P positions, at least one, whose scores are never all there at a time.

    Args:
        hidden_PD: Final hidden states of the positions.
        logits: The output layer, (P, D) to (P, V).
        vocab_size: V.
        mask_token_id: Never chosen.
        at_once: Most scores to compute at a time, but those of one position at least.

    Returns:
        Tokens and confidences (P,), on the device of ``hidden_PD``.
    """
    near = at_once if hidden_PD.is_cuda else _SCORES_IN_CACHE
    parts = [
        best_tokens(near_PV, mask_token_id=mask_token_id)
        for part in hidden_PD.split(max(1, at_once // vocab_size))
        for near_PV in logits(part).split(max(1, near // vocab_size))
    ]
    tokens = torch.cat([part.tokens for part in parts])
    return Candidates(tokens, torch.cat([part.confidence for part in parts]))


def quota(params: DecodingParams, step: int) -> int:
    """Fewest positions that step ``step`` (from 0) fills: even shares of the block, the first ones larger."""
    steps = params.steps or params.block_length
    share, longer = divmod(params.block_length, steps)
    return share + (1 if step < longer else 0)


def accept(confidence_B: Tensor, masked_B: Tensor, *, threshold: float, at_least: int) -> Tensor:
    """Which positions of one block to fill: bool (B,), a subset of ``masked_B``.

    Args:
        confidence_B: Probability of each position's candidate.
        masked_B: Positions not yet filled.
        threshold: Strict lower bound of the confidence.
        at_least: The step's quota; capped by the masked positions.
    """
    sure = masked_B & (confidence_B > threshold)
    if int(sure.sum()) >= at_least:
        return sure
    ranked = torch.sort(confidence_B.masked_fill(~masked_B, -1.0), descending=True, stable=True).indices
    filled = torch.zeros_like(masked_B)
    filled[ranked[: min(at_least, int(masked_B.sum()))]] = True
    return filled


def edits(candidates: Candidates, current_B: Tensor, editable_B: Tensor, *, threshold: float) -> Tensor:
    """Which tokens of one block to replace by their candidates: bool (B,), a subset of ``editable_B``.

    Args:
        candidates: Best token and confidence of each position, (B,).
        current_B: int64, the block's tokens.
        editable_B: Generated positions that are not masked; a prompt's never are.
        threshold: Strict lower bound of the confidence.
    """
    return editable_B & (candidates.tokens != current_B) & (candidates.confidence > threshold)
