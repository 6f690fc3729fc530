"""Decoding a LLaDA2 as anyone would write it first, and as its published ``generate`` does: what to beat.

Ordinary torch operations on the parameters of a model of ours, read by name, so that all sides have the same
weights. One request at a time; a block is denoised in equal steps, as in :mod:`unmask.diffusion.decoding`.

* **plain**: keys and values are kept, attention of a block runs over a slice of them, experts are a grouped
  matrix product, or a loop, over tokens sorted by expert, and the output layer sees the open block alone;
* **published**: nothing is kept; each step runs the whole text so far under a dense mask, experts in a loop,
  and makes the logits of all of its positions.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.models.base import LanguageModel
from unmask.models.llada2_moe.config import LLaDA2MoeConfig

__all__ = ["KeyValues", "PlainModel", "fill", "plain_steps", "published_step"]


@dataclass(slots=True)
class KeyValues:
    """Of each layer: keys and values (1, G, capacity, head)."""

    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class PlainModel:
    """The forward, of one row of tokens."""

    def __init__(self, model: LanguageModel, *, grouped: bool) -> None:
        """``grouped``: experts as grouped products; else a loop."""
        assert isinstance(model.config, LLaDA2MoeConfig), "the published code is that of LLaDA2"
        self.config, self.grouped, self.mask_token_id = model.config, grouped, model.mask_token_id
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.named = {name: value.detach() for name, value in named.items()}
        config = self.config
        self.layers = [
            {name[len(at) :]: value for name, value in self.named.items() if name.startswith(at)}
            for at in (f"layers.{layer}." for layer in range(config.num_hidden_layers))
        ]
        dim = config.rotary_dim
        speed = config.rope_theta ** -(torch.arange(0, dim, 2).float() / dim)
        angle = torch.outer(torch.arange(config.max_position_embeddings).float(), speed).repeat(1, 2)
        self.cos, self.sin = angle.cos(), angle.sin()

    def new_cache(self, capacity: int) -> KeyValues:
        """Room for ``capacity`` tokens."""
        config = self.config
        shape = (1, config.num_key_value_heads, capacity, config.head_dim)
        return KeyValues([(torch.empty(shape), torch.empty(shape)) for _ in self.layers])

    def hidden(self, ids: Tensor, start: int, cache: KeyValues | None, *, block: int) -> Tensor:
        """Final hidden states (n, D) of the whole blocks ``ids`` (n,) from position ``start`` on."""
        x = F.embedding(ids, self.named["embedding.weight"])
        mask = _block_causal(len(ids), block) if cache is None else None
        for layer, own in enumerate(self.layers):
            stored = None if cache is None else cache.layers[layer]
            normal = self._norm(x, own["attention_norm.weight"])
            x = x + self._attention(normal, own, start, stored, mask, block)
            h = self._norm(x, own["feed_forward_norm.weight"])
            routed = "feed_forward.router.weight" in own
            x = x + (self._experts(h, own) if routed else _gated(h, own, "feed_forward."))
        return self._norm(x, self.named["norm.weight"])

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores (n, V)."""
        return F.linear(hidden, self.named["head.weight"])

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, self.config.rms_norm_eps)

    def _turned(self, x: Tensor, start: int) -> Tensor:
        cos, sin = (table[start : start + x.shape[2]] for table in (self.cos, self.sin))
        turned, passed = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        left, right = turned.chunk(2, dim=-1)
        return torch.cat([turned * cos + torch.cat([-right, left], dim=-1) * sin, passed], dim=-1)

    def _attention(
        self,
        x: Tensor,
        own: dict[str, Tensor],
        start: int,
        stored: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        block: int,
    ) -> Tensor:
        config, count = self.config, len(x)
        heads, pairs = config.num_attention_heads, config.num_key_value_heads
        fused = F.linear(x, own["attention.query_key_value.weight"]).view(1, count, -1, config.head_dim)
        query, key, value = fused.transpose(1, 2).split([heads, pairs, pairs], dim=1)
        query = self._turned(self._norm(query, own["attention.query_norm.weight"]), start)
        key = self._turned(self._norm(key, own["attention.key_norm.weight"]), start)
        if stored is None:
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        else:
            for kept, new in zip(stored, (key, value), strict=True):
                kept[:, :, start : start + count] = new
            parts = []
            for first in range(0, count, block):
                key, value = (kept[:, :, : start + first + block] for kept in stored)
                asked = query[:, :, first : first + block]
                parts.append(F.scaled_dot_product_attention(asked, key, value, enable_gqa=True))
            out = torch.cat(parts, dim=2)
        return F.linear(out.transpose(1, 2).reshape(count, -1), own["attention.output.weight"])

    def _experts(self, x: Tensor, own: dict[str, Tensor]) -> Tensor:
        config = self.config
        scores = torch.sigmoid(F.linear(x, own["feed_forward.router.weight"]))
        ranked = (scores + own["feed_forward.router.expert_bias"]).view(len(x), config.n_group, -1)
        best = ranked.topk(2, -1).values.sum(-1).topk(config.topk_group, -1).indices
        excluded = torch.ones(ranked.shape[:2], dtype=torch.bool).scatter(1, best, False)
        ranked = ranked.masked_fill(excluded[..., None], float("-inf")).flatten(1)
        chosen = ranked.topk(config.num_experts_per_tok, -1).indices
        weights = scores.gather(1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * config.routed_scaling_factor
        order = chosen.flatten().argsort(stable=True)
        token = order // chosen.shape[1]
        counts = chosen.flatten().bincount(minlength=config.num_experts)
        into, out_of = own["feed_forward.experts.gate_up_proj"], own["feed_forward.experts.down_proj"]
        out = (_in_groups if self.grouped else _in_a_loop)(x[token], counts, into, out_of)
        out = out * weights.flatten()[order].unsqueeze(1)
        return torch.zeros_like(x).index_add_(0, token, out) + _gated(x, own, "feed_forward.shared_experts.")


def _in_groups(x: Tensor, counts: Tensor, into: Tensor, out_of: Tensor) -> Tensor:
    ends = counts.cumsum(0).to(torch.int32)
    gate, up = F.grouped_mm(x, into.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate) * up, out_of.transpose(1, 2), offs=ends)


