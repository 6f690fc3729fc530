"""Prometheus, for tests of alerts and dashboards: the one on ``PATH``, or Debian's, kept outside the tree.

``python -m observability.prometheus`` fetches the package where neither is there. It is unpacked, not
installed: no service is started.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

__all__ = ["fetch", "folder", "program"]

PROGRAMS = ("prometheus", "promtool")


def folder(variables: Mapping[str, str] = os.environ) -> Path:
    """Return where the programs are kept."""
    cache = Path(variables.get("UNMASK_CACHE") or Path.home() / ".cache" / "unmask")
    return cache.expanduser().absolute() / "prometheus"


def program(name: str) -> str | None:
    """Return where one of the two is, or ``None``."""
    fetched = folder() / name
    return str(fetched) if fetched.is_file() else shutil.which(name)


def fetch() -> str | None:
    """Fetch what is missing; return why that cannot be done, or ``None``."""
    if all(map(program, PROGRAMS)):
        return None
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        return "no apt-get and dpkg: install prometheus, and put it and promtool on PATH"
    folder().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder().parent) as name:
        made = Path(name)
        done = _run(["apt-get", "-qq", "download", "prometheus"], made)
        if done.returncode and not os.geteuid():  # the lists of packages may be empty
            _run(["apt-get", "-qq", "update"], made)
            done = _run(["apt-get", "-qq", "download", "prometheus"], made)
        if done.returncode:
            return f"apt-get download prometheus failed: {done.stderr.strip()[-500:]}"
        (package,) = made.glob("prometheus_*.deb")
        done = _run(["dpkg", "-x", package.name, "unpacked"], made)
        if done.returncode:
            return f"dpkg -x failed: {done.stderr.strip()[-500:]}"
        ready = made / "ready"
        ready.mkdir()
        for one in PROGRAMS:
            shutil.move(made / "unpacked/usr/bin" / one, ready / one)
        shutil.rmtree(folder(), ignore_errors=True)
        ready.rename(folder())
    return None


def _run(command: list[str], where: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, cwd=where, capture_output=True, text=True)


def main() -> int:
    """Fetch it where this can be; tests that want it are left out where it cannot, with the reason."""
    if why := fetch():
        print(f"prometheus: {why}; tests that want it are left out", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
