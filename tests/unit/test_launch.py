"""From an admitted job to an application: YAML, volumes, the job file, the command line, restarts."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.manifests import changed, train_job
from unmask.errors import UsageError
from unmask_api.exit_codes import ExitCode
from unmask_api.train_job import DiffusionTrainJob
from unmask_operator import yaml_dialect
from unmask_operator.launch.admission import admit
from unmask_operator.launch.attempts import Next, after
from unmask_operator.launch.job_file import canonical
from unmask_operator.launch.local import application
from unmask_operator.launch.volumes import resolve

FOLDERS = {"data": Path("/mnt/data"), "run": Path("/mnt/run")}


def job(values: dict[str, Any] | None = None) -> DiffusionTrainJob:
    return admit(json.dumps(changed(train_job(), values or {})))


# What Kubernetes 1.37 made of each, by `kubectl create --dry-run`.
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-3", 0.003),
        ("1e5", 100000),
        ("5.", 5),
        ("-.5", -0.5),
        ("1_0.5", 10.5),
        ("+1", 1),
        ("0x1F", 31),
        ("017", 15),
        ("0o17", 15),
        ("0b11", 3),
        ("08", 8),
        ("1_000", 1000),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("0o", "0o"),
        ("y", True),
        ("N", False),
        ("on", True),
        ("~", None),
        ('"1e-8"', "1e-8"),
    ],
)
def test_yaml_means_what_it_means_to_kubernetes(text: str, value: object) -> None:
    loaded = yaml_dialect.load(text)
    assert (loaded, type(loaded)) == (value, type(value))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text() | st.from_regex(r"[-+.0-9eEyYnNx_:]{1,8}"),
        st.lists,
    )
)
def test_what_is_written_as_yaml_reads_back_the_same(value: object) -> None:
    assert yaml_dialect.load(yaml_dialect.dump(value)) == value


def test_volumes_become_folders_everywhere_but_in_free_form_fields() -> None:
    config = {"uri": "pvc://data/not-ours"}
    paths = {
        "spec.model.init.config": config,
        "spec.stages[0].data": {"train": [{"uri": "pvc://data", "format": "completion"}]},
    }
    spec = resolve(job(paths), FOLDERS).spec
    assert spec.data.train[0].uri == "/mnt/data/train.jsonl"
    assert spec.checkpoint.uri == "/mnt/run/tiny"
    assert spec.stages[0].data is not None and spec.stages[0].data.train[0].uri == "/mnt/data"
    assert spec.model.init.config == config


def test_absolute_paths_stay() -> None:
    assert (
        resolve(job({"spec.checkpoint.uri": "/scratch/run"}), {"data": Path("/d")}).spec.checkpoint.uri
        == "/scratch/run"
    )


@pytest.mark.parametrize(
    ("values", "folders", "says"),
    [
        (
            {},
            {"data": Path("/d")},
            "spec.checkpoint.uri: volume run has no folder here; add --volume run=DIR",
        ),
        (
            {},
            FOLDERS | {"runs": Path("/r")},
            "--volume runs: the manifest has no such volume, it has: data, run",
        ),
        (
            {"spec.checkpoint.uri": "pvc://run/a/../../b"},
            FOLDERS,
            "spec.checkpoint.uri: the path leaves volume run",
        ),
    ],
)
def test_a_volume_that_does_not_fit_is_named(
    values: dict[str, Any], folders: dict[str, Path], says: str
) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(job(values), folders)
    assert says in str(caught.value)


def test_the_job_file_depends_on_name_and_spec_alone_and_reads_back() -> None:
    plain = job()
    noisy = job({"metadata.labels": {"team": "a"}, "metadata.uid": "1", "status": {"state": "Running"}})
    assert canonical(plain) == canonical(noisy)
    again = DiffusionTrainJob.from_json(canonical(plain))
    assert (again.spec, canonical(again)) == (plain.spec, canonical(plain))


def test_one_job_is_one_application() -> None:
    wide = job({"spec.parallelism": {"nodes": 2, "processesPerNode": 2}})
    app = application(wide, Path("/tmp/job.json"))
    assert asdict(app) == asdict(application(admit(canonical(wide).decode()), Path("/tmp/job.json")))
    (role,) = app.roles
    assert role.num_replicas == 2
    assert "--nnodes=2" in role.args and "--nproc-per-node=2" in role.args
    assert role.args[-5:] == ["-m", "unmask.cli.main", "train", "--job", "/tmp/job.json"]
    assert not role.env


@pytest.mark.parametrize(
    ("exit_code", "restarts", "following"),
    [
        (ExitCode.OK, 0, Next.DONE),
        (ExitCode.USAGE, 0, Next.FAIL),
        (ExitCode.DATA, 0, Next.FAIL),
        (ExitCode.MODEL, 0, Next.FAIL),
        (ExitCode.DIVERGED, 0, Next.FAIL),
        (ExitCode.SAVED, 3, Next.RESUME),
        (ExitCode.HUNG, 2, Next.RESTART),
        (ExitCode.HUNG, 3, Next.FAIL),
        (137, 0, Next.RESTART),
        (ExitCode.FAILURE, 3, Next.FAIL),
    ],
)
def test_what_follows_an_attempt(exit_code: int, restarts: int, following: Next) -> None:
    assert after(exit_code, restarts=restarts, max_restarts=3) is following
