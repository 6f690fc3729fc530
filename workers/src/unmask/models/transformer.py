"""The transformer that every family is made of: parts to choose from, and the one forward.

A family's ``model`` module picks its parts (attention with or without norms on queries
and keys, dense or expert feed-forwards) and hands its layers to :class:`Transformer`.
Nothing here is causal: who sees whom comes with each forward as metadata.
Parameter names are ours and the same for all families; published names are the business
of each family's ``weights`` module. Shape letters: B rows, S tokens, D hidden size,
H query heads, G key/value heads.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.attention import PADDING, AttentionMetadata, AttentionPlan, plan
from unmask.attention.tiles import part_of
from unmask.models.base import Cache, LanguageModel
from unmask.models.config import ModelConfig
from unmask.models.feedforward import FeedForward
from unmask.models.moe import MixtureOfExperts, Router
from unmask.models.norm import RMSNorm
from unmask.models.output_layer import in_slices
from unmask.models.paged import PagedCache, PagedPart
from unmask.models.rotary import Rotation

__all__ = ["Attention", "Layer", "Rotary", "Transformer", "pre_norm_layer"]


@dataclass(frozen=True, slots=True)
class Rotary:
    """How positions turn queries and keys: the first ``dim`` dimensions of a head, with base ``theta``."""

    dim: int
    theta: float


class Attention(nn.Module):
    """Grouped-query attention with one fused projection for queries, keys and values."""

    def __init__(
        self,
        hidden_size: int,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        query_key_norm: Literal["none", "head", "all heads"],
        norm_eps: float,
    ) -> None:
        """``query_key_value`` has all query rows, then all key rows, then all value rows.

        ``query_key_norm`` says what a norm on queries and on keys runs over: each head by
        itself, or all heads as one vector.
        """
        super().__init__()
        self.heads = (heads, kv_heads, kv_heads)
        self.head_dim = head_dim
        self.query_key_value = nn.Linear(hidden_size, sum(self.heads) * head_dim, bias=False)
        self.output = nn.Linear(heads * head_dim, hidden_size, bias=False)
        self.normalises_all_heads = query_key_norm == "all heads"
        self.query_norm: nn.Module = nn.Identity()
        self.key_norm: nn.Module = nn.Identity()
        if query_key_norm != "none":
            widths = (
                (heads * head_dim, kv_heads * head_dim) if self.normalises_all_heads else (head_dim, head_dim)
            )
            self.query_norm, self.key_norm = (RMSNorm(width, eps=norm_eps) for width in widths)

    def forward(
        self, x_BSD: Tensor, rotation: Rotation, attention: AttentionPlan, layer: int, cache: Cache | None
    ) -> Tensor:
        """(B, S, D) to (B, S, D)."""
        query, key, value = self._project(x_BSD)
        query, key = rotation.turn(query), rotation.turn(key)
        if cache is not None:
            key, value = cache.extend(layer, key, value)
        out_BHSD = attention.attend(query, key, value)
        out: Tensor = self.output(out_BHSD.transpose(1, 2).flatten(2))
        return out

    def store(self, x_BSD: Tensor, rotation: Rotation, layer: int, cache: Cache) -> None:
        """Put keys and values where :meth:`forward` puts them, and attend to nothing."""
        _, key, value = self._project(x_BSD)
        cache.extend(layer, rotation.turn(key), value)

    def _project(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised queries (B, H, S, head), normalised keys and values (B, G, S, head)."""
        fused = self.query_key_value(x_BSD)
        if self.normalises_all_heads:
            query, key, value = fused.split([count * self.head_dim for count in self.heads], dim=-1)
            parts = (self.query_norm(query), self.key_norm(key), value)
            query, key, value = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
            return query, key, value
        heads_BHSD = fused.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        query, key, value = heads_BHSD.split(self.heads, dim=1)
        return self.query_norm(query), self.key_norm(key), value


