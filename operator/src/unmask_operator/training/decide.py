"""What should be for a DiffusionTrainJob, given what is.

The rules, in this order; the first that applies ends the pass:

1. A finished job makes nothing again: what runs is deleted, and the job itself when its time is over.
2. A job that cannot run as it is says so and waits for a change.
3. Objects of attempts before the present one go. Nothing new is made while any of them is left, so that two
   trainers never share a run folder or fight for the machines.
4. A Job that is complete completes the job; one that failed is classified, and the job fails, or the next
   attempt is decided: its number is in the status before its Job exists.
5. A suspended job has no Job. One that goes on is a new attempt, uncounted.
6. Where the attempt's Job is missing, and no pause is left, it is made.
7. While it waits or runs: quota, places, start-up deadline, deadline, progress, stall.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from unmask.errors import UsageError
from unmask_api.train_job import DiffusionTrainJob, ModelInit, TrainSpec
from unmask_api.train_status import Failure
from unmask_operator.decision import Decision, Deletion, Event, JsonObject, Observed, Question, Reconciler
from unmask_operator.launch import pods as rendering
from unmask_operator.launch.pods import Attempt, GangBy
from unmask_operator.launch.report import Report, StackReport, Termination
from unmask_operator.training import reading
from unmask_operator.training.conditions import Conditions
from unmask_operator.training.failure import Action, action, cause
from unmask_operator.training.gang import DROPPED, who_starts, without
from unmask_operator.training.progress import checkpoint, percentage, progress
from unmask_operator.training.source import look_up
from unmask_operator.training.times import seconds, stamp

__all__ = ["Settings", "decide", "reconciler"]

KIND = "DiffusionTrainJob"
OURS = "unmask.dev/operator"
_LONGEST_BACKOFF = 600
_HISTORY = 10
_SHORT = 60.0
"""Seconds; an attempt that lasted no longer is followed by a pause, whatever ended it."""
_DUMP_SECONDS = 10.0
"""From asking a hanging attempt's pods for their stacks to ending it."""
_DUMPS = 8
"""Pods that are asked, the first ones: each may take two seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the operator was installed with."""

    image: str | None = None
    """Container image of jobs that name none."""


def reconciler(settings: Settings) -> Reconciler:
    """Return the reconciler of training jobs."""
    return Reconciler(
        kind=KIND,
        owns=("ConfigMap", "Service", "Job"),
        decide=lambda observed: decide(observed, settings),
        reads=("Pod", "JobWarning", "PodWarning"),
        optional=("PodGroup",),
        refers=_refers,
    )


def decide(observed: Observed, settings: Settings) -> Decision:
    """Return what should be; see the rules above."""
    metadata = observed.resource["metadata"]
    if metadata.get("deletionTimestamp"):
        return Decision()  # the garbage collector takes what it owns
    if observed.resource["spec"].get("managedBy", OURS) != OURS:
        return Decision()
    return _Pass(observed, settings).decision()


def _refers(resource: JsonObject) -> Sequence[str]:
    """Return the name of the job that this one's model comes from, if it does."""
    source = resource["spec"].get("model", {}).get("init", {}).get("job") or {}
    return [source["name"]] if "name" in source else []


def _spec_of(resource: JsonObject) -> DiffusionTrainJob:
    metadata = {"name": resource["metadata"]["name"]}
    document = {key: resource[key] for key in ("apiVersion", "kind", "spec")} | {"metadata": metadata}
    return DiffusionTrainJob.model_validate(document, by_alias=True, strict=False)


