"""The chart `unmask-inference` where an operator makes the pods, rendered."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

import charts
from support.charts import (
    CHARTS,
    EXTENSIONS,
    INFERENCE,
    MODEL,
    MUTUAL,
    OPERATED,
    Json,
    container,
    helm,
    nested,
    of_kind,
    one,
    other,
    refused,
    render,
    rendered,
)
from unmask.cli import gateway, generate
from unmask.gateway.addresses import Target
from unmask_api.inference_service import DiffusionInferenceService
from unmask_operator.launch import fronts
from unmask_operator.launch.groups import GroupOf, group_objects

pytestmark = pytest.mark.helm

NAME = "r-unmask-inference"
ALL = "inference: by the operator, and all around it"
STANDALONE = [
    value
    for value in charts.values((CHARTS / INFERENCE / "values.yaml").read_text(encoding="utf-8"))
    if value.standalone and not value.section
]


@cache
def service() -> DiffusionInferenceService:
    return parsed(one(rendered(ALL), "DiffusionInferenceService"))


def parsed(found: Json) -> DiffusionInferenceService:
    return DiffusionInferenceService.model_validate_json(json.dumps(found))


def made_by_the_operator() -> Iterator[Json]:
    """Yield the objects that it would make of the release's service."""
    spec = service().spec
    model = spec.model.model_copy(update={"job": None, "uri": "pvc://run/model"})
    spec = spec.model_copy(update={"model": model, "image": "i"})
    yield fronts.public_service(service())
    yield fronts.engines_service(service())
    yield from group_objects(
        GroupOf(service=NAME, namespace="place", ordinal=0, revision="abcdef", spec=spec)
    )


def templates() -> dict[str, Json]:
    """The pods of engines and shards, by their role."""
    found = (each["spec"]["template"] for each in made_by_the_operator() if each["kind"] == "StatefulSet")
    return {each["metadata"]["labels"]["unmask.dev/role"]: each for each in found}


def test_the_service_is_what_the_values_say_and_there_is_nothing_else_that_serves() -> None:
    objects = rendered("inference: by the operator")
    found = one(objects, "DiffusionInferenceService")
    assert found["spec"] == OPERATED["spec"] and found["metadata"]["name"] == NAME
    spec = parsed(found).spec
    assert spec.group.shards == 2 and spec.server.port == 50077
    assert {thing["kind"] for thing in objects} == {"DiffusionInferenceService", "ServiceAccount", "Pod"}


def test_monitors_and_alerts_are_about_the_pods_that_the_operator_makes() -> None:
    objects = rendered(ALL)
    monitor = one(objects, "PodMonitor")
    wanted = monitor["spec"]["selector"]["matchLabels"]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert templates().keys() == {"engine", "shard"}
    for role, template in templates().items():
        assert template["metadata"]["labels"].items() >= wanted.items()
        (own,) = template["spec"]["containers"]
        assert own["name"] == role
        assert endpoint["port"] in {port["name"] for port in own["ports"]}
    of = f'namespace="place",job="place/{monitor["metadata"]["name"]}",container="engine"'
    alerts = one(objects, "PrometheusRule")["spec"]["groups"][0]["rules"]
    about = [rule["expr"] for rule in alerts if "gateway" not in rule["expr"]]
    assert about and all(of in expr for expr in about)


def test_the_gateway_finds_the_operator_s_engines_and_the_network_lets_it() -> None:
    objects = rendered(ALL)
    command, *arguments = container(objects)["args"]
    with gateway.command.make_context(command, arguments) as context:
        found = context.params
    target = Target.reading(found["replicas"][0])
    (engines,) = [
        each
        for each in made_by_the_operator()
        if each["kind"] == "Service" and target.host == f"{each['metadata']['name']}.place.svc"
    ]
    assert engines["spec"]["clusterIP"] == "None" and target.many
    assert target.port in {port["port"] for port in engines["spec"]["ports"]}
    assert found["replica_tls_server_name"] == f"{NAME}.place.svc"
    assert found["tls_client_ca"] == Path("/tls/clients/ca.crt") and found["tls_allow"] == ("a.example",)
    volumes = one(objects, "Deployment")["spec"]["template"]["spec"]["volumes"]
    secrets = {each["name"]: each["secret"]["secretName"] for each in volumes if "secret" in each}
    assert secrets == {"tls": f"{NAME}-gateway-tls", "tls-engine": "front", "tls-clients": "clients"}
    policy = one(objects, "NetworkPolicy")
    (peer,) = policy["spec"]["egress"][0]["to"]
    labels = templates()["engine"]["metadata"]["labels"]
    assert labels.items() >= peer["podSelector"]["matchLabels"].items()


