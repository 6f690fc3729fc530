"""Attention over metadata: a plan is made once per forward and used by every layer.

``plan`` chooses how to compute; ``AttentionPlan.attend`` computes. For few queries that is
torch's scaled-dot-product attention with one boolean mask shared by the layers, or none
where every query sees every key; for many, on a CPU, the same tile by tile
(:mod:`~unmask.attention.tiled`). On a GPU, from one tile of queries on, it
is block-sparse (:mod:`~unmask.attention.flex`). :func:`attend_plainly` is the slow, obvious
reference beside them all. Shape letters: B rows, H query heads, G key/value heads (H a multiple of G),
Q queries, K keys, D head size.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.attention.flex import TILE, compiled_flex_attention, plan_flex
from unmask.attention.metadata import AttentionMetadata, may_attend
from unmask.attention.tiled import SMALLEST, plan_tiled

__all__ = ["AttentionPlan", "MaskedPlan", "attend_plainly", "plan", "plan_masked"]


class AttentionPlan(Protocol):
    """How the queries of one forward attend to its keys."""

    def attend(self, query_BHQD: Tensor, key_BGKD: Tensor, value_BGKD: Tensor) -> Tensor:
        """Softmax attention scaled by 1/sqrt(D), of shape (B, H, Q, D) and the queries' dtype."""


@dataclass(frozen=True, slots=True)
class MaskedPlan:
    """Attention with a dense mask, or none."""

    mask: Tensor | None
    """(B, 1, Q, K) bool, True where allowed; None where everything is."""

    def attend(self, query_BHQD: Tensor, key_BGKD: Tensor, value_BGKD: Tensor) -> Tensor:
        """See :meth:`AttentionPlan.attend`."""
        grouped = query_BHQD.shape[1] != key_BGKD.shape[1]
        return F.scaled_dot_product_attention(
            query_BHQD, key_BGKD, value_BGKD, attn_mask=self.mask, enable_gqa=grouped
        )


def plan(query: AttentionMetadata, key: AttentionMetadata) -> AttentionPlan:
    """Plan one forward whose queries and keys are those tokens.

    Every query must see at least one key (itself, as a rule): a row of an attention
    matrix without any allowed key has no meaning.
    """
    if query.position.is_cuda and query.shape[1] >= TILE:
        return plan_flex(query, key, compute=compiled_flex_attention())
    if not query.position.is_cuda and query.shape[1] >= SMALLEST:
        return plan_tiled(query, key)
    return plan_masked(query, key)


def plan_masked(query: AttentionMetadata, key: AttentionMetadata) -> MaskedPlan:
    """The dense way, whatever the device."""
    allowed = may_attend(query, key)
    if bool(allowed.all()):
        return MaskedPlan(mask=None)
    return MaskedPlan(mask=allowed.unsqueeze(1))


def attend_plainly(
    query: AttentionMetadata,
    key: AttentionMetadata,
    query_BHQD: Tensor,
    key_BGKD: Tensor,
    value_BGKD: Tensor,
) -> Tensor:
    """The reference: scores, mask, softmax, weighted sum, written out."""
    repeats = query_BHQD.shape[1] // key_BGKD.shape[1]
    key_BHKD, value_BHKD = key_BGKD.repeat_interleave(repeats, 1), value_BGKD.repeat_interleave(repeats, 1)
    scores_BHQK = query_BHQD @ key_BHKD.transpose(-1, -2) / query_BHQD.shape[-1] ** 0.5
    scores_BHQK = scores_BHQK.masked_fill(~may_attend(query, key).unsqueeze(1), float("-inf"))
    return torch.softmax(scores_BHQK, dim=-1) @ value_BHKD
