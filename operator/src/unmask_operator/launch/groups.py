"""One group of a service on a cluster: the objects it is made of, from what its revision says.

A headless Service gives the pods names; a StatefulSet of one pod is the engine, a second one the shards. They
are two because an engine and a shard differ in what they run, take and answer to, and because an engine has
to be gone before its shards may go. A group's objects carry its name and are functions of what is passed in.
They are made once and never changed, so that all pods of a group are of one revision, whenever they start.
"""

import copy
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchx.specs import Role

from unmask_api.cluster import PodResources
from unmask_api.inference_service import InferenceSpec
from unmask_api.places import in_store
from unmask_operator.launch.amounts import GPU
from unmask_operator.launch.components import copier, engine, expert_shard
from unmask_operator.launch.templates import amounts, container_security, cores, overlaid, pod_security
from unmask_operator.launch.volumes import claim_of

__all__ = [
    "GROUP_LABEL",
    "ORDINAL_LABEL",
    "REVISION_LABEL",
    "ROLE_LABEL",
    "SERVICE_LABEL",
    "GroupOf",
    "engine_set",
    "group_objects",
    "group_service",
    "shard_set",
]

Json = dict[str, Any]

SERVICE_LABEL = "unmask.dev/service"
"""Label of what belongs to a service: its name."""
GROUP_LABEL = "unmask.dev/group"
"""Label of what belongs to a group: its name."""
ORDINAL_LABEL = "unmask.dev/ordinal"
"""Label of what belongs to a group: its ordinal."""
REVISION_LABEL = "unmask.dev/revision"
"""Label of what belongs to a group: its revision."""
ROLE_LABEL = "unmask.dev/role"
"""Label of a pod: ``engine`` or ``shard``."""

_SHARD_PORT = 50061
_SHARD_METRICS_PORT = 9091
_SHARD_INDEX = "UNMASK_SHARD"
_INDEX_FIELD = "metadata.labels['apps.kubernetes.io/pod-index']"
_CERTIFICATES = {"server": "/tls/server", "clients": "/tls/clients", "group": "/tls/group"}
_VOLUMES = "/volumes"
_COPIES = "/models"
_HEALTH = {"engine": "unmask.v1.Generation", "shard": "unmask.v1.ExpertShard"}
"""What a pod says of itself at this name of ``grpc.health.v1``: that it can be asked."""
_RESERVE_SECONDS = 15
_LIVENESS_SECONDS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupOf:
    """A group: what its objects are made from."""

    service: str
    """Name of the service."""
    namespace: str
    """Where it runs."""
    ordinal: int
    """Which of its revision it is, from 0."""
    revision: str
    """What the revision is called."""
    spec: InferenceSpec
    """What the revision says, with its image, and the model's uri in the place of a job."""

    @property
    def name(self) -> str:
        """Name of the group; those of its objects begin with it. At most 50 characters."""
        return f"{self.service}-{self.ordinal}-{self.revision}"

    @property
    def labels(self) -> dict[str, str]:
        """Labels of each of the group's objects."""
        return {
            SERVICE_LABEL: self.service,
            GROUP_LABEL: self.name,
            ORDINAL_LABEL: str(self.ordinal),
            REVISION_LABEL: self.revision,
        }


def group_objects(group: GroupOf) -> list[Json]:
    """Return the group's objects; the shards last, so that shards without an engine are a group that ends.

    Raises:
        UsageError: The model's path leaves its volume.
    """
    objects = [group_service(group), engine_set(group)]
    return [*objects, shard_set(group)] if group.spec.group.shards else objects


def group_service(group: GroupOf) -> Json:
    """Return the headless Service by which an engine finds its shards, ready or not."""
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {GROUP_LABEL: group.name},
        "ports": [{"name": "grpc", "port": _SHARD_PORT}],
    }
    metadata = {"name": group.name, "labels": group.labels}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}


