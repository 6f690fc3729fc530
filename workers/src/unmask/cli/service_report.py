"""What the commands for a cluster say of a service: pure functions from the service to text."""

import datetime
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from unmask.cli.cluster import age, named, section

if TYPE_CHECKING:
    from unmask_operator.client import InferenceService

__all__ = ["HEADINGS", "after_cancelling", "after_submitting", "description", "remedies", "row", "standing"]

Json = dict[str, Any]
HEADINGS = ("NAME", "STATE", "GROUPS", "MODEL", "REVISION", "ENDPOINT", "AGE", "IN THE WAY")
"""Columns of a list."""
_WIDEST = 80


def row(service: "InferenceService", now: datetime.datetime) -> list[str]:
    """Return a line of the list, entry by entry."""
    from unmask_operator.client.service_advice import obstacle

    status = service.status
    return [
        service.name,
        str(service.state),
        f"{status.ready_replicas}/{service.wanted}",
        service.model,
        service.revision,
        status.endpoint or "",
        age(service.created, now),
        _first_line(obstacle(service)),
    ]


def _first_line(text: str) -> str:
    line = next(iter(text.splitlines()), "")
    return line if len(line) <= _WIDEST else f"{line[: _WIDEST - 3]}..."


def description(service: "InferenceService", now: datetime.datetime) -> Iterator[str]:
    """Yield what there is to say of a service, but for its conditions, pods and events."""
    status = service.status
    yield f"{named(service)}: {service.state}, submitted {age(service.created, now) or 'just now'} ago"
    yield (
        f"groups: {status.ready_replicas} of {service.wanted} ready, {status.available_replicas} available,"
        f" {status.updated_replicas} of the present revision"
    )
    origin = f", of job {status.model.job}" if status.model and status.model.job else ""
    yield f"model: {service.model}{origin}"
    if service.revision:
        yield f"revision: {service.revision}"
    if status.endpoint:
        yield f"endpoint: {status.endpoint}"
    rows = [
        [
            group.name,
            group.revision,
            group.state,
            f"{group.ready_shards}/{service.shards}",
            str(group.restarts),
            group.message or "",
        ]
        for group in status.groups
    ]
    yield from section("groups", ("NAME", "REVISION", "STATE", "SHARDS", "RESTARTS", "MESSAGE"), rows)


def remedies(service: "InferenceService", pods: Sequence[Json]) -> dict[str, str]:
    """Return condition -> what to do about it, of those that time does not mend."""
    from unmask_operator.client.service_advice import remedy

    steps = {one.type: remedy(service, one, pods) for one in service.conditions}
    return {kind: step for kind, step in steps.items() if step}


def standing(service: "InferenceService") -> str:
    """Say in a line how far a service is."""
    from unmask_operator.client.service_advice import obstacle

    wrong = _first_line(obstacle(service))
    groups = f"{service.status.ready_replicas}/{service.wanted} groups ready"
    return f"{service.name}: {service.state}, {groups}{f': {wrong}' if wrong else ''}"


def after_submitting(service: "InferenceService", *, dry_run: bool) -> str:
    """Say what became of a submission."""
    name = named(service)
    if dry_run:
        return f"{name}: the cluster takes it; nothing was kept"
    more = f"unmask describe service/{service.name} --namespace {service.namespace}"
    if service.state == "Submitted":
        return f"{name} is submitted; {more} says how it is"
    return f"{name} is {service.state}; {more} says more"


def after_cancelling(before: "InferenceService", *, delete: bool, dry_run: bool) -> str:
    """Say what became of a service that was as ``before``."""
    would = " (nothing was changed: --dry-run)" if dry_run else ""
    ending = "its engines finish what they have begun, and end"
    if delete:
        return f"{named(before)} is deleted; {ending}{would}"
    if before.raw["spec"].get("stopped"):
        return f"{named(before)} is stopped already"
    return f"{named(before)} is stopped; {ending}{would}"
