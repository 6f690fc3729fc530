"""From a revision to a group's objects: what runs in which pod, what is mounted, how it starts and ends."""

import json
from typing import Any

import click
import kubernetes_validate
import pytest

from support.manifests import changed, inference_service
from unmask.cli.main import cli
from unmask.errors import UsageError
from unmask_api.inference_service import DiffusionInferenceService
from unmask_operator.launch import fronts
from unmask_operator.launch.admission import admit_service
from unmask_operator.launch.groups import GroupOf, engine_set, group_objects, group_service, shard_set

Json = dict[str, Any]
KUBERNETES = "1.37"


def service(values: Json | None = None, drop: tuple[str, ...] = ()) -> DiffusionInferenceService:
    plain = {"metadata.namespace": "ml", "spec.image": "registry.example/unmask:1"}
    return admit_service(json.dumps(changed(inference_service(), plain | (values or {}), drop)))


def group(values: Json | None = None, drop: tuple[str, ...] = ()) -> GroupOf:
    spec = service(values, drop).spec
    return GroupOf(service="chat", namespace="ml", ordinal=1, revision="abc234", spec=spec)


def pod(objects: Json) -> Json:
    found: Json = objects["spec"]["template"]["spec"]
    return found


def container(objects: Json) -> Json:
    found: Json = pod(objects)["containers"][0]
    return found


def options(objects: Json) -> dict[str, Any]:
    """Return what the command makes of its command line, by parameter; it must know all of it."""
    return parsed(container(objects)["command"])


def parsed(words: list[str]) -> dict[str, Any]:
    assert words[:3] == ["python", "-m", "unmask.cli.main"]
    with click.Context(cli) as context:
        command = cli.get_command(context, words[3])
    assert command is not None
    given = [word.replace("$(UNMASK_SHARD)", "1") for word in words[4:]]
    return dict(command.make_context(words[3], given).params)


EVERYTHING: Json = {
    "spec.group": {
        "shards": 3,
        "replication": 2,
        "rows": "BFloat16",
        "microBatches": 2,
        "engineResources": {"limits": {"cpu": "4", "memory": "8Gi"}},
        "shardResources": {"limits": {"cpu": "2500m", "nvidia.com/gpu": 1}},
        "startupTimeoutSeconds": 601,
    },
    "spec.server": {
        "httpPort": 8000,
        "context": 2048,
        "cacheMib": 512,
        "maxPositions": 256,
        "quantization": "Int8",
        "threads": 3,
    },
    "spec.env": [{"name": "A", "value": "b"}],
    "spec.credentials": ["s3-key"],
    "spec.nodeSelector": {"pool": "gpu"},
    "spec.tolerations": [{"key": "gpu", "operator": "Exists"}],
    "spec.scheduling": {"priorityClassName": "high", "topology": {"key": "zone"}},
    "spec.serviceAccountName": "serving",
    "spec.autoscaling": {"maxReplicas": 4},
    "spec.service": {"type": "LoadBalancer", "annotations": {"a": "b"}},
    "spec.network": {"clients": [{"podSelector": {"matchLabels": {"app": "gateway"}}}]},
}
TLS: Json = {
    "spec.server.tls": {
        "secretName": "front",
        "clientCaSecretName": "clients",
        "clientCaKey": "root.pem",
        "allow": ["gateway.ml.svc", "spiffe://here/ns/ml"],
    },
    "spec.group": {"shards": 2, "tls": {"secretName": "inside"}},
}


# --- objects ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values", [{}, EVERYTHING, TLS, {"spec.group": {}}], ids=["plain", "all", "tls", "whole"]
)
def test_every_object_is_one_that_kubernetes_takes(values: Json) -> None:
    one = service(values)
    made = [*group_objects(group(values)), fronts.public_service(one), fronts.engines_service(one)]
    made += [fronts.disruption_budget(one), *fronts.network_policies(one)]
    if one.spec.autoscaling:
        made.append(fronts.autoscaler(one, one.spec.autoscaling))
    for each in made:
        kubernetes_validate.validate(each, KUBERNETES, strict=True)


