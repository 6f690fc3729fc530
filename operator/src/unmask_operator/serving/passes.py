"""One pass over a service: what is observed, the status as it will be, and what else is to be done."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from unmask_api.inference_service import DiffusionInferenceService
from unmask_operator.conditions import Conditions
from unmask_operator.decision import Decision, Deletion, Event, JsonObject, Observed
from unmask_operator.times import stamp

__all__ = ["Pass", "Settings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the operator was installed with."""

    image: str | None = None
    """Container image of services that name none."""


@dataclass(slots=True)
class Pass:
    """What one call of the decision function comes to."""

    observed: Observed
    service: DiffusionInferenceService
    status: JsonObject = field(init=False)
    """As it will be; ``conditions`` are in :attr:`conditions` until the end."""
    conditions: Conditions = field(init=False)
    apply: list[JsonObject] = field(default_factory=list)
    restore: list[JsonObject] = field(default_factory=list)
    delete: list[Deletion] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    wait: float | None = None

    def __post_init__(self) -> None:
        before = self.observed.resource.get("status") or {}
        generation = self.observed.resource["metadata"].get("generation", 0)
        self.status = dict(before) | {"observedGeneration": generation}
        self.conditions = Conditions(before.get("conditions", ()), generation=generation, now=stamp(self.now))

    @property
    def now(self) -> float:
        """Seconds since 1970."""
        return self.observed.now

    @property
    def replicas(self) -> int:
        """Groups that there should be."""
        return 0 if self.service.spec.stopped else self.service.spec.replicas

    def children(self, kind: str) -> Sequence[JsonObject]:
        """Return the service's objects of a kind."""
        return self.observed.children.get(kind, ())

    def find(self, kind: str, name: str) -> JsonObject | None:
        """Return the object of a kind and name."""
        return next((one for one in self.children(kind) if one["metadata"]["name"] == name), None)

    def remove(
        self, child: JsonObject, propagation: Literal["Foreground", "Background"] = "Background"
    ) -> None:
        """Delete an object of the service."""
        metadata = child["metadata"]
        self.delete.append(Deletion(child["kind"], metadata["name"], metadata["uid"], propagation))

    def tell(self, reason: str, note: str, kind: Literal["Normal", "Warning"] = "Normal") -> None:
        """Write an event."""
        self.events.append(Event(reason, note[:1024], kind))

    def obstacle(self, reason: str, message: str) -> None:
        """Say that nothing goes on before something changes; what runs goes on running."""
        self.conditions.set("Stalled", "True", reason, message)
        self.tell(reason, message, "Warning")

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
        )
