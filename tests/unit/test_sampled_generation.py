"""Requests whose tokens are drawn: alone, in company, with and without a cache, continued, they are equal."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support import counts
from support.models import TINY, random_tokens, tiny_canvas_model, tiny_model
from unmask.diffusion.batch import Committed, Finished
from unmask.diffusion.decoding import DecodingParams, Sampling
from unmask.diffusion.full_sequence import CanvasBatch
from unmask.diffusion.generation import BlockBatch, generate, generate_uncached
from unmask.serving.ragged import RaggedBatch

BLOCK = 4
EOS, MASK = TINY["eos_token_id"], TINY["mask_token_id"]
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=0.7, top_p=0.9, seed=2),
    Sampling(temperature=2.0, top_k=5, repetition_penalty=1.3, seed=3),
    Sampling(repetition_penalty=2.0),
]


def params(sampling, **changes):
    defaults = {"max_new_tokens": 14, "block_length": BLOCK, "threshold": 0.3}
    return DecodingParams(
        **{**defaults, "eos_token_id": EOS, "mask_token_id": MASK, "sampling": sampling, **changes}
    )


@pytest.fixture(scope="module")
def exact():
    return tiny_model(dtype=torch.float64)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=range(len(SAMPLINGS)))
@pytest.mark.parametrize("prompt", [1, 4, 7])
def test_with_a_cache_the_draws_are_those_without(exact, sampling, prompt):
    tokens, chosen = random_tokens(prompt, seed=prompt), params(sampling)
    plain = generate_uncached(exact, tokens, chosen)
    cached = generate(exact, [tokens], chosen)[0]
    ragged = together(RaggedBatch(exact, rows=1, capacity=64, block_length=BLOCK), [(tokens, chosen)])[0]
    assert plain.token_ids == cached.token_ids == ragged
    assert plain.usage.denoise == cached.usage.denoise


def together(batch, orders, *, chance=None):
    """Tokens of each of ``orders``, which come when rows are free and, given a ``chance``, now and then."""
    waiting, tokens, index = list(enumerate(orders)), {}, {}
    while waiting or batch.active:
        while waiting and batch.free_rows and (not batch.active or chance is None or chance.random() < 0.5):
            number, (prompt, chosen) = waiting.pop(0)
            index[batch.admit(prompt, chosen)] = number
            tokens[number] = []
        for event in batch.step():
            if isinstance(event, Committed):
                tokens[index[event.ticket]] += event.token_ids
    return [tokens[number] for number in range(len(orders))]


@settings(max_examples=counts.of(sample=10, full=100), deadline=None)
@given(seed=st.integers(0, 10**6))
def test_company_changes_no_draw(seed):
    chance = random.Random(seed)
    model = tiny_model(dtype=torch.float32)
    orders = [
        (random_tokens(chance.randint(1, 20), seed=chance.randint(0, 99)), params(chance.choice(SAMPLINGS)))
        for _ in range(8)
    ]

    def batch():
        return RaggedBatch(model, rows=3, capacity=64, block_length=BLOCK)

    alone = [together(batch(), [order])[0] for order in orders]
    assert together(batch(), orders, chance=chance) == alone


@pytest.mark.parametrize("sampling", SAMPLINGS[1:4], ids=range(3))
def test_another_server_goes_on_with_the_same_draws(exact, sampling):
    tokens, chosen = random_tokens(6, seed=1), params(sampling)
    whole = generate_uncached(exact, tokens, chosen).token_ids
    blocks = []
    batch = RaggedBatch(exact, rows=1, capacity=64, block_length=BLOCK)
    batch.admit(tokens, chosen)
    while len(blocks) < 2:
        blocks += [event for event in batch.step() if isinstance(event, Committed)]
    committed = [token for block in blocks for token in block.token_ids]
    assert whole[: len(committed)] == committed
    other = BlockBatch(exact, rows=1, capacity=64, block_length=BLOCK)
    other.admit(tokens, chosen, committed)
    rest = []
    while other.active:
        rest += [event for event in other.step() if isinstance(event, Committed)]
    assert committed + [token for block in rest for token in block.token_ids] == whole


@pytest.mark.parametrize("vicinity", [False, True])
def test_a_canvas_draws_alike_in_any_company(vicinity):
    model = tiny_canvas_model(dtype=torch.float64)
    orders = [(random_tokens(5, seed=n), params(sampling)) for n, sampling in enumerate(SAMPLINGS)]
    alone = [together(CanvasBatch(model, rows=1, capacity=64), [order])[0] for order in orders]
    assert together(CanvasBatch(model, rows=3, capacity=64), orders) == alone
    assert (
        alone[1]
        != together(
            CanvasBatch(model, rows=1, capacity=64),
            [(orders[1][0], params(Sampling(temperature=1.0, seed=77)))],
        )[0]
    )


@pytest.mark.parametrize("kind", ["ragged", "blocks", "canvas"])
def test_a_committed_block_says_how_sure_each_token_was_and_what_it_took(exact, kind):
    batch = {
        "ragged": lambda: RaggedBatch(exact, rows=1, capacity=64, block_length=BLOCK),
        "blocks": lambda: BlockBatch(exact, rows=1, capacity=64, block_length=BLOCK),
        "canvas": lambda: CanvasBatch(tiny_canvas_model(dtype=torch.float64), rows=1, capacity=64),
    }[kind]()
    batch.admit(random_tokens(6, seed=1), params(Sampling()))
    filled, last = {}, None
    while batch.active:
        for event in batch.step():
            match event:
                case Committed():
                    offset = sum(map(len, filled.get("done", [])))
                    filled.setdefault("done", []).append(event.token_ids)
                    expected = [filled[offset + place] for place in range(len(event.token_ids))]
                    assert list(event.confidences) == pytest.approx(expected)
                    assert all(0 < one <= 1 and not math.isnan(one) for one in event.confidences)
                    last = event.usage
                case Finished():
                    assert last == event.usage
                case _ if hasattr(event, "confidences"):
                    filled |= dict(zip(event.positions, event.confidences, strict=True))
