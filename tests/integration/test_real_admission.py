"""What a real API server makes of our definition, bad manifests, changes, and the pods that we make."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from support import real_api_server
from support.manifests import REFUSED, REFUSED_SERVICES, Refused, changed, inference_service, train_job
from support.operated import RESTRICTED, namespace, until
from support.real_api_server import DEFINITION, RealServer
from unmask_operator.control.api import Api, ApiError, KubernetesTransport
from unmask_operator.control.clock import SystemClock
from unmask_operator.launch import pods
from unmask_operator.launch.admission import admit, admit_service
from unmask_operator.launch.groups import GroupOf, group_objects
from unmask_operator.resources import RESOURCES

Json = dict[str, Any]

pytestmark = pytest.mark.real_api

ROOT = Path(__file__).parents[2]
TRAIN_JOB = RESOURCES["DiffusionTrainJob"]
SERVICE = RESOURCES["DiffusionInferenceService"]
PATH = TRAIN_JOB.path("ml")
SERVICES = SERVICE.path("ml")
STRICT = {"fieldValidation": "Strict"}  # as kubectl asks
DRY = {"dryRun": "All"} | STRICT
_MERGE = "application/merge-patch+json"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    with real_api_server.running(tmp_path_factory.mktemp("real"), "operator") as real:
        api = Api(KubernetesTransport(real.client()), SystemClock())
        for path in sorted((ROOT / "deploy/crds").glob("*.yaml")):
            api.create(DEFINITION, None, yaml.safe_load(path.read_text()))
        namespace(api, "ml", **RESTRICTED)
        until(lambda: _lists(api), "the definitions are served")
        yield real


@pytest.fixture
def api(server: RealServer) -> Api:
    return Api(KubernetesTransport(server.client()), SystemClock())


def _lists(api: Api) -> bool:
    try:
        api.list(TRAIN_JOB, None)
        api.list(SERVICE, None)
    except ApiError:
        return False
    return True


# --- the definition -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["diffusiontrainjobs.unmask.dev", "diffusioninferenceservices.unmask.dev"])
def test_the_definition_is_accepted_whole(api: Api, name: str) -> None:
    there = api.get(DEFINITION, None, name)
    conditions = {one["type"]: one for one in there["status"]["conditions"]}
    assert conditions["NamesAccepted"]["status"] == conditions["Established"]["status"] == "True"
    assert "NonStructuralSchema" not in conditions
    given = yaml.safe_load((ROOT / f"deploy/crds/{name}.yaml").read_text())
    kept = there["spec"]["versions"][0]["schema"]
    assert kept == given["spec"]["versions"][0]["schema"], "nothing was dropped"


def test_the_resource_goes_by_its_short_name_and_has_status_and_scale(api: Api) -> None:
    listed = {one["name"]: one for one in api._json("GET", "/apis/unmask.dev/v1alpha1")["resources"]}
    assert listed["diffusiontrainjobs"]["shortNames"] == ["dtj"]
    assert listed["diffusiontrainjobs"]["categories"] == ["unmask"]
    assert {"diffusiontrainjobs/status", "diffusiontrainjobs/scale"} <= listed.keys()


def test_the_scale_is_that_of_the_nodes_and_its_selector_that_of_the_pods(api: Api) -> None:
    elastic = changed(train_job(), {"metadata.name": "wide", "spec.elastic": {"minNodes": 1, "maxNodes": 4}})
    api._json("POST", PATH, STRICT, elastic)
    status = {"status": {"nodes": {"desired": 1}, "selector": "unmask.dev/job=wide"}}
    api._json("PATCH", f"{PATH}/wide/status", {}, status, _MERGE)
    scale = api._json("GET", f"{PATH}/wide/scale")
    assert scale["status"] == {"replicas": 1, "selector": "unmask.dev/job=wide"}
    api._json("PATCH", f"{PATH}/wide/scale", {}, {"spec": {"replicas": 4}}, _MERGE)
    assert api.get(TRAIN_JOB, "ml", "wide")["spec"]["parallelism"]["nodes"] == 4
    with pytest.raises(ApiError, match=r"elastic\.maxNodes"):
        api._json("PATCH", f"{PATH}/wide/scale", {}, {"spec": {"replicas": 8}}, _MERGE)


def test_the_columns_of_kubectl_get_show_how_far_a_job_is(server: RealServer, api: Api) -> None:
    api._json("POST", PATH, STRICT, changed(train_job(), {"metadata.name": "shown"}))
    progress = {
        "step": 12,
        "totalSteps": 32,
        "stage": "blocks",
        "loss": "2.5",
        "estimatedRemainingSeconds": 60,
    }
    status = {
        "state": "Running",
        "restarts": 1,
        "progress": progress,
        "checkpoint": {"latestStep": 8, "latestUri": "x"},
    }
    api._json("PATCH", f"{PATH}/shown/status", {}, {"status": status}, _MERGE)
    client = server.client()
    headers = {"Accept": "application/json;as=Table;v=v1;g=meta.k8s.io"}
    client.update_params_for_auth(headers, [], ["BearerToken"])
    answer = client.rest_client.pool_manager.request(
        "GET", f"{server.address}{PATH}?fieldSelector=metadata.name=shown", headers=headers
    )
    table = json.loads(answer.data)
    names = [one["name"] for one in table["columnDefinitions"]]
    row = dict(zip(names, table["rows"][0]["cells"], strict=True))
    shown = [row[key] for key in ("Name", "State", "Stage", "Step", "Loss", "Left", "Restarts")]
    assert shown == ["shown", "Running", "blocks", 12, "2.5", 60, 1]
    assert (row["Nodes"], row["Checkpoint"]) == (1, 8)


def test_the_server_fills_in_the_defaults_that_local_admission_does(api: Api) -> None:
    made = api._json("POST", PATH, DRY, changed(train_job(), {"metadata.name": "plain"}))
    local = admit(json.dumps(changed(train_job(), {"metadata.name": "plain"}))).to_json_dict()
    for stage in local["spec"]["stages"]:  # these depend on the objective, and are left to the reader
        for key in ("supervise", "noise", "beta"):
            stage.pop(key, None)
    assert made["spec"] == local["spec"]


# --- bad manifests ------------------------------------------------------------------------------------


def test_there_are_bad_manifests_enough() -> None:
    assert len(REFUSED) >= 60
    assert len({case.why for case in REFUSED}) == len(REFUSED)


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.why)
def test_a_bad_manifest_is_refused_by_the_server_with_the_field_in_its_message(
    api: Api, case: Refused
) -> None:
    with pytest.raises(ApiError) as caught:
        api._json("POST", PATH, DRY, case.manifest)
    assert caught.value.status in (400, 404, 422)
    assert _named(case.field, caught.value.message), caught.value.message


def _named(field: str, message: str) -> bool:
    """Whether a message names ``field``; of the version, which the path has too, in the server's words."""
    if field == "apiVersion":
        return "in version " in message
    return f"{field}: " in message if field == "kind" else field in message


