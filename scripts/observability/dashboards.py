"""A dashboard of Grafana's for servers and their gateways, tokens per forward first."""

import json
from dataclasses import dataclass
from typing import Any

from unmask.telemetry import metrics as m
from unmask.telemetry.metrics import Metric

__all__ = ["ROWS", "Panel", "Query", "dashboard", "queries"]

OF = 'namespace="$namespace",service="$service"'
"""What is chosen in the dashboard: engines."""
GATEWAY = 'namespace="$namespace",service="${service}-gateway"'
"""The gateways before them."""
_WIDTH, _HEIGHT, _ACROSS = 8, 7, 24


@dataclass(frozen=True, slots=True)
class Query:
    """One PromQL query, and how its lines are named; ``$of`` or ``$gateway`` stands for what is chosen."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One graph."""

    title: str
    about: str
    unit: str
    queries: tuple[Query, ...]


def _whose(metric: Metric) -> str:
    return "{$gateway}" if metric in m.GATEWAY else "{$of}"


def _mean(metric: Metric, by: str = "") -> str:
    """The mean of a histogram's observations."""
    group = f" by ({by}) " if by else ""
    over = f"{_whose(metric)}[$__rate_interval]"
    return f"sum{group}(rate({metric.name}_sum{over})) / sum{group}(rate({metric.name}_count{over}))"


def _quantile(share: float, metric: Metric, by: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    buckets = f"rate({metric.name}_bucket{_whose(metric)}[$__rate_interval])"
    return f"histogram_quantile({share}, sum by ({labels}) ({buckets}))"


def _rate(metric: Metric, by: str = "") -> str:
    group = f" by ({by}) " if by else ""
    return f"sum{group}(rate({metric.name}{_whose(metric)}[$__rate_interval]))"


def _each(metric: Metric, by: str) -> str:
    return f"sum by ({by}) ({metric.name}{_whose(metric)})"


def _waits(metric: Metric) -> tuple[Query, ...]:
    return tuple(Query(_quantile(share, metric), f"p{round(100 * share)}") for share in (0.5, 0.95, 0.99))


ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Tokens per forward pass",
        (
            Panel(
                "Tokens per forward",
                "Means of complete requests. The forwards that are counted differ: all, denoise and persist, "
                "or denoise alone.",
                "none",
                (
                    Query(_mean(m.TOKENS_PER_FORWARD), "all"),
                    Query(_mean(m.TOKENS_PER_FORWARD_DECODE), "denoise and persist"),
                    Query(_mean(m.TOKENS_PER_FORWARD_DENOISE), "denoise"),
                ),
            ),
            Panel(
                "Positions filled by a step",
                "Of one row, in one denoise forward.",
                "none",
                (
                    Query(_mean(m.TOKENS_ACCEPTED_PER_STEP), "mean"),
                    Query(_quantile(0.5, m.TOKENS_ACCEPTED_PER_STEP), "p50"),
                ),
            ),
            Panel(
                "Forwards of a block",
                "Until it is committed.",
                "none",
                (Query(_mean(m.FORWARDS_PER_BLOCK), "mean"),),
            ),
        ),
    ),
    (
        "Work",
        (
            Panel(
                "Tokens",
                "Committed ones, and those of prompts.",
                "short",
                (
                    Query(_rate(m.COMMITTED_TOKENS), "committed"),
                    Query(_rate(m.PROMPT_TOKENS), "prompts"),
                    Query(_rate(m.PREFIX_HIT_TOKENS), "prompts, known already"),
                ),
            ),
            Panel(
                "Forwards",
                "By what their rows did.",
                "ops",
                (Query(_rate(m.FORWARDS, "kind"), "{{kind}}"),),
            ),
            Panel(
                "Time of a forward",
                "With its decoding decisions.",
                "s",
                (Query(_quantile(0.95, m.FORWARD_SECONDS, "kind"), "p95 {{kind}}"),),
            ),
            Panel(
                "Rows",
                "Of the last forward of each engine, by what they did.",
                "none",
                (Query(_each(m.BATCH_ROWS, "phase"), "{{phase}}"),),
            ),
            Panel(
                "Memory for keys and values",
                "The share that running requests hold.",
                "percentunit",
                (Query(f"max by (pod) ({m.CACHE_USAGE.name}{{$of}})", "{{pod}}"),),
            ),
        ),
    ),
    (
        "Users",
        (
            Panel(
                "Requests",
                "Ended ones, by status code.",
                "reqps",
                (Query(_rate(m.REQUESTS, "code"), "{{code}}"),),
            ),
            Panel(
                "In the server",
                "",
                "none",
                (
                    Query(f"sum({m.REQUESTS_RUNNING.name}{{$of}})", "with a row"),
                    Query(f"sum({m.REQUESTS_WAITING.name}{{$of}})", "waiting"),
                ),
            ),
            Panel("Wait for a row", "", "s", _waits(m.QUEUE_SECONDS)),
            Panel("Time to the first block", "", "s", _waits(m.TIME_TO_FIRST_BLOCK)),
            Panel("Between blocks", "", "s", _waits(m.INTER_BLOCK)),
            Panel("Whole requests", "", "s", _waits(m.E2E)),
        ),
    ),
    (
        "Gateway",
        (
            Panel(
                "Calls",
                "Ended ones, by status code, after all that other replicas could mend.",
                "reqps",
                (Query(_rate(m.GATEWAY_REQUESTS, "code"), "{{code}}"),),
            ),
            Panel(
                "In the gateway",
                "",
                "none",
                (Query(_each(m.GATEWAY_REQUESTS_RUNNING, "pod"), "{{pod}}"),),
            ),
            Panel(
                "Replicas",
                "By state, the fewest or most that a gateway sees.",
                "none",
                (
                    Query(f'min({m.GATEWAY_REPLICAS.name}{{$gateway,state="ready"}})', "ready"),
                    Query(f'max({m.GATEWAY_REPLICAS.name}{{$gateway,state="banned"}})', "banned"),
                    Query(f'max({m.GATEWAY_REPLICAS.name}{{$gateway,state="out"}})', "out"),
                ),
            ),
            Panel(
                "Calls to replicas",
                "By why they were given to one; resume are those that go on after their committed blocks.",
                "reqps",
                (Query(_rate(m.GATEWAY_ATTEMPTS, "why"), "{{why}}"),),
            ),
            Panel(
                "What chose the replica",
                "The prompt's beginning, which it may have in its cache, or the least load.",
                "reqps",
                (Query(_rate(m.GATEWAY_ROUTED, "by"), "{{by}}"),),
            ),
            Panel(
                "Failures of replicas",
                "Each has one passed over for a while.",
                "ops",
                (Query(_rate(m.GATEWAY_REPLICA_FAILURES), "failures"),),
            ),
            Panel("Wait for the next replica", "When one is lost.", "s", _waits(m.GATEWAY_STALL_SECONDS)),
        ),
    ),
    (
        "Expert shards",
        (
            Panel(
                "Shards",
                "By state, as the engines see them.",
                "none",
                (Query(_each(m.EXPERT_SHARDS, "state"), "{{state}}"),),
            ),
            Panel(
                "Frames",
                "By why they were sent; hedges and failovers are those that went to a second shard.",
                "ops",
                (Query(_rate(m.EXPERT_FRAMES, "why"), "{{why}}"),),
            ),
            Panel(
                "Time of a frame",
                "Waiting for its turn, computing, and the way there and back.",
                "s",
                (Query(_mean(m.EXPERT_FRAME_SECONDS, "phase"), "{{phase}}"),),
            ),
            Panel("Bytes", "", "Bps", (Query(_rate(m.EXPERT_BYTES, "direction"), "{{direction}}"),)),
            Panel(
                "Imbalance",
                "Rows of the busiest part over the mean, in the last layer.",
                "none",
                (Query(f"max by (pod) ({m.EXPERT_IMBALANCE.name}{{$of}})", "{{pod}}"),),
            ),
            Panel(
                "Different experts in a layer",
                "",
                "none",
                (Query(_mean(m.EXPERTS_ACTIVATED), "mean"),),
            ),
        ),
    ),
)


