"""What to do about a service: pure functions from what is known of it to sentences.

A condition's message says what is wrong; what is said here is the next step, as a command where there is one.
"""

from collections.abc import Sequence

from unmask_api.metadata import Condition
from unmask_operator.client.hints import hint, unseen
from unmask_operator.client.service_view import InferenceService, ServiceState
from unmask_operator.decision import JsonObject

__all__ = ["next_step", "obstacle", "remedy"]

_RESOURCES = "spec.group.engineResources or shardResources"
_STARTED = '{"stopped":false}'
_UNPAUSED = '{"rollout":{"paused":false}}'
_LOOKED_AT = {
    ServiceState.STALLED: ("Stalled",),
    ServiceState.WAITING: ("ModelReady",),
    ServiceState.STUCK: ("Progressing",),
    ServiceState.DEGRADED: ("Ready",),
    ServiceState.PAUSED: ("Ready",),
    ServiceState.READY: ("ScalingReady",),
}
"""State -> the conditions that say what is wrong in it, beside ``Stalled``, which may be in any."""
_AT_EASE = (ServiceState.DELETING, ServiceState.STOPPED, ServiceState.STOPPING)


def obstacle(service: InferenceService) -> str:
    """Return what is wrong with the service, in the operator's words; empty where nothing is."""
    if service.state in _AT_EASE:
        return ""
    for condition in _wrong(service):
        return condition.message or condition.reason
    return _held_up(service)


def remedy(service: InferenceService, condition: Condition, pods: Sequence[JsonObject] = ()) -> str:
    """Return what to do about a condition; empty where it is as it should be, or where time mends it.

    Args:
        service: as it was read.
        condition: of its status.
        pods: of the service.
    """
    message = condition.message
    match condition.type, condition.status, condition.reason:
        case "Stalled", "True", "ModelJobMissing" | "ModelJobFailed":
            return _about_the_job(service, missing=condition.reason == "ModelJobMissing")
        case "Stalled", "True", "NameConflict":
            return "delete the object that the message names, or give the service another name"
        case "Stalled", "True", _:
            return _hint(message, pods) or "change what the message names, and submit the manifest"
        case "ModelReady", "False", "WaitingForJob":
            other = service.job_of_model
            return f"wait for job {other}: unmask describe job/{other} {_place(service)} says how it is"
        case "ModelReady", "False", "JobMissing" | "NotComing":
            return _about_the_job(service, missing=condition.reason == "JobMissing")
        case "Progressing", "False", "ProgressDeadlineExceeded":
            mend = _hint(message, pods) or f"read what its pods print: {_logs(service)}"
            return f"{mend}; then submit the manifest as it should be, or the one of before"
        case "Progressing", "True", _:
            return _hint(message, pods)
        case "ScalingReady", "False", reason if reason != "Starting":
            return (
                "see that an adapter for custom metrics runs and has spec.autoscaling.metrics, or drop"
                f" spec.autoscaling (kubectl describe hpa {_place(service)})"
            )
        case "Ready", "False", "Paused":
            return f"replace the groups: {_patch(service, _UNPAUSED)}"
        case "Ready", "False", "ScaledToZero":
            return f"kubectl scale diffusioninferenceservices/{service.name} {_place(service)} --replicas=1"
        case "Ready", "False", "Stopped" if service.cancelled:
            return "submit the manifest again, and it starts (unmask submit -f FILE)"
        case "Ready", "False", "Stopped":
            return f"start it: {_patch(service, _STARTED)}"
        case "Ready", "False", "GroupsNotAvailable":
            return _hint(message, pods)
    return ""


def next_step(service: InferenceService, pods: Sequence[JsonObject] = (), *, now: float) -> str:
    """Return what to do next.

    Args:
        service: as it was read.
        pods: of the service.
        now: seconds since 1970-01-01 UTC.
    """
    if service.state is ServiceState.DELETING:
        return "wait: its engines finish what they have begun, and end"
    if service.state is ServiceState.SUBMITTED:
        return unseen(service, service.changed, now)
    wrong = _wrong(service)
    if service.state is ServiceState.STOPPED:
        wrong = [one for one in service.conditions if one.type == "Ready"]
    for condition in wrong:
        if step := remedy(service, condition, pods):
            return step
    match service.state:
        case ServiceState.STOPPING:
            return "wait: its engines finish what they have begun, and end"
        case ServiceState.PROGRESSING | ServiceState.DEGRADED:
            step = _hint(_held_up(service), pods)
            return (
                step or f"wait: its groups are being made or replaced; {_logs(service)} shows their engines"
            )
        case ServiceState.READY:
            return _how_to_ask(service)
    return f"read it: kubectl get dis {service.name} {_place(service)} --output yaml"


def _wrong(service: InferenceService) -> list[Condition]:
    """Return the conditions that say what is wrong, the most important first."""
    found = [service.condition("Stalled")]
    found += [service.condition(kind) for kind in _LOOKED_AT.get(service.state, ())]
    bad = {"Stalled": "True"}
    return [
        one
        for one in dict.fromkeys(found)
        if one is not None
        and one.status == bad.get(one.type, "False")
        and (one.type, one.reason) != ("ScalingReady", "Starting")
    ]


def _held_up(service: InferenceService) -> str:
    """Return what keeps the first group that something keeps from starting."""
    return next((group.message for group in service.status.groups if group.message), "")


def _hint(message: str, pods: Sequence[JsonObject]) -> str:
    return hint(message, pods, resources=_RESOURCES)


def _about_the_job(service: InferenceService, *, missing: bool) -> str:
    job = service.job_of_model
    if missing:
        return f"submit job {job}, or name another one in spec.model.job"
    return (
        f"see why job {job} has no model: unmask describe job/{job} {_place(service)}; or name another one in"
        " spec.model.job"
    )


def _how_to_ask(service: InferenceService) -> str:
    server = service.raw["spec"].get("server", {})
    port = server.get("port", 50051)
    if server.get("tls"):
        return f"ask it, with a certificate that it knows, at {service.status.endpoint}"
    return (
        f"ask it: kubectl port-forward service/{service.name} {port}:{port} {_place(service)}, and unmask"
        f" generate hello --server 127.0.0.1:{port}"
    )


def _patch(service: InferenceService, spec: str) -> str:
    return f"kubectl patch dis {service.name} {_place(service)} --type merge --patch '{{\"spec\":{spec}}}'"


def _logs(service: InferenceService) -> str:
    return f"unmask logs service/{service.name} {_place(service)}"


def _place(service: InferenceService) -> str:
    return f"--namespace {service.namespace}"
