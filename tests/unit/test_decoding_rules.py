"""Filling by runs, by credit and by entropy: each rule as it is written out, and in any company."""

import math
import random
from functools import cache, partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support import counts
from support.models import TINY, random_tokens, tiny_canvas_model, tiny_model
from unmask.attention import AttentionMetadata
from unmask.diffusion.batch import Committed, run_to_end
from unmask.diffusion.credit import Ledger
from unmask.diffusion.decoding import (
    Credit,
    DecodingParams,
    Sampling,
    accept_by_entropy,
    accept_by_runs,
)
from unmask.diffusion.full_sequence import CanvasBatch, generate_full_sequence
from unmask.diffusion.generation import generate, generate_uncached
from unmask.diffusion.sampling import candidates
from unmask.errors import UsageError
from unmask.serving.ragged import RaggedBatch

BLOCK = 4
MASK, NEVER = TINY["mask_token_id"], -1
RULES = {
    "hierarchical": {"threshold": 0.3, "low_threshold": 0.1},
    "credit": {"threshold": 0.35, "credit": Credit()},
    "credit by quota": {"threshold": 2.0, "steps": 3, "credit": Credit(weight=3.0, decay=0.5)},
    "entropy": {"threshold": 2.0, "entropy_bound": 3.0},
}
ALL = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def params(**changes):
    defaults = {"max_new_tokens": 14, "block_length": BLOCK, "eos_token_id": NEVER, "mask_token_id": MASK}
    return DecodingParams(**{**defaults, **changes})


@cache
def model_of(dtype):
    """One for all examples: to make it takes as long as to decode a block."""
    return tiny_model(dtype=dtype)


@pytest.fixture
def exact():
    return model_of(torch.float64)


# The rules, written out


def runs_written_out(confidence, masked, *, threshold, low_threshold):
    chosen = {place for place, sure in enumerate(confidence) if masked[place] and sure > threshold}
    place = 0
    while place < len(masked):
        end = place
        while end < len(masked) and masked[end]:
            end += 1
        if end > place:
            best = place
            for other in range(place, end):
                if confidence[other] > confidence[best]:
                    best = other
            if confidence[best] > low_threshold:
                chosen.add(best)
        place = end + 1
    hidden = [place for place in range(len(masked)) if masked[place]]
    if hidden:
        chosen.add(min(hidden, key=lambda place: (-confidence[place], place)))
    return chosen


def entropy_written_out(entropy, masked, *, bound):
    """The longest beginning of the order that the paper's condition holds for."""
    order = sorted((entropy[place], place) for place in range(len(masked)) if masked[place])
    for count in range(len(order), 0, -1):
        first = [value for value, _ in order[:count]]
        if sum(first) - max(first) <= bound:
            return {place for _, place in order[:count]}
    return set()


def credit_written_out(logits_NV, matrix_NV, rule):
    """One forward over the whole matrix of credits: the scores, raised, and the matrix after it."""
    matrix_NV = matrix_NV * rule.decay
    probability, token = torch.softmax(logits_NV, -1).max(-1)
    for row in range(len(matrix_NV)):
        matrix_NV[row, token[row]] += probability[row] ** rule.exponent
    return logits_NV + rule.weight * torch.log(matrix_NV + 1), matrix_NV


# Sixty-fourths: sums of them are exact in any order, and some are equal.
shares = st.integers(0, 64).map(lambda share: share / 64)
blocks = st.lists(st.tuples(shares, st.booleans()), min_size=1, max_size=32)


@settings(max_examples=counts.of(sample=100, full=2000), deadline=None)
@given(blocks, shares, shares)
def test_runs_are_filled_as_written_out(block, threshold, low_threshold):
    confidence, masked = zip(*block, strict=True)
    got = accept_by_runs(
        torch.tensor(confidence), torch.tensor(masked), threshold=threshold, low_threshold=low_threshold
    )
    expected = runs_written_out(confidence, masked, threshold=threshold, low_threshold=low_threshold)
    assert set(got.nonzero()[:, 0].tolist()) == expected
    assert bool(got.any()) == any(masked)


@settings(max_examples=counts.of(sample=100, full=2000), deadline=None)
@given(blocks, st.integers(0, 640).map(lambda share: share / 64))
def test_entropy_is_bounded_as_written_out(block, bound):
    entropy, masked = zip(*block, strict=True)
    got = accept_by_entropy(torch.tensor(entropy), torch.tensor(masked), bound=bound)
    assert set(got.nonzero()[:, 0].tolist()) == entropy_written_out(entropy, masked, bound=bound)
    assert bool(got.any()) == any(masked)


