"""The rule that says which masked positions of a block are filled after a forward.

LLaDA2.0's confidence threshold with a quota (arXiv 2512.15745, section 5.4, and the
published ``generate``): every masked position whose best token has a probability
strictly greater than the threshold is filled; if those are fewer than the step's quota,
the quota's most confident positions are filled instead. So a block of B positions is
full after at most ``steps`` forwards. Filled positions are final.

Ties: equal logits choose the smaller token id, equal confidences the earlier position.
The mask token is never chosen, where the published code lets it win and go round again.

Two other rules fill at least one position at each step, and know no quota:

* by runs (hierarchical; dInfer, arXiv 2510.08666): every position surer than the threshold,
  the surest of each run of masked positions if it is surer than a lower one, and the surest
  of all. What is filled at once lies apart, where positions depend on each other less;
* by entropy (arXiv 2505.24857): positions in the order of their entropy, as long as the
  entropies of all but the last add up to no more than a bound, which holds what they can
  tell about each other below it.

With an edit threshold, LLaDA2.1's joint decoding (arXiv 2602.08676): each step also
replaces generated tokens of the block whose best token is another one with a probability
strictly greater than that threshold. The block is final when a forward fills and edits
nothing, or after so many steps beyond the last fill.

Shape letters: R rows, B positions of a block, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor

__all__ = [
    "Candidates",
    "Credit",
    "DecodingParams",
    "Sampling",
    "Vicinity",
    "accept",
    "accept_by_entropy",
    "accept_by_runs",
    "best_tokens",
    "best_tokens_at",
    "edits",
    "fills",
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
class Credit:
    """How much a token gains by having been the most probable one before (:mod:`~unmask.diffusion.credit`).

    The defaults are dInfer's (arXiv 2510.08666).
    """

    weight: float = 0.7
    """What the logarithm of 1 and a token's credit is multiplied by and added to its logit."""
    decay: float = 0.8
    """What is left of a credit after a forward."""
    exponent: float = 0.2
    """Power of its probability that the most probable token gets; below 1 small ones count for more."""

    def __post_init__(self) -> None:
        """Check what would make credits grow without end."""
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"credit weight must be 0 or more, got {self.weight}")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"credit decay must be 0 to 1, got {self.decay}")
        if not 0 <= self.exponent < float("inf"):
            raise ValueError(f"credit exponent must be 0 or more, got {self.exponent}")


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
    low_threshold: float | None = None
    """Fill by runs: probability above which the surest position of a run of masked ones is filled."""
    credit: Credit | None = None
    """Let a token gain by having been the most probable one before; None: each forward is judged alone."""
    entropy_bound: float | None = None
    """Fill by entropy, in nats: the most that positions filled at once may tell about each other."""
    early_exit: bool = True
    """Whether a block ends as soon as nothing of the answer is masked in it, whatever is masked behind its
    end. It changes no token; without it forwards are those of the published ``generate``."""
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
        if self.low_threshold is not None and not 0 <= self.low_threshold <= self.threshold:
            raise ValueError(
                f"low_threshold must be 0 to the threshold {self.threshold}, got {self.low_threshold}"
            )
        if self.entropy_bound is not None and not 0 <= self.entropy_bound < float("inf"):
            raise ValueError(f"entropy_bound must be 0 or more, got {self.entropy_bound}")
        self._check_rule()

    def _check_rule(self) -> None:
        """One rule fills, and has only what belongs to it."""
        rules = {
            name: getattr(self, name)
            for name in ("edit_threshold", "low_threshold", "credit", "entropy_bound")
            if getattr(self, name) is not None
        }
        if len(rules) > 1:
            raise ValueError(f"got {' and '.join(rules)}, which belong to different rules; give one")
        if self.steps is not None and rules.keys() & {"low_threshold", "entropy_bound"}:
            raise ValueError(f"steps: {next(iter(rules))} fills without a quota; leave steps out")

    @property
    def is_plain(self) -> bool:
        """Whether the most probable tokens and their probabilities are all that a step needs."""
        return self.sampling.is_plain and self.credit is None and self.entropy_bound is None


