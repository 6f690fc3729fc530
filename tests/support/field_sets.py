"""Which fields of an object a manager owns: the part of server-side apply that decides what is removed and
kept.

A field is a path of steps as ``managedFields`` spells them: ``f:NAME`` for a key of a map and ``k:{...}`` for
an item of a list that has keys. Simplified in one thing: which lists have keys is told by their names, not by
a schema; every other list is one field, replaced as a whole.
"""

import json
from typing import Any

Path = tuple[str, ...]
Fields = frozenset[Path]

_KEYS = {
    "conditions": ("type",),
    "containers": ("name",),
    "env": ("name",),
    "initContainers": ("name",),
    "ownerReferences": ("uid",),
    "volumeMounts": ("mountPath",),
    "volumes": ("name",),
}
_UNOWNED = {
    ("f:apiVersion",),
    ("f:kind",),
    *(
        ("f:metadata", f"f:{name}")
        for name in (
            "creationTimestamp",
            "deletionGracePeriodSeconds",
            "deletionTimestamp",
            "generation",
            "managedFields",
            "name",
            "namespace",
            "resourceVersion",
            "uid",
        )
    ),
}


def copied(value: Any) -> Any:
    """Return a copy of a JSON value: what ``copy.deepcopy`` gives, several times as fast."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [copied(item) for item in value]
    return value


def of(item: dict[str, Any]) -> Fields:
    """Return the fields that ``item`` sets, those of its identity aside."""
    return frozenset(
        path for path in _leaves(item, ()) if path[:1] not in _UNOWNED and path[:2] not in _UNOWNED
    )


def differing(old: dict[str, Any], new: dict[str, Any]) -> Fields:
    """Return the fields that ``new`` sets and ``old`` has not, or not so."""
    return frozenset(path for path in of(new) if get(old, path) != get(new, path))


def get(item: Any, path: Path) -> Any:
    """Return the value at a path; ``None`` where there is none. A keyed item itself is its own keys."""
    for step in path:
        if step.startswith("f:"):
            item = item.get(step[2:]) if isinstance(item, dict) else None
        else:
            keys = json.loads(step[2:])
            item = next((one for one in item or () if all(one.get(k) == v for k, v in keys.items())), None)
        if item is None:
            return None
    return path[-1] if path and path[-1].startswith("k:") else item


def merged(live: Any, applied: Any, name: str = "") -> Any:
    """Return ``live`` with what ``applied`` sets."""
    if isinstance(live, dict) and isinstance(applied, dict):
        result = dict(live)
        for key, value in applied.items():
            result[key] = merged(live.get(key), value, key)
        return result
    if isinstance(live, list) and isinstance(applied, list) and name in _KEYS:
        result = []
        names = _KEYS[name]
        for item in live:
            twin = next((one for one in applied if all(one.get(k) == item.get(k) for k in names)), None)
            result.append(item if twin is None else merged(item, twin))
        known = [tuple(item.get(k) for k in names) for item in live]
        return result + [one for one in applied if tuple(one.get(k) for k in names) not in known]
    return copied(applied)


def removed(item: dict[str, Any], paths: Fields) -> dict[str, Any]:
    """Return ``item`` without these fields and without maps and items that they leave empty."""
    result = copied(item)
    for path in sorted(paths, key=len, reverse=True):
        _remove(result, path)
    return result


def encoded(fields: Fields) -> dict[str, Any]:
    """Return a set of fields as ``fieldsV1``."""
    tree: dict[str, Any] = {}
    for path in sorted(fields):
        node = tree
        for step in path:
            node = node.setdefault(step, {})
        if path[-1].startswith("k:"):
            node["."] = {}
    return tree


def decoded(tree: dict[str, Any], path: Path = ()) -> Fields:
    """Return the set of fields of a ``fieldsV1``."""
    if not tree:
        return frozenset({path}) if path else frozenset()
    found: set[Path] = set()
    for step, below in tree.items():
        found |= {path} if step == "." else decoded(below, (*path, step))
    return frozenset(found)


def _leaves(value: Any, path: Path) -> set[Path]:
    name = path[-1][2:] if path else ""
    if isinstance(value, dict) and value:
        return {leaf for key, below in value.items() for leaf in _leaves(below, (*path, f"f:{key}"))}
    if isinstance(value, list) and value and name in _KEYS:
        found: set[Path] = set()
        for item in value:
            here = (*path, "k:" + json.dumps({k: item.get(k) for k in _KEYS[name]}, separators=(",", ":")))
            found |= {here} | {
                leaf for key, below in item.items() for leaf in _leaves(below, (*here, f"f:{key}"))
            }
        return found
    return {path}


def _remove(item: Any, path: Path) -> None:
    step, rest = path[0], path[1:]
    if step.startswith("f:"):
        key = step[2:]
        if not isinstance(item, dict) or key not in item:
            return
        if not rest:
            if not (isinstance(item[key], dict) and item[key]):  # what others put into an empty map stays
                del item[key]
            return
        _remove(item[key], rest)
        if item[key] in ({}, []):
            del item[key]
        return
    keys = json.loads(step[2:])
    for place, one in enumerate(item or ()):
        if all(one.get(k) == v for k, v in keys.items()):
            if not rest:
                # Only where nothing but its keys is left: the rest is somebody else's.
                if set(one) <= set(keys):
                    del item[place]
            elif rest[-1][2:] not in keys or len(rest) > 1:
                _remove(one, rest)
            return
