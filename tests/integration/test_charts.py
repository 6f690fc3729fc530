"""The Helm charts, rendered: what would be applied, and what is refused."""

import json
import re
import shlex
from functools import cache
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from observability.alerts import ALERTS, rules
from observability.dashboards import dashboard

import charts
from support.charts import (
    CHARTS,
    COMPONENT,
    EXTENSIONS,
    INFERENCE,
    MATRIX,
    MODEL,
    MUTUAL,
    OPERATOR,
    OTHER,
    PAGE,
    RUNBOOKS,
    SECURITY_PAGE,
    Json,
    container,
    helm,
    laid,
    nested,
    of_kind,
    one,
    other,
    page_commands,
    pods,
    refused,
    render,
    rendered,
    restricted,
)
from unmask.cli import generate, serve
from unmask_api import crd
from unmask_operator import entry, rbac
from unmask_operator.reconcilers import RECONCILERS

pytestmark = pytest.mark.helm


# What is applied


@pytest.mark.parametrize("case", MATRIX)
def test_lint_has_nothing_to_say(case: str) -> None:
    chart, values = MATRIX[case]
    assert "0 chart(s) failed" in helm("lint", "--strict", str(CHARTS / chart), values=values)


@pytest.mark.parametrize("version", ["1.30", "1.37"])
@pytest.mark.parametrize("case", MATRIX)
def test_the_api_server_s_schemas_allow_every_object(case: str, version: str) -> None:
    objects = rendered(case, version)
    others = ("monitoring.coreos.com/", "cert-manager.io/", "unmask.dev/")
    ours = [thing for thing in objects if not thing["apiVersion"].startswith(others)]
    for thing in ours:
        kubernetes_validate.validate(thing, version, strict=True)
    assert len(ours) >= 2


@pytest.mark.parametrize("case", MATRIX)
def test_objects_are_labelled_and_lie_in_the_release_s_namespace(case: str) -> None:
    chart, values = MATRIX[case]
    names = set()
    for thing in rendered(case):
        meta = thing["metadata"]
        names.add((thing["kind"], meta.get("namespace"), meta["name"]))
        assert len(meta["name"]) <= 63
        assert meta["labels"]["app.kubernetes.io/name"] == chart
        assert meta["labels"]["app.kubernetes.io/managed-by"] == "Helm"
        assert meta["labels"].items() >= values.get("commonLabels", {}).items()
        wide = thing["kind"] in ("ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition")
        assert meta.get("namespace") in ((None,) if wide else ("place", values.get("watchNamespace")))
    assert len(names) == len(rendered(case))


@pytest.mark.parametrize("case", MATRIX)
def test_pods_are_allowed_in_restricted_namespaces_and_hardened_beyond(case: str) -> None:
    found = list(pods(rendered(case)))
    assert len(found) == 1 + len(of_kind(rendered(case), "Deployment"))  # one is that of `helm test`
    for pod in found:
        spec = pod["spec"]
        assert restricted(spec) == []
        assert spec["enableServiceLinks"] is False
        for each in spec["containers"]:
            assert each["securityContext"]["readOnlyRootFilesystem"] is True
            assert each["resources"]["limits"]["memory"] == each["resources"]["requests"]["memory"]
    tokens = [pod["spec"]["automountServiceAccountToken"] for pod in found]
    assert sum(tokens) == (MATRIX[case][0] == OPERATOR)


def test_the_check_of_restricted_pods_finds_each_breach() -> None:
    (pod, _) = pods(rendered("inference"))
    breaches: list[tuple[str, Json]] = [
        ("hostNetwork is set", {"hostNetwork": True}),
        ("volume of type hostPath", {"volumes": [{"name": "a", "hostPath": {"path": "/"}}]}),
        ("engine: runAsNonRoot", {"securityContext": {"seccompProfile": {"type": "RuntimeDefault"}}}),
        ("engine: seccompProfile", {"securityContext": {"runAsNonRoot": True}}),
    ]
    for message, change in breaches:
        assert restricted(pod["spec"] | change) == [message]
    (engine,) = pod["spec"]["containers"]
    for name, value in (("privileged", True), ("allowPrivilegeEscalation", True), ("capabilities", {})):
        changed = engine | {"securityContext": engine["securityContext"] | {name: value}}
        assert restricted(pod["spec"] | {"containers": [changed]}) == [f"engine: {name}"]


