"""``unmask explain [FIELD.PATH]``: the fields of a manifest, from the models that define them."""

import difflib
import json
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import click

from unmask.errors import UsageError

__all__ = ["command", "page"]

Json = dict[str, Any]
_WIDTH = 100


@click.command("explain", short_help="Describe the fields of a manifest.")
@click.argument("field", default="dtj", metavar="[FIELD]")
def command(field: str) -> None:
    """Describe a field of a manifest: type, default, meaning, rules, and the fields in it.

    FIELD is a path such as dtj.spec.stages.noise, where dtj is short for DiffusionTrainJob.
    """
    click.echo(page(field))


def page(field: str) -> str:
    """Return the description of the field at the dotted path ``field``; raises ``UsageError``."""
    from unmask_api import crd

    name, *parts = re.sub(r"\[\w*\]", "", field).split(".")
    names = {key: item for item in crd.RESOURCES for key in (item.short_name, item.kind, item.kind.lower())}
    if name not in names:  # "spec.stages" alone means the only kind there is
        name, parts = crd.RESOURCES[0].short_name, [name, *parts]
    node, required = crd.schema(names[name].model), False
    path = name
    for part in parts:
        fields = node.get("properties", {})
        if part not in fields:
            raise UsageError(f"{path} has no field {part}{_suggestion(part, fields)}")
        required = part in node.get("required", ())
        node, path = _element(fields[part]), f"{path}.{part}"
    lines = [
        f"{path}  <{_type(node)}>{'  required' if required else ''}",
        "",
        *_paragraph(node["description"]),
    ]
    return "\n".join([*lines, *_facts(node), *_rules(node), *_fields(node)])


def _element(node: Json) -> Json:
    """Of a list of objects the objects are described, with the list's own description and type."""
    if "properties" not in node.get("items", {}):
        return node
    return {**node["items"], "description": node["description"], "list": node}


def _type(node: Json) -> str:
    from unmask_api.reference import type_name

    return type_name(node.get("list", node))


def _facts(node: Json) -> Iterator[str]:
    from unmask_api.reference import allowed

    node = node.get("list", node)
    facts = {
        "default": json.dumps(node["default"]) if "default" in node else "",
        "allowed": allowed(node) or allowed(node.get("items", {})),
    }
    if any(facts.values()):
        yield ""
    yield from (f"{name}: {value}" for name, value in facts.items() if value)


def _rules(node: Json) -> Iterator[str]:
    rules = node.get("x-kubernetes-validations", ())
    yield from ("", "rules:") if rules else ()
    for rule in rules:
        yield from _paragraph(f"- {rule['message']}", "  ")


def _fields(node: Json) -> Iterator[str]:
    fields = node.get("properties", {})
    yield from ("", "fields:") if fields else ()
    for name, child in fields.items():
        flag = "  required" if name in node.get("required", ()) else ""
        yield f"  {name}  <{_type(child)}>{flag}"
        yield from _paragraph(child["description"], "      ")


def _paragraph(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent)


def _suggestion(part: str, fields: Json) -> str:
    if not fields:
        return "; it has no fields at all"
    lower = {field.lower(): field for field in fields}
    near = difflib.get_close_matches(part.lower(), lower, n=1)
    return f"; did you mean {lower[near[0]]}?" if near else f"; its fields: {', '.join(fields)}"
