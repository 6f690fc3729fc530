"""What should be for a DiffusionTrainJob, given what is.

The rules, in this order; the first that applies ends the pass:

1. A finished job makes nothing again: what runs is deleted, and the job itself when its time is over.
2. A job that cannot run as it is says so and waits for a change.
3. A Job that is complete completes the job; one that failed is classified, and the job fails, or the next
   attempt is decided: its number is in the status before its Job exists.
4. A job that takes longer than it may fails.
5. A suspended job has no Job. One that goes on is a new attempt, uncounted.
6. Objects of attempts before the present one go. Nothing new is made while any of them is left, so that two
   trainers never share a run folder or fight for the machines.
7. While the attempt's Job waits or runs: quota, places, start-up deadline, progress, stall.
8. Where it is missing, and no pause is left, it is made.
"""

from collections.abc import Sequence

from pydantic import ValidationError

from unmask_api.train_job import DiffusionTrainJob, TrainSpec
from unmask_operator.decision import Decision, Event, JsonObject, Observed, Reconciler
from unmask_operator.launch.pods import selector
from unmask_operator.training import reading
from unmask_operator.training.ending import clean_up, end, fail_if_late, next_attempt, remember
from unmask_operator.training.following import follow
from unmask_operator.training.passes import Pass, Settings
from unmask_operator.training.starting import start

__all__ = ["decide", "reconciler"]

KIND = "DiffusionTrainJob"
OURS = "unmask.dev/operator"


def reconciler(settings: Settings) -> Reconciler:
    """Return the reconciler of training jobs."""
    return Reconciler(
        kind=KIND,
        owns=("ConfigMap", "Service", "Job"),
        decide=lambda observed: decide(observed, settings),
        reads=("Pod", "JobWarning", "PodWarning"),
        optional=("PodGroup",),
        refers=_refers,
        expires=True,
    )


def decide(observed: Observed, settings: Settings) -> Decision:
    """Return what should be; see the rules above."""
    if observed.resource["metadata"].get("deletionTimestamp"):
        return Decision()  # the garbage collector takes what it owns
    if observed.resource["spec"].get("managedBy", OURS) != OURS:
        return Decision()
    turn = Pass(observed, settings)
    if turn.has_ended:
        clean_up(turn)
        return turn.result()
    try:
        job = _job(observed.resource)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        turn.obstacle("InvalidSpec", f"{where}: {first['msg']}; change it, or make a new job")
        return turn.result()
    _say_what_holds(turn, job.spec)
    _decide_active(turn, job)
    _say_what_is_in_the_way(turn)
    return turn.result()


def _refers(resource: JsonObject) -> Sequence[str]:
    """Return the name of the job that this one's model comes from, if it does."""
    source = resource["spec"].get("model", {}).get("init", {}).get("job") or {}
    return [source["name"]] if "name" in source else []


def _job(resource: JsonObject) -> DiffusionTrainJob:
    metadata = {"name": resource["metadata"]["name"]}
    document = {key: resource[key] for key in ("apiVersion", "kind", "spec")} | {"metadata": metadata}
    return DiffusionTrainJob.model_validate(document, by_alias=True, strict=False)


def _decide_active(turn: Pass, job: DiffusionTrainJob) -> None:
    """Apply the rules from the third on."""
    current = turn.current()
    if current is not None and (done := reading.finished(current)):
        end(turn, job.spec, current, succeeded=done == "Complete")
        current = None
    if turn.has_ended or fail_if_late(turn, job.spec):
        clean_up(turn)
        return
    if job.spec.suspend:
        _suspend(turn, current)
        return
    _resume(turn)
    old = turn.remove_old()
    if current is not None:
        follow(turn, job, current)
    elif old:
        if not turn.conditions.is_true("Restarting"):
            turn.conditions.set("Restarting", "True", "Ending", "waiting for the old pods to end")
        turn.set_state("Restarting")
    else:
        start(turn, job)


def _suspend(turn: Pass, current: JsonObject | None) -> None:
    if not turn.conditions.is_true("Suspended"):
        turn.events.append(Event("Suspended", "the pods save and end; nothing is started"))
    turn.conditions.set("Suspended", "True", "Suspended", "spec.suspend is true")
    turn.conditions.set("Running", "False", "Suspended")
    turn.conditions.set("Restarting", "False", "Suspended")
    turn.conditions.drop("Admitted")
    turn.status.pop("startTime", None)
    turn.status.pop("nextAttemptTime", None)
    turn.status["nodes"] = {"desired": 0, "ready": 0, "failed": 0}
    if current is not None and "deletionTimestamp" not in current["metadata"]:
        remember(turn, "Suspended")
        next_attempt(turn, counted=False, pause=0)
    turn.remove_old()
    turn.set_state("Suspended")


def _resume(turn: Pass) -> None:
    if turn.conditions.is_true("Suspended"):
        turn.events.append(Event("Resumed", "spec.suspend is false again"))
        turn.conditions.set("Suspended", "False", "Resumed")


def _say_what_holds(turn: Pass, spec: TrainSpec) -> None:
    turn.status["selector"] = selector(turn.metadata["name"])
    turn.conditions.set("Succeeded", "Unknown", "Active", "the job has not ended")
    for ended in ("Complete", "Failed"):
        turn.conditions.set(ended, "False", "Active")
    if spec.scheduling.queue_name is None:
        turn.conditions.drop("Admitted")


def _say_what_is_in_the_way(turn: Pass) -> None:
    if turn.has_ended:
        return
    for kind, name in sorted(turn.observed.conflicts):
        text = f"{kind} {name} belongs to somebody else: delete it, or give the job another name"
        turn.obstacle("NameConflict", text)
        return
    for (kind, name), message in sorted(turn.observed.rejections.items()):
        turn.obstacle("Refused", f"{kind} {name} is refused by the API server: {message}")
        return
