"""``unmask run``: what a person sees of a run, and its exit code."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from support.manifests import train_job
from unmask.cli.main import main
from unmask_operator.launch import local

STEP = {"kind": "step", "step": 32, "stage": "answers", "stage_step": 8, "stage_steps": 8, "total_steps": 32}


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.setattr(local, "run", functools.partial(local.run, module="support.stub_worker"))
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(train_job()))
    return path


def run(manifest: Path, *script: dict[str, Any]) -> int:
    folder = manifest.parent / "tiny"
    folder.mkdir()
    (folder / "script.json").write_text(json.dumps(script))
    volumes = [f"--volume={name}={manifest.parent}" for name in ("data", "run")]
    with pytest.raises(SystemExit) as ended:
        main(["run", "-f", str(manifest), *volumes])
    return int(ended.value.code or 0)


def test_a_finished_run_is_summed_up_and_says_where_the_model_is(
    manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = [STEP | {"loss": 0.75, "tokens": 64, "seconds": 0.1}]
    assert run(manifest, {"exit_code": 1}, {"exit_code": 0, "metrics": metrics}) == 0
    captured = capsys.readouterr()
    assert "answers" in captured.out and "0.75" in captured.out
    assert captured.out.endswith(f"tiny is complete: the model is in {manifest.parent}/tiny/model\n")
    assert captured.err.endswith("restarts: 1\n")


def test_a_failed_run_ends_with_the_trainers_code_and_one_line(
    manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(manifest, {"exit_code": 65, "report": True}) == 65
    err = capsys.readouterr().err
    assert err.startswith("error: told to end in attempt 0 (logs: ") and err.count("\n") == 1
