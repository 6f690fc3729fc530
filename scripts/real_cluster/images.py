"""Container images without a registry: built from their Containerfiles, and unpacked once for all nodes.

``python -m real_cluster.images`` builds the operator's and the worker's image with buildah, on a base that
debootstrap makes, into the folder of the programs. What did not change is not built again: a layer is known
by what it is made from. A containerd then unpacks the images, and a node begins with a copy of that by links:
gigabytes are written once, not once per node. Only the standard library is used.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from real_cluster import programs
from real_cluster.programs import Missing

__all__ = ["NAMES", "build", "is_built", "link_unpacked", "reference", "write_pause_image"]

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("operator", "worker")
_BASE_PACKAGES = ("python3", "python3-venv", "ca-certificates")
# What either image is made from, below the root.
_SOURCES = ("pyproject.toml", "README.md", "LICENSE", "operator/src", "workers/src")
_TOOLS = {"buildah": "/usr/bin/buildah", "debootstrap": "/usr/sbin/debootstrap"}
# The files in which containerd notes what it has: it writes to these, and only adds others.
_NOTES = ("io.containerd.metadata.v1.bolt/meta.db", "io.containerd.snapshotter.v1.overlayfs/metadata.db")
_MOST = 20
"""Images that are kept unpacked: those of some checkouts, or of one as it changes."""
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


def reference(name: str) -> str:
    """Return what pods call the image of ``name``, made from this checkout."""
    return f"localhost/unmask-{name}:{_recipe(name)[:12]}"


def is_built() -> bool:
    """Return whether a node that starts now would have the images of this checkout."""
    return {reference(name) for name in NAMES} <= _unpacked()


def build() -> None:
    """Build the images of this checkout, and unpack them.

    Raises:
        Missing: This machine lacks something.
    """
    home = _home()
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_built():
            return
        programs.add_system_packages(_TOOLS)
        if len(_unpacked()) > _MOST:  # begin anew, or old ones would stay for ever
            _buildah("rmi", "--all", "--force")
            for note in ("unpacked.json", "layers.json"):
                (home / note).unlink(missing_ok=True)
            shutil.rmtree(home / "containerd")
        base = _base()
        tags = {name: reference(name) for name in NAMES}
        for name, tag in tags.items():
            with _step(f"building the image of the {name}"):
                _buildah(
                    "bud",
                    "--isolation=chroot",
                    "--layers",
                    "--pull-never",
                    "--format=oci",
                    f"--build-arg=BASE={base}",
                    *_index_settings(),
                    f"--file={ROOT / 'deploy' / 'images' / name / 'Containerfile'}",
                    f"--tag={tag}",
                    str(ROOT),
                )
        with _step("unpacking the images"):
            _unpack(list(tags.values()))


def link_unpacked(root: Path) -> None:
    """Give the containerd that will have ``root`` all images that were unpacked."""
    source = _home() / "containerd"
    if not source.is_dir():
        return
    with (_home() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        subprocess.run(["cp", "--archive", "--link", source, root], check=True)
        for note in _NOTES:
            (root / note).unlink()
            shutil.copy2(source / note, root / note)


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
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": ["/pause"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(content).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    with tarfile.open(path, "w") as archive:
        for file, data in (
            ("config.json", json.dumps(config).encode()),
            ("manifest.json", json.dumps(manifest).encode()),
            ("layer.tar", content),
        ):
            _add(archive, file, len(data), io.BytesIO(data))
    return path


def import_images(socket: Path, archives: Sequence[Path]) -> None:
    """Load image archives into the containerd at ``socket``."""
    for archive in archives:
        _import(socket, archive)


# --- building -----------------------------------------------------------------------------------------


def _home() -> Path:
    return programs.folder() / "images"


def _recipe(name: str) -> str:
    """Return the digest of all of this checkout that decides what is in the image of ``name``."""
    containerfile = ROOT / "deploy" / "images" / name / "Containerfile"
    paths = [containerfile, *sorted((ROOT / "requirements").glob("*.txt"))]
    for source in (ROOT / one for one in _SOURCES):
        below = source.rglob("*") if source.is_dir() else [source]
        paths += sorted(path for path in below if path.is_file() and "__pycache__" not in path.parts)
    digest = hashlib.sha256(repr((_BASE_PACKAGES, _suite())).encode())
    for path in paths:
        digest.update(f"{path.relative_to(ROOT)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _suite() -> str:
    """Return the name of this Debian, of which the base of the images is made."""
    with contextlib.suppress(OSError):
        for line in Path("/etc/os-release").read_text().splitlines():
            key, _, value = line.partition("=")
            if key == "VERSION_CODENAME":
                return value.strip('"')
    return ""


def _base() -> str:
    """Make the image of a small Debian with Python, or find it; return its name."""
    name = f"localhost/unmask-base:{_suite()}-{hashlib.sha256(repr(_BASE_PACKAGES).encode()).hexdigest()[:8]}"
    if not subprocess.run(_command("inspect", "--type=image", name), capture_output=True).returncode:
        return name
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format=$(SITE)", f"Codename: {_suite()}", "Created-By: Packages"],
        capture_output=True,
        text=True,
    ).stdout.split()
    if not listed:
        raise Missing("apt names no mirror of this system's release to make the images' base from")
    with tempfile.TemporaryDirectory(dir=_home()) as root, _step(f"making a base of {_suite()}"):
        packages = ",".join(_BASE_PACKAGES)
        _run("debootstrap", "--variant=minbase", f"--include={packages}", _suite(), root, listed[0])
        for path in (
            "var/cache/apt",
            "var/lib/apt/lists",
            "usr/share/doc",
            "usr/share/locale",
            "usr/share/man",
        ):
            shutil.rmtree(Path(root, path), ignore_errors=True)
            Path(root, path).mkdir()
        container = _buildah("from", "scratch").strip()
        _buildah("add", "--quiet", container, root, "/")
        _buildah("commit", "--quiet", "--format=oci", "--rm", container, name)
    return name


def _index_settings() -> list[str]:
    """Return the options that let a build use this machine's package index, certificates and caches."""
    options = []
    names = ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "SSL_CERT_FILE", "PIP_CERT")
    options += [f"--build-arg={name}={os.environ[name]}" for name in names if name in os.environ]
    certificates = {os.environ[name] for name in ("SSL_CERT_FILE", "PIP_CERT") if name in os.environ}
    options += [f"--volume={path}:{path}:ro" for path in sorted(certificates)]
    cache = Path(os.environ.get("UV_CACHE_DIR") or Path.home() / ".cache" / "uv")
    cache.mkdir(parents=True, exist_ok=True)
    return [*options, f"--volume={cache}:/var/cache/uv", "--build-arg=UV_CACHE_DIR=/var/cache/uv"]


