"""Decoding for models that attend to the whole canvas: LLaDA's low-confidence rule.

LLaDA and LLaDA-MoE (arXiv 2502.09992 and 2509.24389) see the prompt and all positions to
be generated at once, masked ones too. With one block of all new tokens every position
competes (full-sequence decoding); with smaller blocks, counted from the end of the
prompt, they are filled from left to right while all of the canvas stays visible
(semi-autoregressive). Which positions are filled is the rule of
:mod:`~unmask.diffusion.decoding`; a threshold above 1 leaves LLaDA's even quotas.

Attention is not causal, so no prefix has final keys and values, and a cache is an
approximation: with a :class:`Vicinity`, each block begins with a forward over the whole
canvas, and its other forwards recompute only the block and its neighbourhood, keeping the
keys and values of the rest (as Fast-dLLM, arXiv 2505.22618, and dInfer, arXiv
2510.08666, do). It is exact when the neighbourhood is everything.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from unmask.attention import AttentionMetadata
from unmask.diffusion.decoding import DecodingParams, accept, best_tokens, quota
from unmask.diffusion.generation import ForwardCounts, Generation
from unmask.errors import UsageError

__all__ = ["CanvasModel", "Vicinity", "generate_full_sequence"]


@dataclass(frozen=True, slots=True)
class Vicinity:
    """What is recomputed around a block while it is denoised."""

    before: int = 16
    """Positions before the block."""
    after: int = 16
    """Positions behind it."""


class CanvasModel(Protocol):
    """The part of :class:`unmask.models.base.LanguageModel` that this decoding needs."""

    def hidden(self, ids: Tensor, metadata: AttentionMetadata, *, cache: Any = None) -> Tensor:
        """Final hidden states, (1, S) ids to (1, S, D)."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary scores in float32, (..., D) to (..., V)."""

    def new_canvas_cache(self, length: int) -> Any:
        """A cache of ``length`` positions that any forward may overwrite a window of."""

    @property
    def device(self) -> torch.device:
        """Where inputs must be."""


@torch.inference_mode()
def generate_full_sequence(
    model: CanvasModel, prompt: Sequence[int], params: DecodingParams, *, vicinity: Vicinity | None = None
) -> Generation:
    """Generate ``params.max_new_tokens`` positions block by block; stop with the block of an end of text.

    Args:
        model: A model that attends to the whole sequence.
        prompt: Token ids; none of them counts as masked, whatever its value.
        params: ``steps`` is per block.
        vicinity: Use the approximate cache, recomputing this much around each block.

    Raises:
        UsageError: The prompt is empty.
    """
    if not prompt:
        raise UsageError("prompt: got no tokens, expected at least one")
    canvas = _Canvas(model, prompt, params, vicinity)
    first, last = len(prompt), len(prompt) + params.max_new_tokens
    for start in range(first, last, params.block_length):
        canvas.denoise(start, min(start + params.block_length, last))
        generated = canvas.ids[first : start + params.block_length]
        if params.eos_token_id in generated:
            generated = generated[: generated.index(params.eos_token_id) + 1]
            return Generation(generated, "eos", canvas.usage, len(generated) - 1)
    return Generation(canvas.ids[first:], "length", canvas.usage, params.max_new_tokens)


class _Canvas:
    """Prompt and positions to be generated, and what has been spent on them."""

    def __init__(
        self,
        model: CanvasModel,
        prompt: Sequence[int],
        params: DecodingParams,
        vicinity: Vicinity | None,
    ) -> None:
        self.model, self.params, self.vicinity = model, params, vicinity
        self.ids = [*prompt, *[params.mask_token_id] * params.max_new_tokens]
        self.masked = [False] * len(prompt) + [True] * params.max_new_tokens
        self.usage = ForwardCounts()
        self.cache = None if vicinity is None else model.new_canvas_cache(len(self.ids))

    def denoise(self, start: int, stop: int) -> None:
        """Fill positions ``start`` to ``stop - 1``."""
        step = 0
        while any(self.masked[start:stop]):
            hidden = self._hidden(start, stop, refresh=step == 0)
            best = best_tokens(self.model.logits(hidden), mask_token_id=self.params.mask_token_id)
            chosen = accept(
                best.confidence.cpu(),
                torch.tensor(self.masked[start:stop]),
                threshold=self.params.threshold,
                at_least=quota(self.params, step),
            )
            tokens = best.tokens.cpu()
            for place in chosen.nonzero()[:, 0].tolist():
                self.ids[start + place], self.masked[start + place] = int(tokens[place]), False
            step += 1

    def _hidden(self, start: int, stop: int, *, refresh: bool) -> Tensor:
        """Hidden states of ``start`` to ``stop - 1``, (positions, D)."""
        first, last = 0, len(self.ids)
        if self.vicinity is not None and not refresh:
            first, last = max(0, start - self.vicinity.before), min(last, stop + self.vicinity.after)
        position = torch.arange(first, last, device=self.model.device).unsqueeze(0)
        metadata = AttentionMetadata.bidirectional(position, torch.zeros_like(position))
        ids = torch.tensor([self.ids[first:last]], device=self.model.device)
        cache = None if self.cache is None else self.cache.select(first)
        self.usage.denoise += 1
        self.usage.positions += last - first
        return self.model.hidden(ids, metadata, cache=cache)[0, start - first : stop - first]
