"""The parts of a DiffusionInferenceService that say how it serves: groups, ports, rollouts, autoscaling."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints

from unmask_api.base import FILE_WORD, METRIC, ApiModel, ObjectName, Rule
from unmask_api.cluster import CoreObject, Label, PodResources, Port, Quantity, Topology

__all__ = [
    "Autoscaling",
    "Disruption",
    "Front",
    "Group",
    "GroupTls",
    "Network",
    "Placement",
    "PodsMetric",
    "Rollout",
    "Server",
    "ServerTls",
]

GROUPS = 64
"""Most groups of one service."""
Groups = Annotated[int, Field(ge=0, le=GROUPS)]
MetricName = Annotated[str, StringConstraints(pattern=METRIC, max_length=128)]
PeerName = Annotated[str, StringConstraints(min_length=1, max_length=253)]


class GroupTls(ApiModel):
    """Certificates for the connections between an engine and its shards; each proves itself to the other."""

    secret_name: ObjectName
    """A Secret with ``tls.crt``, ``tls.key`` and ``ca.crt``, which engine and shards both show and check."""
    server_name: PeerName | None = None
    """The DNS name in that certificate; left out, ``NAME.NAMESPACE.svc`` of the service."""


class Group(ApiModel):
    """What answers a request together: an engine, and the shards that compute its routed experts."""

    rules: ClassVar = (
        Rule(
            rule="self.replication <= (self.shards > 0 ? self.shards : 1)",
            message="no more shards can hold a part of the experts than there are: lower replication, or"
            " raise shards",
            field_path=".replication",
        ),
        Rule(
            rule="self.shards > 0 || !has(self.tls)",
            message="tls is for the connections to shards, and there are none: set shards, or drop group.tls"
            " (server.tls is for clients)",
            field_path=".tls",
        ),
        Rule(
            rule="self.shards > 0 || (size(self.shardResources.limits) == 0"
            " && size(self.shardResources.requests) == 0)",
            message="there are no shards: set shards, or drop shardResources",
            field_path=".shardResources",
        ),
    )

    shards: Annotated[int, Field(ge=0, le=64)] = 0
    """Pods that hold the routed experts of a mixture of experts; 0, the engine holds all of the model."""
    replication: Annotated[int, Field(ge=1, le=64)] = 1
    """How many shards hold each part of the experts; with 2, any one shard may be lost without a pause."""
    rows: Literal["Float32", "BFloat16"] = "Float32"
    """What token rows are sent to shards as; ``BFloat16`` halves the bytes and changes what is generated."""
    micro_batches: Annotated[int, Field(ge=1, le=8)] = 1
    """Parts of a forward that take turns: while shards compute the experts of one, the engine computes the
    next. More of them mean more and smaller frames; no token changes."""
    engine_resources: PodResources = PodResources()
    """What the engine's pod takes of its machine."""
    shard_resources: PodResources = PodResources()
    """What each shard's pod takes of its machine."""
    startup_timeout_seconds: Annotated[int, Field(ge=10, le=86_400)] = 1800
    """Longest time from a pod's start, or that of its shards, until it answers; then it is started anew."""
    shard_drain_seconds: Annotated[int, Field(ge=0, le=600)] = 5
    """How long engines have to go to other shards when one is asked to end."""
    tls: GroupTls | None = None
    """Secures the connections to the shards, both ways; left out, they are in the clear."""


class ServerTls(ApiModel):
    """Certificates of the port that clients connect to."""

    rules: ClassVar = (
        Rule(
            rule="size(self.allow) == 0 || has(self.clientCaSecretName)",
            message="nobody is asked for a certificate: set clientCaSecretName, or drop allow",
            field_path=".allow",
        ),
    )

    secret_name: ObjectName
    """A Secret with the certificate and its key, ``tls.crt`` and ``tls.key``."""
    client_ca_secret_name: ObjectName | None = None
    """A Secret with the CA whose certificates clients have to show; left out, nobody is asked for one."""
    client_ca_key: Annotated[str, StringConstraints(pattern=FILE_WORD, max_length=253)] = "ca.crt"
    """Key of the CA in that Secret."""
    allow: Annotated[tuple[PeerName, ...], Field(max_length=64)] = ()
    """Of those, let in clients whose certificate has one of these DNS names or URIs; empty, all."""