@pytest.mark.parametrize(
    ("before", "after", "blamed"),
    [
        ({}, {"managedBy": "kueue.x-k8s.io/multikueue"}, "spec.managedBy"),
        ({}, {"model": {"init": {"config": None, "uri": "pvc://data/other"}}}, "spec.model"),
        ({}, {"data": {"seed": 5}}, "spec.data"),
        ({}, {"precision": "bf16"}, "spec.precision"),
        ({}, {"optimizer": {"clipNorm": "2.0"}}, "spec.optimizer"),
        ({}, {"checkpoint": {"uri": "pvc://run/other"}}, "spec.checkpoint.uri"),
        ({}, {"parallelism": {"nodes": 2}}, "spec.parallelism.nodes"),
        ({}, {"parallelism": {"processesPerNode": 2}}, "spec.parallelism"),
        ({}, {"suspend": True}, None),
        ({}, {"runPolicy": {"maxRestarts": 9, "ttlSecondsAfterFinished": 5}}, None),
        ({}, {"image": "registry.example/unmask:2"}, None),
        ({}, {"checkpoint": {"everySteps": 4}}, None),
        ({"spec.suspend": True}, {"parallelism": {"nodes": 2, "processesPerNode": 2}}, None),
        ({"spec.elastic": {"minNodes": 1, "maxNodes": 4}}, {"parallelism": {"nodes": 4}}, None),
        ({"spec.elastic": {"minNodes": 1, "maxNodes": 2}}, {"parallelism": {"nodes": 4}}, "spec.elastic"),
    ],
)
def test_what_may_change_once_a_job_is_there(
    api: Api, before: Json, after: Json, blamed: str | None, request: pytest.FixtureRequest
) -> None:
    name = f"changing-{request.node.callspec.indices['after']}"
    api._json("POST", PATH, STRICT, changed(train_job(), {"metadata.name": name} | before))

    def change() -> Json:
        return api._json("PATCH", f"{PATH}/{name}", STRICT, {"spec": after}, _MERGE)

    if blamed is None:
        change()
        return
    with pytest.raises(ApiError) as caught:
        change()
    assert caught.value.status == 422
    assert blamed in caught.value.message


