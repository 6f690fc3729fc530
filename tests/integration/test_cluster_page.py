"""Every command and snippet of docs/how-to/run-jobs-on-a-cluster.md, run against a cluster in memory; and
those of docs/how-to/serve-on-a-cluster.md that are of the command line."""

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

HOW_TO = Path(__file__).parents[2] / "docs/how-to"
PAGE = (HOW_TO / "run-jobs-on-a-cluster.md").read_text()
SERVICES = (HOW_TO / "serve-on-a-cluster.md").read_text()


def blocks(language: str, page: str = PAGE) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


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


def of_services() -> str:
    """Return the section about the command line."""
    (section,) = re.findall(r"^## From the command line\n.*?(?=^## )", SERVICES, re.DOTALL | re.MULTILINE)
    return str(section)


def start(stage: Stage) -> None:
    """The service has come up: its engine has printed a line."""
    stage.serve("chat", readyReplicas=2, endpoint="chat.ml.svc:50051")
    uid = stage.server_pod("chat", 0, "engine")
    stage.server.logs.write(uid, "it listens", stamp="2026-11-27T10:00:00Z")
    stage.end(uid)


def test_the_commands_for_services_work_in_their_order(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("service.yaml").write_text(blocks("yaml", SERVICES)[0])
    (block,) = blocks("sh", of_services())
    for line in block.splitlines():
        if "--wait" in line:
            stage.services().submit(Path("service.yaml"))
            start(stage)
        assert run(line) == 0, line
    assert "[chat-0-x7k2pd-e-0] it listens" in capsys.readouterr().out
    assert stage.server.objects("DiffusionInferenceService") == []


def test_the_python_for_services_works(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    Path("service.yaml").write_text(blocks("yaml", SERVICES)[0])
    stage.services().submit(Path("service.yaml"))
    start(stage)
    (snippet,) = blocks("python", of_services())
    exec(compile(textwrap.dedent(snippet), "page", "exec"), {})
    assert "Ready 2 chat.ml.svc:50051\nchat-0-x7k2pd-e-0 it listens\n" in capsys.readouterr().out