class Layer(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    around: Callable[..., Tensor] | None = None
    """Called with the layer's computation and its arguments, to run it in its own way; None: it just runs."""

    def __init__(
        self,
        hidden_size: int,
        *,
        attention: Attention,
        feed_forward: FeedForward | MixtureOfExperts,
        norm_eps: float,
    ) -> None:
        """Put the parts together."""
        super().__init__()
        self.attention_norm = RMSNorm(hidden_size, eps=norm_eps)
        self.attention = attention
        self.feed_forward_norm = RMSNorm(hidden_size, eps=norm_eps)
        self.feed_forward = feed_forward

    def forward(
        self, x_BSD: Tensor, rotation: Rotation, attention: AttentionPlan, layer: int, cache: Cache | None
    ) -> Tensor:
        """(B, S, D) to (B, S, D)."""
        if self.around is not None:
            return self.around(self._compute, x_BSD, rotation, attention, layer, cache)
        return self._compute(x_BSD, rotation, attention, layer, cache)

    def begin(
        self,
        x_BSD: Tensor,
        rotation: Rotation,
        attention: AttentionPlan,
        layer: int,
        cache: Cache | None,
        micro_batch: int = 0,
    ) -> Callable[[], Tensor]:
        """The same in two: returns what waits for experts that are elsewhere, if they are."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rotation, attention, layer, cache)
        normed_BSD = self.feed_forward_norm(x_BSD)
        if isinstance(self.feed_forward, MixtureOfExperts):
            end = self.feed_forward.begin(normed_BSD, micro_batch)
            return lambda: x_BSD + end()
        out: Tensor = x_BSD + self.feed_forward(normed_BSD)
        return lambda: out

    def store(self, x_BSD: Tensor, rotation: Rotation, layer: int, cache: Cache) -> None:
        """Put the keys and values of (B, S, D) into the cache, and compute nothing else."""
        self.attention.store(self.attention_norm(x_BSD), rotation, layer, cache)

    def _compute(
        self, x_BSD: Tensor, rotation: Rotation, attention: AttentionPlan, layer: int, cache: Cache | None
    ) -> Tensor:
        return self.begin(x_BSD, rotation, attention, layer, cache)()


def pre_norm_layer(
    config: ModelConfig,
    *,
    query_key_norm: Literal["none", "head", "all heads"],
    feed_forward: FeedForward | MixtureOfExperts,
) -> Layer:
    """A layer of ``config``'s widths around ``feed_forward``."""
    attention = Attention(
        config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        query_key_norm=query_key_norm,
        norm_eps=config.rms_norm_eps,
    )
    return Layer(
        config.hidden_size, attention=attention, feed_forward=feed_forward, norm_eps=config.rms_norm_eps
    )


@dataclass(slots=True)
class _Part:
    """Some blocks of a forward, on their way through the layers."""

    cache: PagedPart
    rotation: Rotation
    attention: AttentionPlan
    end: Callable[[], Tensor]
    """Waits for the layer that was begun last, and gives what comes out of it, (1, S, D)."""


class Transformer(LanguageModel):
    """Embedding, layers, final norm and output layer."""

    micro_batches: int = 1
    """Parts of a forward over pages that take turns at each layer, where its experts are elsewhere."""

    def __init__(
        self, config: ModelConfig, *, layers: Iterable[Layer], rotary: Rotary, tied_output: bool = False
    ) -> None:
        """Uninitialised parameters; :mod:`unmask.models.loading` fills them.

        ``tied_output`` makes the embedding the output layer as well.
        """
        super().__init__()
        self.config = config
        self.rotary = rotary
        # Weights come later; the embedding's own first ones would import torch's compiler, for five seconds.
        unset = torch.empty(config.vocab_size, config.hidden_size)
        self.embedding = nn.Embedding.from_pretrained(unset, freeze=False)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head: nn.Module | None = None
        if not tied_output:
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def hidden(
        self,
        ids: Tensor,
        metadata: AttentionMetadata,
        *,
        cache: Cache | None = None,
        disturb: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """See :meth:`LanguageModel.hidden`."""
        if self.micro_batches > 1 and isinstance(cache, PagedCache):
            parts = self._in_turns(ids, metadata, cache, self.layers)
            return torch.cat([self.norm(part.end()) for part in parts], dim=1)
        attention = plan(metadata, metadata) if cache is None else cache.plan(metadata)
        rotation = self._rotation(metadata)
        if self.training:
            # How many rows end in padding depends on how a step is split, and must not move a router's bias.
            real = metadata.document.flatten() != PADDING
            for router in self.routers():
                router.counted = real
        x_BSD = self.embedding(ids)
        if disturb is not None:
            x_BSD = disturb(x_BSD)
        for index, layer in enumerate(self.layers):
            x_BSD = layer(x_BSD, rotation, attention, index, cache)
        out: Tensor = self.norm(x_BSD)
        return out

    def store(self, ids: Tensor, metadata: AttentionMetadata, *, cache: Cache) -> None:
        """See :meth:`LanguageModel.store`; the last layer's keys and values are all that it is needed for."""
        *before, last = self.layers
        assert isinstance(last, Layer)
        if self.micro_batches > 1 and isinstance(cache, PagedCache):
            for part in self._in_turns(ids, metadata, cache, before):
                last.store(part.end(), part.rotation, len(before), part.cache)
            return
        attention, rotation = cache.plan(metadata), self._rotation(metadata)
        x_BSD = self.embedding(ids)
        for index, layer in enumerate(before):
            x_BSD = layer(x_BSD, rotation, attention, index, cache)
        last.store(x_BSD, rotation, len(before), cache)

    def _in_turns(
        self, ids: Tensor, metadata: AttentionMetadata, cache: PagedCache, layers: Iterable[nn.Module]
    ) -> Sequence[_Part]:
        """The forward's parts, each in its last layer: a part goes on while others wait for their experts."""
        parts = []
        for cut in cache.divided(self.micro_batches):
            own = part_of(metadata, cut.where.start, cut.where.stop)
            embedded = partial(self.embedding, ids[:, cut.where])
            parts.append(_Part(cut, self._rotation(own), cut.plan(own), embedded))
        for index, layer in enumerate(layers):
            assert isinstance(layer, Layer)
            for number, part in enumerate(parts):
                x_BSD = part.end()
                part.end = layer.begin(x_BSD, part.rotation, part.attention, index, part.cache, number)
        return parts

    def _rotation(self, metadata: AttentionMetadata) -> Rotation:
        return Rotation.at(metadata.position, rotary_dim=self.rotary.dim, theta=self.rotary.theta)

    def logits(self, hidden: Tensor) -> Tensor:
        """See :meth:`LanguageModel.logits`."""
        sliced = torch.is_inference_mode_enabled() and hidden.device.type == "cpu"
        if self.head is None:
            scores = (in_slices if sliced else F.linear)(hidden, self.embedding.weight)
        elif sliced and type(self.head) is nn.Linear:
            scores = in_slices(hidden, self.head.weight)
        else:
            scores = self.head(hidden)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def routers(self) -> list[Router]:
        """See :meth:`LanguageModel.routers`."""
        return [module for module in self.modules() if isinstance(module, Router)]
