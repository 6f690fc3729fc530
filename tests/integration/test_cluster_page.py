"""Every command and snippet of docs/how-to/run-jobs-on-a-cluster.md, run against a cluster in memory."""

import contextlib
import json
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from torchx.cli.main import main as torchx

from support.cluster_client import Stage, kubeconfig, staged
from support.manifests import train_job
from unmask.cli.main import main as unmask

PAGE = (Path(__file__).parents[2] / "docs/how-to/run-jobs-on-a-cluster.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    with staged() as made:
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig(tmp_path, made.address)))
        (tmp_path / "job.yaml").write_text(json.dumps(train_job()))
        monkeypatch.chdir(tmp_path)
        yield made


def end(stage: Stage) -> None:
    """The job has run: its pod has printed a line, and ended."""
    uid = stage.pod("tiny")
    stage.server.logs.write(uid, "the last line", stamp="2026-11-27T10:00:00Z")
    stage.end(uid)
    stage.set_status("tiny", state="Succeeded", progress={"step": 32, "totalSteps": 32})


def run(line: str) -> int:
    program, *arguments = shlex.split(line)
    if program == "torchx":
        torchx(arguments)
        return 0
    with pytest.raises(SystemExit) as ended:
        unmask(arguments)
    return int(ended.value.code or 0)


def test_the_commands_of_unmask_work_in_their_order(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    follow, stop = blocks("sh")[:2]
    for line in follow.splitlines():
        if "logs" in line:
            end(stage)
        assert run(line) == 0, line
    assert "the last line" in capsys.readouterr().out
    stage.set_status("tiny", state="Running")
    for line in stop.splitlines():
        assert run(line) == 0, line
    assert stage.server.objects("DiffusionTrainJob") == []


def test_the_commands_of_torchx_work_in_their_order(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = [block for block in blocks("sh") if "torchx run" in block]
    for line in block.splitlines():
        if " log " in line:
            end(stage)
        if " cancel " in line:
            stage.set_status("tiny", state="Running")
        with contextlib.suppress(SystemExit):
            run(line)
    told = capsys.readouterr().out
    assert "kubernetes_unmask://torchx/ml:tiny" in told and "the last line" in told
    assert stage.server.objects("DiffusionTrainJob")[0]["spec"]["suspend"] is True


def test_the_python_works(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    stage.jobs().submit(Path("job.yaml"))
    end(stage)
    (snippet,) = blocks("python")
    exec(compile(textwrap.dedent(snippet), "page", "exec"), {})
    assert "the last line" in capsys.readouterr().out
