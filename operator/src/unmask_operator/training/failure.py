"""Why an attempt failed, and what follows.

The cause is what the pod says that failed first: when one process dies, the others follow within seconds, of
broken connections or of being told to end. What a pod says is, in this order: that the cluster took it away,
that it had no memory left, its own termination message, its exit code, and the reason of its phase.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from unmask_api.cluster import FailureRule
from unmask_api.exit_codes import ExitCode
from unmask_api.train_status import Failure
from unmask_operator.decision import JsonObject
from unmask_operator.launch.attempts import Next, after
from unmask_operator.launch.pods import CONTAINER
from unmask_operator.launch.report import Termination
from unmask_operator.times import seconds, stamp

__all__ = ["Action", "action", "cause"]

_DISRUPTED = "DisruptionTarget"
_UNCOUNTED = frozenset(
    {"Disrupted", "Evicted", "NodeLost", "Preempting", "Shutdown", "Terminated", "PodLost"}
)
_REASONS = {
    ExitCode.USAGE: "UsageError",
    ExitCode.DATA: "DataError",
    ExitCode.MODEL: "ModelError",
    ExitCode.HUNG: "Hung",
    ExitCode.DIVERGED: "Diverged",
    ExitCode.SAVED: "Saved",
}
_FOLLOWERS = frozenset({ExitCode.SAVED, ExitCode.HUNG, 128 + 15})
"""Exit codes of processes that end because another one did."""
_OUT_OF_MEMORY = "OutOfMemory"
_OUT_OF_MEMORY_REMEDY = (
    "; raise resources.limits.memory, or lower parallelism.microBatchRows or stages' length"
)
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9]{0,63}")


class Action(Enum):
    """What follows a failed attempt."""

    FAIL = "Fail"
    RESTART = "Restart"
    RESTART_UNCOUNTED = "RestartIgnoreLimit"


@dataclass(frozen=True, slots=True)
class _Ended:
    pod: JsonObject
    terminated: JsonObject
    at: float

    @property
    def exit_code(self) -> int | None:
        code = self.terminated.get("exitCode")
        return code if isinstance(code, int) else None

    @property
    def order(self) -> tuple[float, bool, int]:
        index = (
            self.pod["metadata"].get("annotations", {}).get("batch.kubernetes.io/job-completion-index", "0")
        )
        return self.at, self.exit_code in _FOLLOWERS, int(index) if str(index).isdigit() else 0


def cause(job: JsonObject, pods: Sequence[JsonObject], *, attempt: int, now: float) -> Failure:
    """Return why ``job``, a failed Kubernetes Job with ``pods``, did fail."""
    ended = [_ended(pod, now) for pod in pods if _has_failed(pod)]
    if not ended:
        return _without_pods(job, attempt=attempt, now=now)
    first = min(ended, key=lambda one: one.order)
    reason, message = _said(first)
    return Failure(
        reason=reason,
        message=message[:4096],
        exit_code=first.exit_code,
        pod=first.pod["metadata"]["name"],
        node=first.pod.get("spec", {}).get("nodeName"),
        attempt=attempt,
        time=stamp(first.at),
    )


def action(
    failure: Failure,
    rules: Sequence[FailureRule],
    *,
    restarts_counted: int,
    max_restarts: int,
    last_reason: str | None,
) -> tuple[Action, str]:
    """Return what follows ``failure``, and in words why the job ends, if it does.

    Args:
        failure: Of the attempt that failed.
        rules: Of the manifest; the first that matches decides.
        restarts_counted: So far.
        max_restarts: Of the manifest.
        last_reason: Why the attempt before failed, if it did.
    """
    for rule in rules:
        if _matches(rule, failure):
            return _limited(
                Action(rule.action),
                restarts_counted,
                max_restarts,
                f"failure rule {rule.name} says so",
            )
    if failure.reason in _UNCOUNTED:
        return Action.RESTART_UNCOUNTED, ""
    if failure.reason == _OUT_OF_MEMORY:
        again = last_reason == _OUT_OF_MEMORY
        return _limited(
            Action.FAIL if again else Action.RESTART,
            restarts_counted,
            max_restarts,
            "it ran out of memory twice in a row",
        )
    code = ExitCode.FAILURE if failure.exit_code in (None, 0) else failure.exit_code
    match after(code, restarts=0, max_restarts=1):
        case Next.RESUME:
            return Action.RESTART_UNCOUNTED, ""
        case Next.FAIL:
            return Action.FAIL, "another attempt cannot mend that"
    return _limited(Action.RESTART, restarts_counted, max_restarts, "")


def _limited(wanted: Action, counted: int, limit: int, why: str) -> tuple[Action, str]:
    if wanted is Action.RESTART and counted >= limit:
        return Action.FAIL, f"runPolicy.maxRestarts is {limit}"
    return wanted, why if wanted is Action.FAIL else ""


def _matches(rule: FailureRule, failure: Failure) -> bool:
    codes = rule.on_exit_codes
    if codes is not None:
        if failure.exit_code is None:
            return False
        if (failure.exit_code in codes.values) != (codes.operator == "In"):
            return False
    return not rule.on_reasons or failure.reason in rule.on_reasons


def _has_failed(pod: JsonObject) -> bool:
    status = pod.get("status", {})
    return status.get("phase") == "Failed" or bool(_terminated(pod))


def _terminated(pod: JsonObject) -> JsonObject:
    """Return the ``terminated`` state of the worker's container, else of any that failed; else nothing."""
    status = pod.get("status", {})
    states = [*status.get("containerStatuses", ()), *status.get("initContainerStatuses", ())]
    states.sort(key=lambda one: one.get("name") != CONTAINER)
    for state in states:
        terminated: JsonObject = state.get("state", {}).get("terminated") or {}
        if terminated.get("exitCode", 0) != 0:
            return terminated
    return {}


