"""Configuration of Ling 2.0. The keys are LLaDA2.0's, plus the number of multi-token-prediction layers.

The mask id defaults to the row that LLaDA2.0 took for it, which is an unused reserved
token in the Ling *base* tokenizer (in the *chat* tokenizer it ends a turn: convert from base).
"""

from typing import ClassVar

from pydantic import NonNegativeInt

from unmask.models.llada2_moe.config import LLaDA2MoeConfig

__all__ = ["BailingMoeV2Config"]


class BailingMoeV2Config(LLaDA2MoeConfig):
    """``config.json`` of ``BailingMoeV2ForCausalLM``."""

    architecture: ClassVar[str] = "BailingMoeV2ForCausalLM"

    model_type: str = "bailing_moe"
    num_nextn_predict_layers: NonNegativeInt = 0
    """Multi-token-prediction layers that follow the last layer on disk; they are not loaded."""
