"""The application of a job: the laws that tie manifests, applications and pods together."""

import functools
import json
import os
import subprocess
import sys
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kubernetes.utils.quantity import parse_quantity
from torchx.specs import AppDef

from support.counts import of
from support.manifests import changed, train_job
from unmask.cli import serve as serve_command
from unmask.errors import UsageError
from unmask_api.cluster import PodResources
from unmask_api.train_job import DiffusionTrainJob
from unmask_operator.launch import agent, amounts, components, local, pods
from unmask_operator.launch.admission import admit
from unmask_operator.launch.application import job_file_of, of_job, to_job

# What the values of rowsPerStep (4) and the rules allow.
SHAPES = st.fixed_dictionaries(
    {"spec.parallelism": st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (1, 4)])},
    optional={
        "spec.image": st.sampled_from(["registry.example/u:1", "u"]),
        "spec.elastic": st.sampled_from([(1, 4), (1, 8)]),
        "spec.resources": st.fixed_dictionaries(
            {},
            optional={
                "cpu": st.sampled_from(["8", "500m", "1.5", 4]),
                "memory": st.sampled_from(["64Gi", "1e9", "100M", "1", "many"]),
                "nvidia.com/gpu": st.sampled_from([1, 8, "2"]),
            },
        ),
    },
)


def manifest(shape: dict[str, Any]) -> dict[str, Any]:
    nodes, processes = shape["spec.parallelism"]
    values: dict[str, Any] = shape | {"spec.parallelism": {"nodes": nodes, "processesPerNode": processes}}
    if "spec.elastic" in shape:
        least, most = shape["spec.elastic"]
        values["spec.elastic"] = {"minNodes": least, "maxNodes": most}
    if "spec.resources" in shape:
        values["spec.resources"] = {"limits": shape["spec.resources"]}
    return changed(train_job(), values)


def job(shape: dict[str, Any]) -> DiffusionTrainJob:
    return _admitted(json.dumps(manifest(shape)))


@functools.cache
def _admitted(text: str) -> DiffusionTrainJob:
    return admit(text)


def plain(app: AppDef, *ignored: str) -> Any:
    """An application as data, without what every place adds by itself."""
    (role,) = asdict(app)["roles"]
    args = list(role["args"])
    args[1] = "LAUNCHER"
    args[args.index("--job") + 1] = "JOB"
    return app.name, {key: value for key, value in role.items() if key not in ("env", *ignored)} | {
        "args": args
    }


@settings(max_examples=of(sample=10, full=200), deadline=None)
@given(SHAPES)
def test_every_manifest_has_one_application(shape: dict[str, Any]) -> None:
    first, again = job(shape), admit(json.dumps(manifest(shape)))
    assert asdict(of_job(first, "job.json")) == asdict(of_job(again, "job.json"))
    (role,) = of_job(first, "job.json").roles
    assert role.num_replicas == first.spec.parallelism.nodes
    assert f"--nproc-per-node={first.spec.parallelism.processes_per_node}" in role.args
    assert not role.env


@settings(max_examples=of(sample=10, full=200), deadline=None)
@given(SHAPES)
def test_a_laptop_and_a_cluster_run_the_same_but_for_what_the_place_adds(shape: dict[str, Any]) -> None:
    one = job(shape)
    attempt = pods.Attempt(job=one, number=0, uid="12345678-9", namespace="ml", image=one.spec.image or "")
    here = local.application(one, Path("/tmp/job.json"))
    there = pods.application(attempt)
    assert here.roles[0].entrypoint == sys.executable
    assert not here.roles[0].env and there.roles[0].env
    if one.spec.elastic is None:
        assert plain(here, "entrypoint") == plain(there, "entrypoint")
    else:  # a laptop has as many nodes as it starts
        here_args, there_args = plain(here)[1]["args"], plain(there)[1]["args"]
        assert [a.partition("=")[0] for a, b in zip(here_args, there_args, strict=True) if a != b] in (
            ["--nnodes", "--max-restarts"],
            ["--nnodes"],
        )