def _ended(pod: JsonObject, now: float) -> _Ended:
    terminated = _terminated(pod)
    at = seconds(terminated.get("finishedAt"))
    if at is None:
        disrupted = [one for one in _conditions(pod) if one.get("type") == _DISRUPTED]
        at = seconds(disrupted[0].get("lastTransitionTime")) if disrupted else None
    return _Ended(pod, terminated, now if at is None else at)


def _conditions(pod: JsonObject) -> Sequence[JsonObject]:
    found: Sequence[JsonObject] = pod.get("status", {}).get("conditions", ())
    return found


def _said(ended: _Ended) -> tuple[str, str]:
    """Return the reason and the message of a pod that failed."""
    name = ended.pod["metadata"]["name"]
    for one in _conditions(ended.pod):
        if one.get("type") == _DISRUPTED and one.get("status") == "True":
            return "Disrupted", f"the cluster took {name} away: {one.get('message') or one.get('reason')}"
    status = ended.pod.get("status", {})
    if not ended.terminated:
        reason = _word(status.get("reason")) or "PodFailed"
        return reason, f"{name}: {status.get('message') or 'failed without a word'}"
    word = _word(ended.terminated.get("reason"))
    if word == "OOMKilled":
        return _OUT_OF_MEMORY, f"{name} used more memory than its limit{_OUT_OF_MEMORY_REMEDY}"
    text = str(ended.terminated.get("message") or "")
    if (told := Termination.read(text)) is not None:
        reason = _word(told.reason) or "Failed"
        remedy = _OUT_OF_MEMORY_REMEDY if reason == _OUT_OF_MEMORY else ""
        return reason, (told.message or f"{name} ended with exit code {told.exit_code}") + remedy
    code = ended.exit_code
    if word in ("StartError", "ContainerCannotRun"):
        return "ContainerCannotStart", f"{name}: {_last_line(text) or 'its command cannot be run'}"
    if status.get("reason") and _word(status["reason"]) in _UNCOUNTED:
        return str(status["reason"]), f"{name}: {status.get('message') or status['reason']}"
    reason = _REASONS.get(ExitCode(code), "Failed") if code in set(ExitCode) else "Failed"
    if code is not None and code > 128:
        how = f"was ended by signal {code - 128}"
    else:
        how = f"ended with exit code {code}"
    last = _last_line(text)
    return reason, f"{name} {how}" + (f"; its last words: {last}" if last else "; see its log")


def _without_pods(job: JsonObject, *, attempt: int, now: float) -> Failure:
    """Return what the Job says where no pod is left that failed: it was deleted, with its node perhaps."""
    conditions = job.get("status", {}).get("conditions", ())
    failed: JsonObject = next((one for one in conditions if one.get("type") == "Failed"), {})
    return Failure(
        reason="PodLost",
        message=f"a pod of {job['metadata']['name']} is gone without a trace: "
        f"{failed.get('message') or 'deleted by hand, or with its machine'}",
        attempt=attempt,
        time=failed.get("lastTransitionTime") or stamp(now),
    )


def _word(value: object) -> str | None:
    return value if isinstance(value, str) and _WORD.fullmatch(value) else None


def _last_line(text: str) -> str:
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return lines[-1][:512] if lines else ""