def _command(*arguments: str) -> list[str]:
    home = _home()
    storage = ["--storage-driver=overlay", f"--root={home / 'storage'}", f"--runroot={home / 'run'}"]
    return ["buildah", *storage, *arguments]


def _buildah(*arguments: str) -> str:
    return _run(*_command(*arguments))


# --- unpacking ----------------------------------------------------------------------------------------


def _unpacked() -> set[str]:
    note = _home() / "unpacked.json"
    return set(json.loads(note.read_text())) if note.is_file() else set()


def _unpack(tags: Sequence[str]) -> None:
    """Have a containerd unpack images beside what it has; a node that starts meanwhile waits."""
    home = _home()
    before, layers = _unpacked(), _layers()
    for note in ("unpacked.json", "layers.json"):
        (home / note).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=home) as scratch:
        with _containerd(Path(scratch), home / "containerd") as socket:
            for tag in tags:
                archive = Path(scratch, "image.tar")
                layers |= _write_archive(tag, archive, without=layers)
                _import(socket, archive, "--local", "--discard-unpacked-layers")
                archive.unlink()
    (home / "layers.json").write_text(json.dumps(sorted(layers)))
    (home / "unpacked.json").write_text(json.dumps(sorted({*before, *tags})))


def _layers() -> set[str]:
    """Return the digests of the layers that are unpacked: containerd asks for nothing of such a layer."""
    note = _home() / "layers.json"
    return set(json.loads(note.read_text())) if note.is_file() else set()


