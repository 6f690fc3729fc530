"""What decides whether programs and images of the real clusters are made again."""

import re
import shutil
from pathlib import Path

import pytest

from real_cluster import images, programs

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
