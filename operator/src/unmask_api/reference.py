"""Reference pages of the custom resources in Markdown: every field with type, default and meaning."""

import json
from collections.abc import Iterator
from typing import Any

from unmask_api import crd
from unmask_api.base import GROUP, PATTERNS

__all__ = ["allowed", "markdown", "type_name"]

Json = dict[str, Any]


def markdown() -> dict[str, str]:
    """Return the pages as file name -> text."""
    return {f"{resource.kind.lower()}.md": _page(resource) for resource in crd.RESOURCES}


def type_name(node: Json) -> str:
    """Return the type of a schema node in words, such as ``list of integer``."""
    if "x-kubernetes-int-or-string" in node:
        return "integer or string"
    if node["type"] == "array":
        return f"list of {type_name(node['items'])}"
    if node["type"] == "object" and "additionalProperties" in node:
        return f"map of {type_name(node['additionalProperties'])}"
    return str(node["type"])


def allowed(node: Json) -> str:
    """Return the values that a schema node allows, in words; empty when the type says it all."""
    if "enum" in node:
        return " | ".join(str(value) for value in node["enum"])
    if "pattern" in node:
        return PATTERNS[node["pattern"]]
    low, high = node.get("minimum"), node.get("maximum")
    if low is not None or high is not None:
        return f"{low} to {high}" if high is not None else f"at least {low}"
    if "minItems" in node or "maxItems" in node:
        return f"{node.get('minItems', 0)} to {node['maxItems']} items"
    return ""


def _page(resource: crd.Resource) -> str:
    schema = crd.schema(resource.model)
    head = [
        f"# {resource.kind}",
        "",
        f"`apiVersion: {GROUP}/{resource.version}`, short name `{resource.short_name}`."
        f" {schema['description']}",
        "",
        "Made by `make generate` from the models; `unmask explain` shows the same in a terminal.",
    ]
    sections = [line for part in ("spec", "status") for line in _sections(part, schema["properties"][part])]
    return "\n".join([*head, *sections, ""])


def _sections(path: str, node: Json) -> Iterator[str]:
    """Yield a section for the object ``node``, then those of the objects in it."""
    yield from ("", f"## {path}", "", node["description"], "")
    yield from ("| field | type | default | meaning |", "|---|---|---|---|")
    required = set(node.get("required", ()))
    for key, child in node["properties"].items():
        yield _row(key, child, key in required)
    rules = node.get("x-kubernetes-validations", ())
    yield from ([""] if rules else [])
    yield from (f"- {rule['message']}: `{rule['rule']}`" for rule in rules)
    for key, child in node["properties"].items():
        inner, suffix = (child["items"], "[]") if "items" in child else (child, "")
        if "properties" in inner:
            yield from _sections(f"{path}.{key}{suffix}", inner)


def _row(key: str, node: Json, required: bool) -> str:
    default = "required" if required else _default(node)
    values = allowed(node) or allowed(node.get("items", {}))
    meaning = node["description"] + (f" Allowed: {values}." if values else "")
    return f"| `{key}` | {type_name(node)} | {default} | {meaning.replace('|', chr(92) + '|')} |"


def _default(node: Json) -> str:
    """Return the default for a table; that of an object is told by its own fields."""
    if "default" not in node or node.get("type") == "object":
        return ""
    return f"`{json.dumps(node['default'])}`"
