"""What is made and committed: definitions and permissions to apply as they are, reference pages."""

from unmask_api import crd, reference
from unmask_operator import rbac, yaml_dialect
from unmask_operator.reconcilers import RECONCILERS

__all__ = ["files"]

_NOTICE = "# Made by `make generate` from the models in operator/src/unmask_api; change those.\n"
_RBAC_NOTICE = "# Made by `make generate` from operator/src/unmask_operator/rbac.py; change that.\n"


def files() -> dict[str, str]:
    """Return every file as path below the root of the tree -> text."""
    texts = {f"docs/reference/{name}": text for name, text in reference.markdown().items()}
    for resource in crd.RESOURCES:
        text = yaml_dialect.dump(crd.definition(resource))
        texts[f"deploy/crds/{resource.full_name}.yaml"] = _NOTICE + text
    for name, namespace in (("operator", None), ("operator-namespaced", "default")):
        objects = [yaml_dialect.dump(one) for one in rbac.manifests(RECONCILERS, namespace)]
        texts[f"deploy/rbac/{name}.yaml"] = _RBAC_NOTICE + "---\n".join(objects)
    texts["deploy/rbac/user.yaml"] = _RBAC_NOTICE + yaml_dialect.dump(rbac.user_role())
    return texts