def engine_set(group: GroupOf) -> Json:
    """Return the StatefulSet of the engine."""
    spec = group.spec
    shards = [
        f"{group.name}-s-{index}.{group.name}.{group.namespace}.svc:{_SHARD_PORT}"
        for index in range(spec.group.shards)
    ]
    server_name = f"{group.service}.{group.namespace}.svc"
    role = engine(
        _folder(spec),
        spec.model.name or group.service,
        spec.server,
        spec.group,
        shards=shards,
        shards_name=(spec.group.tls.server_name if spec.group.tls else None) or server_name,
        certificates=_CERTIFICATES,
        image=_image(spec),
        device=_device(spec, spec.group.engine_resources),
    )
    ports = {"grpc": spec.server.port, "metrics": spec.server.metrics_port}
    if spec.server.http_port:
        ports["http"] = spec.server.http_port
    grace = spec.server.pre_stop_seconds + spec.server.drain_seconds + _RESERVE_SECONDS
    template = _template(
        group, role, ports, spec.group.engine_resources, grace, secured=spec.server.tls is not None
    )
    for container in template["spec"]["containers"]:
        if container["name"] == "engine":
            sleep = {"sleep": {"seconds": spec.server.pre_stop_seconds}}
            container.setdefault("lifecycle", {}).setdefault("preStop", sleep)
    return _stateful_set(group, "engine", 1, template)


def shard_set(group: GroupOf) -> Json:
    """Return the StatefulSet of the shards."""
    spec = group.spec
    role = expert_shard(
        _folder(spec),
        f"$({_SHARD_INDEX})",
        spec.group,
        port=_SHARD_PORT,
        metrics_port=_SHARD_METRICS_PORT,
        certificates=_CERTIFICATES,
        image=_image(spec),
        device=_device(spec, spec.group.shard_resources),
        threads=spec.server.threads or 0,
    )
    ports = {"grpc": _SHARD_PORT, "metrics": _SHARD_METRICS_PORT}
    grace = spec.group.shard_drain_seconds + _RESERVE_SECONDS
    template = _template(
        group, role, ports, spec.group.shard_resources, grace, secured=spec.group.tls is not None
    )
    return _stateful_set(group, "shard", spec.group.shards, template)


