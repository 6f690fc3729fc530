"""Amounts as Kubernetes writes them (``500m``, ``64Gi``), and as TorchX counts them."""

import math
import re
from fractions import Fraction

from torchx.specs import Resource

from unmask_api.cluster import PodResources

__all__ = ["GPU", "limits", "quantity", "resource"]

GPU = "nvidia.com/gpu"
_QUANTITY = re.compile(r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))([eE][+-]?[0-9]{1,3}|[KMGTPE]i|[numkMGTPE])?")
_DECIMAL = {
    unit: Fraction(1000) ** power for power, unit in enumerate(("n", "u", "m", "", *"kMGTPE"), start=-3)
}
_BINARY = {f"{unit}i": Fraction(1024) ** power for power, unit in enumerate("KMGTPE", start=1)}
_MEGABYTE = 10**6


def quantity(text: object) -> Fraction | None:
    """Return what a quantity is worth; ``None`` where it is none (the API server will say so)."""
    found = _QUANTITY.fullmatch(str(text))
    if found is None:
        return None
    number, suffix = Fraction(found[1]), found[2] or ""
    if suffix in _BINARY:
        return number * _BINARY[suffix]
    if suffix in _DECIMAL:
        return number * _DECIMAL[suffix]
    return number * Fraction(10) ** int(suffix[1:])  # an exponent


def resource(amounts: PodResources) -> Resource:
    """Return what a pod takes as TorchX counts: whole cores, GPUs and megabytes, -1 where nothing is said."""

    def whole(name: str, unit: int) -> int:
        value = quantity(amounts.limits.get(name, amounts.requests.get(name, "")))
        return -1 if value is None else math.ceil(value / unit)

    return Resource(cpu=whole("cpu", 1), gpu=whole(GPU, 1), memMB=whole("memory", _MEGABYTE))


def limits(amounts: Resource) -> dict[str, str]:
    """Return a pod's limits for what TorchX counts; nothing for what is not said."""
    found = {"cpu": amounts.cpu, GPU: amounts.gpu}
    counted = {name: str(value) for name, value in found.items() if value > 0}
    return counted | ({"memory": f"{amounts.memMB}M"} if amounts.memMB > 0 else {})
