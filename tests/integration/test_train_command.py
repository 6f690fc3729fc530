"""``unmask train``: from the job file to the model, and one line and an exit code for whatever is wrong."""

import json
import shutil
import signal

import pytest

from support.ranks import join, start_commands
from support.training import metrics, start_training, training_job, write_data, write_job, write_lines
from unmask.models.loading import load
from unmask.models.tokenizer import Tokenizer


def command(folder, job, *, ranks=1):
    """Run the command on ``job`` in each rank: exit codes, and what the ranks wrote to stderr."""
    arguments = ["train", "--job", str(write_job(job, folder / "job.json"))]
    codes = join(start_commands(arguments, folder / "output", ranks=ranks))
    texts = [(folder / "output" / f"rank-{rank}.err").read_text() for rank in range(ranks)]
    return codes, texts


def breaking_file(path, content):
    def change(folder):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(content)

    return change


def empty(path):
    return breaking_file(path, b"")


def removing(path):
    def change(folder):
        target = folder / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    return change


def overlong(folder):
    write_lines(folder / "train.jsonl", [{"prompt": "w9", "completion": "w9 " * 40}])


TEXT = {"spec.data.train[0].format": "text"}
WRONG = [
    ("a missing data file", removing("train.jsonl"), {}, 65, "train.jsonl: no such file"),
    ("a missing validation file", removing("held-out.jsonl"), {}, 65, "held-out.jsonl: no such file"),
    ("an empty data file", empty("train.jsonl"), {}, 65, "train.jsonl: holds no documents"),
    (
        "invalid JSON",
        breaking_file("train.jsonl", b'{"prompt": "w9", "completion": "w9"}\n{"prompt": "w9", \n'),
        {},
        65,
        "train.jsonl:2: not valid JSON",
    ),
    ("a wrong type", breaking_file("train.jsonl", b'{"prompt": 3}\n'), {}, 65, 'train.jsonl:1: "prompt"'),
    ("bytes that are no text", breaking_file("train.jsonl", b"\xff\xfe"), {}, 65, "train.jsonl:1: not UTF-8"),
    ("a document longer than a row", overlong, {}, 65, "train.jsonl:1: 42 tokens, but rows hold 32"),
    ("a missing tokenizer", removing("tokenizer"), {}, 66, "tokenizer.json: no such file"),
    ("a tokenizer that is none", empty("tokenizer/tokenizer.json"), {}, 66, "not a tokenizer file"),
    (
        "a vocabulary too small",
        None,
        {
            "spec.model.init.config.vocab_size": 40,
            "spec.model.init.config.mask_token_id": 39,
            "spec.model.init.config.eos_token_id": 38,
            "spec.model.init.config.pad_token_id": 38,
        },
        66,
        "the tokenizer has ids up to 63, the model a vocab_size of 40",
    ),
    (
        "an unknown architecture",
        None,
        {"spec.model.init.config.architectures": ["Nope"]},
        66,
        "spec.model.init.config: architectures",
    ),
    ("a missing checkpoint", None, {"spec.model.init": {"uri": "/nowhere/model"}}, 66, "/nowhere/model"),
    (
        "an objective that the model has not",
        None,
        {"spec.stages[1].convertTo": None},
        64,
        "spec.stages[1].objective: got bdlm",
    ),
    (
        "a run folder that cannot be made",
        breaking_file("file", b""),
        {"spec.checkpoint.uri": "file/run"},
        64,
        "spec.checkpoint.uri: cannot write to",
    ),
]


@pytest.mark.parametrize(
    ("change", "values", "code", "words"), [entry[1:] for entry in WRONG], ids=[entry[0] for entry in WRONG]
)
def test_what_a_person_can_mend_ends_in_one_line_and_its_exit_code(tmp_path, change, values, code, words):
    if values.get("spec.checkpoint.uri"):
        values = {"spec.checkpoint.uri": str(tmp_path / values["spec.checkpoint.uri"])}
    job = training_job(tmp_path, values)
    if change is not None:
        change(tmp_path)
    codes, (text,) = command(tmp_path, job)
    assert codes == [code], text
    assert text.startswith("error: ") and text.count("\n") == 1
    assert words in text
    report = tmp_path / "run" / "termination.json"
    if report.exists():
        assert json.loads(report.read_text())["exit_code"] == code
        assert json.loads(report.read_text())["message"] == text.removeprefix("error: ").strip()
    else:
        assert "cannot write to" in words


