"""The environment that `make setup` makes: where it lies and what decides that it is made anew."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script():
    """The set-up script as a module of its own, so that a test may change what it looks at."""
    spec = importlib.util.spec_from_file_location("environment", ROOT / "scripts/environment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_environment_lies_in_the_cache_and_never_in_the_tree(script, tmp_path):
    assert script.environment({"UNMASK_CACHE": str(tmp_path)}).parent == tmp_path
    assert script.environment({"XDG_CACHE_HOME": str(tmp_path)}).parent == tmp_path / "unmask"
    assert script.environment({}).parent == Path.home() / ".cache/unmask"


def test_other_requirements_another_index_and_another_checkout_make_another_environment(
    script, tmp_path, monkeypatch
):
    first = script.environment({})
    assert script.environment({"TORCH_INDEX": "a"}) != first
    monkeypatch.setattr(script, "REQUIREMENTS", tmp_path)
    assert script.environment({}) != first
    monkeypatch.undo()
    monkeypatch.setattr(script, "ROOT", tmp_path)
    assert script.environment({}) != first
    monkeypatch.undo()
    assert script.environment({}) == first


def test_the_second_environment_depends_on_its_own_lock_alone(script, tmp_path, monkeypatch):
    for name in ("dev.txt", "torchx-nightly.txt"):
        (tmp_path / name).write_text("a==1")
    monkeypatch.setattr(script, "REQUIREMENTS", tmp_path)
    first, second = script.environment({}), script.second_environment({})
    assert first != second and first.parent == second.parent
    (tmp_path / "torchx-nightly.txt").write_text("a==2")
    assert script.environment({}) == first and script.second_environment({}) != second
    second = script.second_environment({})
    (tmp_path / "dev.txt").write_text("a==3")
    assert script.environment({}) != first and script.second_environment({}) == second


def test_the_second_environment_is_made_with_the_installer_of_the_first(script, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(script, "_run", lambda command, env=None: commands.append(command))
    monkeypatch.setattr(script, "_pip_index", lambda folder: {})
    first, second = tmp_path / "first", tmp_path / "second"
    script.set_up_second(second, first)
    script.set_up_second(second, first)
    assert [command[0] for command in commands] == [str(first / "bin" / "uv")] * 2
    assert all(str(second / "bin" / "python") in command for command in commands)
    assert "--require-hashes" in commands[0] and commands[1][-1] == str(ROOT)
    assert all("--compile-bytecode" in command for command in commands)


def test_an_environment_without_its_stamp_is_made_anew_and_one_with_it_is_left_alone(
    script, tmp_path, monkeypatch
):
    made = []
    monkeypatch.setattr(script, "_install_requirements", lambda folder: (made.append(folder), folder.mkdir()))
    monkeypatch.setattr(script, "_uv", lambda folder, *arguments: made.append(arguments[-1]))
    folder = tmp_path / "venv"
    script.setup(folder)
    script.setup(folder)
    assert made == [folder, str(ROOT)]
    (folder / "complete").write_text("another pyproject.toml")
    script.setup(folder)
    assert made == [folder, str(ROOT), str(ROOT)]


def test_the_packages_of_evaluation_are_added_once(script, tmp_path, monkeypatch):
    added = []
    monkeypatch.setattr(script, "_uv", lambda folder, *arguments: added.append(arguments))
    (tmp_path / "venv").mkdir()
    script.add_evaluation(tmp_path / "venv")
    script.add_evaluation(tmp_path / "venv")
    assert len(added) == 1
    assert {"--no-build", "--no-deps", "--require-hashes"} <= set(added[0])


def test_environments_of_checkouts_that_are_gone_are_removed(script, tmp_path):
    for name, checkout in [("venv-kept", ROOT), ("venv-gone", tmp_path / "nowhere")]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkout").write_text(str(checkout))
    script._remove_orphans(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["venv-kept"]


def test_torch_from_an_index_of_ones_own_leaves_out_what_the_usual_one_brings(script):
    everything, none = script._requirements("")
    rest, torch = script._requirements("somewhere")
    names = {block.partition("==")[0] for block in rest}
    assert none is None
    assert torch.startswith("torch==")
    assert "torchx" in names
    assert len(rest) < len(everything)
    assert not {name for name in names if name.startswith(("nvidia-", "cuda-", "triton"))} | {"torch"} & names


def test_a_python_that_cannot_be_used_is_told_so(script, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    with pytest.raises(script.SetupError, match=r"3\.11 to 3\.13 can: make setup PYTHON="):
        script._require_python()


def test_a_missing_venv_module_is_named_with_the_package_that_has_it(script, monkeypatch):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(script.os, "geteuid", lambda: 1000)
    with pytest.raises(script.SetupError, match=r"apt-get install python3\.\d+-venv"):
        script._require_python()


def test_an_installer_that_fails_is_quoted(script):
    with pytest.raises(script.SetupError, match="exit code 3: .*\nthe reason"):
        script._run([sys.executable, "-c", "print('the reason'); raise SystemExit(3)"])


def test_help_lists_every_target():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    targets = [line.split()[1] for line in done.stdout.splitlines()]
    assert targets[:5] == ["help", "setup", "setup-eval", "demo", "test"]
