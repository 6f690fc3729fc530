"""The model as lm-evaluation-harness sees it, and a whole evaluation on local files."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from support.folders import add_tokenizer, served_folder
from support.models import packed_row, tiny_canvas_model, tiny_model
from support.training import write_lines
from unmask.cli.eval import tables
from unmask.errors import UsageError
from unmask.evaluation.harness import HarnessModel, HarnessOptions, cut
from unmask.evaluation.likelihood import exact_nll, nll_draws
from unmask.evaluation.subject import Subject
from unmask.models.loading import save

OPTIONS = HarnessOptions(draws=4, seed=2, max_new_tokens=6)


class Request:
    """What the harness hands over, as far as a model looks at it."""

    def __init__(self, *args):
        self.args = args


def saved(folder, model):
    save(model, folder)
    add_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return served_folder(tmp_path_factory.mktemp("model") / "golden", block_length=4)


@pytest.fixture(scope="module")
def subjects(tmp_path_factory, folder):
    root = tmp_path_factory.mktemp("models")
    causal = tiny_model(architectures=["BailingMoeV2ForCausalLM"])
    return {
        "blocks": Subject.load(folder),
        "short blocks": Subject.load(saved(root / "short", tiny_model())),
        "canvas": Subject.load(saved(root / "canvas", tiny_canvas_model())),
        "causal": Subject.load(saved(root / "causal", causal)),
    }


KINDS = ["blocks", "canvas", "causal"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_likelihood_is_minus_the_bound_of_the_continuation(subjects, kind):
    subject = subjects[kind]
    model = HarnessModel(subject, OPTIONS)
    requests = [Request("w5 w6", " w7 w8 w9"), Request("w5 w6 ", "w7 w8 w9"), Request("", "w9 w10")]
    found = model.loglikelihood(requests)
    assert found[0] == found[1], "a space between the two belongs to either"
    assert found == model.loglikelihood(requests), "a run repeated gives the same figures"
    eos = subject.model.config.eos_token_id
    for (value, _), (ids, prompt) in zip(found[1:], [([5, 6, 7, 8, 9], 2), ([eos, 9, 10], 1)], strict=True):
        rows = packed_row(ids, length=len(ids), prompt=[prompt])
        if kind == "causal":
            expected = exact_nll(subject.model, rows)[0][0]
        else:
            expected = nll_draws(
                subject.model,
                rows,
                bound="full" if kind == "canvas" else "block",
                block_length=4,
                draws=4,
                seed=2,
                masks="counted",
            ).mean()
        assert value == pytest.approx(-expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_continuation_is_greedy_if_the_model_writes_it(subjects, kind):
    subject = subjects[kind]
    model = HarnessModel(subject, OPTIONS)
    (answer,) = subject.answer([[5, 6, 7]], subject.params(max_new_tokens=3))
    written = " ".join(f"w{token}" for token in answer.token_ids)
    assert len(answer.token_ids) == 3
    found = model.loglikelihood([Request("w5 w6 w7", " " + written), Request("w5 w6 w7", " w1 w2 w3")])
    assert [greedy for _, greedy in found] == [True, False]


@pytest.mark.parametrize("kind", ["short blocks", "canvas", "causal"])
def test_a_long_text_is_cut_into_pieces(subjects, kind):
    subject = subjects[kind]
    model = HarnessModel(subject, OPTIONS)
    ids = np.random.default_rng(0).integers(5, 60, subject.context + 7).tolist()
    text = " ".join(f"w{token}" for token in ids)
    (whole,) = model.loglikelihood_rolling([Request(text)])
    extended = [subject.model.config.eos_token_id, *ids] if kind == "causal" else ids
    first, rest = extended[: subject.context], extended[subject.context :]
    expected = sum(model._bounds([(piece, 0)])[0] for piece in (first, rest))
    assert whole == pytest.approx(-expected)


@pytest.mark.parametrize("kind", KINDS)
def test_writing_stops_at_the_first_of_the_strings(subjects, kind):
    subject = subjects[kind]
    model = HarnessModel(subject, OPTIONS)
    (answer,) = subject.answer([[5, 6, 7]], subject.params(max_new_tokens=6))
    text = subject.text_of(answer)
    second = text.split()[1]
    settings = [{"until": []}, {"until": [second]}, {"until": second, "max_gen_toks": 6}]
    found = model.generate_until([Request("w5 w6 w7", chosen) for chosen in settings])
    assert found == [text, text[: text.index(second)], text[: text.index(second)]]
    short = Request("w5 w6 w7", {"until": [], "max_gen_toks": 1})
    other = Request("w9", {"until": []})
    together = model.generate_until([short, other, Request("w5 w6 w7", settings[0])])
    assert together == [*model.generate_until([short]), *model.generate_until([other]), text]
    assert len(together[0].split()) <= 1


def test_text_is_cut_at_the_earliest_end():
    assert cut("one two three", ["three", "two", ""]) == "one "
    assert cut("one two", ["four"]) == "one two"
    assert cut("one", []) == "one"


def test_a_chat_template_is_the_tokenizers(subjects):
    model = HarnessModel(subjects["blocks"], OPTIONS)
    assert model.apply_chat_template([{"role": "user", "content": "w7"}]) == "user w7 assistant"
    assert model.chat_template() == "" and model.chat_template(True) == model.tokenizer_name
    with pytest.raises(UsageError, match="drop the task"):
        model.loglikelihood([Request("w5", " w6" * 5000)])


def evaluate(folder, tmp_path, *args):
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "unmask.cli.main", "eval", str(folder), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=110)


def write_tasks(folder, subject):
    """Two tasks on local files: one asks for text, and half of it is the model's own; one for a choice."""
    prompts = [f"w{number} w9 w20" for number in range(5, 11)]
    said = [
        subject.text_of(answer)
        for answer in subject.answer(
            [subject.tokenizer.encode(prompt) for prompt in prompts], subject.params(max_new_tokens=5)
        )
    ]
    write_lines(
        folder / "texts.jsonl",
        [
            {"prompt": prompt, "completion": text if number % 2 else "w1"}
            for number, (prompt, text) in enumerate(zip(prompts, said, strict=True))
        ],
    )
    write_lines(
        folder / "choices.jsonl",
        [{"prompt": prompt, "choices": ["w7", "w8", "w9"], "right": 1} for prompt in prompts],
    )
    shared = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{prompt}}"}
    exact = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    tasks = {
        "own_texts": shared
        | {
            "dataset_kwargs": {"data_files": {"test": str(folder / "texts.jsonl")}},
            "output_type": "generate_until",
            "doc_to_target": "{{completion}}",
            "generation_kwargs": {"until": ["w0 w0 w0"], "max_gen_toks": 5},
            "metric_list": [exact],
        },
        "own_choices": shared
        | {
            "dataset_kwargs": {"data_files": {"test": str(folder / "choices.jsonl")}},
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "right",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
    }
    for name, content in tasks.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name} | content))
    return prompts


