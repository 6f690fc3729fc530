"""The DiffusionTrainJob: one manifest for a laptop and a cluster, and the file the trainer reads.

What a run is depends on nothing but this object: the trainer, the operator and the command line
all read it through these models. Numbers that are not integers are quoted strings, see
:data:`unmask_api.base.DecimalString`. Defaults that depend on other fields (``supervise``,
``noise``) are filled in on reading and stand in no schema; CEL rules must allow for their absence.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints

from unmask_api.base import ApiModel, Count, DataUri, DecimalString, FileWord, Name, ObjectName, Rule, Uri
from unmask_api.cluster import (
    CoreObject,
    Elastic,
    EnvVar,
    Label,
    Observability,
    PodResources,
    Rendezvous,
    RunPolicy,
    Scheduling,
    Toleration,
)
from unmask_api.metadata import ObjectMeta
from unmask_api.train_status import TrainStatus

__all__ = [
    "Balance",
    "Checkpoint",
    "Conversion",
    "Data",
    "DataCache",
    "DataSource",
    "DiffusionTrainJob",
    "EmbeddingNoise",
    "Evaluation",
    "GenerationEvaluation",
    "JobModel",
    "LearningRate",
    "LoRA",
    "Merge",
    "Model",
    "ModelInit",
    "Noise",
    "Objective",
    "Optimizer",
    "Parallelism",
    "Stability",
    "Stage",
    "StageData",
    "Telemetry",
    "Tokenizer",
    "TrainSpec",
]

Objective = Literal["ar", "mdlm", "bdlm", "sft", "dpo"]
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
    uri: Uri | None = None
    """A folder with ``config.json`` and safetensors weights."""
    job: JobModel | None = None
    """The model of another job, which is waited for; on clusters only, ``unmask run`` needs ``uri``."""


class Tokenizer(ApiModel):
    """The tokenizer that text is read with."""

    uri: Uri
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


class DataSource(ApiModel):
    """One file of documents, or a folder of files."""

    rules: ClassVar = (
        Rule(
            rule="!has(self.share) || double(self.share) > 0.0",
            message="share must be above 0: drop the source instead",
            field_path=".share",
        ),
        Rule(
            rule="!has(self.share) || self.weight == 1",
            message="share and weight are two ways to say how much of a source is learnt: drop one",
            field_path=".weight",
        ),
    )

    uri: DataUri
    """A ``.jsonl``, ``.jsonl.gz``, ``.jsonl.zst``, ``.parquet`` or ``.txt`` file, or a folder of such files.

    The files of a folder say in their names which split they belong to, as ``train-00000-of-00002.parquet``.
    """
    format: Literal["text", "messages", "completion", "preference", "tokens"]
    """What a document is.

    Plain ``text``, chat ``messages``, a prompt and its ``completion``, a ``preference``: a prompt (or the
    messages before the answer) with the answer ``chosen`` and the answer ``rejected``; or ``tokens`` already.
    """
    split: FileWord | None = None
    """Of a folder; left out, ``train`` for documents to learn from and ``validation`` for the others."""
    weight: Annotated[int, Field(ge=1, le=1000)] = 1
    """How many times the documents of this file occur in one pass over the data."""
    share: DecimalString | None = None
    """Of the tokens that are learnt, relative to the shares of the other sources.

    Sources then come in these proportions at any time, however large they are: a small one is passed through
    more often, in another order each time. Either all sources to learn from have one, or none.
    """


class StageData(ApiModel):
    """What a stage learns from and is measured on."""

    rules: ClassVar = (
        Rule(
            rule="self.train.all(source, has(source.share)) || self.train.all(source, !has(source.share))",
            message="either all sources to learn from have a share, or none: add or drop one",
            field_path=".train",
        ),
        Rule(
            rule="self.validation.all(source, !has(source.share))",
            message="a share is of what is learnt: drop it from validation",
            field_path=".validation",
        ),
    )

    train: Annotated[tuple[DataSource, ...], Field(min_length=1, max_length=32)]
    """Documents to learn from."""
    validation: Annotated[tuple[DataSource, ...], Field(max_length=32)] = ()
    """Documents to measure on; none: no evaluation."""


class DataCache(ApiModel):
    """A folder in which runs that read the same data with the same tokenizer share what they encoded."""

    uri: Uri
    """The folder; every process of the job must see it."""


class Data(StageData):
    """The data of the job, and how they are read."""

    seed: Annotated[int, Field(ge=0, le=2**53 - 1)] = 0
    """The one seed of the run: random weights, order of the documents, and noise follow from it."""
    overlong: Literal["Error", "Skip", "Split"] = "Error"
    """What to do with a document longer than a row.

    ``Error``: stop. ``Skip``: leave it out and count it. ``Split``: cut ``text``, and ``tokens`` that are all
    learnt, into pieces of a row each, and stop at anything else, since an answer without its prompt teaches
    nothing.
    """
    cache: DataCache | None = None
    """Where data are kept as tokens; left out, in the run folder."""


class Noise(ApiModel):
    """How much of a document is masked, and how masked tokens are weighed."""

    rules: ClassVar = (
        Rule(
            rule="double(self.low) < double(self.high) && double(self.high) <= 1.0",
            message="the mask ratio needs 0 <= low < high <= 1",
            field_path=".high",
        ),
        Rule(
            rule="!self.complementary || self.views == 2",
            message="complementary masks come in pairs: set views to 2, or complementary to false",
            field_path=".views",
        ),
    )

    low: DecimalString
    """Smallest mask ratio."""
    high: DecimalString
    """Largest mask ratio."""
    scope: Literal["Block", "Document"]
    """Draw one mask ratio for each block, or one for the whole document."""
    weight: Literal["Elbo", "Flat"]
    """Weigh a masked token by one over its mask ratio (a likelihood bound), or all alike."""
    views: Annotated[int, Field(ge=1, le=8)] = 1
    """Noisy copies of each row in one step."""
    complementary: bool = False
    """Let the second view mask exactly what the first leaves visible."""


class EmbeddingNoise(ApiModel):
    """Gaussian noise on the embeddings of masked tokens, against exploding gradients after a conversion."""

    rules: ClassVar = (Rule(rule="double(self.std) > 0.0", message="std must be above 0", field_path=".std"),)

    std: DecimalString
    """Standard deviation at the first step; it falls evenly to 0.

    The root mean square of the embedding's rows is a fair start: about 0.02 for many models.
    """
    steps: Annotated[int, Field(ge=1, le=10_000_000)]
    """Steps from the start of the stage that have noise."""


class LearningRate(ApiModel):
    """Warm-up, stable, decay: rises from 0 to ``peak``, stays, and falls to ``final``."""

    rules: ClassVar = (
        Rule(
            rule="double(self.peak) > 0.0 && double(self.final) <= double(self.peak)",
            message="the learning rate needs peak > 0 and final <= peak",
            field_path=".peak",
        ),
    )

    peak: DecimalString
    """Learning rate between warm-up and decay."""
    final: DecimalString = "0"
    """Learning rate after the last step; without meaning when ``decaySteps`` is 0."""
    warmup_steps: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """Steps to rise for."""
    decay_steps: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """Steps to fall for, at the end of the stage."""
    decay: Literal["Linear", "Cosine"] = "Linear"
    """Shape of the fall."""


class Merge(ApiModel):
    """The mean of checkpoints in place of the last weights (WSM: warm-up, stable, merge)."""

    best: Annotated[int, Field(ge=1, le=64)]
    """Checkpoints of the stage to average: those of least validation loss. They are kept until then."""


def _default_supervise(stage: dict[str, Any]) -> Literal["All", "Response"]:
    return "Response" if stage.get("objective") in ("sft", "dpo") else "All"


def _default_noise(stage: dict[str, Any]) -> Noise | None:
    match stage.get("objective"):
        case "mdlm" | "bdlm":
            return Noise(low="0.0", high="1.0", scope="Block", weight="Elbo")
        case "sft":
            return Noise(low="0.3", high="0.8", scope="Document", weight="Flat")
        case "dpo":
            return Noise(low="0.3", high="0.8", scope="Document", weight="Elbo")
    return None


def _default_beta(stage: dict[str, Any]) -> str | None:
    return "0.1" if stage.get("objective") == "dpo" else None


class Stage(ApiModel):
    """A run of steps with one objective, row length and learning-rate schedule."""

    rules: ClassVar = (
        Rule(
            rule="has(self.blockSizes) == (self.objective in ['bdlm', 'sft', 'dpo'])",
            message="bdlm, sft and dpo need blockSizes; ar and mdlm have none",
            field_path=".blockSizes",
        ),
        Rule(
            rule="!has(self.blockSizes) || self.blockSizes.all(size, self.length % size == 0)",
            message="every block size must divide length: change blockSizes or length",
            field_path=".blockSizes",
        ),
        Rule(
            rule="!has(self.blockSizes) || size(self.blockSizes) <= self.steps",
            message="every block size needs at least one step: raise steps or drop block sizes",
            field_path=".steps",
        ),
        Rule(
            rule="!has(self.maskToken) || has(self.convertTo)",
            message="maskToken says what a conversion masks with: set convertTo, or drop maskToken",
            field_path=".maskToken",
        ),
        Rule(
            rule="!has(self.noise) || self.objective != 'ar'",
            message="an ar stage has no noise: drop noise or change objective",
            field_path=".noise",
        ),
        Rule(
            rule="double(self.confidenceWeight) == 0.0 || self.objective != 'ar'",
            message="confidenceWeight is for diffusion objectives: drop it or change objective",
            field_path=".confidenceWeight",
        ),
        Rule(
            rule="!has(self.embeddingNoise) || self.objective != 'ar'",
            message="an ar stage masks nothing whose embedding could be disturbed: drop embeddingNoise",
            field_path=".embeddingNoise",
        ),
        Rule(
            rule="!has(self.embeddingNoise) || self.embeddingNoise.steps <= self.steps",
            message="embeddingNoise.steps must not exceed steps: lower it or raise steps",
            field_path=".embeddingNoise",
        ),
        Rule(
            rule="self.prediction == 'Same' || self.objective != 'ar'",
            message="an ar stage predicts the next token already: drop prediction",
            field_path=".prediction",
        ),
        Rule(
            rule="double(self.randomLength) <= 1.0",
            message="randomLength is a share of the documents: at most 1",
            field_path=".randomLength",
        ),
        Rule(
            rule="double(self.randomLength) == 0.0"
            " || (!(self.objective in ['sft', 'dpo']) && (!has(self.supervise) || self.supervise == 'All'))",
            message="an answer that is cut teaches to stop anywhere: drop randomLength, or learn from All",
            field_path=".randomLength",
        ),
        Rule(
            rule="self.documentMask || !has(self.supervise) || self.supervise != 'AllTurns'",
            message="turns are kept apart like documents: set documentMask to true, or supervise to LastTurn",
            field_path=".documentMask",
        ),
        Rule(
            rule="!has(self.beta) || (self.objective == 'dpo' && double(self.beta) > 0.0)",
            message="beta is for dpo, and above 0: drop it, raise it, or change objective",
            field_path=".beta",
        ),
        Rule(
            rule="self.objective != 'dpo' || ((!has(self.supervise) || self.supervise == 'Response')"
            " && self.documentMask && double(self.confidenceWeight) == 0.0 && self.prediction == 'Same')",
            message="dpo compares bounds of whole answers, predicted in place: leave out supervise,"
            " documentMask, confidenceWeight and prediction",
            field_path=".objective",
        ),
        Rule(
            rule="!has(self.ropeTheta) || double(self.ropeTheta) > 0.0",
            message="ropeTheta must be above 0",
            field_path=".ropeTheta",
        ),
        Rule(
            rule="self.learningRate.warmupSteps + self.learningRate.decaySteps <= self.steps",
            message="warmupSteps + decaySteps must not exceed steps: lower them or raise steps",
            field_path=".learningRate",
        ),
    )

    name: Name
    """Name of the stage, in logs and folders."""
    objective: Objective
    """What is learnt.

    ``ar``: the next token. ``mdlm``: masked tokens of the whole document. ``bdlm``: masked tokens block by
    block. ``sft``: the same in answers only. ``dpo``: to prefer one of two answers, compared with the
    model as it is when the stage begins.
    """
    steps: Annotated[int, Field(ge=1, le=10_000_000)]
    """Optimiser steps."""
    length: Annotated[int, Field(ge=2, le=1_048_576)]
    """Tokens in a row; documents are packed into rows."""
    rows_per_step: Annotated[int, Field(ge=1, le=1_048_576)]
    """Rows in one optimiser step, over all processes."""
    learning_rate: LearningRate
    """Learning-rate schedule of the stage."""
    convert_to: Conversion | None = None
    """Architecture that the model takes on before the first step of the stage, weights unchanged."""
    mask_token: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """The special token that becomes the mask at this conversion: one that the tokenizer has and text lacks.

    Left out, the ``mask_token_id`` of the model's config, or the one of the published models of the target
    (LLaDA2, SDAR).
    """
    block_sizes: (
        Annotated[tuple[Annotated[int, Field(ge=1, le=1_048_576)], ...], Field(min_length=1, max_length=16)]
        | None
    ) = None
    """Tokens in a block; several sizes share the steps equally. ``bdlm``, ``sft`` and ``dpo`` need it."""
    supervise: Literal["All", "Response", "LastTurn", "AllTurns"] = Field(default_factory=_default_supervise)
    """Learn from all tokens or from answers only. Left out: All, but for ``sft`` and ``dpo`` ``Response``.

    ``Response``: the completion, or a conversation's last turn; ``LastTurn`` is another name of it.
    ``AllTurns``: every turn of the assistant, each as if the conversation ended with it.
    """
    noise: Noise | None = Field(default_factory=_default_noise)
    """How much is masked.

    Left out: ratios 0 to 1 per block with Elbo weights; for ``sft`` 0.3 to 0.8 per document with Flat
    weights; for ``dpo`` the same band with Elbo weights. ``ar`` has none.
    """
    beta: DecimalString | None = Field(default_factory=_default_beta)
    """How strongly ``dpo`` holds to the model that the stage begins with; left out, 0.1."""
    confidence_weight: DecimalString = "0"
    """Weight of the entropy where the prediction is right (CAP): above 0, decoding fills more at a time."""
    document_mask: bool = True
    """Whether a document sees itself alone. False: the documents packed into a row see each other.

    For comparison: LLaDA2.0 keeps documents apart (equation 3), and so do all objectives here by default.
    Validation keeps them apart in either case.
    """
    embedding_noise: EmbeddingNoise | None = None
    """Noise on the embeddings of masked tokens in the first steps, for a model just converted."""
    prediction: Literal["Same", "Shifted"] = "Same"
    """Predict a masked token at its own place, or from the place before it, as autoregressive models do.

    Decoding and evaluation by generation here know ``Same`` alone.
    """
    random_length: DecimalString = "0"
    """Share of the documents that are cut to a random length; LLaDA cuts 0.01 of them while pre-training."""
    rope_theta: DecimalString | None = None
    """Base of the rotary embedding from this stage on; left out, it stays."""
    context_length: Annotated[int, Field(ge=2, le=16_777_216)] | None = None
    """Longest context (``max_position_embeddings``) from this stage on; left out, it stays."""
    router_bias: Literal["Update", "Frozen"] = "Update"
    """Whether the stage goes on balancing experts by their routers' bias."""
    data: StageData | None = None
    """The stage's own data; left out, ``spec.data``."""
    export: bool = False
    """Write the model to ``<run>/exports/<name>`` in the published format when the stage ends."""
    merge: Merge | None = None
    """End the stage with the mean of its best checkpoints, and write it to ``<run>/exports/<name>``.

    The next stage goes on from that mean, and a last stage's is the final model. The optimiser's moments stay
    those of the last step.
    """


