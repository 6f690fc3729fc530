"""How an attempt is watched whose pods run: what the trainer reports, and whether its step still grows."""

from collections.abc import Sequence

from unmask_api.train_job import TrainSpec
from unmask_operator import pods_seen
from unmask_operator.decision import JsonObject, Question
from unmask_operator.launch.report import Report, StackReport
from unmask_operator.times import seconds
from unmask_operator.training import reading
from unmask_operator.training.ending import give_up
from unmask_operator.training.passes import Pass
from unmask_operator.training.progress import checkpoint, progress

__all__ = ["watch"]

_DUMP_SECONDS = 10.0
"""From asking a hanging attempt's pods for their stacks to ending it."""
_DUMPS = 8
"""Pods that are asked, the first ones: each may take two seconds."""


def watch(turn: Pass, spec: TrainSpec, current: JsonObject, ready: Sequence[JsonObject]) -> None:
    """Ask the first of the pods how far it is, take over what it has answered, and end what hangs."""
    turn.conditions.set("Running", "True", "Running", "every pod runs")
    turn.conditions.set("Restarting", "False", "Running")
    turn.set_state("Running")
    first = min(ready, key=reading.index)
    if _address(first):
        turn.ask.append(_question(spec, first, "progress"))
    turn.again_in(spec.observability.progress_interval_seconds)
    answer = turn.observed.answers.get(first["metadata"]["uid"])
    report = Report.read(answer.text) if answer else None
    if answer and report and report.attempt == turn.status["attempt"]:
        _note(turn, report, answer.at)
    since = max((pods_seen.running_since(pod) or 0.0 for pod in ready), default=0.0)
    _judge(turn, spec, current, ready, since or turn.now)


def _note(turn: Pass, report: Report, at: float) -> None:
    """Take over what the trainer reports."""
    turn.status["progress"] = progress(report, turn.status.get("progress") or {}, at=at)
    if saved := checkpoint(report.checkpoint, turn.status.get("checkpoint") or {}, at=at):
        turn.status["checkpoint"] = saved


def _judge(
    turn: Pass, spec: TrainSpec, current: JsonObject, ready: Sequence[JsonObject], since: float
) -> None:
    """Restart an attempt whose step does not grow, if it reports at all; ask first where it is."""
    timeout = spec.run_policy.stall_timeout_seconds
    known = turn.status.get("progress") or {}
    reported = seconds(known.get("lastReportTime"))
    if not timeout or reported is None or reported < since:
        return  # nobody answered yet in this attempt: that may be the network, not the trainer
    moved = max(seconds(known.get("lastProgressTime")) or since, since)
    stands = reported - moved >= timeout
    silent = turn.now - reported >= 2 * timeout
    if not stands and not silent:
        turn.conditions.drop("Hung")
        return
    step = known["step"]
    what = f"the step stayed at {step} for {timeout} s" if stands else f"no report since step {step}"
    asked = turn.conditions.since("Hung")
    turn.conditions.set("Hung", "True", "StepStands" if stands else "Silent", what)
    left = (turn.now if asked is None else asked) + _DUMP_SECONDS - turn.now
    stacks = _stacks(turn, ready)
    if left > 0:
        turn.ask.clear()  # an answer about the progress would take the place of the stacks
        if not stacks:
            turn.ask += [_question(spec, pod, "stacks") for pod in ready if _address(pod)][:_DUMPS]
        turn.again_in(left)
        return
    where = f"; {'; '.join(stacks)}"[:1500] if stacks else ""
    text = (
        f"{what} (runPolicy.stallTimeoutSeconds is {timeout}): a hang, or a step, measurement or"
        f" checkpoint that takes longer{where}"
    )
    give_up(turn, spec, current, "Stalled", text)


def _stacks(turn: Pass, pods: Sequence[JsonObject]) -> list[str]:
    """Return what processes of an attempt that hangs were doing, as far as they have said."""
    answers = [turn.observed.answers.get(pod["metadata"]["uid"]) for pod in pods]
    reports = [StackReport.read(answer.text) for answer in answers if answer]
    number = turn.status["attempt"]
    return [line for report in reports if report and report.attempt == number for line in report.stacks]


def _question(spec: TrainSpec, pod: JsonObject, what: str) -> Question:
    address = f"http://{pods_seen.host(_address(pod))}:{spec.observability.port}"
    return Question(pod["metadata"]["uid"], f"{address}/{what}")


def _address(pod: JsonObject) -> str:
    return str(pod.get("status", {}).get("podIP") or "")
