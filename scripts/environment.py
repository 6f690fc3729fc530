"""Makes the Python environment that every make target runs in, outside the tree, from pinned hashes.

``environment.py path`` prints the environment's folder; ``environment.py setup`` makes it, or returns at
once where it is complete, and ``environment.py setup-eval`` adds what only evaluation needs. ``environment.py
setup-torchx-nightly`` makes a small second one, without torch, beside it, with the TorchX and the Kubernetes
client that the first cannot have, and ``environment.py path-torchx-nightly`` prints its folder. Only the
standard library is used: this is the first thing that runs on a fresh machine. The folder's name holds a
digest of all that decides its content (interpreter, requirements, where this checkout lies), so checkouts
and branches never share a wrong one. Set-up killed half-way leaves no stamp, and the next call starts that
folder anew.

Environment variables:
    UNMASK_CACHE: where environments are kept, instead of ``~/.cache/unmask``.
    TORCH_INDEX: a package index of your own for torch, for example one with smaller wheels. Its wheels have
        other hashes than the locked ones, so they are pinned by version alone.
"""

from __future__ import annotations  # a Python too old for this project should read far enough to say so

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
SUPPORTED = ((3, 11), (3, 13))
# What the second environment is made from, and the first is not.
_SECOND = "torchx-nightly.txt"
# What torch from PyPI brings along for its GPU, and another index's torch may not want.
_OF_TORCH = re.compile(r"(torch|triton|nvidia-|cuda-)")


class SetupError(Exception):
    """Set-up cannot go on; the text says what is missing and what to do."""


