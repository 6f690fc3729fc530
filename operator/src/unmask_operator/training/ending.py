"""How attempts end, and what follows: the job is complete or fails, or there is a next attempt."""

from unmask_api.train_job import TrainSpec
from unmask_api.train_status import Failure
from unmask_operator.decision import Deletion, Event, JsonObject
from unmask_operator.launch.report import CheckpointReport, Termination
from unmask_operator.times import seconds, stamp
from unmask_operator.training import reading
from unmask_operator.training.failure import Action, action, cause
from unmask_operator.training.passes import Pass
from unmask_operator.training.progress import checkpoint, percentage

__all__ = ["clean_up", "end", "fail", "fail_if_late", "give_up", "next_attempt", "remember"]

_LONGEST_BACKOFF = 600
_HISTORY = 10
_SHORT = 60.0
"""Seconds; an attempt that lasted no longer is followed by a pause, whatever ended it."""


def end(turn: Pass, spec: TrainSpec, current: JsonObject, *, succeeded: bool) -> None:
    """Draw the conclusion from a Job that is complete, or that failed."""
    if not succeeded:
        failure = cause(current, turn.pods(current), attempt=turn.status["attempt"], now=turn.now)
        _after_failure(turn, spec, failure, started=reading.started(current))
        return
    told = _last_words(turn, current)
    _finish(turn, "Complete", "Completed", told.message if told else "all stages are trained")
    if progress := turn.status.get("progress"):
        step = told.step if told and told.step else progress["totalSteps"]
        turn.status["progress"] = progress | {
            "step": step,
            "stage": spec.stages[-1].name,  # the last report may be of an earlier one
            "percentage": percentage(step, progress["totalSteps"]),
            "estimatedRemainingSeconds": 0,
        }
    if told and told.checkpoint:  # which is of the last step, as all of them are done
        last = CheckpointReport(step=told.step, uri=told.checkpoint)
        turn.status["checkpoint"] = checkpoint(last, turn.status.get("checkpoint") or {}, at=turn.now)
    remember(turn, "Completed")
    turn.events.append(Event("Completed", "all stages are trained"))


def give_up(turn: Pass, spec: TrainSpec, current: JsonObject, reason: str, message: str) -> None:
    """End the attempt as if it had failed of itself."""
    failure = turn.failure(reason, message)
    _after_failure(turn, spec, failure, started=reading.started(current))
    turn.ask.clear()
    if turn.conditions.is_true("Failed"):
        clean_up(turn)
    else:
        turn.remove_old()
        turn.set_state("Restarting")


def fail_if_late(turn: Pass, spec: TrainSpec) -> bool:
    """Fail a job whose time is over; return whether it was."""
    deadline = spec.run_policy.active_deadline_seconds
    start = seconds(turn.status.get("startTime"))
    if deadline is None or start is None or spec.suspend or turn.now - start < deadline:
        return False
    text = f"the job did not end within runPolicy.activeDeadlineSeconds ({deadline} s)"
    remedy = "raise activeDeadlineSeconds in a new job, which goes on from the last checkpoint"
    fail(turn, turn.failure("DeadlineExceeded", text), remedy)
    return True


def fail(turn: Pass, failure: Failure, why: str) -> None:
    """End the job; ``why``: there is no other attempt, or what to do."""
    turn.status["failure"] = failure.to_json_dict()
    message = f"{failure.message} ({why})" if why else failure.message
    _finish(turn, "Failed", failure.reason, message)
    remember(turn, failure.reason)
    turn.events.append(Event("Failed", f"{failure.reason}: {message}"[:1024], "Warning"))


def next_attempt(turn: Pass, *, counted: bool, pause: int) -> None:
    """Decide that there is another attempt, ``pause`` seconds from now at the earliest."""
    turn.status["attempt"] += 1
    turn.status["restarts"] += 1
    turn.status["restartsCounted"] += counted
    for one in ("Hung", "Admitted"):  # of the attempt that ends
        turn.conditions.drop(one)
    turn.status.pop("nextAttemptTime", None)
    if pause:
        turn.status["nextAttemptTime"] = stamp(turn.now + pause)


