"""Local admission: a manifest is accepted here if, and only if, the API server would create it.

The structure is checked by the models, the rest by the models' CEL rules, both on the object with its
defaults filled in. Rules about changes (``oldSelf``) are the server's alone. A refusal names the file,
the line, the field, what was found, and what is allowed.
"""

import difflib
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cel
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from unmask.errors import UsageError
from unmask_api import crd
from unmask_api.base import DECIMAL, GROUP, ApiModel, Rule
from unmask_api.inference_service import DiffusionInferenceService
from unmask_api.reference import allowed, type_name
from unmask_api.train_job import DiffusionTrainJob
from unmask_operator import yaml_dialect

__all__ = [
    "AdmissionError",
    "admit",
    "admit_any",
    "admit_service",
    "field_path",
    "read_any",
    "read_manifest",
    "read_service",
]

Json = dict[str, Any]
Manifest = DiffusionTrainJob | DiffusionInferenceService
_CONSEQUENCE = "default_factory_not_called"  # what pydantic adds to the error in another field
FieldPath = tuple[str | int, ...]


class AdmissionError(UsageError):
    """A manifest is refused, as the API server would refuse it."""

    def __init__(self, message: str, *, path: str = "") -> None:
        super().__init__(message)
        self.path = path
        """The field to blame, such as ``spec.stages[1].noise.high``."""


def read_manifest(path: Path) -> DiffusionTrainJob:
    """Read and admit the training job at ``path``; raises :class:`AdmissionError`."""
    return admit(_text_of(path), source=str(path))


def read_service(path: Path) -> DiffusionInferenceService:
    """Read and admit the service at ``path``; raises :class:`AdmissionError`."""
    return admit_service(_text_of(path), source=str(path))


def read_any(path: Path) -> Manifest:
    """Read and admit the manifest at ``path``, of whichever kind; raises :class:`AdmissionError`."""
    return admit_any(_text_of(path), source=str(path))


def admit(text: str, *, source: str = "manifest") -> DiffusionTrainJob:
    """Return the job that ``text`` describes, with its defaults; raises :class:`AdmissionError`."""
    admitted = _admit(text, source, (DiffusionTrainJob,))
    assert isinstance(admitted, DiffusionTrainJob)
    return admitted


def admit_service(text: str, *, source: str = "manifest") -> DiffusionInferenceService:
    """Return the service that ``text`` describes, with its defaults; raises :class:`AdmissionError`."""
    admitted = _admit(text, source, (DiffusionInferenceService,))
    assert isinstance(admitted, DiffusionInferenceService)
    return admitted


def admit_any(text: str, *, source: str = "manifest") -> Manifest:
    """Return what ``text`` describes, of whichever kind; raises :class:`AdmissionError`."""
    return _admit(text, source, (DiffusionTrainJob, DiffusionInferenceService))


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise AdmissionError(f"{path}: cannot be read ({reason}); give the path of a manifest") from None


def _admit(text: str, source: str, models: Sequence[type[Manifest]]) -> Manifest:
    try:
        document = yaml_dialect.load(text)
    except yaml_dialect.YAMLError as error:
        raise AdmissionError(f"{source}: not valid YAML: {_one_line(error)}") from None
    try:
        return _admit_object(document, models)
    except _RefusedError as refusal:
        path = field_path(refusal.path)
        where = f"{source}:{yaml_dialect.line_of(text, refusal.path)}"
        raise AdmissionError(f"{where}: {path}{refusal.problem}", path=path) from None


