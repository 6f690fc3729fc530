"""The reference page of the metrics, written from their table."""

from unmask.telemetry.metrics import GATEWAY, SERVING, SHARD, TRAINING, Metric

__all__ = ["markdown"]

_INTRODUCTION = """\
# Metrics

<!-- Generated from unmask.telemetry.metrics: `make generate`. -->

`unmask serve` exports these at `http://HOST:METRICS_PORT/metrics` in the Prometheus text format. Every
counter starts anew with the process. No label tells requests apart. `/healthz` beside it answers 200 while
requests are taken, and 503 once the server drains, a part of its model cannot be had, or it has to be started
again because its model has failed or it is stuck; of these, `/livez` answers 503 to the last two alone. All
are plain HTTP.

Tokens per forward pass are always three figures, which differ in the forwards they count: all that the
request took part in (`unmask_tokens_per_forward`), denoise and persist (`..._decode`), and denoise alone
(`..._denoise`). The end of text and what follows it are not counted as tokens.

| metric | type | labels | meaning |
|---|---|---|---|
"""

_TRAINING = """
## Training

The first process of a training job exports these at `http://HOST:PORT/metrics` if the manifest has
`telemetry.port`; `/healthz` answers 200 while there is progress, and 503 once
`runPolicy.hangTimeoutSeconds` have passed without.

| metric | type | labels | meaning |
|---|---|---|---|
"""

_SHARD = """
## Expert shards

`unmask shard` exports these, with TLS also `unmask_tls_...` as above, and `/healthz`, which answers 503 once
the shard drains.

| metric | type | labels | meaning |
|---|---|---|---|
"""

_GATEWAY = """
## The gateway

`unmask gateway` exports these, with TLS also `unmask_tls_...` as above, `/healthz`, which answers 503 while
no replica takes calls and once the gateway drains, and `/livez`, which answers 503 when it is stuck.

| metric | type | labels | meaning |
|---|---|---|---|
"""

_BUCKETS = """
## Buckets

Upper bounds of the histograms; `+Inf` is the last of each.

"""


def markdown() -> str:
    """The content of ``docs/reference/metrics.md``."""
    rows = "\n".join(_row(metric) for metric in SERVING)
    training = "\n".join(_row(metric) for metric in TRAINING)
    shard = "\n".join(_row(metric) for metric in SHARD)
    gateway = "\n".join(_row(metric) for metric in GATEWAY)
    tables = (*SERVING, *TRAINING, *SHARD, *GATEWAY)
    bounds = "\n".join(_bounds(metric) for metric in tables if metric.buckets)
    return (
        f"{_INTRODUCTION}{rows}\n{_TRAINING}{training}\n{_SHARD}{shard}\n{_GATEWAY}{gateway}\n"
        f"{_BUCKETS}{bounds}\n"
    )


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |"


def _bounds(metric: Metric) -> str:
    return f"- `{metric.name}`: {', '.join(f'{bound:g}' for bound in metric.buckets)}"
