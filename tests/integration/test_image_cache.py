"""The images of many trees on one machine: what is kept of them, and what a build clears that another left.

buildah and containerd are the real ones; the images are of no base and hold next to nothing.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from parent_death import bound
from real_cluster import images, programs, retention

pytestmark = [pytest.mark.slow, pytest.mark.real_images]

CONTAINERFILE = """\
ARG BASE
FROM ${BASE} AS wheel
COPY operator/src /src
FROM ${BASE}
COPY --from=wheel /src /opt/%s
"""
BUILD = """
import sys
from pathlib import Path
from real_cluster import images
home = Path(sys.argv[2])
images.ROOT, images._home, images._base = Path(sys.argv[1]), lambda: home, lambda: "scratch"
sys.exit(images.main())
"""
# A program that a step of a build waits for, for as long as it is let.
WAITS = "#include <unistd.h>\nint main(void) { for (;;) pause(); }\n"


class Cache:
    """A cache of images of its own, and a tree that changes."""

    def __init__(self, home: Path, tree: Path) -> None:
        self.home = home
        self.tree = tree

    def change(self, text: str) -> None:
        for name in images.NAMES:
            path = self.tree / "deploy" / "images" / name / "Containerfile"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(CONTAINERFILE % name)
        source = self.tree / "operator" / "src" / "module.py"
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text(text)

    def start(self) -> "subprocess.Popen[bytes]":
        """Start a process that builds the tree as it is."""
        command = [sys.executable, "-c", BUILD, str(self.tree), str(self.home)]
        scripts = str(Path(programs.__file__).parents[1])
        return subprocess.Popen(bound(command), env=os.environ | {"PYTHONPATH": scripts})

    def build(self, text: str) -> set[str]:
        """Build a tree with such a source; return what its images are called."""
        self.change(text)
        images.build()
        return {images.reference(name) for name in images.NAMES}

    def never_ending(self) -> str:
        """Have a step of the operator's image wait; return the path of the program that it runs."""
        name = f"/waits-{self.home.name}"
        source = self.tree / "waits.c"
        source.write_text(WAITS)
        subprocess.run(["cc", "-static", "-o", f"{self.tree}{name}", source], check=True)
        with (self.tree / "deploy" / "images" / "operator" / "Containerfile").open("a") as file:
            file.write(f'COPY {name[1:]} {name}\nRUN ["{name}"]\n')
        return name

    @property
    def mounts(self) -> list[str]:
        return images.mounts_below(Path("/proc/self/mounts").read_text(), str(self.home.resolve()))

    @property
    def containers(self) -> list[object]:
        found: list[object] = json.loads(
            (self.home / "storage/overlay-containers/containers.json").read_text()
        )
        return found

    @property
    def unpacked(self) -> set[str]:
        with images._unpacker() as socket:
            return set(images._ctr(socket, "images", "list", "--quiet").split())

    @property
    def sizes(self) -> dict[str, int]:
        """How much there is of what costs room."""
        snapshots = self.home / "containerd" / "io.containerd.snapshotter.v1.overlayfs" / "snapshots"
        blobs = self.home / "containerd" / "io.containerd.content.v1.content" / "blobs" / "sha256"
        return {
            "snapshots": len(list(snapshots.iterdir())),
            "blobs": len(list(blobs.iterdir())),
            "layers": len(json.loads((self.home / "storage/overlay-layers/layers.json").read_text())),
            "images, and steps on the way to one": len(images._buildah("images", "--all", "--quiet").split()),
        }


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cache]:
    # Beside the real one: not every file system can be below an overlay.
    with tempfile.TemporaryDirectory(prefix="images-of-a-test-", dir=programs.folder()) as folder:
        monkeypatch.setattr(images, "ROOT", tmp_path)
        monkeypatch.setattr(images, "_home", lambda: Path(folder))
        monkeypatch.setattr(images, "_base", lambda: "scratch")
        monkeypatch.setattr(images, "_held", [])
        made = Cache(Path(folder), tmp_path)
        yield made
        assert not made.mounts
        for file in images._held:
            os.close(file)


def test_of_many_trees_the_newest_and_the_held_ones_stay_and_no_more_room_is_taken(cache: Cache) -> None:
    first = cache.build("tree = 0\n")
    assert images.keep()
    others = [cache.build(f"tree = {number}\n") for number in range(1, 5)]
    before = cache.sizes
    others.append(cache.build("tree = 5\n"))
    kept = first.union(*others[-3:])
    assert set(retention.noted(cache.home)) == cache.unpacked == kept
    assert images._tagged() == kept | {images._stage_of(one) for one in kept}
    assert cache.sizes == before
    assert not cache.containers and not cache.mounts
    # Nothing is to be done for a tree that is there, and its turn counts.
    assert cache.build("tree = 3\n") == others[2]
    newest = max(retention.noted(cache.home).values())
    assert {one for one, when in retention.noted(cache.home).items() if when == newest} == others[2]


def test_a_build_that_fails_leaves_no_mount_and_the_images_before_it(cache: Cache) -> None:
    first = cache.build("tree = 0\n")
    cache.change("tree = 1\n")
    with (cache.tree / "deploy" / "images" / "worker" / "Containerfile").open("a") as file:
        file.write('RUN ["/there-is-no-such-program"]\n')
    with pytest.raises(programs.Missing, match="there-is-no-such-program"):
        images.build()
    assert not cache.mounts and not cache.containers
    assert set(retention.noted(cache.home)) == cache.unpacked == first
    second = cache.build("tree = 1\n")
    assert set(retention.noted(cache.home)) == cache.unpacked == first | second


def test_checkouts_that_build_at_once_take_turns(cache: Cache) -> None:
    trees = [Cache(cache.home, cache.tree / name) for name in ("a", "b", "c")]
    for number, tree in enumerate(trees):
        tree.change(f"tree = {number}\n")
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(tree.start()) for tree in trees]
        assert [process.wait(timeout=300) for process in started] == [0] * len(trees)
    assert len(retention.noted(cache.home)) == len(trees) * len(images.NAMES)
    assert set(retention.noted(cache.home)) == cache.unpacked
    assert not cache.containers


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["asked to end", "killed"])
def test_what_a_build_leaves_that_is_ended_is_gone_after_the_next(cache: Cache, number: int) -> None:
    first = cache.build("tree = 0\n")
    cache.change("tree = 1\n")
    waits = cache.never_ending()
    with cache.start() as process:
        try:
            until(lambda: processes(waits), "the step that waits")
            assert cache.mounts and cache.containers
            process.send_signal(number)
            ended = process.wait(timeout=60)
        finally:
            process.kill()
            for one in processes(waits):
                os.kill(one, signal.SIGKILL)
    if number == signal.SIGTERM:
        assert ended == 128 + number
    else:
        assert cache.mounts and cache.containers, "nothing was left, which proves nothing"
    second = cache.build("tree = 1\n")
    assert not cache.mounts and not cache.containers
    assert sorted(path.name for path in cache.home.iterdir() if path.name.startswith("tmp")) == ["tmp"]
    assert not list((cache.home / "tmp").iterdir())
    assert set(retention.noted(cache.home)) == cache.unpacked == first | second


def processes(program: str) -> list[int]:
    """Return the processes that run a program of that path, wherever its root is."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            if path.read_text() == f"{program}\0":
                found.append(int(path.parent.name))
    return found


def until(true: Callable[[], object], what: str) -> None:
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.05)
