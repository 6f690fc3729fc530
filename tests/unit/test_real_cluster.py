"""What decides whether programs and images of the real clusters are made again, and which images stay."""

import hashlib
import json
import os
import re
import shutil
import threading
from pathlib import Path

import pytest

from real_cluster import images, programs, retention

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNMASK_CLUSTER", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def test_a_program_is_there_only_while_its_recipe_is_that_of_the_pins(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    etcd = programs.API[0]
    assert programs.missing([etcd]) == [etcd]
    (cache / "etcd").touch()
    assert programs.missing([etcd]) == [etcd]
    (cache / "etcd.recipe").write_text(etcd.recipe())
    assert programs.missing([etcd]) == []
    shutil.copytree(programs.HERE / "pins", tmp_path / "pins")
    monkeypatch.setattr(programs, "HERE", tmp_path)
    assert programs.missing([etcd]) == []
    with (tmp_path / "pins" / "etcd" / "go.sum").open("a") as pins:
        pins.write("\n")
    assert programs.missing([etcd]) == [etcd]


def test_where_it_cannot_be_done_that_is_said_and_in_ci_it_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        raise programs.Missing("no Go")

    monkeypatch.delenv("CI", raising=False)
    assert programs.attempt(work, "some tests", node=False) == 0
    assert capsys.readouterr().err == "cluster: no Go\ncluster: some tests are left out\n"
    monkeypatch.setenv("CI", "true")
    assert programs.attempt(work, "some tests", node=False) == 1
    assert "no Go" in capsys.readouterr().err


def test_an_image_is_named_after_its_sources_and_not_after_bytecode(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE", "deploy/images", "requirements"):
        source, target = ROOT / name, tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    for name in ("operator/src", "workers/src"):
        (tmp_path / name / "package").mkdir(parents=True)
        (tmp_path / name / "package" / "module.py").write_text("one = 1\n")
    monkeypatch.setattr(images, "ROOT", tmp_path)
    before = images.reference("worker")
    package = tmp_path / "workers" / "src" / "package"
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "module.pyc").touch()
    assert images.reference("worker") == before != images.reference("operator")
    (package / "module.py").write_text("one = 2\n")
    assert images.reference("worker") != before


@pytest.mark.parametrize("name", images.NAMES)
def test_an_image_takes_its_base_as_an_argument_and_its_packages_by_hash(name: str) -> None:
    text = (ROOT / "deploy" / "images" / name / "Containerfile").read_text()
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) == {"${BASE}"}
    assert re.findall(r"^ARG BASE(.*)$", text, re.MULTILINE) == [""]
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["10001:10001"]
    text = re.sub(r"\\\n", " ", text)
    installs = re.findall(r"pip install [^&\n]*", text)
    assert len(installs) >= 3
    for line in installs:
        assert "--require-hashes" in line or "--no-deps --no-build-isolation" in line, line


def used(**times: float) -> dict[str, float]:
    """Return images of two names for each tree, and when they were wanted."""
    return {
        f"localhost/unmask-{name}:{tree}": time for tree, time in times.items() for name in ("one", "two")
    }


