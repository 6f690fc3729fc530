"""What is written from the alerts and the dashboard: files of the chart, and a page for each alert."""

import yaml

from observability.alerts import ALERTS, Alert, rules
from observability.dashboards import dashboard

__all__ = ["GATEWAY", "OF", "files"]

OF = "@OF@"
"""In the chart's file of rules, where the template puts the label matchers of the release's engines."""
GATEWAY = "@GATEWAY@"
"""And those of its gateways."""
_CHART = "deploy/helm/unmask-inference/files"
_MADE = "Made by `make generate`"


def files() -> dict[str, str]:
    """Every file: its path below the root of the tree -> its text."""
    told = yaml.safe_dump(rules(OF, GATEWAY), sort_keys=False, width=1000)
    return {
        f"{_CHART}/alerts.yaml": f"# {_MADE}.\n{told}",
        f"{_CHART}/dashboard.json": dashboard(),
        "docs/runbooks/README.md": _index(),
        **{f"docs/runbooks/{alert.name}.md": _page(alert) for alert in ALERTS},
    }


def _index() -> str:
    rows = "\n".join(
        f"| [{alert.name}]({alert.name}.md) | {alert.severity} | {_plain(alert.summary)} |"
        for alert in ALERTS
    )
    return f"""\
# What to do when an alert fires

<!-- {_MADE}. -->

The chart `unmask-inference` has these alerts with `metrics.prometheusRule.enabled`, and a dashboard for
Grafana with `metrics.dashboard.enabled`.

| alert | severity | says |
|---|---|---|
{rows}
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
    for matchers in ("$of", "$gateway"):
        expr = expr.replace(f"{{{matchers}}}", "").replace(f"{matchers},", "")
    return expr


def _list(items: tuple[str, ...]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _plain(summary: str) -> str:
    """Without Prometheus' templates."""
    for label in ("pod", "port"):
        summary = summary.replace(f"{{{{ $labels.{label} }}}}", f"a {label}")
    summary = summary.replace("{{ $value }}", "some")
    return summary[:1].upper() + summary[1:]
