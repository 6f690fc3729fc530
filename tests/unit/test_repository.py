"""Rules that hold for the tree as a whole, and that no tool checks on its own."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("operator/src/unmask_api", "operator/src/unmask_operator", "workers/src/unmask")


def tree() -> list[Path]:
    """Every file that git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return sorted({path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()})


def texts(*suffixes: str) -> dict[str, str]:
    """The files of the tree with one of ``suffixes`` (all text files without any), and what they hold."""
    found = {}
    for path in tree():
        if suffixes and path.suffix not in suffixes:
            continue
        data = path.read_bytes()
        if b"\0" not in data:
            found[str(path.relative_to(ROOT))] = data.decode()
    return found


def sources() -> dict[str, str]:
    """Our own packages' modules, less the generated ones."""
    modules = texts(".py").items()
    return {name: text for name, text in modules if name.startswith(PACKAGES) and "_pb2" not in name}


def offending(files: dict[str, str], pattern: str) -> list[str]:
    """Each line of ``files`` that ``pattern`` finds something in, with its place."""
    expression = re.compile(pattern)
    return [
        f"{name}:{number}: {line.strip()}"
        for name, text in files.items()
        for number, line in enumerate(text.splitlines(), 1)
        if expression.search(line)
    ]


@pytest.mark.parametrize("folder", ["operator", "operator/src", "workers", "workers/src"])
def test_a_source_root_is_no_package(folder):
    # operator/__init__.py would shadow the standard library's operator for all that starts at the root.
    assert not list((ROOT / folder).glob("*.py"))


def test_no_module_is_named_for_being_useful():
    vague = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert not [path for path in tree() if vague & {path.stem, *path.relative_to(ROOT).parts[:-1]}]


def test_no_file_names_the_host_of_a_package_registry():
    hosts = (
        r"pypi\.org|pythonhosted\.org|npmjs\.org|crates\.io|proxy\.golang\.org|maven\.org|deb\.debian\.org"
    )
    assert not offending(texts(), hosts)


def test_no_file_names_a_path_of_somebodys_machine():
    assert not offending(texts(), r"(?<![\w.$}>])/(root|work|home/\w+|tmp/\w+)/")


def test_our_sources_are_ascii():
    assert not offending({**sources(), **texts(".md", ".proto", ".toml", ".yaml")}, r"[^\x00-\x7f]")


def test_nothing_is_ever_unpickled():
    unsafe = r"\b(torch\.load|pickle|cPickle|dill|joblib|shelve|allow_pickle|yaml\.(unsafe|full)_load)\b"
    assert not offending(sources(), unsafe)


def test_no_test_is_skipped_or_expected_to_fail():
    tests = {name: text for name, text in texts(".py").items() if name.startswith("tests/")}
    assert not offending(tests, r"\.(skip|skipif|xfail|importorskip)\(")


def test_every_link_between_documents_leads_somewhere():
    broken = [
        f"{name}: {target}"
        for name, text in texts(".md").items()
        for target in re.findall(r"\]\(([^)#\s]+)", text)
        if "://" not in target and not (ROOT / name).parent.joinpath(target).exists()
    ]
    assert not broken


def test_every_make_target_that_a_document_names_exists_and_is_explained():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
    documents = "".join([*texts(".md").values(), (ROOT / ".ci/run").read_text()])
    named = set(re.findall(r"^\s*(?:exec )?make ([a-z-]+)|`make ([a-z-]+)", documents, re.MULTILINE))
    assert {first or second for first, second in named} <= targets
    assert set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()) == targets


def test_ci_runs_the_test_command_that_readme_names():
    assert "make test\n" in (ROOT / "README.md").read_text()
    assert (ROOT / ".ci/run").read_text().endswith("exec make test\n")


TORCH_FREE = [
    "unmask",
    "unmask.cli.main",
    "unmask.client",
    "unmask.errors",
    "unmask.gateway.server",
    "unmask.models.registry",
    "unmask.telemetry",
    "unmask.v1.generation_pb2_grpc",
    "unmask_api",
    "unmask_operator.launch",
]


@pytest.mark.parametrize("module", TORCH_FREE)
def test_importing_this_needs_no_torch(module):
    script = f"import sys; sys.modules['torch'] = None; import {module}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_custom_resources_import_the_standard_library_and_pydantic_alone():
    names = {
        name
        for path, text in sources().items()
        if path.startswith("operator/src/unmask_api/")
        for name in imported(text)
    }
    assert names - sys.stdlib_module_names <= {"pydantic", "pydantic_core", "unmask_api"}


def imported(text: str) -> set[str]:
    """The top-level names that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names