class Optimizer(ApiModel):
    """AdamW, and the clipping of gradients."""

    rules: ClassVar = (
        Rule(
            rule="self.betas.all(beta, double(beta) < 1.0)",
            message="both betas must be below 1",
            field_path=".betas",
        ),
        Rule(rule="double(self.clipNorm) > 0.0", message="clipNorm must be above 0", field_path=".clipNorm"),
        Rule(rule="double(self.epsilon) > 0.0", message="epsilon must be above 0", field_path=".epsilon"),
    )

    betas: Annotated[tuple[DecimalString, ...], Field(min_length=2, max_length=2)] = ("0.9", "0.95")
    """Decay rates of the first and second moment."""
    weight_decay: DecimalString = "0.1"
    """Decoupled weight decay of matrices; norms and biases have none."""
    clip_norm: DecimalString = "1.0"
    """Largest global norm of the gradient."""
    epsilon: DecimalString = "1e-8"
    """Added to the denominator."""


class Balance(ApiModel):
    """Balancing of experts: by a bias on the routers' choice, and by losses."""

    bias_update_rate: DecimalString = "0.001"
    """How far each step moves a router's expert bias towards equal load; 0 freezes it."""
    load_balance_weight: DecimalString = "0"
    """Weight of the load-balance loss, for models without a bias; LLaDA-MoE has 0.01.

    Experts' shares are those of the whole step, so all micro-batches of a process but one run forward twice.
    """
    router_z_weight: DecimalString = "0"
    """Weight of the z-loss, which keeps the logits of routers small; LLaDA-MoE has 0.001."""


