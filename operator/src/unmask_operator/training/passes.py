"""One pass over a job: what is observed, the status as it will be, and what else is to be done.

The modules beside this one hold the rules; each adds to a :class:`Pass` what it has to say.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from unmask_api.train_status import Failure
from unmask_operator import pods_seen
from unmask_operator.conditions import Conditions
from unmask_operator.decision import Decision, Deletion, Event, JsonObject, Observed, Question
from unmask_operator.times import stamp
from unmask_operator.training import reading

__all__ = ["Pass", "Settings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the operator was installed with."""

    image: str | None = None
    """Container image of jobs that name none."""


@dataclass(slots=True)
class Pass:
    """What one call of the decision function comes to."""

    observed: Observed
    settings: Settings
    status: JsonObject = field(init=False)
    """As it will be; ``conditions`` are in :attr:`conditions` until the end."""
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
        self.conditions = Conditions(before.get("conditions", ()), generation=generation, now=stamp(self.now))

    # --- what is observed ---------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        """Seconds since 1970."""
        return self.observed.now

    @property
    def metadata(self) -> JsonObject:
        """Metadata of the job."""
        found: JsonObject = self.observed.resource["metadata"]
        return found

    @property
    def number(self) -> str:
        """The present attempt, as its objects' label has it."""
        return str(self.status["attempt"])

    @property
    def has_ended(self) -> bool:
        """Whether the job is complete or has failed."""
        return self.conditions.is_true("Complete") or self.conditions.is_true("Failed")

    def children(self, kind: str) -> Sequence[JsonObject]:
        """Return the job's objects of a kind."""
        return self.observed.children.get(kind, ())

    def find(self, kind: str, attempt: str) -> JsonObject | None:
        """Return the object of a kind that belongs to an attempt."""
        return next((child for child in self.children(kind) if reading.attempt_of(child) == attempt), None)

    def current(self) -> JsonObject | None:
        """Return the Job of the present attempt."""
        return self.find("Job", self.number)

    def pods(self, job: JsonObject) -> list[JsonObject]:
        """Return the pods that a Job owns."""
        uid = job["metadata"]["uid"]
        return [
            pod
            for pod in self.children("Pod")
            if any(owner.get("uid") == uid for owner in pod["metadata"].get("ownerReferences", ()))
        ]

    # --- what is said and done ----------------------------------------------------------------------------

    def set_state(self, state: str) -> None:
        """Say in a word how the job is."""
        self.status["state"] = state

    def obstacle(self, reason: str, message: str) -> None:
        """Say that nothing goes on before something changes; what runs goes on running."""
        self.conditions.set("Stalled", "True", reason, message)
        self.set_state("Stalled")
        self.events.append(Event(reason, message[:1024], "Warning"))

    def failure(self, reason: str, message: str) -> Failure:
        """Return a failure of the present attempt that no pod has told of."""
        return Failure(reason=reason, message=message, attempt=self.status["attempt"], time=stamp(self.now))

    def remove(self, child: JsonObject, propagation: Any = "Foreground") -> None:
        """Delete an object of the job."""
        metadata = child["metadata"]
        self.delete.append(Deletion(child["kind"], metadata["name"], metadata["uid"], propagation))

    def remove_old(self) -> bool:
        """Delete Jobs of other attempts; return whether any is left, if only ending."""
        old = [child for child in self.children("Job") if reading.attempt_of(child) != self.number]
        for child in old:
            self.remove(child)
        pods = [
            pod
            for pod in self.children("Pod")
            if reading.attempt_of(pod) != self.number and pods_seen.is_running(pod)
        ]
        if not old and not pods:  # their addresses and job files are of no use any more
            for kind in ("Service", "ConfigMap", "PodGroup"):
                for child in self.children(kind):
                    if reading.attempt_of(child) != self.number:
                        self.remove(child, "Background")
        return bool(old or pods)

    def again_in(self, wait: float) -> None:
        """Have another pass in ``wait`` seconds at the latest."""
        wait = max(1.0, wait)
        self.wait = wait if self.wait is None else min(self.wait, wait)

    def result(self) -> Decision:
        """Return all of it."""
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