@dataclass(slots=True)
class _Pass:
    """One call: the status as it will be, and what else is to be done."""

    observed: Observed
    settings: Settings
    status: JsonObject = field(init=False)
    conditions: Conditions = field(init=False)
    apply: list[JsonObject] = field(default_factory=list)
    restore: list[JsonObject] = field(default_factory=list)
    delete: list[Deletion] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    ask: list[Question] = field(default_factory=list)
    wait: float | None = None

    def __post_init__(self) -> None:
        before = self.observed.resource.get("status") or {}
        generation = self.observed.resource["metadata"].get("generation", 0)
        self.status = {"attempt": 0, "restarts": 0, "restartsCounted": 0, "backoff": 0} | dict(before)
        self.status["observedGeneration"] = generation
        self.conditions = Conditions(
            before.get("conditions", ()), generation=generation, now=stamp(self.observed.now)
        )

    # --- the rules, in order ------------------------------------------------------------------------------

    def decision(self) -> Decision:
        for finished in ("Complete", "Failed"):
            if self.conditions.is_true(finished):
                self._clean_up()
                return self._result()
        try:
            job = _spec_of(self.observed.resource)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            return self._stuck("InvalidSpec", f"{where}: {first['msg']}; change it, or make a new job")
        self._say_what_holds(job.spec)
        self._decide_active(job)
        self._say_what_is_in_the_way()
        return self._result()

    def _decide_active(self, job: DiffusionTrainJob) -> None:
        current = self._current()
        if current is not None and (done := reading.finished(current)):
            self._ended(job.spec, current, succeeded=done == "Complete")
            if self.conditions.is_true("Complete") or self.conditions.is_true("Failed"):
                self._clean_up()
                return
            current = None
        if self._is_late(job.spec):
            self._fail(
                self._failure(
                    "DeadlineExceeded",
                    f"the job did not end within runPolicy.activeDeadlineSeconds"
                    f" ({job.spec.run_policy.active_deadline_seconds} s)",
                ),
                "raise activeDeadlineSeconds in a new job, which goes on from the last checkpoint",
            )
            self._clean_up()
            return
        if job.spec.suspend:
            self._suspended(current)
            return
        self._resumed()
        old = self._remove_old()
        if current is not None:
            self._follow(job, current)
        elif old:
            if not self.conditions.is_true("Restarting"):
                self.conditions.set("Restarting", "True", "Ending", "waiting for the old pods to end")
            self._set_state("Restarting")
        else:
            self._start(job)

    # 1

    def _clean_up(self) -> None:
        """Delete what is left to run, and the job when its time is over; make nothing, ever."""
        policy = self.observed.resource["spec"].get("runPolicy", {})
        cleanup = policy.get("podCleanup", "Running")
        for child in self._children("Job"):
            if cleanup == "All" or (cleanup == "Running" and not reading.finished(child)):
                self._remove(child)
        ttl = policy.get("ttlSecondsAfterFinished")
        ended = seconds(self.status.get("completionTime"))
        if ttl is None or ended is None:
            return
        left = ended + ttl - self.observed.now
        if left > 0:
            self._again_in(left)
            return
        metadata = self.observed.resource["metadata"]
        self.delete.append(Deletion(KIND, metadata["name"], metadata["uid"], "Background"))

    # 2

    def _stuck(self, reason: str, message: str) -> Decision:
        """Say that nothing goes on before the resource changes; what runs goes on running."""
        self._obstacle(reason, message)
        return self._result()

    def _obstacle(self, reason: str, message: str) -> None:
        self.conditions.set("Stalled", "True", reason, message)
        self._set_state("Stalled")
        self.events.append(Event(reason, message[:1024], "Warning"))

    def _say_what_is_in_the_way(self) -> None:
        if self.conditions.is_true("Complete") or self.conditions.is_true("Failed"):
            return
        for kind, name in sorted(self.observed.conflicts):
            self._obstacle(
                "NameConflict",
                f"{kind} {name} belongs to somebody else: delete it, or give the job another name",
            )
            return
        for (kind, name), message in sorted(self.observed.rejections.items()):
            self._obstacle("Refused", f"{kind} {name} is refused by the API server: {message}")
            return

    # 3

    def _remove_old(self) -> bool:
        """Delete Jobs of other attempts; return whether any is left, if only ending."""
        number = str(self.status["attempt"])
        old = [child for child in self._children("Job") if reading.attempt_of(child) != number]
        for child in old:
            self._remove(child)
        pods = [
            pod
            for pod in self._children("Pod")
            if reading.attempt_of(pod) != number and reading.is_running(pod)
        ]
        if not old and not pods:  # their addresses and job files are of no use any more
            for kind in ("Service", "ConfigMap", "PodGroup"):
                for child in self._children(kind):
                    if reading.attempt_of(child) != number:
                        self._remove(child, "Background")
        return bool(old or pods)

    def _remove(self, child: JsonObject, propagation: Any = "Foreground") -> None:
        metadata = child["metadata"]
        self.delete.append(Deletion(child["kind"], metadata["name"], metadata["uid"], propagation))

    # 4

    def _ended(self, spec: TrainSpec, current: JsonObject, *, succeeded: bool) -> None:
        attempt = self.status["attempt"]
        if succeeded:
            told = self._last_words(current)
            self._finish("Complete", "Completed", told.message if told else "all stages are trained")
            progress = self.status.get("progress")
            if progress:
                step = told.step if told and told.step else progress["totalSteps"]
                self.status["progress"] = progress | {
                    "step": step,
                    "percentage": percentage(step, progress["totalSteps"]),
                    "estimatedRemainingSeconds": 0,
                }
            self._remember("Completed")
            self.events.append(Event("Completed", "all stages are trained"))
            return
        pods = self._pods(current)
        failure = cause(current, pods, attempt=attempt, now=self.observed.now)
        self._after_failure(spec, failure, started=reading.started(current))

    def _after_failure(self, spec: TrainSpec, failure: Failure, *, started: float | None) -> None:
        """Fail the job, or decide on the next attempt."""
        policy = spec.run_policy
        history = self.status.get("history") or [{}]
        follows, why = action(
            failure,
            policy.failure_rules,
            restarts_counted=self.status["restartsCounted"],
            max_restarts=policy.max_restarts,
            last_reason=history[-1].get("reason"),
        )
        self.status["failure"] = failure.to_json_dict()
        if follows is Action.FAIL:
            self._fail(failure, why)
            return
        self._remember(failure.reason)
        counted = follows is Action.RESTART
        lasted = self.observed.now - started if started is not None else 0.0
        if lasted >= policy.reset_after_seconds:
            self.status["backoff"] = 0
        pause = 0 if lasted >= _SHORT else policy.restart_backoff_seconds
        if counted:
            exponent = min(self.status["backoff"], 16)
            pause = min(policy.restart_backoff_seconds * 2**exponent, _LONGEST_BACKOFF)
            self.status["backoff"] += 1
        self._next_attempt(counted=counted, pause=pause)
        self.conditions.set("Running", "False", "Restarting", failure.message)
        self.conditions.set("Restarting", "True", failure.reason, failure.message)
        limit = "not counted" if not counted else f"at most {policy.max_restarts}"
        self.events.append(
            Event("Restarting", f"{failure.reason}: {failure.message}"[:980] + f" ({limit})", "Warning")
        )

    def _next_attempt(self, *, counted: bool, pause: int) -> None:
        self.status["attempt"] += 1
        self.status["restarts"] += 1
        self.status["restartsCounted"] += counted
        self.conditions.drop("Hung")
        self.status.pop("nextAttemptTime", None)
        if pause:
            self.status["nextAttemptTime"] = stamp(self.observed.now + pause)

    def _fail(self, failure: Failure, why: str) -> None:
        self.status["failure"] = failure.to_json_dict()
        message = f"{failure.message} ({why})" if why else failure.message
        self._finish("Failed", failure.reason, message)
        self._remember(failure.reason)
        self.events.append(Event("Failed", f"{failure.reason}: {message}"[:1024], "Warning"))

    def _finish(self, kind: str, reason: str, message: str) -> None:
        done = kind == "Complete"
        self.conditions.set("Complete", "True" if done else "False", reason, message)
        self.conditions.set("Failed", "False" if done else "True", reason, message)
        self.conditions.set("Succeeded", "True" if done else "False", reason, message)
        self.conditions.set("Running", "False", reason)
        for active in ("Restarting", "Stalled"):
            self.conditions.set(active, "False", reason)
        self.status["completionTime"] = stamp(self.observed.now)
        self.status.pop("nextAttemptTime", None)
        self._set_state("Succeeded" if done else "Failed")

    def _remember(self, reason: str) -> None:
        """Add the attempt that ended to the history."""
        current = self._find("Job", str(self.status["attempt"]))
        started = reading.started(current) if current else None
        step = (self.status.get("progress") or {}).get("step")
        history = list(self.status.get("history") or ())
        entry = {
            "attempt": self.status["attempt"],
            "startTime": stamp(started) if started is not None else None,
            "endTime": stamp(self.observed.now),
            "reason": reason,
            "fromStep": history[-1].get("toStep", 0) if history else 0,
            "toStep": step,
        }
        history.append({key: value for key, value in entry.items() if value is not None})
        self.status["history"] = history[-_HISTORY:]

    # 5

    def _suspended(self, current: JsonObject | None) -> None:
        if not self.conditions.is_true("Suspended"):
            self.events.append(Event("Suspended", "the pods save and end; nothing is started"))
        self.conditions.set("Suspended", "True", "Suspended", "spec.suspend is true")
        self.conditions.set("Running", "False", "Suspended")
        self.conditions.set("Restarting", "False", "Suspended")
        self.conditions.drop("Admitted")
        self.status.pop("startTime", None)
        self.status.pop("nextAttemptTime", None)
        self.status["nodes"] = {"desired": 0, "ready": 0, "failed": 0}
        if current is not None and "deletionTimestamp" not in current["metadata"]:
            self._remember("Suspended")
            self._next_attempt(counted=False, pause=0)
        self._remove_old()
        self._set_state("Suspended")

    def _resumed(self) -> None:
        if self.conditions.is_true("Suspended"):
            self.events.append(Event("Resumed", "spec.suspend is false again"))
            self.conditions.set("Suspended", "False", "Resumed")

    # 6

    def _start(self, job: DiffusionTrainJob) -> None:
        left = (seconds(self.status.get("nextAttemptTime")) or 0.0) - self.observed.now
        if left > 0:
            self._set_state("Restarting")
            self._again_in(left)
            return
        self.status.pop("nextAttemptTime", None)
        attempt = self._attempt(job)
        if attempt is None:
            if self.conditions.is_true("Failed"):
                self._clean_up()
            return
        try:
            self.apply = self._objects(attempt)
        except UsageError as error:
            self._obstacle("InvalidSpec", str(error))
            return
        self.conditions.set("Stalled", "False", "Started")
        self.conditions.set("Restarting", "False", "Started")
        self.conditions.drop("Scheduled")
        self._say_who_starts_them(attempt)
        self.conditions.set("Running", "False", "Starting", "the pods are being made")
        self.status["nodes"] = {"desired": job.spec.parallelism.nodes, "ready": 0, "failed": 0}
        self._set_state("Starting")
        if not self.observed.conflicts and not self.observed.rejections:
            self.events.append(Event("Starting", f"attempt {attempt.number}: {attempt.name}"))

    def _attempt(self, job: DiffusionTrainJob) -> Attempt | None:
        image = job.spec.image or self.settings.image
        if image is None:
            self._obstacle("InvalidSpec", "spec.image is missing, and the operator has no default: set it")
            return None
        gang = who_starts(job.spec, self.observed.served, pod_groups="PodGroup" in self.observed.children)
        if gang is None:
            mode = job.spec.scheduling.gang.mode
            self._obstacle(
                "GangUnsupported",
                f"scheduling.gang.mode is {mode}, which this cluster does not serve: install it, or set Auto",
            )
            return None
        with_model = self._with_model(job)
        if with_model is None:
            return None
        return self._attempt_by(with_model, image=image, gang=gang)

    def _attempt_by(self, job: DiffusionTrainJob, *, image: str, gang: GangBy) -> Attempt:
        metadata = self.observed.resource["metadata"]
        return Attempt(
            job=job,
            number=self.status["attempt"],
            uid=metadata["uid"],
            namespace=metadata["namespace"],
            image=image,
            gang=gang,
        )

    def _with_model(self, job: DiffusionTrainJob) -> DiffusionTrainJob | None:
        """Return the job with the URI of its first weights; ``None`` while another job is to make them.

        The URI is kept in the status: later attempts begin with the same model, whatever became of that job.
        """
        source = job.spec.model.init.job
        if source is None:
            return job
        if (uri := self.status.get("modelUri")) is None:
            found = look_up(source, self.observed.referred.get(source.name))
            match found.state:
                case "Ready":
                    uri = self.status["modelUri"] = found.text
                    self.conditions.set("ModelReady", "True", "Found", f"begins with {uri}")
                case "Waiting":
                    self.conditions.set("ModelReady", "False", "WaitingForJob", found.text)
                    self.conditions.set("Stalled", "False", "WaitingForJob")
                    self._set_state("Waiting")
                case "Missing":
                    self._model_missing(job.spec, found.text)
                case "Never":
                    self.conditions.set("ModelReady", "False", "NotComing", found.text)
                    self._fail(self._failure("ModelJobFailed", found.text), "name another, or make a new job")
        if uri is None:
            return None
        init = ModelInit(uri=uri)
        model = job.spec.model.model_copy(update={"init": init})
        return job.model_copy(update={"spec": job.spec.model_copy(update={"model": model})})

    def _model_missing(self, spec: TrainSpec, text: str) -> None:
        """Wait for a job that may be made after this one, but not for ever."""
        self.conditions.set("ModelReady", "False", "ModelJobMissing", text)
        self._obstacle("ModelJobMissing", text)
        deadline = spec.run_policy.startup_deadline_seconds
        left = (self.conditions.since("Stalled") or self.observed.now) + deadline - self.observed.now
        if not deadline:
            return
        if left > 0:
            self._again_in(left)
            return
        why = f"it was not made within runPolicy.startupDeadlineSeconds ({deadline} s)"
        self._fail(self._failure("ModelJobMissing", text), why)

    def _failure(self, reason: str, message: str) -> Failure:
        """Return a failure of the present attempt that no pod has told of."""
        return Failure(
            reason=reason, message=message, attempt=self.status["attempt"], time=stamp(self.observed.now)
        )

    def _objects(self, attempt: Attempt) -> list[JsonObject]:
        """Return the attempt's objects, what the Job needs before the Job."""
        objects = [rendering.config_map(attempt), rendering.service(attempt)]
        if attempt.gang == "Native":
            objects.append(rendering.pod_group(attempt))
        return [*objects, rendering.indexed_job(attempt)]

    # 7

    def _follow(self, job: DiffusionTrainJob, current: JsonObject) -> None:
        if "deletionTimestamp" in current["metadata"]:
            self.conditions.set("Running", "False", "Deleted", "somebody deleted the Job; it is made again")
            self._set_state("Restarting")
            return
        if self._repaired(job, current):
            return
        if current["spec"].get("suspend"):
            self._waits_for_quota(job.spec, current)
            return
        if job.spec.scheduling.queue_name:
            self.conditions.set("Admitted", "True", "Admitted", "the queue has room")
        self.status.setdefault("startTime", stamp(reading.started(current) or self.observed.now))
        self._read_gang_back(current)
        pods = self._pods(current)
        nodes = current["spec"].get("parallelism", 1)
        ready = [pod for pod in pods if reading.is_ready(pod)]
        failed = [pod for pod in pods if pod.get("status", {}).get("phase") == "Failed"]
        self.status["nodes"] = {"desired": nodes, "ready": len(ready), "failed": len(failed)}
        self.conditions.set("Stalled", "False", "Following")
        if deadline := job.spec.run_policy.active_deadline_seconds:
            start = seconds(self.status["startTime"]) or self.observed.now
            self._again_in(start + deadline - self.observed.now)
        placed = self._placed(job.spec, current, pods, nodes)
        if len(ready) >= _needed(job.spec, nodes):
            self._runs(job.spec, current, ready)
        elif failed:
            names = ", ".join(sorted(pod["metadata"]["name"] for pod in failed))
            self.conditions.set(
                "Running", "False", "Ending", f"{names} failed; waiting for the others to end"
            )
        else:
            self._starts(job.spec, current, pods, placed)

    def _repaired(self, job: DiffusionTrainJob, current: JsonObject) -> bool:
        """Make again what was deleted or changed beside a Job that runs, and give an elastic one its nodes.

        Returns whether that takes a new attempt.
        """
        number = str(self.status["attempt"])
        needed = ["ConfigMap", "Service"]
        if "PodGroup" in self.observed.children and reading.gang_is_kept(current):
            needed.append("PodGroup")
        missing = [kind for kind in needed if self._find(kind, number) is None]
        attempt = self._attempt(job) if missing else None
        if attempt is not None:
            made = self._objects(attempt)
            self.apply += [one for one in made if one["kind"] in missing]
        self.restore.append(rendering.service(self._attempt_by(job, image="", gang="None")))
        nodes = job.spec.parallelism.nodes
        if job.spec.elastic is None or current["spec"].get("parallelism") == nodes:
            return False
        if job.spec.scheduling.queue_name and not current["spec"].get("suspend"):
            # a queue has admitted so many pods: ask it anew, from the last checkpoint
            self._remember("Resized")
            self._next_attempt(counted=False, pause=0)
            self.conditions.set("Restarting", "True", "Resized", f"the queue is asked for {nodes} nodes")
            self._remove_old()
            self._set_state("Restarting")
            return True
        kept = ("apiVersion", "kind")
        spec = {key: value for key, value in current["spec"].items() if key != "selector"}
        labels = current["metadata"].get("labels", {})
        resized = {key: current[key] for key in kept} | {
            "metadata": {"name": current["metadata"]["name"], "labels": labels},
            "spec": spec | {"parallelism": nodes, "completions": nodes},
        }
        self.apply.append(resized)
        self.events.append(Event("Resizing", f"to {nodes} nodes"))
        return False

    def _waits_for_quota(self, spec: TrainSpec, current: JsonObject) -> None:
        """Somebody suspended the Job, and not we: a queue has not admitted it yet, or took its place away."""
        evicted = self.conditions.is_true("Admitted") or self.conditions.reason("Admitted") == "Evicted"
        reason = "Evicted" if evicted else "WaitingForQuota"
        queue = spec.scheduling.queue_name
        where = f"queue {queue}" if queue else "whoever set suspend on the Job"
        self.conditions.set("Admitted", "False", reason, f"waiting for {where}")
        self.conditions.set("Running", "False", reason, f"waiting for {where}")
        self.status.pop("startTime", None)
        self.status["nodes"] = {"desired": current["spec"].get("parallelism", 1), "ready": 0, "failed": 0}
        self._set_state("Queued")

    def _placed(self, spec: TrainSpec, current: JsonObject, pods: Sequence[JsonObject], nodes: int) -> str:
        """Say whether all pods have a machine; return what stands in the way, or nothing."""
        groups = [one for one in self._children("PodGroup") if reading.attempt_of(one) == self._number]
        if text := reading.unplaced(pods, groups):
            self.conditions.set("Scheduled", "False", "Unschedulable", text)
            return text
        placed = [pod for pod in pods if pod.get("spec", {}).get("nodeName")]
        if len(placed) >= _needed(spec, nodes):
            self.conditions.set("Scheduled", "True", "Scheduled", "every pod has a machine")
            return ""
        name = current["metadata"]["name"]
        reason, text = "Pending", f"{len(pods)} of {nodes} pods exist"
        if len(pods) < nodes:
            word, said = reading.refused_pods(current, self._children("JobWarning"))
            reason = word or reason
            text = said or f"{text}; if that stays so, see: kubectl describe job {name}"
        self.conditions.set("Scheduled", "False", reason, text)
        return text

    def _starts(self, spec: TrainSpec, current: JsonObject, pods: Sequence[JsonObject], placed: str) -> None:
        """Wait for the pods to run, but not for ever."""
        reason, text = reading.cannot_start(pods, self._children("PodWarning"))
        obstacle = text or placed or "the pods are starting"
        self.conditions.set("Running", "False", reason or "Starting", obstacle)
        self._set_state("Starting")
        waited = self.observed.now - (reading.started(current) or self.observed.now)
        timeout = spec.scheduling.gang.timeout_seconds
        if placed and waited >= timeout:
            self.events.append(Event("Unschedulable", placed[:1024], "Warning"))
        elif placed:
            self._again_in(timeout - waited)
        deadline = spec.run_policy.startup_deadline_seconds
        if not deadline:
            return
        if waited < deadline:
            self._again_in(deadline - waited)
            return
        self._give_up(
            spec,
            current,
            "StartupDeadlineExceeded",
            f"not all pods ran within runPolicy.startupDeadlineSeconds ({deadline} s): {obstacle}",
        )

    def _runs(self, spec: TrainSpec, current: JsonObject, ready: Sequence[JsonObject]) -> None:
        self.conditions.set("Running", "True", "Running", "every pod runs")
        self.conditions.set("Restarting", "False", "Running")
        self._set_state("Running")
        first = min(ready, key=reading.index)
        if _address(first):
            self.ask.append(self._question(spec, first, "progress"))
        self._again_in(spec.observability.progress_interval_seconds)
        answer = self.observed.answers.get(first["metadata"]["uid"])
        report = Report.read(answer.text) if answer else None
        if answer and report and report.attempt == self.status["attempt"]:
            self._note(report, answer.at)
        since = max((reading.running_since(pod) or 0.0 for pod in ready), default=0.0)
        self._judge(spec, current, ready, since or self.observed.now)

    def _note(self, report: Report, at: float) -> None:
        """Take over what the trainer reports."""
        self.status["progress"] = progress(report, self.status.get("progress") or {}, at=at)
        if saved := checkpoint(report, self.status.get("checkpoint") or {}, at=at):
            self.status["checkpoint"] = saved

    def _judge(self, spec: TrainSpec, current: JsonObject, ready: Sequence[JsonObject], since: float) -> None:
        """Restart an attempt whose step does not grow, if it reports at all; ask first where it is."""
        timeout = spec.run_policy.stall_timeout_seconds
        progress = self.status.get("progress") or {}
        reported = seconds(progress.get("lastReportTime"))
        if not timeout or reported is None or reported < since:
            return  # nobody answered yet in this attempt: that may be the network, not the trainer
        moved = max(seconds(progress.get("lastProgressTime")) or since, since)
        stands = reported - moved >= timeout
        silent = self.observed.now - reported >= 2 * timeout
        if not stands and not silent:
            self.conditions.drop("Hung")
            return
        step = progress["step"]
        what = f"the step stayed at {step} for {timeout} s" if stands else f"no report since step {step}"
        asked = self.conditions.since("Hung")
        self.conditions.set("Hung", "True", "StepStands" if stands else "Silent", what)
        left = (self.observed.now if asked is None else asked) + _DUMP_SECONDS - self.observed.now
        stacks = self._stacks(ready)
        if left > 0:
            self.ask.clear()  # an answer about the progress would take the place of the stacks
            if not stacks:
                self.ask += [self._question(spec, pod, "stacks") for pod in ready if _address(pod)][:_DUMPS]
            self._again_in(left)
            return
        where = f"; {'; '.join(stacks)}"[:1500] if stacks else ""
        self._give_up(
            spec,
            current,
            "Stalled",
            f"{what} (runPolicy.stallTimeoutSeconds is {timeout}): a hang, or a step, measurement or"
            f" checkpoint that takes longer{where}",
        )

    def _stacks(self, pods: Sequence[JsonObject]) -> list[str]:
        """Return what processes of an attempt that hangs were doing, as far as they have said."""
        answers = [self.observed.answers.get(pod["metadata"]["uid"]) for pod in pods]
        reports = [StackReport.read(answer.text) for answer in answers if answer]
        number = self.status["attempt"]
        return [line for report in reports if report and report.attempt == number for line in report.stacks]

    def _question(self, spec: TrainSpec, pod: JsonObject, what: str) -> Question:
        address = f"http://{reading.host(_address(pod))}:{spec.observability.port}"
        return Question(pod["metadata"]["uid"], f"{address}/{what}")

    def _give_up(self, spec: TrainSpec, current: JsonObject, reason: str, message: str) -> None:
        """End the attempt as if it had failed of itself."""
        failure = self._failure(reason, message)
        self._after_failure(spec, failure, started=reading.started(current))
        self.ask.clear()
        if self.conditions.is_true("Failed"):
            self._clean_up()
        else:
            self._remove_old()
            self._set_state("Restarting")

    # --- what is observed ---------------------------------------------------------------------------------

    @property
    def _number(self) -> str:
        return str(self.status["attempt"])

    def _children(self, kind: str) -> Sequence[JsonObject]:
        return self.observed.children.get(kind, ())

    def _find(self, kind: str, attempt: str) -> JsonObject | None:
        return next((child for child in self._children(kind) if reading.attempt_of(child) == attempt), None)

    def _current(self) -> JsonObject | None:
        """Return the Job of the present attempt, unless it is being deleted before it ended."""
        return self._find("Job", str(self.status["attempt"]))

    def _pods(self, job: JsonObject) -> list[JsonObject]:
        uid = job["metadata"]["uid"]
        return [
            pod
            for pod in self._children("Pod")
            if any(owner.get("uid") == uid for owner in pod["metadata"].get("ownerReferences", ()))
        ]

    def _last_words(self, job: JsonObject) -> Termination | None:
        for pod in sorted(self._pods(job), key=reading.index):
            for state in pod.get("status", {}).get("containerStatuses", ()):
                text = ((state.get("state") or {}).get("terminated") or {}).get("message")
                if text and (told := Termination.read(text)):
                    return told
        return None

    def _is_late(self, spec: TrainSpec) -> bool:
        deadline = spec.run_policy.active_deadline_seconds
        start = seconds(self.status.get("startTime"))
        if deadline is None or start is None or spec.suspend:
            return False
        return self.observed.now - start >= deadline

    # --- what is said -------------------------------------------------------------------------------------

    def _say_what_holds(self, spec: TrainSpec) -> None:
        self.status["selector"] = rendering.selector(self.observed.resource["metadata"]["name"])
        self.conditions.set("Succeeded", "Unknown", "Active", "the job has not ended")
        for end in ("Complete", "Failed"):
            self.conditions.set(end, "False", "Active")
        if spec.scheduling.queue_name is None:
            self.conditions.drop("Admitted")

    def _say_who_starts_them(self, attempt: Attempt) -> None:
        """Say who sees to it that all pods start or none."""
        nodes = attempt.job.spec.parallelism.nodes
        if nodes == 1:
            self.conditions.drop("GangScheduled")
        elif attempt.gang == "None":
            text = without(nodes)
            self.conditions.set("GangScheduled", "False", "NotInstalled", text)
            self.events.append(Event("NoGangScheduling", text, "Warning"))
        else:
            self.conditions.set("GangScheduled", "True", attempt.gang, f"by {attempt.gang}")

    def _read_gang_back(self, current: JsonObject) -> None:
        """Say so where the API server has not kept that the pods belong together."""
        if self.conditions.reason("GangScheduled") != "Native" or reading.gang_is_kept(current):
            return
        self.conditions.set("GangScheduled", "False", "SchedulingGroupDropped", DROPPED)
        self.events.append(Event("SchedulingGroupDropped", DROPPED, "Warning"))

    def _set_state(self, state: str) -> None:
        self.status["state"] = state

    def _again_in(self, wait: float) -> None:
        wait = max(1.0, wait)
        self.wait = wait if self.wait is None else min(self.wait, wait)

    def _result(self) -> Decision:
        self.status["conditions"] = self.conditions.to_json()
        status = {key: value for key, value in self.status.items() if value is not None}
        return Decision(
            apply=tuple(self.apply),
            restore=tuple(self.restore),
            delete=tuple(self.delete),
            status=status,
            requeue_after=self.wait,
            events=tuple(self.events),
            ask=tuple(self.ask),
        )


def _needed(spec: TrainSpec, nodes: int) -> int:
    return spec.elastic.min_nodes if spec.elastic else nodes


def _address(pod: JsonObject) -> str:
    return str(pod.get("status", {}).get("podIP") or "")