def _stateful_set(group: GroupOf, role: str, replicas: int, template: Json) -> Json:
    spec = {
        "replicas": replicas,
        "serviceName": group.name,
        "podManagementPolicy": "Parallel",
        "updateStrategy": {"type": "OnDelete"},
        "selector": {"matchLabels": {GROUP_LABEL: group.name, ROLE_LABEL: role}},
        "template": template,
    }
    metadata = {"name": f"{group.name}-{role[0]}", "labels": group.labels | {ROLE_LABEL: role}}
    return {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": metadata, "spec": spec}


# --- pods ---------------------------------------------------------------------------------------------


def _template(
    group: GroupOf,
    role: Role,
    ports: Mapping[str, int],
    resources: PodResources,
    grace: int,
    *,
    secured: bool,
) -> Json:
    """Return the template of a role's pods; allowed in restricted namespaces."""
    spec = group.spec
    labels = group.labels | {ROLE_LABEL: role.name}
    environment = _environment(role.name, resources)
    container: Json = _of_container(spec, resources) | {
        "name": role.name,
        "image": role.image,
        "command": [role.entrypoint, *role.args],
        "ports": [{"name": name, "containerPort": port} for name, port in ports.items()],
        "env": [*environment, *(entry.to_json_dict() for entry in spec.env)],
        "volumeMounts": _mounts(spec, role.name),
        **_probes(spec, role.name, ports["grpc"], secured=secured),
    }
    scheduling = spec.scheduling
    pod: Json = {
        "containers": [container],
        "restartPolicy": "Always",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": grace,
        "schedulerName": scheduling.scheduler_name,
        "securityContext": pod_security(),
        "volumes": _volumes(spec, role.name),
    }
    # What is empty is left out, as the API server keeps it: else each look would find a difference.
    if spec.node_selector:
        pod["nodeSelector"] = dict(spec.node_selector)
    if spec.tolerations:
        pod["tolerations"] = [one.to_json_dict() for one in spec.tolerations]
    if _copied(spec):
        pod["initContainers"] = [_copying(spec, resources, role.name)]
    if spec.service_account_name:
        pod["serviceAccountName"] = spec.service_account_name
    if scheduling.priority_class_name:
        pod["priorityClassName"] = scheduling.priority_class_name
    if affinity := _affinity(group):
        pod["affinity"] = affinity
    template: Json = {"metadata": {"labels": labels}, "spec": pod}
    if spec.pod_template:
        template = overlaid(template, spec.pod_template)
        for one in template["spec"]["containers"]:
            if one["name"] == role.name:  # who a process is stays first, and as it was
                names = {entry["name"] for entry in environment}
                one["env"] = environment + [entry for entry in one["env"] if entry["name"] not in names]
        template["metadata"]["labels"] |= labels
        template["spec"]["restartPolicy"] = "Always"
    return template


def _of_container(spec: InferenceSpec, resources: PodResources) -> Json:
    """Return what every container has, that of the copy included."""
    found: Json = {
        "imagePullPolicy": "IfNotPresent",
        "resources": {key: value for key, value in amounts(resources).items() if value},
        "securityContext": container_security(),
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    if spec.credentials:  # what stands in env comes before them
        found["envFrom"] = [{"secretRef": {"name": name}} for name in spec.credentials]
    return found


def _environment(role: str, resources: PodResources) -> list[Json]:
    """Return the variables that are ours; first, because ``$(...)`` sees only what stands before it."""
    index = {"name": _SHARD_INDEX, "valueFrom": {"fieldRef": {"fieldPath": _INDEX_FIELD}}}
    values = {"OMP_NUM_THREADS": str(cores(resources)), "HOME": "/tmp", "PYTHONSAFEPATH": "1"}
    return [
        *([index] if role == "shard" else []),
        *({"name": name, "value": value} for name, value in values.items()),
    ]


def _copying(spec: InferenceSpec, resources: PodResources, role: str) -> Json:
    """Return the container that copies the model first; the pod takes no more of its machine for it."""
    copying = copier(str(spec.model.uri), _folder(spec), image=_image(spec))
    return {
        "name": copying.name,
        "image": copying.image,
        "command": [copying.entrypoint, *copying.args],
        "env": [*_environment("fetch", resources), *(entry.to_json_dict() for entry in spec.env)],
        "volumeMounts": _mounts(spec, role, read_only_copies=False),
    } | _of_container(spec, resources)


def _probes(spec: InferenceSpec, role: str, port: int, *, secured: bool) -> Json:
    """Return the probes; over HTTP where the port speaks TLS, which the kubelet's gRPC does not."""

    def asks(service: str | None, path: str) -> Json:
        if secured:
            return {"httpGet": {"path": path, "port": "metrics"}}
        return {"grpc": {"port": port} | ({"service": service} if service else {})}

    usual = {"timeoutSeconds": 10}
    wait = spec.group.startup_timeout_seconds
    return {
        # The port opens when the model is loaded, and an engine's when its shards answer.
        "startupProbe": asks(None, "/livez")
        | usual
        | {"periodSeconds": 5, "failureThreshold": math.ceil(wait / 5)},
        "livenessProbe": asks(None, "/livez")
        | usual
        | {"periodSeconds": 10, "failureThreshold": _LIVENESS_SECONDS // 10},
        "readinessProbe": asks(_HEALTH[role], "/healthz")
        | usual
        | {"periodSeconds": 5, "failureThreshold": 2},
    }


def _volumes(spec: InferenceSpec, role: str) -> list[Json]:
    found: list[Json] = [{"name": "dshm", "emptyDir": {"medium": "Memory"}}, {"name": "tmp", "emptyDir": {}}]
    if claim := claim_of(str(spec.model.uri), "spec.model.uri"):
        source = {"claimName": claim[0], "readOnly": True}
        found.append({"name": "model", "persistentVolumeClaim": source})
    elif _copied(spec):
        cache = spec.model.cache
        room: Json = {"emptyDir": {}}
        if cache.claim_name:
            room = {"persistentVolumeClaim": {"claimName": cache.claim_name}}
        elif cache.size_limit is not None:
            room = {"emptyDir": {"sizeLimit": str(cache.size_limit)}}
        found.append({"name": "model"} | room)
    secrets = _secrets(spec, role)
    found += [
        {"name": f"tls-{name}", "secret": {"secretName": secret, "defaultMode": 0o440}}
        for name, secret in secrets.items()
    ]
    return [*found, *copy.deepcopy(spec.volumes)]


def _mounts(spec: InferenceSpec, role: str, *, read_only_copies: bool = True) -> list[Json]:
    found: list[Json] = [{"name": "dshm", "mountPath": "/dev/shm"}, {"name": "tmp", "mountPath": "/tmp"}]
    if claim := claim_of(str(spec.model.uri), "spec.model.uri"):
        found.append({"name": "model", "mountPath": f"{_VOLUMES}/{claim[0]}", "readOnly": True})
    elif _copied(spec):
        mount: Json = {"name": "model", "mountPath": _COPIES}
        found.append(mount | ({"readOnly": True} if read_only_copies else {}))
    found += [
        {"name": f"tls-{name}", "mountPath": _CERTIFICATES[name], "readOnly": True}
        for name in _secrets(spec, role)
    ]
    return [*found, *copy.deepcopy(spec.volume_mounts)]


def _secrets(spec: InferenceSpec, role: str) -> dict[str, str]:
    """Return the Secrets with certificates that a role needs, by what they are for."""
    found: dict[str, str] = {}
    if role == "engine" and spec.server.tls:
        found["server"] = spec.server.tls.secret_name
        if spec.server.tls.client_ca_secret_name:
            found["clients"] = spec.server.tls.client_ca_secret_name
    if spec.group.tls:
        found["group"] = spec.group.tls.secret_name
    return found


def _copied(spec: InferenceSpec) -> bool:
    return in_store(str(spec.model.uri))


def _folder(spec: InferenceSpec) -> str:
    """Return the folder of the model in the pod; a copy's name tells it from copies of other models."""
    uri = str(spec.model.uri)
    if claim := claim_of(uri, "spec.model.uri"):
        return f"{_VOLUMES}/{claim[0]}/{claim[1]}".removesuffix("/.")
    if _copied(spec):
        return f"{_COPIES}/{hashlib.sha256(f'{uri} {spec.model.revision}'.encode()).hexdigest()[:16]}"
    return uri


def _image(spec: InferenceSpec) -> str:
    assert spec.image is not None, "a revision names its image"
    return spec.image


def _device(spec: InferenceSpec, resources: PodResources) -> str:
    if spec.server.device == "Auto":
        return "cuda" if GPU in resources.limits else "cpu"
    return spec.server.device.lower()


def _affinity(group: GroupOf) -> Json:
    """Return the affinity of the manifest, and the wish that a group's pods lie near each other."""
    affinity: Json = copy.deepcopy(group.spec.affinity or {})
    topology = group.spec.scheduling.topology
    if topology is None or not group.spec.group.shards:
        return affinity
    near: Json = {"topologyKey": topology.key, "labelSelector": {"matchLabels": {GROUP_LABEL: group.name}}}
    key = "requiredDuringSchedulingIgnoredDuringExecution"
    if topology.mode == "Preferred":
        key = "preferredDuringSchedulingIgnoredDuringExecution"
        near = {"weight": 100, "podAffinityTerm": near}
    affinity.setdefault("podAffinity", {}).setdefault(key, []).append(near)
    return affinity
