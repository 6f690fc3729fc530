"""The DiffusionInferenceService: a model, served by groups of pods that are scaled and replaced as wholes.

The parts of a spec have modules of their own, and all of them can be imported from here.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints

from unmask_api.base import ApiModel, ObjectName, Rule
from unmask_api.cluster import CoreObject, EnvVar, Label, PodResources, Toleration
from unmask_api.inference import (
    Autoscaling,
    Disruption,
    Front,
    Group,
    Groups,
    GroupTls,
    Network,
    Placement,
    PodsMetric,
    Rollout,
    Server,
    ServerTls,
)
from unmask_api.inference_status import GroupStatus, InferenceStatus, ModelStatus
from unmask_api.metadata import ObjectMeta
from unmask_api.served_model import ModelCache, ServedJob, ServedModel

__all__ = [
    "Autoscaling",
    "DiffusionInferenceService",
    "Disruption",
    "Front",
    "Group",
    "GroupStatus",
    "GroupTls",
    "InferenceSpec",
    "InferenceStatus",
    "ModelCache",
    "ModelStatus",
    "Network",
    "Placement",
    "PodResources",
    "PodsMetric",
    "Rollout",
    "ServedJob",
    "ServedModel",
    "Server",
    "ServerTls",
]


class InferenceSpec(ApiModel):
    """Which model to serve, with what, and how it is replaced."""

    rules: ClassVar = (
        Rule(
            rule="self.rollout.progressDeadlineSeconds >= self.group.startupTimeoutSeconds",
            message="a group may take group.startupTimeoutSeconds to start: set"
            " rollout.progressDeadlineSeconds to at least as much",
            field_path=".rollout.progressDeadlineSeconds",
        ),
        Rule(
            rule="has(self.server.tls) == has(oldSelf.server.tls)",
            message="TLS cannot be switched on or off: for a while clients would meet both behind one"
            " address; make a new service",
            field_path=".server",
        ),
        Rule(
            rule="(has(self.model.name) ? self.model.name : '')"
            " == (has(oldSelf.model.name) ? oldSelf.model.name : '')",
            message="model.name cannot be changed: requests name it, and for a while half of the groups would"
            " refuse them; make a new service",
            field_path=".model",
        ),
    )

    stopped: bool = False
    """Whether there should be no groups at all; what else there is stays, and false starts them again."""
    model: ServedModel
    """The model."""
    replicas: Groups = 1
    """Groups; what ``kubectl scale`` and autoscalers set."""
    group: Group = Group()
    """What answers a request together."""
    server: Server = Server()
    """How engines answer."""
    rollout: Rollout = Rollout()
    """How groups are replaced."""
    autoscaling: Autoscaling | None = None
    """An autoscaler for ``replicas``; left out, none."""
    disruption: Disruption = Disruption()
    """What the cluster may take away of its own accord."""
    service: Front = Front()
    """The Service that clients connect to."""
    network: Network = Network()
    """Who may connect to the pods."""
    scheduling: Placement = Placement()
    """Who decides where the pods run."""
    image: Annotated[str, StringConstraints(min_length=1, max_length=512)] | None = None
    """Container image of engines and shards; left out, the one that the operator was installed with.

    Then another operator with another image rolls the groups.
    """
    env: Annotated[tuple[EnvVar, ...], Field(max_length=128)] = ()
    """Further variables of their environment."""
    credentials: Annotated[tuple[ObjectName, ...], Field(max_length=8)] = ()
    """Secrets of the namespace whose keys become variables of the environment, for object stores."""
    node_selector: Annotated[dict[str, Label], Field(max_length=32)] = {}
    """Labels that the pods' machines must have."""
    tolerations: Annotated[tuple[Toleration, ...], Field(max_length=32)] = ()
    """Taints that do not keep the pods away."""
    affinity: CoreObject | None = None
    """Affinity of the pods."""
    volumes: Annotated[tuple[CoreObject, ...], Field(max_length=32)] = ()
    """Further volumes of the pods."""
    volume_mounts: Annotated[tuple[CoreObject, ...], Field(max_length=64)] = ()
    """Where the further volumes are mounted."""
    service_account_name: ObjectName | None = None
    """Service account of the pods; its token is not mounted."""
    pod_template: CoreObject | None = None
    """Laid over the pods that the operator would make: lists of named things merge by name.

    Engines are the container ``engine``, shards the container ``shard``. Labels that say what a pod belongs
    to cannot be changed.
    """


class DiffusionInferenceService(ApiModel):
    """Serves a masked-diffusion language model: groups of an engine and its expert shards."""

    rules: ClassVar = (
        Rule(
            rule="self.metadata.name.matches('^[a-z]')",
            message="the name must begin with a letter: a Service has it",
            field_path=".metadata.name",
        ),
    )

    api_version: Literal["unmask.dev/v1alpha1"]
    """Version of this schema."""
    kind: Literal["DiffusionInferenceService"]
    """Type of this object."""
    metadata: ObjectMeta
    """Standard object metadata."""
    spec: InferenceSpec
    """Which model to serve, with what, and how it is replaced."""
    status: InferenceStatus | None = None
    """What the operator observed."""