def environment(variables: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of this checkout's environment, whether or not it exists yet."""
    locks = sorted(path for path in REQUIREMENTS.glob("*.txt") if path.name != _SECOND)
    return _folder(locks, variables, variables.get("TORCH_INDEX", ""))


def second_environment(variables: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of the environment with the other TorchX, whether or not it exists yet."""
    return _folder([REQUIREMENTS / _SECOND], variables, _SECOND)


def _folder(locks: list[Path], variables: Mapping[str, str], kind: str) -> Path:
    default = Path(variables.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unmask"
    parts = [
        str(ROOT),
        os.path.realpath(sys.executable),
        sys.version,
        kind,
        *(path.read_text(encoding="utf-8") for path in locks),
    ]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
    cache = Path(variables.get("UNMASK_CACHE") or default)
    return cache.expanduser().absolute() / f"venv-{sys.version_info[0]}.{sys.version_info[1]}-{digest}"


def setup(folder: Path) -> None:
    """Complete the environment in ``folder``: the pinned packages, and this checkout as an editable install.

    Raises:
        SetupError: This Python cannot be used, or an installer failed.
    """
    started = time.monotonic()
    stamp = folder / "complete"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == _project_digest():
        return
    _require_python()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.parent / f"{folder.name}.lock"):
        if not stamp.is_file():
            _install_requirements(folder)
        with _step("installing this checkout"):
            _uv(folder, "--offline", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
        stamp.write_text(_project_digest(), encoding="utf-8")
    _remove_orphans(folder.parent)
    _say(f"ready in {time.monotonic() - started:.0f} s: {folder}")


def add_evaluation(folder: Path) -> None:
    """Add the packages of evaluation to the complete environment in ``folder``.

    Raises:
        SetupError: An installer failed.
    """
    stamp = folder / "evaluation"  # the folder's name holds the digest of what is added
    if stamp.is_file():
        return
    with _lock(folder.parent / f"{folder.name}.lock"), _step("adding the packages of evaluation (340 MB)"):
        locked = str(REQUIREMENTS / "eval.txt")
        _uv(folder, "--no-build", "--no-deps", "--require-hashes", "-r", locked)
        stamp.touch()


def set_up_second(folder: Path, first: Path) -> None:
    """Complete the second environment in ``folder`` with the installer of the complete ``first``.

    Raises:
        SetupError: An installer failed.
    """
    stamp = folder / "complete"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == _project_digest():
        return
    with _lock(folder.parent / f"{folder.name}.lock"), _step("making the environment of torchx-nightly"):
        if not stamp.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            venv.create(folder, symlinks=True)
            (folder / "checkout").write_text(str(ROOT), encoding="utf-8")
            locked = str(REQUIREMENTS / _SECOND)
            _uv(first, "--no-build", "--no-deps", "--require-hashes", "-r", locked, into=folder)
        _uv(first, "--offline", "--no-deps", "--no-build-isolation", "--editable", str(ROOT), into=folder)
        stamp.write_text(_project_digest(), encoding="utf-8")


def _install_requirements(folder: Path) -> None:
    with _step(f"making an environment for Python {sys.version.split()[0]}"):
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True, symlinks=True)
        (folder / "checkout").write_text(str(ROOT), encoding="utf-8")
    with _step("fetching uv, the installer"):
        pip = [_python(folder), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _run([*pip, "--only-binary=:all:", "--require-hashes", "-r", str(REQUIREMENTS / "uv.txt")])
    locked, torch = _requirements(os.environ.get("TORCH_INDEX", ""))
    with _step(f"installing {len(locked)} pinned packages (5.6 GB on disk, nearly all of it torch)"):
        listing = folder / "requirements.txt"
        listing.write_text("".join(locked), encoding="utf-8")
        _uv(folder, "--no-build", "--no-deps", "--require-hashes", "-r", str(listing))
    if torch:
        with _step(f"installing {torch} from TORCH_INDEX, by version, without a hash"):
            _uv(folder, "--no-build", "--no-deps", "--default-index", os.environ["TORCH_INDEX"], torch)


def _remove_orphans(cache: Path) -> None:
    """Remove the environments whose checkouts are gone; nothing else would."""
    for note in cache.glob("venv-*/checkout"):
        if not Path(note.read_text(encoding="utf-8")).is_dir():
            shutil.rmtree(note.parent, ignore_errors=True)


def _requirements(torch_index: str) -> tuple[list[str], str | None]:
    """Return the locked requirements to install, and torch's pin where it comes from ``torch_index``."""
    texts = [(REQUIREMENTS / name).read_text(encoding="utf-8") for name in ("dev.txt", "data.txt")]
    locked = [block for text in texts for block in re.split(r"^(?=\w)", text, flags=re.MULTILINE) if block]
    if not torch_index:
        return locked, None
    (torch,) = (block.split()[0] for block in locked if block.startswith("torch=="))
    return [block for block in locked if not _OF_TORCH.match(block) or block.startswith("torchx")], torch


def _require_python() -> None:
    low, high = SUPPORTED
    if not low <= sys.version_info[:2] <= high:
        raise SetupError(
            f"Python {sys.version.split()[0]} cannot be used, 3.{low[1]} to 3.{high[1]} can: "
            "make setup PYTHON=/path/to/python3"
        )
    if importlib.util.find_spec("ensurepip") is None:
        _install_system_package(f"python3.{sys.version_info[1]}-venv")


def _install_system_package(name: str) -> None:
    """Install the Debian package that gives this Python its venv module, or say what would."""
    missing = f"{sys.executable} lacks the modules venv and ensurepip"
    if os.geteuid() or not shutil.which("apt-get") or not sys.executable.startswith("/usr/bin/"):
        raise SetupError(
            f"{missing}: install them (on Debian or Ubuntu: apt-get install {name}), "
            "or use another Python: make setup PYTHON=/path/to/python3"
        )
    with _step(f"{missing}, installing {name}"):
        _run(["apt-get", "update", "-qq"])
        _run(["apt-get", "install", "-qq", "--yes", "--no-install-recommends", name])


def _project_digest() -> str:
    """The digest of what an editable install copies from the tree: names, entry points, package roots."""
    return hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()


def _python(folder: Path) -> str:
    return str(folder / "bin" / "python")


def _uv(folder: Path, *arguments: str, into: Path | None = None) -> None:
    """Install, and compile what was installed.

    Where PYTHONDONTWRITEBYTECODE is set, as in many container images, Python compiles the sources of torch
    anew in every process that imports it, and the tests start thousands: that is most of what they take.
    """
    installer = [str(folder / "bin" / "uv"), "pip", "install", "--quiet", "--compile-bytecode"]
    command = [*installer, "--python", _python(into or folder), *arguments]
    _run(command, env={**os.environ, **_pip_index(folder)})


def _pip_index(folder: Path) -> dict[str, str]:
    """What pip is told about its index and certificates, in uv's words: uv reads none of pip's settings."""
    listed = subprocess.run(
        [_python(folder), "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    settings = {
        key.rpartition(".")[2]: shlex.split(value)[0]
        for key, _, value in (line.partition("=") for line in listed.splitlines())
        if value
    }
    names = {"index-url": "UV_DEFAULT_INDEX", "cert": "SSL_CERT_FILE"}
    chosen = {names[key]: value for key, value in settings.items() if key in names}
    if "UV_INDEX_URL" in os.environ:
        chosen.pop("UV_DEFAULT_INDEX", None)
    return {name: value for name, value in chosen.items() if name not in os.environ}


def _run(command: list[str], env: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        last = "\n".join(done.stdout.strip().splitlines()[-15:])
        raise SetupError(f"this failed with exit code {done.returncode}: {shlex.join(command)}\n{last}")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Wait until no other set-up works on the same folder."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _step(what: str) -> Iterator[None]:
    started = time.monotonic()
    print(f"setup: {what} ...", end="", flush=True)
    try:
        yield
    except SetupError:
        print(" failed", flush=True)
        raise
    print(f" {time.monotonic() - started:.1f} s", flush=True)


def _say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def main() -> int:
    """Print an environment's folder, make it, or add to it."""
    printed = {"path": environment, "path-torchx-nightly": second_environment}
    made = {
        "setup": lambda: setup(environment()),
        "setup-eval": lambda: add_evaluation(environment()),
        "setup-torchx-nightly": lambda: set_up_second(second_environment(), environment()),
    }
    task = sys.argv[1] if len(sys.argv) == 2 else ""
    if task in printed:
        print(printed[task]())
        return 0
    if task not in made:
        print(f"usage: {sys.argv[0]} {'|'.join([*printed, *made])}", file=sys.stderr)
        return 64
    try:
        made[task]()
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