# --- pods ---------------------------------------------------------------------------------------------

GPUS = {
    "spec.parallelism": {"nodes": 2, "processesPerNode": 8},
    "spec.resources": {"limits": {"nvidia.com/gpu": 8, "cpu": "96", "memory": "512Gi"}},
    "spec.nodeSelector": {"gpu": "h200"},
    "spec.tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "spec.stages[0].rowsPerStep": 16,
    "spec.stages[1].rowsPerStep": 16,
    "spec.stages[2].rowsPerStep": 16,
    "spec.stages[3].rowsPerStep": 16,
}


def admitted(api: Api, values: Json, gang: pods.GangBy = "None") -> Json:
    """Return the pod that a job's template becomes in a namespace that enforces the restricted standard."""
    job = admit(json.dumps(changed(train_job(), values)))
    attempt = pods.Attempt(
        job=job, number=0, uid="12345678-9", namespace="ml", image="registry.example/u:1", gang=gang
    )
    template = pods.indexed_job(attempt)["spec"]["template"]
    metadata = template["metadata"] | {"name": "tried"}
    body = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
    for made in (pods.config_map, pods.service, pods.indexed_job):
        resource = RESOURCES[made(attempt)["kind"]]
        api._json("POST", resource.path("ml"), DRY, made(attempt))
    return api._json("POST", RESOURCES["Pod"].path("ml"), DRY, body)