def test_the_same_group_gives_the_same_objects_under_names_of_its_own() -> None:
    assert json.dumps(group_objects(group())) == json.dumps(group_objects(group()))
    names = [f"{one['kind']}/{one['metadata']['name']}" for one in group_objects(group())]
    assert names == ["Service/chat-1-abc234", "StatefulSet/chat-1-abc234-e", "StatefulSet/chat-1-abc234-s"]
    whole = group_objects(group({"spec.group": {}}))
    assert [one["kind"] for one in whole] == ["Service", "StatefulSet"], "no shards, no second set"


def test_names_leave_room_for_what_kubernetes_adds() -> None:
    """A StatefulSet of more than 52 characters can make no pods: a label holds its name and 11 more."""
    longest = GroupOf(service="a" * 40, namespace="ml", ordinal=99, revision="abc234", spec=service().spec)
    assert all(len(one["metadata"]["name"]) <= 52 for one in group_objects(longest))
    host = f"{longest.name}-s-63"
    assert len(host) <= 63


def test_a_group_is_made_once_its_pods_together_and_replaced_by_nobody_else() -> None:
    for one, pods in ((engine_set(group()), 1), (shard_set(group()), 2)):
        assert one["spec"]["updateStrategy"] == {"type": "OnDelete"}
        assert one["spec"]["podManagementPolicy"] == "Parallel"
        assert one["spec"]["replicas"] == pods
        assert one["spec"]["serviceName"] == "chat-1-abc234"
        labels = one["spec"]["template"]["metadata"]["labels"]
        assert one["spec"]["selector"]["matchLabels"].items() <= labels.items()


# --- commands -----------------------------------------------------------------------------------------


def test_an_engine_is_told_where_its_shards_are_by_names_that_they_have() -> None:
    told = options(engine_set(group()))["experts"].split(",")
    sets = shard_set(group())
    names = [f"{sets['metadata']['name']}-{index}" for index in range(sets["spec"]["replicas"])]
    front = group_service(group())
    domain = f"{front['metadata']['name']}.ml.svc"
    assert told == [f"{name}.{domain}:50061" for name in names]
    assert front["spec"]["publishNotReadyAddresses"] is True
    assert front["spec"]["clusterIP"] == "None"
    assert front["spec"]["selector"].items() <= sets["spec"]["template"]["metadata"]["labels"].items()


def test_the_commands_get_what_the_manifest_says() -> None:
    engine, shard = options(engine_set(group(EVERYTHING))), options(shard_set(group(EVERYTHING)))
    expected = {"port": 50051, "metrics_port": 9090, "http_port": 8000, "rows": 8, "context": 2048}
    expected |= {
        "cache_mib": 512,
        "max_positions": 256,
        "max_queue": 256,
        "drain_seconds": 45.0,
        "threads": 3,
    }
    expected |= {"name": "chat", "host": "0.0.0.0", "device": "cpu", "quantization": "int8"}
    expected |= {"experts_rows": "bfloat16", "experts_wait_seconds": 601.0}
    expected |= {"experts_micro_batches": 2, "max_connection_age_seconds": 300.0}
    assert expected.items() <= engine.items()
    # One that is as by default is not said, so that engines of an earlier image start.
    assert not any("micro-batches" in one for one in container(engine_set(group()))["command"])
    expected = {"number": "1/3", "replication": 2, "port": 50061, "metrics_port": 9091, "device": "cuda"}
    assert (expected | {"host": "0.0.0.0", "drain_seconds": 5.0, "threads": 3}).items() <= shard.items()


