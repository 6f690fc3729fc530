"""Every training manifest that the tree shows to people is one that a cluster takes."""

import re
import subprocess
from pathlib import Path

import pytest

from unmask_operator.launch.admission import admit

ROOT = Path(__file__).parents[2]
FENCED = re.compile(r"^```ya?ml\n(.*?)^```", re.MULTILINE | re.DOTALL)


def shown_manifests() -> dict[str, str]:
    """Return the manifests in Markdown pages, and the YAML files of the examples, by where they stand."""
    command = ["git", "ls-files", "*.md", "examples/*.yaml"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = {}
    for name in listed.stdout.splitlines():
        text = (ROOT / name).read_text(encoding="utf-8")
        for index, part in enumerate(FENCED.findall(text) if name.endswith(".md") else [text]):
            if "kind: DiffusionTrainJob" in part:
                found[f"{name}-{index}"] = part
    return found


@pytest.mark.parametrize("where", shown_manifests())
def test_a_manifest_that_is_shown_is_valid(where: str) -> None:
    admit(shown_manifests()[where], source=where)


def test_manifests_are_shown_at_all() -> None:
    assert any(where.startswith("docs/how-to/") for where in shown_manifests())
