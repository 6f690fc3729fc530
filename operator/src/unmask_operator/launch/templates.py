"""What pods of all kinds have in common: security, amounts, and a manifest's template laid over ours."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

from unmask_api.cluster import PodResources

__all__ = ["amounts", "container_security", "cores", "overlaid", "pod_security"]

Json = dict[str, Any]

_USER = 10001


def pod_security() -> Json:
    """Return the security context of a pod, as namespaces of the profile restricted ask for it."""
    return {
        "runAsNonRoot": True,
        "runAsUser": _USER,
        "runAsGroup": _USER,
        "fsGroup": _USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security() -> Json:
    """Return the security context of a container, for the same profile."""
    return {
        "allowPrivilegeEscalation": False,
        "privileged": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def amounts(resources: PodResources) -> Json:
    """Return requests and limits as text; what has a limit alone is requested as much."""
    limits = {name: str(value) for name, value in resources.limits.items()}
    requests = limits | {name: str(value) for name, value in resources.requests.items()}
    return {"limits": limits, "requests": requests}


def cores(resources: PodResources) -> int:
    """Return the whole cores that a pod asks for, one at least; one where that is not said."""
    text = str(resources.limits.get("cpu", resources.requests.get("cpu", "1")))
    try:
        number = float(text[:-1]) / 1000 if text.endswith("m") else float(text)
    except ValueError:  # the API server will refuse it, with a better message
        return 1
    return max(1, int(number)) if math.isfinite(number) else 1


def overlaid(below: Any, above: Any) -> Any:
    """Lay ``above`` over ``below``: objects merge, so do lists of named things, all else is replaced."""
    if isinstance(below, Mapping) and isinstance(above, Mapping):
        merged = dict(below)
        for key, value in above.items():
            if value is None:
                merged.pop(key, None)
            else:
                merged[key] = overlaid(merged[key], value) if key in merged else copy.deepcopy(value)
        return merged
    if _named(below) and _named(above):
        merged_list = list(below)
        places = {entry["name"]: place for place, entry in enumerate(merged_list)}
        for entry in above:
            if (place := places.get(entry["name"])) is None:
                merged_list.append(copy.deepcopy(entry))
            else:
                merged_list[place] = overlaid(merged_list[place], entry)
        return merged_list
    return copy.deepcopy(above)


def _named(value: object) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return False
    return all(isinstance(entry, Mapping) and "name" in entry for entry in value)
