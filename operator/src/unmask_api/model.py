"""The model that a job trains: where its first weights come from, and what text is read with."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from unmask_api.base import ApiModel, Name, Rule, StoreUri

__all__ = ["Conversion", "JobModel", "Model", "ModelInit", "Tokenizer"]

Conversion = Literal[
    "LLaDA2MoeModelLM",
    "A2DLlamaLMHeadModel",
    "SDARForCausalLM",
    "SDARMoeForCausalLM",
    "OlmoeForMaskedDiffusion",
]
"""The diffusion architectures that an autoregressive model can take on."""


class JobModel(ApiModel):
    """What another DiffusionTrainJob of the namespace has trained."""

    name: Name
    """Its name; it must be complete before this job starts, and may be made after this one."""
    export: Name | None = None
    """Stage whose export is taken; left out, the final model."""


class ModelInit(ApiModel):
    """Where the first weights come from."""

    rules: ClassVar = (
        Rule(
            rule="(has(self.config) ? 1 : 0) + (has(self.uri) ? 1 : 0) + (has(self.job) ? 1 : 0) == 1",
            message="give exactly one of config (random weights), uri (a checkpoint to start from) and job"
            " (another job's model)",
        ),
    )

    config: (
        Annotated[dict[str, Any], Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})]
        | None
    ) = None
    """An inline ``config.json``: the model is built from it with random weights."""
    uri: StoreUri | None = None
    """A folder with ``config.json`` and safetensors weights.

    From an object store it is copied to each machine before it is read.
    """
    job: JobModel | None = None
    """The model of another job, which is waited for; on clusters only, ``unmask run`` needs ``uri``."""


class Tokenizer(ApiModel):
    """The tokenizer that text is read with."""

    uri: StoreUri
    """A folder with ``tokenizer.json`` and, if there are messages to render, ``tokenizer_config.json``."""


class Model(ApiModel):
    """The model that is trained."""

    rules: ClassVar = (
        Rule(
            rule="has(self.tokenizer) || !has(self.init.config)",
            message="a model from an inline config brings no tokenizer: set tokenizer.uri",
        ),
    )

    init: ModelInit
    """Where the first weights come from: exactly one of ``config``, ``uri`` and ``job``."""
    tokenizer: Tokenizer | None = None
    """The tokenizer; left out, the one in the folder of the first weights."""
