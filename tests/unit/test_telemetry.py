"""The table of the metrics, and what records them."""

import pytest
from prometheus_client import generate_latest

from unmask.telemetry import SERVING, Recorder, metrics
from unmask.telemetry.metrics import GATEWAY, SHARD, TRAINING, Metric


def use(recorder: Recorder, metric: Metric) -> None:
    labels = dict.fromkeys(metric.labels, "some")
    match metric.kind:
        case "counter":
            recorder.count(metric, 1, **labels)
        case "gauge":
            recorder.gauge(metric, 1, **labels)
        case "histogram":
            recorder.observe(metric, 1, **labels)


@pytest.mark.parametrize("metric", SERVING + SHARD + GATEWAY + TRAINING, ids=lambda metric: metric.name)
def test_a_metric_is_exported_under_the_name_and_type_of_the_table(metric: Metric) -> None:
    recorder = Recorder([metric])
    use(recorder, metric)
    text = generate_latest(recorder.registry).decode()
    assert f"# TYPE {metric.name} {metric.kind}\n" in text
    assert recorder.value(metric, **dict.fromkeys(metric.labels, "some")) == 1


@pytest.mark.parametrize("metric", SERVING + SHARD + GATEWAY + TRAINING, ids=lambda metric: metric.name)
def test_names_follow_prometheus_conventions(metric: Metric) -> None:
    assert metric.name.startswith("unmask_")
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert list(metric.buckets) == sorted(metric.buckets)


def test_the_table_holds_every_metric_that_the_module_declares() -> None:
    declared = [value for value in vars(metrics).values() if isinstance(value, Metric)]
    assert declared == [*SERVING, *SHARD, *GATEWAY, *TRAINING]


def test_two_recorders_do_not_share_counts() -> None:
    first, second = Recorder(), Recorder()
    first.count(metrics.BLOCKS_COMMITTED)
    assert first.value(metrics.BLOCKS_COMMITTED) == 1
    assert second.value(metrics.BLOCKS_COMMITTED) == 0
