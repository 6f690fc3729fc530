"""A fault at each write of the operator, pauses of the leader, and planted bugs that the rig has to see."""

import pytest

from support import counts, fault_rig
from support.attempts_reconciler import RECONCILER


def test_every_fault_leads_to_the_same_objects_by_the_same_writes() -> None:
    number, wrong = fault_rig.differing(RECONCILER, counts.of(sample=150, full=1000))
    assert number == counts.of(sample=150, full=1000)
    assert wrong == []


def test_a_leader_that_stood_still_writes_nothing_more() -> None:
    number, wrong = fault_rig.pauses(RECONCILER, counts.of(sample=20, full=100))
    assert number == counts.of(sample=20, full=100)
    assert wrong == []


@pytest.mark.parametrize("bug", fault_rig.PLANTED)
def test_a_planted_bug_is_caught(bug: str) -> None:
    assert fault_rig.caught(bug)
