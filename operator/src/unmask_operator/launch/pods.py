"""One attempt of a job on a cluster: the objects it is made of, from the same application as on a laptop.

An Indexed Job has one pod per node; a headless Service gives the pods names to meet by; a ConfigMap holds the
job file. All three carry the attempt's name and are functions of what is passed in, so that making them
twice gives the same objects.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kubernetes.client import ApiClient
from torchx.schedulers.kubernetes_scheduler import role_to_pod
from torchx.specs import AppDef, macros

from unmask_api.places import SCRATCH, in_store
from unmask_api.train_job import DiffusionTrainJob
from unmask_operator.launch.amounts import GPU
from unmask_operator.launch.application import of_job
from unmask_operator.launch.attempts import FINAL
from unmask_operator.launch.job_file import canonical
from unmask_operator.launch.templates import amounts, container_security, cores, overlaid, pod_security
from unmask_operator.launch.volumes import claims, resolve

__all__ = [
    "ATTEMPT_LABEL",
    "CONTAINER",
    "JOB_LABEL",
    "Attempt",
    "application",
    "config_map",
    "indexed_job",
    "pod_group",
    "selector",
    "service",
]

Json = dict[str, Any]
GangBy = Literal["None", "Native", "Volcano", "Kueue"]

JOB_LABEL = "unmask.dev/job"
"""Label of what belongs to a job: its name."""
ATTEMPT_LABEL = "unmask.dev/attempt"
"""Label of what belongs to an attempt: its number."""
CONTAINER = "trainer"
"""Name of the worker's container, which is the role's."""

_LAUNCHER = "unmask_operator.launch.supervisor"
_JOB_FOLDER = "/etc/unmask"
_JOB_FILE = "job.json"
_VOLUMES = "/volumes"
_SCRATCH_FOLDER = "/scratch"
_INDEX = "JOB_COMPLETION_INDEX"
_INDEX_FIELD = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
_NCCL_PORTS = "40000 40999"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One try at running a job: what its objects are made from."""

    job: DiffusionTrainJob
    """The job, as admitted."""
    number: int
    """The attempt, from 0."""
    uid: str
    """``metadata.uid`` of the job."""
    namespace: str
    """Where it runs."""
    image: str
    """Container image of the workers."""
    gang: GangBy = "None"
    """Who starts the pods all together."""

    @property
    def name(self) -> str:
        """Name of each of the attempt's objects."""
        return f"{self.job.metadata.name}-a{self.number}"

    @property
    def labels(self) -> dict[str, str]:
        """Labels of each of the attempt's objects."""
        return {JOB_LABEL: self.job.metadata.name, ATTEMPT_LABEL: str(self.number)}


def selector(name: str) -> str:
    """Return the label selector for all pods of the job called ``name``."""
    return f"{JOB_LABEL}={name}"


def config_map(attempt: Attempt) -> Json:
    """Return the ConfigMap with the job file; raises ``UsageError`` where a path leaves its volume."""
    folders = {name: Path(_VOLUMES) / name for name in claims(attempt.job)}
    job = resolve(attempt.job, folders)
    if attempt.number:  # what earlier attempts saved is this job's own
        checkpoint = job.spec.checkpoint.model_copy(update={"resume": "Auto"})
        job = job.model_copy(update={"spec": job.spec.model_copy(update={"checkpoint": checkpoint})})
    body = _object("v1", "ConfigMap", attempt)
    return body | {"data": {_JOB_FILE: canonical(job).decode()}}


def service(attempt: Attempt) -> Json:
    """Return the headless Service by which pods find each other, ready or not."""
    ports = [{"name": "rendezvous", "port": attempt.job.spec.rendezvous.port}]
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": attempt.labels,
        "ports": ports,
    }
    return _object("v1", "Service", attempt) | {"spec": spec}


def pod_group(attempt: Attempt) -> Json:
    """Return the native PodGroup, by which the scheduler places all pods or none."""
    scheduling = attempt.job.spec.scheduling
    spec: Json = {
        "schedulingPolicy": {"gang": {"minCount": _least(attempt.job)}},
        "disruptionMode": {"all": {}},
    }
    if scheduling.priority_class_name:
        spec["priorityClassName"] = scheduling.priority_class_name
    if scheduling.topology and scheduling.topology.mode == "Required":
        spec["schedulingConstraints"] = {"topology": [{"key": scheduling.topology.key}]}
    return _object("scheduling.k8s.io/v1beta1", "PodGroup", attempt) | {"spec": spec}


