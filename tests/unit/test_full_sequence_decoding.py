"""LLaDA's decoding against its published loop written out plainly, and the approximate cache."""

import pytest
import torch

from support.models import TINY, random_tokens
from unmask.attention import AttentionMetadata
from unmask.diffusion.decoding import DecodingParams
from unmask.diffusion.full_sequence import Vicinity, generate_full_sequence
from unmask.errors import UsageError
from unmask.models.loading import build
from unmask.models.registry import parse_config

MASK, EOS = TINY["mask_token_id"], TINY["eos_token_id"]


@pytest.fixture(scope="module")
def model():
    config = {
        "architectures": ["LLaDAMoEModelLM"],
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "expert_intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 128,
        "mask_token_id": MASK,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
        "initializer_range": 0.3,
    }
    return build(parse_config(config), dtype=torch.float64, seed=1).eval()


def params(**changes):
    defaults = {"max_new_tokens": 16, "block_length": 8, "steps": 4, "threshold": 2.0}
    return DecodingParams(**{**defaults, "eos_token_id": EOS, "mask_token_id": MASK, **changes})


def published_loop(model, prompt, *, new_tokens, block_length, steps_per_block):
    """Low-confidence decoding as LLaDA's generate describes it, one sequence, no cache."""
    ids = torch.tensor([*prompt, *[MASK] * new_tokens])
    masked = torch.arange(len(ids)) >= len(prompt)
    for block in range(new_tokens // block_length):
        start = len(prompt) + block * block_length
        stop = start + block_length
        base, longer = divmod(block_length, steps_per_block)
        for step in range(steps_per_block):
            position = torch.arange(len(ids)).unsqueeze(0)
            metadata = AttentionMetadata.bidirectional(position, torch.zeros_like(position))
            with torch.no_grad():
                logits = model.logits(model.hidden(ids.unsqueeze(0), metadata))[0]
            logits[:, MASK] = -torch.inf
            confidence, tokens = torch.softmax(logits, -1).max(-1)
            confidence[~masked] = -torch.inf
            confidence[:start] = -torch.inf
            confidence[stop:] = -torch.inf
            for place in confidence.topk(base + (step < longer)).indices:
                ids[place], masked[place] = tokens[place], False
    return ids[len(prompt) :].tolist()


@pytest.mark.parametrize(("block_length", "steps"), [(16, 16), (16, 5), (8, 8), (8, 3), (4, 2), (4, 1)])
def test_tokens_are_those_of_the_published_loop(model, block_length, steps):
    prompt = random_tokens(7)
    expected = published_loop(model, prompt, new_tokens=16, block_length=block_length, steps_per_block=steps)
    got = generate_full_sequence(model, prompt, params(block_length=block_length, steps=steps))
    cut = expected.index(EOS) + 1 if EOS in expected else len(expected)
    assert got.token_ids == expected[:cut]
    if EOS not in expected:
        assert got.usage.denoise == 16 // block_length * steps


@pytest.mark.parametrize("threshold", [0.1, 0.3, 2.0])
def test_a_vicinity_of_everything_is_exact(model, threshold):
    prompt = random_tokens(9, seed=2)
    plain = generate_full_sequence(model, prompt, params(threshold=threshold))
    cached = generate_full_sequence(model, prompt, params(threshold=threshold), vicinity=Vicinity(99, 99))
    assert cached == plain


def test_a_small_vicinity_computes_less_and_fills_everything(model):
    prompt = random_tokens(20, seed=3)
    plain = generate_full_sequence(model, prompt, params())
    cached = generate_full_sequence(model, prompt, params(), vicinity=Vicinity(2, 2))
    assert cached.usage.positions < plain.usage.positions / 1.5
    assert len(cached.token_ids) == len(plain.token_ids) == 16 and MASK not in cached.token_ids


def test_the_mask_id_in_a_prompt_is_text(model):
    prompt = [3, MASK, 5]
    got = generate_full_sequence(model, prompt, params(block_length=16, steps=16))
    assert got.usage.denoise == 16, "sixteen positions at one a forward; the prompt's are none of them"


def test_generation_ends_with_the_block_of_the_end_of_text(model):
    prompt = random_tokens(7)
    whole = generate_full_sequence(model, prompt, params()).token_ids
    eos = whole[2]
    ended = generate_full_sequence(model, prompt, params(eos_token_id=eos))
    kept = whole.index(eos)
    assert (ended.token_ids, ended.reason, ended.kept_tokens) == (whole[: kept + 1], "eos", kept)
    assert ended.usage.denoise == 4


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(UsageError, match="prompt: got no tokens"):
        generate_full_sequence(model, [], params())
