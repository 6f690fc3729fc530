"""Decoding block by block: the rule, and that a batch gives each request what it gets alone."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.models import TINY, random_tokens, tiny_model
from unmask.attention import AttentionMetadata
from unmask.diffusion.decoding import DecodingParams, accept, best_tokens, quota
from unmask.diffusion.generation import (
    BlockBatch,
    Committed,
    Filled,
    Finished,
    Persisted,
    Prefilled,
    generate,
    generate_uncached,
)
from unmask.errors import UsageError


def params(**changes):
    defaults = {"max_new_tokens": 12, "block_length": 4, "threshold": 0.3}
    ids = {"eos_token_id": TINY["eos_token_id"], "mask_token_id": TINY["mask_token_id"]}
    return DecodingParams(**{**defaults, **ids, **changes})


@pytest.fixture(scope="module")
def model():
    return tiny_model(dtype=torch.float32)


def test_positions_above_the_threshold_are_accepted():
    confidence = torch.tensor([0.9, 0.5, 0.7, 0.95])
    masked = torch.tensor([True, True, True, False])
    assert accept(confidence, masked, threshold=0.6, at_least=1).tolist() == [True, False, True, False]


def test_the_threshold_is_strict():
    confidence = torch.tensor([0.5, 0.75])
    assert accept(confidence, torch.ones(2, dtype=torch.bool), threshold=0.5, at_least=1).tolist() == [
        False,
        True,
    ]


def test_the_quota_is_filled_with_the_surest_positions_earlier_first():
    confidence = torch.tensor([0.2, 0.4, 0.4, 0.1])
    masked = torch.ones(4, dtype=torch.bool)
    assert accept(confidence, masked, threshold=0.9, at_least=2).tolist() == [False, True, True, False]
    assert accept(confidence, masked, threshold=0.9, at_least=1).tolist() == [False, True, False, False]


def test_the_quota_is_capped_by_what_is_masked():
    masked = torch.tensor([False, True, False, False])
    assert accept(torch.rand(4), masked, threshold=2.0, at_least=3).tolist() == masked.tolist()


@pytest.mark.parametrize(("steps", "shares"), [(4, [1, 1, 1, 1]), (3, [2, 1, 1]), (1, [4]), (None, [1] * 4)])
def test_quotas_share_the_block_over_the_steps(steps, shares):
    chosen = params(steps=steps)
    assert [quota(chosen, step) for step in range(len(shares))] == shares


def test_the_mask_token_is_never_chosen():
    logits = torch.tensor([[0.0, 1.0, 9.0]])
    best = best_tokens(logits, mask_token_id=2)
    assert best.tokens.tolist() == [1]
    assert best.confidence.item() == pytest.approx(torch.softmax(torch.tensor([0.0, 1.0]), -1)[1].item())


def test_how_sure_a_model_is_of_a_position_does_not_depend_on_the_others_or_on_threads():
    """Enough scores for torch to share the sums of a single position among threads."""
    logits = torch.randn(5, 1 << 17, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = best_tokens(logits, mask_token_id=2)
        alone = [best_tokens(row, mask_token_id=2) for row in logits.split(1)]
    finally:
        torch.set_num_threads(before)
    assert torch.cat([one.tokens for one in alone]).tolist() == together.tokens.tolist()
    assert torch.cat([one.confidence for one in alone]).tolist() == together.confidence.tolist()


@settings(max_examples=25, deadline=None)
@given(
    prompt=st.integers(1, 14),
    new=st.integers(1, 18),
    threshold=st.sampled_from([0.05, 0.2, 0.4, 2.0]),
    steps=st.sampled_from([None, 1, 3]),
)
def test_with_a_cache_tokens_and_denoise_forwards_are_those_without(prompt, new, threshold, steps):
    model = tiny_model(dtype=torch.float64)
    chosen = params(max_new_tokens=new, threshold=threshold, steps=steps)
    tokens = random_tokens(prompt, seed=prompt)
    plain, cached = generate_uncached(model, tokens, chosen), generate(model, [tokens], chosen)[0]
    assert cached.token_ids == plain.token_ids
    assert cached.usage.denoise == plain.usage.denoise
    assert cached.reason == plain.reason
    assert cached.usage.prefill == (1 if prompt >= 4 else 0)


def joint_decoding(model, prompt, *, new, threshold, edit_threshold, post_steps, length=4):
    """Fill and edit as LLaDA2.1's report describes, written out: tokens and forwards of each block."""
    tokens, forwards = list(prompt), []
    while len(tokens) < len(prompt) + new:
        start = len(tokens) // length * length
        given = len(tokens) - start
        block = tokens[start:] + [TINY["mask_token_id"]] * (length - given)
        masked = [place >= given for place in range(length)]
        steps = after = 0
        while True:
            ids = torch.tensor([tokens[:start] + block])
            with torch.no_grad():
                hidden = model.hidden(ids, AttentionMetadata.single_row(ids.shape[1], block_length=length))
            logits = model.logits(hidden)[0, start:]
            logits[:, TINY["mask_token_id"]] = -torch.inf
            confidence, best = torch.softmax(logits, -1).max(-1)
            steps, after = steps + 1, after + (not any(masked))
            fills = [p for p in range(length) if masked[p] and confidence[p] > threshold]
            if any(masked) and not fills:
                fills = [max((p for p in range(length) if masked[p]), key=lambda p: confidence[p])]
            changes = [
                p
                for p in range(given, length)
                if not masked[p] and best[p] != block[p] and confidence[p] > edit_threshold
            ]
            was_masked = any(masked)
            for place in fills + changes:
                block[place], masked[place] = int(best[place]), False
            if not any(masked) and ((not was_masked and not changes) or after >= post_steps):
                break
        tokens, forwards = tokens[:start] + block, [*forwards, steps]
    return tokens[len(prompt) :][:new], forwards


