"""Commands in documents: each is one that exists, spelt as it must be."""

import json
import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest

from unmask.cli.main import cli

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")})


def commands() -> list[tuple[str, str]]:
    """(document, command line) for every line of every ``sh`` block."""
    return [
        (str(document.relative_to(ROOT)), line.strip())
        for document in DOCUMENTS
        for block in re.findall(r"^```sh\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE)
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    ]


def complaint(line: str) -> str | None:
    """What is wrong with a command line, as far as can be told without running it."""
    words = shlex.split(line, comments=True)
    words = words[: words.index("&")] if "&" in words else words
    match words:
        case ["make", *targets]:
            known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            unknown = {word for word in targets if "=" not in word} - set(known)
            return f"no such target: {unknown}" if unknown else None
        case ["unmask", *arguments]:
            return _unmask_complaint(arguments)
        case ["torchx", *_]:
            return None  # tests/integration/test_cluster_page.py runs them
        case ["python", script, *_]:
            return None if (ROOT / script).is_file() else f"no such file: {script}"
        case ["export" | "mkdir" | "chown", *_]:
            return None  # tests/e2e/test_real_node.py runs them
        case ["buildah", "build", *arguments]:
            return _build_complaint(arguments)
        case ["buildah", "push", _]:
            return None  # tests/integration/test_charts.py compares the names
        case ["helm", action, *arguments]:
            return _helm_complaint(action, arguments)
        case ["kubectl", *arguments]:
            files = [file for flag, file in pairwise(arguments) if flag == "-f"]
            missing = [file for file in files if not (ROOT / file).is_file()]
            return f"no such file: {missing}" if missing else None
    return "a command that no test knows"


def _unmask_complaint(arguments: list[str]) -> str | None:
    options = {word.partition("=")[0] for word in arguments if re.match(r"--?[a-z]", word)}
    if arguments[0].startswith("-"):
        return None
    with click.Context(cli) as context:
        command = cli.get_command(context, arguments[0])
        if isinstance(command, click.Group) and not (
            command.invoke_without_command and arguments[1].startswith("-")
        ):
            command = command.get_command(context, arguments[1])
    if command is None:
        return f"no such subcommand: {' '.join(arguments[:2])}"
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    unknown = options - known - {"-h", "--help"}
    return f"no such option: {unknown}" if unknown else None


def _build_complaint(arguments: list[str]) -> str | None:
    given = dict(pairwise(arguments))
    file = ROOT / given["--file"]
    if not file.is_file():
        return f"no such file: {file}"
    name = given["--build-arg"].partition("=")[0]
    known = re.findall(r"^ARG (\w+)$", file.read_text(), re.MULTILINE)
    return None if name in known else f"no such build argument: {name}"


def _helm_complaint(action: str, arguments: list[str]) -> str | None:
    if action not in ("install", "upgrade"):
        return None if action in ("test", "uninstall") else f"no test knows helm {action}"
    chart = ROOT / arguments[1]
    if not (chart / "Chart.yaml").is_file():
        return f"no such chart: {arguments[1]}"
    schema = json.loads((chart / "values.schema.json").read_text())
    given = {each.partition("=")[0] for flag, each in pairwise(arguments) if flag == "--set"}
    unknown = {name for name in given if not _is_value(name, schema)}
    return f"no such value: {unknown}" if unknown else None


def _is_value(name: str, schema: dict[str, Any]) -> bool:
    """Return whether a schema of a chart's values names one, also one inside of a custom resource's spec."""
    for part in name.split("."):
        schema = schema.get("properties", {}).get(part)
        if schema is None:
            return False
    return True


@pytest.mark.parametrize(("document", "line"), commands(), ids=" ".join)
def test_a_command_in_a_document_exists(document, line):
    assert complaint(line) is None


def test_readme_opens_with_the_two_commands_that_do_everything():
    assert [line for document, line in commands() if document == "README.md"][:2] == [
        "make demo",
        "make test",
    ]


@pytest.mark.parametrize(
    "line",
    [
        "make nonsense",
        "unmask nonsense",
        "unmask serve --nonsense",
        "curl nowhere",
        "python nowhere.py",
        "buildah build --file nowhere/Containerfile --build-arg BASE=a --tag b .",
        "buildah build --file deploy/images/worker/Containerfile --build-arg NONSENSE=a --tag b .",
        "helm install a deploy/helm/nonsense",
        "helm install a deploy/helm/unmask-operator --set nonsense=1",
        "helm install a deploy/helm/unmask-inference --set spec.server.nonsense=1",
        "kubectl apply -f nowhere.yaml",
    ],
)
def test_a_command_that_does_not_exist_is_found_out(line):
    assert complaint(line) is not None