@pytest.mark.slow
def test_an_evaluation_on_local_files(tmp_path, folder, subjects):
    subject = subjects["blocks"]
    (tmp_path / "tasks").mkdir()
    prompts = write_tasks(tmp_path / "tasks", subject)
    options = ["--include-path", tmp_path / "tasks", "--draws", 4, "--json", "--max-tokens", 5, "--seed", 2]
    done = evaluate(folder, tmp_path, "--harness", "own_texts,own_choices", *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["harness"]["results"]
    assert found["own_texts"]["exact_match,none"] == 0.5
    model = HarnessModel(subject, OPTIONS)
    right = 0
    for prompt in prompts:
        bounds = [model.loglikelihood([Request(prompt, f" {choice}")])[0][0] for choice in ("w7", "w8", "w9")]
        right += bounds.index(max(bounds)) == 1
    assert found["own_choices"]["acc,none"] == pytest.approx(right / len(prompts))
    assert 0 < right < len(prompts), "a choice that always comes out alike would show nothing"


def test_results_become_a_table():
    measured = {"name": "t", "alias": "t", "exact_match,none": 0.5, "exact_match_stderr,none": "N/A"}
    lines = ["\n".join(table) for table in tables({"harness": {"results": {"t": measured}}})]
    assert [line.split() for line in lines[0].splitlines()] == [
        ["task", "metric", "value"],
        ["t", "exact_match,none", "0.5000"],
        ["t", "exact_match_stderr,none", "N/A"],
    ]


@pytest.mark.slow
def test_a_task_that_the_harness_does_not_know_is_one_line(tmp_path, folder):
    done = evaluate(folder, tmp_path, "--harness", "no_such_task")
    assert done.returncode == 64 and done.stdout == ""
    assert "error: --harness: got no_such_task, which lm-eval does not know" in done.stderr
