"""How an attempt is followed whose Job is there: quota, places, and pods that start, one after the other."""

from collections.abc import Sequence

from unmask_api.train_job import DiffusionTrainJob, TrainSpec
from unmask_operator import pods_seen
from unmask_operator.decision import Event, JsonObject
from unmask_operator.times import seconds, stamp
from unmask_operator.training import reading
from unmask_operator.training.ending import give_up, next_attempt, remember
from unmask_operator.training.gang import DROPPED
from unmask_operator.training.passes import Pass
from unmask_operator.training.starting import objects_of, service_of
from unmask_operator.training.watching import watch

__all__ = ["follow"]


def follow(turn: Pass, job: DiffusionTrainJob, current: JsonObject) -> None:
    """Say how far the present attempt is, whose Job ``current`` has not ended; repair it, or end it."""
    spec = job.spec
    if "deletionTimestamp" in current["metadata"]:
        turn.conditions.set("Running", "False", "Deleted", "somebody deleted the Job; it is made again")
        turn.set_state("Restarting")
        return
    _repair(turn, job, current)
    if _resized(turn, spec, current):
        return
    if current["spec"].get("suspend"):
        _wait_for_quota(turn, spec, current)
        return
    if spec.scheduling.queue_name:
        turn.conditions.set("Admitted", "True", "Admitted", "the queue has room")
    turn.status.setdefault("startTime", stamp(reading.started(current) or turn.now))
    _read_gang_back(turn, current)
    pods = turn.pods(current)
    nodes = current["spec"].get("parallelism", 1)
    ready = [pod for pod in pods if pods_seen.is_ready(pod)]
    failed = [pod for pod in pods if pod.get("status", {}).get("phase") == "Failed"]
    turn.status["nodes"] = {"desired": nodes, "ready": len(ready), "failed": len(failed)}
    turn.conditions.set("Stalled", "False", "Following")
    if deadline := spec.run_policy.active_deadline_seconds:
        start = seconds(turn.status["startTime"]) or turn.now
        turn.again_in(start + deadline - turn.now)
    waits_for = _place(turn, spec, current, pods, nodes)
    if len(ready) >= _needed(spec, nodes):
        watch(turn, spec, current, ready)
    elif failed:
        names = ", ".join(sorted(pod["metadata"]["name"] for pod in failed))
        turn.conditions.set("Running", "False", "Ending", f"{names} failed; waiting for the others to end")
    else:
        _starts(turn, spec, current, pods, waits_for)


def _repair(turn: Pass, job: DiffusionTrainJob, current: JsonObject) -> None:
    """Make again what was deleted or changed beside a Job that runs."""
    needed = ["ConfigMap", "Service"]
    if "PodGroup" in turn.observed.children and reading.gang_is_kept(current):
        needed.append("PodGroup")
    missing = [kind for kind in needed if turn.find(kind, turn.number) is None]
    turn.apply += objects_of(turn, job, missing)
    turn.restore.append(service_of(turn, job))


def _resized(turn: Pass, spec: TrainSpec, current: JsonObject) -> bool:
    """Give an elastic Job the nodes that the manifest says now; return whether that takes a new attempt."""
    nodes = spec.parallelism.nodes
    if spec.elastic is None or current["spec"].get("parallelism") == nodes:
        return False
    if spec.scheduling.queue_name and not current["spec"].get("suspend"):
        # a queue has admitted so many pods: ask it anew, from the last checkpoint
        remember(turn, "Resized")
        next_attempt(turn, counted=False, pause=0)
        turn.conditions.set("Restarting", "True", "Resized", f"the queue is asked for {nodes} nodes")
        turn.remove_old()
        turn.set_state("Restarting")
        return True
    kept = ("apiVersion", "kind")
    # With `suspend` as it is: what admission sets as a Job is made counts as ours, and left out it would go.
    body = {key: value for key, value in current["spec"].items() if key != "selector"}
    labels = current["metadata"].get("labels", {})
    resized = {key: current[key] for key in kept} | {
        "metadata": {"name": current["metadata"]["name"], "labels": labels},
        "spec": body | {"parallelism": nodes, "completions": nodes},
    }
    turn.apply.append(resized)
    turn.events.append(Event("Resizing", f"to {nodes} nodes"))
    return False


