"""The LLaDA2.0 transformer: pre-norm, grouped-query attention with query/key norms, group-limited experts.

The body is that of Ling 2.0 (:mod:`unmask.models.bailing_moe_v2`); what makes it a
diffusion model is that nothing in it is causal: who sees whom comes with each forward.
Parameter names are the published ones, except that the experts of a layer are stacked.
Shape letters: B rows, S tokens, D hidden size, H query heads, G key/value heads.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from unmask.attention import AttentionMetadata, AttentionPlan, plan
from unmask.models.base import Cache, LanguageModel
from unmask.models.feedforward import FeedForward
from unmask.models.llada2_moe.config import LLaDA2MoeConfig
from unmask.models.moe import Experts, MixtureOfExperts, Router
from unmask.models.rotary import Rotation

__all__ = ["LLaDA2MoeModelLM"]


class Attention(nn.Module):
    """Grouped-query attention; queries and keys are normalised per head, then partly rotated."""

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        """``query_key_value`` has all query rows, then all key rows, then all value rows."""
        super().__init__()
        self.heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        self.head_dim = config.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, sum(self.heads) * config.head_dim, bias=False)
        self.query_layernorm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.key_layernorm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.dense = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(
        self, x_BSD: Tensor, rotation: Rotation, attention: AttentionPlan, layer: int, cache: Cache | None
    ) -> Tensor:
        """(B, S, D) to (B, S, D)."""
        heads_BHSD = self.query_key_value(x_BSD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        query, key, value = heads_BHSD.split(self.heads, dim=1)
        query = rotation.turn(self.query_layernorm(query))
        key = rotation.turn(self.key_layernorm(key))
        if cache is not None:
            key, value = cache.extend(layer, key, value)
        out_BHSD = attention.attend(query, key, value)
        out: Tensor = self.dense(out_BHSD.transpose(1, 2).flatten(2))
        return out


class Layer(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: LLaDA2MoeConfig, index: int) -> None:
        """Layer number ``index``: its feed-forward is dense or of experts, as the config says."""
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = (
            FeedForward(config.hidden_size, config.intermediate_size)
            if config.is_dense(index)
            else mixture_of_experts(config)
        )

    def forward(
        self, x_BSD: Tensor, rotation: Rotation, attention: AttentionPlan, layer: int, cache: Cache | None
    ) -> Tensor:
        """(B, S, D) to (B, S, D)."""
        x_BSD = x_BSD + self.attention(self.input_layernorm(x_BSD), rotation, attention, layer, cache)
        out: Tensor = x_BSD + self.mlp(self.post_attention_layernorm(x_BSD))
        return out


def mixture_of_experts(config: LLaDA2MoeConfig) -> MixtureOfExperts:
    """The expert layer that ``config`` describes."""
    gate = Router(
        config.hidden_size,
        config.num_experts,
        choose=config.num_experts_per_tok,
        groups=config.n_group,
        keep_groups=config.topk_group,
        scale=config.routed_scaling_factor,
    )
    experts = Experts(config.num_experts, config.hidden_size, config.moe_intermediate_size)
    shared_width = config.moe_intermediate_size * config.num_shared_experts
    return MixtureOfExperts(
        gate, experts, FeedForward(config.hidden_size, shared_width) if shared_width else None
    )


class Body(nn.Module):
    """Embedding, layers and the final norm."""

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        """As the config says."""
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class LLaDA2MoeModelLM(LanguageModel):
    """LLaDA2.0-mini and -flash; predicts the token at its own position."""

    causal: ClassVar[bool] = False
    config: LLaDA2MoeConfig

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        """Uninitialised parameters; :mod:`unmask.models.loading` fills them."""
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def hidden(self, ids: Tensor, metadata: AttentionMetadata, *, cache: Cache | None = None) -> Tensor:
        """See :meth:`LanguageModel.hidden`."""
        keys = metadata if cache is None else cache.keys_seen(metadata)
        attention = plan(metadata, keys)
        config = self.config
        rotation = Rotation.at(metadata.position, rotary_dim=config.rotary_dim, theta=config.rope_theta)
        x_BSD = self.model.word_embeddings(ids)
        for index, layer in enumerate(self.model.layers):
            x_BSD = layer(x_BSD, rotation, attention, index, cache)
        out: Tensor = self.model.norm(x_BSD)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """See :meth:`LanguageModel.logits`."""
        scores: Tensor = self.lm_head(hidden)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def routers(self) -> list[Router]:
        """See :meth:`LanguageModel.routers`."""
        return [module for module in self.modules() if isinstance(module, Router)]
