"""Drawing tokens: the fast way against a loop over a sorted list, frequencies, and what a draw depends on."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unmask.diffusion import sampling as module
from unmask.diffusion.decoding import Sampling, best_tokens
from unmask.diffusion.rows import uniform
from unmask.diffusion.sampling import candidates, penalised

MASK = 3


def choose(logits, sampling, *, positions=None, step=0, text=()):
    positions = range(len(logits)) if positions is None else positions
    return candidates(logits, sampling, positions=positions, step=step, text=text, mask_token_id=MASK)


def plainly_drawn(scores, sampling, lot):
    """One token: sort, cut, add up until the lot is passed."""
    tokens = [token for token in range(len(scores)) if token != MASK]
    top = max(scores[token] for token in tokens)
    weight = {token: math.exp((scores[token] - top) / sampling.temperature) for token in tokens}
    cuts = sampling.top_p < 1 or (sampling.top_k is not None and sampling.top_k < len(scores))
    if cuts:
        tokens.sort(key=lambda token: (-weight[token], token))
        tokens = tokens[: sampling.top_k]
        enough, kept, total = sampling.top_p * sum(weight[token] for token in tokens), [], 0.0
        for token in tokens:
            if total >= enough:
                break
            kept.append(token)
            total += weight[token]
        tokens = kept
    wanted, total = lot * sum(weight[token] for token in tokens), 0.0
    for token in tokens:
        total += weight[token]
        if total > wanted:
            return token
    return tokens[-1]


@pytest.mark.parametrize("few", [2, 1024], ids=["looks among two first", "looks among all"])
@given(
    values=st.lists(st.integers(-6, 6), min_size=6, max_size=24),
    temperature=st.sampled_from([0.2, 1.0, 3.0]),
    top_k=st.sampled_from([None, 1, 2, 5, 1000]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 1e-9]),
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 40),
)
def test_a_draw_is_what_a_loop_over_the_sorted_tokens_finds(
    few, values, temperature, top_k, top_p, seed, step
):
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    logits = torch.tensor(values, dtype=torch.float32).repeat(5, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_FEW", few)
        found = choose(logits, sampling, positions=[7, 8, 9, 100, 3], step=step)
    for place, position in enumerate([7, 8, 9, 100, 3]):
        lot = float(uniform(seed, 3, position, step, 1)[0])
        assert int(found.tokens[place]) == plainly_drawn(values, sampling, lot)


def test_tokens_come_as_often_as_they_are_probable():
    scores = torch.tensor([[0.0, 1.0, -1.0, 9.0, 2.0]])
    draws = 20_000
    found = choose(scores.repeat(draws, 1), Sampling(temperature=1.5, seed=5)).tokens
    shares = torch.bincount(found, minlength=5) / draws
    scores[0, MASK] = float("-inf")
    expected = torch.softmax(scores[0] / 1.5, 0)
    assert shares[MASK] == 0
    assert (shares - expected).abs().max() < 4 * (0.25 / draws) ** 0.5


def test_a_draw_depends_on_its_seed_position_and_step_and_on_no_other_row():
    scores = torch.randn(8, 50, generator=torch.Generator().manual_seed(1))
    warm = Sampling(temperature=2.0, seed=9)
    together = choose(scores, warm, positions=range(10, 18), step=4)
    for place in range(8):
        alone = choose(scores[place : place + 1], warm, positions=[10 + place], step=4)
        assert alone.tokens == together.tokens[place] and alone.confidence == together.confidence[place]
    flat = torch.zeros(64, 50)
    first = choose(flat, warm).tokens
    for other in (
        choose(flat, Sampling(temperature=2.0, seed=10)).tokens,
        choose(flat, warm, step=1).tokens,
        choose(flat, warm, positions=range(64, 128)).tokens,
    ):
        assert (first != other).float().mean() > 0.9


def test_confidence_is_the_model_s_own_probability():
    scores = torch.randn(6, 20, generator=torch.Generator().manual_seed(2))
    drawn = choose(scores, Sampling(temperature=0.3, top_k=2, seed=1))
    scores[:, MASK] = float("-inf")
    expected = torch.softmax(scores, -1).gather(1, drawn.tokens[:, None])[:, 0]
    torch.testing.assert_close(drawn.confidence, expected)


def test_at_temperature_zero_the_most_probable_token_is_taken():
    scores = torch.randn(6, 20, generator=torch.Generator().manual_seed(3))
    cold, best = choose(scores, Sampling(top_p=0.1, seed=4)), best_tokens(scores, mask_token_id=MASK)
    assert torch.equal(cold.tokens, best.tokens) and torch.equal(cold.confidence, best.confidence)


def test_what_was_said_becomes_less_probable_once_for_each_token():
    scores = torch.tensor([[2.0, -2.0, 4.0, 0.0, 0.0]])
    assert penalised(scores, [2, 1, 2], 2.0).tolist() == [[2.0, -4.0, 2.0, 0.0, 0.0]]
    assert scores.tolist() == [[2.0, -2.0, 4.0, 0.0, 0.0]]
    assert choose(scores, Sampling(repetition_penalty=4.0), text=[2]).tokens.tolist() == [0]
    assert choose(scores, Sampling(), text=[2]).tokens.tolist() == [2]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or more, got -1.0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
    ],
)
def test_what_cannot_be_drawn_from_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)
