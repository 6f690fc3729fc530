"""Whatever ends a run of two ranks: both say why, with the right exit code, and nothing is lost."""

import json
import shutil
from pathlib import Path

import pytest

from support.faults import at_step, in_folder, nothing, small_files, start_patched, start_unlike
from support.ranks import join
from support.training import metrics, training_job
from unmask_api.train_job import DiffusionTrainJob

STEPS = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def job_in(folder, name, **spec):
    manifest = training_job(folder).to_json_dict()
    del manifest["spec"]["evaluation"]
    manifest["spec"]["stages"] = [manifest["spec"]["stages"][0] | {"steps": STEPS}]
    manifest["spec"]["checkpoint"] = {"uri": str(folder / name), "everySteps": 2, "keepLast": 2}
    for field, value in spec.items():
        manifest["spec"][field] = value
    return DiffusionTrainJob.from_json(json.dumps(manifest))


@pytest.fixture(scope="module")
def undisturbed(folder):
    assert join(start_patched(job_in(folder, "undisturbed"), nothing, ranks=2)) == [0, 0]
    return folder / "undisturbed"


def report_of(run, name="termination.json"):
    return json.loads((run / name).read_text())


def log_of(run, rank):
    return Path(f"{run}.rank-{rank}.log").read_text()


def assert_goes_on_as_undisturbed(run, undisturbed, job):
    assert join(start_patched(job, nothing, ranks=2)) == [0, 0]
    assert metrics(run) == metrics(undisturbed)
    ours, theirs = (path / "model" / "model.safetensors" for path in (run, undisturbed))
    assert ours.read_bytes() == theirs.read_bytes()
    assert report_of(run)["exit_code"] == 0
    assert not list(run.glob("termination.rank-*"))


def test_a_rank_that_is_killed_ends_the_other_which_says_so(folder, undisturbed):
    job, run = job_in(folder, "dead"), folder / "dead"
    assert join(start_patched(job, at_step, 1, 6, "die", ranks=2)) == [1, -9]
    report = report_of(run)
    assert (report["reason"], report["exit_code"], report["step"]) == ("PeerLost", 1, 5)
    assert "another process of the job has ended, so this one cannot go on" in report["message"]
    assert report["checkpoint"].endswith("step-00000004")
    assert_goes_on_as_undisturbed(run, undisturbed, job)


@pytest.mark.parametrize("victim", [0, 1])
def test_what_one_rank_raises_is_what_the_first_one_reports(folder, undisturbed, victim):
    run = folder / f"raised {victim}"
    job = job_in(folder, run.name)
    log = folder / f"termination log {victim}"
    processes = start_patched(job, at_step, victim, 6, "raise", ranks=2, UNMASK_TERMINATION_LOG=str(log))
    assert join(processes) == [1, 1]
    report = report_of(run)
    assert report["reason"] == ("PeerLost" if victim else "Failed")
    assert "ValueError: a defect of rank 1" in report["message"]
    assert ("process 1: ValueError" in report["message"]) == bool(victim)
    assert json.loads(log.read_text())["message"] in {
        report["message"],
        "ValueError: a defect of rank 1",
    }
    assert "Traceback" in log_of(run, victim)
    assert_goes_on_as_undisturbed(run, undisturbed, job)


@pytest.mark.parametrize("what", ["sleep", "seize"])
def test_a_rank_that_hangs_ends_all_with_their_stacks(folder, undisturbed, what):
    run = folder / f"hung {what}"
    job = job_in(folder, run.name, runPolicy={"hangTimeoutSeconds": 8})
    log = folder / f"termination log {what}"
    processes = start_patched(job, at_step, 1, 6, what, ranks=2, UNMASK_TERMINATION_LOG=str(log))
    # A rank whose interpreter stands still cannot say more than where.
    assert join(processes) == [70, 70 if what == "sleep" else 1]
    report = report_of(run)
    assert (report["reason"], report["exit_code"], report["step"]) == ("Hung", 70, 5)
    assert report["message"].startswith("no progress for 8 s after step 5 (runPolicy.hangTimeoutSeconds)")
    assert json.loads(log.read_text()) == report
    for rank, frame in ((0, "in gradient_step"), (1, "in spoilt")):
        assert "most recent call first" in log_of(run, rank)
        assert frame in log_of(run, rank)
    assert_goes_on_as_undisturbed(run, undisturbed, job)


