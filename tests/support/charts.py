"""The Helm charts, and Helm: the one beside the cluster's programs, or on ``PATH``."""

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

import charts
from real_cluster import programs

__all__ = [
    "CHARTS",
    "COMPONENT",
    "DIGEST",
    "EXTENSIONS",
    "INFERENCE",
    "MATRIX",
    "MODEL",
    "MUTUAL",
    "OPERATED",
    "OPERATOR",
    "OTHER",
    "PAGE",
    "PEER",
    "PLACED",
    "RUNBOOKS",
    "SECURITY_PAGE",
    "Json",
    "Prompt",
    "container",
    "helm",
    "laid",
    "nested",
    "obstacle",
    "of_kind",
    "one",
    "other",
    "page_commands",
    "pods",
    "refused",
    "render",
    "rendered",
    "restricted",
]

Json = dict[str, Any]

CHARTS = Path(__file__).parents[2] / "deploy/helm"
PAGE = CHARTS.parents[1] / "docs/how-to/install-with-helm.md"
SECURITY_PAGE = CHARTS.parents[1] / "docs/how-to/secure-connections.md"
HELM = charts.helm()


COMPONENT = "app.kubernetes.io/component"
OPERATOR, INFERENCE = "unmask-operator", "unmask-inference"
MODEL: Json = {"model": {"uri": "pvc://models/small/model"}}
DIGEST = "sha256:" + "0123456789abcdef" * 4
EXTENSIONS = ("--api-versions", "monitoring.coreos.com/v1", "--api-versions", "cert-manager.io/v1")
"""APIs that not every cluster has."""
PEER = {"namespaceSelector": {"matchLabels": {"team": "a"}}}
PLACED: Json = {
    "commonLabels": {"team": "a"},
    "podLabels": {"tier": "b"},
    "podAnnotations": {"note": "c"},
    "nodeSelector": {"disk": "fast"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
        {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}]}}},
    "topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway",
         "labelSelector": {"matchLabels": {"app.kubernetes.io/instance": "r"}}}],
    "priorityClassName": "high",
    "hostUsers": False,
    "serviceAccount": {"annotations": {"note": "d"}},
    "service": {"annotations": {"note": "e"}},
}  # fmt: skip
PRIVATE = {"registry": "registry.example:5000", "digest": DIGEST, "pullSecrets": [{"name": "key"}]}
MONITORS = {"serviceMonitor": {"enabled": True, "labels": {"release": "p"}}}
RUNBOOKS = "https://pages.example/runbooks"
BY_CERT_MANAGER = {"enabled": True, "certManager": {"issuerRef": {"name": "internal"}}}
MUTUAL = {"enabled": True, "secretName": "words-tls", "clientCASecretName": "clients", "allow": ["a.example"]}
OPERATED: Json = {
    "standalone": False,
    "spec": {
        "model": {"job": {"name": "pretrain"}},
        "group": {"shards": 2, "replication": 2, "tls": {"secretName": "inside"}},
        "server": {
            "port": 50077,
            "tls": {"secretName": "front", "clientCaSecretName": "clients", "allow": ["a.example"]},
        },
    },
}
"""A release that leaves its pods to the operator."""
MATRIX: dict[str, tuple[str, Json]] = {
    "operator": (OPERATOR, {}),
    "operator: two copies": (OPERATOR, {"replicas": 2}),
    "operator: one namespace": (OPERATOR, {"watchNamespace": "team-a"}),
    "operator: nothing that needs an administrator": (
        OPERATOR,
        {"crds": {"install": False}, "rbac": {"create": False, "aggregate": False},
         "serviceAccount": {"create": False, "name": "given"}},
    ),
    "operator: everything": (
        OPERATOR,
        PLACED | {
            "replicas": 2, "image": PRIVATE,
            "metrics": MONITORS | {
                "prometheusRule": {"enabled": True, "labels": {"release": "p"}, "runbooks": RUNBOOKS}},
            "networkPolicy": {"enabled": True, "metricsFrom": [PEER],
                              "apiServerPeers": [{"ipBlock": {"cidr": "10.0.0.1/32"}}]}},
    ),
    "inference": (INFERENCE, MODEL),
    "inference: gpu": (INFERENCE, MODEL | {"gpu": {"enabled": True}, "runtimeClassName": "nvidia"}),
    "inference: left to an autoscaler": (INFERENCE, MODEL | {"replicas": None}),
    "inference: tls": (INFERENCE, MODEL | {"tls": {"enabled": True, "secretName": "words-tls"}}),
    "inference: certificates by cert-manager": (INFERENCE, MODEL | {"tls": BY_CERT_MANAGER}),
    "inference: a gateway": (INFERENCE, MODEL | {"gateway": {"enabled": True}, "http": {"enabled": True}}),
    "inference: a gateway with certificates by cert-manager": (
        INFERENCE,
        MODEL | PLACED | {
            "gateway": {"enabled": True}, "tls": BY_CERT_MANAGER, "metrics": MONITORS, "image": PRIVATE,
            "networkPolicy": {"enabled": True, "clients": [PEER], "metricsFrom": [PEER]}},
    ),
    "inference: by the operator": (INFERENCE, OPERATED),
    "inference: by the operator, and all around it": (
        INFERENCE,
        OPERATED | {
            "commonLabels": {"team": "a"}, "image": PRIVATE, "gateway": {"enabled": True},
            "tls": {"certManager": {"issuerRef": {"name": "internal"}}},
            "metrics": MONITORS | {"prometheusRule": {"enabled": True}, "dashboard": {"enabled": True}},
            "networkPolicy": {"enabled": True, "clients": [PEER]}},
    ),
    "inference: everything": (
        INFERENCE,
        MODEL | PLACED | {
            "replicas": 3, "image": PRIVATE, "gpu": {"enabled": True},
            "metrics": MONITORS | {
                "prometheusRule": {"enabled": True, "labels": {"release": "p"}, "runbooks": RUNBOOKS},
                "dashboard": {"enabled": True}},
            "strategy": {"maxSurge": "50%", "maxUnavailable": 0},
            "server": {"context": 512, "threads": 4, "extraArgs": ["--max-queue=9"]},
            "extraEnv": [{"name": "A", "value": "b"}],
            "extraVolumes": [{"name": "more", "emptyDir": {}}],
            "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
            "networkPolicy": {"enabled": True, "clients": [PEER], "metricsFrom": [PEER]}, "tls": MUTUAL},
    ),
}  # fmt: skip
"""What the charts are rendered with: name -> chart and values."""

