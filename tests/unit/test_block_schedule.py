"""The block size over a stage's steps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.diffusion.schedule import BlockSchedule


def test_sizes_share_the_steps_in_order():
    schedule = BlockSchedule([1, 4, 32], steps=8)
    assert [schedule.size_at(step) for step in range(8)] == [1, 1, 1, 4, 4, 4, 32, 32]


@given(sizes=st.lists(st.integers(1, 64), min_size=1, max_size=9, unique=True), extra=st.integers(0, 50))
def test_every_size_lasts_as_long_as_any_other_within_a_step(sizes, extra):
    schedule = BlockSchedule(sizes, steps=len(sizes) + extra)
    seen = [schedule.size_at(step) for step in range(schedule.steps)]
    counts = [seen.count(size) for size in sizes]
    assert list(dict.fromkeys(seen)) == sizes
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("step", [-1, 8])
def test_a_step_outside_the_stage_is_refused(step):
    with pytest.raises(ValueError, match="steps 0 to 7"):
        BlockSchedule([4], steps=8).size_at(step)


def test_a_size_without_a_step_is_refused():
    with pytest.raises(ValueError, match="3 block sizes need at least as many steps, got 2"):
        BlockSchedule([1, 2, 4], steps=2)
