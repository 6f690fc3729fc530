"""A fault at each write of the operator, pauses of the leader, and planted bugs that the rig has to see."""

import logging
from collections.abc import Iterator

import pytest

from support import counts, fault_rig
from support.attempts_reconciler import RECONCILER
from unmask_operator.decision import Reconciler

RECONCILERS = [
    pytest.param(RECONCILER, 150, 20, id="the small one"),
    pytest.param(fault_rig.TRAINING, 60, 10, id="training jobs"),
    pytest.param(fault_rig.SERVING, 12, 2, id="services"),
]


@pytest.fixture(autouse=True)
def nothing_logged() -> Iterator[None]:
    """Each of a thousand lives is full of failures, and pytest keeps them with all that their frames hold."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("reconciler", "sample", "pauses"), RECONCILERS)
def test_every_fault_leads_to_the_same_objects_by_the_same_writes(
    reconciler: Reconciler, sample: int, pauses: int
) -> None:
    number, wrong = fault_rig.differing(reconciler, counts.of(sample=sample, full=1000))
    assert number == counts.of(sample=sample, full=1000)
    assert wrong == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("reconciler", "sample", "pauses"), RECONCILERS)
def test_a_leader_that_stood_still_writes_nothing_more(
    reconciler: Reconciler, sample: int, pauses: int
) -> None:
    number, wrong = fault_rig.pauses(reconciler, counts.of(sample=pauses, full=100))
    assert number == counts.of(sample=pauses, full=100)
    assert wrong == []


@pytest.mark.parametrize("bug", fault_rig.PLANTED)
def test_a_planted_bug_is_caught(bug: str) -> None:
    assert fault_rig.caught(bug)
