"""A model folder made ready to serve: its configuration, tokenizer and decoding defaults.

``generation_config.json`` holds what the model was trained to be decoded with. Whatever it leaves out comes
from ``config.json``, or is what LLaDA2.0 is evaluated with: blocks of 32 and a threshold of 0.95
(arXiv 2512.15745, section 5.4).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from unmask.diffusion.decoding import DecodingParams
from unmask.errors import ModelError
from unmask.models.config import ModelConfig
from unmask.models.tokenizer import Tokenizer

__all__ = ["GenerationDefaults", "ServedModel"]

LONGEST_DEFAULT_CONTEXT = 4096
DEFAULT_MAX_TOKENS = 256


class GenerationDefaults(BaseModel):
    """The keys of ``generation_config.json`` that we use; others are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    block_length: PositiveInt = 32
    threshold: float = Field(default=0.95, gt=0, le=1)
    eos_token_id: int = Field(ge=0)
    mask_token_id: int = Field(ge=0)

    @classmethod
    def read(cls, folder: Path, config: ModelConfig) -> "GenerationDefaults":
        """The folder's defaults.

        Raises:
            ModelError: The file cannot be used; names the key.
        """
        path = folder / "generation_config.json"
        data: dict[str, Any] = {"eos_token_id": config.eos_token_id, "mask_token_id": config.mask_token_id}
        try:
            if path.is_file():
                data |= json.loads(path.read_text(encoding="utf-8"))
            defaults = cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            raise ModelError(f"{path}: {first['loc'][0]}: {first['msg']} (got {first['input']!r})") from error
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(f"{path}: not a JSON object: {error}") from error
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
    vocab_size: int
    context_length: int
    """Most tokens of a prompt and its generation together."""
    rows: int
    """Requests that share a forward."""
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
            rows: Requests that share a forward.
            context_length: By default the model's own, at most 4096: the cache is allocated up front.

        Raises:
            ModelError: A file is missing or does not fit the model.
        """
        tokenizer = Tokenizer.load(folder)
        if tokenizer.vocab_size > config.vocab_size:
            raise ModelError(
                f"{folder}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, config.json a vocab_size "
                f"of {config.vocab_size}; use the tokenizer that the model was trained with"
            )
        return cls(
            name=name or folder.resolve().name,
            architecture=config.architectures[0],
            vocab_size=config.vocab_size,
            context_length=context_length or min(config.max_position_embeddings, LONGEST_DEFAULT_CONTEXT),
            rows=rows,
            defaults=GenerationDefaults.read(folder, config),
            tokenizer=tokenizer,
        )

    def params(self, *, max_new_tokens: int, threshold: float, steps: int) -> DecodingParams:
        """Decoding parameters of one request."""
        return DecodingParams(
            max_new_tokens=max_new_tokens,
            block_length=self.defaults.block_length,
            threshold=threshold,
            steps=steps,
            eos_token_id=self.defaults.eos_token_id,
            mask_token_id=self.defaults.mask_token_id,
        )
