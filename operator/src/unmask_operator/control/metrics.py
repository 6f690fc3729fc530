"""What the operator counts, for Prometheus; no label has more values than the code has words for."""

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

__all__ = ["FAMILIES", "SECONDS", "Family", "Metrics", "Reading", "stalled", "states"]


class Family(NamedTuple):
    """What a metric is."""

    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str


FAMILIES = {
    "unmask_operator_is_leader": Family("gauge", (), "Whether this process acts."),
    "unmask_operator_resources": Family(
        "gauge", ("kind", "state"), "Custom resources by the state in their status."
    ),
    "unmask_operator_stalled_resources": Family(
        "gauge",
        ("kind", "reason"),
        "Custom resources that somebody must see to, by the reason in their status.",
    ),
    "unmask_operator_reconcile_total": Family(
        "counter", ("kind", "result"), "Passes over one custom resource."
    ),
    "unmask_operator_reconcile_seconds": Family(
        "histogram", ("kind",), "Time that a pass over one custom resource took."
    ),
    "unmask_operator_writes_total": Family(
        "counter", ("verb", "kind"), "Writes that the API server accepted, events and the lease aside."
    ),
    "unmask_operator_watch_age_seconds": Family("gauge", ("kind",), "Since the watch last told something."),
    "unmask_operator_watch_failures_total": Family("counter", ("kind",), "Broken watches and lists."),
    "unmask_operator_lists_total": Family("counter", ("kind",), "Times all objects were listed."),
    "unmask_operator_workqueue_depth": Family("gauge", ("kind",), "Resources that wait to be looked at."),
    "unmask_operator_workqueue_adds_total": Family("counter", ("kind",), "Asked to be looked at."),
    "unmask_operator_workqueue_retries_total": Family("counter", ("kind",), "Come back after a failure."),
}
"""Every metric, by its name."""

SECONDS = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0)
"""Upper bounds of the histogram's buckets."""

Reading = tuple[str, dict[str, str], float]
"""Name of a gauge or counter that is read when somebody asks, labels and value."""


class Metrics:
    """Counters of what was done, and gauges that are read when somebody asks."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._readings: list[Callable[[], Sequence[Reading]]] = []
        self._reconciled = self._counter("unmask_operator_reconcile_total")
        self._writes = self._counter("unmask_operator_writes_total")
        name = "unmask_operator_reconcile_seconds"
        family = FAMILIES[name]
        self._seconds = Histogram(name, family.help, family.labels, buckets=SECONDS, registry=self._registry)
        self._registry.register(self)

    def _counter(self, name: str) -> Counter:
        family = FAMILIES[name]
        return Counter(name, family.help, family.labels, registry=self._registry)

    def reconciled(self, kind: str, result: str, seconds: float) -> None:
        """Count a pass."""
        self._reconciled.labels(kind, result).inc()
        self._seconds.labels(kind).observe(seconds)

    def wrote(self, verb: str, kind: str) -> None:
        """Count a write."""
        self._writes.labels(verb, kind).inc()

    def read(self, readings: Callable[[], Sequence[Reading]]) -> None:
        """Have a function asked for gauges each time."""
        self._readings.append(readings)

    def collect(self) -> Iterable[Metric]:
        """Yield the gauges as they are now."""
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for readings in self._readings:
            for name, labels, value in readings():
                known = FAMILIES[name]
                if name not in families:
                    family = CounterMetricFamily if known.kind == "counter" else GaugeMetricFamily
                    families[name] = family(name, known.help, labels=known.labels)
                families[name].add_metric([labels[one] for one in known.labels], value)
        yield from families.values()

    def exposition(self) -> bytes:
        """Return everything as Prometheus reads it."""
        return bytes(generate_latest(self._registry))


def states(kind: str, resources: Iterable[dict[str, object]]) -> list[Reading]:
    """Return how many custom resources are in each state that their status names."""
    tally: Tally[str] = Tally()
    for resource in resources:
        status = resource.get("status")
        state = status.get("state") if isinstance(status, dict) else None
        tally[str(state or "New")] += 1
    return [
        ("unmask_operator_resources", {"kind": kind, "state": state}, float(count))
        for state, count in sorted(tally.items())
    ]


def stalled(kind: str, resources: Iterable[dict[str, object]]) -> list[Reading]:
    """Return how many custom resources somebody must see to, for each reason that their conditions name."""
    reasons = (_stalled_for(resource.get("status")) for resource in resources)
    tally: Tally[str] = Tally(reason for reason in reasons if reason is not None)
    return [
        ("unmask_operator_stalled_resources", {"kind": kind, "reason": reason}, float(count))
        for reason, count in sorted(tally.items())
    ]


def _stalled_for(status: object) -> str | None:
    """Return why a resource does not go on before somebody acts; ``None`` if it does, or is told not to."""
    said = status.get("conditions") if isinstance(status, dict) else None
    told = {one["type"]: (one["status"], str(one.get("reason", ""))) for one in said or ()}
    if told.get("Suspended", ("", ""))[0] == "True":
        return None
    truth, reason = told.get("Stalled", ("", ""))
    if truth == "True":
        return reason
    late = ("False", "ProgressDeadlineExceeded")
    return late[1] if told.get("Progressing") == late else None
