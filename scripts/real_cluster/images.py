"""Container images without a registry: those of the tests, and how a node gets them."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from real_cluster.programs import folder as programs

__all__ = ["import_images", "write_pause_image"]

_PAUSE = """\
#include <signal.h>
#include <unistd.h>
static void end(int number) { _exit(0); }
int main(void) {
  signal(SIGTERM, end);
  signal(SIGINT, end);
  for (;;) pause();
}
"""


def write_pause_image(name: str, path: Path) -> Path:
    """Write the image of a sandbox, a static program that waits for a signal, to the archive ``path``."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        source, made = Path(scratch, "pause.c"), Path(scratch, "pause")
        source.write_text(_PAUSE)
        subprocess.run(["cc", "-Os", "-static", "-s", source, "-o", made], check=True)
        layer = io.BytesIO()
        with tarfile.open(fileobj=layer, mode="w") as tar:
            tar.add(made, arcname="pause")
    content = layer.getvalue()
    digest = hashlib.sha256(content).hexdigest()
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": ["/pause"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    with tarfile.open(path, "w") as tar:
        for file, data in (
            ("config.json", json.dumps(config).encode()),
            ("manifest.json", json.dumps(manifest).encode()),
            ("layer.tar", content),
        ):
            entry = tarfile.TarInfo(file)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def import_images(socket: Path, archives: Sequence[Path]) -> None:
    """Load image archives into the containerd at ``socket``."""
    for archive in archives:
        command = [programs() / "ctr", "--address", socket, "--namespace", "k8s.io", "images", "import"]
        done = subprocess.run([*map(str, command), str(archive)], capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"{archive}: {done.stderr.strip()[-500:]}")
