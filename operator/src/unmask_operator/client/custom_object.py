"""A custom resource as people see it, whichever kind: what the API server keeps of it, typed."""

import datetime
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, TypeVar

from pydantic import ValidationError

from unmask_api.base import ApiModel
from unmask_api.metadata import Condition
from unmask_operator.client.errors import ClusterError
from unmask_operator.decision import JsonObject

__all__ = ["CANCELLED", "CustomObject"]

CANCELLED = "unmask.dev/cancelled"
"""Annotation of what somebody cancelled; it tells this from a pause."""

Model = TypeVar("Model", bound=ApiModel)


@dataclass(frozen=True, slots=True)
class CustomObject(ABC):
    """A custom resource on a cluster, as it was when it was read."""

    raw: JsonObject
    """The whole object, as the API server keeps it."""

    noun: ClassVar[str]
    """What people call the kind."""
    halt: ClassVar[str]
    """Field of the spec that is true while it is to stand still."""

    @property
    def name(self) -> str:
        """Its name."""
        return str(self.raw["metadata"]["name"])

    @property
    def namespace(self) -> str:
        """Its namespace."""
        return str(self.raw["metadata"].get("namespace", "default"))

    @property
    def uid(self) -> str:
        """Its identity: a later one of the same name has another."""
        return str(self.raw["metadata"].get("uid", ""))

    @property
    def created(self) -> datetime.datetime | None:
        """When it was submitted; ``None`` of one that was not."""
        stamp = self.raw["metadata"].get("creationTimestamp")
        return datetime.datetime.fromisoformat(stamp) if stamp else None

    @property
    @abstractmethod
    def state(self) -> StrEnum:
        """Where it stands, in a word."""

    @property
    @abstractmethod
    def settled(self) -> bool:
        """Whether nothing more happens unless somebody does something."""

    @property
    @abstractmethod
    def conditions(self) -> tuple[Condition, ...]:
        """What its status says, fact by fact."""

    @property
    def deleting(self) -> bool:
        """Whether it is on its way out."""
        return bool(self.raw["metadata"].get("deletionTimestamp"))

    @property
    def cancelled(self) -> bool:
        """Whether somebody cancelled it, even if its pods have not ended yet."""
        annotations = self.raw["metadata"].get("annotations") or {}
        return bool(self.raw["spec"].get(self.halt)) and annotations.get(CANCELLED) == "true"

    def condition(self, kind: str) -> Condition | None:
        """Return a condition of the status, if it is set."""
        return next((one for one in self.conditions if one.type == kind), None)

    def to_json_dict(self) -> dict[str, Any]:
        """Return the object for programs: without what only the API server needs."""
        metadata = {key: value for key, value in self.raw["metadata"].items() if key != "managedFields"}
        return {**self.raw, "metadata": metadata}

    def _manifest(self, model: type[Model]) -> Model:
        """Return the manifest, with all defaults.

        Raises:
            ClusterError: It has fields that this version does not know.
        """
        kept = {key: self.raw[key] for key in ("apiVersion", "kind", "spec")}
        try:
            return model.model_validate(kept | {"metadata": {"name": self.name}}, by_alias=True, strict=False)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ClusterError(
                f"{self.noun} {self.name} has what this version of unmask does not know: {where}:"
                f" {first['msg']}; install the version that the cluster has"
            ) from None

    def _status(self, model: type[Model]) -> Model:
        """Return what the operator says; what a newer one says beyond that is left out."""
        try:
            return model.model_validate(
                _known(model, self.raw.get("status") or {}), by_alias=True, strict=False
            )
        except ValidationError:
            return model()


def _known(model: type[ApiModel], value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ``value`` that ``model`` has, in it and below."""
    names = {field.alias or name: field.annotation for name, field in model.model_fields.items()}
    return {key: _known_below(names[key], below) for key, below in value.items() if key in names}


def _known_below(annotation: Any, value: Any) -> Any:
    models = [one for one in (annotation, *getattr(annotation, "__args__", ())) if _is_model(one)]
    if models and isinstance(value, Mapping):
        return _known(models[0], value)
    if models and isinstance(value, list):
        return [_known(models[0], one) if isinstance(one, Mapping) else one for one in value]
    return value


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, ApiModel)
