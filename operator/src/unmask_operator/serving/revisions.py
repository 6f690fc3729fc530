"""Revisions: the part of a spec that pods are made from, kept so that old groups can be made again.

A revision is a ControllerRevision of the service. Its name is made from what it says, so the same spec is the
same revision, also after others, and making it twice is making it once.
"""

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from unmask_api.inference_service import InferenceSpec
from unmask_api.inference_status import ModelStatus
from unmask_operator.decision import JsonObject
from unmask_operator.launch.groups import REVISION_LABEL, SERVICE_LABEL

__all__ = [
    "NOT_REVISED",
    "REVISED",
    "Revision",
    "controller_revision",
    "name_of",
    "of_spec",
    "outdated",
    "stored",
]

REVISED = frozenset(
    {
        "model",
        "group",
        "server",
        "scheduling",
        "image",
        "env",
        "credentials",
        "node_selector",
        "tolerations",
        "affinity",
        "volumes",
        "volume_mounts",
        "service_account_name",
        "pod_template",
    }
)
"""Fields of a spec that pods are made from: a change of one makes another revision."""
NOT_REVISED = frozenset({"stopped", "replicas", "rollout", "autoscaling", "disruption", "service", "network"})
"""All others: a change of one replaces no pod."""

_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"
"""No vowels and nothing like them: six letters should not be a word."""
_LETTERS = 6


@dataclass(frozen=True, slots=True)
class Revision:
    """What pods are made from, and what that is called."""

    name: str
    """Six letters and digits, made from what it says."""
    spec: InferenceSpec
    """The revised fields, with the image and with the model's uri in the place of a job; else defaults."""


def of_spec(spec: InferenceSpec, *, image: str, model: ModelStatus) -> Revision:
    """Return the revision of a spec whose image and model are known."""
    placed = spec.model.model_copy(update={"uri": model.uri, "job": None, "revision": model.revision})
    revised = {name: getattr(spec, name) for name in REVISED} | {"image": image, "model": placed}
    return _named(InferenceSpec.model_construct(**revised))


def _named(spec: InferenceSpec) -> Revision:
    """Return a revision by its name; fields that are as by default have no part in it.

    So a later version of the operator, with more fields, gives old specs the same names.
    """
    text = json.dumps(_said(spec), sort_keys=True, separators=(",", ":"))
    number = int.from_bytes(hashlib.sha256(text.encode()).digest())
    letters = []
    for _ in range(_LETTERS):
        number, place = divmod(number, len(_ALPHABET))
        letters.append(_ALPHABET[place])
    return Revision("".join(letters), spec)


def _said(spec: InferenceSpec) -> JsonObject:
    said: JsonObject = spec.model_dump(
        mode="json", by_alias=True, include=set(REVISED), exclude_none=True, exclude_defaults=True
    )
    return said


def controller_revision(service: str, revision: Revision, number: int) -> JsonObject:
    """Return the object that keeps a revision; ``number`` is higher than those of older ones."""
    return {
        "apiVersion": "apps/v1",
        "kind": "ControllerRevision",
        "metadata": {
            "name": f"{service}-{revision.name}",
            "labels": {SERVICE_LABEL: service, REVISION_LABEL: revision.name},
        },
        "revision": number,
        "data": {"spec": _said(revision.spec)},
    }


def name_of(kept: JsonObject) -> str:
    """Return what a kept revision is called."""
    return str(kept["metadata"]["name"]).rpartition("-")[2]


def stored(kept: Sequence[JsonObject]) -> dict[str, Revision]:
    """Return the revisions that are kept, by name; one that cannot be read is left out."""
    found = {}
    for one in kept:
        name = name_of(one)
        try:
            spec = InferenceSpec.model_validate((one.get("data") or {})["spec"], by_alias=True, strict=False)
        except (KeyError, TypeError, ValidationError):
            continue  # somebody made it, or another version of the operator
        found[name] = Revision(name, spec)
    return found


def outdated(kept: Sequence[JsonObject], used: Collection[str], limit: int) -> list[JsonObject]:
    """Return the kept revisions that are to go: the oldest of those not used, beyond ``limit``."""
    unused = [one for one in kept if name_of(one) not in used]
    unused.sort(key=lambda one: (one.get("revision", 0), one["metadata"]["name"]))
    return unused[: max(0, len(unused) - limit)]
