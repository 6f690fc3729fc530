"""A model folder made ready to serve: its configuration, tokenizer and decoding defaults.

``generation_config.json`` holds what the model was trained to be decoded with. Whatever it leaves out comes
from ``config.json``, or from the papers and the published code:

* blocks of 32 and a threshold of 0.95, as LLaDA2.0 is evaluated with (arXiv 2512.15745, section 5.4);
* for editing a threshold of 0.9 and 16 steps beyond the last fill, with the same 0.95 for filling, as
  LLaDA2.1's published ``generate`` has it (its report, arXiv 2602.08676, lowers both for speed);
* for filling by runs and by credit dInfer's numbers (arXiv 2510.08666): a lower threshold of 0.62, and a
  weight of 0.7, a decay of 0.8 and an exponent of 0.2;
* for filling by entropy a bound of 0.1 nats, which is careful: none has been published for these models;
* for models that attend to the whole canvas LLaDA's even quotas, which is a threshold of 1.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from unmask.attention import Attends, kernels
from unmask.diffusion.batch import Batch
from unmask.diffusion.decoding import Credit, DecodingParams, Vicinity
from unmask.diffusion.full_sequence import CanvasBatch
from unmask.errors import ModelError, UsageError
from unmask.models.base import LanguageModel
from unmask.models.config import ModelConfig
from unmask.models.folder import exists_inside, read_json_inside
from unmask.models.loading import build
from unmask.models.tokenizer import Tokenizer
from unmask.serving.decoders import DECODERS, QUOTA_ONLY, Decoder, DecoderName, listed
from unmask.serving.ragged import RaggedBatch
from unmask.v1 import generation_pb2 as pb

__all__ = [
    "DEFAULT_MAX_TOKENS",
    "MAX_CREDIT",
    "MAX_ENTROPY",
    "MAX_POST_EDIT_STEPS",
    "GenerationDefaults",
    "ServedModel",
]

LONGEST_DEFAULT_CONTEXT = 4096
DEFAULT_MAX_TOKENS = 256
MAX_POST_EDIT_STEPS = 1024
"""A model may edit to and fro for ever; a request must not."""
MAX_CREDIT = 10.0
"""Weight and exponent of credits: far beyond what makes sense, and no overflow."""
MAX_ENTROPY = 1000.0
"""Nats: more than a block of any model has."""
_CREDIT = Credit()


class GenerationDefaults(BaseModel):
    """The keys of ``generation_config.json`` that we use; others are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    decoder: DecoderName
    block_length: PositiveInt = 32
    threshold: float = Field(gt=0, le=1)
    steps_per_block: PositiveInt | None = None
    edit_threshold: float = Field(default=0.9, ge=0, le=1)
    max_post_edit_steps: NonNegativeInt = Field(default=16, le=MAX_POST_EDIT_STEPS)
    low_threshold: float = Field(default=0.62, gt=0, le=1)
    """What exceeds the threshold in force counts as that."""
    credit_weight: float = Field(default=_CREDIT.weight, ge=0, le=MAX_CREDIT)
    credit_decay: float = Field(default=_CREDIT.decay, ge=0, le=1)
    credit_exponent: float = Field(default=_CREDIT.exponent, ge=0, le=MAX_CREDIT)
    entropy_bound: float = Field(default=0.1, ge=0, le=MAX_ENTROPY)
    eos_token_id: int = Field(ge=0)
    mask_token_id: int = Field(ge=0)
    prediction: Literal["same"] = "same"
    """One that was trained to predict from the place before (``shifted``) would be decoded to nonsense."""

    @classmethod
    def read(cls, folder: Path, config: ModelConfig, attends: Attends) -> "GenerationDefaults":
        """The folder's defaults.

        Raises:
            ModelError: The file cannot be used; names the key.
        """
        path = folder / "generation_config.json"
        usable = [decoder.name for decoder in DECODERS if decoder.attends == attends]
        data: dict[str, Any] = {
            "decoder": usable[0],
            "threshold": 0.95 if attends == "blocks" else 1.0,
            "eos_token_id": config.eos_token_id,
            "mask_token_id": config.mask_token_id,
        }
        try:
            if exists_inside(folder, path.name):
                data |= read_json_inside(folder, path.name)
            defaults = cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            raise ModelError(f"{path}: {first['loc'][0]}: {first['msg']} (got {first['input']!r})") from error
        if defaults.decoder not in usable:
            raise ModelError(
                f"{path}: decoder: got {defaults.decoder!r}, {config.architecture} can be decoded with "
                f"{listed(usable)}"
            )
        if (defaults.steps_per_block or 1) > defaults.block_length:
            raise ModelError(
                f"{path}: steps_per_block: got {defaults.steps_per_block}, must be at most the block_length "
                f"{defaults.block_length}"
            )
        for key in ("eos_token_id", "mask_token_id"):
            token_id = getattr(defaults, key)
            if token_id >= config.vocab_size:
                raise ModelError(
                    f"{path}: {key}: got {token_id}, the vocabulary has {config.vocab_size} tokens"
                )
        return defaults


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What requests are checked against; everything about the model but its weights."""

    name: str
    architecture: str
    attends: Attends
    vocab_size: int
    context_length: int
    """Most tokens of a prompt and its generation together."""
    rows: int
    """Requests that are decoded side by side."""
    defaults: GenerationDefaults
    tokenizer: Tokenizer

    @classmethod
    def describe(
        cls, folder: Path, config: ModelConfig, *, name: str | None, rows: int, context_length: int | None
    ) -> "ServedModel":
        """Read what a folder holds beside its weights.

        Args:
            folder: A model folder.
            config: Its configuration, read already.
            name: What requests call the model; the folder's name by default.
            rows: Requests that are decoded side by side.
            context_length: By default the model's own, at most 4096: it costs memory and time.

        Raises:
            ModelError: A file is missing or does not fit the model.
        """
        tokenizer = Tokenizer.load(folder)
        if tokenizer.vocab_size > config.vocab_size:
            raise ModelError(
                f"{folder}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, config.json a vocab_size "
                f"of {config.vocab_size}; use the tokenizer that the model was trained with"
            )
        attends = build(config, device="meta").attends
        return cls(
            name=name or folder.resolve().name,
            architecture=config.architecture,
            attends=attends,
            vocab_size=config.vocab_size,
            context_length=context_length or min(config.max_position_embeddings, LONGEST_DEFAULT_CONTEXT),
            rows=rows,
            defaults=GenerationDefaults.read(folder, config, attends),
            tokenizer=tokenizer,
        )

    @property
    def decoders(self) -> list[Decoder]:
        """Those that the model can be decoded with."""
        return [decoder for decoder in DECODERS if decoder.attends == self.attends]

    @property
    def default_decoder(self) -> Decoder:
        """Where a request names none."""
        return next(decoder for decoder in self.decoders if decoder.name == self.defaults.decoder)

    def block_length(self, decoder: Decoder, given: pb.DiffusionParams, *, max_new_tokens: int) -> int:
        """Positions in one block of a request."""
        if "block_length" not in decoder.parameters:
            return self.defaults.block_length
        if given.HasField("block_length"):
            return given.block_length
        return min(self.defaults.block_length, max_new_tokens)

    def params(self, decoder: Decoder, given: pb.DiffusionParams, *, max_new_tokens: int) -> DecodingParams:
        """Decoding parameters of one request: what it gives, and the defaults of what else its decoder has.

        Args:
            decoder: One of ``decoders``.
            given: Checked to hold parameters of ``decoder`` only, with values that it takes.
            max_new_tokens: The request's limit.
        """

        def value(name: str, default: Any, without: Any) -> Any:
            if name not in decoder.parameters:
                return without
            return getattr(given, name) if given.HasField(name) else default

        defaults = self.defaults
        block_length = self.block_length(decoder, given, max_new_tokens=max_new_tokens)
        steps = min(defaults.steps_per_block or block_length, block_length)
        threshold = value("threshold", defaults.threshold, QUOTA_ONLY)
        has_credit = "credit_weight" in decoder.parameters
        return DecodingParams(
            max_new_tokens=max_new_tokens,
            block_length=block_length,
            threshold=threshold,
            steps=value("steps_per_block", steps, None),
            edit_threshold=value("edit_threshold", defaults.edit_threshold, None),
            max_post_edit_steps=value("max_post_edit_steps", defaults.max_post_edit_steps, 0),
            low_threshold=value("low_threshold", min(defaults.low_threshold, threshold), None),
            credit=Credit(
                weight=value("credit_weight", defaults.credit_weight, None),
                decay=value("credit_decay", defaults.credit_decay, None),
                exponent=value("credit_exponent", defaults.credit_exponent, None),
            )
            if has_credit
            else None,
            entropy_bound=value("entropy_bound", defaults.entropy_bound, None),
            vicinity=_vicinity(given.vicinity) if given.HasField("vicinity") else None,
            eos_token_id=defaults.eos_token_id,
            mask_token_id=defaults.mask_token_id,
        )

    def batch(
        self,
        network: LanguageModel,
        *,
        cache_bytes: int | None = None,
        max_positions: int | None = None,
        eager: bool = False,
    ) -> Batch:
        """What decodes requests with the model's weights.

        Args:
            network: The weights.
            cache_bytes: Memory for keys and values of blocks; see :class:`RaggedBatch`.
            max_positions: Most positions in one forward.
            eager: Launch each operation of a forward, on a GPU too, in the place of replaying recorded ones;
                as has to be where other processes compute a part of it.

        Raises:
            UsageError: A limit is too small, or the model attends to the canvas, which has neither.
        """
        if self.attends == "canvas":
            if cache_bytes is not None or max_positions is not None:
                raise UsageError(
                    f"{self.architecture} is decoded one whole canvas at a time: it has no cache of blocks "
                    "and no limit of positions; leave both out"
                )
            return CanvasBatch(network, rows=self.rows, capacity=self.context_length)
        return RaggedBatch(
            network,
            rows=self.rows,
            capacity=self.context_length,
            block_length=self.defaults.block_length,
            cache_bytes=cache_bytes,
            max_positions=max_positions,
            revision=self.name,
            recorded=not eager and kernels.run_on(network.device),
        )


def _vicinity(given: pb.Vicinity) -> Vicinity:
    default = Vicinity()
    return Vicinity(
        before=given.before if given.HasField("before") else default.before,
        after=given.after if given.HasField("after") else default.after,
    )
