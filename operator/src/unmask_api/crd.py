"""CustomResourceDefinitions, made from the models.

pydantic writes JSON Schema; Kubernetes takes a *structural* subset of OpenAPI v3. The differences are
bridged here and nowhere else: references are inlined, an optional field is one that may be absent
(never null), constants are one-element enums, and unknown fields are pruned or refused by the server
itself instead of by ``additionalProperties: false``.
"""

from dataclasses import dataclass
from typing import Any

from unmask_api.base import GROUP, ApiModel
from unmask_api.inference_service import DiffusionInferenceService
from unmask_api.train_job import DiffusionTrainJob

__all__ = ["RESOURCES", "Column", "Resource", "definition", "schema"]

Json = dict[str, Any]
_DROPPED = {"title", "additionalProperties"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of ``kubectl get``; those of priority 1 show with ``-o wide``."""

    name: str
    path: str
    type: str = "string"
    priority: int = 0

    def to_json(self) -> Json:
        """Return the column as it stands in a CRD."""
        entry: Json = {"name": self.name, "type": self.type, "jsonPath": self.path}
        return entry | ({"priority": self.priority} if self.priority else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """A custom resource: its model, and the names it goes by."""

    model: type[ApiModel]
    plural: str
    short_name: str
    version: str = "v1alpha1"
    columns: tuple[Column, ...] = ()
    scale: Json | None = None
    """The scale subresource, for ``kubectl scale`` and autoscalers."""

    @property
    def kind(self) -> str:
        """Kind of the resource, the name of its model."""
        return self.model.__name__

    @property
    def full_name(self) -> str:
        """Name of the CRD object, such as ``diffusiontrainjobs.unmask.dev``."""
        return f"{self.plural}.{GROUP}"


RESOURCES = (
    Resource(
        model=DiffusionTrainJob,
        plural="diffusiontrainjobs",
        short_name="dtj",
        scale={
            "specReplicasPath": ".spec.parallelism.nodes",
            "statusReplicasPath": ".status.nodes.desired",
            "labelSelectorPath": ".status.selector",
        },
        columns=(
            Column(name="State", path=".status.state"),
            Column(name="Stage", path=".status.progress.stage"),
            Column(name="Step", path=".status.progress.step", type="integer"),
            Column(name="Loss", path=".status.progress.loss"),
            Column(name="Left", path=".status.progress.estimatedRemainingSeconds", type="integer"),
            Column(name="Restarts", path=".status.restarts", type="integer"),
            Column(name="Age", path=".metadata.creationTimestamp", type="date"),
            Column(name="Nodes", path=".spec.parallelism.nodes", type="integer", priority=1),
            Column(name="Checkpoint", path=".status.checkpoint.latestStep", type="integer", priority=1),
            Column(name="Reason", path=".status.failure.reason", priority=1),
        ),
    ),
    Resource(
        model=DiffusionInferenceService,
        plural="diffusioninferenceservices",
        short_name="dis",
        scale={
            "specReplicasPath": ".spec.replicas",
            "statusReplicasPath": ".status.replicas",
            "labelSelectorPath": ".status.selector",
        },
        columns=(
            Column(name="State", path=".status.state"),
            Column(name="Groups", path=".spec.replicas", type="integer"),
            Column(name="Available", path=".status.availableReplicas", type="integer"),
            Column(name="Updated", path=".status.updatedReplicas", type="integer"),
            Column(name="Age", path=".metadata.creationTimestamp", type="date"),
            Column(name="Shards", path=".spec.group.shards", type="integer", priority=1),
            Column(name="Revision", path=".status.updateRevision", priority=1),
            Column(name="Model", path=".status.model.uri", priority=1),
            Column(name="Endpoint", path=".status.endpoint", priority=1),
        ),
    ),
)
"""Every custom resource of the project."""


def schema(model: type[ApiModel]) -> Json:
    """Return the structural schema of ``model``, with descriptions, defaults and CEL rules in place."""
    document = model.model_json_schema(by_alias=True)
    return _structural(document, document.get("$defs", {}))


def definition(resource: Resource) -> Json:
    """Return the CustomResourceDefinition object of ``resource``."""
    version = {
        "name": resource.version,
        "served": True,
        "storage": True,
        "subresources": {"status": {}} | ({"scale": resource.scale} if resource.scale else {}),
        "additionalPrinterColumns": [column.to_json() for column in resource.columns],
        "schema": {"openAPIV3Schema": _root(schema(resource.model))},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": resource.full_name},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": resource.kind,
                "listKind": f"{resource.kind}List",
                "plural": resource.plural,
                "singular": resource.kind.lower(),
                "shortNames": [resource.short_name],
                "categories": ["unmask"],
            },
            "versions": [version],
        },
    }


def _root(node: Json) -> Json:
    """Leave to the server what is its own at the root: versions, and metadata but for the name."""
    properties = dict(node["properties"])
    for key in ("apiVersion", "kind"):
        properties[key] = {"type": "string", "description": properties[key]["description"]}
    name = properties["metadata"]["properties"]["name"]
    properties["metadata"] = {"type": "object", "properties": {"name": name}}
    return node | {"properties": properties}


def _structural(node: Json, definitions: Json) -> Json:
    node = _inlined(node, definitions)
    if "const" in node:
        node["enum"] = [node.pop("const")]
    if "description" in node:
        node["description"] = " ".join(node["description"].replace("``", "`").split())
    if "properties" in node:
        node["properties"] = {
            key: _structural(child, definitions) for key, child in node["properties"].items()
        }
    if "items" in node:
        node["items"] = _structural(node["items"], definitions)
    if isinstance(values := node.get("additionalProperties"), dict):
        return _kept(node) | {"additionalProperties": _structural(values, definitions)}
    return _kept(node)


def _kept(node: Json) -> Json:
    return {key: value for key, value in node.items() if key not in _DROPPED}


def _inlined(node: Json, definitions: Json) -> Json:
    """Return ``node`` with its reference resolved and its null alternative taken away."""
    node = dict(node)
    if "anyOf" in node:
        (alternative,) = [option for option in node.pop("anyOf") if option.get("type") != "null"]
        node = alternative | node
    if "$ref" in node:
        target = definitions[node.pop("$ref").rpartition("/")[2]]
        node = _inlined(target | node, definitions)
    if node.get("default", ...) is None:
        del node["default"]
    if "default" in node:
        node["default"] = _without_nulls(node["default"])
    node.pop("$defs", None)
    return node


def _without_nulls(value: Any) -> Any:
    """Leave out what a default does not set: the API server refuses nulls in defaults."""
    if isinstance(value, dict):
        return {key: _without_nulls(below) for key, below in value.items() if below is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value
