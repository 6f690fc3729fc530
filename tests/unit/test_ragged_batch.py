"""Forwards that rows in any state share: each request gets what it gets alone, and leaves nothing behind."""

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support import counts
from support.models import TINY, random_tokens, tiny_canvas_model, tiny_model
from unmask.attention.paged import Span
from unmask.diffusion.batch import (
    Committed,
    Filled,
    Finished,
    NoRoom,
    Persisted,
    Prefilled,
    Reused,
    run_to_end,
)
from unmask.diffusion.decoding import DecodingParams, best_tokens, best_tokens_at
from unmask.diffusion.generation import generate, generate_uncached
from unmask.errors import ModelError, UsageError
from unmask.models.int8 import quantise
from unmask.serving.ragged import RaggedBatch

BLOCK = 4
EOS, MASK = TINY["eos_token_id"], TINY["mask_token_id"]


def params(**changes):
    defaults = {"max_new_tokens": 12, "block_length": BLOCK, "threshold": 0.3}
    return DecodingParams(**{**defaults, "eos_token_id": EOS, "mask_token_id": MASK, **changes})


@pytest.fixture(scope="module")
def model():
    return tiny_model(dtype=torch.float32)


@pytest.fixture(scope="module")
def exact():
    return tiny_model(dtype=torch.float64)


def ragged(model, *, rows=4, capacity=64, **changes):
    return RaggedBatch(model, rows=rows, capacity=capacity, block_length=BLOCK, **changes)


def told(batch, ticket):
    """Events of one request until it ends."""
    events = []
    while not (events and isinstance(events[-1], Finished)):
        events += [event for event in batch.step() if event.ticket == ticket]
    return events


def tokens_of(events):
    return [token for event in events if isinstance(event, Committed) for token in event.token_ids]


# What comes out


