"""Ling 2.0: LLaDA2.0's body run causally. Predicts the next token."""

from typing import ClassVar

from unmask.models.bailing_moe_v2.config import BailingMoeV2Config
from unmask.models.llada2_moe.model import LLaDA2MoeModelLM

__all__ = ["BailingMoeV2ForCausalLM"]


class BailingMoeV2ForCausalLM(LLaDA2MoeModelLM):
    """Ling-mini-2.0 and -flash-2.0, without their multi-token-prediction layers."""

    causal: ClassVar[bool] = True
    config: BailingMoeV2Config
