"""The model as lm-evaluation-harness asks for one (github.com/EleutherAI/lm-evaluation-harness).

Likelihoods are bounds by Monte Carlo with a fixed seed, so a run repeated gives the same figures; a
choice between continuations is one between their bounds. The masks are drawn by number, which has a
smaller error than training's noise on continuations of a few tokens. A continuation ends its sequence:
its last block is cut there, and nothing is said of what would follow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unmask.diffusion.generation import Generation
from unmask.diffusion.rows import PackedRows
from unmask.errors import UsageError
from unmask.evaluation.likelihood import exact_nll, nll_draws
from unmask.evaluation.subject import Subject

try:
    from lm_eval.api.model import LM
except ImportError:
    raise UsageError(
        "--harness needs the package lm-eval: install unmask[eval], or run make setup-eval"
    ) from None

__all__ = ["HarnessModel", "HarnessOptions", "run_harness"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessOptions:
    """How the harness's requests are met."""

    draws: int = 32
    """Sets of masks for each likelihood."""
    seed: int = 0
    max_new_tokens: int = 256
    """Where a task does not say."""
    threshold: float | None = None
    block_length: int | None = None


class HarnessModel(LM):  # type: ignore[misc]  # the harness is optional, and typed in part
    """What ``lm_eval`` evaluates."""

    def __init__(self, subject: Subject, options: HarnessOptions) -> None:
        """Ask ``subject``."""
        super().__init__()
        self._subject, self._options = subject, options
        self._eos = subject.model.config.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        """What names prompts in the harness's cache."""
        return self._subject.name

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template is the tokenizer's own; none has a name."""
        if chat_template and not self._subject.tokenizer.has_chat_template:
            raise UsageError(f"{self._subject.name} has no chat template")
        return self._subject.name if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the model reads it."""
        return self._subject.tokenizer.render_chat(chat_history, add_generation_prompt=add_generation_prompt)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Minus the bound of each continuation, and whether the model itself would write it."""
        pairs = [self._pair(*request.args) for request in requests]
        bounds = self._bounds([(context + continuation, len(context)) for context, continuation in pairs])
        written = self._answers([(context, len(continuation)) for context, continuation in pairs])
        return [
            (-bound, answer.token_ids == continuation)
            for bound, answer, (_, continuation) in zip(bounds, written, pairs, strict=True)
        ]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Minus the bound of each text; one longer than the context is cut into pieces, each on its own."""
        found = []
        for request in requests:
            ids = self._subject.tokenizer.encode(request.args[0]) or [self._eos]
            if self._subject.model.causal:
                ids = [self._eos, *ids]  # what an autoregressive model predicts the first token from
            pieces = [
                ids[first : first + self._subject.context]
                for first in range(0, len(ids), self._subject.context)
            ]
            found.append(-sum(self._bounds([(piece, 0) for piece in pieces])))
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes, up to the first of the strings that end it."""
        asked = []
        for request in requests:
            context, settings = request.args
            most = int(settings.get("max_gen_toks", self._options.max_new_tokens))
            ids = self._subject.tokenizer.encode(context) or [self._eos]
            asked.append((ids[-max(1, self._subject.context - most) :], most))  # as the harness's models do
        texts = []
        for request, answer in zip(requests, self._answers(asked), strict=True):
            ends = request.args[1].get("until") or []
            texts.append(cut(self._subject.text_of(answer), [ends] if isinstance(ends, str) else ends))
        return texts

    def _answers(self, asked: Sequence[tuple[list[int], int]]) -> list[Generation]:
        """What the model writes behind each prompt, up to so many tokens; those of one limit side by side."""
        found: dict[int, Generation] = {}
        for most in sorted({most for _, most in asked}):
            places = [place for place, (_, limit) in enumerate(asked) if limit == most]
            params = self._subject.params(
                max_new_tokens=most,
                threshold=self._options.threshold,
                block_length=self._options.block_length,
            )
            answers = self._subject.answer([asked[place][0] for place in places], params)
            found |= dict(zip(places, answers, strict=True))
        return [found[place] for place in range(len(asked))]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids; a space between the two belongs to the continuation, as words are tokenised with it."""
        if context.endswith(" "):
            stripped = context.rstrip(" ")
            context, continuation = stripped, context[len(stripped) :] + continuation
        encode = self._subject.tokenizer.encode
        before, whole = encode(context), encode(context + continuation)
        after = whole[len(before) :]
        if whole[: len(before)] != before or not after:  # the two melt into one token
            after = encode(continuation)
        before = before or [self._eos]
        room = self._subject.context - len(after)
        if room < 1:
            raise UsageError(
                f"a continuation of {len(after)} tokens, and the context of {self._subject.name} has "
                f"{self._subject.context}; drop the task"
            )
        return before[-room:], after

    def _bounds(self, documents: Sequence[tuple[list[int], int]]) -> list[float]:
        """The bound of each document's tokens behind its prompt, in nats."""
        found = []
        for ids, prompt in documents:
            rows = _row(ids, prompt)
            if self._subject.model.causal:
                nll, _ = exact_nll(self._subject.model, rows)
                found.append(float(nll[0]))
                continue
            canvas = self._subject.model.attends == "canvas"
            draws = nll_draws(
                self._subject.model,
                rows,
                bound="full" if canvas else "block",
                block_length=self._options.block_length or self._subject.defaults.block_length,
                draws=self._options.draws,
                seed=self._options.seed,
                masks="counted",
            )
            found.append(float(draws[:, 0].mean()))
        return found


def run_harness(
    subject: Subject,
    tasks: Sequence[str],
    options: HarnessOptions,
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    chat: bool = False,
) -> dict[str, Any]:
    """Evaluate ``tasks``, and return the harness's results, versions and settings by task.

    Args:
        subject: What is evaluated.
        tasks: Names that the harness knows, or that a file below ``include_path`` gives.
        options: How requests are met.
        include_path: A folder with tasks of one's own.
        limit: Most documents of each task.
        fewshot: Examples in each prompt; left out, what the task says.
        chat: Whether prompts are turns of a conversation.

    Raises:
        UsageError: A task is not known.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder = str(include_path) if include_path else None
    # The harness's own tasks are thousands of files; they are read where a name is not one's own.
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folder)
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        raise UsageError(
            f"--harness: got {unknown[0]}, which lm-eval does not know; give --include-path for your own"
        )
    found = simple_evaluate(
        model=HarnessModel(subject, options),
        tasks=list(tasks),
        num_fewshot=fewshot,
        limit=limit,
        task_manager=manager,
        apply_chat_template=chat,
        bootstrap_iters=0,
        log_samples=False,
        random_seed=options.seed,
        numpy_random_seed=options.seed,
        torch_random_seed=options.seed,
        fewshot_random_seed=options.seed,
    )
    return {name: found[name] for name in ("results", "versions", "n-shot", "n-samples")}


def cut(text: str, ends: Sequence[str]) -> str:
    """``text`` up to the first of ``ends`` in it."""
    places = [place for end in ends if end and (place := text.find(end)) >= 0]
    return text[: min(places, default=len(text))]


def _row(ids: Sequence[int], prompt: int) -> PackedRows:
    """One document alone."""
    shape = (1, len(ids))
    position = np.arange(len(ids)).reshape(shape)
    return PackedRows(
        ids=np.array(ids, np.int64).reshape(shape),
        document=np.zeros(shape, np.int64),
        position=position,
        supervised=position >= prompt,
        ordinal=np.zeros(shape, np.int64),
    )