OTHER: dict[str, Any] = {
    "metrics.prometheusRule.runbooks": "https://pages.example",
    "affinity": PLACED["affinity"],
    "extraEnv": [{"name": "A", "value": "b"}],
    "extraVolumeMounts": [{"name": "tmp", "mountPath": "/more"}],
    "extraVolumes": [{"name": "more", "emptyDir": {}}],
    "gateway.extraArgs": ["--attempts=5"],
    "gateway.resources": {"limits": {"memory": "9Gi"}},
    "hostUsers": False,
    "image.digest": DIGEST,
    "image.pullSecrets": [{"name": "key"}],
    "metrics.serviceMonitor.interval": "5s",
    "model.uri": "pvc://other/model",
    "networkPolicy.apiServerPeers": [PEER],
    "networkPolicy.apiServerPorts": [8443],
    "networkPolicy.clients": [PEER],
    "networkPolicy.metricsFrom": [PEER],
    "podSecurityContext": {"runAsUser": 4711},
    "resources": {"limits": {"memory": "9Gi"}},
    "securityContext": {"runAsUser": 4711},
    "server.cacheMib": 64,
    "server.context": 64,
    "server.extraArgs": ["--rows=2"],
    "server.maxPositions": 4096,
    "server.threads": 2,
    "sharedMemory": "2Gi",
    "temporaryStorage": "3Gi",
    "tls.allow": ["a.example"],
    "tls.certManager.duration": "24h",
    "tls.certManager.renewBefore": "24h",
    "tolerations": PLACED["tolerations"],
    "topologySpreadConstraints": PLACED["topologySpreadConstraints"],
    "workerImage.digest": DIGEST,
}
"""A value other than the default, where one cannot be made up from the schema."""