def test_a_shard_learns_its_number_from_its_pod() -> None:
    (env,) = [one for one in container(shard_set(group()))["env"] if one["name"] == "UNMASK_SHARD"]
    assert env["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['apps.kubernetes.io/pod-index']"
    assert "--shard=$(UNMASK_SHARD)/2" in container(shard_set(group()))["command"]


def test_a_model_in_one_piece_asks_nobody() -> None:
    whole = options(engine_set(group({"spec.group": {}})))
    assert whole["experts"] is None


# --- models -------------------------------------------------------------------------------------------


def test_a_model_on_a_volume_is_mounted_and_cannot_be_written() -> None:
    for one in group_objects(group())[1:]:
        (volume,) = [each for each in pod(one)["volumes"] if each["name"] == "model"]
        (mount,) = [each for each in container(one)["volumeMounts"] if each["name"] == "model"]
        assert volume["persistentVolumeClaim"] == {"claimName": "models", "readOnly": True}
        assert mount == {"name": "model", "mountPath": "/volumes/models", "readOnly": True}
        assert str(options(one)["folder"]) == "/volumes/models/mini"
        assert "initContainers" not in pod(one)


def test_a_model_in_an_object_store_is_copied_first_with_the_keys_of_the_manifest() -> None:
    values = {"spec.model.uri": "s3://bucket/mini", "spec.credentials": ["s3-key"]}
    for one in group_objects(group(values))[1:]:
        (copying,) = pod(one)["initContainers"]
        said = parsed(copying["command"])
        assert (said["uri"], said["if_missing"]) == ("s3://bucket/mini", True)
        assert str(said["target"]) == str(options(one)["folder"])
        assert copying["envFrom"] == [{"secretRef": {"name": "s3-key"}}]
        (volume,) = [each for each in pod(one)["volumes"] if each["name"] == "model"]
        assert volume["emptyDir"] == {}
        mounts = [each for each in copying["volumeMounts"] if each["name"] == "model"]
        assert mounts == [{"name": "model", "mountPath": "/models"}]
        assert copying["resources"] == container(one)["resources"], "it takes no more of the machine"


def test_copies_of_other_models_and_revisions_have_other_folders() -> None:
    folders = {
        str(options(engine_set(group({"spec.model": model})))["folder"])
        for model in (
            {"uri": "s3://bucket/mini"},
            {"uri": "s3://bucket/mini", "revision": "2"},
            {"uri": "s3://bucket/flash"},
        )
    }
    assert len(folders) == 3


@pytest.mark.parametrize(
    ("cache", "room"),
    [
        ({"claimName": "copies"}, {"persistentVolumeClaim": {"claimName": "copies"}}),
        ({"sizeLimit": "64Gi"}, {"emptyDir": {"sizeLimit": "64Gi"}}),
    ],
)
def test_copies_are_kept_where_the_manifest_says(cache: Json, room: Json) -> None:
    one = engine_set(group({"spec.model": {"uri": "s3://bucket/mini", "cache": cache}}))
    (volume,) = [each for each in pod(one)["volumes"] if each["name"] == "model"]
    assert volume == {"name": "model"} | room


def test_a_path_inside_the_image_needs_no_volume_and_one_that_leaves_its_volume_is_refused() -> None:
    inside = engine_set(group({"spec.model.uri": "/opt/mini"}))
    assert str(options(inside)["folder"]) == "/opt/mini"
    assert "model" not in [one["name"] for one in pod(inside)["volumes"]]
    with pytest.raises(UsageError, match=r"spec.model.uri: the path leaves volume models"):
        engine_set(group({"spec.model.uri": "pvc://models/../other"}))


# --- pods ---------------------------------------------------------------------------------------------


def test_a_pod_is_allowed_in_a_restricted_namespace() -> None:
    for one in group_objects(group({"spec.model.uri": "s3://bucket/mini"}))[1:]:
        spec = pod(one)
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        for each in (*spec["containers"], *spec["initContainers"]):
            assert each["securityContext"]["allowPrivilegeEscalation"] is False
            assert each["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert each["securityContext"]["readOnlyRootFilesystem"] is True
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        assert not any("hostPath" in volume for volume in spec["volumes"])


def test_probes_leave_time_for_the_weights_and_ask_whether_there_can_be_answers() -> None:
    values = {"spec.group": {"shards": 2, "startupTimeoutSeconds": 601}}
    for one, port, name in (
        (engine_set(group(values)), 50051, "unmask.v1.Generation"),
        (shard_set(group(values)), 50061, "unmask.v1.ExpertShard"),
    ):
        probes = container(one)
        start = probes["startupProbe"]
        assert start["periodSeconds"] * start["failureThreshold"] >= 601
        assert start["grpc"] == probes["livenessProbe"]["grpc"] == {"port": port}
        assert probes["readinessProbe"]["grpc"] == {"port": port, "service": name}


def test_an_engine_that_is_to_end_has_time_to_be_forgotten_and_to_finish() -> None:
    one = engine_set(group({"spec.server": {"preStopSeconds": 7, "drainSeconds": 90}}))
    assert container(one)["lifecycle"]["preStop"] == {"sleep": {"seconds": 7}}
    assert options(one)["drain_seconds"] == 90
    assert pod(one)["terminationGracePeriodSeconds"] >= 7 + 90 + 10
    shard = shard_set(group({"spec.group": {"shards": 2, "shardDrainSeconds": 20}}))
    assert pod(shard)["terminationGracePeriodSeconds"] >= 20 + 10


def test_each_role_takes_its_own_of_the_machine_and_as_many_threads() -> None:
    engine, shard = engine_set(group(EVERYTHING)), shard_set(group(EVERYTHING))
    assert container(engine)["resources"]["requests"] == {"cpu": "4", "memory": "8Gi"}
    assert container(shard)["resources"]["limits"] == {"cpu": "2500m", "nvidia.com/gpu": "1"}
    threads = [
        {entry["name"]: entry.get("value") for entry in container(one)["env"]}["OMP_NUM_THREADS"]
        for one in (engine, shard)
    ]
    assert threads == ["4", "2"]
    assert container(engine_set(group()))["resources"] == {}


def test_pods_of_a_group_lie_near_each_other_where_that_is_asked_for() -> None:
    affinity = pod(shard_set(group(EVERYTHING)))["affinity"]["podAffinity"]
    (wish,) = affinity["preferredDuringSchedulingIgnoredDuringExecution"]
    assert wish["podAffinityTerm"]["labelSelector"]["matchLabels"] == {"unmask.dev/group": "chat-1-abc234"}
    assert "affinity" not in pod(engine_set(group()))


def test_an_overlay_adds_to_pods_but_cannot_change_what_they_belong_to() -> None:
    overlay = {
        "metadata": {"labels": {"team": "a", "unmask.dev/role": "other"}},
        "spec": {
            "restartPolicy": "Never",
            "containers": [
                {
                    "name": "shard",
                    "env": [{"name": "UNMASK_SHARD", "value": "9"}, {"name": "A", "value": "b"}],
                },
                {"name": "side", "image": "registry.example/side:1"},
            ],
        },
    }
    template = shard_set(group({"spec.podTemplate": overlay}))["spec"]["template"]
    shard, side = template["spec"]["containers"]
    assert "valueFrom" in shard["env"][0]
    assert [one["value"] for one in shard["env"] if one["name"] == "A"] == ["b"]
    assert side["name"] == "side"
    assert template["metadata"]["labels"]["team"] == "a"
    assert template["metadata"]["labels"]["unmask.dev/role"] == "shard"
    assert template["spec"]["restartPolicy"] == "Always"


# --- certificates -------------------------------------------------------------------------------------


def test_certificates_are_mounted_where_they_are_needed_and_nowhere_else() -> None:
    found = {}
    for one in group_objects(group(TLS))[1:]:
        volumes = {
            each["name"]: each["secret"]["secretName"] for each in pod(one)["volumes"] if "secret" in each
        }
        mounts = {each["name"]: each["mountPath"] for each in container(one)["volumeMounts"]}
        assert all(each["readOnly"] for each in container(one)["volumeMounts"] if each["name"] in volumes)
        found[container(one)["name"]] = {mounts[name]: secret for name, secret in volumes.items()}
    assert found == {
        "engine": {"/tls/server": "front", "/tls/clients": "clients", "/tls/group": "inside"},
        "shard": {"/tls/group": "inside"},
    }


def test_with_certificates_both_sides_prove_themselves() -> None:
    engine, shard = (container(one)["command"] for one in group_objects(group(TLS))[1:])
    assert {
        "--tls-cert=/tls/server/tls.crt",
        "--tls-key=/tls/server/tls.key",
        "--tls-client-ca=/tls/clients/root.pem",
        "--tls-allow=gateway.ml.svc",
        "--tls-allow=spiffe://here/ns/ml",
        "--experts-tls-ca=/tls/group/ca.crt",
        "--experts-tls-cert=/tls/group/tls.crt",
        "--experts-tls-key=/tls/group/tls.key",
        "--experts-tls-server-name=chat.ml.svc",
    } <= set(engine)
    assert {
        "--tls-cert=/tls/group/tls.crt",
        "--tls-key=/tls/group/tls.key",
        "--tls-client-ca=/tls/group/ca.crt",
    } <= set(shard)
    for one in group_objects(group(TLS))[1:]:
        assert {key for key, value in options(one).items() if value and "tls" in key}, (
            "options of the commands"
        )
    plain = [word for one in group_objects(group())[1:] for word in container(one)["command"]]
    assert not [word for word in plain if "tls" in word]


def test_probes_ask_over_http_where_the_port_speaks_tls() -> None:
    engine, shard = (container(one) for one in group_objects(group(TLS))[1:])
    for one in (engine, shard):
        assert one["startupProbe"]["httpGet"] == {"path": "/livez", "port": "metrics"}
        assert one["readinessProbe"]["httpGet"] == {"path": "/healthz", "port": "metrics"}
        assert "grpc" not in one["livenessProbe"]
    assert fronts.public_service(service(TLS))["spec"]["ports"][0]["appProtocol"] == "https"


# --- what a service has once --------------------------------------------------------------------------


def test_clients_reach_engines_and_no_shards() -> None:
    labels = [one["spec"]["template"]["metadata"]["labels"] for one in group_objects(group())[1:]]
    for front in (fronts.public_service(service()), fronts.engines_service(service())):
        chosen = [front["spec"]["selector"].items() <= each.items() for each in labels]
        assert chosen == [True, False]
    assert "clusterIP" not in fronts.public_service(service())["spec"]
    both = fronts.public_service(service(EVERYTHING))["spec"]["ports"]
    assert [(one["name"], one["port"], one["targetPort"]) for one in both] == [
        ("grpc", 50051, "grpc"),
        ("http", 8000, "http"),
    ]


@pytest.mark.parametrize(
    ("values", "least"),
    [
        ({}, 5),  # of 2 groups of 3 pods, one group may be missing, and so one pod
        ({"spec.rollout": {"maxUnavailable": 0, "maxSurge": 1}}, 6),
        ({"spec.replicas": 4, "spec.disruption": {"minAvailable": 2}}, 10),
        ({"spec.replicas": 1, "spec.disruption": {"minAvailable": 4}}, 3),
        ({"spec.replicas": 0}, 0),
        ({"spec.stopped": True}, 0),
    ],
)
def test_the_cluster_may_take_as_many_pods_as_there_may_be_groups_missing(values: Json, least: int) -> None:
    assert fronts.disruption_budget(service(values))["spec"]["minAvailable"] == least


def test_the_autoscaler_scales_the_service_itself() -> None:
    one = service(
        {"spec.autoscaling": {"maxReplicas": 4, "metrics": [{"name": "unmask_tpf", "target": "2500m"}]}}
    )
    assert one.spec.autoscaling is not None
    spec = fronts.autoscaler(one, one.spec.autoscaling)["spec"]
    assert spec["scaleTargetRef"] == {
        "apiVersion": "unmask.dev/v1alpha1",
        "kind": "DiffusionInferenceService",
        "name": "chat",
    }
    assert (spec["minReplicas"], spec["maxReplicas"]) == (1, 4)
    (metric,) = spec["metrics"]
    assert metric["pods"]["target"] == {"type": "AverageValue", "averageValue": "2500m"}


def test_engines_alone_reach_shards_and_only_the_clients_that_are_named_reach_engines() -> None:
    (shards,) = fronts.network_policies(service())
    template = shard_set(group())["spec"]["template"]
    assert shards["spec"]["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    asks, metrics = shards["spec"]["ingress"]
    (peer,) = asks["from"]
    engine = engine_set(group())["spec"]["template"]["metadata"]["labels"]
    chosen = peer["podSelector"]["matchLabels"].items()
    assert chosen <= engine.items() and not chosen <= template["metadata"]["labels"].items()
    assert "from" not in metrics, "whoever collects metrics may"
    opened = {one["name"] for one in container(shard_set(group()))["ports"]}
    assert {one["port"] for rule in (asks, metrics) for one in rule["ports"]} == opened

    both = {one["metadata"]["name"]: one["spec"] for one in fronts.network_policies(service(EVERYTHING))}
    assert both.keys() == {"chat-shards", "chat-engines"}
    asks, metrics = both["chat-engines"]["ingress"]
    assert asks["from"] == EVERYTHING["spec.network"]["clients"]
    opened = {one["name"] for one in container(engine_set(group(EVERYTHING)))["ports"]}
    assert {one["port"] for rule in (asks, metrics) for one in rule["ports"]} == opened
    for values in ({"spec.group": {}}, {"spec.network": {"isolateShards": False}}):
        assert fronts.network_policies(service(values)) == []