@pytest.mark.parametrize(
    ("there", "current", "held", "gone"),
    [
        pytest.param({}, "", "", "", id="nothing is there"),
        pytest.param({"a": 1}, "a", "", "", id="one tree"),
        pytest.param({"a": 1, "b": 2, "c": 3}, "c", "", "", id="the current tree and two others"),
        pytest.param({"a": 2, "b": 1, "c": 3, "d": 4}, "d", "", "b", id="the oldest goes"),
        pytest.param({"a": 2, "b": 1, "c": 3, "d": 4}, "b", "", "a", id="the current tree is the oldest"),
        pytest.param({"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}, "e", "a", "b", id="the oldest is held"),
        pytest.param({"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}, "e", "abcd", "", id="all are held"),
        pytest.param({"a": 0, "b": 0, "c": 0, "d": 1}, "d", "", "a", id="none is older: some two stay"),
        pytest.param({"a": 1, "b": 2, "c": 3, "d": 4}, "x", "", "ab", id="the current tree has none yet"),
    ],
)
def test_the_current_tree_s_images_stay_with_those_held_and_the_two_newest_others(
    there: dict[str, float], current: str, held: str, gone: str
) -> None:
    found = retention.superseded(
        used(**there), current=used(**dict.fromkeys(current, 0.0)), held=used(**dict.fromkeys(held, 0.0))
    )
    assert found == set(used(**dict.fromkeys(gone, 0.0)))


def test_what_stays_is_bounded_however_many_trees_are_built_in_turn() -> None:
    there: dict[str, float] = {}
    for number in range(20):
        current = used(**{f"tree{number}": number})
        there |= current
        for one in retention.superseded(there, current=current, held=()):
            del there[one]
        assert set(current) <= set(there)
    assert set(there) == set(used(tree17=0.0, tree18=0.0, tree19=0.0))
    # Two checkouts that take turns find their images, whatever came before.
    for turn in range(20, 30):
        current = used(**{("tree18", "tree19")[turn % 2]: turn})
        assert set(current) <= set(there)
        there |= current
        for one in retention.superseded(there, current=current, held=()):
            del there[one]


def test_the_note_of_an_older_version_is_read(tmp_path: Path) -> None:
    assert retention.noted(tmp_path) == {}
    (tmp_path / "unpacked.json").write_text(json.dumps(["a:1", "b:2"]))
    assert retention.noted(tmp_path) == {"a:1": 0.0, "b:2": 0.0}
    retention.note(tmp_path, {"a:1": 3.5})
    assert retention.noted(tmp_path) == {"a:1": 3.5}


def test_an_image_is_held_by_as_many_as_like_until_the_last_lets_go(tmp_path: Path) -> None:
    everything = ["a:1", "b/c:2", "d:3"]

    def free() -> set[str]:
        with retention.unheld(tmp_path, everything) as found:
            return found

    first, second = retention.hold(tmp_path, ["a:1"]), retention.hold(tmp_path, ["a:1", "b/c:2"])
    assert free() == {"d:3"}
    for file in first:
        os.close(file)
    assert free() == {"d:3"}
    for file in second:
        os.close(file)
    assert free() == set(everything)


def test_who_asks_for_images_that_are_about_to_go_is_told_that_they_are_gone(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = cache / "images"
    home.mkdir()
    monkeypatch.setattr(images, "_held", [])
    mine = [images.reference(name) for name in images.NAMES]
    assert not images.keep()
    retention.note(home, dict.fromkeys(mine, 1.0))
    answers: list[bool] = []
    asking = threading.Thread(target=lambda: answers.append(images.keep()))
    with retention.unheld(home, mine) as free:
        assert free == set(mine)
        asking.start()
        # It waits for a lock, or has not come so far; in either case it has no answer yet.
        asking.join(timeout=0.2)
        assert not answers
        retention.note(home, {})
        retention.forget(home, free)
    asking.join(timeout=60)
    assert answers == [False]
    retention.note(home, dict.fromkeys(mine, 1.0))
    assert images.keep()
    with retention.unheld(home, mine) as free:
        assert free == set()
    for file in images._held:
        os.close(file)


def test_a_layer_is_known_by_all_that_it_lies_on() -> None:
    one, two, three = (f"sha256:{hashlib.sha256(bytes([number])).hexdigest()}" for number in range(3))

    def slow(*layers: str) -> str:
        """As the specification defines it."""
        if len(layers) == 1:
            return layers[0]
        return f"sha256:{hashlib.sha256(f'{slow(*layers[:-1])} {layers[-1]}'.encode()).hexdigest()}"

    assert images.chain_ids([]) == []
    assert images.chain_ids([one, two, three]) == [slow(one), slow(one, two), slow(one, two, three)]
    assert images.chain_ids([one, three])[1] not in images.chain_ids([one, two, three])


def test_mounts_are_found_below_a_folder_alone_and_the_uppermost_come_first() -> None:
    table = """\
/dev/vda / ext4 rw 0 0
overlay /cache/images/a/merged overlay rw,lowerdir=/cache/images/b 0 0
proc /cache/images/a/merged/proc proc rw 0 0
tmpfs /cache/images-of-another tmpfs rw 0 0
/dev/vda /cache/images/with\\040room/x ext4 rw 0 0
/cache/images/source /elsewhere ext4 rw 0 0
"""
    assert images.mounts_below(table, "/cache/images") == [
        "/cache/images/with room/x",
        "/cache/images/a/merged/proc",
        "/cache/images/a/merged",
    ]