def _wait_for_quota(turn: Pass, spec: TrainSpec, current: JsonObject) -> None:
    """Somebody suspended the Job, and not we: a queue has not admitted it yet, or took its place away."""
    evicted = turn.conditions.is_true("Admitted") or turn.conditions.reason("Admitted") == "Evicted"
    reason = "Evicted" if evicted else "WaitingForQuota"
    queue = spec.scheduling.queue_name
    where = f"queue {queue}" if queue else "whoever set suspend on the Job"
    turn.conditions.set("Admitted", "False", reason, f"waiting for {where}")
    turn.conditions.set("Running", "False", reason, f"waiting for {where}")
    turn.status.pop("startTime", None)
    turn.status["nodes"] = {"desired": current["spec"].get("parallelism", 1), "ready": 0, "failed": 0}
    turn.set_state("Queued")


def _read_gang_back(turn: Pass, current: JsonObject) -> None:
    """Say so where the API server has not kept that the pods belong together."""
    if turn.conditions.reason("GangScheduled") != "Native" or reading.gang_is_kept(current):
        return
    turn.conditions.set("GangScheduled", "False", "SchedulingGroupDropped", DROPPED)
    turn.events.append(Event("SchedulingGroupDropped", DROPPED, "Warning"))


def _place(turn: Pass, spec: TrainSpec, current: JsonObject, pods: Sequence[JsonObject], nodes: int) -> str:
    """Say whether all pods have a machine; return what stands in the way, or nothing."""
    groups = [one for one in turn.children("PodGroup") if reading.attempt_of(one) == turn.number]
    if text := pods_seen.unplaced(pods, groups):
        turn.conditions.set("Scheduled", "False", "Unschedulable", text)
        return text
    placed = [pod for pod in pods if pod.get("spec", {}).get("nodeName")]
    if len(placed) >= _needed(spec, nodes):
        turn.conditions.set("Scheduled", "True", "Scheduled", "every pod has a machine")
        return ""
    name = current["metadata"]["name"]
    reason, text = "Pending", f"{len(pods)} of {nodes} pods exist"
    if len(pods) < nodes:
        word, said = pods_seen.refused_pods(current, turn.children("JobWarning"))
        reason = word or reason
        text = said or f"{text}; if that stays so, see: kubectl describe job {name}"
    turn.conditions.set("Scheduled", "False", reason, text)
    return text


def _starts(
    turn: Pass, spec: TrainSpec, current: JsonObject, pods: Sequence[JsonObject], waits_for: str
) -> None:
    """Wait for the pods to run, but not for ever."""
    reason, text = pods_seen.cannot_start(pods, turn.children("PodWarning"))
    obstacle = text or waits_for or "the pods are starting"
    turn.conditions.set("Running", "False", reason or "Starting", obstacle)
    turn.set_state("Starting")
    waited = turn.now - (reading.started(current) or turn.now)
    timeout = spec.scheduling.gang.timeout_seconds
    if waits_for and waited >= timeout:
        turn.events.append(Event("Unschedulable", waits_for[:1024], "Warning"))
    elif waits_for:
        turn.again_in(timeout - waited)
    deadline = spec.run_policy.startup_deadline_seconds
    if not deadline:
        return
    if waited < deadline:
        turn.again_in(deadline - waited)
        return
    text = f"not all pods ran within runPolicy.startupDeadlineSeconds ({deadline} s): {obstacle}"
    give_up(turn, spec, current, "StartupDeadlineExceeded", text)


def _needed(spec: TrainSpec, nodes: int) -> int:
    return spec.elastic.min_nodes if spec.elastic else nodes
