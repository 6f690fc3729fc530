"""Following a run by its metrics file."""

import json
from pathlib import Path
from typing import Any

import pytest

from unmask.cli.following import Follower, Tail, duration


def step(number: int, stage: str = "pretrain", **values: Any) -> dict[str, Any]:
    record = {"kind": "step", "step": number, "stage": stage, "stage_step": number, "stage_steps": 4}
    figures = {"total_steps": 4, "loss": 2.0 / number, "tokens": 100, "seconds": 0.5, "lr": 1e-3}
    return record | figures | values


def write(path: Path, *records: dict[str, Any], end: str = "") -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + end)


def test_only_whole_new_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    write(path, {"a": 1}, end='{"a": ')
    assert tail.read() == [{"a": 1}]
    assert tail.read() == []
    write(path, {"a": 1}, {"a": 2})
    assert tail.read() == [{"a": 2}]


def test_a_file_that_was_cut_back_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    write(path, {"a": 1}, {"a": 2}, {"a": 3})
    tail.read()
    write(path, {"a": 1})
    assert tail.read() == [{"a": 1}]


def test_without_a_terminal_a_line_now_and_then_tells_the_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    clock = iter([0.0, 1.0, 9.0, 10.0])
    monkeypatch.setattr("unmask.cli.following.time.monotonic", lambda: next(clock))
    with Follower(path, total_steps=4) as follower:
        write(path, step(1))
        follower.update()  # a second after the start: too soon
        write(path, step(1), step(2))
        follower.update()
    assert capsys.readouterr().err == "pretrain  step 2/4  loss 1.0000  200 tokens/s  1 s left\n"


def test_the_summary_has_the_last_figures_of_each_stage(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(
        path,
        step(1),
        {"kind": "eval", "step": 1, "stage": "pretrain", "loss": 3.0, "exact_match": 0.25},
        {"kind": "stage", "stage": "pretrain", "seconds": 75.2},
        step(2, "answers"),
        {"kind": "something new", "anything": 1},
    )
    with Follower(path, total_steps=4) as follower:
        follower.update()
    summary = follower.summary()
    assert [word in summary for word in ("exact match", "0.25", "1 min 15 s", "answers")] == [True] * 4


def test_a_run_without_metrics_has_no_summary(tmp_path: Path) -> None:
    assert Follower(tmp_path / "none.jsonl", total_steps=1).summary() == ""


@pytest.mark.parametrize(("seconds", "text"), [(3.4, "3 s"), (200, "3 min 20 s"), (7260, "2 h 1 min")])
def test_durations_are_told_as_people_do(seconds: float, text: str) -> None:
    assert duration(seconds) == text