def test_cert_manager_makes_the_secrets_that_the_spec_names() -> None:
    made = {each["spec"]["secretName"]: each["spec"] for each in of_kind(rendered(ALL), "Certificate")}
    assert made.keys() == {"front", "inside", f"{NAME}-gateway-tls"}
    for name in (NAME, f"{NAME}.place.svc", f"{NAME}-engines.place.svc"):
        assert name in made["front"]["dnsNames"]
    assert made["inside"]["dnsNames"] == [f"{NAME}.place.svc"]
    spec = OPERATED["spec"]
    both = OPERATED | {
        "spec": spec | {"group": spec["group"] | {"tls": {"secretName": "front"}}},
        "tls": {"certManager": {"issuerRef": {"name": "internal"}}},
    }
    certificate = one(render(INFERENCE, both, *EXTENSIONS), "Certificate")
    assert certificate["spec"]["secretName"] == "front"
    assert of_kind(render(INFERENCE, OPERATED, *EXTENSIONS), "Certificate") == []


def test_helm_test_asks_at_the_service_s_own_port_and_shows_a_certificate() -> None:
    pod = one(rendered("inference: by the operator"), "Pod")["spec"]
    (client,) = pod["containers"]
    with generate.command.make_context("generate", client["args"][1:]) as context:
        found = context.params
    assert found["server"] == f"{NAME}.place.svc:50077"
    assert [str(found[name]) for name in ("tls_ca", "tls_cert")] == [
        "/tls/server/ca.crt",
        "/tls/client/tls.crt",
    ]
    assert {each["name"]: each["secret"]["secretName"] for each in pod["volumes"]} == {
        "tls": "front",
        "tls-client": "front",
    }
    plain = one(render(INFERENCE, OPERATED | {"spec": {"model": {"uri": "pvc://a/b"}}}), "Pod")["spec"]
    assert "volumes" not in plain
    assert f"--server={NAME}.place.svc:50051" in plain["containers"][0]["args"]


def test_notes_say_how_to_see_it_become_ready() -> None:
    told = helm(
        "install", "r", str(CHARTS / INFERENCE), "--namespace=place", "--dry-run=client", values=OPERATED
    )
    told = told.partition("NOTES:")[2]
    assert f"wait --for=condition=Ready diffusioninferenceservices/{NAME}" in told
    assert f"{NAME}.place.svc:50077" in told and f"dns:///{NAME}-engines.place.svc:50077" in told
    assert f"--tls-server-name {NAME}.place.svc --tls-cert" in told


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (MODEL, 'model.uri: got "pvc://models/small/model", and says nothing with standalone=false'),
        ({"server": {"rows": 4}}, "server.rows: got 4, and says nothing with standalone=false"),
        ({"server": {"cacheMib": 4}}, "server.cacheMib: got 4, and"),
        ({"tls": MUTUAL}, "and says nothing with standalone=false; drop it, and say it in spec"),
        ({"spec": {"replica": 2}}, "at '/spec': additional properties 'replica' not allowed"),
        ({"spec": {"server": {"rows": 0}}}, "at '/spec/server/rows': minimum: got 0, want 1"),
        ({"spec": {"rollout": {"maxSurge": "1"}}}, "at '/spec/rollout/maxSurge': got string, want integer"),
        ({"spec": None}, "spec.model: has to be given with standalone=false"),
        ({"standalone": True} | MODEL, "spec: got one, and it is for standalone=false"),
        ({"fullnameOverride": "a" * 41}, "fullnameOverride: a service's name has at most 40 characters"),
    ],
)  # fmt: skip
def test_what_would_be_passed_over_is_refused(given: Json, message: str) -> None:
    values = {name: OPERATED.get(name, {}) for name in given} | given
    if isinstance(given.get("spec"), dict):
        values["spec"] = OPERATED["spec"] | given["spec"]
    assert message in refused("template", "r", str(CHARTS / INFERENCE), values=OPERATED | values)


@pytest.mark.parametrize("value", STANDALONE, ids=[".".join(value.path) for value in STANDALONE])
def test_no_value_of_a_standalone_release_changes_an_operated_one_in_silence(value: charts.Value) -> None:
    told = refused(
        "template", "r", str(CHARTS / INFERENCE), values=OPERATED | nested(value.path, other(value))
    )
    assert f"{'.'.join(value.path)}: got" in told and "say it in spec" in told


def test_the_page_s_values_render() -> None:
    page = (CHARTS.parents[1] / "docs/how-to/serve-on-a-cluster.md").read_text(encoding="utf-8")
    section = page.partition("\n## By Helm\n")[2].partition("\n## ")[0]
    values = yaml.safe_load(section.partition("```yaml\n")[2].partition("```")[0])
    objects = render(INFERENCE, values, *EXTENSIONS)
    assert parsed(one(objects, "DiffusionInferenceService")).spec.group.shards == 2
    assert one(objects, "Deployment")["metadata"]["name"] == f"{NAME}-gateway"
