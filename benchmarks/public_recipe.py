"""A block-diffusion training step as public training code does it: what ``training.py`` compares with.

The model runs on ``[noisy | clean]``, all 2 L tokens, under one dense boolean mask; the output layer
makes the logits of all 2 L positions; the loss reads those of the noisy half and weighs the masked ones.
Ordinary torch operations on the parameters of an LLaDA2 model of ours, read by name, so that both sides
have the same weights and their gradients can be compared one by one. Experts run in a loop, each on the
tokens that chose it, as in the published modelling code; or, for a stronger opponent, as grouped matrix
products over tokens sorted by expert.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.models.base import LanguageModel
from unmask.models.llada2_moe.config import LLaDA2MoeConfig

__all__ = ["RecipeInputs", "loss_of"]


@dataclass(frozen=True, slots=True)
class RecipeInputs:
    """One row of L tokens and its noise."""

    ids: Tensor
    """int64 (L,)."""
    masked: Tensor
    """bool (L,)."""
    weights: Tensor
    """float32 (L,): 1/t."""
    block: int
    """Tokens of a block."""


def loss_of(model: LanguageModel, inputs: RecipeInputs, *, grouped: bool) -> Tensor:
    """The loss per token: a float32 scalar."""
    config = model.config
    assert isinstance(config, LLaDA2MoeConfig), "the recipe is that of LLaDA2"
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    length, device = len(inputs.ids), inputs.ids.device
    noisy = torch.where(inputs.masked, model.mask_token_id, inputs.ids)
    x = F.embedding(torch.cat([noisy, inputs.ids]), named["embedding.weight"])
    mask = _dense_mask(length, inputs.block, device)
    dim = int(config.head_dim * config.partial_rotary_factor)
    speed = config.rope_theta ** -(torch.arange(0, dim, 2, device=device).float() / dim)
    angle = torch.arange(length, device=device).repeat(2)[:, None].float() * speed
    turn = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    for layer in range(config.num_hidden_layers):
        prefix = f"layers.{layer}."
        own = {name.removeprefix(prefix): p for name, p in named.items() if name.startswith(prefix)}
        x = x + _attention(_norm(x, own["attention_norm.weight"], config), own, config, mask, turn)
        h = _norm(x, own["feed_forward_norm.weight"], config)
        routed = "feed_forward.router.weight" in own
        x = x + (_experts(h, own, config, grouped) if routed else _gated(h, own, "feed_forward."))
    logits = F.linear(_norm(x, named["norm.weight"], config), named["head.weight"]).float()
    terms = F.cross_entropy(logits[:length], inputs.ids, reduction="none")
    return (terms * inputs.weights * inputs.masked).sum() / length


def _dense_mask(length: int, block: int, device: torch.device) -> Tensor:
    """Equation 3 of LLaDA2.0, written out: bool (1, 1, 2 L, 2 L)."""
    number = (torch.arange(length, device=device) // block).repeat(2)
    clean = torch.arange(2 * length, device=device) >= length
    query, key = number[:, None], number[None]
    sees_clean = clean & torch.where(clean[:, None], key <= query, key < query)
    sees_noisy = ~clean & ~clean[:, None] & (key == query)
    return (sees_clean | sees_noisy)[None, None]


def _norm(x: Tensor, weight: Tensor, config: LLaDA2MoeConfig) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, config.rms_norm_eps)


def _attention(
    x: Tensor, own: dict[str, Tensor], config: LLaDA2MoeConfig, mask: Tensor, turn: tuple[Tensor, Tensor]
) -> Tensor:
    heads, pairs, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    fused = F.linear(x, own["attention.query_key_value.weight"]).view(1, len(x), -1, size).transpose(1, 2)
    query, key, value = fused.split([heads, pairs, pairs], dim=1)
    query = _turned(_norm(query, own["attention.query_norm.weight"], config), *turn)
    key = _turned(_norm(key, own["attention.key_norm.weight"], config), *turn)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    return F.linear(out.transpose(1, 2).reshape(len(x), -1), own["attention.output.weight"])


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, passed = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    left, right = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-right, left], dim=-1) * sin, passed], dim=-1)


def _gated(x: Tensor, own: dict[str, Tensor], prefix: str) -> Tensor:
    gate, up, down = (own[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down"))
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def _experts(x: Tensor, own: dict[str, Tensor], config: LLaDA2MoeConfig, grouped: bool) -> Tensor:
    scores = torch.sigmoid(F.linear(x, own["feed_forward.router.weight"]))
    with torch.no_grad():
        ranked = (scores + own["feed_forward.router.expert_bias"]).view(len(x), config.n_group, -1)
        best = ranked.topk(2, -1).values.sum(-1).topk(config.topk_group, -1).indices
        excluded = torch.ones(ranked.shape[:2], dtype=torch.bool, device=x.device).scatter(1, best, False)
        ranked = ranked.masked_fill(excluded[..., None], float("-inf")).flatten(1)
        chosen = ranked.topk(config.num_experts_per_tok, -1).indices
    weights = scores.gather(1, chosen)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * config.routed_scaling_factor
    into, out_of = own["feed_forward.experts.gate_up_proj"], own["feed_forward.experts.down_proj"]
    shared = _gated(x, own, "feed_forward.shared_experts.")
    way = _grouped if grouped else _one_by_one
    return way(x, chosen, weights, into, out_of) + shared


def _one_by_one(x: Tensor, chosen: Tensor, weights: Tensor, into: Tensor, out_of: Tensor) -> Tensor:
    copies, flat = x.repeat_interleave(chosen.shape[1], dim=0), chosen.flatten()
    results = torch.empty_like(copies)
    for expert, (gate_up, down) in enumerate(zip(into.unbind(), out_of.unbind(), strict=True)):
        gate, up = gate_up.chunk(2)
        own = copies[flat == expert]
        results[flat == expert] = F.linear(F.silu(F.linear(own, gate)) * F.linear(own, up), down)
    return (results.view(*chosen.shape, -1) * weights.unsqueeze(-1)).sum(1)


def _grouped(x: Tensor, chosen: Tensor, weights: Tensor, into: Tensor, out_of: Tensor) -> Tensor:
    order = chosen.flatten().argsort(stable=True)
    token = order // chosen.shape[1]
    ends = chosen.flatten().bincount(minlength=len(into)).cumsum(0).to(torch.int32)
    gate, up = F.grouped_mm(x[token], into.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    out = F.grouped_mm(F.silu(gate) * up, out_of.transpose(1, 2), offs=ends)
    return torch.zeros_like(x).index_add(0, token, out * weights.flatten()[order].unsqueeze(1))
