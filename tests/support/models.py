"""Tiny models and packed rows, built in a line."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from unmask.diffusion.rows import PackedRows
from unmask.models.base import LanguageModel
from unmask.models.loading import build
from unmask.models.registry import parse_config

TINY: dict[str, Any] = {
    "architectures": ["LLaDA2MoeModelLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "max_position_embeddings": 256,
    "rope_theta": 10_000.0,
    "mask_token_id": 63,
    "eos_token_id": 62,
    "pad_token_id": 62,
    "initializer_range": 0.3,
}
"""A LLaDA2 of some 20 thousand parameters whose random logits differ clearly from token to token."""

TINY_CANVAS: dict[str, Any] = {
    "architectures": ["LLaDAMoEModelLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "expert_intermediate_size": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "mask_token_id": 63,
    "eos_token_id": 62,
    "pad_token_id": 62,
    "initializer_range": 0.3,
}
"""A LLaDA-MoE, which attends to the whole canvas, of the same size."""


def tiny_canvas_model(*, dtype: torch.dtype = torch.float64, seed: int = 1) -> LanguageModel:
    """A random tiny model that attends to the whole canvas, in eval mode."""
    return build(parse_config(TINY_CANVAS), dtype=dtype, seed=seed).eval()


def tiny_model(*, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> LanguageModel:
    """A random tiny model in eval mode, with a router bias that is not zero."""
    model = build(parse_config({**TINY, **changes}), dtype=dtype, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    for router in model.routers():
        router.expert_bias.copy_(torch.empty_like(router.expert_bias).normal_(std=0.1, generator=generator))
    return model


def packed_row(
    *documents: Sequence[int], length: int, prompt: Sequence[int] = (), first_ordinal: int = 0
) -> PackedRows:
    """One row of ``documents`` in order; the ``prompt[i]`` first tokens of document i are not supervised."""
    ids = np.full((1, length), TINY["eos_token_id"], np.int64)
    document, ordinal = np.full((1, length), -1, np.int64), np.zeros((1, length), np.int64)
    position, supervised = np.zeros((1, length), np.int64), np.zeros((1, length), np.bool_)
    start = 0
    for number, tokens in enumerate(documents):
        span = (0, slice(start, start + len(tokens)))
        ids[span], document[span], ordinal[span] = tokens, number, first_ordinal + number
        position[span] = np.arange(len(tokens))
        supervised[span] = np.arange(len(tokens)) >= (prompt[number] if prompt else 0)
        start += len(tokens)
    return PackedRows(ids=ids, document=document, position=position, supervised=supervised, ordinal=ordinal)


def random_tokens(count: int, *, seed: int = 0) -> list[int]:
    """Token ids that are neither the mask nor the end of text."""
    return np.random.default_rng(seed).integers(0, 60, count).tolist()
