"""What is made for the Helm charts: permissions, definitions, the schema of their values, and their pages.

``values.yaml`` is the source of the last two. The comment above a value describes it. These lines in it say
more; a mapping is a section of values, unless it is empty or its schema says what may be in it.

- ``@schema {...}`` adds to the value's JSON Schema, whose type is otherwise that of the default.
- ``@spec KIND``: the value is the spec of a custom resource, and its schema that of the models.
- ``@standalone``: the value, or all of a section, is about pods that the chart itself describes.

``python scripts/charts.py`` lints the charts and packages them into ``dist/``.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from real_cluster import programs
from unmask_api import crd
from unmask_operator import rbac, yaml_dialect
from unmask_operator.reconcilers import RECONCILERS

__all__ = ["Value", "files", "helm", "markdown", "permissions", "schema", "values"]

Json = dict[str, Any]

_ROOT = Path(__file__).resolve().parent.parent
_CHARTS = _ROOT / "deploy/helm"
_OPERATOR, _INFERENCE = "unmask-operator", "unmask-inference"
_MADE = "Made by `make generate`"
_REQUIRED = {_INFERENCE: ("--set=model.uri=pvc://run/model",)}
"""Values without which a chart makes nothing, and of which its linter warns."""
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


@dataclass(frozen=True, slots=True)
class Value:
    """One entry of ``values.yaml``."""

    path: tuple[str, ...]
    """Names from the outermost section to the value itself."""
    default: Any
    about: str
    """Its description; sections may do without."""
    schema: Json
    """What its comment adds to the schema."""
    standalone: bool = False
    """Whether it is about pods that the chart itself describes, and says nothing where an operator does."""

    @property
    def section(self) -> bool:
        """Whether it only holds other values."""
        free = self.schema.keys() & {"properties", "additionalProperties"}
        return isinstance(self.default, dict) and bool(self.default) and not free


def files() -> dict[str, str]:
    """Return every file that is made for the charts: its path below the root of the tree -> its text."""
    texts = {}
    for chart in _folders():
        about = yaml_dialect.load((chart / "Chart.yaml").read_text(encoding="utf-8"))
        found = values((chart / "values.yaml").read_text(encoding="utf-8"))
        texts[f"{chart.name}/README.md"] = markdown(about, found)
        texts[f"{chart.name}/values.schema.json"] = json.dumps(schema(found), indent=2) + "\n"
        if chart.name == _INFERENCE:
            texts[f"{chart.name}/templates/_standalone.tpl"] = _standalone(found)
    for resource in crd.RESOURCES:
        texts[f"{_OPERATOR}/templates/crds/{resource.full_name}.yaml"] = _definition(resource)
    texts[f"{_OPERATOR}/templates/_permissions.tpl"] = permissions()
    return {f"deploy/helm/{name}": text for name, text in texts.items()}


def helm() -> str | None:
    """Return where Helm is: beside the cluster's programs, or on ``PATH``."""
    built = programs.folder() / "helm"
    return str(built) if built.is_file() else shutil.which("helm")


def values(text: str) -> list[Value]:
    """Return the values and sections of a ``values.yaml``, in its order.

    Raises:
        ValueError: A value has no description, or its comment is not what this module reads.
    """
    return list(_walk(yaml.compose(text, yaml.SafeLoader), yaml_dialect.load(text), (), text.splitlines()))


def schema(found: list[Value]) -> Json:
    """Return the JSON Schema of the values; what it does not know is refused."""
    root: Json = _section("")
    root["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    root["properties"]["global"] = {
        "type": "object",
        "description": "Values that all charts share; not used.",
    }
    for value in found:
        parent = root
        for name in value.path[:-1]:
            parent = parent["properties"][name]
        own = _section(value.about) if value.section else _leaf(value)
        parent["properties"][value.path[-1]] = own
    return root


def markdown(chart: Json, found: list[Value]) -> str:
    """Return a chart's page: what it is, and a table of its values."""
    lines = [
        f"# {chart['name']}",
        f"<!-- {_MADE} from Chart.yaml and values.yaml; change those. -->",
        f"{chart['description']}. Asks for Kubernetes {chart['kubeVersion'].removesuffix('-0')}.",
        "[Install with Helm](../../../docs/how-to/install-with-helm.md) says how it is used.",
        "Values that are not in this table are refused.",
    ]
    table = ["| value | default | meaning |", "|---|---|---|"]
    for value in found:
        default = "" if value.section else f"`{_cell(_compact(value.default))}`"
        if value.about or not value.section:
            about = f"{value.about} *Standalone.*" if value.standalone and not value.section else value.about
            table.append(f"| `{'.'.join(value.path)}` | {default} | {_cell(about)} |")
    return "\n\n".join([*lines[:2], "\n".join(lines[2:]), "\n".join(table)]) + "\n"


def permissions() -> str:
    """Return the named templates of the rules: the operator's, and those for people."""
    rules = {
        "rules": rbac.rules(RECONCILERS),
        "leaseRules": rbac.lease_rules("@LEASE@"),
        "editorRules": rbac.rules_for_people(edit=True),
        "viewerRules": rbac.rules_for_people(edit=False),
    }
    texts = [f"{{{{- /* {_MADE} from operator/src/unmask_operator/rbac.py; change that. */ -}}}}\n"]
    for name, found in rules.items():
        body = _escaped(yaml_dialect.dump(found)).replace(
            "'@LEASE@'", f'{{{{ include "{_OPERATOR}.fullname" . }}}}'
        )
        texts.append(f'{{{{- define "{_OPERATOR}.{name}" -}}}}\n{body}{{{{- end }}}}\n')
    return "\n".join(texts)


