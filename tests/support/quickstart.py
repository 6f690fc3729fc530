"""The quickstart's modules, which are scripts and not part of any package."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["EXAMPLE", "load_module"]

EXAMPLE = Path(__file__).parents[2] / "examples" / "quickstart"


def load_module(name: str) -> ModuleType:
    """Import ``examples/quickstart/<name>.py`` under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"quickstart_{name}", EXAMPLE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
