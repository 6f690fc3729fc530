"""A real Prometheus that reads servers of a test, and what it is asked."""

import json
import os
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from observability import prometheus

__all__ = [
    "GATEWAY",
    "LABELS",
    "OF",
    "OPERATOR",
    "Monitor",
    "monitoring",
    "monitoring_pods",
    "obstacle",
    "promtool",
]

Inside = Callable[..., list[str]]

LABELS = {"namespace": "place", "service": "words", "pod": "words-0"}
"""What a ServiceMonitor adds to each series."""
OF = 'namespace="place",service="words"'
GATEWAY = 'namespace="place",service="words-gateway"'
OPERATOR = 'namespace="place",service="unmask-operator"'


def obstacle() -> str | None:
    """Return why there is no Prometheus, or ``None``."""
    if all(map(prometheus.program, prometheus.PROGRAMS)):
        return None
    return f"no prometheus in {prometheus.folder()} or on PATH; `make prometheus` fetches it"


def promtool(*arguments: str, where: Path) -> str:
    """What a command of promtool prints, which must succeed."""
    done = subprocess.run(
        [_program("promtool"), *arguments], cwd=where, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Monitor:
    """A Prometheus that runs.

    Args:
        address: Its ``HOST:PORT``.
        inside: What makes a command line run in the network where that is, if it is another one.
    """

    def __init__(self, address: str, inside: Inside | None = None) -> None:
        self._address = address
        self._inside = inside

    def get(self, path: str, **parameters: str) -> Any:
        """The ``data`` of an answer of its API."""
        url = f"http://{self._address}{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def values(self, query: str) -> list[float]:
        """What a query gives now; none where there is no data, or no number."""
        if self._inside is None:
            found = self.get("/api/v1/query", query=query)["result"]
        else:
            program = _program("promtool")
            command = (program, "query", "instant", "--format=json", f"http://{self._address}", query)
            told = subprocess.run(self._inside(*command), capture_output=True, text=True, timeout=60)
            assert told.returncode == 0, told.stderr
            found = json.loads(told.stdout)
        return [value for one in found if (value := float(one["value"][1])) == value]


@contextmanager
def monitoring(
    folder: Path, targets: Sequence[str], rules: Sequence[object], *, gateways: Sequence[str] = ()
) -> Iterator[Monitor]:
    """A Prometheus that reads ``HOST:PORT`` of ``targets``, and of gateways, twice a second."""
    front = LABELS | {"service": "words-gateway", "pod": "gateway-0"}
    static = [{"targets": list(targets), "labels": LABELS}, {"targets": list(gateways), "labels": front}]
    with _prometheus(folder, static, rules) as monitor:
        yield monitor


@contextmanager
def monitoring_pods(
    folder: Path, pods: Sequence[Any], monitor: str, rules: Sequence[object], inside: Inside
) -> Iterator[Monitor]:
    """A Prometheus in the pods' network, which reads them as a PodMonitor of this name would have it.

    It learns where they are once, from the objects that are given.
    """
    static = [
        {
            "targets": [f"{pod['status']['podIP']}:{port['containerPort']}"],
            "labels": {
                "namespace": (space := pod["metadata"]["namespace"]),
                "pod": pod["metadata"]["name"],
                "container": container["name"],
                "job": f"{space}/{monitor}",
            },
        }
        for pod in pods
        for container in pod["spec"]["containers"]
        for port in container["ports"]
        if port["name"] == "metrics"
    ]
    with _prometheus(folder, static, rules, inside) as running:
        yield running


@contextmanager
def _prometheus(
    folder: Path, static: Sequence[object], rules: Sequence[object], inside: Inside | None = None
) -> Iterator[Monitor]:
    (folder / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "unmask", "rules": list(rules)}]}))
    settings = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "400ms", "evaluation_interval": "1s"},
        "rule_files": ["rules.yml"],
        "scrape_configs": [{"job_name": "words", "static_configs": list(static)}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
    log = folder / "prometheus.log"
    command = (
        _program("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        "--web.listen-address=127.0.0.1:0",
    )
    with log.open("w") as written:
        process = subprocess.Popen(
            inside(*command) if inside else command,
            stdout=written,
            stderr=subprocess.STDOUT,
            env=os.environ | {"GOMAXPROCS": "1"},
        )
    try:
        yield Monitor(_address(log, process), inside)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _program(name: str) -> str:
    program = prometheus.program(name)
    assert program is not None
    return str(program)


def _address(log: Path, process: "subprocess.Popen[bytes]") -> str:
    """Where it listens, once it says so."""
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        for line in log.read_text().splitlines():
            if 'msg="Listening on"' in line:
                return line.rpartition("address=")[2].strip('" ')
        time.sleep(0.05)
    raise AssertionError(f"Prometheus does not start: {log.read_text()[-2000:]}")
