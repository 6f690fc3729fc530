"""Writes what is made from the models: ``python -m unmask_operator.generate [ROOT]`` (``make generate``).

The files are committed, so that they can be read and applied without running anything; ``make verify``
runs this again and expects no difference.
"""

import argparse
from pathlib import Path

from unmask_api import crd, reference
from unmask_operator import yaml_dialect

__all__ = ["files", "main"]

_NOTICE = "# Made by `make generate` from the models in operator/src/unmask_api; change those.\n"


def files() -> dict[str, str]:
    """Return every generated file as path below the root -> text."""
    texts = {f"docs/reference/{name}": text for name, text in reference.markdown().items()}
    for resource in crd.RESOURCES:
        text = yaml_dialect.dump(crd.definition(resource))
        texts[f"deploy/crds/{resource.full_name}.yaml"] = _NOTICE + text
    return texts


def main() -> None:
    """Write the files below the folder named on the command line, by default the working directory."""
    parser = argparse.ArgumentParser(description="Write CRDs and reference pages from the models.")
    parser.add_argument("root", nargs="?", type=Path, default=Path())
    root: Path = parser.parse_args().root
    for name, text in files().items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
