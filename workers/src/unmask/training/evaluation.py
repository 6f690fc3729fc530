"""Measurements during training: loss on validation data, and answers to validation prompts.

The loss is the stage's own, under noise that is the same at every measurement. Answers
are generated as they would be served, block by block at the stage's block size (an mdlm
stage fills the whole answer as one block; an autoregressive model goes token by token),
and compared token by token: an exact match with any accepted answer, and the edit
distance to the nearest one.

Processes share the work by rows and prompts; sums are added up over all.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from unmask.diffusion.decoding import DecodingParams
from unmask.diffusion.full_sequence import generate_full_sequence
from unmask.diffusion.generation import Generation, generate
from unmask.models.base import LanguageModel
from unmask.training.corpus import Corpus, Library, Overlong
from unmask.training.distributed import World
from unmask.training.encoding import Question
from unmask.training.greedy import generate_greedily
from unmask.training.packing import Layout, lay_out, make_rows
from unmask.training.plan import StagePlan
from unmask.training.steps import (
    Preference,
    micro_batches,
    model_inputs,
    objective_sum,
    preference_measures,
    preference_sums,
)
from unmask.training.stream import Purpose, philox_key
from unmask_api.train_job import Evaluation as EvaluationSpec

__all__ = ["Evaluator", "answer_measures", "answer_sums", "edit_distance"]

_ROWS = 32
"""Answers generated side by side."""


class Evaluator:
    """The measurements of one stage."""

    def __init__(
        self,
        spec: EvaluationSpec,
        stage: StagePlan,
        library: Library,
        world: World,
        *,
        seed: int,
        overlong: Overlong,
        micro_batch_rows: int,
    ) -> None:
        """Read the stage's validation data, which must be there."""
        # Whatever a stage learns from, it is measured on documents that see themselves alone.
        self._spec, self._stage, self._world = spec, replace(stage, document_mask=True), world
        self.every_steps = spec.every_steps
        self._corpus = library.corpus(
            stage.validation,
            length=stage.length,
            overlong=overlong,
            turns=stage.turns,
            multiples=stage.multiples,
        )
        samples = spec.generation.samples if spec.generation else 0
        self._questions = library.questions(stage.validation, count=samples)
        self._noise_key = philox_key(seed, Purpose.EVALUATION)
        self._micro_batch_rows = micro_batch_rows

    def measure(
        self,
        model: LanguageModel,
        *,
        stage_step: int,
        unequal: Callable[[], AbstractContextManager[None]] = nullcontext,
        losses_unequal: Callable[[], AbstractContextManager[None]] | None = None,
        preference: Preference | None = None,
    ) -> dict[str, float]:
        """All measurements of ``model`` at a step of the stage; all processes get the same.

        Args:
            model: The model.
            stage_step: Steps of the stage before the one that was taken last.
            unequal: Makes the blocks in which processes run different numbers of forward passes.
            losses_unequal: The same where the reference of ``preference`` runs as often as the model.
                Left out, ``unequal``.
            preference: What the model is compared with, in a preference stage: the margin is measured too.
        """
        model.eval()
        try:
            measured = self._losses(model, stage_step, losses_unequal or unequal, preference)
            if self._questions:
                measured |= self._answers(model, self._stage.block_length(stage_step), unequal)
        finally:
            model.train()
        return measured

    @torch.no_grad()
    def _losses(
        self,
        model: LanguageModel,
        stage_step: int,
        unequal: Callable[[], AbstractContextManager[None]],
        preference: Preference | None,
    ) -> dict[str, float]:
        totals = torch.zeros(2, dtype=torch.float64, device=self._world.device)
        sums = torch.zeros(3, dtype=torch.float64, device=self._world.device)
        layout = _first_rows(
            self._corpus,
            self._stage,
            self._stage.multiple(stage_step),
            rows=self._spec.batches * self._stage.rows,
        )
        rows = make_rows(
            layout,
            self._corpus,
            rank=self._world.rank,
            world=self._world.size,
            responses_only=self._stage.responses_only,
            eos_token_id=model.config.eos_token_id,
            pad_token_id=model.config.pad_token_id,
        )
        with unequal():
            for batch in micro_batches(rows, self._micro_batch_rows):
                inputs = model_inputs(
                    batch,
                    self._stage,
                    model,
                    block_length=self._stage.block_length(stage_step),
                    noise_key=self._noise_key,
                )
                if preference is None:
                    totals[0] += objective_sum(model, inputs.to(self._world.device))
                else:
                    sums += preference_sums(model, inputs.to(self._world.device), preference)
                totals[1] += inputs.normaliser
        self._world.sum(totals)
        if preference is not None:
            self._world.sum(sums)
            loss = {"loss": float(sums[0] / totals[1].clamp(min=1))}
            return loss | preference_measures(sums, float(totals[1]))
        return {"loss": float(totals[0] / totals[1].clamp(min=1))}

    def _answers(
        self, model: LanguageModel, block_length: int, unequal: Callable[[], AbstractContextManager[None]]
    ) -> dict[str, float]:
        mine = self._questions[self._world.rank :: self._world.size]
        with unequal():
            generations = self._generate(model, mine, block_length) if mine else []
        totals = answer_sums(mine, generations).to(self._world.device)
        self._world.sum(totals)
        return answer_measures(totals, causal=model.causal)

    def _generate(
        self, model: LanguageModel, questions: Sequence[Question], block_length: int
    ) -> list[Generation]:
        spec = self._spec.generation
        assert spec is not None, "there are no questions without it"
        prompts = [asked.prompt for asked in questions]
        eos = model.config.eos_token_id
        if model.causal:
            parts = [prompts[first : first + _ROWS] for first in range(0, len(prompts), _ROWS)]
            return [
                one
                for part in parts
                for one in generate_greedily(
                    model, part, max_new_tokens=spec.max_new_tokens, eos_token_id=eos
                )
            ]
        if self._stage.blocks is None:  # one block for prompt and answer
            block_length = max(len(prompt) for prompt in prompts) + spec.max_new_tokens
        params = DecodingParams(
            max_new_tokens=spec.max_new_tokens,
            block_length=block_length,
            threshold=float(spec.threshold),
            eos_token_id=eos,
            mask_token_id=model.mask_token_id,
        )
        if model.attends == "canvas":
            return [generate_full_sequence(model, prompt, params) for prompt in prompts]
        return generate(model, prompts, params, rows=_ROWS)


