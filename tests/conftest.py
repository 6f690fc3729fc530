"""What holds for every test: order, time limits, no device that is not there, no way out to a network."""

import os

import pytest

pytest_plugins = ["support.report"]

# No test asks a hub for anything; the tokenizers package would if told to.
os.environ["HF_HUB_OFFLINE"] = "1"
# A slow test's limit in seconds, where it names none; the others' is in pyproject.toml.
SLOW_TIMEOUT = 1800


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT))
    _deselect_what_needs_a_gpu(config, items)


def _deselect_what_needs_a_gpu(config: pytest.Config, items: list[pytest.Item]) -> None:
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing:
        return
    import torch

    if not torch.cuda.is_available():
        items[:] = [item for item in items if item not in needing]
        config.hook.pytest_deselected(items=needing)
