"""Attention over metadata: a plan is made once per forward and used by every layer.

``plan`` chooses how to compute; ``AttentionPlan.attend`` computes. Today's fast path is
torch's scaled-dot-product attention with one boolean mask shared by the layers, or none
where every query sees every key; :func:`attend_plainly` is the slow, obvious reference
beside it. Shape letters: B rows, H query heads, G key/value heads (H a multiple of G),
Q queries, K keys, D head size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.attention.metadata import AttentionMetadata, may_attend

__all__ = ["AttentionPlan", "attend_plainly", "plan"]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """How the queries of one forward attend to its keys."""

    mask: Tensor | None
    """(B, 1, Q, K) bool, True where allowed; None where everything is."""

    def attend(self, query_BHQD: Tensor, key_BGKD: Tensor, value_BGKD: Tensor) -> Tensor:
        """Softmax attention scaled by 1/sqrt(D), of shape (B, H, Q, D) and the queries' dtype."""
        grouped = query_BHQD.shape[1] != key_BGKD.shape[1]
        return F.scaled_dot_product_attention(
            query_BHQD, key_BGKD, value_BGKD, attn_mask=self.mask, enable_gqa=grouped
        )


def plan(query: AttentionMetadata, key: AttentionMetadata) -> AttentionPlan:
    """Plan one forward whose queries and keys are those tokens.

    Every query must see at least one key (itself, as a rule): a row of an attention
    matrix without any allowed key has no meaning.
    """
    allowed = may_attend(query, key)
    if bool(allowed.all()):
        return AttentionPlan(mask=None)
    return AttentionPlan(mask=allowed.unsqueeze(1))


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