@dataclass(frozen=True, slots=True)
class Candidates:
    """The best token of each position, and how sure the model is of it."""

    tokens: Tensor
    """int64 (..., B)."""
    confidence: Tensor
    """float32 (..., B): probability under the softmax at temperature 1."""
    entropy: Tensor | None = None
    """float32 (..., B), in nats: of that softmax. None where nobody asks for it."""


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


def accept_by_runs(
    confidence_B: Tensor, masked_B: Tensor, *, threshold: float, low_threshold: float
) -> Tensor:
    """Which positions of one block to fill by runs: bool (B,), a subset of ``masked_B``, one at least.

    Args:
        confidence_B: Probability of each position's candidate.
        masked_B: Positions not yet filled.
        threshold: Strict lower bound of the confidence.
        low_threshold: The same for the surest position of each run of neighbours that are masked.
    """
    filled = masked_B & (confidence_B > threshold)
    confidence, masked = confidence_B.tolist(), masked_B.tolist()
    surest = [
        max(places, key=confidence.__getitem__)  # the first of equal ones
        for is_run, places in groupby(range(len(masked)), key=masked.__getitem__)
        if is_run
    ]
    for place in surest:
        filled[place] |= confidence[place] > low_threshold
    if surest:
        filled[max(surest, key=confidence.__getitem__)] = True
    return filled


def accept_by_entropy(entropy_B: Tensor, masked_B: Tensor, *, bound: float) -> Tensor:
    """Which positions of one block to fill by entropy: bool (B,), a subset of ``masked_B``, one at least.

    The joint entropy of some positions differs from the sum of theirs by no more than the sum without the
    largest one (Ben-Hamu et al., arXiv 2505.24857, section 4): that is what ``bound`` holds down.

    Args:
        entropy_B: Of each position's distribution, in nats.
        masked_B: Positions not yet filled.
        bound: Most that the entropies of filled positions may add up to, the last one's not counted.
    """
    entropy = entropy_B.tolist()
    order = sorted(masked_B.nonzero()[:, 0].tolist(), key=entropy.__getitem__)
    before = accumulate((entropy[place] for place in order), initial=0.0)
    filled = torch.zeros_like(masked_B)
    for place, told in zip(order, before, strict=False):
        filled[place] = told <= bound
    return filled


def fills(candidates: Candidates, masked_B: Tensor, params: DecodingParams, *, step: int) -> Tensor:
    """Which positions of one block step ``step`` (from 0) fills, by the rule of ``params``: bool (B,).

    Args:
        candidates: Of each position, (B,); with entropies where the rule goes by them.
        masked_B: Positions not yet filled.
        params: Names the rule.
        step: Denoise forward of the block.
    """
    if params.low_threshold is not None:
        return accept_by_runs(
            candidates.confidence,
            masked_B,
            threshold=params.threshold,
            low_threshold=params.low_threshold,
        )
    if params.entropy_bound is not None:
        assert candidates.entropy is not None
        return accept_by_entropy(candidates.entropy, masked_B, bound=params.entropy_bound)
    return accept(candidates.confidence, masked_B, threshold=params.threshold, at_least=quota(params, step))


def edits(candidates: Candidates, current_B: Tensor, editable_B: Tensor, *, threshold: float) -> Tensor:
    """Which tokens of one block to replace by their candidates: bool (B,), a subset of ``editable_B``.

    Args:
        candidates: Best token and confidence of each position, (B,).
        current_B: int64, the block's tokens.
        editable_B: Generated positions that are not masked; a prompt's never are.
        threshold: Strict lower bound of the confidence.
    """
    return editable_B & (candidates.tokens != current_B) & (candidates.confidence > threshold)
