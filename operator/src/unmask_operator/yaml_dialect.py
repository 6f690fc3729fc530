"""YAML as Kubernetes reads it, so that a manifest means the same here and on a cluster.

PyYAML takes ``3e-3`` for text, ``1:30`` for 90, ``2026-01-01`` for a date, ``y`` for text, and the last
of two equal keys. The API server's reader (Go's YAML 1.1) takes the first for a number, the next two
for text, ``y`` for true, and refuses the last. What is written here is quoted by the same rules.
"""

import json
import re
from typing import Any

import yaml

__all__ = ["YAMLError", "dump", "line_of", "load"]

YAMLError = yaml.YAMLError

_TAG = "tag:yaml.org,2002:"
_RESOLVERS = (  # in order of precedence, with the characters a match can start with
    ("bool", re.compile(r"^(y|Y|n|N)$"), "yYnN"),
    ("int", re.compile(r"^[-+]?(0b[01_]+|0o?[0-7_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$"), "-+0123456789"),
    (
        "float",
        re.compile(
            r"^([-+]?(\.[0-9_]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
        ),
        "-+.0123456789",
    ),
)
_KEPT = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag.removeprefix(_TAG) not in ("int", "float", "timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _KEPT
    bool_values = yaml.SafeLoader.bool_values | {"y": True, "n": False}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value} occurs twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        value = super().construct_yaml_float(node)
        return int(value) if value.is_integer() else value  # JSON does not tell 100.0 from 100


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _KEPT


for _name, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, _pattern, list(_first))
_Loader.add_constructor(_TAG + "float", _Loader.construct_yaml_float)


def load(text: str) -> Any:
    """Return the one document in ``text`` as JSON values; raises ``YAMLError``."""
    return yaml.load(text, _Loader)


def dump(value: Any) -> str:
    """Return JSON values as block-style YAML, keys in the order given and no anchors."""
    copies = json.loads(json.dumps(value))  # one object in two places would become an anchor
    return yaml.dump(copies, Dumper=_Dumper, sort_keys=False, width=110)


def line_of(text: str, path: tuple[str | int, ...]) -> int:
    """Return the line (from 1) of the deepest node along ``path`` that ``text`` has."""
    node, line = yaml.compose(text, _Loader), 1
    for key in path:
        match node:
            case yaml.MappingNode():
                entry = next(((name, value) for name, value in node.value if name.value == key), None)
            case yaml.SequenceNode() if isinstance(key, int) and key < len(node.value):
                entry = (node.value[key], node.value[key])
            case _:
                entry = None
        if entry is None:
            break
        line, node = entry[0].start_mark.line + 1, entry[1]
    return line
