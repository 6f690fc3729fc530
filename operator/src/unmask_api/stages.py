"""The stages of a job: an objective each, with its noise, blocks, row length and learning-rate schedule.

Defaults that depend on other fields (``supervise``, ``noise``, ``beta``) are filled in on reading and stand
in no schema; CEL rules must allow for their absence.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from unmask_api.base import ApiModel, DecimalString, Name, Rule
from unmask_api.data import StageData
from unmask_api.model import Conversion

__all__ = ["EmbeddingNoise", "LearningRate", "Merge", "Noise", "Objective", "Stage"]

Objective = Literal["ar", "mdlm", "bdlm", "sft", "dpo"]


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
