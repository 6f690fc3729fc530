"""The model that groups are to be made with: what the manifest names, or what a job has trained."""

from dataclasses import dataclass
from typing import Literal

from pydantic import ValidationError

from unmask_api.inference_service import ServedJob, ServedModel
from unmask_api.inference_status import ModelStatus
from unmask_operator.decision import JsonObject
from unmask_operator.job_models import look_up

__all__ = ["Resolved", "resolve"]


@dataclass(frozen=True, slots=True)
class Resolved:
    """The model, as far as it is known."""

    model: ModelStatus | None
    """What to make groups with; ``None``, there is nothing yet."""
    reason: Literal["Given", "Found", "WaitingForJob", "JobMissing", "NotComing"]
    """How that came."""
    message: str
    """The same for people."""

    @property
    def ready(self) -> bool:
        """Whether this is what the manifest asks for."""
        return self.reason in ("Given", "Found")


def resolve(source: ServedModel, job: JsonObject | None, before: JsonObject | None) -> Resolved:
    """Return the model.

    A model that a job has made once is served on, whatever becomes of the job: it may fail in another try, be
    deleted, and be made anew, which is another model when that one is complete.

    Args:
        source: what the manifest says.
        job: the job that it names, if it is there.
        before: ``status.model``, what was found earlier.
    """
    if source.job is None:
        assert source.uri is not None, "exactly one of the two, by the rules"
        return Resolved(ModelStatus(uri=source.uri, revision=source.revision), "Given", source.uri)
    origin = _origin(source.job)
    known = _known(before)
    serving = known if known is not None and known.job == origin else None
    found = look_up(source.job, job)
    if found.state == "Ready":
        assert job is not None
        progress = (job.get("status") or {}).get("progress") or {}
        fresh = ModelStatus(
            uri=found.text, job=origin, revision=job["metadata"]["uid"], loss=progress.get("loss")
        )
        if serving is None or _takes_over(source.job, serving, fresh):
            return Resolved(fresh, "Found", f"{origin}: {fresh.uri}")
    if serving is not None:
        return Resolved(serving, "Found", f"{origin}: {serving.uri}")
    reasons: dict[str, Literal["WaitingForJob", "JobMissing", "NotComing"]] = {
        "Waiting": "WaitingForJob",
        "Missing": "JobMissing",
        "Never": "NotComing",
    }
    # Another job's model goes on being served meanwhile.
    return Resolved(known, reasons[found.state], found.text)


def _takes_over(source: ServedJob, serving: ModelStatus, fresh: ModelStatus) -> bool:
    """Whether a model that was trained after the one being served takes its place."""
    if fresh.revision == serving.revision or source.update == "Never":
        return False
    if source.update == "WhenComplete":
        return True
    if fresh.loss is None or serving.loss is None:
        return False  # nothing says that it is better
    return float(fresh.loss) < float(serving.loss)


def _origin(source: ServedJob) -> str:
    return f"{source.name}, stage {source.export}" if source.export else source.name


def _known(before: JsonObject | None) -> ModelStatus | None:
    try:
        return ModelStatus.model_validate(before, by_alias=True, strict=False) if before else None
    except ValidationError:
        return None
