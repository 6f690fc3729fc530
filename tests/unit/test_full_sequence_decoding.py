"""LLaDA's decoding against its published loop written out plainly, its approximate cache, and its batches."""

import random

import pytest
import torch

from support.models import TINY, random_tokens, tiny_canvas_model, tiny_model
from unmask.attention import AttentionMetadata, plan
from unmask.diffusion.batch import Committed, Filled, Finished
from unmask.diffusion.decoding import DecodingParams, Vicinity
from unmask.diffusion.full_sequence import CanvasBatch, generate_full_sequence
from unmask.diffusion.generation import BlockBatch, generate_uncached
from unmask.errors import ModelError, UsageError

MASK, EOS = TINY["mask_token_id"], TINY["eos_token_id"]


@pytest.fixture(scope="module")
def model():
    return tiny_canvas_model()


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


class Frozen:
    """In place of a cache: each forward is over the whole canvas, and sees old keys and values outside."""

    def __init__(self):
        self.kept = {}
        self.window = None
        """First position whose keys and values are new, and the one after the last; None: all are."""

    def plan(self, queries):
        return plan(queries, queries)

    def extend(self, layer, key, value):
        if self.window is not None:
            window = slice(*self.window)
            old_key, old_value = (tensor.clone() for tensor in self.kept[layer])
            old_key[:, :, window], old_value[:, :, window] = key[:, :, window], value[:, :, window]
            key, value = old_key, old_value
        self.kept[layer] = (key, value)
        return key, value


def loop_with_a_vicinity(model, prompt, *, new_tokens, block_length, steps_per_block, before, after):
    """The published loop, where only a block and its vicinity are computed anew after its first forward.

    What lies outside is as the last forward that covered it left it. Nothing is saved: all positions are
    computed each time, and the keys and values of those outside are thrown away.
    """
    ids = torch.tensor([*prompt, *[MASK] * new_tokens])
    masked = torch.arange(len(ids)) >= len(prompt)
    position = torch.arange(len(ids)).unsqueeze(0)
    metadata = AttentionMetadata.bidirectional(position, torch.zeros_like(position))
    frozen = Frozen()
    for start in range(len(prompt), len(ids), block_length):
        stop = start + block_length
        base, longer = divmod(block_length, steps_per_block)
        for step in range(steps_per_block):
            frozen.window = (max(0, start - before), min(len(ids), stop + after)) if step else None
            with torch.no_grad():
                logits = model.logits(model.hidden(ids.unsqueeze(0), metadata, cache=frozen))[0]
            logits[:, MASK] = -torch.inf
            confidence, tokens = torch.softmax(logits, -1).max(-1)
            confidence[~masked] = -torch.inf
            confidence[:start] = -torch.inf
            confidence[stop:] = -torch.inf
            for place in confidence.topk(base + (step < longer)).indices:
                ids[place], masked[place] = tokens[place], False
    return ids[len(prompt) :].tolist()


@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 3), (4, 99), (99, 99)])
@pytest.mark.parametrize("seed", [3, 4])
def test_with_a_vicinity_tokens_are_those_of_the_loop_that_sees_old_keys(model, before, after, seed):
    prompt = random_tokens(10, seed=seed)
    loop = {"new_tokens": 24, "block_length": 8, "steps_per_block": 4}
    expected = loop_with_a_vicinity(model, prompt, **loop, before=before, after=after)
    wish = params(max_new_tokens=24, eos_token_id=70, vicinity=Vicinity(before, after))
    assert generate_full_sequence(model, prompt, wish).token_ids == expected
    exact = published_loop(model, prompt, **loop)
    assert (expected == exact) == (before == 99), "or this prompt would not tell old keys from new ones"


@pytest.mark.parametrize("threshold", [0.1, 0.3, 2.0])
def test_a_vicinity_of_everything_is_exact(model, threshold):
    prompt = random_tokens(9, seed=2)
    plain = generate_full_sequence(model, prompt, params(threshold=threshold))
    cached = generate_full_sequence(model, prompt, params(threshold=threshold, vicinity=Vicinity(99, 99)))
    assert cached == plain


def test_a_small_vicinity_computes_less_and_fills_everything(model):
    prompt = random_tokens(20, seed=3)
    plain = generate_full_sequence(model, prompt, params())
    cached = generate_full_sequence(model, prompt, params(vicinity=Vicinity(2, 2)))
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
    assert ended.usage.denoise <= 4


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(UsageError, match="prompt: got no tokens"):
        generate_full_sequence(model, [], params())


def events_of(batch):
    """All events until nothing is active, one list per forward."""
    forwards = []
    while batch.active:
        forwards.append(batch.step())
    return forwards


def committed_by(forwards, ticket):
    return [
        token
        for events in forwards
        for event in events
        if isinstance(event, Committed) and event.ticket == ticket
        for token in event.token_ids
    ]


def test_events_tell_the_story_of_each_block(model):
    batch = CanvasBatch(model, rows=1, capacity=64)
    batch.admit(random_tokens(7), params(max_new_tokens=12, steps=2, eos_token_id=61))
    forwards = events_of(batch)
    assert [[type(event) for event in events] for events in forwards] == [
        [Filled],
        [Filled, Committed],
        [Filled, Committed, Finished],
    ]
    first, second, third = (events[0] for events in forwards)
    assert [(f.block_index, f.step, f.masks_left) for f in (first, second, third)] == [
        (0, 0, 4),
        (0, 1, 0),
        (1, 0, 0),
    ]
    assert sorted(first.positions + second.positions) == list(range(8))
    assert third.positions == (8, 9, 10, 11), "the last block is as long as there is left to generate"
    finished = forwards[-1][-1]
    assert (finished.reason, finished.kept_tokens, finished.usage.denoise) == ("length", 12, 3)
    assert finished.usage.positions == 3 * (7 + 12)


