"""What holds for every test: order, time limits, no device that is not there, no way out to a network."""

import os
from importlib.util import find_spec
from typing import Any

import pytest

from support import charts, counts, monitoring, networks, real_clusters

pytest_plugins = ["support.report"]

# No test asks a hub for anything; the tokenizers package would if told to.
os.environ["HF_HUB_OFFLINE"] = "1"
# Seconds for a slow test, and for any at its full counts, where it names none; else pyproject.toml says.
SLOW_TIMEOUT = 1800
_LEFT_OUT = pytest.StashKey[list[str]]()
_OF_KERNELS = ["unit/test_forwards_on_a_gpu.py", "unit/test_moe_kernel.py", "unit/test_paged_kernel.py"]
# A torch that is built for CPUs alone comes without Triton.
collect_ignore = [] if find_spec("triton") else _OF_KERNELS


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
    for item in items:
        if (counts.FULL or item.get_closest_marker("slow")) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT))
    _deselect_what_needs_a_gpu(config, items)
    _deselect_what_needs_a_cluster(config, items)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In one of several processes: tell the first one what was left out."""
    if (told := getattr(session.config, "workeroutput", None)) is not None:
        told["left out"] = session.config.stash.get(_LEFT_OUT, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """In the first of several processes: take that over, from one of them, for all say the same."""
    node.config.stash[_LEFT_OUT] = getattr(node, "workeroutput", {}).get("left out", [])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for reason in config.stash.get(_LEFT_OUT, ()):
        terminalreporter.write_line(reason, yellow=True)


def _deselect_what_needs_a_gpu(config: pytest.Config, items: list[pytest.Item]) -> None:
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing:
        return
    import torch

    if not torch.cuda.is_available():
        items[:] = [item for item in items if item not in needing]
        config.hook.pytest_deselected(items=needing)


def _deselect_what_needs_a_cluster(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what this machine cannot run, and say so; in CI it must be able to."""
    said = config.stash.setdefault(_LEFT_OUT, [])
    if collect_ignore:
        said.append(f"{len(collect_ignore)} files of tests left out that need Triton, which is not installed")
    for marker, why in (
        ("real_api", lambda: real_clusters.obstacle("api")),
        ("real_node", lambda: real_clusters.obstacle("node")),
        ("real_images", lambda: real_clusters.obstacle("node", with_images=True)),
        ("helm", charts.obstacle),
        ("own_network", networks.obstacle),
        ("prometheus", monitoring.obstacle),
    ):
        needing = [item for item in items if item.get_closest_marker(marker)]
        if not needing or (reason := why()) is None:
            continue
        if os.environ.get("CI"):
            raise pytest.UsageError(f"{len(needing)} tests are {marker}, and in CI they must run: {reason}")
        items[:] = [item for item in items if item not in needing]
        config.hook.pytest_deselected(items=needing)
        said.append(f"{len(needing)} tests left out that are {marker}: {reason}")
