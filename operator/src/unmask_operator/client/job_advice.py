"""What to do about a job: pure functions from what is known of it to sentences.

A condition's message says what is wrong; what is said here is the next step, as a command where there is one.
"""

import re
from collections.abc import Sequence

from unmask_api.exit_codes import ExitCode
from unmask_operator.client.hints import hint, unseen
from unmask_operator.client.job_view import JobState, TrainJob
from unmask_operator.decision import JsonObject

__all__ = ["next_step", "obstacle"]

_MEND = {
    "UsageError": "correct the manifest",
    "DataError": "correct the data, or how the manifest reads them",
    "ModelError": "correct the model's folder, or what the manifest says of it",
    "Diverged": "lower learningRate.peak, or set spec.stability so that bad steps are skipped",
    "OutOfMemory": "raise resources.limits.memory, or lower parallelism.microBatchRows (unmask plan says what"
    " a job takes)",
    "Hung": "look for what hangs in the log of the node; runPolicy.hangTimeoutSeconds must exceed the slowest"
    " step, checkpoint and measurement",
    "Stalled": "look for what hangs in the log of the node; runPolicy.stallTimeoutSeconds must exceed the"
    " slowest step, checkpoint and measurement",
    "DeadlineExceeded": "raise or drop runPolicy.activeDeadlineSeconds",
    "StartupDeadlineExceeded": "remove what kept the pods from starting, or raise"
    " runPolicy.startupDeadlineSeconds",
    "ContainerCannotStart": "name an image whose python has unmask in spec.image",
    "ModelJobFailed": "name another job in model.init.job, or mend that one first",
    "PodLost": "find out who deletes pods, or which machine failed (kubectl get events)",
}
"""Reason of a failure -> what has to change before another try can do better."""

_RESOURCES = "spec.resources"


def obstacle(job: TrainJob) -> str:
    """Return what is in the job's way, in the words of its conditions; empty where nothing is."""
    match job.state:
        case JobState.FAILED:
            kinds: tuple[str, ...] = ("Failed",)
        case JobState.STALLED:
            kinds = ("Stalled",)
        case JobState.RESTARTING:
            kinds = ("Restarting", "Running")
        case JobState.WAITING:
            kinds = ("ModelReady",)
        case JobState.QUEUED:
            kinds = ("Admitted",)
        case JobState.STARTING:
            kinds = ("Running", "Scheduled")
        case _:
            return ""
    for kind in kinds:
        condition = job.condition(kind)
        if condition is not None and condition.message:
            return condition.message
    return ""


def next_step(job: TrainJob, pods: Sequence[JsonObject] = (), *, now: float) -> str:
    """Return what to do next.

    Args:
        job: as it was read.
        pods: of the job.
        now: seconds since 1970-01-01 UTC.
    """
    match job.state:
        case JobState.SUCCEEDED:
            return f"the model is in {job.raw['spec']['checkpoint']['uri'].rstrip('/')}/model"
        case JobState.FAILED:
            return _after_failure(job)
        case JobState.CANCELLED:
            return f"submit the manifest again, and it goes on {_from_where(job)}"
        case JobState.SUSPENDED:
            return (
                f"set spec.suspend to false, and it goes on {_from_where(job)}: kubectl patch dtj {job.name}"
                f' --namespace {job.namespace} --type merge --patch \'{{"spec":{{"suspend":false}}}}\''
            )
        case JobState.SUBMITTED:
            return unseen(job, job.created, now)
        case JobState.WAITING:
            other = job.raw["spec"]["model"]["init"].get("job", {}).get("name", "NAME")
            return f"wait for job {other}: unmask describe {other} --namespace {job.namespace} says how it is"
        case JobState.QUEUED:
            queue = job.raw["spec"].get("scheduling", {}).get("queueName")
            look = f"kubectl describe localqueue {queue} --namespace {job.namespace}" if queue else ""
            return f"wait for the queue to have room{'; ' + look + ' says what it waits for' if look else ''}"
        case JobState.STALLED:
            return (
                hint(obstacle(job), pods, resources=_RESOURCES) or "change what the condition Stalled names"
            )
        case JobState.STARTING:
            return hint(_why_not_started(job), pods, resources=_RESOURCES) or "wait: the pods are starting"
        case JobState.RESTARTING:
            return f"wait: the next attempt follows by itself, and goes on {_from_where(job)}"
        case JobState.RUNNING:
            return f"follow it: unmask logs --follow {job.name} --namespace {job.namespace}"
        case JobState.DELETING:
            return "wait: its pods are ending"
    return f"read it: kubectl get dtj {job.name} --namespace {job.namespace} --output yaml"


def _after_failure(job: TrainJob) -> str:
    failure = job.status.failure
    code = failure.exit_code if failure else None
    by_code = {ExitCode.USAGE: "UsageError", ExitCode.DATA: "DataError", ExitCode.MODEL: "ModelError"}
    reason = failure.reason if failure else ""
    mend = _MEND.get(reason) or (
        _MEND.get(by_code.get(ExitCode(code), "")) if code in set(ExitCode) else None
    )
    node = _node_of(failure.pod) if failure and failure.pod else 0
    named = f"{job.name} --namespace {job.namespace}"
    look = f"read its log (unmask logs {named}{f' --node {node}' if node else ''})"
    steps = f"{mend}; {look} for more" if mend else look
    return (
        f"{steps}; then delete the job and submit it again (unmask cancel --delete {named}): it goes on"
        f" {_from_where(job)}"
    )


def _from_where(job: TrainJob) -> str:
    checkpoint = job.status.checkpoint
    return f"from the checkpoint of step {checkpoint.latest_step}" if checkpoint else "from its start"


def _why_not_started(job: TrainJob) -> str:
    found = [job.condition(kind) for kind in ("Running", "Scheduled")]
    return " ".join(one.message for one in found if one is not None and one.status != "True")


def _node_of(pod: str) -> int:
    """Return the node of a pod from its name, ``JOB-aATTEMPT-NODE-SUFFIX``."""
    found = re.search(r"-a\d+-(\d+)(?:-|$)", pod)
    return int(found[1]) if found else 0