@pytest.mark.parametrize("vicinity", [None, Vicinity(2, 3)])
def test_requests_that_come_and_go_disturb_nobody(model, vicinity):
    dice = random.Random(0)
    prompts = [random_tokens(dice.randint(1, 15), seed=100 + n) for n in range(8)]
    wishes = [params(block_length=dice.choice([4, 8, 16]), steps=2, vicinity=vicinity) for _ in prompts]
    alone = [generate_full_sequence(model, *pair) for pair in zip(prompts, wishes, strict=True)]
    batch = CanvasBatch(model, rows=3, capacity=32)
    waiting, kept, tokens, done = list(range(8)), {}, {}, 0
    while waiting or batch.active:
        if waiting and batch.free_rows and dice.random() < 0.7:
            index = waiting.pop(0)
            kept[batch.admit(prompts[index], wishes[index])] = index
        if kept and dice.random() < 0.05:
            gone = dice.choice(list(kept))
            batch.release(gone)
            kept.pop(gone)
        if not batch.active:
            continue
        for event in batch.step():
            assert event.ticket in kept
            if isinstance(event, Committed):
                tokens[event.ticket] = tokens.get(event.ticket, []) + list(event.token_ids)
            elif isinstance(event, Finished):
                expected = alone[kept.pop(event.ticket)]
                assert tokens[event.ticket] == expected.token_ids
                assert event.usage == expected.usage
                done += 1
    assert done > 4


def test_requests_take_turns(model):
    batch = CanvasBatch(model, rows=3, capacity=32)
    tickets = [batch.admit(random_tokens(3), params()) for _ in range(3)]
    assert [batch.step()[0].ticket for _ in range(6)] == tickets * 2


def test_a_released_row_is_free_at_once(model):
    batch = CanvasBatch(model, rows=2, capacity=32)
    first, second = batch.admit([1, 2], params()), batch.admit([3], params())
    batch.step()
    with pytest.raises(RuntimeError, match="all 2 rows are taken"):
        batch.admit([4], params())
    batch.release(first)
    batch.release(first)  # a second time is nothing
    assert batch.free_rows == 1
    assert {event.ticket for events in events_of(batch) for event in events} == {second}
    with pytest.raises(RuntimeError, match="without an active request"):
        batch.step()


@pytest.mark.parametrize("vicinity", [None, Vicinity(2, 3)])
def test_whole_blocks_of_an_earlier_attempt_restart_a_request(model, vicinity):
    prompt, wish = random_tokens(6), params(block_length=4, steps=2, vicinity=vicinity, eos_token_id=61)
    whole = generate_full_sequence(model, prompt, wish)
    for kept in (4, 8, 12):
        batch = CanvasBatch(model, rows=1, capacity=32)
        ticket = batch.admit(prompt, wish, committed=whole.token_ids[:kept])
        forwards = events_of(batch)
        assert whole.token_ids[:kept] + committed_by(forwards, ticket) == whole.token_ids
        assert forwards[0][0].block_index == kept // 4
        assert forwards[-1][-1].kept_tokens == whole.kept_tokens


def test_a_part_of_a_block_is_kept_as_it_is(model):
    batch = CanvasBatch(model, rows=1, capacity=32)
    ticket = batch.admit(random_tokens(6), params(block_length=8, eos_token_id=61), committed=[9, 9, 9])
    forwards = events_of(batch)
    assert min(position for events in forwards for position in getattr(events[0], "positions", ())) == 3
    assert len(committed_by(forwards, ticket)) == 13


@pytest.mark.parametrize(
    ("prompt", "changes", "committed", "message"),
    [
        ([], {}, (), "prompt: got no tokens"),
        ([1] * 30, {}, (), "prompt of 30 tokens and max_new_tokens 16 exceed the context of 32 tokens"),
        ([1], {"edit_threshold": 0.9}, (), "edit_threshold: only models that attend to blocks edit"),
        ([1], {}, [2] * 16, "nothing is left to generate"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(model, prompt, changes, committed, message):
    batch = CanvasBatch(model, rows=1, capacity=32)
    with pytest.raises(UsageError, match=message):
        batch.admit(prompt, params(**changes), committed=committed)
    assert batch.free_rows == 1


def test_a_model_is_decoded_by_what_it_attends_to(model):
    canvas = "LLaDAMoEModelLM attends to the whole canvas; decode it with unmask.diffusion.full_sequence"
    with pytest.raises(ModelError, match=canvas):
        BlockBatch(model, rows=1, capacity=32, block_length=4)
    with pytest.raises(ModelError, match=canvas):
        generate_uncached(model, [1], params())
    blocks = "LLaDA2MoeModelLM attends to blocks in their order; decode it with unmask.diffusion.generation"
    with pytest.raises(ModelError, match=blocks):
        CanvasBatch(tiny_model(), rows=1, capacity=32)


def test_a_vicinity_has_no_meaning_where_the_cache_is_exact():
    batch = BlockBatch(tiny_model(), rows=1, capacity=32, block_length=8)
    with pytest.raises(UsageError, match="vicinity: the cache of a model that attends to blocks is exact"):
        batch.admit([1], params(vicinity=Vicinity()))
