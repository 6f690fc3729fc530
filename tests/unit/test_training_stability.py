"""Which steps are taken, against numpy's medians and a plain loop."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.training.stability import Past, Verdict, judge, limit, remember
from unmask_api.train_job import Stability

finite = st.floats(0.001, 1e6)


def policy(**values):
    return Stability(**{"window": 8, "spike_deviations": "5"} | values)


def full(value=2.0, norm=1.0):
    return Past(losses=(value,) * 8, norms=(norm,) * 8)


@given(st.lists(finite, min_size=1, max_size=40), st.floats(1, 50))
def test_the_limit_is_that_of_numpys_medians(values, deviations):
    middle = np.median(values)
    spread = max(1.4826 * np.median(np.abs(np.array(values) - middle)), 0.01 * abs(middle))
    assert limit(values, deviations) == pytest.approx(middle + deviations * spread, rel=1e-12)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1), (math.inf, 1), (2, math.nan), (2, -math.inf)])
@pytest.mark.parametrize("past", [Past(), full()], ids=["first step", "full window"])
def test_what_is_not_finite_is_never_taken(loss, norm, past):
    assert judge(loss, norm, past, policy()) is Verdict.NOT_FINITE


@pytest.mark.parametrize(
    ("loss", "norm", "verdict"),
    [
        (2.0, 1.0, Verdict.TAKEN),
        (2.1, 1.05, Verdict.TAKEN),  # at the limit: 5 hundredths of the median above it
        (2.1001, 1.0, Verdict.SPIKE),
        (2.0, 1.0501, Verdict.SPIKE),
        (0.0, 0.0, Verdict.TAKEN),  # far below is no harm
    ],
)
def test_a_spike_is_a_loss_or_a_norm_far_above_the_median(loss, norm, verdict):
    assert judge(loss, norm, full(), policy()) is verdict


def test_until_the_window_is_full_nothing_finite_is_a_spike():
    past = Past(losses=(2.0,) * 7, norms=(1.0,) * 7)
    assert judge(1e9, 1e9, past, policy()) is Verdict.TAKEN
    assert judge(1e9, 1e9, remember(past, Verdict.TAKEN, 2.0, 1.0, policy()), policy()) is Verdict.SPIKE


@given(st.lists(st.tuples(finite | st.just(math.nan), finite), max_size=60))
def test_what_is_remembered_is_what_a_plain_loop_finds(steps):
    rules, past, taken, row = policy(), Past(rollbacks=2), [], 0
    for loss, norm in steps:
        verdict = judge(loss, norm, past, rules)
        past = remember(past, verdict, loss, norm, rules)
        if verdict is Verdict.TAKEN:
            taken.append((loss, norm))
        row = 0 if verdict is Verdict.TAKEN else row + 1
        assert list(zip(past.losses, past.norms, strict=True)) == taken[-8:]
        assert (past.skipped, past.rollbacks) == (row, 2)


def test_a_smaller_window_than_the_one_remembered_judges_by_the_newest():
    past = Past(losses=(9.0,) * 8 + (2.0,) * 8, norms=(1.0,) * 16)
    assert judge(8.0, 1.0, past, policy()) is Verdict.SPIKE
    assert len(remember(past, Verdict.TAKEN, 2.0, 1.0, policy()).losses) == 8
