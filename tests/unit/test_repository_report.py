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


def test_it_holds_what_other_processes_ran_and_goes_on(pytester):
    pytester.makepyfile(test_one=PASSES, test_two="def test_two(): pass")
    spread = ["-n", "2", "--dist", "loadfile"]
    for options in ([*spread, "test_one.py", "test_two.py"], ["--report-goes-on", "test_one.py"]):
        pytester.runpytest_subprocess(
            "-p", "support.report", "--report=run", "-p", "no:cacheprovider", *options
        )
    facts = json.loads((pytester.path / "run.json").read_text())
    assert facts["outcomes"] == {"passed": 3, "failed": 0}
    assert [one["value"] for one in facts["measurements"]] == [0.25, 0.25]


def test_what_failed_is_named_and_so_is_what_passed_when_it_was_run_again(pytester, monkeypatch):
    pytester.makepyfile(
        test_it="import os, pytest\n"
        "@pytest.fixture\ndef whole(): assert 'MENDED' in os.environ\n"
        "def test_breaks(): assert 'MENDED' in os.environ\n"
        "def test_begins(whole): pass\n"
        "def test_stays_broken(): assert False\n"
    )
    told = []
    for options in ([], ["--report-goes-on"]):
        pytester.runpytest_subprocess(
            "-p", "support.report", "--report=run", "-p", "no:cacheprovider", *options
        )
        told.append(json.loads((pytester.path / "run.json").read_text()))
        monkeypatch.setenv("MENDED", "1")
    names = [f"test_it.py::test_{name}" for name in ("begins", "breaks", "stays_broken")]
    assert (told[0]["failed"], told[0]["passed_again"]) == (names, [])
    assert told[0]["outcomes"] == {"passed": 0, "failed": 3}
    assert (told[1]["failed"], told[1]["passed_again"]) == (names[2:], names[:2])
    assert told[1]["outcomes"] == {"passed": 2, "failed": 1}
    page = (pytester.path / "run.md").read_text()
    assert f"- failed: `{names[2]}`" in page and f"went on: `{names[0]}`" in page


def test_without_a_report_a_measurement_is_let_go(pytester):
    pytester.makepyfile(PASSES)
    assert pytester.runpytest_subprocess("-p", "support.report").ret == 0
