"""What the operator counts, for Prometheus; no label has more values than the code has words for."""

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

__all__ = ["Metrics", "Reading"]

_SECONDS = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0)

Reading = tuple[str, str, dict[str, str], float]
"""Name of a gauge (a counter, where it ends in ``_total``), its help, labels and value."""


class Metrics:
    """Counters of what was done, and gauges that are read when somebody asks."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._readings: list[Callable[[], Sequence[Reading]]] = []
        self._reconciled = Counter(
            "unmask_operator_reconcile_total",
            "Passes over one custom resource.",
            ("kind", "result"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "unmask_operator_reconcile_seconds",
            "Time that a pass over one custom resource took.",
            ("kind",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._writes = Counter(
            "unmask_operator_writes_total",
            "Writes that the API server accepted, events and the lease aside.",
            ("verb", "kind"),
            registry=self._registry,
        )
        self._registry.register(self)

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
            for name, text, labels, value in readings():
                if name not in families:
                    family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
                    families[name] = family(name, text, labels=tuple(labels))
                families[name].add_metric(tuple(labels.values()), value)
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
    text = "Custom resources by the state in their status."
    return [
        ("unmask_operator_resources", text, {"kind": kind, "state": state}, float(count))
        for state, count in sorted(tally.items())
    ]
