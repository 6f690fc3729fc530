"""Manifests as people hand them over: a path, text or an object, and as the API server is sent them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from unmask_api.base import ApiModel
from unmask_operator.decision import JsonObject

__all__ = ["admitted", "as_written"]

Model = TypeVar("Model", bound=ApiModel)


def admitted(
    manifest: Path | str | Mapping[str, Any] | Model,
    model: type[Model],
    *,
    read: Callable[[Path], Model],
    admit: Callable[[str], Model],
) -> Model:
    """Return the manifest, checked as the cluster would.

    Args:
        manifest: path of a file, text, or object.
        model: its kind.
        read: reads and checks a file.
        admit: checks text.

    Raises:
        UsageError: The manifest is wrong.
    """
    match manifest:
        case ApiModel():
            assert isinstance(manifest, model)
            return manifest
        case Path():
            return read(manifest)
        case str() if "\n" not in manifest and not manifest.lstrip().startswith("{"):
            return read(Path(manifest))
        case str():
            return admit(manifest)
    return admit(json.dumps(manifest))


def as_written(manifest: ApiModel) -> JsonObject:
    """Return the manifest without defaults, as ``kubectl apply`` would send it."""
    body: JsonObject = manifest.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)
    body.pop("status", None)
    kept = ("name", "namespace", "labels", "annotations")
    body["metadata"] = {key: value for key, value in body["metadata"].items() if key in kept}
    return body
