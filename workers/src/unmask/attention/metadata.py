"""Who each token is, and the one rule of who may see whom.

Every way of running these models (autoregressive, full-sequence diffusion, block
diffusion on ``[x_t ; x_0]``, packed documents, decoding with a cache) differs only in
which tokens see which. That is said here with four integers per token instead of a
dense mask, so that a backend can build what it likes best: a dense mask, tiles, or
nothing at all.

The rule is equation 3 of LLaDA2.0 (arXiv 2512.15745), ANDed with documents, and
extended to several noisy copies ("views") that share one clean copy. A query sees a
key of its own document if

* query clean, key clean: the key's block is not later than the query's;
* query noisy, key clean: the key's block is strictly earlier than the query's;
* query noisy, key noisy: same view and same block;
* query clean, key noisy: never.

With one-token blocks the clean rule is the causal mask; with one block it is full
attention. Shape letters: B rows, S tokens of a row (Q of the queries, K of the keys).
"""

from dataclasses import dataclass
from typing import Literal, Self, TypeAlias

import torch
from torch import Tensor

__all__ = ["CLEAN", "PADDING", "Attends", "AttentionMetadata", "may_attend"]

Attends: TypeAlias = Literal["blocks", "canvas"]
"""What a token that is being decoded sees: its own block and earlier ones, or all of the sequence."""

PADDING = -1
"""The document of padding: it sees only padding, and nothing sees it."""

CLEAN = 0
"""The view of clean tokens; noisy copies count from 1."""


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Four int64 tensors of shape (B, S): which token stands at each place of each row."""

    position: Tensor
    """Position inside the document, counted from 0; what rotary embeddings turn by."""
    document: Tensor
    """Document of the token; :data:`PADDING` for padding. Equal only inside one row."""
    block: Tensor
    """Diffusion block of the token; compared only within one document."""
    view: Tensor
    """:data:`CLEAN`, or the number of the noisy copy that the token belongs to."""

    @classmethod
    def causal(cls, position: Tensor, document: Tensor) -> Self:
        """Each token sees itself and what precedes it in its document."""
        return cls.block_causal(position, document, block_length=1)

    @classmethod
    def block_causal(cls, position: Tensor, document: Tensor, *, block_length: int) -> Self:
        """Each token sees its own block and the earlier ones of its document."""
        block = position.div(block_length, rounding_mode="floor")
        return cls(position, document, block, torch.full_like(position, CLEAN))

    @classmethod
    def bidirectional(cls, position: Tensor, document: Tensor) -> Self:
        """Each token sees all of its document."""
        return cls(position, document, torch.zeros_like(position), torch.full_like(position, CLEAN))

    @classmethod
    def single_row(
        cls, length: int, *, block_length: int, start: int = 0, device: torch.device | None = None
    ) -> Self:
        """One document from position ``start`` on, block-causal: shape (1, length)."""
        position = torch.arange(start, start + length, device=device).unsqueeze(0)
        return cls.block_causal(position, torch.zeros_like(position), block_length=block_length)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows B, tokens S)."""
        rows, tokens = self.position.shape
        return rows, tokens

    def to(self, device: torch.device | str) -> Self:
        """The same metadata on ``device``."""
        cls = type(self)
        return cls(*(t.to(device) for t in (self.position, self.document, self.block, self.view)))


def may_attend(query: AttentionMetadata, key: AttentionMetadata) -> Tensor:
    """The rule of this module as a dense boolean tensor of shape (B, Q, K), True where attention is allowed.

    This is the reference that every backend equals; its cost is Q x K per row.
    """
    same_document = query.document[:, :, None] == key.document[:, None, :]
    query_block, key_block = query.block[:, :, None], key.block[:, None, :]
    query_view, key_view = query.view[:, :, None], key.view[:, None, :]
    query_clean, key_clean = query_view == CLEAN, key_view == CLEAN
    sees_clean = key_clean & torch.where(query_clean, key_block <= query_block, key_block < query_block)
    sees_noisy = ~key_clean & (query_view == key_view) & (query_block == key_block)
    return same_document & (sees_clean | sees_noisy)