def test_a_gpu_pod_is_admitted_in_a_restricted_namespace_with_all_that_nccl_needs(api: Api) -> None:
    spec = admitted(api, GPUS)["spec"]
    (container,) = spec["containers"]
    env = {one["name"]: one.get("value") for one in container["env"]}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8", "cpu": "96", "memory": "512Gi"}
    assert container["resources"]["requests"]["nvidia.com/gpu"] == "8"
    volumes = {one["name"]: one for one in spec["volumes"]}
    shared = next(one["name"] for one in container["volumeMounts"] if one["mountPath"] == "/dev/shm")
    assert volumes[shared]["emptyDir"] == {"medium": "Memory"}
    assert spec["securityContext"]["sysctls"] == [
        {"name": "net.ipv4.ip_local_port_range", "value": "40000 40999"}
    ]
    assert env["NCCL_SOCKET_IFNAME"] == "eth0"
    assert env["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "1"
    assert int(env["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"]) < 1800, "before the operator takes it for a hang"
    assert "join_timeout=600" in env["PET_RDZV_CONF"]
    assert env["OMP_NUM_THREADS"] == "12"
    assert spec["nodeSelector"] == {"gpu": "h200"}
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in spec["tolerations"]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"spec.credentials": ["s3-key"]},
        {"spec.env": [{"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "t"}}}]},
        {"spec.telemetry": {"port": 9090}, "spec.parallelism.nodes": 2},
        {"spec.volumes": [{"name": "models", "image": {"reference": "registry.example/m:1"}}]},
        {"spec.scheduling.topology": {"key": "topology.kubernetes.io/zone", "mode": "Required"}},
        {"spec.podTemplate": {"spec": {"hostUsers": False}}},
    ],
)
def test_pods_of_every_kind_are_admitted_in_a_restricted_namespace(api: Api, values: Json) -> None:
    spec = admitted(api, values)["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["restartPolicy"] == "Never"


def test_credentials_are_environment_that_the_jobs_own_comes_before(api: Api) -> None:
    values = {"spec.credentials": ["s3-key", "other"], "spec.env": [{"name": "AWS_REGION", "value": "x"}]}
    (container,) = admitted(api, values)["spec"]["containers"]
    assert container["envFrom"] == [{"secretRef": {"name": "s3-key"}}, {"secretRef": {"name": "other"}}]
    assert {"name": "AWS_REGION", "value": "x"} in container["env"]


@pytest.mark.parametrize(
    ("overlay", "says"),
    [
        ({"hostNetwork": True, "securityContext": {"sysctls": None}}, "host namespaces"),
        ({"volumes": [{"name": "host", "hostPath": {"path": "/"}}]}, "restricted volume types"),
        ({"containers": [{"name": "trainer", "securityContext": {"privileged": True}}]}, "privileged"),
        (
            {"containers": [{"name": "trainer", "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}}}]},
            "capabilities",
        ),
    ],
)
def test_the_server_and_not_we_refuse_what_an_overlay_must_not_ask_for(
    api: Api, overlay: Json, says: str
) -> None:
    with pytest.raises(ApiError, match="PodSecurity|securityContext") as caught:
        admitted(api, {"spec.podTemplate": {"spec": overlay}})
    assert says in caught.value.message or "allowPrivilegeEscalation" in caught.value.message


# --- services -----------------------------------------------------------------------------------------


def test_a_service_goes_by_its_short_name_scales_and_has_the_defaults_of_local_admission(api: Api) -> None:
    listed = {one["name"]: one for one in api._json("GET", "/apis/unmask.dev/v1alpha1")["resources"]}
    assert listed["diffusioninferenceservices"]["shortNames"] == ["dis"]
    made = api._json("POST", SERVICES, STRICT, inference_service())
    local = admit_service(json.dumps(inference_service())).to_json_dict()
    assert made["spec"] == local["spec"]
    status = {"status": {"replicas": 2, "selector": "unmask.dev/service=chat"}}
    api._json("PATCH", f"{SERVICES}/chat/status", {}, status, _MERGE)
    scale = api._json("GET", f"{SERVICES}/chat/scale")
    assert scale["status"] == {"replicas": 2, "selector": "unmask.dev/service=chat"}
    api._json("PATCH", f"{SERVICES}/chat/scale", {}, {"spec": {"replicas": 4}}, _MERGE)
    assert api.get(SERVICE, "ml", "chat")["spec"]["replicas"] == 4
    with pytest.raises(ApiError, match=r"spec\.replicas"):
        api._json("PATCH", f"{SERVICES}/chat/scale", {}, {"spec": {"replicas": 65}}, _MERGE)


@pytest.mark.parametrize("case", REFUSED_SERVICES, ids=lambda case: case.why)
def test_a_bad_service_is_refused_by_the_server_with_the_field_in_its_message(
    api: Api, case: Refused
) -> None:
    with pytest.raises(ApiError) as caught:
        api._json("POST", SERVICES, DRY, case.manifest)
    assert caught.value.status in (400, 404, 422)
    assert _named(case.field, caught.value.message), caught.value.message


@pytest.mark.parametrize(
    ("after", "blamed"),
    [
        ({"server": {"tls": {"secretName": "certificates"}}}, "spec.server"),
        ({"model": {"name": "other"}}, "spec.model"),
        ({"model": {"uri": "pvc://models/flash"}}, None),
        ({"model": {"uri": None, "job": {"name": "mini"}}}, None),
        ({"group": {"shards": 4}, "rollout": {"paused": True}}, None),
        ({"autoscaling": {"maxReplicas": 4}}, None),
    ],
)
def test_what_may_change_once_a_service_is_there(
    api: Api, after: Json, blamed: str | None, request: pytest.FixtureRequest
) -> None:
    name = f"changing-{request.node.callspec.indices['after']}"
    api._json("POST", SERVICES, STRICT, changed(inference_service(), {"metadata.name": name}))
    if blamed is None:
        api._json("PATCH", f"{SERVICES}/{name}", STRICT, {"spec": after}, _MERGE)
        return
    with pytest.raises(ApiError, match=blamed) as caught:
        api._json("PATCH", f"{SERVICES}/{name}", STRICT, {"spec": after}, _MERGE)
    assert caught.value.status == 422


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"spec.model.uri": "s3://bucket/mini", "spec.model.cache": {"sizeLimit": "64Gi"}},
        {"spec.group": {"shards": 2, "tls": {"secretName": "inside"}}, "spec.server.httpPort": 8000},
        {"spec.server.tls": {"secretName": "front", "clientCaSecretName": "clients"}},
        {"spec.group": {"engineResources": {"limits": {"nvidia.com/gpu": 1}}}},
    ],
)
def test_groups_of_every_kind_are_admitted_in_a_restricted_namespace(api: Api, values: Json) -> None:
    plain = {"spec.image": "registry.example/unmask:1"}
    spec = admit_service(json.dumps(changed(inference_service(), plain | values))).spec
    group = GroupOf(service="chat", namespace="ml", ordinal=0, revision="abc234", spec=spec)
    for made in group_objects(group):
        api._json("POST", RESOURCES[made["kind"]].path("ml"), DRY, made)
        if made["kind"] == "StatefulSet":
            template = made["spec"]["template"]
            body = {"apiVersion": "v1", "kind": "Pod", "spec": template["spec"]}
            body["metadata"] = template["metadata"] | {"name": "tried"}
            api._json("POST", RESOURCES["Pod"].path("ml"), DRY, body)
