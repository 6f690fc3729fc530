"""Attention as metadata: who each token is, who may see whom, and backends that compute it.

Both the models (which attend) and the diffusion maths (which decides who is who) build
on this package; it imports neither.
"""

from unmask.attention.backend import AttentionPlan, attend_plainly, plan
from unmask.attention.metadata import CLEAN, PADDING, Attends, AttentionMetadata, may_attend

__all__ = [
    "CLEAN",
    "PADDING",
    "Attends",
    "AttentionMetadata",
    "AttentionPlan",
    "attend_plainly",
    "may_attend",
    "plan",
]
