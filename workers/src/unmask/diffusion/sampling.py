"""Drawing tokens instead of taking the most probable ones.

What is drawn for a position depends on its logits and on (seed, position, step) alone: no generator lives
between forwards, so a request gets the same tokens alone, in any batch, and where another server goes on with
it. One number is drawn for each position, and the token is found in the cumulative probabilities.

The confidence of a drawn token is its probability under the model (temperature 1, nothing left out), as for
greedy decoding, so that a threshold means the same; LLaDA's published code does the same (arXiv 2502.09992).

Shape letters: N positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from unmask.diffusion.credit import Ledger
from unmask.diffusion.decoding import Candidates, Sampling, best_tokens
from unmask.diffusion.rows import uniform

__all__ = ["candidates", "penalised"]

_STREAM = 3
"""Of the randomness of :mod:`~unmask.diffusion.rows`: 0 to 2 belong to training."""
_FEW = 1024
"""Tokens among which the nucleus is looked for first; sorting a whole vocabulary takes long."""


def candidates(
    logits_NV: Tensor,
    sampling: Sampling,
    *,
    positions: Sequence[int],
    step: int,
    text: Sequence[int],
    mask_token_id: int,
    ledger: Ledger | None = None,
    entropy: bool = False,
) -> Candidates:
    """A token for each position, and how sure the model is of it.

    Args:
        logits_NV: Float32 scores of positions of one request.
        sampling: How to choose.
        positions: Of each of them, from the first generated token.
        step: Denoise forward of the block, from 0.
        text: Tokens that are there already: of the prompt, of committed blocks, and of the block.
        mask_token_id: Never chosen.
        ledger: Where tokens have credit. It is told of this forward.
        entropy: Whether to say the entropy of each position's distribution, too.
    """
    logits_NV = penalised(logits_NV, text, sampling.repetition_penalty)
    if ledger is not None:
        logits_NV = ledger.book(logits_NV, positions, mask_token_id=mask_token_id)
    if sampling.temperature == 0:
        chosen = best_tokens(logits_NV, mask_token_id=mask_token_id)
    else:
        chosen = _drawn_at(logits_NV, sampling, positions, step, mask_token_id)
    return replace(chosen, entropy=_entropy(logits_NV, mask_token_id)) if entropy else chosen


def _drawn_at(
    logits_NV: Tensor, sampling: Sampling, positions: Sequence[int], step: int, mask_token_id: int
) -> Candidates:
    allowed = _allowed(logits_NV, mask_token_id)
    lots = np.concatenate([uniform(sampling.seed, _STREAM, position, step, 1) for position in positions])
    tokens = _drawn(allowed, sampling, torch.from_numpy(lots).to(allowed.device))
    chosen = allowed.gather(1, tokens[:, None])[:, 0]
    return Candidates(tokens, torch.exp(chosen - torch.logsumexp(allowed, dim=-1)).float())


def _entropy(logits_NV: Tensor, mask_token_id: int) -> Tensor:
    """Of the softmax without the mask token, in nats: float32 (N,)."""
    terms_NV: Tensor = torch.special.entr(_allowed(logits_NV, mask_token_id).softmax(dim=-1))
    return terms_NV.sum(dim=-1).float()


def _allowed(logits_NV: Tensor, mask_token_id: int) -> Tensor:
    allowed = logits_NV.clone()
    allowed[:, mask_token_id] = float("-inf")
    return allowed


def penalised(logits_NV: Tensor, text: Sequence[int], penalty: float) -> Tensor:
    """``logits_NV`` with the tokens of ``text`` made less probable, each once."""
    if penalty == 1.0 or not text:
        return logits_NV
    told = torch.tensor(sorted(set(text)), device=logits_NV.device)
    logits_NV = logits_NV.clone()
    scores = logits_NV[:, told]
    logits_NV[:, told] = torch.where(scores > 0, scores / penalty, scores * penalty)
    return logits_NV


def _drawn(allowed_NV: Tensor, sampling: Sampling, lots_N: Tensor) -> Tensor:
    """A token for each lot in [0, 1), int64 (N,); where some are left out, the most probable first."""
    size = allowed_NV.shape[1]
    most = size if sampling.top_k is None else min(sampling.top_k, size)
    weights = _weights(allowed_NV, sampling.temperature)
    if most == size and sampling.top_p == 1:
        return _found(weights.cumsum(-1), lots_N)
    sought = most if sampling.top_k is not None else min(_FEW, size)
    ranked, tokens = _most_probable(weights, sought)
    total = ranked.sum(-1) if sampling.top_k is not None else weights.sum(-1)
    if sought < most and bool((ranked.sum(-1) < sampling.top_p * total).any()):
        ranked, tokens = _most_probable(weights, most)
    cumulative = ranked.cumsum(-1)
    # A token belongs to the nucleus if those before it do not suffice.
    kept = (cumulative - ranked) < sampling.top_p * total[:, None]
    places = _found(cumulative.masked_fill(~kept, 0).cummax(-1).values, lots_N)
    return tokens.gather(1, places[:, None])[:, 0]


def _weights(allowed_NV: Tensor, temperature: float) -> Tensor:
    """Probabilities at ``temperature`` but for a factor, float64 (N, V)."""
    scaled = allowed_NV.double()
    scaled = (scaled - scaled.max(dim=-1, keepdim=True).values) / temperature
    return scaled.exp_()


def _most_probable(weights_NV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest weights in falling order and their tokens, (N, count); equal ones by token id."""
    if count < weights_NV.shape[1]:
        # Those that tie with the last one are let go or kept by their ids: look a little further.
        least = weights_NV.topk(count, dim=-1).values[:, -1:]
        tied = (weights_NV >= least).sum(-1).max()
        tokens = weights_NV.topk(int(tied), dim=-1).indices.sort(dim=-1).values
    else:
        tokens = torch.arange(weights_NV.shape[1], device=weights_NV.device).expand(len(weights_NV), -1)
    ranked, order = weights_NV.gather(1, tokens).sort(dim=-1, descending=True, stable=True)
    return ranked[:, :count], tokens.gather(1, order)[:, :count]


def _found(cumulative_NK: Tensor, lots_N: Tensor) -> Tensor:
    """Where each lot falls, int64 (N,): the first place whose cumulative weight is above its share of all."""
    wanted = lots_N.to(cumulative_NK.dtype) * cumulative_NK[:, -1]
    places = torch.searchsorted(cumulative_NK, wanted[:, None], right=True)[:, 0]
    # A lot just below 1 may be rounded up to the whole.
    last = torch.searchsorted(cumulative_NK, cumulative_NK[:, -1:].contiguous(), right=False)[:, 0]
    return torch.minimum(places, last)