class LoRA(ApiModel):
    """Low-rank adapters, which learn while the model that they are put beside stays as it is."""

    rules: ClassVar = (
        Rule(rule="double(self.alpha) > 0.0", message="alpha must be above 0", field_path=".alpha"),
        Rule(
            rule="self.targets.all(target, self.targets.exists_one(other, other == target))",
            message="targets must be unique: drop one",
            field_path=".targets",
        ),
    )

    rank: Annotated[int, Field(ge=1, le=1024)]
    """Rank of each adapter."""
    alpha: DecimalString = "16"
    """What an adapter adds is scaled by this over ``rank``."""
    targets: Annotated[tuple[Literal["attention", "feedForward"], ...], Field(min_length=1, max_length=2)] = (
        "attention",
        "feedForward",
    )
    """Matrices with an adapter: the projections of ``attention``, and those of every ``feedForward`` that all
    tokens pass (dense layers and shared experts)."""


class Parallelism(ApiModel):
    """Processes that train together, and who of them holds what; a run may go on with another arrangement."""

    rules: ClassVar = (
        Rule(
            rule="has(self.replicas) == (self.shard == 'Hybrid')",
            message="shard Hybrid needs replicas, and nothing else has them: set replicas, or change shard",
            field_path=".replicas",
        ),
        Rule(
            rule="!has(self.replicas) || self.nodes * self.processesPerNode % self.replicas == 0",
            message="replicas must divide nodes * processesPerNode: change one of them",
            field_path=".replicas",
        ),
        Rule(
            rule="self.expertParallel == 1 || self.shard != 'None'",
            message="experts are spread over processes only where parameters are: set shard to Full or"
            " Hybrid, or expertParallel to 1",
            field_path=".expertParallel",
        ),
        Rule(
            rule="self.nodes * self.processesPerNode"
            " % ((has(self.replicas) ? self.replicas : 1) * self.expertParallel) == 0",
            message="expertParallel must divide the processes of a replica"
            " (nodes * processesPerNode / replicas): change one of them",
            field_path=".expertParallel",
        ),
    )

    nodes: Annotated[int, Field(ge=1, le=4096)] = 1
    """Machines (pods); on a laptop, launcher processes."""
    processes_per_node: Annotated[int, Field(ge=1, le=64)] = 1
    """Worker processes on each, one per GPU."""
    micro_batch_rows: Annotated[int, Field(ge=1, le=65536)] = 1
    """At most this many rows in one forward pass of a process; a step takes as many passes as it needs."""
    shard: Literal["None", "Full", "Hybrid"] = "None"
    """Who holds weights, gradients and optimiser state.

    ``None``: every process all of them. ``Full``: each process a part, and layers are gathered when they
    compute. ``Hybrid``: each of ``replicas`` groups all of them, shared out inside the group.
    """
    replicas: Annotated[int, Field(ge=2, le=4096)] | None = None
    """Groups of processes that each hold the whole model; required by ``Hybrid`` alone."""
    expert_parallel: Annotated[int, Field(ge=1, le=1024)] = 1
    """Neighbouring processes that share out the experts of a layer: tokens travel, experts stay.

    Must divide the processes of a replica and the number of experts.
    """
    activation_checkpointing: Literal["None", "Full"] = "None"
    """``Full``: keep only the inputs of each layer, and compute the rest again in the backward pass."""

    @property
    def processes(self) -> int:
        """Worker processes in all."""
        return self.nodes * self.processes_per_node