@pytest.mark.parametrize("post_steps", [0, 1, 2, 16])
@pytest.mark.parametrize("edit_threshold", [0.05, 0.1, 0.9])
def test_joint_decoding_fills_and_edits_as_written_out(edit_threshold, post_steps):
    model = tiny_model(dtype=torch.float64)
    edited = 0
    for seed in range(4):
        prompt = random_tokens(6, seed=seed)
        chosen = params(
            threshold=0.15, edit_threshold=edit_threshold, max_post_edit_steps=post_steps, eos_token_id=61
        )
        expected, forwards = joint_decoding(
            model, prompt, new=12, threshold=0.15, edit_threshold=edit_threshold, post_steps=post_steps
        )
        if 61 in expected:
            expected = expected[: expected.index(61) + 1]
        batch = BlockBatch(model, rows=1, capacity=32, block_length=4)
        batch.admit(prompt, chosen)
        tokens, taken = [], []
        while batch.active:
            for event in batch.step():
                if isinstance(event, Committed):
                    tokens += event.token_ids
                    taken.append(event.forwards)
                elif isinstance(event, Filled):
                    edited += event.edited
                    assert min(event.positions, default=0) >= 0, "prompts are not edited"
        assert tokens == expected
        assert taken == forwards[: len(taken)]
        plain = generate_uncached(model, prompt, chosen)
        assert plain.token_ids == expected and plain.usage.denoise == sum(taken)
    assert (edited > 0) == (edit_threshold < 0.5)


def test_an_edit_that_is_wanted_for_ever_ends_after_the_allowed_steps():
    model = tiny_model(dtype=torch.float64)
    chosen = params(threshold=2.0, edit_threshold=1e-9, max_post_edit_steps=3, max_new_tokens=4)
    got = generate(model, [random_tokens(4)], chosen)[0]
    assert got.usage.denoise <= 4 + 3


def test_a_forward_that_edits_nothing_also_persists_the_block():
    model = tiny_model(dtype=torch.float64)
    chosen = params(threshold=0.2, edit_threshold=1.5)  # looks again, and never edits
    whole = params(threshold=0.2, early_exit=False)  # what may yet be edited is decoded to its block's end
    for seed in range(3):
        prompt = random_tokens(5, seed=seed)
        edited, plain = (generate(model, [prompt], p)[0] for p in (chosen, whole))
        assert edited.token_ids == plain.token_ids
        assert edited.usage.persist == 0
        # One forward to look again instead of one to persist; the last block is looked at too.
        assert edited.usage.denoise == plain.usage.denoise + plain.usage.persist + 1


def test_a_batch_gives_each_prompt_what_it_gets_alone(model):
    prompts = [random_tokens(n, seed=n) for n in (1, 9, 4, 17, 6, 3, 12)]
    alone = [generate(model, [prompt], params())[0] for prompt in prompts]
    for rows in (2, 3, 7):
        together = generate(model, prompts, params(), rows=rows)
        assert [g.token_ids for g in together] == [g.token_ids for g in alone]
        assert [g.usage for g in together] == [g.usage for g in alone]


def run(batch, wanted):
    """Step ``batch`` until ``wanted`` tickets are finished; tokens by ticket."""
    tokens = {ticket: [] for ticket in wanted}
    left = set(wanted)
    while left:
        for event in batch.step():
            if isinstance(event, Committed) and event.ticket in tokens:
                tokens[event.ticket] += event.token_ids
            elif isinstance(event, Finished):
                left.discard(event.ticket)
    return tokens


@pytest.mark.parametrize("seed", range(6))
def test_requests_that_come_and_go_disturb_nobody(model, seed):
    dice = random.Random(seed)
    prompts = [random_tokens(dice.randint(1, 15), seed=100 + n) for n in range(8)]
    alone = [generate(model, [prompt], params())[0].token_ids for prompt in prompts]
    batch = BlockBatch(model, rows=3, capacity=32, block_length=4)
    waiting, kept, tokens = list(enumerate(prompts)), {}, {}
    while waiting or batch.active:
        if waiting and batch.free_rows and dice.random() < 0.7:
            index, prompt = waiting.pop(0)
            kept[batch.admit(prompt, params())] = index
        if kept and dice.random() < 0.1:
            gone = dice.choice(list(kept))
            batch.release(gone)
            kept.pop(gone)
            tokens.pop(gone, None)
        if not batch.active:
            continue
        for event in batch.step():
            if isinstance(event, Committed):
                tokens[event.ticket] = tokens.get(event.ticket, []) + list(event.token_ids)
            elif isinstance(event, Finished):
                assert tokens[event.ticket] == alone[kept.pop(event.ticket)]