def queries() -> list[str]:
    """All of the dashboard's, with ``$of`` and ``$gateway``."""
    return [query.expr for _, panels in ROWS for panel in panels for query in panel.queries]


def dashboard() -> str:
    """The JSON that Grafana imports."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS:
        panels.append(
            {"type": "row", "title": title, "collapsed": False, "gridPos": _place(0, top, _ACROSS, 1)}
        )
        top += 1
        for number, panel in enumerate(row):
            across, down = number % (_ACROSS // _WIDTH), number // (_ACROSS // _WIDTH)
            panels.append(_panel(panel, _place(across * _WIDTH, top + down * _HEIGHT, _WIDTH, _HEIGHT)))
        top += -(-len(row) * _WIDTH // _ACROSS) * _HEIGHT
    for number, made in enumerate(panels, 1):
        made["id"] = number
    found = {
        "title": "unmask: serving",
        "uid": "unmask-serving",
        "tags": ["unmask"],
        "schemaVersion": 39,
        "editable": True,
        "time": {"from": "now-3h", "to": "now"},
        "refresh": "30s",
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"},
                _variable("namespace", f"label_values({m.REQUESTS_RUNNING.name}, namespace)"),
                _variable(
                    "service", f'label_values({m.REQUESTS_RUNNING.name}{{namespace="$namespace"}}, service)'
                ),
            ]
        },
        "panels": panels,
    }
    return json.dumps(found, indent=2) + "\n"


def _place(x: int, y: int, w: int, h: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": w, "h": h}


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "$datasource"},
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
    }


def _panel(panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.about,
        "gridPos": place,
        "datasource": {"type": "prometheus", "uid": "$datasource"},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "expr": query.expr.replace("$of", OF).replace("$gateway", GATEWAY),
                "legendFormat": query.legend,
            }
            for number, query in enumerate(panel.queries)
        ],
    }