def field_path(path: FieldPath) -> str:
    """Write a path as manifests are talked about: ``("a", 1, "b")`` is ``a[1].b``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


class _RefusedError(Exception):
    """The field at ``path`` is refused; ``problem`` continues the sentence that the path begins."""

    def __init__(self, path: FieldPath, problem: str) -> None:
        super().__init__(problem)
        self.path = path
        self.problem = problem


def _admit_object(document: object, models: Sequence[type[Manifest]]) -> Manifest:
    model = _model_of(document, models)
    schema = _schema_of(model)
    try:
        text = json.dumps(_without_nulls(document, schema), allow_nan=False)
    except ValueError:
        raise _RefusedError((), "numbers must be finite: JSON has no infinity and no NaN") from None
    try:
        admitted = model.from_json(text)
    except ValidationError as error:
        raise _structure_refusal(error, schema) from None
    for path, rule in _broken_rules(admitted, ()):
        raise _RefusedError((*path, *_parts(rule.field_path)), f": {rule.message}")
    return admitted


@functools.cache
def _schema_of(model: type[ApiModel]) -> Json:
    """The schema that manifests are compared with, made once: that takes longer than to compare."""
    return crd.schema(model)


def _model_of(document: object, models: Sequence[type[Manifest]]) -> type[Manifest]:
    if not isinstance(document, dict):
        raise _RefusedError(
            (), f"got {_shown(document)}; a manifest is a mapping with apiVersion, kind, metadata and spec"
        )
    versions = dict.fromkeys(f"{GROUP}/{one.version}" for one in crd.RESOURCES if one.model in models)
    kinds = {model.__name__: model for model in models}
    for key, values in (("apiVersion", list(versions)), ("kind", list(kinds))):
        if document.get(key) not in values:
            raise _RefusedError((key,), f": got {_shown(document.get(key))}; allowed: {' | '.join(values)}")
    return kinds[document["kind"]]


def _without_nulls(value: Any, node: Json) -> Any:
    """Take fields that are null for left out, as the API server does; free-form objects keep theirs."""
    if isinstance(value, dict) and "properties" in node:
        fields = node["properties"]
        return {
            key: _without_nulls(child, fields.get(key, {}))
            for key, child in value.items()
            if child is not None
        }
    if isinstance(value, list):
        return [_without_nulls(child, node.get("items", {})) for child in value]
    return value


# --- structure ---------------------------------------------------------------------------------


def _structure_refusal(error: ValidationError, schema: Json) -> _RefusedError:
    errors = [entry for entry in error.errors(include_url=False) if entry["type"] != _CONSEQUENCE]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    path = tuple(errors[0]["loc"])
    return _RefusedError(path, _problem(errors[0], path, schema) + more)


def _problem(error: ErrorDetails, path: FieldPath, schema: Json) -> str:
    node = _node_at(schema, path)
    match error["type"]:
        case "missing":
            return f" is missing: set it ({_description(node)})"
        case "extra_forbidden":
            return f" is not a field{_suggestion(str(path[-1]), _node_at(schema, path[:-1]))}"
        case "string_type" if node.get("pattern") == DECIMAL:
            return f": got {_shown(error['input'])}; decimal numbers are text here: put it in quotes"
    return f": got {_shown(error['input'])}; allowed: {_description(node) or error['msg']}"


def _node_at(schema: Json, path: FieldPath) -> Json:
    node = schema
    for part in path:
        if isinstance(part, int):
            node = node.get("items", {})
        elif isinstance(values := node.get("additionalProperties"), dict):
            return values
        else:
            node = node.get("properties", {}).get(part, {})
    return node


def _description(node: Json) -> str:
    if not node:
        return ""
    values = allowed(node)
    return (
        values if values and node["type"] == "string" else ", ".join(filter(None, (type_name(node), values)))
    )


def _suggestion(name: str, parent: Json) -> str:
    fields = {field.lower(): field for field in parent.get("properties", {})}
    near = difflib.get_close_matches(name.lower().replace("_", ""), fields, n=1)
    if near:
        return f"; did you mean {fields[near[0]]}?"
    return f"; allowed: {', '.join(fields.values())}" if fields else ""


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return "nothing" if value is None else text if len(text) <= 60 else f"{text[:57]}..."


def _one_line(error: yaml_dialect.YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    where = f"line {mark.line + 1}: " if mark else ""
    return where + " ".join(str(problem or error).split())


# --- rules -------------------------------------------------------------------------------------


def _broken_rules(value: object, path: FieldPath) -> Iterator[tuple[FieldPath, Rule]]:
    """Yield the rules that do not hold in ``value`` and below, inner objects first."""
    if isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _broken_rules(item, (*path, index))
    if not isinstance(value, ApiModel):
        return
    for name, field in type(value).model_fields.items():
        yield from _broken_rules(getattr(value, name), (*path, field.alias or name))
    context = {"self": value.to_json_dict()}
    for rule in value.rules:
        if not rule.transition and not _compiled(rule.rule).execute(context):
            yield path, rule


@functools.cache
def _compiled(rule: str) -> cel.Program:
    return cel.compile(rule)


def _parts(relative: str | None) -> tuple[str, ...]:
    return tuple((relative or "").removeprefix(".").split(".")) if relative else ()