@settings(max_examples=counts.of(sample=20, full=300), deadline=None)
@given(
    seed=st.integers(0, 10**6),
    weight=st.sampled_from([0.0, 0.7, 5.0]),
    decay=st.sampled_from([0.0, 0.8, 1.0]),
    exponent=st.sampled_from([0.0, 0.2, 2.0]),
)
def test_a_few_numbers_of_credit_are_the_whole_matrix(seed, weight, decay, exponent):
    dice, draw = random.Random(seed), torch.Generator().manual_seed(seed)
    rule, size, mask = Credit(weight=weight, decay=decay, exponent=exponent), 12, 7
    ledger, matrix, places = Ledger(rule), torch.zeros(6, size, dtype=torch.float64), list(range(6))
    for forward in range(1, 7):
        logits = 2 * torch.randn(len(places), size, dtype=torch.float64, generator=draw)
        got = ledger.book(logits, places, mask_token_id=mask)
        allowed = logits.clone()
        allowed[:, mask] = -torch.inf
        expected, matrix[places] = credit_written_out(allowed, matrix[places], rule)
        others = [token for token in range(size) if token != mask]
        assert torch.allclose(got[:, others], expected[:, others], atol=1e-6)
        assert max(map(len, ledger.credits.values())) <= forward and set(ledger.credits) == set(places)
        places = sorted(dice.sample(places, dice.randint(1, len(places))))


