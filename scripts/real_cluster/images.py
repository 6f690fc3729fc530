"""Container images without a registry: built from their Containerfiles, and unpacked once for all nodes.

``python -m real_cluster.images`` builds the operator's and the worker's image with buildah, on a base that
debootstrap makes, into the folder of the programs. What did not change is not built again: a layer is known
by what it is made from. A containerd then unpacks the images, and a node begins with a copy of that by links:
gigabytes are written once, not once per node. What newer trees have superseded is removed
(:mod:`real_cluster.retention`), and what a build leaves behind that fails or is killed. Only the standard
library is used.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from parent_death import bound
from real_cluster import programs, retention
from real_cluster.programs import Missing

__all__ = [
    "NAMES",
    "build",
    "chain_ids",
    "import_images",
    "keep",
    "link_unpacked",
    "mounts_below",
    "reference",
    "write_pause_image",
]

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("operator", "worker")
_BASE_PACKAGES = ("python3", "python3-venv", "ca-certificates")
# What either image is made from, below the root.
_SOURCES = ("pyproject.toml", "README.md", "LICENSE", "operator/src", "workers/src")
_TOOLS = {"buildah": "/usr/bin/buildah", "debootstrap": "/usr/sbin/debootstrap"}
# The files in which containerd notes what it has: it writes to these, and only adds others.
_NOTES = ("io.containerd.metadata.v1.bolt/meta.db", "io.containerd.snapshotter.v1.overlayfs/metadata.db")
# The stage of either Containerfile before the last one. It has a name, too: so all that a build may use again
# is part of something that has one, and the rest can go.
_STAGE = "wheel"
_held: list[int] = []
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


def keep() -> bool:
    """Return whether a node would have the images of this checkout; they stay until this process ends."""
    home, wanted = _home(), {reference(name) for name in NAMES}
    if not wanted <= retention.noted(home).keys():
        return False
    _held.extend(retention.hold(home, wanted))
    return wanted <= retention.noted(home).keys()  # they may have gone just before they were held


def build() -> None:
    """Build the images of this checkout and unpack them, unless they are there; remove what is superseded.

    Raises:
        Missing: This machine lacks something.
    """
    home = _home()
    home.mkdir(parents=True, exist_ok=True)
    tags = {name: reference(name) for name in NAMES}
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _clear()  # what one left that was killed
        if set(tags.values()) <= retention.noted(home).keys():
            _note_use(tags.values())
            return
        try:
            _make(tags)
        finally:
            _clear()


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


def _make(tags: Mapping[str, str]) -> None:
    programs.add_system_packages(_TOOLS)
    base = _base()
    for name, tag in tags.items():
        with _step(f"building the image of the {name}"):
            for wanted in ([f"--target={_STAGE}", f"--tag={_stage_of(tag)}"], [f"--tag={tag}"]):
                _buildah(
                    "bud",
                    "--isolation=chroot",
                    "--layers",
                    "--pull-never",
                    "--format=oci",
                    f"--build-arg=BASE={base}",
                    *_index_settings(),
                    f"--file={ROOT / 'deploy' / 'images' / name / 'Containerfile'}",
                    *wanted,
                    str(ROOT),
                )
    with _unpacker() as socket:
        with _step("unpacking the images"):
            _forget_all_but(retention.noted(_home()).keys(), socket)
            _unpack(tags.values(), socket)
        with _step("removing what is superseded"):
            kept = _retain(tags.values())
            _forget_all_but(kept, socket)
            _untag_all_but({base, *kept, *map(_stage_of, kept)})


def _stage_of(tag: str) -> str:
    """Return the name of the stage before the image of that name."""
    name, _, recipe = tag.rpartition(":")
    return f"{name}-{_STAGE}:{recipe}"


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
    return _run(*_command(*arguments), **_scratch())


def _scratch() -> dict[str, str]:
    """Return the variable by which programs keep their scratch files, gigabytes, where they are cleared."""
    folder = _home() / "tmp"
    folder.mkdir(exist_ok=True)
    return {"TMPDIR": str(folder)}


# --- unpacking ----------------------------------------------------------------------------------------


def chain_ids(layers: Iterable[str]) -> list[str]:
    """Return by what containerd knows each layer where it is unpacked: it, and all those that it lies on.

    From the digests of an image's layers, ``sha256:...``, the lowest first: the ChainID of the OCI image
    specification.
    """
    chains: list[str] = []
    for layer in layers:
        both = f"{chains[-1]} {layer}" if chains else ""
        chains.append(f"sha256:{hashlib.sha256(both.encode()).hexdigest()}" if both else layer)
    return chains


def _unpack(tags: Collection[str], socket: Path) -> None:
    """Have containerd unpack images beside what it has; a node that starts meanwhile waits."""
    known = retention.noted(_home()).keys() & _tagged()
    there = {chain for tag in known for chain in chain_ids(_layers(tag))}
    archive = socket.parent / "image.tar"
    for tag in tags:
        _write_archive(tag, archive, unpacked=there)
        _import(socket, archive, "--local", "--discard-unpacked-layers")
        archive.unlink()
        there.update(chain_ids(_layers(tag)))
    _note_use(tags)


def _layers(tag: str) -> list[str]:
    """Return the digests of an image's layers, the lowest first."""
    described = json.loads(_buildah("inspect", "--type=image", tag))
    return [str(one) for one in described["OCIv1"]["rootfs"]["diff_ids"]]


