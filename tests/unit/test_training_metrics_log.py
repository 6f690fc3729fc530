"""The log of a run that was killed: no line missing, none twice, none half."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unmask.training.metrics_log import MetricsLog


def write(path, steps, *, resume_from=0):
    with MetricsLog(path, step=resume_from) as log:
        for step in steps:
            log.write({"kind": "step", "step": step, "loss": 1 / step})
            if step % 2 == 0:
                log.write({"kind": "eval", "step": step})
        log.sync()


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(killed_at=st.integers(0, 10), committed=st.integers(0, 10), torn=st.integers(0, 40))
def test_a_resumed_log_is_the_log_of_an_undisturbed_run(tmp_path, killed_at, committed, torn):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    for path in (whole, cut):
        path.unlink(missing_ok=True)
    committed = min(committed, killed_at)
    write(whole, range(1, 12))
    write(cut, range(1, killed_at + 1))
    with cut.open("a", encoding="utf-8") as file:  # the line that was being written
        file.write('{"kind": "step", "step": 11, "loss": 0.123456}'[:torn])
    write(cut, range(committed + 1, 12), resume_from=committed)
    assert cut.read_bytes() == whole.read_bytes()


def test_a_first_attempt_that_never_committed_leaves_no_line(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    write(path, [1, 2])
    write(path, [], resume_from=0)
    assert lines(path) == []


@pytest.mark.parametrize("loss", [0.1, 1 / 3, 5e-324, 1.7976931348623157e308])
def test_numbers_are_read_back_bit_for_bit(tmp_path, loss):
    with MetricsLog(tmp_path / "a.jsonl", step=0) as log:
        log.write({"step": 1, "loss": loss})
    assert lines(tmp_path / "a.jsonl")[0]["loss"].hex() == loss.hex()


def test_lines_can_be_read_while_the_log_is_open(tmp_path):
    with MetricsLog(tmp_path / "a.jsonl", step=0) as log:
        log.write({"step": 1})
        assert lines(tmp_path / "a.jsonl") == [{"step": 1}]
