"""A job's processes on this machine: the environment they get, restarts, and that none is left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.manifests import changed, train_job
from unmask_api.train_job import DiffusionTrainJob
from unmask_operator.launch import local
from unmask_operator.launch.admission import admit
from unmask_operator.launch.volumes import resolve

TESTS = Path(__file__).parents[1]
LAUNCHER = """
import sys
from unmask_api.train_job import DiffusionTrainJob
from unmask_operator.launch import local
job = DiffusionTrainJob.from_json(sys.argv[1])
sys.exit(local.run(job, module="support.stub_worker").exit_code)
"""


def scripted(run: Path, script: list[dict[str, Any]], **fields: Any) -> DiffusionTrainJob:
    """Return a job in the run folder ``run`` whose workers follow ``script``."""
    values = {f"spec.{name.replace('__', '.')}": value for name, value in fields.items()}
    manifest = changed(train_job(), {**values, "spec.checkpoint.uri": "pvc://run"})
    (run / "script.json").write_text(json.dumps(script), encoding="utf-8")
    return resolve(admit(json.dumps(manifest)), {"run": run, "data": run})


def attempts(run: Path, rank: int = 0) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"attempts-{rank}.jsonl").read_text().splitlines()]


def start(job: DiffusionTrainJob) -> local.Outcome:
    return local.run(job, module="support.stub_worker")


@pytest.fixture(autouse=True)
def workers_find_the_stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def test_every_process_of_every_node_joins_one_world(tmp_path: Path) -> None:
    parallelism = {"nodes": 2, "processesPerNode": 2}
    job = scripted(tmp_path, [{"exit_code": 0}], parallelism=parallelism)
    assert start(job).exit_code == 0
    environments = [attempts(tmp_path, rank)[0]["environment"] for rank in range(4)]
    assert {one["WORLD_SIZE"] for one in environments} == {"4"}
    assert {one["MASTER_ADDR"] for one in environments} == {"localhost"}
    cores = len(os.sched_getaffinity(0))
    assert {one["OMP_NUM_THREADS"] for one in environments} == {str(max(1, cores // 4))}


def test_the_trainer_reads_the_whole_defaulted_job(tmp_path: Path) -> None:
    job = scripted(tmp_path, [{"exit_code": 0}])
    start(job)
    given = attempts(tmp_path)[0]["job"]
    assert DiffusionTrainJob.from_json(json.dumps(given)) == job
    assert given["spec"]["data"]["train"][0]["uri"] == str(tmp_path / "train.jsonl")


def test_an_error_that_no_restart_mends_ends_the_run_with_the_trainers_code_and_words(tmp_path: Path) -> None:
    job = scripted(tmp_path, [{"exit_code": 65, "report": True}])
    outcome = start(job)
    assert (outcome.exit_code, outcome.message) == (65, "told to end in attempt 0")
    assert (outcome.logs / "trainer" / "0" / "stderr.log").exists()


def test_a_crash_is_restarted_until_the_restarts_are_used_up_and_a_saved_stop_is_not_counted(
    tmp_path: Path,
) -> None:
    script = [{"exit_code": 9}, {"exit_code": 75, "report": True}, {"exit_code": 70, "report": True}]
    job = scripted(tmp_path, script, runPolicy__maxRestarts=1, checkpoint__resume="Never")
    outcome = start(job)
    assert (outcome.exit_code, outcome.restarts) == (70, 1)
    resumes = [one["job"]["spec"]["checkpoint"]["resume"] for one in attempts(tmp_path)]
    assert resumes == ["Never", "Auto", "Auto"]


def test_a_report_of_an_earlier_run_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    job = scripted(tmp_path, [{"exit_code": 3}], runPolicy__maxRestarts=0)
    (tmp_path / "termination.json").write_text('{"exit_code": 65, "message": "old"}')
    outcome = start(job)
    assert (outcome.exit_code, outcome.message) == (1, "the trainer ended without a report")


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)]
)
def test_no_process_outlives_a_run_that_is_stopped(
    tmp_path: Path, number: signal.Signals, exit_code: int
) -> None:
    job = scripted(tmp_path, [{"exit_code": 75, "report": True, "hang": True}])
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, json.dumps(job.to_json_dict())])
    pids = tmp_path / "pids"
    wait_until(lambda: (tmp_path / "attempts-0.jsonl").exists())
    launcher.send_signal(number)
    assert launcher.wait(timeout=60) == exit_code
    wait_until(lambda: not any(is_alive(int(path.name)) for path in pids.iterdir()))
    if number is not signal.SIGKILL:
        assert json.loads((tmp_path / "termination.json").read_text())["exit_code"] == 75


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "waited for a minute"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
