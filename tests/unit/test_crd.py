"""The CustomResourceDefinition: what an API server demands of it, and that the tree's copy is current."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from unmask_api import crd
from unmask_api.train_job import DiffusionTrainJob
from unmask_operator import generate

ROOT = Path(__file__).parents[2]
SCHEMA = crd.schema(DiffusionTrainJob)


def nodes(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, node
    for key, child in node.get("properties", {}).items():
        yield from nodes(child, f"{path}.{key}")
    if "items" in node:
        yield from nodes(node["items"], f"{path}[]")


@pytest.mark.parametrize("name", generate.files())
def test_the_generated_files_of_the_tree_are_current(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8") == generate.files()[name], "run: make generate"


def test_every_node_has_one_type_and_a_description_and_nothing_that_a_cluster_refuses() -> None:
    for path, node in nodes(SCHEMA["properties"]["spec"]):
        assert isinstance(node["type"], str), path
        assert "description" in node or path.endswith("[]"), path
        assert not {"$ref", "$defs", "anyOf", "title", "const", "prefixItems"} & node.keys(), path
        assert node.get("additionalProperties") is not False, path
        assert node.get("default", ...) is not None, path


def test_every_list_and_text_of_the_spec_is_bounded_so_that_the_cost_of_rules_is() -> None:
    for path, node in nodes(SCHEMA["properties"]["spec"]):
        if node["type"] == "array":
            assert "maxItems" in node, path
        if node["type"] == "string":
            assert "maxLength" in node or "enum" in node, path


def test_every_rule_blames_a_field_that_exists() -> None:
    for path, node in nodes(SCHEMA):
        for rule in node.get("x-kubernetes-validations", ()):
            target = node
            for part in rule.get("fieldPath", "").split(".")[1:]:
                target = target["properties"][part]
            assert target, f"{path}: {rule}"


def test_the_inline_model_config_is_kept_as_it_is() -> None:
    config = SCHEMA["properties"]["spec"]["properties"]["model"]["properties"]["init"]["properties"]["config"]
    assert config["x-kubernetes-preserve-unknown-fields"] is True
    assert "additionalProperties" not in config


def test_defaults_that_depend_on_the_objective_are_left_to_the_reader() -> None:
    stage = SCHEMA["properties"]["spec"]["properties"]["stages"]["items"]
    for name in ("supervise", "noise"):
        assert "default" not in stage["properties"][name]
        assert name not in stage["required"]


def test_decimal_defaults_stay_text_for_readers_of_yaml_1_2() -> None:
    text = generate.files()["deploy/crds/diffusiontrainjobs.unmask.dev.yaml"]
    assert "default: '1e-8'" in text
    assert yaml.safe_load(text)["metadata"]["name"] == "diffusiontrainjobs.unmask.dev"


def test_the_scale_subresource_and_the_columns_point_at_fields_that_exist() -> None:
    (resource,) = [one for one in crd.RESOURCES if one.model is DiffusionTrainJob]
    paths = [column.path for column in resource.columns] + list((resource.scale or {}).values())
    for path in paths:
        if path.startswith(".metadata."):
            continue
        node = SCHEMA
        for part in path.split(".")[1:]:
            node = node["properties"][part]
        assert node["type"] in ("integer", "string"), path
    assert crd.definition(resource)["spec"]["versions"][0]["subresources"]["scale"] == resource.scale


def test_amounts_are_whole_numbers_or_text() -> None:
    spec = SCHEMA["properties"]["spec"]["properties"]
    limits = spec["resources"]["properties"]["limits"]
    assert limits["additionalProperties"]["x-kubernetes-int-or-string"] is True
    assert "type" not in limits["additionalProperties"]
