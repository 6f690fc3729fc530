"""What every custom resource is made of: the model base class, CEL rules, and the scalar types.

The models are the one source of the CRDs, the defaults, the reference pages and the local
admission. Hence two rules for whoever writes one: only what a structural OpenAPI schema and CEL
can say may be checked here (never a pydantic validator, which a cluster would not run), and every
string and list has an upper bound, because the API server refuses CEL rules of unbounded cost.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, StringConstraints
from pydantic.alias_generators import to_camel
from pydantic_core import CoreSchema

__all__ = [
    "DATA_URI",
    "DECIMAL",
    "GROUP",
    "IDENTIFIER",
    "NAME",
    "PATTERNS",
    "ApiModel",
    "Count",
    "DataUri",
    "DecimalString",
    "FileWord",
    "Name",
    "Rule",
    "STORE_URI",
    "StoreUri",
    "Uri",
    "WORD",
]

GROUP = "unmask.dev"
"""The API group of every custom resource."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One ``x-kubernetes-validations`` entry, checked by the API server and by local admission alike."""

    rule: str
    """CEL; ``self`` is the object the rule is declared on. Rules with ``oldSelf`` are for updates only."""
    message: str
    """What is allowed and what to change."""
    field_path: str | None = None
    """The field to blame, relative to the object, such as ``.blockSizes``."""

    @property
    def transition(self) -> bool:
        """Whether the rule compares with the object before an update."""
        return "oldSelf" in self.rule

    def to_json(self) -> dict[str, str]:
        """Return the rule as it stands in a CRD."""
        entry = {"rule": self.rule, "message": self.message}
        return entry | ({"fieldPath": self.field_path} if self.field_path else {})


class ApiModel(BaseModel):
    """An object of a custom resource: camelCase in manifests, immutable, no unknown fields, no coercion."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        validate_by_alias=True,
        validate_by_name=True,
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
    )

    rules: ClassVar[tuple[Rule, ...]] = ()
    """The CEL rules of this object."""

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read manifest JSON, camelCase only; raises ``pydantic.ValidationError`` and checks no CEL rule."""
        return cls.model_validate_json(text, by_alias=True, by_name=False)

    def to_json_dict(self) -> dict[str, Any]:
        """Return the object as a manifest holds it, with defaults filled in and absent fields left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler.resolve_ref_schema(handler(core))
        if cls.rules:
            schema["x-kubernetes-validations"] = [rule.to_json() for rule in cls.rules]
        return schema


DECIMAL = r"^[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]{1,2})?$"
NAME = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
WORD = r"^[A-Za-z][A-Za-z0-9]*$"
IDENTIFIER = r"^[A-Za-z_][A-Za-z0-9_]*$"
URI = r"^(pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/[^/]+)*/?|(/[^/]+)+/?)$"
OBJECT_NAME = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"
FILE_WORD = r"^[A-Za-z0-9_.-]+$"
METRIC = r"^[a-zA-Z_:][a-zA-Z0-9_:]*$"
STORE_URI = rf"{URI[:-2]}|(s3|gs|az|abfs)://[^ /]+(/[^ /]+)*/?)$"
DATA_URI = rf"{URI[:-2]}|(file|memory|s3|gs|az|abfs|http|https|hf)://[^ ]+)$"

PATTERNS = {
    DECIMAL: 'a decimal number in quotes, such as "0.5" or "3e-4"',
    NAME: "lowercase letters, digits and inner dashes, at most 40",
    OBJECT_NAME: "lowercase letters, digits, and inner dashes and dots, at most 253",
    WORD: "one word of letters and digits, such as OutOfMemory",
    IDENTIFIER: "letters, digits and underscores, not beginning with a digit",
    DATA_URI: "pvc://CLAIM/path, an absolute path inside the worker, or a file that fsspec reads, "
    "such as s3://BUCKET/path or gs://BUCKET/path",
    FILE_WORD: "letters, digits, dots, dashes and underscores",
    METRIC: "the name of a metric of Prometheus: letters, digits, underscores and colons",
    URI: "pvc://CLAIM/path, or an absolute path inside the worker",
    STORE_URI: "pvc://CLAIM/path, an absolute path inside the worker, or a place in an object store, such as"
    " s3://BUCKET/path, gs://BUCKET/path or az://CONTAINER/path",
}
"""What the patterns allow, in words."""

DecimalString = Annotated[str, StringConstraints(pattern=DECIMAL, max_length=16)]
"""A number that need not be whole, as a quoted string (``"3e-4"``); ``float`` reads it.

Kubernetes keeps floats out of specs because they do not survive every client unchanged.
"""

Name = Annotated[str, StringConstraints(pattern=NAME, max_length=40)]
"""A lowercase name that fits into names of pods and folders."""

ObjectName = Annotated[str, StringConstraints(pattern=OBJECT_NAME, max_length=253)]
"""Name of another object of the namespace, such as a Secret."""

Uri = Annotated[str, StringConstraints(pattern=URI, max_length=1024)]
"""``pvc://CLAIM/path`` on a volume, or an absolute path inside the worker."""

StoreUri = Annotated[str, StringConstraints(pattern=STORE_URI, max_length=1024)]
"""The same, or ``SCHEME://path`` of an object store: ``s3``, ``gs``, ``az`` or ``abfs``."""

FileWord = Annotated[str, StringConstraints(pattern=FILE_WORD, max_length=64)]
"""Part of a file's name."""

DataUri = Annotated[str, StringConstraints(pattern=DATA_URI, max_length=1024)]
"""A path, or ``SCHEME://path`` of a store that fsspec reads, such as ``s3://`` or ``gs://``."""

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
"""A whole number of things, at least one."""
