"""What a service has once: addresses for clients, a budget for disruptions, an autoscaler, who may connect.

All are functions of the manifest and are applied in each pass, unlike groups, which are made once.
"""

import copy
from collections.abc import Sequence
from typing import Any

from unmask_api.inference_service import Autoscaling, DiffusionInferenceService
from unmask_operator.launch.groups import ROLE_LABEL, SERVICE_LABEL

__all__ = [
    "autoscaler",
    "disruption_budget",
    "engines_service",
    "network_policies",
    "public_service",
    "selector",
]

Json = dict[str, Any]


def selector(name: str) -> dict[str, str]:
    """Return the labels of the engines of the service called ``name``."""
    return {SERVICE_LABEL: name, ROLE_LABEL: "engine"}


def public_service(service: DiffusionInferenceService) -> Json:
    """Return the Service that clients connect to: every engine that can be asked."""
    front = service.spec.service
    made = _object("v1", "Service", service, service.metadata.name)
    if front.annotations:
        made["metadata"]["annotations"] = dict(front.annotations)
    return made | {"spec": {"type": front.type, **_ports_and_selector(service)}}


def engines_service(service: DiffusionInferenceService) -> Json:
    """Return the headless Service for clients that balance by themselves."""
    made = _object("v1", "Service", service, f"{service.metadata.name}-engines")
    return made | {"spec": {"clusterIP": "None", **_ports_and_selector(service)}}


def disruption_budget(service: DiffusionInferenceService) -> Json:
    """Return the budget of what the cluster may take away: as many pods as there may be groups missing.

    Each may be of another group, and a group that misses a pod may be one that does not answer.
    """
    spec = service.spec
    replicas = 0 if spec.stopped else spec.replicas
    missing = spec.rollout.max_unavailable
    if spec.disruption.min_available is not None:
        missing = replicas - spec.disruption.min_available
    missing = min(max(missing, 0), replicas)
    made = _object("policy/v1", "PodDisruptionBudget", service, service.metadata.name)
    return made | {
        "spec": {
            "minAvailable": replicas * (1 + spec.group.shards) - missing,
            "selector": {"matchLabels": {SERVICE_LABEL: service.metadata.name}},
            # Who never gets ready must not keep a machine from being emptied.
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
        }
    }


def autoscaler(service: DiffusionInferenceService, scaling: Autoscaling) -> Json:
    """Return the HorizontalPodAutoscaler of ``replicas``."""
    made = _object("autoscaling/v2", "HorizontalPodAutoscaler", service, service.metadata.name)
    target = {"apiVersion": service.api_version, "kind": service.kind, "name": service.metadata.name}
    metrics = [
        {
            "type": "Pods",
            "pods": {
                "metric": {"name": one.name},
                "target": {"type": "AverageValue", "averageValue": str(one.target)},
            },
        }
        for one in scaling.metrics
    ]
    return made | {
        "spec": {
            "scaleTargetRef": target,
            "minReplicas": scaling.min_replicas,
            "maxReplicas": scaling.max_replicas,
            "metrics": metrics,
            "behavior": {"scaleDown": {"stabilizationWindowSeconds": scaling.scale_down_seconds}},
        }
    }


def network_policies(service: DiffusionInferenceService) -> list[Json]:
    """Return who may connect to shards, and to engines where the manifest names clients.

    Metrics are for all, and the kubelet's probes always pass.
    """
    name, network, group = service.metadata.name, service.spec.network, service.spec.group
    found = []
    if group.shards and network.isolate_shards:
        engines = {"podSelector": {"matchLabels": selector(name)}}
        found.append(_policy(service, "shard", ["grpc"], [engines]))
    if network.clients:
        ports = ["grpc", "http"] if service.spec.server.http_port else ["grpc"]
        found.append(_policy(service, "engine", ports, network.clients))
    return found


def _policy(
    service: DiffusionInferenceService, role: str, ports: Sequence[str], peers: Sequence[Json]
) -> Json:
    def at(*names: str) -> list[Json]:
        return [{"protocol": "TCP", "port": name} for name in names]

    name = service.metadata.name
    made = _object("networking.k8s.io/v1", "NetworkPolicy", service, f"{name}-{role}s")
    return made | {
        "spec": {
            "podSelector": {"matchLabels": {SERVICE_LABEL: name, ROLE_LABEL: role}},
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": copy.deepcopy(list(peers)), "ports": at(*ports)},
                {"ports": at("metrics")},
            ],
        }
    }


def _ports_and_selector(service: DiffusionInferenceService) -> Json:
    server = service.spec.server
    grpc = {
        "name": "grpc",
        "port": server.port,
        "targetPort": "grpc",
        "appProtocol": "https" if server.tls else "kubernetes.io/h2c",
    }
    ports = [grpc]
    if server.http_port:
        http = {"name": "http", "port": server.http_port, "targetPort": "http", "appProtocol": "http"}
        ports.append(http)
    return {"selector": selector(service.metadata.name), "ports": ports}


def _object(api_version: str, kind: str, service: DiffusionInferenceService, name: str) -> Json:
    metadata = {"name": name, "labels": {SERVICE_LABEL: service.metadata.name}}
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata}