class Server(ApiModel):
    """How an engine answers: its ports, how much it takes on, and how it ends."""

    rules: ClassVar = (
        Rule(
            rule="self.port != self.metricsPort && (!has(self.httpPort)"
            " || (self.httpPort != self.port && self.httpPort != self.metricsPort))",
            message="port, metricsPort and httpPort must differ: one pod opens all of them",
            field_path=".port",
        ),
    )

    port: Port = 50051
    """gRPC."""
    metrics_port: Port = 9090
    """Prometheus metrics."""
    http_port: Port | None = None
    """OpenAI-style HTTP; left out, there is none."""
    rows: Annotated[int, Field(ge=1, le=4096)] = 8
    """Requests that are decoded side by side."""
    context: Annotated[int, Field(ge=1, le=16_777_216)] | None = None
    """Most tokens of a prompt and its generation; left out, the model's own, at most 4096."""
    cache_mib: Annotated[int, Field(ge=1, le=16_777_216)] | None = None
    """Memory for keys and values, in MiB; left out, what ``rows`` requests of ``context`` tokens take."""
    max_positions: Annotated[int, Field(ge=1, le=16_777_216)] | None = None
    """Most positions in one forward pass; left out, 512, or two blocks for each row if that is more."""
    max_queue: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    """Requests that may wait for a row."""
    max_queue_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] = 1_000_000
    """Tokens, read and to be written, of the requests that wait."""
    max_request_seconds: Annotated[int, Field(ge=1, le=86_400)] = 600
    """Most time that one request gets."""
    max_connection_age_seconds: Annotated[int, Field(ge=1, le=86_400)] = 300
    """After how long a client is asked to connect anew, so that clients find groups that came later."""
    pre_stop_seconds: Annotated[int, Field(ge=1, le=600)] = 10
    """How long an engine that is to end goes on as usual, until nobody sends it new requests."""
    drain_seconds: Annotated[int, Field(ge=0, le=3600)] = 45
    """How long it then lets what runs come to its end; clients go on elsewhere from committed blocks."""
    device: Literal["Auto", "Cpu", "Cuda"] = "Auto"
    """Where to compute; ``Auto`` is Cuda where the limits of a pod's resources have a GPU, else Cpu."""
    quantization: Literal["None", "Int8"] = "None"
    """``Int8``: weights of eight bits, and on a CPU activations too; changes what is generated."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads of a process; left out, the whole cores of its resources."""
    tls: ServerTls | None = None
    """TLS on the gRPC port; left out, it speaks in the clear. HTTP and metrics do in any case."""


class Rollout(ApiModel):
    """How groups are replaced by those of a new revision: whole groups, never parts of them."""

    rules: ClassVar = (
        Rule(
            rule="self.maxSurge > 0 || self.maxUnavailable > 0",
            message="with maxSurge and maxUnavailable 0 nothing could ever be replaced: set one to 1",
            field_path=".maxUnavailable",
        ),
    )

    max_surge: Annotated[int, Field(ge=0, le=32)] = 0
    """Groups that may exist beyond ``replicas``, those that are ending included."""
    max_unavailable: Groups = 1
    """Groups below ``replicas`` that may be missing or not ready because of a rollout."""
    partition: Groups = 0
    """So many groups stay as they are, to try a new revision with the others."""
    paused: bool = False
    """Whether to replace nothing; what is missing is made as it was before, also by autoscaling."""
    min_ready_seconds: Annotated[int, Field(ge=0, le=3600)] = 0
    """How long a group has to be ready before it counts as available."""
    progress_deadline_seconds: Annotated[int, Field(ge=10, le=604_800)] = 1800
    """After so long without progress the service says so; nothing else happens."""
    revision_history_limit: Annotated[int, Field(ge=0, le=32)] = 5
    """Former revisions to keep besides those in use."""


class PodsMetric(ApiModel):
    """A metric of the engines, as an adapter for custom metrics serves it."""

    name: MetricName
    """Its name, such as ``unmask_requests_waiting``."""
    target: Quantity
    """Mean over the engines that the autoscaler aims at, such as ``4`` or ``500m``."""


class Autoscaling(ApiModel):
    """An autoscaler for ``replicas``, between two bounds."""

    rules: ClassVar = (
        Rule(
            rule="self.minReplicas <= self.maxReplicas",
            message="minReplicas must not exceed maxReplicas: swap them",
            field_path=".minReplicas",
        ),
    )

    min_replicas: Annotated[int, Field(ge=1, le=GROUPS)] = 1
    """Fewest groups."""
    max_replicas: Annotated[int, Field(ge=1, le=GROUPS)]
    """Most groups."""
    metrics: Annotated[tuple[PodsMetric, ...], Field(min_length=1, max_length=8)] = (
        PodsMetric(name="unmask_requests_waiting", target=4),
    )
    """What to scale by; the metric that asks for most groups wins."""
    scale_down_seconds: Annotated[int, Field(ge=0, le=3600)] = 300
    """For so long fewer groups must have been enough before one is taken away."""


class Disruption(ApiModel):
    """What the cluster may take away of its own accord, such as when a machine is emptied."""

    min_available: Groups | None = None
    """Groups that must stay whole; left out, ``replicas`` less ``rollout.maxUnavailable``."""


class Front(ApiModel):
    """The Service that clients connect to."""

    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = "ClusterIP"
    """Who can reach it."""
    annotations: Annotated[dict[str, Label], Field(max_length=32)] = {}
    """Notes for load balancers and the like."""


class Network(ApiModel):
    """Who may connect to the pods: NetworkPolicies, which the cluster's network has to enforce."""

    isolate_shards: bool = True
    """Whether the engines of the service alone may connect to its shards; metrics are for all."""
    clients: Annotated[tuple[CoreObject, ...], Field(max_length=32)] = ()
    """Peers, as a NetworkPolicy has them, that alone may ask the engines; empty, everybody may."""


class Placement(ApiModel):
    """Who decides where the pods run, and how near to each other."""

    priority_class_name: ObjectName | None = None
    """Priority class of the pods."""
    scheduler_name: Annotated[str, StringConstraints(min_length=1, max_length=253)] = "default-scheduler"
    """Scheduler of the pods."""
    topology: Topology | None = None
    """Where the pods of a group should lie with respect to each other."""
