"""The clusters that other tests stand on: they start, they work, nothing of them is left."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from parent_death import bound
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


STARTERS = {
    "a test with an operator": """
import json, sys, time
from pathlib import Path
from support.operated import operating, until
with operating(Path(sys.argv[1])) as one:
    until(lambda: " leading" in one.log(), "the operator leads")
    print(json.dumps({"kubeconfig": str(one.server.plane.pki / "admin.kubeconfig")}), flush=True)
    time.sleep(600)
""",
    "a test with a cluster": """
import json, time
from support import real_clusters
with real_clusters.running("api") as cluster:
    print(json.dumps({"kubeconfig": str(cluster.kubeconfig)}), flush=True)
    time.sleep(600)
""",
    "a cluster's program": "from real_cluster import running; running.main()",
}


PROGRAMS = {"etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"}


def processes_of(folder: Path) -> dict[int, str]:
    """Return the processes whose command lines name a folder: id -> program."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            if str(folder) in (text := path.read_text()):
                found[int(path.parent.name)] = Path(text.partition("\0")[0]).name
    return found


@pytest.mark.slow
@pytest.mark.real_api
@pytest.mark.parametrize("starter", STARTERS)
def test_nothing_outlives_a_starter_that_is_killed(starter: str, tmp_path: Path) -> None:
    paths = [Path(__file__).parents[1], Path(program.__file__).parents[1]]
    command = [sys.executable, "-c", STARTERS[starter]]
    command.append("api" if starter == "a cluster's program" else str(tmp_path))
    with subprocess.Popen(
        bound(command),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, f"exit code {process.wait()}"
            folder = Path(json.loads(line)["kubeconfig"]).parents[1]

            def started() -> list[str]:
                return [name for pid, name in processes_of(folder).items() if pid != process.pid]

            many = len(PROGRAMS) + (starter == "a test with an operator")
            until(lambda: len(started()) == many and PROGRAMS <= set(started()), lambda: str(started()))
        finally:
            process.kill()
    until(lambda: not processes_of(folder), lambda: str(processes_of(folder)))


def until(true: Callable[[], bool], told: Callable[[], str]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, told()
        time.sleep(0.1)


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
        own = f"{program._CGROUP}{folder.name.partition('-')[0]}"  # other clusters may be running
        groups = [root / own for root in program._hierarchies() if (root / own).exists()]
        assert groups
    assert not folder.exists()
    assert not [group for group in groups if group.exists()]
    assert str(folder) not in Path("/proc/mounts").read_text()
    assert not processes_of(folder)