@settings(max_examples=counts.of(sample=25, full=400), deadline=None)
@given(
    prompt=st.integers(1, 20),
    new=st.integers(1, 18),
    threshold=st.sampled_from([0.05, 0.2, 0.4, 2.0]),
    steps=st.sampled_from([None, 1, 3]),
    fuse=st.booleans(),
    room=st.integers(4, 8),
)
def test_tokens_and_denoise_forwards_are_those_without_a_cache(prompt, new, threshold, steps, fuse, room):
    model = tiny_model(dtype=torch.float64)
    chosen = params(max_new_tokens=new, threshold=threshold, steps=steps)
    tokens = random_tokens(prompt, seed=prompt)
    plain = generate_uncached(model, tokens, chosen)
    (got,) = run_to_end(ragged(model, fuse=fuse, max_positions=room * BLOCK), [tokens], chosen)
    assert got.token_ids == plain.token_ids
    assert (got.reason, got.kept_tokens) == (plain.reason, plain.kept_tokens)
    assert got.usage.denoise == plain.usage.denoise
    assert got.usage.prefill == -(-(prompt // BLOCK) // room)
    cached = generate(model, [tokens], chosen)[0].usage
    assert got.usage.persist == (0 if fuse else cached.persist)
    assert got.usage.positions == cached.positions, "the same work, in fewer forwards"


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("post_steps", [0, 2, 16])
@pytest.mark.parametrize("edit_threshold", [0.05, 0.9])
def test_editing_is_that_without_a_cache(exact, edit_threshold, post_steps, fuse):
    for seed in range(3):
        prompt = random_tokens(6, seed=seed)
        chosen = params(threshold=0.15, edit_threshold=edit_threshold, max_post_edit_steps=post_steps)
        plain = generate_uncached(exact, prompt, chosen)
        (got,) = run_to_end(ragged(exact, fuse=fuse), [prompt], chosen)
        assert got.token_ids == plain.token_ids
        assert got.usage.denoise == plain.usage.denoise


def test_a_mask_id_in_a_prompt_is_text(exact):
    prompt = [5, MASK, 7, MASK, 9, MASK]
    (got,) = run_to_end(ragged(exact), [prompt], params())
    assert got.token_ids == generate_uncached(exact, prompt, params()).token_ids


def test_committed_tokens_restart_a_request_anywhere(exact):
    prompt = random_tokens(6)
    whole = generate_uncached(exact, prompt, params()).token_ids
    for kept in (2, 6):
        batch = ragged(exact)
        events = told(batch, batch.admit(prompt, params(), committed=whole[:kept]))
        assert whole[:kept] + tokens_of(events) == whole


def test_scores_of_a_few_positions_at_a_time_are_those_of_all(exact):
    hidden = torch.randn(10, TINY["hidden_size"], dtype=torch.float64)
    sizes = []

    def logits(part):
        sizes.append(len(part))
        return exact.logits(part)

    size = TINY["vocab_size"]
    got = best_tokens_at(hidden, logits, vocab_size=size, mask_token_id=MASK, at_once=3 * size + 1)
    expected = best_tokens(exact.logits(hidden), mask_token_id=MASK)
    assert got.tokens.tolist() == expected.tokens.tolist()
    assert got.confidence.tolist() == pytest.approx(expected.confidence.tolist())
    assert sizes == [3, 3, 3, 1]


# Forwards


def test_storing_a_block_shares_a_forward_with_the_next_block_s_first_step(model):
    batch = ragged(model)
    batch.admit(random_tokens(4), params(max_new_tokens=12, steps=1, eos_token_id=61))
    kinds = [[type(event) for event in batch.step()] for _ in range(4)]
    fused = [Persisted, Filled, Committed]
    assert kinds == [[Prefilled], [Filled, Committed], fused, [*fused, Finished]]
    assert batch.active == 0


def test_without_fusing_a_block_is_stored_by_a_forward_of_its_own(model):
    batch = ragged(model, fuse=False)
    batch.admit(random_tokens(4), params(max_new_tokens=8, steps=1, eos_token_id=61))
    kinds = [[type(event) for event in batch.step()] for _ in range(4)]
    assert kinds == [[Prefilled], [Filled, Committed], [Persisted], [Filled, Committed, Finished]]


def test_rows_in_every_state_share_one_forward(model):
    batch = ragged(model, rows=4, max_positions=64 * BLOCK)
    batch.admit(random_tokens(2), params(threshold=2.0))  # a token each forward
    batch.admit(random_tokens(3, seed=1), params(steps=1, eos_token_id=61))  # a block each forward
    batch.step()
    batch.admit(random_tokens(9, seed=2), params())
    events = batch.step()
    assert Counter(type(event) for event in events if not isinstance(event, Committed)) == {
        Filled: 2,
        Persisted: 1,
        Prefilled: 1,
    }


def test_a_long_prompt_is_read_in_parts_beside_those_who_decode(model):
    batch = ragged(model, capacity=96, max_positions=16 * BLOCK)
    decoder = batch.admit(random_tokens(2), params(threshold=2.0, max_new_tokens=40, eos_token_id=61))
    reader = batch.admit(random_tokens(37, seed=1), params())
    parts = []
    while sum(parts) < 36:
        events = batch.step()
        assert [event for event in events if event.ticket == decoder]
        parts += [event.tokens for event in events if isinstance(event, Prefilled)]
        assert all(event.ticket == reader for event in events if isinstance(event, Prefilled))
    assert parts == [8] * 4 + [4], "an eighth of the room, as one row decodes"


@torch.inference_mode()
@pytest.mark.parametrize("quantised", [False, True])
def test_reading_stores_what_a_whole_forward_stores(quantised):
    model = tiny_model(dtype=torch.float32)
    if quantised:
        quantise(model)
    ids = torch.tensor([random_tokens(16)])
    kept = []
    for run in (model.hidden, model.store):
        cache = model.new_paged_cache(pages=4, block_length=BLOCK)
        metadata = cache.lay_out([Span((0, 1, 2, 3), asking=4)])
        run(ids, metadata, cache=cache)
        cache.lay_out([Span((cache.nobodys,), asking=1)])  # to look at the other pages
        nothing = torch.zeros(1, TINY["num_key_value_heads"], BLOCK, TINY["head_dim"])
        kept.append([cache.extend(n, nothing, nothing) for n in range(TINY["num_hidden_layers"])])
    for whole, stored in zip(*kept, strict=True):
        for one, other in zip(whole, stored, strict=True):
            assert one.any() and torch.equal(one, other)


@settings(max_examples=counts.of(sample=8, full=250), deadline=None)
@given(seed=st.integers(0, 10**6), room=st.integers(4, 12), rows=st.integers(1, 5))
def test_no_forward_exceeds_its_positions(seed, room, rows):
    model, dice = tiny_model(dtype=torch.float32), random.Random(seed)
    sizes = []
    for name in ("hidden", "store"):
        run = getattr(model, name)
        setattr(
            model,
            name,
            lambda ids, *rest, run=run, **named: sizes.append(ids.numel()) or run(ids, *rest, **named),
        )
    prompts = [random_tokens(dice.randint(1, 30), seed=n) for n in range(2 * rows)]
    run_to_end(ragged(model, rows=rows, max_positions=room * BLOCK), prompts, params())
    assert 0 < max(sizes) <= room * BLOCK


# Sharing


def test_a_shared_prompt_is_read_once():
    """1,024 tokens with another question behind them: less than a tenth of the first one's reading."""
    model = tiny_model(dtype=torch.float32, max_position_embeddings=2048)
    batch = RaggedBatch(model, rows=2, capacity=1152, block_length=32)
    shared = random_tokens(1024)
    chosen = params(block_length=32, max_new_tokens=32, steps=1)
    read = []
    for seed in (1, 2):
        prompt = shared + random_tokens(70, seed=seed)
        events = told(batch, batch.admit(prompt, chosen))
        read.append(sum(event.tokens for event in events if isinstance(event, Prefilled)))
        expected = generate(model, [prompt], chosen)[0]
        assert tokens_of(events) == expected.token_ids
    assert read[0] == 1024 + 64
    assert read[1] == 64 and read[1] < 0.1 * read[0]


def test_the_next_turn_of_a_conversation_reads_what_is_new(exact):
    batch = ragged(exact)
    prompt = random_tokens(8)
    answer = tokens_of(told(batch, batch.admit(prompt, params(eos_token_id=61))))
    assert len(answer) == 12
    turn = [*prompt, *answer, *random_tokens(5, seed=1)]
    events = told(batch, batch.admit(turn, params()))
    # The answer's last block was never stored: there was nothing left to be seen from.
    assert events[:2] == [Reused(1, 16), Prefilled(1, 8)]
    assert tokens_of(events) == generate_uncached(exact, turn, params()).token_ids


def test_those_who_come_at_once_with_one_prompt_read_it_once(model):
    batch = ragged(model, capacity=96, max_positions=8 * BLOCK)
    prompt = random_tokens(48)
    for seed in range(3):
        batch.admit([*prompt, seed], params(eos_token_id=61))
    read = Counter()
    for _ in range(4):
        for event in batch.step():
            if isinstance(event, (Prefilled, Reused)):
                read[type(event), event.ticket] += event.tokens
    assert read == {(Prefilled, 0): 48, (Reused, 1): 48, (Reused, 2): 48}


def test_a_reader_that_goes_away_leaves_its_part_to_those_who_waited_for_it(model):
    batch = ragged(model, capacity=96, max_positions=4 * BLOCK)
    prompt = random_tokens(40)
    first, second = (batch.admit([*prompt, number], params()) for number in range(2))
    batch.step()
    batch.release(first)
    events = told(batch, second)
    assert events[0] == Reused(second, 16)
    assert sum(event.tokens for event in events if isinstance(event, Prefilled)) == 24
    assert tokens_of(events) == generate(model, [[*prompt, 1]], params())[0].token_ids


def test_requests_of_different_salts_share_nothing(model):
    batch = ragged(model)
    prompt = random_tokens(9)
    shared = []
    for salt in ("a", "b", "", "a"):
        events = told(batch, batch.admit(prompt, params(), cache_salt=salt))
        shared.append(any(isinstance(event, Reused) for event in events))
    assert shared == [False, False, False, True]


# Room


def test_a_request_waits_for_pages_and_gets_them_when_another_one_ends(model):
    pages = 8
    batch = ragged(model, capacity=32, cache_bytes=pages * model.page_bytes(block_length=BLOCK))
    first = batch.admit(random_tokens(8), params(max_new_tokens=12))  # five pages
    assert batch.cache_usage == 5 / 8
    with pytest.raises(NoRoom, match="the cache has not 5 pages of 4 tokens to spare"):
        batch.admit(random_tokens(8, seed=1), params(max_new_tokens=12))
    batch.admit(random_tokens(3), params(max_new_tokens=9))  # three
    told(batch, first)
    batch.admit(random_tokens(8, seed=1), params(max_new_tokens=12))


def test_all_prompts_are_answered_with_a_cache_for_one(exact):
    pages = 8
    prompts = [random_tokens(n, seed=n) for n in (1, 9, 20, 17, 6, 3, 12)]
    batch = ragged(exact, capacity=32, cache_bytes=pages * exact.page_bytes(block_length=BLOCK))
    got = run_to_end(batch, prompts, params())
    assert [one.token_ids for one in got] == [
        generate_uncached(exact, prompt, params()).token_ids for prompt in prompts
    ]
    assert batch.cache_usage == 0


@pytest.mark.parametrize(
    ("prompt", "changes", "committed", "message"),
    [
        ([], {}, (), "prompt: got no tokens"),
        ([1] * 60, {}, (), "prompt of 60 tokens and max_new_tokens 12 exceed the context of 64 tokens"),
        ([1], {"block_length": 8}, (), "block_length: got 8, this batch decodes 4"),
        ([1], {}, [2] * 12, "nothing is left to generate"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(model, prompt, changes, committed, message):
    batch = ragged(model)
    with pytest.raises(UsageError, match=message):
        batch.admit(prompt, params(**changes), committed=committed)
    assert batch.free_rows == 4 and batch.cache_usage == 0


def test_rows_are_limited(model):
    batch = ragged(model, rows=1)
    batch.admit([1], params())
    with pytest.raises(NoRoom, match="all 1 rows are taken"):
        batch.admit([2], params())


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"cache_bytes": 1000}, "cache: 1000 bytes do not hold one request of 64 tokens"),
        ({"max_positions": 15}, "max positions: got 15, one forward must have room for 4 blocks of 4, 16"),
    ],
)
def test_limits_that_nothing_fits_into_are_refused(model, limits, message):
    with pytest.raises(UsageError, match=message):
        ragged(model, **limits)


def test_a_model_of_canvases_is_refused():
    with pytest.raises(ModelError, match="whole canvas"):
        ragged(tiny_canvas_model())


def test_a_step_needs_a_request(model):
    with pytest.raises(RuntimeError, match="without an active request"):
        ragged(model).step()


# Coming and going


@pytest.mark.parametrize("state", ["before", "prefill", "denoise", "persist", "fused"])
def test_a_request_may_go_in_every_state(model, state):
    """And its neighbours get what they would have got without it."""
    batch = ragged(model, capacity=96, fuse=state != "persist", max_positions=4 * BLOCK)
    stays = batch.admit(random_tokens(9, seed=1), params())
    gone = batch.admit(random_tokens(40), params(steps=1, max_new_tokens=40, eos_token_id=61))
    events, seen = [], state == "before"
    while not seen:
        step = batch.step()
        events += [event for event in step if event.ticket == stays]
        own = {type(event) for event in step if event.ticket == gone}
        kinds = {"prefill": {Prefilled}, "denoise": {Filled}, "persist": {Persisted}}
        seen = own - {Committed} == kinds.get(state, {Filled, Persisted})
        assert batch.active == 2 or seen
    batch.release(gone)
    batch.release(gone)  # a second time is nothing
    while batch.active:
        step = batch.step()
        assert all(event.ticket == stays for event in step)
        events += step
    assert tokens_of(events) == generate(model, [random_tokens(9, seed=1)], params())[0].token_ids
    assert batch.cache_usage == 0 and batch.free_rows == 4


@settings(max_examples=counts.of(sample=8, full=250), deadline=None)
@given(seed=st.integers(0, 10**6))
def test_no_forward_writes_a_page_that_another_row_sees(seed):
    model, dice = tiny_model(dtype=torch.float32), random.Random(seed)
    batch = ragged(model, rows=5, max_positions=12 * BLOCK)
    lay_out, forwards = batch._forwards._cache.lay_out, 0

    def checked(spans):
        nonlocal forwards
        forwards += 1
        for span in spans:
            others = {page for other in spans if other is not span for page in other.pages}
            assert not set(span.written) & others
            assert len(set(span.pages)) == len(span.pages)
        return lay_out(spans)

    batch._forwards._cache = _With(batch._forwards._cache, lay_out=checked)
    common = random_tokens(16)
    prompts = [
        common[: dice.choice([0, 4, 9, 16])] + random_tokens(dice.randint(1, 9), seed=n) for n in range(8)
    ]
    run_to_end(batch, prompts, params())
    assert forwards > 0


class _With:
    """An object, some of whose methods are others."""

    def __init__(self, inner, **others):
        self._inner, self._others = inner, others

    def __getattr__(self, name):
        return self._others.get(name) or getattr(self._inner, name)


@settings(max_examples=counts.of(sample=6, full=150), deadline=None)
@given(seed=st.integers(0, 10**6))
def test_confidences_are_those_of_a_request_alone_to_the_bit(seed):
    """However the others come and go, share pages, and change in how many parts a prompt is read."""
    model, dice = tiny_model(dtype=torch.float32), random.Random(seed)
    common = random_tokens(16)
    prompts = [
        common[: dice.choice([0, 4, 16])] + random_tokens(dice.randint(1, 30), seed=n) for n in range(6)
    ]

    def confidences(batch, admitted):
        """Of each request: what its steps filled, and how sure they were."""
        found = {ticket: [] for ticket in admitted}
        while batch.active:
            for event in batch.step():
                if isinstance(event, Filled):
                    found[event.ticket].append((event.positions, event.token_ids, event.confidences))
        return list(found.values())

    alone = []
    for prompt in prompts:
        batch = ragged(model, rows=1)
        alone += confidences(batch, [batch.admit(prompt, params())])
    batch = ragged(model, rows=6, max_positions=dice.randint(4, 16) * BLOCK)
    together = confidences(batch, [batch.admit(prompt, params()) for prompt in prompts])
    assert together == alone
