"""What is written from the alerts and the dashboard: files of the charts, and a page for each alert."""

import yaml

from observability.alerts import ALERTS, PLACEHOLDERS, Alert, rules
from observability.dashboards import dashboard

__all__ = ["CHARTS", "files"]

CHARTS = {"unmask-inference": ("of", "gateway"), "unmask-operator": ("operator",)}
"""Whose alerts a chart has. In its file of rules label matchers take the place of ``@OF@`` and the like."""
_MADE = "Made by `make generate`"


def files() -> dict[str, str]:
    """Every file: its path below the root of the tree -> its text."""
    return {
        **{f"deploy/helm/{chart}/files/alerts.yaml": _rules(whose) for chart, whose in CHARTS.items()},
        "deploy/helm/unmask-inference/files/dashboard.json": dashboard(),
        "docs/runbooks/README.md": _index(),
        **{f"docs/runbooks/{alert.name}.md": _page(alert) for alert in ALERTS},
    }


def _rules(whose: tuple[str, ...]) -> str:
    own = rules(**{one: f"@{one.upper()}@" for one in whose})
    return f"# {_MADE}.\n{yaml.safe_dump(own, sort_keys=False, width=1000)}"


def _rows(chart: str) -> str:
    return "\n".join(
        f"| [{alert.name}]({alert.name}.md) | {alert.severity} | {_plain(alert.summary)} |"
        for alert in ALERTS
        if alert.whose in CHARTS[chart]
    )


def _index() -> str:
    return f"""\
# What to do when an alert fires

<!-- {_MADE}. -->

The charts have these alerts with `metrics.prometheusRule.enabled`.

## Engines and gateways

Of the chart `unmask-inference`, which has a dashboard for Grafana with `metrics.dashboard.enabled`.

| alert | severity | says |
|---|---|---|
{_rows("unmask-inference")}

## The operator

Of the chart `unmask-operator`; the last two are about the jobs and services that it sees to.

| alert | severity | says |
|---|---|---|
{_rows("unmask-operator")}
"""


def _page(alert: Alert) -> str:
    return f"""\
# {alert.name}

<!-- {_MADE}. -->

{_plain(alert.summary)} ({alert.severity}, after {alert.lasts})

{alert.means}

```promql
{_anyone_s(alert.expr)}
```

## Look at

{_list(alert.look)}

## Do

{_list(alert.do)}
"""


def _anyone_s(expr: str) -> str:
    """Without the label matchers of a release."""
    for one in PLACEHOLDERS:
        expr = expr.replace(f"{{${one}}}", "").replace(f"${one},", "")
    return expr


def _list(items: tuple[str, ...]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _plain(summary: str) -> str:
    """Without Prometheus' templates."""
    for label in ("pod", "port", "kind", "reason"):
        summary = summary.replace(f"{{{{ $labels.{label} }}}}", f"a {label}")
    summary = summary.replace("{{ $value }}", "some")
    return summary[:1].upper() + summary[1:]