@settings(max_examples=of(sample=10, full=200), deadline=None)
@given(SHAPES, st.integers(0, 2))
def test_an_attempt_is_made_into_the_same_bytes_each_time(shape: dict[str, Any], number: int) -> None:
    def made() -> str:
        attempt = pods.Attempt(
            job=job(shape), number=number, uid="12345678-9", namespace="ml", image="registry.example/u:1"
        )
        return json.dumps([pods.config_map(attempt), pods.service(attempt), pods.indexed_job(attempt)])

    assert made() == made()


def test_another_process_makes_the_same_bytes() -> None:
    attempt = pods.Attempt(
        job=job({"spec.parallelism": (1, 1)}), number=0, uid="1-2", namespace="ml", image="u"
    )
    objects = [pods.config_map(attempt), pods.service(attempt), pods.indexed_job(attempt)]
    program = (
        "import json, sys\n"
        "from unmask_operator.launch import pods\n"
        "from unmask_operator.launch.admission import admit\n"
        "job = admit(sys.stdin.read())\n"
        "attempt = pods.Attempt(job=job, number=0, uid='1-2', namespace='ml', image='u')\n"
        "print(json.dumps([pods.config_map(attempt), pods.service(attempt), pods.indexed_job(attempt)]))\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(manifest({"spec.parallelism": (1, 1)})),
        env=os.environ | {"PYTHONHASHSEED": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert told.stdout == json.dumps(objects) + "\n"


@settings(max_examples=of(sample=15, full=300), deadline=None)
@given(
    SHAPES,
    st.fixed_dictionaries(
        {},
        optional={
            "nodes": st.sampled_from([1, 2]),
            "processes_per_node": st.sampled_from([1, 2]),
            "image": st.just("registry.example/other:2"),
            "cpu": st.integers(1, 64),
            "gpu": st.integers(1, 8),
            "memMB": st.integers(1, 10**6),
        },
    ),
)
def test_the_job_of_an_application_has_that_application(
    tmp_path_factory: pytest.TempPathFactory, shape: dict[str, Any], asked: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("law") / "job.yaml"
    path.write_text(json.dumps(manifest(shape)))
    app = components.train(str(path), **asked)
    assert job_file_of(app) == str(path)
    processes = app.roles[0].num_replicas * int(asked.get("processes_per_node", shape["spec.parallelism"][1]))
    if any(stage.rows_per_step % processes for stage in job(shape).spec.stages):
        with pytest.raises(UsageError, match="rowsPerStep of every stage must be a multiple"):
            to_job(app, job(shape))
        return
    back = to_job(app, job(shape))
    assert plain(of_job(back, str(path))) == plain(app)
    assert back.spec.stages == job(shape).spec.stages
    if not asked:
        assert back == job(shape)


def test_variables_of_the_application_come_into_the_manifest_and_those_of_torchx_do_not(
    tmp_path: Path,
) -> None:
    path = tmp_path / "job.yaml"
    document = changed(train_job(), {"spec.env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]})
    path.write_text(json.dumps(document))
    app = components.train(str(path))
    app.roles[0].env |= {"B": "3", "C": "4", "TORCHX_JOB_ID": "x", "TORCHX_TRACKERS": "y"}
    env = to_job(app, admit(path.read_text())).spec.env
    assert {one.name: one.value for one in env} == {"A": "1", "B": "3", "C": "4"}


def test_numbers_that_the_rules_forbid_are_refused_with_the_rule(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(train_job()))
    app = components.train(str(path), nodes=3)
    with pytest.raises(UsageError, match="rowsPerStep of every stage must be a multiple"):
        to_job(app, admit(path.read_text()))


@pytest.mark.parametrize("app", [components.serve("/models/one"), AppDef(name="echo")])
def test_what_is_no_training_job_is_refused(app: AppDef) -> None:
    with pytest.raises(UsageError, match=r"no training job: unmask's operator runs unmask\.train alone"):
        job_file_of(app)


def test_another_interpreter_than_the_images_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(train_job()))
    with pytest.raises(UsageError, match="it is the image's: drop it"):
        to_job(components.train(str(path), python="pypy"), admit(path.read_text()))


def test_with_all_numbers_given_the_job_file_may_lie_elsewhere() -> None:
    (role,) = components.train("/shared/job.json", nodes=2, processes_per_node=8, gpu=8).roles
    assert role.args[-5:] == ["-m", "unmask.cli.main", "train", "--job", "/shared/job.json"]
    assert (role.num_replicas, role.resource.gpu) == (2, 8)
    with pytest.raises(UsageError, match="cannot be read"):
        components.train("/shared/job.json", nodes=2)


@pytest.mark.parametrize(
    "text", ["8", 4, "500m", "1.5", "64Gi", "1e9", "2E3", "1E", "1Ei", "100M", "7k", "3n", "0.5Gi", ".5"]
)
def test_amounts_are_worth_what_the_official_client_says(text: object) -> None:
    assert amounts.quantity(text) == Fraction(parse_quantity(text))


@pytest.mark.parametrize("text", ["", "many", "1ki", "1 Gi", "GiGi", "--1", "1e", "٣"])
def test_what_is_no_amount_is_none(text: str) -> None:
    assert amounts.quantity(text) is None
    assert amounts.resource(PodResources(limits={"cpu": text})).cpu == -1


def test_amounts_are_rounded_up_and_limits_count_before_requests() -> None:
    told = amounts.resource(
        PodResources(limits={"cpu": "1500m", "memory": "1Gi"}, requests={"cpu": "1", "nvidia.com/gpu": 2})
    )
    assert (told.cpu, told.memMB, told.gpu) == (2, 1074, 2)
    assert amounts.limits(told) == {"cpu": "2", "memory": "1074M", "nvidia.com/gpu": "2"}


def test_serve_is_a_command_line_that_unmask_understands() -> None:
    app = components.serve("/models/one", name="one", rows=4, gpu=1, metrics_port=9191)
    (role,) = app.roles
    assert role.args[:3] == ["-m", "unmask.cli.main", "serve"]
    parsed = serve_command.command.make_context(
        "serve", role.args[3:], parent=click.Context(serve_command.command)
    )
    assert parsed.params["folder"] == Path("/models/one")
    found = {key: parsed.params[key] for key in ("host", "port", "metrics_port", "name", "rows", "device")}
    assert found == {
        "host": "0.0.0.0",
        "port": 50051,
        "metrics_port": 9191,
        "name": "one",
        "rows": 4,
        "device": "cuda",
    }
    assert role.port_map == {"grpc": 50051, "metrics": 9191}


@pytest.mark.parametrize(
    ("given_", "endpoint"),
    [
        ({}, None),
        ({components.MEETING: "TORCHX_RANK0_HOST", "TORCHX_RANK0_HOST": "node-1"}, "node-1:29400"),
        (
            {
                components.MEETING: "VC_TRAINER_0_HOSTS",
                "VC_TRAINER_0_HOSTS": "a-0",
                "UNMASK_MEETING_PORT": "5",
            },
            "a-0:5",
        ),
        ({components.MEETING: "TORCHX_RANK0_HOST"}, "localhost:29400"),
        ({components.MEETING: "TORCHX_RANK0_HOST", "PET_RDZV_ENDPOINT": "known:1"}, None),
    ],
)
def test_nodes_meet_where_a_scheduler_of_torchx_put_the_first(
    given_: dict[str, str], endpoint: str | None
) -> None:
    assert agent.meeting(given_).get("PET_RDZV_ENDPOINT") == endpoint