def _first_rows(corpus: Corpus, stage: StagePlan, multiple: int, *, rows: int) -> Layout:
    """At most ``rows`` rows of the validation data, in the order of the files."""
    document = corpus.once_through
    return lay_out(
        document,
        corpus.widths(multiple)[document],
        first_ordinal=0,
        rows=rows,
        length=stage.length,
        multiple=multiple,
    )


def answer_sums(questions: Sequence[Question], answers: Sequence[Generation]) -> Tensor:
    """What :func:`answer_measures` is made of; float64 (8,), which adds up over shares of the questions."""
    rows = [_figures(asked, answer) for asked, answer in zip(questions, answers, strict=True)]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 8).sum(0)


def answer_measures(sums: Tensor, *, causal: bool) -> dict[str, float]:
    """How good answers were, and, unless the model is autoregressive, how many tokens a forward gave."""
    count, exact, edits, length, kept, prefill, denoise, persist = sums.tolist()
    measured = {
        "samples": int(count),
        "exact_match": exact / count,
        "token_error_rate": edits / max(1, length),
    }
    if not causal:
        measured |= {
            "tpf": kept / max(1, prefill + denoise + persist),
            "tpf_decode": kept / max(1, denoise + persist),
            "tpf_denoise": kept / max(1, denoise),
        }
    return measured


def _figures(asked: Question, answer: Generation) -> list[float]:
    """What one answer adds to the sums."""
    kept = answer.token_ids[: answer.kept_tokens]
    edits, length = min((edit_distance(kept, right), len(right)) for right in asked.answers)
    usage = answer.usage
    return [1, edits == 0, edits, length, len(kept), usage.prefill, usage.denoise, usage.persist]


def edit_distance(first: Sequence[int], second: Sequence[int]) -> int:
    """Fewest insertions, deletions and replacements that turn one sequence into the other (Levenshtein)."""
    above = list(range(len(second) + 1))
    for row, one in enumerate(first, start=1):
        current = [row]
        for column, other in enumerate(second):
            change = above[column] + (one != other)
            current.append(min(change, above[column + 1] + 1, current[column] + 1))
        above = current
    return above[-1]