def test_a_released_row_is_free_at_once(model):
    batch = BlockBatch(model, rows=2, capacity=32, block_length=4)
    first, _ = batch.admit([1, 2], params()), batch.admit([3, 4, 5, 6, 7], params())
    batch.step()
    assert batch.free_rows == 0
    batch.release(first)
    assert batch.free_rows == 1
    batch.release(first)  # a second time is nothing
    assert batch.free_rows == 1
    assert all(event.ticket != first for event in batch.step())


def test_committed_tokens_restart_a_request_anywhere(model):
    prompt = random_tokens(6)
    whole = generate(model, [prompt], params())[0].token_ids
    first_block = whole[: 8 - len(prompt)]
    for committed in (first_block, whole[: len(first_block) + 4]):
        batch = BlockBatch(model, rows=1, capacity=32, block_length=4)
        ticket = batch.admit(prompt, params(), committed=committed)
        assert committed + run(batch, [ticket])[ticket] == whole


def test_the_mask_id_in_a_prompt_is_text(model):
    prompt = [5, TINY["mask_token_id"], 7, TINY["mask_token_id"], 9]
    batch = BlockBatch(model, rows=1, capacity=32, block_length=4)
    batch.admit(prompt, params())
    filled = []
    while batch.active:
        filled += [
            position for event in batch.step() if isinstance(event, Filled) for position in event.positions
        ]
    # The request may end early; every position that was filled was a generated one, and just once.
    assert min(filled) >= 0
    assert len(filled) == len(set(filled))


def test_events_tell_the_story_of_a_block(model):
    batch = BlockBatch(model, rows=1, capacity=32, block_length=4)
    batch.admit(random_tokens(6), params(max_new_tokens=2, threshold=2.0))
    events = [batch.step() for _ in range(3)]
    assert events[0] == [Prefilled(0, 4)]
    first, second = events[1], events[2]
    assert [type(event) for event in first] == [Filled]
    assert [type(event) for event in second] == [Filled, Committed, Finished]
    assert sorted(first[0].positions + second[0].positions) == [0, 1]
    assert (first[0].masks_left, second[0].masks_left) == (1, 0)
    assert (second[1].block_index, second[1].forwards, len(second[1].token_ids)) == (1, 2, 2)
    assert second[2].usage.denoise == 2


def test_a_block_is_persisted_by_a_forward_of_its_own_unless_it_is_the_last(model):
    batch = BlockBatch(model, rows=1, capacity=32, block_length=4)
    batch.admit(random_tokens(4), params(max_new_tokens=8, steps=1, eos_token_id=61))
    told = [[type(event) for event in batch.step()] for _ in range(4)]
    assert told == [[Prefilled], [Filled, Committed], [Persisted], [Filled, Committed, Finished]]


def test_prefills_and_decoding_take_turns(model):
    batch = BlockBatch(model, rows=4, capacity=64, block_length=4)
    batch.admit(random_tokens(2), params(threshold=2.0))
    batch.step()
    for seed in range(3):
        batch.admit(random_tokens(8, seed=seed), params(threshold=2.0))
    prefilled = [isinstance(batch.step()[0], Prefilled) for _ in range(6)]
    assert prefilled == [True, False] * 3


@pytest.mark.parametrize(
    ("prompt", "changes", "committed", "message"),
    [
        ([], {}, (), "prompt: got no tokens"),
        ([1] * 30, {}, (), "prompt of 30 tokens and max_new_tokens 12 exceed the context of 32 tokens"),
        ([1], {"block_length": 8}, (), "block_length: got 8, this batch decodes 4"),
        ([1], {}, [2] * 12, "nothing is left to generate"),
        ([1], {}, [TINY["eos_token_id"]], "nothing is left to generate"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(model, prompt, changes, committed, message):
    batch = BlockBatch(model, rows=1, capacity=32, block_length=4)
    with pytest.raises(UsageError, match=message):
        batch.admit(prompt, params(**changes), committed=committed)
    assert batch.free_rows == 1


def test_tokens_per_forward_leave_the_end_of_text_out(model):
    whole = generate(model, [random_tokens(5)], params())[0].token_ids
    eos = whole[3]
    ended = generate(model, [random_tokens(5)], params(eos_token_id=eos))[0]
    kept = whole.index(eos)
    assert ended.reason == "eos" and ended.token_ids == whole[: kept + 1] and ended.kept_tokens == kept
    usage = ended.usage
    assert usage.tpf_denoise(kept) == kept / usage.denoise
    assert usage.tpf_decode(kept) == kept / (usage.denoise + usage.persist)
    assert usage.tpf(kept) == kept / (usage.prefill + usage.denoise + usage.persist)
