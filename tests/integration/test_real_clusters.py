"""The clusters that other tests stand on: they start, they work, nothing of them is left."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from real_cluster import running as program
from support import real_clusters
from support.real_clusters import Cluster

JOB = {
    "apiVersion": "batch/v1",
    "kind": "Job",
    "metadata": {"name": "one"},
    "spec": {
        "completionMode": "Indexed",
        "completions": 2,
        "parallelism": 2,
        "template": {
            "spec": {
                "restartPolicy": "Never",
                "containers": [{"name": "c", "image": "cluster.local/pause:1"}],
            }
        },
    },
}


@pytest.fixture(scope="module")
def plane() -> Iterator[Cluster]:
    with real_clusters.running("api") as cluster:
        yield cluster


@pytest.mark.real_api
def test_a_control_plane_without_a_node_makes_pods_and_finds_no_place_for_them(plane: Cluster) -> None:
    plane.until(lambda: plane.get("serviceaccount", "default"), "the namespace's account")
    plane.kubectl("apply", "-f", "-", given=JOB)

    def reasons() -> list[str]:
        pods = plane.items("pods", "-l", "batch.kubernetes.io/job-name=one")
        told = [condition.get("reason") for pod in pods for condition in pod["status"].get("conditions", ())]
        return told if len(told) == 2 else []

    assert plane.until(reasons, "two pods that wait") == ["Unschedulable"] * 2


@pytest.mark.real_api
def test_two_control_planes_know_nothing_of_each_other(plane: Cluster) -> None:
    with real_clusters.running("api") as other:
        plane.kubectl("create", "namespace", "mine")
        assert other.get("namespace", "mine") is None
        folder = other.kubeconfig.parents[1]
        assert folder.is_dir()
    assert not folder.exists()
    assert plane.get("namespace", "mine") is not None


@pytest.mark.slow
@pytest.mark.real_node
def test_a_node_runs_pods_that_find_each_other_and_leaves_nothing(tmp_path: Path) -> None:
    with real_clusters.running("node") as cluster:
        folder = cluster.kubeconfig.parents[1]
        cluster.kubectl("apply", "-f", "-", given=JOB)

        def running() -> bool:
            pods = cluster.items("pods", "-l", "batch.kubernetes.io/job-name=one")
            return [pod["status"]["phase"] for pod in pods] == ["Running"] * 2

        cluster.until(running, "two pods that run")
        groups = [group for root in program._hierarchies() for group in root.glob(f"{program._CGROUP}*")]
        assert groups
    assert not folder.exists()
    assert not [group for group in groups if group.exists()]
    assert str(folder) not in Path("/proc/mounts").read_text()
    for arguments in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert str(folder) not in arguments.read_text()
        except OSError:  # it has ended
            continue