def test_one_of_many_ranks_says_what_is_wrong_and_all_end_with_its_code(tmp_path):
    write_data(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    codes, texts = command(tmp_path, training_job(tmp_path), ranks=2)
    assert codes == [65, 65]
    assert texts[0].count("\n") == 1 and "no such file" in texts[0]
    assert texts[1] == ""


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read"), (b"{", "Invalid JSON"), (b'{"kind": "Pod"}', "apiVersion: Field required")],
)
def test_a_job_file_that_cannot_be_used_is_a_usage_error(tmp_path, content, words):
    path = tmp_path / "job.json"
    if content is not None:
        path.write_bytes(content)
    codes = join(start_commands(["train", "--job", str(path)], tmp_path / "output", ranks=1))
    text = (tmp_path / "output" / "rank-0.err").read_text()
    assert codes == [64]
    assert text.startswith("error: ") and words in text and text.count("\n") == 1


def test_a_checkpoint_of_another_job_is_refused_with_the_field_that_differs(tmp_path):
    assert command(tmp_path, training_job(tmp_path))[0] == [0]
    for values, words in [
        ({"spec.stages[0].steps": 7}, "spec.stages[0].steps: the job has 7"),
        ({"spec.model.init.config.hidden_size": 64}, "spec.model.hidden_size: the job has 64"),
        ({"spec.data.seed": 8}, "spec.data.seed: the job has 8"),
        ({"spec.checkpoint.resume": "Never"}, "spec.checkpoint.resume: Never"),
    ]:
        shutil.rmtree(tmp_path / "output")
        codes, (text,) = command(tmp_path, training_job(tmp_path, values))
        assert codes == [64]
        assert words in text
    shutil.rmtree(tmp_path / "output")
    write_lines(tmp_path / "train.jsonl", [{"prompt": "w9", "completion": "w10"}])
    codes, (text,) = command(tmp_path, training_job(tmp_path))
    assert (codes, "spec.stages[0].train[0].sha256" in text) == ([64], True)


def test_where_files_lie_and_how_often_it_is_saved_does_not_make_another_job(tmp_path):
    assert command(tmp_path, training_job(tmp_path))[0] == [0]
    shutil.copyfile(tmp_path / "train.jsonl", tmp_path / "moved.jsonl")
    values = {
        "spec.data.train[0].uri": str(tmp_path / "moved.jsonl"),
        "spec.checkpoint.everySteps": 7,
        "spec.parallelism.microBatchRows": 1,
    }
    assert command(tmp_path, training_job(tmp_path, values))[0] == [0]


@pytest.mark.slow
def test_two_processes_under_torchrun_train_a_model_that_can_be_served(tmp_path):
    job = training_job(tmp_path)
    process = start_training(write_job(job, tmp_path / "job.json"), processes=2)
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    assert "tiny is complete: the model is in" in output
    model_folder = tmp_path / "run" / "model"
    assert not load(model_folder).causal
    assert Tokenizer.load(model_folder).encode("w9 w10") == [9, 10]
    assert json.loads((model_folder / "generation_config.json").read_text()) == {
        "block_length": 4,
        "threshold": 0.9,
        "eos_token_id": 62,
        "mask_token_id": 63,
    }
    assert len([line for line in metrics(tmp_path / "run") if line["kind"] == "step"]) == 22


@pytest.mark.slow
def test_the_command_killed_and_run_again_continues_the_curve_bit_for_bit(tmp_path):
    whole = training_job(tmp_path)
    assert exit_code_of(start_training(write_job(whole, tmp_path / "whole.json"))) == 0
    killed = training_job(tmp_path, {"spec.checkpoint.uri": str(tmp_path / "killed")})
    job_file = write_job(killed, tmp_path / "killed.json")
    process = start_training(job_file)
    log = tmp_path / "killed" / "metrics.jsonl"
    while not log.exists() or log.read_text().count("\n") < 9:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert exit_code_of(start_training(job_file)) == 0
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "run")
    models = [tmp_path / run / "model" / "model.safetensors" for run in ("killed", "run")]
    assert models[0].read_bytes() == models[1].read_bytes()


def exit_code_of(process):
    process.communicate(timeout=600)
    return process.returncode
