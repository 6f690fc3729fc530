"""The shapes of published models, so that a job can be planned before anything is fetched. Needs no torch.

Only what a shape follows from is given; for anything else read the model's own ``config.json``.
Sources: ``config.json`` of LLaDA2.0-mini and -flash (arXiv 2512.15745), which have the bodies of the
Ling 2.0 models that they were made from, of LLaDA-MoE-7B-A1B (arXiv 2509.24389), SmolLM2-135M, Qwen3-0.6B
and -30B-A3B, and OLMoE-1B-7B-0924.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from unmask.errors import UsageError
from unmask.models.config import ModelConfig
from unmask.models.registry import parse_config

__all__ = ["PUBLISHED", "published_config"]

_LLADA2: Mapping[str, Any] = {
    "architectures": ["LLaDA2MoeModelLM"],
    "vocab_size": 157184,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "first_k_dense_replace": 1,
}
_MINI: Mapping[str, Any] = {
    **_LLADA2,
    "hidden_size": 2048,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "intermediate_size": 5120,
    "moe_intermediate_size": 512,
    "max_position_embeddings": 32768,
}
_FLASH: Mapping[str, Any] = {
    **_LLADA2,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
    "max_position_embeddings": 16384,
}
_QWEN3: Mapping[str, Any] = {
    "vocab_size": 151936,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "eos_token_id": 151645,
}
_LING: Mapping[str, Any] = {"architectures": ["BailingMoeV2ForCausalLM"]}

PUBLISHED: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llada2-mini": _MINI,
        "llada2-flash": _FLASH,
        "ling-mini": {**_MINI, **_LING},
        "ling-flash": {**_FLASH, **_LING},
        "llada-moe-7b-a1b": {
            "architectures": ["LLaDAMoEModelLM"],
            "vocab_size": 157184,
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "expert_intermediate_size": 1024,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "max_position_embeddings": 8192,
        },
        "smollm2-135m": {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 49152,
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 1536,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "eos_token_id": 0,
        },
        "qwen3-0.6b": {
            **_QWEN3,
            "architectures": ["Qwen3ForCausalLM"],
            "hidden_size": 1024,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "intermediate_size": 3072,
            "tie_word_embeddings": True,
        },
        "qwen3-30b-a3b": {
            **_QWEN3,
            "architectures": ["Qwen3MoeForCausalLM"],
            "hidden_size": 2048,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
        },
        "olmoe-1b-7b": {
            "architectures": ["OlmoeForCausalLM"],
            "vocab_size": 50304,
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "intermediate_size": 1024,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "max_position_embeddings": 4096,
            "eos_token_id": 50279,
        },
    }
)
"""Name -> the keys of ``config.json`` that say how large a model is."""


def published_config(name: str) -> ModelConfig:
    """The shape of the published model ``name``.

    Raises:
        UsageError: There is none of that name.
    """
    if name not in PUBLISHED:
        raise UsageError(f"got {name!r}; known are {', '.join(PUBLISHED)}, or give the path of a config.json")
    return parse_config(PUBLISHED[name], source=name)
