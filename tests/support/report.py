"""Writes down what a test run found: ``--report=PATH`` makes ``PATH.json`` and ``PATH.md``.

A test adds a number worth keeping with the ``record_measurement`` fixture. The files are committed, so that a
reader sees when and on which machine the full counts were last run, and what they measured. With
``--report-goes-on`` what an earlier run has written there is added to: a test that failed then and passes now
is named as such.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

_PACKAGES = ("torch", "grpcio", "pydantic", "torchx")
_SLOWEST = 10
_MEASUREMENT = "measurement"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--report", type=Path, help="write PATH.json and PATH.md about this run", metavar="PATH")
    parser.addoption("--report-goes-on", action="store_true", help="add to what PATH.json says")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--report")
    if path is not None and not hasattr(config, "workerinput"):  # what processes beside it run, it is told
        earlier = {}
        if config.getoption("--report-goes-on"):
            earlier = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        config.pluginmanager.register(Report(path, earlier), "unmask-report")


@pytest.fixture
def record_measurement(request: pytest.FixtureRequest) -> Callable[[str, float | str], None]:
    """A function ``(name, value)`` that keeps a number for the report, where one is written."""

    def record(name: str, value: float | str) -> None:
        request.node.user_properties.append((_MEASUREMENT, [name, value]))

    return record


class Report:
    """Collects outcomes, durations and measurements, and writes them when the run ends."""

    def __init__(self, path: Path, earlier: dict[str, Any]) -> None:
        self.path = path
        self.measurements: list[dict[str, Any]] = list(earlier.get("measurements", ()))
        self.outcomes: Counter[str] = Counter(earlier.get("outcomes", {}))
        self.failed: set[str] = set(earlier.get("failed", ()))
        self.passed_again: set[str] = set(earlier.get("passed_again", ()))
        self.seconds: Counter[str] = Counter(dict(earlier.get("slowest", ())))
        self.started = time.monotonic() - earlier.get("seconds", 0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome] += 1
        if report.when == "setup" and report.nodeid in self.failed:  # in an earlier run
            self.failed.discard(report.nodeid)
            self.passed_again.add(report.nodeid)
            self.outcomes["failed"] -= 1
        if report.outcome == "failed":
            self.failed.add(report.nodeid)
            self.passed_again.discard(report.nodeid)
        if report.when == "teardown":
            self.measurements += [
                {"test": report.nodeid, "name": value[0], "value": value[1]}
                for name, value in report.user_properties
                if name == _MEASUREMENT
            ]

    def pytest_sessionfinish(self) -> None:
        facts = self.facts()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        self.path.with_suffix(".md").write_text(markdown(facts), encoding="utf-8")

    def facts(self) -> dict[str, Any]:
        """Everything the two files say."""
        return {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "full_counts": os.environ.get("UNMASK_FULL") == "1",
            "machine": {"cpu": _cpu_model(), "cores": os.cpu_count(), "memory_gib": _memory_gib()},
            "versions": {"python": platform.python_version(), **_versions()},
            "outcomes": {"passed": 0, "failed": 0, **self.outcomes},
            "failed": sorted(self.failed),
            "passed_again": sorted(self.passed_again),
            "seconds": round(time.monotonic() - self.started, 1),
            "slowest": [[name, round(seconds, 1)] for name, seconds in self.seconds.most_common(_SLOWEST)],
            "measurements": self.measurements,
        }


def markdown(facts: dict[str, Any]) -> str:
    """The report as a page."""
    return "\n".join(_lines(facts)) + "\n"


def _lines(facts: dict[str, Any]) -> Iterator[str]:
    machine = facts["machine"]
    counts = "full counts" if facts["full_counts"] else "sampled counts"
    yield f"# Test run of {facts['date']}, {counts}\n"
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in facts["outcomes"].items())
    yield f"{outcomes} in {facts['seconds']} s.\n"
    yield from (f"- failed: `{name}`" for name in facts["failed"])
    yield from (
        f"- failed at first, passed in a run that went on: `{name}`" for name in facts["passed_again"]
    )
    yield f"- machine: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB of memory"
    yield "- versions: " + ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    yield "\n## Measurements\n\n| measurement | value | test |\n|---|---|---|"
    for item in facts["measurements"]:
        yield f"| {item['name']} | {item['value']} | `{item['test']}` |"
    yield "\n## Slowest tests\n\n| seconds | test |\n|---|---|"
    for name, seconds in facts["slowest"]:
        yield f"| {seconds} | `{name}` |"


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def _cpu_model() -> str:
    """The processor's name: ``platform.processor()`` is often empty on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")


def _memory_gib() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
