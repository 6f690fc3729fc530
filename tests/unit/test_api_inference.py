"""DiffusionInferenceService as a manifest: what is refused and why, defaults, the definition, its rules."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cel
import pytest
from click.testing import CliRunner

from support.manifests import REFUSED_SERVICES, Refused, changed, inference_service, train_job
from unmask.cli.main import cli
from unmask_api import crd
from unmask_api.inference_service import DiffusionInferenceService, InferenceSpec
from unmask_operator.launch.admission import AdmissionError, admit, admit_any, admit_service

SCHEMA = crd.schema(DiffusionInferenceService)
(RESOURCE,) = [one for one in crd.RESOURCES if one.model is DiffusionInferenceService]


def nodes(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, node
    for key, child in node.get("properties", {}).items():
        yield from nodes(child, f"{path}.{key}")
    if "items" in node:
        yield from nodes(node["items"], f"{path}[]")


@pytest.mark.parametrize("case", REFUSED_SERVICES, ids=lambda case: case.why.replace(" ", "-"))
def test_a_bad_manifest_is_refused_in_one_line_naming_field_and_remedy(case: Refused) -> None:
    with pytest.raises(AdmissionError) as caught:
        admit_service(json.dumps(case.manifest), source="service.yaml")
    assert caught.value.path == case.field
    assert case.says in str(caught.value)
    assert str(caught.value).startswith("service.yaml:1: " + case.field)


def test_the_least_manifest_is_a_model_and_all_else_has_defaults() -> None:
    spec = admit_service(json.dumps(inference_service())).spec
    assert (spec.replicas, spec.group.shards, spec.group.replication) == (2, 2, 1)
    assert (spec.rollout.max_surge, spec.rollout.max_unavailable, spec.rollout.partition) == (0, 1, 0)
    assert (spec.server.port, spec.server.metrics_port, spec.server.http_port) == (50051, 9090, None)
    assert (spec.stopped, spec.autoscaling, spec.server.tls) == (False, None, None)
    bounded = changed(inference_service(), {"spec.autoscaling": {"maxReplicas": 4}})
    scaling = admit_service(json.dumps(bounded)).spec.autoscaling
    assert scaling is not None
    assert [(one.name, one.target) for one in scaling.metrics] == [("unmask_requests_waiting", 4)]


def test_a_manifest_of_the_other_kind_is_refused_where_one_kind_is_asked_for() -> None:
    for admits, manifest, name in (
        (admit, inference_service(), "DiffusionTrainJob"),
        (admit_service, train_job(), "DiffusionInferenceService"),
    ):
        with pytest.raises(AdmissionError, match=f"allowed: {name}$"):
            admits(json.dumps(manifest))
        assert admit_any(json.dumps(manifest)).kind == manifest["kind"]


def test_the_command_line_validates_and_explains_services(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(json.dumps(inference_service()))
    bad.write_text(json.dumps(changed(inference_service(), {"spec.replicas": -1})))
    result = CliRunner().invoke(cli, ["validate", str(good), str(bad)])
    assert result.exit_code == 64
    assert "DiffusionInferenceService chat is valid: 2 groups of an engine and 2 shards" in result.output
    assert "spec.replicas: got -1; allowed: integer, 0 to 64" in result.output
    explained = CliRunner().invoke(cli, ["explain", "dis.spec.rollout.maxSurge"])
    assert explained.exit_code == 0
    assert "Groups that may exist beyond" in explained.output


def test_every_node_has_one_type_and_a_description_and_a_bound() -> None:
    for path, node in nodes(SCHEMA["properties"]["spec"]):
        if "x-kubernetes-int-or-string" not in node:
            assert isinstance(node["type"], str), path
        assert "description" in node or path.endswith("[]"), path
        assert not {"$ref", "$defs", "anyOf", "title", "const", "prefixItems"} & node.keys(), path
        assert node.get("additionalProperties") is not False, path
        if node.get("type") == "array":
            assert "maxItems" in node, path
        if node.get("type") == "string":
            assert "maxLength" in node or "enum" in node, path


def test_every_rule_blames_a_field_that_exists() -> None:
    for path, node in nodes(SCHEMA):
        for rule in node.get("x-kubernetes-validations", ()):
            target = node
            for part in rule.get("fieldPath", "").split(".")[1:]:
                target = target["properties"][part]
            assert target, f"{path}: {rule}"


def test_the_scale_subresource_and_the_columns_point_at_fields_that_exist() -> None:
    definition = crd.definition(RESOURCE)
    assert definition["spec"]["names"]["shortNames"] == ["dis"]
    assert definition["spec"]["versions"][0]["subresources"]["scale"] == RESOURCE.scale
    for path in [column.path for column in RESOURCE.columns] + list((RESOURCE.scale or {}).values()):
        node = SCHEMA
        if path.startswith(".metadata."):
            continue
        for part in path.split(".")[1:]:
            node = node["properties"][part]
        assert node["type"] in ("integer", "string"), path


def changes(values: dict[str, Any], drop: tuple[str, ...] = ()) -> list[str]:
    """Return the messages of the rules about changes that this one breaks."""
    old = admit_service(json.dumps(inference_service())).spec.to_json_dict()
    new = admit_service(json.dumps(changed(inference_service(), values, drop))).spec.to_json_dict()
    return [
        rule.message
        for rule in InferenceSpec.rules
        if rule.transition and not cel.compile(rule.rule).execute({"self": new, "oldSelf": old})
    ]


def test_what_clients_would_meet_in_two_forms_cannot_be_changed() -> None:
    (tls,) = changes({"spec.server.tls": {"secretName": "certificates"}})
    assert tls.startswith("TLS cannot be switched on or off")
    (name,) = changes({"spec.model.name": "other"})
    assert name.startswith("model.name cannot be changed")


@pytest.mark.parametrize(
    "values",
    [
        {"spec.replicas": 5},
        {"spec.stopped": True},
        {"spec.image": "registry.example/unmask:2"},
        {"spec.model.uri": "pvc://models/flash"},
        {"spec.model.revision": "2"},
        {"spec.group.shards": 4},
        {"spec.rollout": {"maxSurge": 1, "paused": True}},
        {"spec.autoscaling": {"maxReplicas": 4}},
        {"spec.server.rows": 16},
    ],
)
def test_everything_else_can_be_changed(values: dict[str, Any]) -> None:
    assert changes(values) == []