class GenerationEvaluation(ApiModel):
    """Measure by generating answers to validation prompts."""

    rules: ClassVar = (
        Rule(
            rule="double(self.threshold) > 0.0 && double(self.threshold) <= 1.0",
            message="the confidence threshold must be above 0 and at most 1",
            field_path=".threshold",
        ),
    )

    samples: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    """Prompts to answer, the first ones of the validation data."""
    threshold: DecimalString = "0.9"
    """Confidence above which a token is kept."""
    max_new_tokens: Annotated[int, Field(ge=1, le=1_048_576)] = 64
    """Longest answer, in tokens."""


class Evaluation(ApiModel):
    """Measurements on validation data while training."""

    every_steps: Count
    """Steps between measurements; there is also one at the end of every stage."""
    batches: Annotated[int, Field(ge=1, le=65536)] = 4
    """Batches of ``rowsPerStep`` rows that the validation loss is taken over."""
    generation: GenerationEvaluation | None = None
    """Also generate answers; for completion and messages data."""


class Checkpoint(ApiModel):
    """Where a run lives and how often it is saved."""

    uri: Uri
    """The run folder: checkpoints, metrics, exports and the final model."""
    every_steps: Count = 100
    """Steps between checkpoints; there is also one after the last step."""
    keep_last: Annotated[int, Field(ge=1, le=1000)] = 3
    """Checkpoints to keep."""
    resume: Literal["Auto", "Never"] = "Auto"
    """Go on from the newest committed checkpoint, or refuse to start in a run folder that holds one."""
    asynchronous: bool = False
    """Train on while a checkpoint is written: it is copied to host memory first, which needs as much again.

    At most one is being written. If that fails, the run ends after the step at hand. Those at the end of a
    stage and on request to stop are waited for.
    """