def indexed_job(attempt: Attempt) -> Json:
    """Return the Indexed Job; without ``suspend`` where a queue decides about that."""
    spec = attempt.job.spec
    nodes = spec.parallelism.nodes
    job = _object("batch/v1", "Job", attempt)
    body: Json = {
        "completionMode": "Indexed",
        "completions": nodes,
        "parallelism": nodes,
        "backoffLimit": spec.elastic.max_process_restarts if spec.elastic else 0,
        "podReplacementPolicy": "Failed",
        "template": _template(attempt),
    }
    if spec.elastic:
        body["podFailurePolicy"] = {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": CONTAINER,
                        "operator": "In",
                        "values": sorted(int(code) for code in FINAL),
                    },
                },
                {
                    "action": "Ignore",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
            ]
        }
    if spec.run_policy.success_policy == "Coordinator":
        body["successPolicy"] = {"rules": [{"succeededIndexes": "0"}]}
    if queue := spec.scheduling.queue_name:
        labels = {"kueue.x-k8s.io/queue-name": queue}
        if spec.scheduling.priority_class_name:
            labels["kueue.x-k8s.io/priority-class"] = spec.scheduling.priority_class_name
        job["metadata"]["labels"] |= labels
    else:
        body["suspend"] = False
    if attempt.gang == "Volcano":
        annotation = {"scheduling.volcano.sh/group-min-member": str(_least(attempt.job))}
        job["metadata"]["annotations"] = annotation
    return job | {"spec": body}


def application(attempt: Attempt) -> AppDef:
    """Return the job's application: that of a laptop, but for who starts torchrun and how nodes meet."""
    app = of_job(attempt.job, f"{_JOB_FOLDER}/{_JOB_FILE}", image=attempt.image, launcher=_LAUNCHER)
    app.roles[0].env.update(_environment(attempt))
    return app


# --- pods ---------------------------------------------------------------------------------------------


def _template(attempt: Attempt) -> Json:
    spec = attempt.job.spec
    values = macros.Values(
        img_root="",
        app_id=f"{attempt.uid[:8]}-{attempt.number}",
        replica_id=f"$({_INDEX})",
        rank0_env="TORCHX_RANK0_HOST",
    )
    (role,) = [values.apply(role) for role in application(attempt).roles]
    pod: Json = ApiClient().sanitize_for_serialization(
        role_to_pod(CONTAINER, role, spec.service_account_name)
    )
    template: Json = {"metadata": {"labels": attempt.labels}, "spec": pod["spec"]}
    (container,) = template["spec"]["containers"]
    protected = [*_identity(), *container["env"]]
    _harden(template["spec"], container, attempt)
    container["env"] = [*protected, *(entry.to_json_dict() for entry in spec.env)]
    if spec.credentials:  # what stands in env comes before them
        container["envFrom"] = [{"secretRef": {"name": name}} for name in spec.credentials]
    if spec.pod_template:
        template = overlaid(template, spec.pod_template)
        for one in template["spec"]["containers"]:
            if one["name"] == CONTAINER:
                names = {entry["name"] for entry in protected}
                one["env"] = protected + [entry for entry in one["env"] if entry["name"] not in names]
        template["metadata"]["labels"] |= attempt.labels
        template["spec"]["restartPolicy"] = "Never"
    return template