def _write_archive(tag: str, path: Path, *, without: Collection[str]) -> set[str]:
    """Write an image as an OCI archive, less the layers ``without``; return the digests of all its layers.

    What buildah writes has all layers, gigabytes of them, so it is read as it comes and nothing but what is
    wanted is kept.
    """
    sizes: dict[str, int] = {}
    documents: dict[str, bytes] = {}
    pushing = _command("push", "--quiet", tag, f"docker-archive:/dev/stdout:{tag}")
    with (
        tarfile.open(path, "w") as made,
        subprocess.Popen(pushing, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as given,
    ):
        for entry in given:
            name, _, kind = entry.name.partition(".")
            if not entry.isfile():
                continue
            content = given.extractfile(entry)
            assert content is not None
            if kind == "json":
                documents[entry.name] = content.read()
            elif kind == "tar" and "/" not in name:
                digest = f"sha256:{name}"
                sizes[digest] = entry.size
                if digest not in without:
                    _add(made, f"blobs/sha256/{name}", entry.size, content)
        (described,) = json.loads(documents["manifest.json"])
        config = documents[described["Config"]]
        layers = json.loads(config)["rootfs"]["diff_ids"]
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": _blob(made, config, "application/vnd.oci.image.config.v1+json"),
            "layers": [
                {"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": one, "size": sizes[one]}
                for one in layers
            ],
        }
        described = _blob(made, json.dumps(manifest).encode(), manifest["mediaType"])
        described["annotations"] = {"io.containerd.image.name": tag}
        index = {"schemaVersion": 2, "manifests": [described]}
        for name, document in (("index.json", index), ("oci-layout", {"imageLayoutVersion": "1.0.0"})):
            data = json.dumps(document).encode()
            _add(made, name, len(data), io.BytesIO(data))
    return set(layers)


def _blob(archive: tarfile.TarFile, data: bytes, kind: object) -> dict[str, Any]:
    """Add a document to an OCI archive; return how others refer to it."""
    digest = hashlib.sha256(data).hexdigest()
    _add(archive, f"blobs/sha256/{digest}", len(data), io.BytesIO(data))
    return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data)}


def _add(archive: tarfile.TarFile, name: str, size: int, content: IO[bytes]) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = size
    archive.addfile(entry, content)


@contextlib.contextmanager
def _containerd(scratch: Path, root: Path) -> Iterator[Path]:
    socket = scratch / "containerd.sock"
    config = scratch / "containerd.toml"
    config.write_text(
        f'version = 3\nroot = "{root}"\nstate = "{scratch / "state"}"\n'
        "disabled_plugins = ['io.containerd.grpc.v1.cri', 'io.containerd.nri.v1.nri']\n"
        f'[grpc]\n  address = "{socket}"\n'
    )
    with (_home() / "containerd.log").open("wb") as log:
        command = [str(programs.folder() / "containerd"), f"--config={config}"]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        version = [str(programs.folder() / "ctr"), "--address", str(socket), "version"]
        end = time.monotonic() + 120
        while subprocess.run(version, capture_output=True).returncode:
            if time.monotonic() > end or process.poll() is not None:
                raise Missing(f"containerd does not answer; see {_home() / 'containerd.log'}")
            time.sleep(0.2)
        yield socket
    finally:
        process.terminate()
        process.wait()


def _import(socket: Path, archive: Path, *options: str) -> None:
    command = [str(programs.folder() / "ctr"), "--address", str(socket), "--namespace", "k8s.io"]
    _run(*command, "images", "import", *options, str(archive))


# --- effects ------------------------------------------------------------------------------------------


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise Missing(f"{command[0]} failed:\n{last}")
    return done.stdout


@contextlib.contextmanager
def _step(what: str) -> Iterator[None]:
    started = time.monotonic()
    print(f"images: {what} ...", end="", flush=True)
    try:
        yield
    except BaseException:
        print(" failed", flush=True)
        raise
    print(f" {time.monotonic() - started:.0f} s", flush=True)


def main() -> int:
    """Build the images; the same words and exit codes as for the programs."""
    return programs.attempt(build, "tests on a real node", node=True)


if __name__ == "__main__":
    sys.exit(main())
