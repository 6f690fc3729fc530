"""What the trainer, the decoders and the server ask of a model, whatever its family."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from unmask.attention import Attends, AttentionMetadata, AttentionPlan
from unmask.errors import ModelError
from unmask.models.cache import CanvasCache, RowCache
from unmask.models.config import ModelConfig
from unmask.models.moe import Router
from unmask.models.paged import PagedCache, page_bytes

__all__ = ["Cache", "LanguageModel"]


class Cache(Protocol):
    """Keys and values of earlier tokens, which the tokens of a forward may see besides each other."""

    def plan(self, queries: AttentionMetadata) -> AttentionPlan:
        """How the queries of this forward attend to what is cached and to each other."""

    def extend(self, layer: int, key_BGSD: Tensor, value_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        """Take up the forward's keys and values of ``layer``; returns all, as the plan wants them."""


class LanguageModel(nn.Module, ABC):
    """A transformer over token ids whose attention pattern is given by metadata.

    Hidden states and logits are separate calls since training and decoding need logits at
    few positions, and the output layer is the widest of all.
    """

    config: ModelConfig
    causal: ClassVar[bool]
    """Whether the family predicts the next token (True) or the token at its own position (False)."""
    attends: ClassVar[Attends] = "blocks"
    """What the family was trained to see while it decodes; a decoder for the other kind refuses it."""

    computing_dtype: torch.dtype | None = None
    """The number format of a forward pass, where it is not that of the parameters."""

    @abstractmethod
    def hidden(
        self,
        ids: Tensor,
        metadata: AttentionMetadata,
        *,
        cache: Cache | None = None,
        disturb: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Final, normalised hidden states.

        Args:
            ids: int64 (B, S). Masked positions hold ``config.mask_token_id``.
            metadata: Who each token is, (B, S).
            cache: Earlier tokens that may be seen too; it takes up this forward's keys and values.
            disturb: Changes the embeddings, (B, S, hidden_size), before the first layer; None: nothing does.

        Returns:
            (B, S, hidden_size) in the model's dtype.
        """

    def store(self, ids: Tensor, metadata: AttentionMetadata, *, cache: Cache) -> None:
        """Let ``cache`` take up the keys and values of a forward whose hidden states nobody asks for.

        Args:
            ids: As for :meth:`hidden`.
            metadata: As for :meth:`hidden`.
            cache: Is the same afterwards, to the bit, as after :meth:`hidden`.
        """
        self.hidden(ids, metadata, cache=cache)

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the vocabulary: (..., hidden_size) to float32 (..., vocab_size)."""

    @property
    def mask_token_id(self) -> int:
        """The token id that stands at masked positions.

        Raises:
            ModelError: If the configuration names none.
        """
        if self.config.mask_token_id is None:
            raise ModelError("config.json: mask_token_id is missing; set it to a token that text never uses")
        return self.config.mask_token_id

    def new_cache(self, *, rows: int, capacity: int, block_length: int) -> RowCache:
        """An empty key/value cache for ``rows`` sequences of ``capacity`` tokens, beside the parameters."""
        return RowCache(self.config, rows, capacity, block_length, dtype=self.cache_dtype, device=self.device)

    def new_paged_cache(self, *, pages: int, block_length: int) -> PagedCache:
        """An empty cache of ``pages`` blocks, for whatever sequences share a forward."""
        return PagedCache(self.config, pages, block_length, dtype=self.cache_dtype, device=self.device)

    def page_bytes(self, *, block_length: int) -> int:
        """Memory of one page of such a cache."""
        return page_bytes(self.config, block_length=block_length, dtype=self.cache_dtype)

    def new_canvas_cache(self, length: int) -> CanvasCache:
        """An empty cache for one sequence of ``length`` tokens that is attended to as a whole."""
        return CanvasCache(self.config, length, dtype=self.cache_dtype, device=self.device)

    @property
    def cache_dtype(self) -> torch.dtype:
        """The number format of cached keys and values: that of a forward pass."""
        return self.computing_dtype or next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @abstractmethod
    def routers(self) -> list[Router]:
        """The routers of the mixture-of-experts layers, first layer first."""