def test_entropy_is_that_of_what_can_be_chosen():
    logits = torch.randn(5, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    told = candidates(
        logits, Sampling(), positions=range(5), step=0, text=(), mask_token_id=19, entropy=True
    ).entropy
    assert told is not None
    expected = torch.distributions.Categorical(logits=logits[:, :19]).entropy()
    assert told.tolist() == pytest.approx(expected.tolist())
    certain = torch.tensor([[0.0, 900.0, 0.0]])
    sure = candidates(
        certain, Sampling(), positions=[0], step=0, text=(), mask_token_id=2, entropy=True
    ).entropy
    assert sure is not None and sure.tolist() == [0.0]


def decoded(model, prompt, rule, new):
    """Tokens and denoise forwards, with neither cache nor anything of a batch: a block at a time."""
    tokens, forwards = list(prompt), 0
    quotas = [2, 1, 1] if "steps" in rule else [1] * BLOCK
    while len(tokens) < len(prompt) + new:
        start = len(tokens) // BLOCK * BLOCK
        block = tokens[start:] + [MASK] * (start + BLOCK - len(tokens))
        masked = [start + place >= len(tokens) for place in range(BLOCK)]
        matrix, step = torch.zeros(BLOCK, TINY["vocab_size"], dtype=torch.float64), 0
        while any(masked):
            ids = torch.tensor([tokens[:start] + block])
            with torch.no_grad():
                hidden = model.hidden(ids, AttentionMetadata.single_row(ids.shape[1], block_length=BLOCK))
                logits = model.logits(hidden)[0, start:]
            logits[:, MASK] = -torch.inf
            if "credit" in rule:
                logits, matrix = credit_written_out(logits, matrix, rule["credit"])
            confidence, best = torch.softmax(logits, -1).max(-1)
            if "low_threshold" in rule:
                chosen = runs_written_out(confidence.tolist(), masked, **rule)
            elif "entropy_bound" in rule:
                entropy = torch.distributions.Categorical(logits=logits[:, :MASK]).entropy().tolist()
                chosen = entropy_written_out(entropy, masked, bound=rule["entropy_bound"])
            else:
                hidden_places = [place for place in range(BLOCK) if masked[place]]
                ranked = sorted(hidden_places, key=lambda place: -float(confidence[place]))
                chosen = {place for place in ranked if confidence[place] > rule["threshold"]}
                chosen |= set(ranked[: quotas[step]])
            for place in chosen:
                block[place], masked[place] = int(best[place]), False
            step, forwards = step + 1, forwards + 1
        tokens = tokens[:start] + block
    return tokens[len(prompt) :][:new], forwards


@ALL
@pytest.mark.parametrize("prompt", [1, 4, 7])
def test_each_rule_decodes_as_written_out(exact, rule, prompt):
    tokens, chosen = random_tokens(prompt, seed=prompt), params(**rule, early_exit=False)
    expected, forwards = decoded(exact, tokens, rule, 14)
    plain = generate_uncached(exact, tokens, chosen)
    assert (plain.token_ids, plain.usage.denoise) == (expected, forwards)
    (cached,) = generate(exact, [tokens], chosen)
    batch = RaggedBatch(exact, rows=1, capacity=64, block_length=BLOCK)
    (ragged,) = run_to_end(batch, [tokens], chosen)
    assert plain.token_ids == cached.token_ids == ragged.token_ids
    assert plain.usage.denoise == cached.usage.denoise == ragged.usage.denoise


def test_each_rule_fills_otherwise_than_the_threshold(exact):
    """The rules above are no names for the threshold: for some prompt each needs other forwards."""
    forwards = {
        name: [
            generate_uncached(exact, random_tokens(5, seed=seed), params(**rule)).usage.denoise
            for seed in range(6)
        ]
        for name, rule in {**RULES, "threshold": {"threshold": 0.35}, "quota": {"threshold": 2.0}}.items()
    }
    assert forwards["hierarchical"] != forwards["threshold"] != forwards["credit"]
    assert forwards["entropy"] != forwards["quota"]


# In company, and gone on from

SAMPLINGS = [Sampling(), Sampling(temperature=0.8, top_p=0.9, seed=3), Sampling(repetition_penalty=1.5)]


@settings(max_examples=counts.of(sample=8, full=200), deadline=None)
@given(seed=st.integers(0, 10**6))
def test_rows_of_all_rules_share_forwards_and_change_nothing_for_each_other(seed):
    chance = random.Random(seed)
    model = model_of(torch.float32)
    kinds = [*RULES.values(), {"threshold": 0.3}, {"threshold": 0.2, "edit_threshold": 0.2}]

    def order():
        rule = chance.choice(kinds)
        sampling = Sampling() if "edit_threshold" in rule else chance.choice(SAMPLINGS)
        chosen = params(**rule, sampling=sampling, max_new_tokens=chance.randint(1, 20), eos_token_id=62)
        return random_tokens(chance.randint(1, 20), seed=chance.randint(0, 99)), chosen

    orders = [order() for _ in range(7)]
    alone = [told(RaggedBatch(model, rows=1, capacity=64, block_length=BLOCK), [one])[0] for one in orders]
    together = told(RaggedBatch(model, rows=4, capacity=64, block_length=BLOCK), orders, chance=chance)
    for one, other in zip(alone, together, strict=True):
        assert [token for token, _ in one] == [token for token, _ in other]
        assert [sure for _, sure in one] == pytest.approx([sure for _, sure in other], abs=1e-5)


def told(batch, orders, *, chance=None):
    """Tokens and confidences of each order; given a ``chance``, they come now and then."""
    waiting, found, index = list(enumerate(orders)), {}, {}
    while waiting or batch.active:
        while waiting and batch.free_rows and (not batch.active or chance is None or chance.random() < 0.5):
            number, (prompt, chosen) = waiting.pop(0)
            index[batch.admit(prompt, chosen)] = number
            found[number] = []
        for event in batch.step():
            if isinstance(event, Committed):
                found[index[event.ticket]] += zip(event.token_ids, event.confidences, strict=True)
    return [found[number] for number in range(len(orders))]


@ALL
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "drawn", "penalty"])
def test_another_server_goes_on_from_committed_blocks(exact, rule, sampling):
    prompt, chosen = random_tokens(6, seed=1), params(**rule, sampling=sampling)
    whole = generate_uncached(exact, prompt, chosen).token_ids
    for kept in (2, 6, 10):
        batch = RaggedBatch(exact, rows=1, capacity=64, block_length=BLOCK)
        batch.admit(prompt, chosen, whole[:kept])
        rest = []
        while batch.active:
            rest += [event for event in batch.step() if isinstance(event, Committed)]
        assert whole[:kept] + [token for event in rest for token in event.token_ids] == whole


# The end of the answer

END_RULES = {**RULES, "threshold": {"threshold": 0.3}, "quota": {"threshold": 2.0}}


@settings(max_examples=counts.of(sample=25, full=400), deadline=None)
@given(
    rule=st.sampled_from([*END_RULES.values()]),
    prompt=st.integers(1, 9),
    new=st.integers(1, 14),
    end=st.integers(0, 13),
    sampling=st.sampled_from(SAMPLINGS),
)
def test_no_forward_is_spent_behind_the_end_and_no_token_changes(rule, prompt, new, end, sampling):
    model, tokens = model_of(torch.float64), random_tokens(prompt, seed=prompt)
    chosen = partial(params, **rule, max_new_tokens=new, sampling=sampling)
    whole = generate_uncached(model, tokens, chosen(early_exit=False)).token_ids
    eos = whole[min(end, new - 1)]
    plain = generate_uncached(model, tokens, chosen(early_exit=False, eos_token_id=eos))
    assert plain.token_ids == whole[: whole.index(eos) + 1]
    for decode in (generate_uncached, lambda *given: told_whole(*given)):
        early = decode(model, tokens, chosen(eos_token_id=eos))
        assert (early.token_ids, early.reason, early.kept_tokens) == (
            plain.token_ids,
            plain.reason,
            plain.kept_tokens,
        )
        assert early.usage.denoise <= plain.usage.denoise


