"""The cluster's part of a job: defaults, what a laptop makes of it, and what may change in an update."""

import json
from typing import Any

import cel
import pytest

from support.manifests import changed, train_job
from unmask_api.train_job import DiffusionTrainJob, TrainSpec
from unmask_operator.launch.admission import admit


def spec(values: dict[str, Any] | None = None) -> dict[str, Any]:
    return admit(json.dumps(changed(train_job(), values or {}))).to_json_dict()["spec"]


def refused(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Fields that an update from ``before`` to ``after`` is refused for."""
    context = {"self": spec(after), "oldSelf": spec(before)}
    return [
        str(rule.field_path)
        for rule in TrainSpec.rules
        if rule.transition and not cel.compile(rule.rule).execute(context)
    ]


@pytest.mark.parametrize(
    ("after", "blamed"),
    [
        ({}, []),
        ({"spec.suspend": True}, []),
        ({"spec.runPolicy.maxRestarts": 9}, []),
        ({"spec.runPolicy.stallTimeoutSeconds": 60}, []),
        ({"spec.runPolicy.ttlSecondsAfterFinished": 60}, []),
        ({"spec.image": "registry.example/unmask:2"}, []),
        ({"spec.managedBy": "kueue.x-k8s.io/multikueue"}, [".managedBy"]),
        ({"spec.model.init": {"uri": "pvc://data/other"}}, [".model"]),
        ({"spec.data.seed": 5}, [".data"]),
        ({"spec.stages[0].steps": 9}, [".stages"]),
        ({"spec.precision": "bf16"}, [".precision"]),
        ({"spec.checkpoint.uri": "pvc://run/other"}, [".checkpoint.uri"]),
        ({"spec.checkpoint.everySteps": 4}, []),
        ({"spec.parallelism.nodes": 2}, [".parallelism.nodes"]),
        ({"spec.parallelism.processesPerNode": 2}, [".parallelism"]),
    ],
)
def test_what_may_change_while_a_job_runs(after: dict[str, Any], blamed: list[str]) -> None:
    assert refused({}, after) == blamed


def test_a_suspended_job_may_go_on_with_another_arrangement_and_an_elastic_one_with_more_nodes() -> None:
    wider = {"spec.parallelism.nodes": 2, "spec.parallelism.processesPerNode": 2}
    assert refused({"spec.suspend": True}, wider) == []
    elastic = {"spec.elastic": {"minNodes": 1, "maxNodes": 4}}
    assert refused(elastic, elastic | {"spec.parallelism.nodes": 4}) == []


def test_a_job_that_says_nothing_of_the_cluster_has_defaults_for_it() -> None:
    left_out = spec()
    assert left_out["managedBy"] == "unmask.dev/operator"
    assert left_out["suspend"] is False
    assert left_out["runPolicy"]["maxRestarts"] == 3
    assert left_out["scheduling"]["gang"]["mode"] == "Auto"
    assert not {"elastic", "image", "affinity", "podTemplate"} & left_out.keys()


def test_what_kubernetes_checks_itself_passes_through_unchanged() -> None:
    overlay = {"metadata": {"labels": {"team": "a"}}, "spec": {"hostUsers": None, "x": [1, "y"]}}
    volumes = [{"name": "scratch", "emptyDir": {"sizeLimit": "1Gi"}}]
    limits = {"nvidia.com/gpu": 8, "memory": "64Gi"}
    values = {"spec.podTemplate": overlay, "spec.volumes": volumes, "spec.resources": {"limits": limits}}
    read = spec(values)
    assert read["podTemplate"] == overlay
    assert read["volumes"] == volumes
    assert read["resources"]["limits"] == limits
    again = DiffusionTrainJob.model_validate_json(json.dumps(train_job() | {"spec": read}))
    assert again.to_json_dict()["spec"] == read


def test_the_operator_may_write_what_the_status_says() -> None:
    history = [{"attempt": 0, "reason": "Evicted", "fromStep": 0, "toStep": 7}]
    status = {"attempt": 1, "backoff": 1, "selector": "a=b", "history": history}
    job = DiffusionTrainJob.model_validate_json(json.dumps(train_job() | {"status": status}))
    assert job.status is not None
    assert job.to_json_dict()["status"]["history"] == history
