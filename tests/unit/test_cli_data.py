"""``unmask data``: what it counts, and that a job then finds its data encoded."""

import json

import pytest
import torch

from support.training import exercise, training_job
from unmask.cli.main import main
from unmask.training import token_cache
from unmask.training.distributed import World
from unmask.training.preparation import prepare


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


@pytest.fixture
def manifest(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(training_job(tmp_path).to_json_dict()))
    return path


def test_sources_are_counted_stage_by_stage_and_kept_for_the_job(tmp_path, manifest, capsys, monkeypatch):
    code, out, _ = run(capsys, "data", "-f", str(manifest), "--json")
    assert code == 0
    found = [json.loads(line) for line in out.splitlines()]
    assert [(one["stage"], one["use"]) for one in found[:2]] == [
        ("pretrain", "train"),
        ("pretrain", "validation"),
    ]
    words = sum(len(exercise(number)["prompt"].split()) for number in range(50))
    assert (found[0]["documents"], found[0]["tokens"]) == (50, 2 * words + 50)  # the end of text is one
    assert (found[0]["mean_prompt_tokens"], found[0]["longest"]) == (round(words / 50, 1), 11)
    monkeypatch.setattr(token_cache, "encode", None)
    prepare(training_job(tmp_path).spec, World(rank=0, size=1, device=torch.device("cpu")))


def test_a_bad_record_ends_it_in_a_line(tmp_path, manifest, capsys):
    (tmp_path / "train.jsonl").write_text('{"prompt": "w9"}\n')
    code, _, err = run(capsys, "data", "-f", str(manifest))
    assert code == 65
    assert err == f'error: {tmp_path}/train.jsonl:1: "completion" must be a string, got nothing\n'
