"""A sample of `make test-kills`, with checkpoints that are written beside the training."""

import pytest

from support import counts
from support.kills import kill_until


@pytest.mark.slow
@pytest.mark.training
@pytest.mark.timeout(1800)
def test_a_run_whose_ranks_are_killed_one_at_a_time_equals_a_quiet_one(tmp_path, record_measurement):
    tally = kill_until(counts.of(sample=2, full=60), tmp_path, steps=20)
    assert tally.equal
    assert tally.kills == tally.restarts
    record_measurement("kills of one of two ranks, saves beside the training", tally.kills)
    record_measurement("of these, kills that left a checkpoint half written", tally.kills_in_saves)
