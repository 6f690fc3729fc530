"""The report that `make test-full` leaves behind."""

import json
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

PASSES = """
def test_measures(record_measurement):
    record_measurement("largest difference", 0.25)
"""


@pytest.fixture(autouse=True)
def the_plugin_can_be_imported(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))


def test_a_report_says_what_ran_where_and_what_was_measured(pytester):
    pytester.makepyfile(PASSES + "\ndef test_fails():\n    assert False\n")
    pytester.runpytest_subprocess("-p", "support.report", "--report=out/run", "-p", "no:cacheprovider")
    facts = json.loads((pytester.path / "out/run.json").read_text())
    assert facts["outcomes"] == {"passed": 1, "failed": 1}
    assert facts["machine"]["cores"] >= 1
    assert facts["versions"]["torch"]
    (measured,) = facts["measurements"]
    assert (measured["name"], measured["value"]) == ("largest difference", 0.25)
    page = (pytester.path / "out/run.md").read_text()
    assert "1 passed, 1 failed" in page
    assert "| largest difference | 0.25 |" in page


def test_without_a_report_a_measurement_is_let_go(pytester):
    pytester.makepyfile(PASSES)
    assert pytester.runpytest_subprocess("-p", "support.report").ret == 0
