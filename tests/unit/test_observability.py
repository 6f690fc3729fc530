"""Alerts and dashboards ask for metrics and labels that are exported, and each alert says what to do."""

import json
import re

import pytest
from observability.alerts import ALERTS, PLACEHOLDERS, Alert, rules
from observability.dashboards import GATEWAY, OF, dashboard, queries

from unmask.telemetry import metrics
from unmask_operator.control.metrics import FAMILIES

TABLE = {metric.name: metric for metric in (*metrics.SERVING, *metrics.GATEWAY)}
SERVING = [alert for alert in ALERTS if alert.whose != "operator"]
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


@pytest.mark.parametrize("expr", [*(alert.expr for alert in SERVING), *queries()])
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


@pytest.mark.parametrize(
    "alert", [one for one in ALERTS if one.whose == "operator"], ids=lambda one: one.name
)
def test_alerts_of_the_operator_name_metrics_and_labels_that_it_has(alert: Alert) -> None:
    found = asked(alert.expr.replace("$operator", 'namespace="n",service="s"'))
    assert found and alert.expr.count("$operator") == len(found), "every series is the operator's"
    for name, labels in found:
        assert labels <= GIVEN | set(FAMILIES[name].labels), name
    grouped = {label.strip() for by in re.findall(r"by \(([^)]*)\)", alert.expr) for label in by.split(",")}
    assert grouped <= GIVEN.union(*(FAMILIES[name].labels for name, _ in found))
    told = set(re.findall(r"\$labels\.(\w+)", alert.summary))
    assert told <= grouped, "only what the query keeps can be told"


def test_each_alert_has_a_name_of_its_own_and_says_what_to_do() -> None:
    assert len({alert.name for alert in ALERTS}) == len(ALERTS)
    for alert in ALERTS:
        assert re.fullmatch(r"Unmask([A-Z][a-z]+)+", alert.name)
        assert alert.means and alert.look and alert.do
        assert [f"${one}" in alert.expr for one in PLACEHOLDERS].count(True) == 1
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
    whose = {
        "of": 'namespace="n",service="s"',
        "gateway": 'namespace="n",service="s-gateway"',
        "operator": 'namespace="n",service="o"',
    }
    for rule, alert in zip(rules(**whose), ALERTS, strict=True):
        assert "$" not in str(rule["expr"])
        assert whose[alert.whose] in str(rule["expr"])
        assert (alert.whose == "gateway") == ("Gateway" in alert.name)
    only = [rule["alert"] for rule in rules(operator=whose["operator"])]
    assert only == [alert.name for alert in ALERTS if alert.whose == "operator"]