def main() -> int:
    """Lint and package every chart; return the exit code."""
    if (program := helm()) is None:
        print(f"charts: no helm in {programs.folder()} or on PATH; `make cluster-programs` builds it")
        return 1
    for chart in _folders():
        given = _REQUIRED.get(chart.name, ())
        command = [program, "lint", "--strict", "--quiet", chart, *given]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode or done.stdout.strip():  # quiet: it says what is wrong, or nothing
            print(f"charts: helm lint {chart.name}:\n{done.stdout}")
            return 1
        subprocess.run([program, "package", chart, f"--destination={_ROOT / 'dist'}"], check=True)
    return 0


def _folders() -> list[Path]:
    return sorted(path.parent for path in _CHARTS.glob("*/Chart.yaml"))


def _definition(resource: crd.Resource) -> str:
    """Return the template of a definition: part of the release, but not always of its end."""
    made = crd.definition(resource)
    head = {name: made.pop(name) for name in ("apiVersion", "kind")}
    name = made.pop("metadata")["name"]
    return "".join(
        [
            f"{{{{- /* {_MADE} from the models in operator/src/unmask_api; change those. */ -}}}}\n",
            "{{- if .Values.crds.install }}\n",
            yaml_dialect.dump(head),
            f"metadata:\n  name: {name}\n",
            f'  labels: {{{{- include "{_OPERATOR}.labels" . | nindent 4 }}}}\n',
            "  {{- if .Values.crds.keep }}\n",
            "  annotations:\n    helm.sh/resource-policy: keep\n",
            "  {{- end }}\n",
            _escaped(yaml_dialect.dump(made)),
            "{{- end }}\n",
        ]
    )


def _standalone(found: list[Value]) -> str:
    """Return the named template of the values that are for a release without an operator, as JSON."""
    defaults = {
        ".".join(value.path): value.default for value in found if value.standalone and not value.section
    }
    body = json.dumps(defaults, indent=1)
    return (
        f"{{{{- /* {_MADE} from values.yaml; change that. */ -}}}}\n"
        f'{{{{- define "{_INFERENCE}.standaloneValues" -}}}}\n{body}\n{{{{- end }}}}\n'
    )


def _spec_of(kind: str) -> Json:
    """Return what the models say of a spec, so that a misspelt field is refused before anything is applied.

    Nothing is required: a release may have none. The API server applies the rules of more than one field.
    """
    (resource,) = [resource for resource in crd.RESOURCES if resource.kind == kind]
    spec = _strict(crd.schema(resource.model)["properties"]["spec"])
    return {name: value for name, value in spec.items() if name not in ("required", "description")}


def _strict(node: Json) -> Json:
    """Return a structural schema as JSON Schema, in which only fields that it names are allowed."""
    kept = {name: value for name, value in node.items() if not name.startswith("x-kubernetes-")}
    if "properties" in kept:
        kept["properties"] = {name: _strict(below) for name, below in kept["properties"].items()}
        kept["additionalProperties"] = False
    for name in ("items", "additionalProperties"):
        if isinstance(kept.get(name), dict):
            kept[name] = _strict(kept[name])
    return kept


def _escaped(text: str) -> str:
    """Return what Helm's templates render as ``text``."""
    return text.replace("{{", '{{ "{{" }}')


def _walk(
    node: yaml.Node | None, data: Any, path: tuple[str, ...], lines: list[str], standalone: bool = False
) -> Iterator[Value]:
    assert isinstance(node, yaml.MappingNode)
    for key, inner in node.value:
        name = (*path, key.value)
        about, own, alone = _comment(key.start_mark, lines, ".".join(name))
        value = Value(name, data[key.value], about, own, standalone or alone)
        if not about and not value.section:
            raise ValueError(f"{'.'.join(name)}: has no comment; describe it above")
        yield value
        if value.section:
            yield from _walk(inner, value.default, name, lines, value.standalone)


def _comment(mark: yaml.Mark, lines: list[str], name: str) -> tuple[str, Json, bool]:
    """Return the words and the schema in the comment that ends above ``mark``, and if ``@standalone`` is."""
    start = mark.line
    while start and lines[start - 1].startswith(" " * mark.column + "# "):
        start -= 1
    words, own, standalone = [], {}, False
    for line in lines[start : mark.line]:
        text = line.strip().removeprefix("# ")
        match text.split(maxsplit=1):
            case ["@schema", given]:
                own = yaml_dialect.load(given)
                if not isinstance(own, dict):
                    raise ValueError(f"{name}: @schema has to be followed by {{...}}")
            case ["@spec", kind]:
                own = _spec_of(kind)
            case ["@standalone"]:
                standalone = True
            case _:
                words.append(text)
    return " ".join(words), own, standalone


def _section(about: str) -> Json:
    described = {"description": about} if about else {}
    return {"type": "object", **described, "additionalProperties": False, "properties": {}}


def _leaf(value: Value) -> Json:
    if "type" not in value.schema and value.default is None:
        raise ValueError(f"{'.'.join(value.path)}: null has no type; add it to @schema")
    kind = value.schema.get("type") or _TYPES[type(value.default)]
    return {"type": kind, "description": value.about, "default": value.default, **value.schema}


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
