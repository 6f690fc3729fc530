"""The model that a training job has made, for another resource: where it lies, or why it is not there."""

from dataclasses import dataclass
from typing import Any, Literal

from unmask_api.inference_service import ServedJob
from unmask_api.train_job import JobModel
from unmask_operator.decision import JsonObject

__all__ = ["Found", "look_up"]


@dataclass(frozen=True, slots=True)
class Found:
    """What is known of the other job's model."""

    state: Literal["Ready", "Waiting", "Missing", "Never"]
    """There; to come; the job does not exist (yet); will not come."""
    text: str
    """The URI where it is ready, else a sentence for people."""


def look_up(source: JobModel | ServedJob, other: JsonObject | None) -> Found:
    """Return what there is of ``source``, ``other`` being the job of that name, if there is one."""
    if other is None:
        return Found("Missing", f"there is no DiffusionTrainJob {source.name} in this namespace: make it")
    spec: JsonObject = other["spec"]
    if source.export is not None:
        exported = [stage["name"] for stage in spec["stages"] if _exports(stage)]
        if source.export not in exported:
            has = f"it exports {', '.join(exported)}" if exported else "it exports none"
            return Found("Never", f"job {source.name} exports no stage {source.export}: {has}")
    conditions = {one["type"]: one for one in (other.get("status") or {}).get("conditions", ())}
    if conditions.get("Failed", {}).get("status") == "True":
        why = conditions["Failed"].get("message") or conditions["Failed"].get("reason")
        return Found("Never", f"job {source.name}, whose model is needed here, failed: {why}"[:2048])
    if conditions.get("Complete", {}).get("status") != "True":
        state = (other.get("status") or {}).get("state") or "New"
        return Found("Waiting", f"waiting for the model of job {source.name}, which is {state}")
    folder = str(spec["checkpoint"]["uri"]).rstrip("/")
    return Found("Ready", f"{folder}/exports/{source.export}" if source.export else f"{folder}/model")


def _exports(stage: dict[str, Any]) -> bool:
    return bool(stage.get("export")) or "merge" in stage