@pytest.mark.parametrize("case", MATRIX)
def test_services_and_budgets_select_the_pods_of_one_workload_and_not_the_test_s(case: str) -> None:
    objects = rendered(case)
    labels = [pod["metadata"]["labels"] for pod in pods(objects)]
    selectors = [(thing, thing["spec"]["selector"]) for thing in of_kind(objects, "Service")]
    selectors += [
        (thing, thing["spec"]["selector"]["matchLabels"])
        for thing in objects
        if thing["kind"] in ("Deployment", "PodDisruptionBudget")
    ]
    selectors += [
        (thing, thing["spec"]["podSelector"]["matchLabels"]) for thing in of_kind(objects, "NetworkPolicy")
    ]
    assert len(selectors) >= 2 or case == "inference: by the operator"
    for thing, selector in selectors:
        (own,) = [each[COMPONENT] for each in labels if each.items() >= selector.items()]
        assert own == thing["metadata"]["labels"][COMPONENT].removesuffix("-addresses") != "test"
    for monitor in of_kind(objects, "ServiceMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        (service,) = [s for s in of_kind(objects, "Service") if s["metadata"]["labels"].items() >= wanted]
        assert "metrics" in {port["name"] for port in service["spec"]["ports"]}


# The operator


def test_the_definitions_are_those_of_the_models_and_stay_by_default() -> None:
    found = of_kind(rendered("operator"), "CustomResourceDefinition")
    assert {thing["metadata"]["name"]: thing["spec"] for thing in found} == {
        resource.full_name: crd.definition(resource)["spec"] for resource in crd.RESOURCES
    }
    for thing in found:
        assert thing["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    for gone in of_kind(render(OPERATOR, {"crds": {"keep": False}}), "CustomResourceDefinition"):
        assert "annotations" not in gone["metadata"]


@pytest.mark.parametrize(("case", "role"), [("operator", "ClusterRole"), ("operator: one namespace", "Role")])
def test_the_permissions_are_those_that_the_code_declares(case: str, role: str) -> None:
    objects = rendered(case)
    bindings = [
        thing
        for thing in objects
        if thing["kind"].endswith("Binding") and "lease" not in thing["metadata"]["name"]
    ]
    (binding,) = bindings
    assert binding["roleRef"]["kind"] == role
    granted = one(objects, role, binding["roleRef"]["name"])
    assert granted["rules"] == rbac.rules(RECONCILERS)
    assert granted["metadata"].get("namespace") == MATRIX[case][1].get("watchNamespace")
    lease = one(objects, "Role", "r-unmask-operator-lease")
    flags = entry.parser().parse_args(container(objects)["args"])
    assert lease["rules"] == rbac.lease_rules(flags.lease_name)
    assert lease["metadata"]["namespace"] == flags.lease_namespace == "place"
    # It goes with the Deployment, which has its name: the rules say so.
    assert flags.lease_owner == flags.lease_name == one(objects, "Deployment")["metadata"]["name"]
    account = one(objects, "ServiceAccount")["metadata"]
    subject = {"kind": "ServiceAccount", "name": account["name"], "namespace": "place"}
    assert (
        binding["subjects"] == one(objects, "RoleBinding", "r-unmask-operator-lease")["subjects"] == [subject]
    )


def test_people_get_what_they_may_do_with_the_custom_resources() -> None:
    roles = {thing["metadata"]["name"]: thing for thing in of_kind(rendered("operator"), "ClusterRole")}
    editor, viewer = (roles[f"place-r-unmask-operator-{name}"] for name in ("editor", "viewer"))
    assert editor["rules"] == rbac.rules_for_people(edit=True)
    assert viewer["rules"] == rbac.rules_for_people(edit=False)
    aggregate = "rbac.authorization.k8s.io/aggregate-to-"
    assert {key for key in editor["metadata"]["labels"] if key.startswith(aggregate)} == {
        f"{aggregate}admin",
        f"{aggregate}edit",
    }
    assert f"{aggregate}view" in viewer["metadata"]["labels"]
    writes = {"create", "delete", "deletecollection", "patch", "update"}
    assert not any(writes & set(rule["verbs"]) for rule in viewer["rules"])


def test_the_operator_s_flags_are_those_of_its_values() -> None:
    values = {
        "watchNamespace": "team-a", "workers": 7, "client": {"qps": 2.5, "burst": 9}, "lease": {"seconds": 4},
        "logLevel": "DEBUG", "workerImage": {"registry": "r.example", "repository": "w", "tag": "t"},
        "fullnameOverride": "other",
    }  # fmt: skip
    flags = entry.parser().parse_args(container(render(OPERATOR, values))["args"])
    assert vars(flags) | {
        "namespace": "team-a", "workers": 7, "qps": 2.5, "burst": 9, "lease_seconds": 4.0,
        "log_level": "DEBUG", "image": "r.example/w:t", "lease_name": "other",
    } == vars(flags)  # fmt: skip
    default = container(rendered("operator"))
    assert default["ports"][0]["containerPort"] == entry.parser().parse_args(default["args"]).port
    without = container(render(OPERATOR, {"workerImage": {"repository": ""}}))
    assert entry.parser().parse_args(without["args"]).image is None


def test_two_copies_have_a_budget_and_one_has_none() -> None:
    assert of_kind(rendered("operator"), "PodDisruptionBudget") == []
    assert one(rendered("operator: two copies"), "PodDisruptionBudget")["spec"]["minAvailable"] == 1


def pages_of(*whose: str) -> list[str]:
    """Where the pages of a chart's alerts are, which have to be in the tree."""
    names = [f"{alert.name}.md" for alert in ALERTS if alert.whose in whose]
    assert all((CHARTS.parents[1] / "docs/runbooks" / name).is_file() for name in names)
    return [f"{RUNBOOKS}/{name}" for name in names]


def test_the_operator_s_alerts_are_those_that_a_prometheus_was_asked() -> None:
    objects = rendered("operator: everything")
    service = one(objects, "Service")["metadata"]
    rule = one(objects, "PrometheusRule")
    assert rule["metadata"]["labels"]["release"] == "p"
    found = rule["spec"]["groups"][0]["rules"]
    assert [each["annotations"].pop("runbook_url") for each in found] == pages_of("operator")
    assert found == rules(operator='namespace="{namespace}",service="{name}"'.format(**service))
    without = render(OPERATOR, {"metrics": {"prometheusRule": {"enabled": True}}}, *EXTENSIONS)
    assert one(without, "PrometheusRule")["spec"]["groups"][0]["rules"] == found


# The engine


def test_the_engine_s_alerts_and_dashboard_are_those_that_a_prometheus_was_asked() -> None:
    objects = rendered("inference: everything")
    service = next(one for one in of_kind(objects, "Service") if "clusterIP" not in one["spec"])["metadata"]
    found = one(objects, "PrometheusRule")["spec"]["groups"][0]["rules"]
    pages = [rule["annotations"].pop("runbook_url") for rule in found]
    of = 'namespace="{namespace}",service="{name}'.format(**service)
    assert found == rules(of=f'{of}"', gateway=f'{of}-gateway"')
    assert pages == pages_of("of", "gateway")
    held = one(objects, "ConfigMap", f"{service['name']}-dashboard")
    assert held["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(held["data"]["unmask-serving.json"]) == json.loads(dashboard())
    without = render(INFERENCE, MODEL | {"metrics": {"prometheusRule": {"enabled": True}}}, *EXTENSIONS)
    assert one(without, "PrometheusRule")["spec"]["groups"][0]["rules"] == found


def test_the_engine_s_arguments_are_those_of_its_values() -> None:
    values = MODEL | {
        "model": {"uri": "pvc://models/small/model/", "name": "m"},
        "server": {
            "host": "::", "rows": 3, "context": 128, "maxQueue": 5, "maxQueueTokens": 12345678,
            "cacheMib": 4096, "maxPositions": 1024,
            "maxRequestSeconds": 90.5, "maxConnectionAgeSeconds": 60, "device": "cuda:1", "threads": 2,
            "quantization": "int8", "extraArgs": ["--eager"],
        },
        "termination": {"drainSeconds": 25},
        "http": {"enabled": True},
        "control": {"enabled": True, "weightsRoot": "/volumes/models"},
        "tls": {"enabled": True, "secretName": "s", "clientCASecretName": "c", "clientCAKey": "all.pem",
                "allow": ["a.example", "*.b", "spiffe://c/d"]},
    }  # fmt: skip
    command, *arguments = container(render(INFERENCE, values))["args"]
    assert command == "serve"
    with serve.command.make_context("serve", arguments) as context:
        found = context.params
    assert found == {
        "folder": Path("/volumes/models/small/model"), "host": "::", "port": 50051, "metrics_port": 9090,
        "http_port": 8000, "control_port": 50052, "control_host": "127.0.0.1",
        "weights_root": Path("/volumes/models"), "cache_mib": 4096, "max_positions": 1024, "name": "m",
        "rows": 3, "context": 128, "max_queue": 5, "max_queue_tokens": 12345678,
        "max_request_seconds": 90.5, "drain_seconds": 25.0, "max_connection_age_seconds": 60.0,
        "device": "cuda:1", "quantization": "int8", "eager": True, "threads": 2,
        "tls_cert": Path("/tls/server/tls.crt"), "tls_key": Path("/tls/server/tls.key"),
        "tls_client_ca": Path("/tls/clients/all.pem"), "tls_allow": ("a.example", "*.b", "spiffe://c/d"),
        "control_tls_client_ca": None, "control_tls_allow": (),
        "experts": None, "experts_rows": "float32", "experts_micro_batches": 1, "experts_wait_seconds": 300.0,
        "experts_tls_ca": None, "experts_tls_cert": None, "experts_tls_key": None,
        "experts_tls_server_name": None,
    }  # fmt: skip


def test_http_is_open_where_it_is_asked_for_and_nowhere_else() -> None:
    def doors(objects: list[Json]) -> tuple[list[str], list[str], list[str]]:
        service, policy = one(objects, "Service"), one(objects, "NetworkPolicy")
        return (
            [port["name"] for port in container(objects)["ports"]],
            [port["name"] for port in service["spec"]["ports"]],
            [port["port"] for port in policy["spec"]["ingress"][0]["ports"]],
        )

    bare = {"headlessService": {"enabled": False}, "networkPolicy": {"enabled": True}}
    assert doors(render(INFERENCE, MODEL | bare)) == (["grpc", "metrics"], ["grpc", "metrics"], ["grpc"])
    wanted = MODEL | bare | {"http": {"enabled": True}}
    assert doors(render(INFERENCE, wanted)) == (
        ["grpc", "metrics", "http"], ["grpc", "metrics", "http"], ["grpc", "http"],
    )  # fmt: skip


def test_the_model_is_read_from_its_claim_and_cannot_be_written() -> None:
    objects = rendered("inference")
    engine, pod = container(objects), one(objects, "Deployment")["spec"]["template"]["spec"]
    (mount,) = [mount for mount in engine["volumeMounts"] if mount["name"] == "model"]
    (volume,) = [volume for volume in pod["volumes"] if volume["name"] == "model"]
    assert mount == {"name": "model", "mountPath": "/volumes/models", "readOnly": True}
    assert volume["persistentVolumeClaim"] == {"claimName": "models", "readOnly": True}
    assert engine["args"][1].startswith(mount["mountPath"] + "/")


@pytest.mark.parametrize("termination", [(5, 60, 15), (1, 0, 1), (30, 600, 10)])
def test_the_grace_period_is_enough_for_all_that_has_to_happen(termination: tuple[int, int, int]) -> None:
    names = ("preStopSeconds", "drainSeconds", "reserveSeconds")
    values = MODEL | {"termination": dict(zip(names, termination, strict=True))}
    objects = render(INFERENCE, values)
    engine = container(objects)
    grace = one(objects, "Deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    asleep = engine["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert (asleep, grace) == (termination[0], sum(termination))
    assert f"--drain-seconds={termination[1]}" in engine["args"]


@pytest.mark.parametrize(("seconds", "fails"), [(1800, 360), (5, 1), (6, 2)])
def test_a_model_has_at_least_the_time_to_load_that_its_value_says(seconds: int, fails: int) -> None:
    objects = render(INFERENCE, MODEL | {"probes": {"startupSeconds": seconds}})
    probe = container(objects)["startupProbe"]
    assert (probe["periodSeconds"], probe["failureThreshold"]) == (5, fails)
    assert probe["grpc"] == {"port": 50051} and "initialDelaySeconds" not in probe
    assert one(objects, "Deployment")["spec"]["progressDeadlineSeconds"] > seconds


def test_readiness_asks_for_the_service_and_liveness_for_the_server() -> None:
    engine = container(rendered("inference"))
    assert engine["readinessProbe"]["grpc"] == {"port": 50051, "service": "unmask.v1.Generation"}
    assert engine["livenessProbe"]["grpc"] == {"port": 50051}
    assert {port["name"]: port["containerPort"] for port in engine["ports"]} == {
        "grpc": 50051,
        "metrics": 9090,
    }


def test_with_tls_probes_ask_where_no_certificate_is_needed() -> None:
    engine = container(rendered("inference: tls"))
    paths = {"startupProbe": "/livez", "livenessProbe": "/livez", "readinessProbe": "/healthz"}
    for probe, path in paths.items():
        assert engine[probe]["httpGet"] == {"path": path, "port": "metrics"}
        assert "grpc" not in engine[probe]
        plain = dict(container(rendered("inference"))[probe])
        del plain["grpc"]
        assert engine[probe] == plain | {"httpGet": engine[probe]["httpGet"]}  # as often, and as patient


def test_certificates_are_mounted_as_whole_folders_which_follow_their_secrets() -> None:
    objects = rendered("inference: everything")
    engine, pod = container(objects), one(objects, "Deployment")["spec"]["template"]["spec"]
    mounts = {mount["name"]: mount for mount in engine["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for name, path, secret in (
        ("tls", "/tls/server", "words-tls"),
        ("tls-clients", "/tls/clients", "clients"),
    ):
        assert mounts[name] == {"name": name, "mountPath": path, "readOnly": True}
        assert volumes[name]["secret"] == {"secretName": secret}
    assert {name for name in names_of_volumes("inference") if name.startswith("tls")} == set()
    assert {name for name in names_of_volumes("inference: tls") if name.startswith("tls")} == {"tls"}


def names_of_volumes(case: str) -> set[str]:
    return {volume["name"] for volume in volumes_of(case)}


def volumes_of(case: str) -> list[Json]:
    return one(rendered(case), "Deployment")["spec"]["template"]["spec"]["volumes"]  # type: ignore[no-any-return]


def test_cert_manager_makes_the_secret_that_the_engine_reads_for_the_names_of_its_services() -> None:
    objects = rendered("inference: certificates by cert-manager")
    certificate = one(objects, "Certificate")["spec"]
    (volume,) = [v for v in volumes_of("inference: certificates by cert-manager") if v["name"] == "tls"]
    assert certificate["secretName"] == volume["secret"]["secretName"] == "r-unmask-inference-tls"
    assert certificate["issuerRef"] == {"name": "internal", "kind": "Issuer", "group": "cert-manager.io"}
    for service in of_kind(objects, "Service"):
        name = service["metadata"]["name"]
        assert {name, f"{name}.place", f"{name}.place.svc"} <= set(certificate["dnsNames"])
    assert of_kind(rendered("inference: tls"), "Certificate") == []
    chart, values = MATRIX["inference: certificates by cert-manager"]
    assert of_kind(render(chart, values), "Certificate") == []
    assert "no cert-manager.io/v1: the Certificate is left out" in notes(chart, values)


def test_gateways_are_told_that_the_port_speaks_tls() -> None:
    def told(values: Json) -> set[str]:
        services = of_kind(render(INFERENCE, MODEL | values), "Service")
        return {
            port["appProtocol"]
            for each in services
            for port in each["spec"]["ports"]
            if port["name"] == "grpc"
        }

    tls = {"tls": {"enabled": True, "secretName": "s"}}
    assert told({}) == {"kubernetes.io/h2c"}
    assert told(tls) == {"https"}
    assert told(tls | {"service": {"appProtocol": "grpcs"}}) == {"grpcs"}


def test_an_accelerator_is_asked_for_and_used() -> None:
    engine = container(rendered("inference: gpu"))
    assert engine["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert engine["resources"]["limits"]["memory"] == "2Gi"
    assert "--device=cuda" in engine["args"]
    assert "--device=cpu" in container(rendered("inference"))["args"]


def test_the_headless_service_gives_the_engines_own_addresses() -> None:
    services = of_kind(rendered("inference"), "Service")
    plain, headless = services
    assert headless["spec"]["clusterIP"] == "None" and "clusterIP" not in plain["spec"]
    assert [port["port"] for port in headless["spec"]["ports"]] == [50051]


def test_helm_test_asks_the_model_for_an_answer() -> None:
    pod = one(rendered("inference"), "Pod")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    command, *arguments = pod["spec"]["containers"][0]["args"]
    assert command == "generate"
    with generate.command.make_context("generate", arguments) as context:
        found = context.params
    assert (found["server"], found["text"]) == ("r-unmask-inference:50051", "hello")
    assert (found["max_tokens"], found["timeout_s"]) == (8, 120)
    assert found["tls_ca"] is None and found["tls_cert"] is None


@pytest.mark.parametrize(
    ("values", "shown"),
    [({}, "words-tls"), ({"test": {"tlsSecretName": "mine"}}, "mine")],
    ids=["the engine's own", "another"],
)
def test_helm_test_shows_a_certificate_where_one_is_asked_for(values: Json, shown: str) -> None:
    tls = {"enabled": True, "secretName": "words-tls", "clientCASecretName": "clients"}
    pod = one(render(INFERENCE, MODEL | {"tls": tls} | values), "Pod")["spec"]
    (client,) = pod["containers"]
    with generate.command.make_context("generate", client["args"][1:]) as context:
        given = [str(context.params[name]) for name in ("tls_ca", "tls_cert", "tls_key")]
    secrets = {volume["name"]: volume["secret"]["secretName"] for volume in pod["volumes"]}
    where = {mount["mountPath"]: secrets[mount["name"]] for mount in client["volumeMounts"]}
    assert where == {"/tls/server": "words-tls", "/tls/client": shown}
    assert given == ["/tls/server/ca.crt", "/tls/client/tls.crt", "/tls/client/tls.key"]
    unasked = one(rendered("inference: tls"), "Pod")["spec"]
    assert [volume["name"] for volume in unasked["volumes"]] == ["tls"]
    assert unasked["volumes"][0]["secret"]["items"] == [{"key": "ca.crt", "path": "ca.crt"}]


def test_an_autoscaler_decides_about_the_number_where_the_values_do_not() -> None:
    assert "replicas" not in one(rendered("inference: left to an autoscaler"), "Deployment")["spec"]


# Values


@pytest.mark.parametrize(
    ("chart", "given", "message"),
    [
        (OPERATOR, {"replicas": 3}, "at '/replicas': maximum: got 3, want 2"),
        (OPERATOR, {"replica": 1}, "additional properties 'replica' not allowed"),
        (OPERATOR, {"image": {"digest": "sha256:1"}}, "at '/image/digest': 'sha256:1' does not match"),
        (OPERATOR, {"image": {"pullPolicy": "Sometimes"}}, "at '/image/pullPolicy': value must be one of"),
        (OPERATOR, {"logLevel": "debug"}, "at '/logLevel': value must be one of 'DEBUG', 'INFO'"),
        (OPERATOR, {"client": {"qps": 0}}, "at '/client/qps': exclusiveMinimum: got 0, want 0"),
        (OPERATOR, {"watchNamespace": "Team A"}, "at '/watchNamespace': 'Team A' does not match pattern"),
        (OPERATOR, {"commonLabels": {"a": 1}}, "at '/commonLabels/a': got number, want string"),
        (OPERATOR, {"crds": {"install": "no"}}, "at '/crds/install': got string, want boolean"),
        (OPERATOR, {"networkPolicy": {"apiServerPorts": []}}, "at '/networkPolicy/apiServerPorts': minItems"),
        (OPERATOR, {"metrics": {"serviceMonitor": {"interval": "1"}}}, "/serviceMonitor/interval': '1' does"),
        (INFERENCE, {"model": {"uri": ""}}, "model.uri: has to be given, as pvc://NAME/path"),
        (INFERENCE, {"model": {"uri": "s3://a/b"}}, "at '/model/uri': 's3://a/b' does not match pattern"),
        (INFERENCE, {"model": {"uri": "pvc://a/../b"}}, "model.uri: got pvc://a/../b, the path leaves"),
        (INFERENCE, {"replicas": -1}, "at '/replicas': minimum: got -1, want 0"),
        (INFERENCE, {"replicas": "two"}, "at '/replicas': got string, want null or integer"),
        (INFERENCE, {"server": {"rows": 0}}, "at '/server/rows': minimum: got 0, want 1"),
        (INFERENCE, {"server": {"port": 1}}, "at '/server': additional properties 'port' not allowed"),
        (INFERENCE, {"probes": {"startupSeconds": 1}}, "at '/probes/startupSeconds': minimum: got 1, want 5"),
        (INFERENCE, {"termination": {"preStopSeconds": 0}}, "at '/termination/preStopSeconds': minimum"),
        (INFERENCE, {"sharedMemory": "big"}, "at '/sharedMemory': 'big' does not match pattern"),
        (INFERENCE, {"strategy": {"maxUnavailable": 0}}, "strategy: maxSurge and maxUnavailable are both 0"),
        (INFERENCE, {"strategy": {"maxSurge": "half"}}, "at '/strategy/maxSurge': 'half' does not match"),
        (INFERENCE, {"service": {"type": "Public"}}, "at '/service/type': value must be one of"),
        (INFERENCE, {"service": {"port": 70000}}, "at '/service/port': maximum: got 70,000, want 65,535"),
        (INFERENCE, {"gpu": {"enabled": 1}}, "at '/gpu/enabled': got number, want boolean"),
        (INFERENCE, {"test": {"prompt": ""}}, "at '/test/prompt': minLength"),
        (INFERENCE, {"tls": {"enabled": True}}, "tls.secretName: has to be given with tls.enabled"),
        (INFERENCE, {"tls": {"enabled": True, "secretName": "s", "allow": ["a"]}}, "tls.allow: clients that"),
        (INFERENCE, {"tls": {"allow": [""]}}, "at '/tls/allow/0': minLength"),
        (INFERENCE, {"gateway": {"replicas": 0}}, "at '/gateway/replicas': minimum: got 0, want 1"),
        (INFERENCE, {"gateway": {"loadBound": 0.5}}, "at '/gateway/loadBound': minimum: got 0.5, want 1"),
        (INFERENCE, {"gateway": {"enabled": True}, "headlessService": {"enabled": False}}, "gateway.enabled"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_with_its_name(chart: str, given: Json, message: str) -> None:
    told = refused("template", "r", str(CHARTS / chart), values=(MODEL if chart == INFERENCE else {}) | given)
    assert message in told


NEEDS: dict[str, Json] = {
    "control.weightsRoot": {"control": {"enabled": True}},
    "gateway.": {"gateway": {"enabled": True}},
    "gateway.service.httpPort": {"http": {"enabled": True}},
    "gateway.tlsSecretName": {"tls": {"enabled": True, "secretName": "s"}},
    "gpu.resource": {"gpu": {"enabled": True}},
    "service.httpPort": {"http": {"enabled": True}},
    "test.tlsSecretName": {"tls": MUTUAL},
    "tls.": {"tls": {"enabled": True, "secretName": "s"}},
    "tls.allow": {"tls": {"clientCASecretName": "c"}},
    "tls.certManager.": {"tls": {"certManager": {"issuerRef": {"name": "i"}}}},
    "tls.clientCAKey": {"tls": {"clientCASecretName": "c"}},
    "tls.enabled": {"tls": {"secretName": "s"}},
    "metrics.dashboard.": {"metrics": {"dashboard": {"enabled": True}}},
    "metrics.prometheusRule.": {"metrics": {"prometheusRule": {"enabled": True}}},
    "metrics.serviceMonitor.": {"metrics": {"serviceMonitor": {"enabled": True}}},
    "networkPolicy.": {"networkPolicy": {"enabled": True}},
    "podDisruptionBudget.": {"replicas": 2},
}
"""Values, by the start of their names, that matter only beside others."""
VALUES = [
    (chart, value)
    for chart in (INFERENCE, OPERATOR)
    for value in charts.values((CHARTS / chart / "values.yaml").read_text(encoding="utf-8"))
    if not value.section and value.path not in [("standalone",), ("spec",)]
]
"""Those of a release that an operator makes the pods of have tests of their own."""


@cache
def text_of(chart: str, values: str) -> list[Json]:
    return render(chart, yaml.safe_load(values), *EXTENSIONS)


@pytest.mark.parametrize(
    ("chart", "value"), VALUES, ids=[f"{chart}-{'.'.join(value.path)}" for chart, value in VALUES]
)
def test_each_value_changes_what_is_rendered(chart: str, value: charts.Value) -> None:
    name = ".".join(value.path)
    base: Json = MODEL if chart == INFERENCE else {}
    for start, needed in NEEDS.items():
        if name.startswith(start) and name != f"{start}enabled" or (start, name) == (
            "podDisruptionBudget.", "podDisruptionBudget.enabled"
        ):  # fmt: skip
            base = laid(base, needed)
    without = text_of(chart, yaml.safe_dump(base))
    with_it = text_of(chart, yaml.safe_dump(laid(base, nested(value.path, other(value)))))
    assert with_it != without


def test_every_alternative_belongs_to_a_value() -> None:
    names = {".".join(value.path) for _, value in VALUES}
    assert OTHER.keys() <= names
    assert [start for start in NEEDS if not any(name.startswith(start) for name in names)] == []


# What people are told


def notes(chart: str, values: Json) -> str:
    told = helm("install", "r", str(CHARTS / chart), "--namespace=place", "--dry-run=client", values=values)
    return told.partition("NOTES:")[2]


def test_notes_say_what_to_do_next() -> None:
    told = notes(OPERATOR, {"metrics": {"serviceMonitor": {"enabled": True}}})
    assert "in all namespaces." in told and "kubectl --namespace place rollout status" in told
    assert "no monitoring.coreos.com/v1: ServiceMonitor and PrometheusRule are left out" in told
    assert (
        of_kind(render(OPERATOR, {"metrics": {"serviceMonitor": {"enabled": True}}}), "ServiceMonitor") == []
    )
    assert "in namespace team-a." in notes(OPERATOR, {"watchNamespace": "team-a"})
    assert "It has no copies" in notes(OPERATOR, {"replicas": 0})
    told = notes(INFERENCE, MODEL)
    assert "r-unmask-inference serves pvc://models/small/model." in told
    assert "dns:///r-unmask-inference-headless.place.svc:50051" in told and "gateway" not in told
    told = notes(INFERENCE, MODEL | {"gateway": {"enabled": True}})
    assert "before the engines, at r-unmask-inference-gateway.place.svc:50050" in told


@pytest.mark.parametrize("chart", [OPERATOR, INFERENCE])
def test_a_packaged_chart_renders_the_same(chart: str, tmp_path: Path) -> None:
    helm("package", str(CHARTS / chart), f"--destination={tmp_path}")
    (package,) = tmp_path.iterdir()
    values = MODEL if chart == INFERENCE else {}
    told = helm("template", "r", str(package), "--namespace=place", values=values)
    assert [thing for thing in yaml.safe_load_all(told) if thing] == render(chart, values)


@pytest.mark.parametrize(
    "line",
    [line for heading in ("## The operator", "## An engine") for line in page_commands(PAGE, heading)[:1]],
)
def test_what_the_page_installs_renders_with_what_it_sets(line: str) -> None:
    program, action, name, chart, *options = shlex.split(line)
    assert (program, action) == ("helm", "install")
    options = [option for option in options if option != "--create-namespace"]
    objects = [
        thing
        for thing in yaml.safe_load_all(helm("template", name, str(CHARTS.parents[1] / chart), *options))
        if thing
    ]
    image = container(objects)["image"]
    assert image.startswith("registry.example/")
    assert one(objects, "Deployment")["metadata"]["name"] in PAGE.read_text(encoding="utf-8")


def test_what_the_page_builds_and_pushes_is_what_it_installs() -> None:
    lines = [shlex.split(line) for line in page_commands(PAGE, "## The images")]
    built = [line[line.index("--tag") + 1] for line in lines if line[1] == "build"]
    assert [line[2] for line in lines if line[1] == "push"] == built
    registry = {"registry": "registry.example"}
    operator = container(render(OPERATOR, {"image": registry, "workerImage": registry}))
    (worker,) = [one for one in operator["args"] if one.startswith("--image=")]
    assert built == [operator["image"], worker.removeprefix("--image=")]
    assert container(render(INFERENCE, MODEL | {"image": registry}))["image"] == built[1]


@pytest.mark.parametrize("line", page_commands(SECURITY_PAGE, "## On a cluster"))
def test_what_the_page_of_security_sets_renders_with_tls(line: str) -> None:
    program, action, name, chart, *options = shlex.split(line)
    assert (program, action) == ("helm", "upgrade")
    options = [option for option in options if option != "--reuse-values"]
    given = ("template", name, str(CHARTS.parents[1] / chart), *options, *EXTENSIONS)
    objects = [thing for thing in yaml.safe_load_all(helm(*given, values=MODEL)) if thing]
    assert "--tls-cert=/tls/server/tls.crt" in container(objects)["args"]
    asks = [option.startswith("tls.clientCASecretName=") for option in options]
    assert ("--tls-allow=gateway.example" in container(objects)["args"]) == any(asks)
    assert bool(of_kind(objects, "Certificate")) != any(asks)


def test_the_values_that_the_page_shows_ask_for_an_accelerator() -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    engine = container(render(INFERENCE, yaml.safe_load(block)))
    assert engine["resources"]["limits"] == {
        "memory": "48Gi",
        "ephemeral-storage": "4Gi",
        "nvidia.com/gpu": 1,
    }
