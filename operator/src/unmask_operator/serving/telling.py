"""What is said of a service: counts, conditions and a word for people, from groups and the plan."""

from collections.abc import Sequence

from unmask_operator.decision import JsonObject
from unmask_operator.launch.fronts import selector
from unmask_operator.serving.model import Resolved
from unmask_operator.serving.observing import Found
from unmask_operator.serving.passes import Pass
from unmask_operator.serving.planning import Plan, Wish
from unmask_operator.serving.revisions import Revision
from unmask_operator.times import seconds, stamp

__all__ = ["tell"]

_UNSETTLED = ("Changing", "ProgressDeadlineExceeded")
_PATIENCE_S = 120.0
"""From a group's start to a warning that something keeps it from starting."""


def tell(
    turn: Pass,
    groups: Sequence[Found],
    wish: Wish | None,
    steps: Plan,
    *,
    asked: Revision | None,
    resolved: Resolved,
) -> None:
    """Fill in the status.

    Args:
        turn: the pass; its status is what the last one said.
        groups: those that exist.
        wish: what there should be; ``None`` where there is nothing to make groups of.
        steps: what is done in this pass.
        asked: the revision that the manifest asks for, if that is known.
        resolved: how the model was found.
    """
    _tell_addresses(turn)
    _tell_progress(turn, groups, wish, steps, asked)
    _tell_counts(turn, groups, wish)
    _tell_scaling(turn)
    _tell_available(turn, groups)
    _tell_progressing(turn, groups, wish, steps)
    _tell_ready(turn, groups, wish, steps, asked, resolved)
    _warn(turn, groups)
    for group in groups:
        if group.available_in is not None:
            turn.again_in(group.available_in)


def _tell_addresses(turn: Pass) -> None:
    metadata, server = turn.service.metadata, turn.service.spec.server
    turn.status["selector"] = ",".join(f"{key}={value}" for key, value in selector(metadata.name).items())
    turn.status["endpoint"] = f"{metadata.name}.{metadata.namespace}.svc:{server.port}"


def _tell_progress(
    turn: Pass, groups: Sequence[Found], wish: Wish | None, steps: Plan, asked: Revision | None
) -> None:
    """Note when the rollout last came nearer to its end, and when it has reached it."""
    before = turn.status.get("updateRevision")
    target = wish.target if wish else None
    new = [group for group in groups if group.revision == target and group.state != "Ending"]
    nearer = (
        target != before
        or len(new) > turn.status.get("updatedReplicas", 0)
        or sum(group.state == "Available" for group in new) > turn.status.get("updatedAvailableReplicas", 0)
        or len(groups) - len(new) < _others(turn.status)
        # A change that begins now has all its time before it.
        or (
            wish is not None and not steps.settled and turn.conditions.reason("Progressing") not in _UNSETTLED
        )
    )
    if nearer or "lastProgressTime" not in turn.status:
        turn.status["lastProgressTime"] = stamp(turn.now)
    if target is not None and before is not None and target != before:
        turn.tell("RollingOut", f"revision {target}")
    turn.status["updateRevision"] = target
    # While the model of the manifest is not there yet, what is rolled out is not what was asked for.
    if wish and asked and steps.rolled_out and wish.current != wish.target:
        turn.status["currentRevision"] = wish.target
        turn.tell("RolledOut", f"revision {wish.target}")


def _others(status: JsonObject) -> int:
    """Return how many groups the last status told of that are not of its revision, or were ending."""
    return sum(
        one.get("revision") != status.get("updateRevision") or one.get("state") == "Ending"
        for one in status.get("groups", ())
    )


def _tell_counts(turn: Pass, groups: Sequence[Found], wish: Wish | None) -> None:
    live = [group for group in groups if group.state != "Ending"]
    new = [group for group in live if wish and group.revision == wish.target]
    turn.status |= {
        "replicas": len(live),
        "readyReplicas": sum(group.state in ("Ready", "Available") for group in live),
        "availableReplicas": sum(group.state == "Available" for group in live),
        "updatedReplicas": len(new),
        "updatedAvailableReplicas": sum(group.state == "Available" for group in new),
        "groups": [_group(group) for group in groups],
    }


def _group(group: Found) -> JsonObject:
    said = {
        "name": group.name,
        "revision": group.revision,
        "state": group.state,
        "readyShards": group.ready_shards,
        "restarts": group.restarts,
    }
    return said | ({"message": group.message[:1024]} if group.message else {})


def _tell_scaling(turn: Pass) -> None:
    """Say what the autoscaler says of itself."""
    scalers = turn.children("HorizontalPodAutoscaler")
    if turn.service.spec.autoscaling is None or turn.service.spec.stopped:
        turn.conditions.drop("ScalingReady")
        return
    told = {
        one["type"]: one for scaler in scalers for one in (scaler.get("status") or {}).get("conditions") or ()
    }
    for kind in ("AbleToScale", "ScalingActive"):
        one = told.get(kind)
        if one is None or one.get("status") != "True":
            reason = str((one or {}).get("reason") or "Starting")
            message = str((one or {}).get("message") or "the autoscaler has not said anything yet")
            turn.conditions.set("ScalingReady", "False", reason, message)
            return
    turn.conditions.set("ScalingReady", "True", "Scaling", "the autoscaler gets its metrics")


