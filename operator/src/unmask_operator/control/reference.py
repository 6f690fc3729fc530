"""The reference page of the operator's metrics, written from their table."""

from unmask_operator.control.metrics import FAMILIES, SECONDS, Family

__all__ = ["markdown"]

_INTRODUCTION = """\
# Metrics of the operator

<!-- Generated from unmask_operator.control.metrics: `make generate`. -->

The operator exports these at `http://HOST:PORT/metrics` in the Prometheus text format, beside `/healthz` and
`/readyz`. Every counter starts anew with the process. No label tells jobs apart: what they tell of themselves
is in their status.

| metric | type | labels | meaning |
|---|---|---|---|
"""

_BUCKETS = """
Upper bounds of the histogram's buckets, in seconds:"""


def markdown() -> str:
    """The content of ``docs/reference/operator-metrics.md``."""
    rows = "\n".join(_row(name, family) for name, family in FAMILIES.items())
    bounds = ", ".join(f"{bound:g}" for bound in SECONDS)
    return f"{_INTRODUCTION}{rows}\n{_BUCKETS} {bounds}.\n"


def _row(name: str, family: Family) -> str:
    labels = ", ".join(f"`{label}`" for label in family.labels)
    return f"| `{name}` | {family.kind} | {labels} | {family.help} |"
