"""Greedy next-token generation with a cache: how an autoregressive model answers an evaluation.

All prompts are decoded together, one token each per forward. Shape letters: R prompts,
S tokens of the longest.
"""

from collections.abc import Sequence

import torch

from unmask.attention import AttentionMetadata
from unmask.diffusion.generation import ForwardCounts, Generation
from unmask.models.base import LanguageModel

__all__ = ["generate_greedily"]


@torch.inference_mode()
def generate_greedily(
    model: LanguageModel, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, eos_token_id: int
) -> list[Generation]:
    """Continue each prompt by its most likely tokens, up to and including the end of text.

    The forward over the prompt counts as prefill and gives the first token; each further
    token takes one more, which counts as denoise, so that the counts compare with those
    of diffusion.
    """
    lengths = [len(prompt) for prompt in prompts]
    cache = model.new_cache(rows=len(prompts), capacity=max(lengths) + max_new_tokens, block_length=1)
    cache.select(0, len(prompts))
    device = model.device
    # Shorter prompts are padded behind, where no token of theirs looks, and overwritten later.
    ids = torch.tensor([[*prompt, *[0] * (max(lengths) - len(prompt))] for prompt in prompts], device=device)
    position = torch.arange(ids.shape[1], device=device).expand_as(ids)
    metadata = AttentionMetadata.causal(position, torch.zeros_like(position))
    hidden = model.hidden(ids, metadata, cache=cache)
    last = torch.tensor(lengths, device=device) - 1
    token = model.logits(hidden[torch.arange(len(prompts), device=device), last]).argmax(-1)
    for row, length in enumerate(lengths):
        cache.commit(row, length)

    generated = [[first] for first in token.tolist()]
    for _ in range(max_new_tokens - 1):
        if all(eos_token_id in tokens for tokens in generated):
            break
        position = cache.lengths[:, None].clone()
        metadata = AttentionMetadata.causal(position, torch.zeros_like(position))
        hidden = model.hidden(token[:, None], metadata, cache=cache.select(0, len(prompts)))
        token = model.logits(hidden[:, 0]).argmax(-1)
        for row, following in enumerate(token.tolist()):
            cache.commit(row, 1)
            generated[row].append(following)
    return [_generation(*pair, eos_token_id) for pair in zip(lengths, generated, strict=True)]


def _generation(prompt_length: int, tokens: list[int], eos_token_id: int) -> Generation:
    """What one prompt got; tokens that were computed for its neighbours' sake are cut off."""
    ended = eos_token_id in tokens
    tokens = tokens[: tokens.index(eos_token_id) + 1] if ended else tokens
    counts = ForwardCounts(prefill=1, denoise=len(tokens) - 1, positions=prompt_length + len(tokens) - 1)
    return Generation(tokens, "eos" if ended else "length", counts, len(tokens) - ended)