def _tell_available(turn: Pass, groups: Sequence[Found]) -> None:
    available = turn.status["availableReplicas"]
    least = max(1, turn.replicas - turn.service.spec.rollout.max_unavailable)
    said = f"{available} of {turn.replicas} groups are available"
    if available >= least:
        turn.conditions.set("Available", "True", "EnoughGroups", said)
        return
    reason = "TooFewGroups" if turn.replicas else "NoGroups"
    turn.conditions.set("Available", "False", reason, said + _held_up(groups))


def _held_up(groups: Sequence[Found]) -> str:
    """Return what keeps a group from starting, behind a semicolon; empty, nothing that anybody has told."""
    return next((f"; {group.message}" for group in groups if group.message), "")


def _tell_progressing(turn: Pass, groups: Sequence[Found], wish: Wish | None, steps: Plan) -> None:
    if wish is None:
        turn.conditions.set("Progressing", "False", "Waiting", "there is nothing to make groups of yet")
        return
    if steps.settled:
        turn.conditions.set("Progressing", "False", "Settled", "there is nothing to do")
        return
    deadline = turn.service.spec.rollout.progress_deadline_seconds
    left = (seconds(turn.status["lastProgressTime"]) or turn.now) + deadline - turn.now
    what = _held_up(groups)
    if left > 0:
        turn.conditions.set("Progressing", "True", "Changing", f"towards revision {wish.target}{what}")
        turn.again_in(left)
        return
    mend = "see to that" if what else "see status.groups and the logs of those that do not answer"
    text = f"no progress for {deadline} s{what}: {mend}, or apply the manifest of before"
    turn.conditions.set("Progressing", "False", "ProgressDeadlineExceeded", text)
    turn.tell("ProgressDeadlineExceeded", text, "Warning")


def _tell_ready(
    turn: Pass,
    groups: Sequence[Found],
    wish: Wish | None,
    steps: Plan,
    asked: Revision | None,
    resolved: Resolved,
) -> None:
    """Sum up: can as many groups be reached as are asked for, made as this generation asks for?"""
    spec, before = turn.service.spec, turn.status.get("state")
    if asked is None or not resolved.ready:
        stalled = turn.conditions.is_true("Stalled")
        state = "Stalled" if stalled else "Waiting"
        reason = turn.conditions.reason("Stalled") if stalled else resolved.reason
        message = turn.conditions.message("Stalled") if stalled else resolved.message
    elif turn.conditions.is_true("Stalled") and not steps.settled:
        state, reason = "Stalled", turn.conditions.reason("Stalled")
        message = turn.conditions.message("Stalled")
    elif not turn.replicas:
        state = "Stopped" if steps.settled else "Stopping"
        reason = "Stopped" if spec.stopped else "ScaledToZero"
        message = (
            "set spec.stopped to false to start"
            if spec.stopped
            else "set spec.replicas to 1 or more to start"
        )
    elif steps.settled and spec.rollout.paused and not steps.rolled_out:
        state, reason, message = (
            "Paused",
            "Paused",
            "groups are not of the revision asked for: set rollout.paused to false to replace them",
        )
    elif steps.settled:
        state, reason, message = "Ready", "Routable", str(turn.status["endpoint"])
        if not turn.conditions.is_true("Ready"):
            turn.tell("Ready", f"clients can connect to {message}")
    elif turn.conditions.reason("Progressing") == "ProgressDeadlineExceeded":
        state, reason = "Stuck", "ProgressDeadlineExceeded"
        message = turn.conditions.message("Progressing")
    else:
        whole = (
            wish is not None
            and wish.current == wish.target
            and turn.status["updatedReplicas"] == turn.replicas
        )
        state = "Degraded" if whole and before in ("Ready", "Degraded") else "Progressing"
        reason = "GroupsNotAvailable" if whole else "Changing"
        message = f"{turn.status['updatedAvailableReplicas']} of {turn.replicas} groups are new and available"
        message += _held_up(groups)
    turn.conditions.set("Ready", "True" if state == "Ready" else "False", str(reason), message)
    turn.status["state"] = state


def _warn(turn: Pass, groups: Sequence[Found]) -> None:
    """Write an event about groups that something keeps from starting for longer than machines take."""
    for group in groups:
        if not group.reason:
            continue
        left = group.since + _PATIENCE_S - turn.now
        if left <= 0:
            turn.tell(group.reason, f"{group.name}: {group.message}", "Warning")
        else:
            turn.again_in(min(left, _PATIENCE_S))
