"""The model that a service serves: a folder, or what a training job of the namespace has trained."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints

from unmask_api.base import FILE_WORD, ApiModel, Name, Rule, StoreUri
from unmask_api.cluster import Quantity

__all__ = ["ModelCache", "ServedJob", "ServedModel"]


class ServedJob(ApiModel):
    """The model of a DiffusionTrainJob of the namespace."""

    name: Name
    """Name of the job; it may be made after the service, which waits until it is complete."""
    export: Name | None = None
    """Stage whose export is served; left out, the final model."""
    update: Literal["Never", "WhenComplete", "WhenImproved"] = "Never"
    """What to do when the job was made anew under its name and that one is complete.

    ``Never``: serve on what was found first. ``WhenComplete``: roll to the new model. ``WhenImproved``: do so
    if its last training loss is lower than that of the model being served.
    """


class ModelCache(ApiModel):
    """Where copies of models are kept that are in an object store."""

    rules: ClassVar = (
        Rule(
            rule="!(has(self.claimName) && has(self.sizeLimit))",
            message="sizeLimit is for the room of one pod, and a claim has its own size: drop one of them",
            field_path=".sizeLimit",
        ),
    )

    claim_name: Name | None = None
    """A claim that all pods share, so that a model is copied once; left out, each pod keeps its own copy."""
    size_limit: Quantity | None = None
    """Room for a pod's own copy, such as ``64Gi``; left out, as much as its machine has."""


class ServedModel(ApiModel):
    """Which model is served, and what requests call it."""

    rules: ClassVar = (
        Rule(
            rule="has(self.uri) != has(self.job)",
            message="give exactly one of uri (a folder with a model) and job (what a job has trained)",
        ),
        Rule(
            rule="!(has(self.revision) && has(self.job))",
            message="revision tells apart what lies at a uri, and a job tells that by itself: drop revision",
            field_path=".revision",
        ),
    )

    uri: StoreUri | None = None
    """A folder with ``config.json``, safetensors weights and a tokenizer, as ``unmask serve`` takes it.

    ``pvc://CLAIM/path`` is mounted read-only; from an object store it is copied before a server starts.
    """
    revision: Annotated[str, StringConstraints(pattern=FILE_WORD, max_length=64)] | None = None
    """Change this where other files lie at the same ``uri``: it rolls the groups, and names the copy."""
    job: ServedJob | None = None
    """A job whose model is served once it is complete."""
    name: Annotated[str, StringConstraints(min_length=1, max_length=128)] | None = None
    """What requests call the model; left out, the name of the service."""
    cache: ModelCache = Field(default=ModelCache())
    """Where copies are kept of what is in an object store."""
