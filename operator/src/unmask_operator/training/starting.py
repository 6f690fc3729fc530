"""How an attempt starts: after its pause, with its model and somebody who starts its pods together."""

from collections.abc import Collection

from unmask.errors import UsageError
from unmask_api.train_job import DiffusionTrainJob, ModelInit, TrainSpec
from unmask_operator.decision import Event, JsonObject
from unmask_operator.job_models import look_up
from unmask_operator.launch import pods as rendering
from unmask_operator.launch.pods import Attempt, GangBy
from unmask_operator.times import seconds
from unmask_operator.training.ending import clean_up, fail
from unmask_operator.training.gang import who_starts, without
from unmask_operator.training.passes import Pass

__all__ = ["objects_of", "service_of", "start"]


def start(turn: Pass, job: DiffusionTrainJob) -> None:
    """Make the objects of the present attempt, of which there is no Job."""
    left = (seconds(turn.status.get("nextAttemptTime")) or 0.0) - turn.now
    if left > 0:
        turn.set_state("Restarting")
        turn.again_in(left)
        return
    turn.status.pop("nextAttemptTime", None)
    attempt = _attempt(turn, job)
    if attempt is None:
        if turn.conditions.is_true("Failed"):
            clean_up(turn)
        return
    try:
        turn.apply = _objects(attempt)
    except UsageError as error:
        turn.obstacle("InvalidSpec", str(error))
        return
    turn.conditions.set("Stalled", "False", "Started")
    turn.conditions.set("Restarting", "False", "Started")
    turn.conditions.drop("Scheduled")
    _say_who_starts_them(turn, attempt)
    turn.conditions.set("Running", "False", "Starting", "the pods are being made")
    turn.status["nodes"] = {"desired": job.spec.parallelism.nodes, "ready": 0, "failed": 0}
    turn.set_state("Starting")
    if not turn.observed.conflicts and not turn.observed.rejections:
        turn.events.append(Event("Starting", f"attempt {attempt.number}: {attempt.name}"))


def objects_of(turn: Pass, job: DiffusionTrainJob, kinds: Collection[str]) -> list[JsonObject]:
    """Return the present attempt's objects of some kinds; none where the attempt could not be started now."""
    attempt = _attempt(turn, job) if kinds else None
    return [one for one in _objects(attempt) if one["kind"] in kinds] if attempt else []


def service_of(turn: Pass, job: DiffusionTrainJob) -> JsonObject:
    """Return the present attempt's Service, whoever starts the pods."""
    return rendering.service(_attempt_by(turn, job, image="", gang="None"))


def _attempt(turn: Pass, job: DiffusionTrainJob) -> Attempt | None:
    """Return the present attempt; ``None`` where something is missing, which is then said."""
    image = job.spec.image or turn.settings.image
    if image is None:
        turn.obstacle("InvalidSpec", "spec.image is missing, and the operator has no default: set it")
        return None
    gang = who_starts(job.spec, turn.observed.served, pod_groups="PodGroup" in turn.observed.children)
    if gang is None:
        mode = job.spec.scheduling.gang.mode
        turn.obstacle(
            "GangUnsupported",
            f"scheduling.gang.mode is {mode}, which this cluster does not serve: install it, or set Auto",
        )
        return None
    with_model = _with_model(turn, job)
    return None if with_model is None else _attempt_by(turn, with_model, image=image, gang=gang)


def _attempt_by(turn: Pass, job: DiffusionTrainJob, *, image: str, gang: GangBy) -> Attempt:
    return Attempt(
        job=job,
        number=turn.status["attempt"],
        uid=turn.metadata["uid"],
        namespace=turn.metadata["namespace"],
        image=image,
        gang=gang,
    )


def _objects(attempt: Attempt) -> list[JsonObject]:
    """Return the attempt's objects, what the Job needs before the Job."""
    objects = [rendering.config_map(attempt), rendering.service(attempt)]
    if attempt.gang == "Native":
        objects.append(rendering.pod_group(attempt))
    return [*objects, rendering.indexed_job(attempt)]


def _say_who_starts_them(turn: Pass, attempt: Attempt) -> None:
    """Say who sees to it that all pods start or none."""
    nodes = attempt.job.spec.parallelism.nodes
    if nodes == 1:
        turn.conditions.drop("GangScheduled")
    elif attempt.gang == "None":
        text = without(nodes)
        turn.conditions.set("GangScheduled", "False", "NotInstalled", text)
        turn.events.append(Event("NoGangScheduling", text, "Warning"))
    else:
        turn.conditions.set("GangScheduled", "True", attempt.gang, f"by {attempt.gang}")


def _with_model(turn: Pass, job: DiffusionTrainJob) -> DiffusionTrainJob | None:
    """Return the job with the URI of its first weights; ``None`` while another job is to make them.

    The URI is kept in the status: later attempts begin with the same model, whatever became of that job.
    """
    source = job.spec.model.init.job
    if source is None:
        return job
    if (uri := turn.status.get("modelUri")) is None:
        found = look_up(source, turn.observed.referred.get(source.name))
        match found.state:
            case "Ready":
                uri = turn.status["modelUri"] = found.text
                turn.conditions.set("ModelReady", "True", "Found", f"begins with {uri}")
            case "Waiting":
                turn.conditions.set("ModelReady", "False", "WaitingForJob", found.text)
                turn.conditions.set("Stalled", "False", "WaitingForJob")
                turn.set_state("Waiting")
            case "Missing":
                _model_missing(turn, job.spec, found.text)
            case "Never":
                turn.conditions.set("ModelReady", "False", "NotComing", found.text)
                fail(turn, turn.failure("ModelJobFailed", found.text), "name another, or make a new job")
    if uri is None:
        return None
    model = job.spec.model.model_copy(update={"init": ModelInit(uri=uri)})
    return job.model_copy(update={"spec": job.spec.model_copy(update={"model": model})})


def _model_missing(turn: Pass, spec: TrainSpec, text: str) -> None:
    """Wait for a job that may be made after this one, but not for ever."""
    turn.conditions.set("ModelReady", "False", "ModelJobMissing", text)
    turn.obstacle("ModelJobMissing", text)
    deadline = spec.run_policy.startup_deadline_seconds
    left = (turn.conditions.since("Stalled") or turn.now) + deadline - turn.now
    if not deadline:
        return
    if left > 0:
        turn.again_in(left)
        return
    why = f"it was not made within runPolicy.startupDeadlineSeconds ({deadline} s)"
    fail(turn, turn.failure("ModelJobMissing", text), why)
