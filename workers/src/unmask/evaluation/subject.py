"""A model folder made ready to be asked: network, tokenizer, and how it decodes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from unmask.diffusion.decoding import DecodingParams
from unmask.diffusion.full_sequence import generate_full_sequence
from unmask.diffusion.generation import Generation, generate
from unmask.errors import UsageError
from unmask.models.base import LanguageModel
from unmask.models.loading import load
from unmask.models.tokenizer import Tokenizer
from unmask.serving.model import ServedModel
from unmask.training.greedy import generate_greedily
from unmask.v1 import generation_pb2 as pb

__all__ = ["Subject"]

_ROWS = 32
"""Answers generated side by side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is evaluated."""

    name: str
    model: LanguageModel
    tokenizer: Tokenizer
    defaults: DecodingParams
    """How the folder says that the model is decoded; ``max_new_tokens`` is replaced."""

    @classmethod
    def load(cls, folder: Path, *, device: str = "cpu", dtype: torch.dtype | None = None) -> Self:
        """Load the model in ``folder``.

        Raises:
            ModelError: The folder holds no model that is known, or is damaged.
        """
        model = load(folder, device=device, dtype=dtype)
        config = model.config
        if model.causal:
            tokenizer = Tokenizer.load(folder)
            defaults = DecodingParams(max_new_tokens=1, block_length=1, eos_token_id=config.eos_token_id)
        else:
            served = ServedModel.describe(folder, config, name=None, rows=1, context_length=None)
            tokenizer = served.tokenizer
            defaults = served.params(served.default_decoder, pb.DiffusionParams(), max_new_tokens=2**20)
        return cls(name=folder.resolve().name, model=model, tokenizer=tokenizer, defaults=defaults)

    @property
    def context(self) -> int:
        """Most tokens of a document."""
        return self.model.config.max_position_embeddings

    def params(
        self,
        *,
        max_new_tokens: int,
        threshold: float | None = None,
        steps: int | None = None,
        block_length: int | None = None,
    ) -> DecodingParams:
        """The model's own parameters, with what is given in their place.

        Raises:
            UsageError: They make no sense together.
        """
        given = {"threshold": threshold, "steps": steps, "block_length": block_length}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        length = int(changes.get("block_length", self.defaults.block_length))
        if self.model.attends == "canvas":
            length = min(length, max_new_tokens)
        own_steps = min(self.defaults.steps, length) if self.defaults.steps else None
        changes = {"steps": own_steps} | changes | {"block_length": length}
        try:
            return replace(self.defaults, max_new_tokens=max_new_tokens, **changes)
        except ValueError as error:
            raise UsageError(f"decoding: {error}") from None

    def answer(self, prompts: Sequence[Sequence[int]], params: DecodingParams) -> list[Generation]:
        """Continue each prompt as it would be served; an autoregressive model token by token.

        Raises:
            UsageError: A prompt is empty, or is too long to be answered.
        """
        for prompt in prompts:
            if not prompt or len(prompt) + params.max_new_tokens > self.context:
                raise UsageError(
                    f"prompt: got {len(prompt)} tokens, and {params.max_new_tokens} new ones are asked for; "
                    f"{self.name} takes 1 to {self.context} tokens in all; ask for fewer"
                )
        if self.model.attends == "canvas" and not self.model.causal:
            return [generate_full_sequence(self.model, prompt, params) for prompt in prompts]
        # Prompts of a like length side by side: a short one would pay for the cache of a long one.
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        answers: dict[int, Generation] = {}
        for first in range(0, len(order), _ROWS):
            places = order[first : first + _ROWS]
            part = [prompts[place] for place in places]
            if self.model.causal:
                found = generate_greedily(
                    self.model,
                    part,
                    max_new_tokens=params.max_new_tokens,
                    eos_token_id=params.eos_token_id,
                )
            else:
                found = generate(self.model, part, params, rows=len(part))
            answers |= dict(zip(places, found, strict=True))
        return [answers[place] for place in range(len(prompts))]

    def text_of(self, answer: Generation) -> str:
        """What an answer says, its end of text left out."""
        return self.tokenizer.decode(answer.token_ids[: answer.kept_tokens])