def test_ranks_with_different_manifests_do_not_begin(folder):
    other = {"seed": 8, **{k: v for k, v in data_of(folder).items() if k != "seed"}}
    jobs = [job_in(folder, "unlike"), job_in(folder, "unlike", data=other)]
    assert join(start_unlike(jobs)) == [64, 64]
    assert report_of(folder / "unlike")["message"] == (
        "process 1 has another manifest than process 0: spec.data.seed is 8, not 7; give all processes the "
        "same job and the same files"
    )
    assert not (folder / "unlike" / "checkpoints").exists()


def data_of(folder):
    return training_job(folder).to_json_dict()["spec"]["data"]


def test_ranks_with_different_data_do_not_begin(folder):
    homes = [folder / "home 0", folder / "home 1"]
    data = data_of(folder)
    for home in homes:
        home.mkdir()
        shutil.copy(folder / "train.jsonl", home)
    lines = (homes[1] / "train.jsonl").read_text().splitlines(keepends=True)
    (homes[1] / "train.jsonl").write_text("".join(lines[:-1]))
    job = job_in(
        folder, "elsewhere", data=data | {"train": [data["train"][0] | {"uri": "/proc/self/cwd/train.jsonl"}]}
    )
    assert join(start_patched(job, in_folder, [str(home) for home in homes], ranks=2)) == [65, 65]
    message = report_of(folder / "elsewhere")["message"]
    assert message.startswith(
        "process 1 has another data or model than process 0: stages[0].train[0].sha256 is "
    )


def test_data_that_shrank_since_the_checkpoint_are_refused_and_it_stands(folder, undisturbed):
    data = data_of(folder)
    own = folder / "own.jsonl"
    whole = (folder / "train.jsonl").read_text()
    own.write_text(whole)
    job = job_in(folder, "shrunk", data=data | {"train": [data["train"][0] | {"uri": str(own)}]})
    assert join(start_patched(job, at_step, 1, 6, "die", ranks=2)) == [1, -9]
    own.write_text("".join(whole.splitlines(keepends=True)[:-2]))
    assert join(start_patched(job, nothing, ranks=2)) == [64, 64]
    message = report_of(folder / "shrunk")["message"]
    assert message.startswith("spec.stages[0].train[0].sha256: the job has ")
    assert "but the checkpoint" in message
    own.write_text(whole)
    assert_goes_on_as_undisturbed(folder / "shrunk", undisturbed, job)


def test_a_checkpoint_of_another_model_is_refused_and_stands(folder, undisturbed):
    run = folder / "other model"
    shutil.copytree(undisturbed, run)
    before = sorted(path.name for path in (run / "checkpoints").rglob("*"))
    model = training_job(folder).to_json_dict()["spec"]["model"]
    model["init"]["config"] = model["init"]["config"] | {"num_hidden_layers": 3}
    assert join(start_patched(job_in(folder, run.name, model=model), nothing, ranks=2)) == [64, 64]
    message = report_of(run)["message"]
    assert message.startswith("spec.model.num_hidden_layers: the job has 3, but the checkpoint")
    assert sorted(path.name for path in (run / "checkpoints").rglob("*")) == before
    assert_goes_on_as_undisturbed(run, undisturbed, job_in(folder, run.name))


def test_a_file_system_that_takes_no_more_ends_all_and_nothing_is_lost(folder, undisturbed):
    job, run = job_in(folder, "full"), folder / "full"
    assert join(start_patched(job, at_step, 1, 6, "die", ranks=2)) == [1, -9]
    assert join(start_patched(job, small_files, 0, 20_000, ranks=2)) == [1, 1]
    report = report_of(run)
    assert "step-00000006: cannot be written" in report["message"]
    assert "make room or mend the volume; earlier checkpoints stand" in report["message"]
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [
        "step-00000002",
        "step-00000004",
    ]
    assert_goes_on_as_undisturbed(run, undisturbed, job)
