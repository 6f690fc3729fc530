"""The gateway of the chart `unmask-inference`, rendered."""

from pathlib import Path

import pytest

from support.charts import (
    COMPONENT,
    INFERENCE,
    MODEL,
    MUTUAL,
    PEER,
    Json,
    container,
    one,
    pods,
    render,
    rendered,
)
from unmask.cli import gateway, generate
from unmask.gateway.addresses import Target

pytestmark = pytest.mark.helm

FRONT = "r-unmask-inference-gateway"


def test_the_gateway_s_arguments_are_those_of_its_values() -> None:
    values = MODEL | {
        "gateway": {"enabled": True, "prefixBlocks": 7, "loadBound": 1.5, "waitSeconds": 2.5,
                    "maxCalls": 12345678, "extraArgs": ["--attempts=5"], "tlsSecretName": "front"},
        "server": {"host": "::", "maxRequestSeconds": 90.5, "maxConnectionAgeSeconds": 60},
        "termination": {"drainSeconds": 25},
        "http": {"enabled": True},
        "tls": {"enabled": True, "secretName": "s", "clientCASecretName": "c", "clientCAKey": "all.pem",
                "allow": ["a.example"]},
    }  # fmt: skip
    command, *arguments = container(render(INFERENCE, values), FRONT)["args"]
    assert command == "gateway"
    with gateway.command.make_context("gateway", arguments) as context:
        found = context.params
    assert found == {
        "replicas": ("dns:r-unmask-inference-headless.place.svc:50051",), "host": "::", "port": 50050,
        "metrics_port": 9092, "http_port": 8000, "resolve_seconds": 5.0, "prefix_blocks": 7,
        "load_bound": 1.5, "attempts": 5, "wait_seconds": 2.5, "max_calls": 12345678,
        "max_request_seconds": 90.5, "drain_seconds": 25.0, "max_connection_age_seconds": 60.0,
        "tls_cert": Path("/tls/gateway/tls.crt"), "tls_key": Path("/tls/gateway/tls.key"),
        "tls_client_ca": Path("/tls/clients/all.pem"), "tls_allow": ("a.example",),
        "replica_tls_ca": Path("/tls/engine/ca.crt"), "replica_tls_cert": Path("/tls/gateway/tls.crt"),
        "replica_tls_key": Path("/tls/gateway/tls.key"), "replica_tls_server_name": None,
    }  # fmt: skip


def test_the_gateway_finds_engines_where_they_are_and_their_certificates_say_so() -> None:
    objects = rendered("inference: a gateway with certificates by cert-manager")
    target = Target.reading(container(objects, FRONT)["args"][1])
    host = target.host.removesuffix(".place.svc")
    headless = one(objects, "Service", host)["spec"]
    assert target.many and headless["clusterIP"] == "None"
    assert [port["port"] for port in headless["ports"]] == [target.port]
    assert target.host in one(objects, "Certificate", "r-unmask-inference")["spec"]["dnsNames"]
    assert f"{FRONT}.place.svc" in one(objects, "Certificate", FRONT)["spec"]["dnsNames"]
    assert volumes_of_front(objects)["tls"] == "r-unmask-inference-gateway-tls"
    assert volumes_of_front(objects)["tls-engine"] == "r-unmask-inference-tls"


def volumes_of_front(objects: list[Json]) -> dict[str, str]:
    """Its Secrets, by the names of its volumes."""
    spec = one(objects, "Deployment", FRONT)["spec"]["template"]["spec"]
    return {each["name"]: each["secret"]["secretName"] for each in spec["volumes"] if "secret" in each}


@pytest.mark.parametrize(("given", "secret"), [({}, "words-tls"), ({"tlsSecretName": "mine"}, "mine")])
def test_the_gateway_shows_its_certificate_to_both_sides(given: Json, secret: str) -> None:
    objects = render(INFERENCE, MODEL | {"gateway": {"enabled": True} | given, "tls": MUTUAL})
    front = container(objects, FRONT)
    assert volumes_of_front(objects) == {"tls": secret, "tls-engine": "words-tls", "tls-clients": "clients"}
    mounts = {mount["mountPath"]: mount["name"] for mount in front["volumeMounts"]}
    assert {path: name for path, name in mounts.items() if path.startswith("/tls/")} == {
        "/tls/gateway": "tls",
        "/tls/engine": "tls-engine",
        "/tls/clients": "tls-clients",
    }
    for probe, path in (("livenessProbe", "/livez"), ("readinessProbe", "/healthz")):
        assert front[probe]["httpGet"] == {"path": path, "port": "metrics"}


def test_the_gateway_s_probes_ask_its_own_port() -> None:
    front = container(rendered("inference: a gateway"), FRONT)
    assert front["readinessProbe"]["grpc"] == {"port": 50050, "service": "unmask.v1.Generation"}
    assert front["livenessProbe"]["grpc"] == {"port": 50050}
    assert {port["name"]: port["containerPort"] for port in front["ports"]} == {
        "grpc": 50050,
        "metrics": 9092,
        "http": 8000,
    }


def test_the_network_lets_gateways_reach_engines_and_clients_gateways() -> None:
    objects = rendered("inference: a gateway with certificates by cert-manager")
    labels = {pod["metadata"]["labels"][COMPONENT]: pod["metadata"]["labels"] for pod in pods(objects)}
    engines = one(objects, "NetworkPolicy", "r-unmask-inference")["spec"]
    fronts = one(objects, "NetworkPolicy", FRONT)["spec"]

    def let_in(policy: Json) -> set[str]:
        peers = [peer["podSelector"] for peer in policy["ingress"][0]["from"] if "podSelector" in peer]
        return {
            name
            for name, own in labels.items()
            if any(own.items() >= peer["matchLabels"].items() for peer in peers)
        }

    assert (let_in(engines), let_in(fronts)) == ({"gateway", "test"}, {"test"})
    assert PEER in engines["ingress"][0]["from"] and PEER in fronts["ingress"][0]["from"]
    to_engines, to_dns = fronts["egress"]
    assert labels["engine"].items() >= to_engines["to"][0]["podSelector"]["matchLabels"].items()
    assert [port["port"] for port in to_engines["ports"] + to_dns["ports"]] == ["grpc", 53, 53]
    assert engines["egress"] == []


def test_helm_test_asks_the_gateway_where_there_is_one() -> None:
    pod = one(rendered("inference: a gateway with certificates by cert-manager"), "Pod")["spec"]
    with generate.command.make_context("generate", pod["containers"][0]["args"][1:]) as context:
        assert context.params["server"] == f"{FRONT}:50050"
    (volume,) = pod["volumes"]
    assert volume["secret"]["secretName"] == "r-unmask-inference-gateway-tls"
