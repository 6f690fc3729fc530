"""Writes the files that are made from others, or says which of them are out of date.

``generate.py write`` (``make generate``) and ``generate.py check`` (``make verify``) both make every file in
memory first; what is committed is read by people and packaged into the wheel, and is never edited by hand.

=============================================  ==========================================
``workers/src/unmask/v1/*_pb2*``               ``protos/`` (protoc, in a temporary folder)
``deploy/crds/``, ``docs/reference/``          the custom resources in ``unmask_api``
``docs/reference/metrics.md``                  ``unmask.telemetry``
``docs/reference/operator-metrics.md``         ``unmask_operator.control.metrics``
``docs/reference/cli.md``                      the commands of ``unmask.cli``
``deploy/helm/*/files/``, ``docs/runbooks/``   alerts and dashboards in ``observability``
``deploy/helm/*/``: values.schema.json,        each chart's values.yaml; ``unmask_api`` and
README.md; definitions, permissions            ``unmask_operator.rbac``
=============================================  ==========================================
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from observability import pages as observability

import charts
import cli_reference
import unmask_operator.generate
from unmask.cli.main import cli
from unmask.telemetry import reference as metrics_reference
from unmask_operator.control import reference as operator_metrics_reference

ROOT = Path(__file__).resolve().parent.parent
# A file here that matches and is no longer made is out of date too.
_OWNED = (
    "workers/src/unmask/v1/*_pb2*",
    "deploy/crds/*",
    "deploy/helm/*/README.md",
    "deploy/helm/*/files/*",
    "deploy/helm/*/values.schema.json",
    "deploy/helm/*/templates/_permissions.tpl",
    "deploy/helm/*/templates/crds/*",
    "docs/reference/*",
    "docs/runbooks/*",
)


def generated() -> dict[str, str]:
    """Return every generated file: its path below the root -> its text."""
    return {
        **_wire(),
        **unmask_operator.generate.files(),
        **charts.files(),
        **observability.files(),
        "docs/reference/metrics.md": metrics_reference.markdown(),
        "docs/reference/operator-metrics.md": operator_metrics_reference.markdown(),
        "docs/reference/cli.md": cli_reference.markdown(cli, "unmask"),
    }


def outdated(files: dict[str, str]) -> list[str]:
    """Return the paths where the tree holds something else than ``files``, or what is no longer made."""
    present = {
        str(path.relative_to(ROOT)) for pattern in _OWNED for path in ROOT.glob(pattern) if path.is_file()
    }
    differing = {name for name, text in files.items() if not _holds(ROOT / name, text)}
    return sorted(differing | (present - files.keys()))


def _wire() -> dict[str, str]:
    """The Python modules and their types for ``protos/``."""
    sources = sorted((ROOT / "protos").rglob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
        # protoc has no types for the services; mypy-protobuf writes them, for the sync and the async API.
        outputs.append(f"--mypy_grpc_out=quiet:{folder}")
        command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'protos'}", *outputs]
        subprocess.run([*command, *map(str, sources)], check=True)
        return {
            f"workers/src/{path.relative_to(folder)}": path.read_text(encoding="utf-8")
            for path in Path(folder).rglob("*_pb2*")
        }


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


def main() -> int:
    """Write the files, or with ``check`` exit 1 where one is out of date."""
    if sys.argv[1:] not in (["write"], ["check"]):
        print(f"usage: {sys.argv[0]} write|check", file=sys.stderr)
        return 64
    files = generated()
    stale = outdated(files)
    if sys.argv[1] == "check":
        for name in stale:
            print(f"verify: {name} is not what `make generate` writes", file=sys.stderr)
        return 1 if stale else 0
    for name in stale:
        path = ROOT / name
        if name in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files[name], encoding="utf-8")
        else:
            path.unlink()
        print(f"generate: {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