class Stability(ApiModel):
    """What to do about a step whose loss or gradient is not finite, or far above what went before.

    Such a step is skipped: its documents count as seen, the weights stay. After ``maxSkips`` in a row the
    run goes back to the newest checkpoint and leaves out all documents that it has seen since.
    """

    rules: ClassVar = (
        Rule(
            rule="double(self.spikeDeviations) >= 1.0",
            message="spikeDeviations must be at least 1: lower values skip ordinary steps",
            field_path=".spikeDeviations",
        ),
    )

    window: Annotated[int, Field(ge=8, le=1024)] = 128
    """Steps of the stage that a spike is measured against, skipped ones not counted.

    Until a stage has taken as many, only what is not finite is skipped.
    """
    spike_deviations: DecimalString = "20"
    """A step is a spike if its loss or gradient norm exceeds the window's median by so many deviations.

    A deviation is 1.4826 times the median distance from the median, and at least a hundredth of the median.
    """
    max_skips: Annotated[int, Field(ge=1, le=1000)] = 8
    """Steps skipped in a row before the run goes back to a checkpoint."""
    max_rollbacks: Annotated[int, Field(ge=0, le=1000)] = 3
    """Times that the run may go back; the next time it fails as diverged."""


class Telemetry(ApiModel):
    """What the run tells of itself besides its log."""

    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port of the first process at which ``/metrics`` answers Prometheus; left out, there is none."""
    peak_flops: DecimalString | None = None
    """Floating-point operations a second that one device can do at ``precision``, such as "989e12".

    Left out, the share of it that is used (MFU) is not reported.
    """


def _immutable(field: str) -> Rule:
    return Rule(
        rule=f"self.{field} == oldSelf.{field}",
        message=f"{field} cannot be changed: make a new job",
        field_path=f".{field}",
    )


class TrainSpec(ApiModel):
    """What to train, on what, and how."""

    rules: ClassVar = (
        Rule(
            rule="self.stages.all(stage, self.stages.exists_one(other, other.name == stage.name))",
            message="stage names must be unique: rename one",
            field_path=".stages",
        ),
        Rule(
            rule="self.stages.all(stage, stage.rowsPerStep"
            " % (self.parallelism.nodes * self.parallelism.processesPerNode) == 0)",
            message="rowsPerStep of every stage must be a multiple of nodes * processesPerNode:"
            " all processes share alike",
            field_path=".stages",
        ),
        Rule(
            rule="!has(self.evaluation) || size(self.data.validation) > 0"
            " || self.stages.exists(stage, has(stage.data) && size(stage.data.validation) > 0)",
            message="evaluation needs validation data: set data.validation or drop evaluation",
            field_path=".evaluation",
        ),
        Rule(
            rule="!has(self.evaluation) || !has(self.evaluation.generation)"
            " || self.data.validation.exists(source, source.format != 'text' && source.format != 'tokens')"
            " || self.stages.exists(stage, has(stage.data)"
            " && stage.data.validation.exists(source, source.format != 'text' && source.format != 'tokens'))",
            message="evaluation.generation needs validation data of format completion or messages",
            field_path=".evaluation.generation",
        ),
        Rule(
            rule="!has(self.evaluation) || !has(self.evaluation.generation)"
            " || self.stages.all(stage, stage.prediction == 'Same')",
            message="answers are generated by same-place prediction: drop evaluation.generation, or the"
            " stages' prediction",
            field_path=".evaluation.generation",
        ),
        Rule(
            rule="self.stages.all(stage,"
            " !(has(stage.supervise) ? stage.supervise != 'All' : stage.objective == 'sft')"
            " || (has(stage.data) ? stage.data.train.all(source, source.format != 'text')"
            " : self.data.train.all(source, source.format != 'text')))",
            message="text holds no answers: a stage that supervises Response needs train data of format"
            " completion or messages",
            field_path=".stages",
        ),
        Rule(
            rule="self.stages.all(stage, has(stage.data)"
            " ? stage.data.train.all(source,"
            " (source.format == 'preference') == (stage.objective == 'dpo'))"
            " : self.data.train.all(source,"
            " (source.format == 'preference') == (stage.objective == 'dpo')))",
            message="a dpo stage needs train data of format preference, and no other stage can use them:"
            " set data of the stage, or change objective",
            field_path=".stages",
        ),
        Rule(
            rule="self.stages.all(stage, has(stage.data)"
            " ? stage.data.validation.all(source,"
            " (source.format == 'preference') == (stage.objective == 'dpo'))"
            " : self.data.validation.all(source,"
            " (source.format == 'preference') == (stage.objective == 'dpo')))",
            message="a dpo stage is measured on validation data of format preference, and no other stage is:"
            " set data of the stage, or drop validation",
            field_path=".stages",
        ),
        Rule(
            rule="self.stages.all(stage, !has(stage.merge) || has(self.evaluation)"
            " && (has(stage.data) ? size(stage.data.validation) : size(self.data.validation)) > 0"
            " && self.checkpoint.everySteps % self.evaluation.everySteps == 0"
            " && stage.merge.best * self.checkpoint.everySteps <= stage.steps)",
            message="merge chooses among measured checkpoints: it needs evaluation and validation data,"
            " checkpoint.everySteps a multiple of evaluation.everySteps, and stage steps of at least"
            " merge.best * checkpoint.everySteps",
            field_path=".stages",
        ),
        Rule(
            rule="!has(self.lora) || self.parallelism.shard == 'None'",
            message="adapters are not shared out, and their base is whole in every process: set"
            " parallelism.shard to None, or drop lora",
            field_path=".lora",
        ),
        Rule(
            rule="!has(self.lora) || self.stages.all(stage, !has(stage.convertTo) && !has(stage.merge)"
            " && !has(stage.ropeTheta) && !has(stage.contextLength))",
            message="the base of adapters stays as it is: drop convertTo, merge, ropeTheta and contextLength"
            " of the stages (unmask convert does the first beforehand), or drop lora",
            field_path=".lora",
        ),
        Rule(
            rule="!has(self.lora) || (double(self.balance.loadBalanceWeight) == 0.0"
            " && double(self.balance.routerZWeight) == 0.0)",
            message="routers do not learn beside adapters: set the weights of balance to 0, or drop lora",
            field_path=".lora",
        ),
        _immutable("managedBy"),
        _immutable("model"),
        _immutable("data"),
        _immutable("stages"),
        _immutable("optimizer"),
        _immutable("precision"),
        _immutable("checkpoint.uri"),
        Rule(
            rule="!has(self.elastic) || (self.elastic.minNodes <= self.parallelism.nodes"
            " && self.parallelism.nodes <= self.elastic.maxNodes)",
            message="parallelism.nodes must lie between elastic.minNodes and elastic.maxNodes",
            field_path=".elastic",
        ),
        Rule(
            rule="!has(self.elastic) || self.parallelism.shard == 'None'",
            message="elastic is for parallelism.shard None: an arrangement of parts is made for one number"
            " of processes; suspend the job to change nodes, or drop elastic",
            field_path=".elastic",
        ),
        Rule(
            rule="oldSelf.suspend || has(self.elastic)"
            " || self.parallelism.nodes == oldSelf.parallelism.nodes",
            message="nodes can be changed while the job is suspended, or if it is elastic",
            field_path=".parallelism.nodes",
        ),
        Rule(
            rule="oldSelf.suspend"
            " || (self.parallelism.processesPerNode == oldSelf.parallelism.processesPerNode"
            " && self.parallelism.microBatchRows == oldSelf.parallelism.microBatchRows"
            " && self.parallelism.shard == oldSelf.parallelism.shard"
            " && self.parallelism.expertParallel == oldSelf.parallelism.expertParallel"
            " && self.parallelism.activationCheckpointing == oldSelf.parallelism.activationCheckpointing"
            " && (has(self.parallelism.replicas) ? self.parallelism.replicas : 0)"
            " == (has(oldSelf.parallelism.replicas) ? oldSelf.parallelism.replicas : 0))",
            message="parallelism can be changed only while the job is suspended",
            field_path=".parallelism",
        ),
        Rule(
            rule="self.observability.port != self.rendezvous.port"
            " && (!has(self.telemetry.port) || (self.telemetry.port != self.rendezvous.port"
            " && self.telemetry.port != self.observability.port))",
            message="observability.port, telemetry.port and rendezvous.port must differ: one pod opens all",
            field_path=".observability.port",
        ),
    )

    managed_by: Literal["unmask.dev/operator", "kueue.x-k8s.io/multikueue"] = "unmask.dev/operator"
    """Who runs the job: the operator of this cluster, or Kueue on another one."""
    suspend: bool = False
    """Whether the job should stand still: its pods save and end, and it goes on when this is false again."""

    model: Model
    """The model, and the tokenizer."""
    data: Data
    """Training and validation data."""
    stages: Annotated[tuple[Stage, ...], Field(min_length=1, max_length=64)]
    """What to do, one after the other; each stage goes on with the weights of the one before."""
    optimizer: Optimizer = Optimizer()
    """AdamW."""
    balance: Balance = Balance()
    """Balancing of experts."""
    lora: LoRA | None = None
    """Train adapters beside the model of ``model.init`` and leave it as it is; left out, all weights learn.

    The base is held in the number format of ``precision``, which must be that of its files. Exports and the
    final model have the adapters merged in.
    """
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of forward and backward passes; weights and optimiser state are fp32 in any case."""
    parallelism: Parallelism = Parallelism()
    """Processes that train together."""
    evaluation: Evaluation | None = None
    """Measurements while training; left out, none."""
    checkpoint: Checkpoint
    """The run folder, and how often it is saved."""
    stability: Stability | None = None
    """What to do about bad steps; left out, the first whose loss or gradient is not finite ends the run."""
    telemetry: Telemetry = Telemetry()
    """What the run tells of itself besides its log."""
    run_policy: RunPolicy = RunPolicy()
    """When the job starts again, when it gives up, and what stays behind."""
    elastic: Elastic | None = None
    """How far the number of nodes may change while the job runs; left out, not at all."""
    scheduling: Scheduling = Scheduling()
    """Who decides where and when the pods run."""
    rendezvous: Rendezvous = Rendezvous()
    """How the pods of an attempt find each other."""
    observability: Observability = Observability()
    """How the operator follows the training."""
    image: Annotated[str, StringConstraints(min_length=1, max_length=512)] | None = None
    """Container image of the workers; left out, the one that the operator was installed with."""
    env: Annotated[tuple[EnvVar, ...], Field(max_length=128)] = ()
    """Further variables of the workers' environment."""
    credentials: Annotated[tuple[ObjectName, ...], Field(max_length=8)] = ()
    """Secrets of the namespace whose keys become variables of the workers' environment.

    For what object stores ask for, such as ``AWS_ACCESS_KEY_ID`` and ``AWS_SECRET_ACCESS_KEY``; ``env`` comes
    before them. ``unmask run`` takes the environment it has.
    """
    resources: PodResources = PodResources()
    """What one pod, with all its processes, takes of its machine."""
    node_selector: Annotated[dict[str, Label], Field(max_length=32)] = {}
    """Labels that the pods' machines must have."""
    tolerations: Annotated[tuple[Toleration, ...], Field(max_length=32)] = ()
    """Taints that do not keep the pods away."""
    affinity: CoreObject | None = None
    """Affinity of the pods."""
    volumes: Annotated[tuple[CoreObject, ...], Field(max_length=32)] = ()
    """Further volumes of the pods; the claims of ``pvc://`` paths need none."""
    volume_mounts: Annotated[tuple[CoreObject, ...], Field(max_length=64)] = ()
    """Where the further volumes are mounted in the worker."""
    service_account_name: ObjectName | None = None
    """Service account of the pods; its token is not mounted."""
    termination_grace_period_seconds: Annotated[int, Field(ge=30, le=3600)] = 120
    """Time to save when the pods are asked to end: longer than a checkpoint takes."""
    pod_template: CoreObject | None = None
    """Laid over the pods that the operator would make: lists of named things merge by name.

    The worker is the container ``trainer``. What says who a process is and how pods meet cannot be changed.
    """

    @property
    def total_steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def data_of(self, stage: Stage) -> StageData:
        """Return what ``stage`` learns from: its own data, else the job's."""
        return stage.data or self.data


class DiffusionTrainJob(ApiModel):
    """Trains a masked-diffusion language model, from random weights or from an autoregressive checkpoint."""

    rules: ClassVar = (
        Rule(
            rule="!has(self.spec.model.init.job) || self.spec.model.init.job.name != self.metadata.name",
            message="a job cannot begin with its own model: name another job",
            field_path=".spec.model.init.job.name",
        ),
    )

    api_version: Literal["unmask.dev/v1alpha1"]
    """Version of this schema."""
    kind: Literal["DiffusionTrainJob"]
    """Type of this object."""
    metadata: ObjectMeta
    """Standard object metadata."""
    spec: TrainSpec
    """What to train, on what, and how."""
    status: TrainStatus | None = None
    """What the operator observed; ignored by ``unmask run``."""