def remember(turn: Pass, reason: str) -> None:
    """Add the attempt that ended to the history."""
    current = turn.current()
    started = reading.started(current) if current else None
    step = (turn.status.get("progress") or {}).get("step")
    history = list(turn.status.get("history") or ())
    entry = {
        "attempt": turn.status["attempt"],
        "startTime": stamp(started) if started is not None else None,
        "endTime": stamp(turn.now),
        "reason": reason,
        "fromStep": history[-1].get("toStep", 0) if history else 0,
        "toStep": step,
    }
    history.append({key: value for key, value in entry.items() if value is not None})
    turn.status["history"] = history[-_HISTORY:]


def clean_up(turn: Pass) -> None:
    """Delete what a finished job has left to run, and the job when its time is over; make nothing, ever."""
    policy = turn.observed.resource["spec"].get("runPolicy", {})
    cleanup = policy.get("podCleanup", "Running")
    for child in turn.children("Job"):
        if cleanup == "All" or (cleanup == "Running" and not reading.finished(child)):
            turn.remove(child)
    ttl = policy.get("ttlSecondsAfterFinished")
    ended = seconds(turn.status.get("completionTime"))
    if ttl is None or ended is None:
        return
    left = ended + ttl - turn.now
    if left > 0:
        turn.again_in(left)
        return
    kind = turn.observed.resource["kind"]
    turn.delete.append(Deletion(kind, turn.metadata["name"], turn.metadata["uid"], "Background"))


def _after_failure(turn: Pass, spec: TrainSpec, failure: Failure, *, started: float | None) -> None:
    """Fail the job, or decide on the next attempt."""
    policy = spec.run_policy
    history = turn.status.get("history") or [{}]
    follows, why = action(
        failure,
        policy.failure_rules,
        restarts_counted=turn.status["restartsCounted"],
        max_restarts=policy.max_restarts,
        last_reason=history[-1].get("reason"),
    )
    turn.status["failure"] = failure.to_json_dict()
    if follows is Action.FAIL:
        fail(turn, failure, why)
        return
    remember(turn, failure.reason)
    counted = follows is Action.RESTART
    lasted = turn.now - started if started is not None else 0.0
    if lasted >= policy.reset_after_seconds:
        turn.status["backoff"] = 0
    pause = 0 if lasted >= _SHORT else policy.restart_backoff_seconds
    if counted:
        exponent = min(turn.status["backoff"], 16)
        pause = min(policy.restart_backoff_seconds * 2**exponent, _LONGEST_BACKOFF)
        turn.status["backoff"] += 1
    next_attempt(turn, counted=counted, pause=pause)
    turn.conditions.set("Running", "False", "Restarting", failure.message)
    turn.conditions.set("Restarting", "True", failure.reason, failure.message)
    limit = "not counted" if not counted else f"at most {policy.max_restarts}"
    text = f"{failure.reason}: {failure.message}"[:980] + f" ({limit})"
    turn.events.append(Event("Restarting", text, "Warning"))


def _finish(turn: Pass, kind: str, reason: str, message: str) -> None:
    done = kind == "Complete"
    turn.conditions.set("Complete", "True" if done else "False", reason, message)
    turn.conditions.set("Failed", "False" if done else "True", reason, message)
    turn.conditions.set("Succeeded", "True" if done else "False", reason, message)
    turn.conditions.set("Running", "False", reason)
    for active in ("Restarting", "Stalled"):
        turn.conditions.set(active, "False", reason)
    turn.status["completionTime"] = stamp(turn.now)
    turn.status.pop("nextAttemptTime", None)
    turn.set_state("Succeeded" if done else "Failed")


def _last_words(turn: Pass, job: JsonObject) -> Termination | None:
    for pod in sorted(turn.pods(job), key=reading.index):
        for state in pod.get("status", {}).get("containerStatuses", ()):
            text = ((state.get("state") or {}).get("terminated") or {}).get("message")
            if text and (told := Termination.read(text)):
                return told
    return None
