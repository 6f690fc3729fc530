"""Every manifest that the tree shows to people is one that a cluster takes, and so are its parts."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.manifests import inference_service, train_job
from unmask_operator.launch.admission import admit, admit_any, admit_service

ROOT = Path(__file__).parents[2]
SERVICES = "docs/how-to/serve-on-a-cluster.md"
"""The page whose parts of manifests are those of services."""
FENCED = re.compile(r"^```ya?ml\n(.*?)^```", re.MULTILINE | re.DOTALL)


def shown() -> dict[str, str]:
    """Return the YAML in Markdown pages, and the YAML files of the examples, by where they stand."""
    command = ["git", "ls-files", "*.md", "examples/*.yaml"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = {}
    for name in listed.stdout.splitlines():
        text = (ROOT / name).read_text(encoding="utf-8")
        for index, part in enumerate(FENCED.findall(text) if name.endswith(".md") else [text]):
            found[f"{name}-{index}"] = part
    return found


def shown_manifests() -> dict[str, str]:
    return {where: part for where, part in shown().items() if "apiVersion: unmask.dev/" in part}


def shown_parts(*, of_services: bool = False) -> dict[str, str]:
    """Return what stands below ``spec`` of a manifest that is not shown whole."""
    return {
        where: part
        for where, part in shown().items()
        if part.startswith("spec:\n") and where.startswith(SERVICES) == of_services
    }


def laid(below: Any, above: Any) -> Any:
    """Lay a part of a manifest over another one; where the model comes from is said by one of them."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    kept = {key: value for key, value in below.items() if key != "init" or "init" not in above}
    if "job" in above:
        kept.pop("uri", None)
    return kept | {key: laid(kept[key], value) if key in kept else value for key, value in above.items()}


@pytest.mark.parametrize("where", shown_manifests())
def test_a_manifest_that_is_shown_is_valid(where: str) -> None:
    admit_any(shown_manifests()[where], source=where)


@pytest.mark.parametrize("where", shown_parts())
def test_a_part_that_is_shown_fits_into_a_manifest(where: str) -> None:
    plain = train_job()
    plain["spec"]["stages"] = [plain["spec"]["stages"][1]]
    whole = laid(plain, yaml.safe_load(shown_parts()[where]))
    assert whole != plain
    admit(json.dumps(whole), source=where)


@pytest.mark.parametrize("where", shown_parts(of_services=True))
def test_a_part_that_is_shown_fits_into_a_service(where: str) -> None:
    plain = inference_service()
    whole = laid(plain, yaml.safe_load(shown_parts(of_services=True)[where]))
    assert whole != plain
    admit_service(json.dumps(whole), source=where)


def test_manifests_and_parts_are_shown_at_all() -> None:
    for found in (shown_manifests(), shown_parts()):
        assert any(where.startswith("docs/how-to/") for where in found)