def page_commands(page: Path, heading: str | None = None) -> list[str]:
    """Return the command lines of a page, or those below one of its headings, in its order."""
    section = page.read_text(encoding="utf-8")
    if heading is not None:
        section = re.split(r"^#+ ", section.partition(f"\n{heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    blocks = re.findall(r"^```sh\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


@dataclass(frozen=True)
class Prompt:
    """Where somebody types commands who administrates a cluster, in the root of a checkout."""

    kubeconfig: Path
    home: Path
    """For what Helm keeps."""

    def run(self, line: str, given: object = None) -> str:
        """Return what a command prints, which must succeed and warn of nothing; it may read ``given``."""
        folders = {f"HELM_{kind}_HOME": str(self.home / kind) for kind in ("CACHE", "CONFIG", "DATA")}
        paths = f"{programs.folder()}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            shlex.split(line),
            cwd=CHARTS.parents[1],
            env=os.environ | folders | {"KUBECONFIG": str(self.kubeconfig), "PATH": paths},
            input="" if given is None else yaml.safe_dump(given),
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert (done.returncode, done.stderr) == (0, ""), f"{line}: {done.stderr}{done.stdout}"
        return done.stdout


def obstacle() -> str | None:
    """Return why this machine cannot try the charts, or ``None``."""
    return None if HELM else f"no helm in {programs.folder()} or on PATH; `make cluster-programs` builds it"


def helm(*arguments: str, values: Json | None = None) -> str:
    """Return what a command of Helm prints; ``values`` come before those of the arguments."""
    done = _run(*arguments, values=values)
    assert done.returncode == 0, f"helm {' '.join(arguments)}: {done.stderr}{done.stdout}"
    return done.stdout


def refused(*arguments: str, values: Json | None = None) -> str:
    """Return why a command of Helm fails."""
    done = _run(*arguments, values=values)
    assert done.returncode, f"helm {' '.join(arguments)}: was not refused"
    return done.stderr + done.stdout


def render(chart: str, values: Json | None = None, *options: str) -> list[Json]:
    """Return the objects of a chart's release called ``r`` in the namespace ``place``."""
    arguments = ("template", "r", str(CHARTS / chart), "--namespace", "place", *options)
    return [one for one in yaml.safe_load_all(helm(*arguments, values=values)) if one]


@cache
def rendered(case: str, version: str = "1.37") -> list[Json]:
    """Return the objects of a case of ``MATRIX`` on a cluster that has all ``EXTENSIONS``."""
    chart, values = MATRIX[case]
    return render(chart, values, f"--kube-version={version}.0", *EXTENSIONS)


def other(value: charts.Value) -> Any:
    """Return what the value may be besides its default."""
    if (name := ".".join(value.path)) in OTHER:
        return OTHER[name]
    match value.default:
        case bool():
            return not value.default
        case int() | float():
            larger = value.default + 1
            return larger if larger <= value.schema.get("maximum", larger) else value.default - 1
        case str():
            return next((word for word in value.schema.get("enum", []) if word != value.default), "other")
        case dict():
            return {"key": "other"}
    raise AssertionError(f"{name}: say in OTHER what it may be, too")


def nested(path: tuple[str, ...], value: Any) -> Json:
    """Return a tree of values with this one alone."""
    for name in reversed(path):
        value = {name: value}
    return value  # type: ignore[no-any-return]


def laid(below: Json, above: Json) -> Json:
    """Return two trees of values as one."""
    both = dict(below)
    for name, value in above.items():
        both[name] = laid(both[name], value) if name in both and isinstance(value, dict) else value
    return both


def of_kind(objects: list[Json], kind: str) -> list[Json]:
    """Return the objects of one kind."""
    return [one for one in objects if one["kind"] == kind]


def one(objects: list[Json], kind: str, name: str | None = None) -> Json:
    """Return the only object of a kind, or the one with this name."""
    (found,) = [thing for thing in of_kind(objects, kind) if name in (None, thing["metadata"]["name"])]
    return found


def container(objects: list[Json], deployment: str | None = None) -> Json:
    """Return the only container of a Deployment, which needs its name where there are several."""
    (found,) = one(objects, "Deployment", deployment)["spec"]["template"]["spec"]["containers"]
    return found  # type: ignore[no-any-return]


def pods(objects: list[Json]) -> Iterator[Json]:
    """Yield the metadata and spec of every pod, and of every template of one."""
    for one in objects:
        if one["kind"] == "Pod":
            yield one
        elif "template" in one.get("spec", {}):
            yield one["spec"]["template"]


def restricted(pod: Json) -> list[str]:
    """Return what the Pod Security Standard `restricted` has against the spec of a pod."""
    wrong = [f"{name} is set" for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    allowed = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
    }
    for volume in pod.get("volumes", []):
        wrong += [f"volume of type {kind}" for kind in volume.keys() - {"name"} - (allowed | {"secret"})]
    below = pod.get("securityContext", {})
    for container in pod.get("initContainers", []) + pod["containers"]:
        own = container.get("securityContext", {})
        both = below | own
        capabilities = own.get("capabilities", {})
        found = {
            "privileged": not own.get("privileged"),
            "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
            "capabilities": capabilities.get("drop") == ["ALL"] and not capabilities.get("add"),
            "runAsNonRoot": both.get("runAsNonRoot") is True and both.get("runAsUser") != 0,
            "seccompProfile": both.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost"),
            "hostPort": not any("hostPort" in port for port in container.get("ports", [])),
        }
        wrong += [f"{container['name']}: {name}" for name, well in found.items() if not well]
    return wrong


def _run(*arguments: str, values: Json | None) -> subprocess.CompletedProcess[str]:
    given = [] if values is None else ["--values", "-"]
    return subprocess.run(
        [str(HELM), *arguments, *given],
        input=yaml.safe_dump(values) if values is not None else "",
        capture_output=True,
        text=True,
        timeout=100,
    )