def _tagged() -> set[str]:
    """Return the names of the images that buildah has."""
    told = _buildah("images", "--noheading", "--format={{.Name}}:{{.Tag}}")
    return {one for one in told.split() if not one.startswith("<none>")}


def _write_archive(tag: str, path: Path, *, unpacked: Collection[str]) -> None:
    """Write an image as an OCI archive, less the layers whose chains are ``unpacked``: nobody asks for those.

    What buildah writes has all layers, gigabytes of them, so it is read as it comes and nothing but what is
    wanted is kept.
    """
    layers = _layers(tag)
    wanted = {one for one, chain in zip(layers, chain_ids(layers), strict=True) if chain not in unpacked}
    sizes: dict[str, int] = {}
    documents: dict[str, bytes] = {}
    pushing = bound(_command("push", "--quiet", tag, f"docker-archive:/dev/stdout:{tag}"))
    with (
        tarfile.open(path, "w") as made,
        subprocess.Popen(pushing, stdout=subprocess.PIPE, env=os.environ | _scratch()) as process,
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
                if digest in wanted:
                    _add(made, f"blobs/sha256/{name}", entry.size, content)
        (described,) = json.loads(documents["manifest.json"])
        config = documents[described["Config"]]
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
def _unpacker() -> Iterator[Path]:
    """Run the containerd whose images nodes begin with; yield its socket, which is in a scratch folder."""
    with (
        tempfile.TemporaryDirectory(dir=_home()) as scratch,
        _containerd(Path(scratch), _home() / "containerd") as socket,
    ):
        yield socket


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
        process = subprocess.Popen(bound(command), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
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
    _ctr(socket, "images", "import", *options, str(archive))


def _ctr(socket: Path, *arguments: str) -> str:
    program = str(programs.folder() / "ctr")
    return _run(program, "--address", str(socket), "--namespace", "k8s.io", *arguments)


# --- removing -----------------------------------------------------------------------------------------


def _note_use(tags: Iterable[str]) -> None:
    retention.note(_home(), retention.noted(_home()) | dict.fromkeys(tags, time.time()))


def _retain(current: Collection[str]) -> set[str]:
    """Decide which images stay, and note those alone: nobody begins to use one that is about to go."""
    home = _home()
    used = retention.noted(home)
    with retention.unheld(home, used.keys() - set(current)) as free:
        held = used.keys() - free
        gone = retention.superseded(used, current=current, held=held)
        retention.note(home, {one: when for one, when in used.items() if one not in gone})
        retention.forget(home, gone)
    (home / "layers.json").unlink(missing_ok=True)  # of an older version, which would believe it
    return used.keys() - gone


def _forget_all_but(kept: Collection[str], socket: Path) -> None:
    """Remove all other images from containerd, and wait until their room is free."""
    if others := sorted(set(_ctr(socket, "images", "list", "--quiet").split()) - set(kept)):
        _ctr(socket, "images", "remove", "--sync", *others)


def _untag_all_but(kept: Collection[str]) -> None:
    """Remove all other images from buildah's storage, and every layer that none of ``kept`` is made of."""
    if others := sorted(_tagged() - set(kept)):
        _buildah("rmi", *others)
    _buildah("rmi", "--prune")


def _clear() -> None:
    """Remove what a build leaves behind that fails or is killed: mounts, containers, scratch files."""
    home = _home()
    _unmount_all_below(home)
    for scratch in home.glob("tmp*"):
        shutil.rmtree(scratch, ignore_errors=True)
    shutil.rmtree(home / "run", ignore_errors=True)  # where buildah notes what it has mounted
    if (home / "storage").is_dir() and shutil.which("buildah"):
        _buildah("rm", "--all")
        _unmount_all_below(home)


def mounts_below(table: str, folder: str) -> list[str]:
    """Return what is mounted below ``folder`` by a table like ``/proc/self/mounts``, the uppermost first."""
    places = [line.split()[1] for line in table.splitlines()]
    places = [re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), one) for one in places]
    return [one for one in reversed(places) if one.startswith(f"{folder}/")]


def _unmount_all_below(folder: Path) -> None:
    if places := mounts_below(Path("/proc/self/mounts").read_text(), str(folder.resolve())):
        _run("umount", "--lazy", *places)  # a process that was killed may still be ending in there


# --- effects ------------------------------------------------------------------------------------------


def _run(*command: str, **variables: str) -> str:
    """Run a program, which ends with this process; return what it prints."""
    done = subprocess.run(bound(command), capture_output=True, text=True, env=os.environ | variables)
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
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # and clear what was begun
    return programs.attempt(build, "tests on a real node", node=True)


if __name__ == "__main__":
    sys.exit(main())