def _identity() -> list[Json]:
    """Return what tells pods apart; first, because ``$(...)`` sees only what stands before it."""
    return [
        {"name": _INDEX, "valueFrom": {"fieldRef": {"fieldPath": _INDEX_FIELD}}},
        {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
    ]


def _environment(attempt: Attempt) -> dict[str, str]:
    """Return what the launcher and the libraries below it need to know, the same in every pod."""
    spec = attempt.job.spec
    host = f"{attempt.name}-0.{attempt.name}.{attempt.namespace}.svc"
    meeting = {
        "join_timeout": spec.rendezvous.join_timeout_seconds,
        "last_call_timeout": spec.elastic.last_call_seconds if spec.elastic else 1,
    }
    values = {
        "PET_RDZV_ID": macros.app_id,
        "PET_RDZV_ENDPOINT": f"{host}:{spec.rendezvous.port}",
        "PET_RDZV_CONF": ",".join(f"{key}={value}" for key, value in meeting.items()),
        "UNMASK_ATTEMPT": str(attempt.number),
        "UNMASK_PROGRESS_PORT": str(spec.observability.port),
        "UNMASK_GRACE_SECONDS": str(spec.termination_grace_period_seconds),
        "OMP_NUM_THREADS": str(_threads(attempt.job)),
        "HOME": "/tmp",
        "PYTHONSAFEPATH": "1",
    }
    if _needs_scratch(attempt.job):
        values[SCRATCH] = _SCRATCH_FOLDER
    if _gpus(attempt.job):
        values |= {
            "NCCL_SOCKET_IFNAME": "eth0",
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
            "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": str(spec.rendezvous.process_group_timeout_seconds),
        }
    return values


def _harden(pod: Json, container: Json, attempt: Attempt) -> None:
    """Make the pod that TorchX would have: allowed in restricted namespaces, placed and equipped."""
    spec = attempt.job.spec
    scheduling = spec.scheduling
    pod |= {
        "restartPolicy": "Never",
        "subdomain": attempt.name,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": spec.termination_grace_period_seconds,
        "schedulerName": scheduling.scheduler_name,
        "securityContext": pod_security(),
        "nodeSelector": dict(spec.node_selector),
        "tolerations": [one.to_json_dict() for one in spec.tolerations],
        "volumes": _volumes(attempt),
    }
    if spec.parallelism.nodes > 1:
        pod["securityContext"]["sysctls"] = [{"name": "net.ipv4.ip_local_port_range", "value": _NCCL_PORTS}]
    if scheduling.priority_class_name:
        pod["priorityClassName"] = scheduling.priority_class_name
    if affinity := _affinity(attempt):
        pod["affinity"] = affinity
    if attempt.gang == "Native":
        pod["schedulingGroup"] = {"podGroupName": attempt.name}
    ports = {"rendezvous": spec.rendezvous.port, "progress": spec.observability.port}
    if spec.telemetry.port:
        ports["metrics"] = spec.telemetry.port
    container |= {
        "imagePullPolicy": "IfNotPresent",
        "resources": amounts(spec.resources),
        "ports": [{"name": name, "containerPort": port} for name, port in ports.items()],
        "securityContext": container_security(),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": _mounts(attempt),
    }


def _volumes(attempt: Attempt) -> list[Json]:
    return [
        {"name": "dshm", "emptyDir": {"medium": "Memory"}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "job", "configMap": {"name": attempt.name}},
        *([{"name": "scratch", "emptyDir": {}}] if _needs_scratch(attempt.job) else []),
        *(
            {"name": f"claim-{index}", "persistentVolumeClaim": {"claimName": name}}
            for index, name in enumerate(claims(attempt.job))
        ),
        *copy.deepcopy(attempt.job.spec.volumes),
    ]


def _mounts(attempt: Attempt) -> list[Json]:
    return [
        {"name": "dshm", "mountPath": "/dev/shm"},  # 64 MB, the default, is too little for NCCL
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "job", "mountPath": _JOB_FOLDER, "readOnly": True},
        *([{"name": "scratch", "mountPath": _SCRATCH_FOLDER}] if _needs_scratch(attempt.job) else []),
        *(
            {"name": f"claim-{index}", "mountPath": f"{_VOLUMES}/{name}"}
            for index, name in enumerate(claims(attempt.job))
        ),
        *copy.deepcopy(attempt.job.spec.volume_mounts),
    ]


def _needs_scratch(job: DiffusionTrainJob) -> bool:
    """Whether the run or a model that it begins with is in an object store, and so copied to the pod."""
    model = job.spec.model
    uris = (job.spec.checkpoint.uri, model.init.uri, model.tokenizer.uri if model.tokenizer else None)
    return any(uri is not None and in_store(uri) for uri in uris)


def _gpus(job: DiffusionTrainJob) -> bool:
    return GPU in job.spec.resources.limits


def _threads(job: DiffusionTrainJob) -> int:
    """Return a process's fair share of the cores its pod asks for; one where that is not said."""
    return max(1, cores(job.spec.resources) // job.spec.parallelism.processes_per_node)


def _affinity(attempt: Attempt) -> Json:
    """Return the affinity of the manifest, and the wish that an attempt's pods lie near each other."""
    affinity: Json = copy.deepcopy(attempt.job.spec.affinity or {})
    topology = attempt.job.spec.scheduling.topology
    if topology is None or (attempt.gang == "Native" and topology.mode == "Required"):
        return affinity
    term: Json = {"topologyKey": topology.key, "labelSelector": {"matchLabels": attempt.labels}}
    key = "requiredDuringSchedulingIgnoredDuringExecution"
    if topology.mode == "Preferred":
        key = "preferredDuringSchedulingIgnoredDuringExecution"
        term = {"weight": 100, "podAffinityTerm": term}
    affinity.setdefault("podAffinity", {}).setdefault(key, []).append(term)
    return affinity


def _least(job: DiffusionTrainJob) -> int:
    """Return how many pods must be placed together."""
    return job.spec.elastic.min_nodes if job.spec.elastic else job.spec.parallelism.nodes


def _object(api_version: str, kind: str, attempt: Attempt) -> Json:
    metadata = {"name": attempt.name, "labels": attempt.labels}
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata}