def told_whole(model, tokens, chosen):
    batch = RaggedBatch(model, rows=1, capacity=64, block_length=BLOCK)
    (generation,) = run_to_end(batch, [tokens], chosen)
    return generation


def test_a_block_ends_with_the_end_of_text_once_nothing_before_it_is_masked(exact):
    """By quota, a token each: the block is left at the forward after which its beginning is complete."""
    spared = 0
    for seed in range(8):
        tokens = random_tokens(4, seed=seed)
        slow = params(threshold=2.0, max_new_tokens=4, early_exit=False)
        batch = RaggedBatch(exact, rows=1, capacity=64, block_length=BLOCK)
        ticket = batch.admit(tokens, slow)
        filled = [event for _ in range(5) for event in batch.step() if hasattr(event, "masks_left")]
        assert ticket == 0 and len(filled) == 4
        when = {event.positions[0]: event.step + 1 for event in filled}
        eos = next(event.token_ids[0] for event in filled if event.positions == (1,))
        first = 0 if filled[list(when).index(0)].token_ids[0] == eos else 1
        expected = max(when[place] for place in range(first + 1))
        early = generate_uncached(exact, tokens, params(threshold=2.0, max_new_tokens=4, eos_token_id=eos))
        assert early.usage.denoise == expected
        spared += 4 - expected
    assert spared > 0


def test_positions_behind_the_last_token_asked_for_need_not_be_filled(exact):
    prompt = random_tokens(4)
    whole = generate_uncached(exact, prompt, params(threshold=2.0, max_new_tokens=1, early_exit=False))
    early = generate_uncached(exact, prompt, params(threshold=2.0, max_new_tokens=1))
    assert whole.token_ids == early.token_ids
    assert early.usage.denoise <= whole.usage.denoise == 4


def test_an_edited_block_is_decoded_to_its_end(exact):
    """A later forward may replace the end of text, or what is before it."""
    edits = {"threshold": 0.15, "edit_threshold": 0.05, "max_post_edit_steps": 3}
    for seed in range(3):
        prompt = random_tokens(5, seed=seed)
        eos = generate_uncached(exact, prompt, params(**edits)).token_ids[1]
        plain, early = (
            generate_uncached(exact, prompt, params(**edits, eos_token_id=eos, early_exit=wanted))
            for wanted in (False, True)
        )
        assert plain == early


def test_a_canvas_ends_early_too():
    model, spared = tiny_canvas_model(), 0
    for seed in range(6):
        prompt = random_tokens(5, seed=seed)
        chosen = partial(params, block_length=8, threshold=2.0, max_new_tokens=16)
        eos = generate_full_sequence(model, prompt, chosen()).token_ids[2]
        plain = generate_full_sequence(model, prompt, chosen(eos_token_id=eos, early_exit=False))
        early = generate_full_sequence(model, prompt, chosen(eos_token_id=eos))
        assert (early.token_ids, early.reason) == (plain.token_ids, plain.reason)
        spared += plain.usage.denoise - early.usage.denoise
    assert spared > 0


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": 0.5, "low_threshold": 0.6}, "low_threshold must be 0 to the threshold 0.5, got 0.6"),
        ({"entropy_bound": -1.0}, "entropy_bound must be 0 or more, got -1.0"),
        ({"entropy_bound": math.nan}, "entropy_bound must be 0 or more, got nan"),
        (
            {"entropy_bound": 1.0, "credit": Credit()},
            "got credit and entropy_bound, which belong to different",
        ),
        ({"edit_threshold": 0.5, "low_threshold": 0.1}, "got edit_threshold and low_threshold"),
        ({"entropy_bound": 1.0, "steps": 2}, "steps: entropy_bound fills without a quota; leave steps out"),
    ],
)
def test_a_rule_with_what_belongs_to_another_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        params(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": -0.1}, "credit weight must be 0 or more, got -0.1"),
        ({"decay": 1.1}, "credit decay must be 0 to 1, got 1.1"),
        ({"exponent": math.inf}, "credit exponent must be 0 or more, got inf"),
    ],
)
def test_credit_that_grows_without_end_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Credit(**changes)


@ALL
def test_a_canvas_is_filled_by_threshold_and_quota_alone(rule):
    batch = CanvasBatch(tiny_canvas_model(), rows=1, capacity=64)
    with pytest.raises(UsageError, match="only models that attend to blocks are filled so; leave it out"):
        batch.admit([1, 2], params(**rule))
