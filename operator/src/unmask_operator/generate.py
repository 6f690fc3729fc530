"""What is made from the models and committed: CRDs to apply as they are, and reference pages."""

from unmask_api import crd, reference
from unmask_operator import yaml_dialect

__all__ = ["files"]

_NOTICE = "# Made by `make generate` from the models in operator/src/unmask_api; change those.\n"


def files() -> dict[str, str]:
    """Return every file as path below the root of the tree -> text."""
    texts = {f"docs/reference/{name}": text for name, text in reference.markdown().items()}
    for resource in crd.RESOURCES:
        text = yaml_dialect.dump(crd.definition(resource))
        texts[f"deploy/crds/{resource.full_name}.yaml"] = _NOTICE + text
    return texts
