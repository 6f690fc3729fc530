"""Alerts and dashboards ask for metrics and labels that are exported, and each alert says what to do."""

import json
import re

import pytest
from observability.alerts import ALERTS, rules
from observability.dashboards import GATEWAY, OF, dashboard, queries

from unmask.telemetry import metrics

TABLE = {metric.name: metric for metric in (*metrics.SERVING, *metrics.GATEWAY)}
GIVEN = {"namespace", "service", "pod", "le"}
"""Labels that a scraper adds, and that of a histogram's buckets."""


def asked(expr: str) -> list[tuple[str, set[str]]]:
    """Each metric of a query, with the labels that its matchers name."""
    found = []
    for name, matchers in re.findall(r"(unmask_\w+)(?:\{([^}]*)\})?", expr):
        labels = set(re.findall(r'(\w+)\s*(?:=~|!=|!~|=)\s*"', matchers))
        found.append((name, labels))
    return found


def family(name: str) -> str:
    """The metric that a series belongs to."""
    for ending in ("_bucket", "_sum", "_count"):
        whole = name.removesuffix(ending)
        if whole in TABLE and TABLE[whole].kind == "histogram":
            return whole
    return name


@pytest.mark.parametrize("expr", [*(alert.expr for alert in ALERTS), *queries()])
def test_queries_name_metrics_and_labels_that_there_are(expr: str) -> None:
    whole = expr.replace("$of", OF).replace("$gateway", GATEWAY)
    found = asked(re.sub(r"\$\{(\w+)\}", r"\1", whole))
    assert found or "up{" in expr
    for name, labels in found:
        metric = TABLE.get(family(name))
        assert metric is not None, f"{name} is not exported"
        assert (name != metric.name) == (metric.kind == "histogram"), "a histogram is asked for by its parts"
        assert labels <= GIVEN | set(metric.labels), name
    grouped = {label.strip() for by in re.findall(r"by \(([^)]*)\)", expr) for label in by.split(",")}
    assert grouped <= GIVEN.union(*(TABLE[family(name)].labels for name, _ in found))
    whose, other = ("$gateway", "$of") if "$gateway" in expr else ("$of", "$gateway")
    assert expr.count(whose) >= max(1, len(found)), "every series is one of the release's"
    assert other not in expr
    assert {TABLE[family(name)] in metrics.GATEWAY for name, _ in found} <= {whose == "$gateway"}


def test_each_alert_has_a_name_of_its_own_and_says_what_to_do() -> None:
    assert len({alert.name for alert in ALERTS}) == len(ALERTS)
    for alert in ALERTS:
        assert re.fullmatch(r"Unmask([A-Z][a-z]+)+", alert.name)
        assert alert.means and alert.look and alert.do
        assert not alert.summary.endswith(" "), alert.summary


def test_tokens_per_forward_come_first_in_the_dashboard_and_no_graph_lies_on_another() -> None:
    panels = json.loads(dashboard())["panels"]
    assert panels[0]["title"] == "Tokens per forward pass" and panels[1]["title"] == "Tokens per forward"
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_rules_are_those_of_the_release() -> None:
    engines, gateways = 'namespace="n",service="s"', 'namespace="n",service="s-gateway"'
    for rule, alert in zip(rules(engines, gateways), ALERTS, strict=True):
        assert "$" not in str(rule["expr"])
        assert (gateways if "Gateway" in alert.name else engines) in str(rule["expr"])