def _in_a_loop(x: Tensor, counts: Tensor, into: Tensor, out_of: Tensor) -> Tensor:
    parts = []
    for expert, own in enumerate(x.split(counts.tolist())):
        if len(own):
            gate, up = (F.linear(own, half) for half in into[expert].chunk(2))
            parts.append(F.linear(F.silu(gate) * up, out_of[expert]))
    return torch.cat(parts)


def _gated(x: Tensor, own: dict[str, Tensor], prefix: str) -> Tensor:
    gate, up, down = (own[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down"))
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def _block_causal(length: int, block: int) -> Tensor:
    number = torch.arange(length) // block
    return number[:, None] >= number[None]


def fill(block: Tensor, scores: Tensor, *, count: int, mask_token_id: int) -> None:
    """Fill the ``count`` most confident masked positions of ``block`` (B,), given its scores (B, V)."""
    masked = block == mask_token_id
    scores[:, mask_token_id] = float("-inf")
    best, tokens = scores.max(-1)
    confidence = torch.exp(best - scores.logsumexp(-1)).masked_fill(~masked, -1.0)
    places = confidence.topk(min(count, int(masked.sum()))).indices
    block[places] = tokens[places]


@torch.inference_mode()
def plain_steps(model: PlainModel, prompt: Tensor, *, new: int, block: int, count: int) -> Iterator[Tensor]:
    """Generate ``new`` tokens behind a prompt of whole blocks; yields each block (B,) when it is full."""
    cache = model.new_cache(len(prompt) + new)
    model.hidden(prompt, 0, cache, block=block)
    for start in range(len(prompt), len(prompt) + new, block):
        ids = torch.full((block,), model.mask_token_id)
        while bool((ids == model.mask_token_id).any()):
            scores = model.logits(model.hidden(ids, start, cache, block=block))
            fill(ids, scores, count=count, mask_token_id=model.mask_token_id)
        model.hidden(ids, start, cache, block=block)
        yield ids


@torch.inference_mode()
def published_step(model: PlainModel, text: Tensor, *, block: int, count: int) -> None:
    """One step of the published ``generate``: ``text`` (n,) ends with the open block, which is filled."""
    scores = model.logits(model.hidden(text, 0, None, block=block))
    fill(text[-block:], scores[-block:], count=count, mask_token_id=model.mask_token_id)
