"""What users of other training operators suffer from, and that it cannot happen here.

Fifteen things, by number. Three of them are known from serving, and are tested by what they come to in
training: new versions that need twice the machines (10), one fault that takes everything down (11), and
weights that every pod fetches for itself (12). What serving makes of them is for the resource that serves.
"""

import re
import sys
import threading

from support.api_server import ApiServer, DirectTransport
from support.cluster import Cluster
from support.fault_rig import Clock
from unmask_operator.control.manager import Manager
from unmask_operator.reconcilers import RECONCILERS
from unmask_operator.times import seconds, stamp


def running(**more: object) -> Cluster:
    cluster = Cluster({"spec." + key.replace("__", "."): value for key, value in more.items()})
    cluster.start()
    return cluster


def test_01_a_failed_job_is_not_run_again_when_its_child_is_deleted() -> None:
    cluster = running()
    cluster.fail(65)
    cluster.settle()
    made = list(cluster.made)
    for kind in ("Job", "Service", "ConfigMap"):
        cluster.children[kind].clear()
    cluster.children["Pod"].clear()
    cluster.now += 1_000_000
    cluster.settle()
    assert cluster.made == made
    assert cluster.condition("Failed") == ("True", "DataError")


def test_02_pods_do_not_leak_when_the_delete_after_a_deadline_is_lost() -> None:
    cluster = running(runPolicy__activeDeadlineSeconds=60)
    cluster.now += 60
    decision = cluster.step(writes=2)  # the event and the status, then the operator dies
    assert decision.delete
    assert cluster.condition("Failed") == ("True", "DeadlineExceeded")
    assert len(cluster.children["Job"]) == 1
    cluster.settle()
    assert cluster.children["Job"] == []
    assert cluster.children["Pod"] == []


def test_03_pods_find_each_other_by_name_before_they_are_ready_and_only_the_first_is_host() -> None:
    cluster = running(parallelism__nodes=2)
    (service,) = cluster.children["Service"]
    assert service["spec"]["publishNotReadyAddresses"] is True
    pod = cluster.job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    env = pod["containers"][0]["env"]
    assert env[0]["name"] == "JOB_COMPLETION_INDEX", "what follows refers to it"
    endpoint = next(one["value"] for one in env if one["name"] == "PET_RDZV_ENDPOINT")
    assert endpoint == "tiny-a0-0.tiny-a0.ml.svc:29400"
    assert "unmask_operator.launch.supervisor" in pod["containers"][0]["command"]


def test_04_one_lost_pod_restarts_the_whole_attempt_under_a_new_rendezvous() -> None:
    cluster = running(parallelism__nodes=2)
    before = _env(cluster, "PET_RDZV_ID")
    cluster.end_pod(1, 1)
    cluster.end_job("Failed")
    cluster.settle()
    cluster.now += 100
    cluster.settle()
    assert cluster.job["metadata"]["name"] == "tiny-a1"
    assert _env(cluster, "PET_RDZV_ID") != before


def test_05_preemption_does_not_use_up_restarts() -> None:
    cluster = running(runPolicy__maxRestarts=1)
    for _ in range(5):
        cluster.now += 100
        cluster.disrupt_pod(0)
        cluster.end_job("Failed")
        cluster.settle()
        assert cluster.status["failure"]["reason"] == "Disrupted"
        cluster.start()
    assert (cluster.status["restarts"], cluster.status["restartsCounted"]) == (5, 0)
    assert "Failed" not in cluster.status["state"]


def test_06_a_hang_is_seen_by_the_step_that_stays_and_not_by_a_process_that_still_answers() -> None:
    cluster = running(runPolicy__stallTimeoutSeconds=600)
    for _ in range(40):
        cluster.now += 15
        cluster.report(7)
        cluster.settle()
    assert cluster.status["attempt"] == 0
    for _ in range(3):
        cluster.now += 15
        if cluster.status["attempt"] == 0:
            cluster.report(7)
        cluster.settle()
    assert cluster.status["attempt"] == 1
    assert cluster.status["failure"]["reason"] == "Stalled"
    assert "step stayed at 7" in cluster.status["failure"]["message"]


def test_06_a_trainer_that_moves_is_never_taken_for_a_hang_nor_is_one_that_nobody_can_reach() -> None:
    moving = running(runPolicy__stallTimeoutSeconds=600)
    for step in range(30):
        moving.now += 500
        moving.report(step)
        moving.settle()
    out_of_reach = running(runPolicy__stallTimeoutSeconds=600)
    out_of_reach.now += 100_000
    out_of_reach.settle()
    assert moving.status["attempt"] == out_of_reach.status["attempt"] == 0


def test_07_progress_and_the_cause_of_a_failure_are_in_the_status() -> None:
    cluster = running()
    cluster.now += 15
    cluster.report(12, stage="blocks", loss="2.5")
    cluster.settle()
    assert cluster.status["progress"]["loss"] == "2.5"
    words = {"reason": "DataError", "exitCode": 65, "message": "train.jsonl:3: field 'text' is missing"}
    cluster.fail(65, message=words)
    cluster.settle()
    assert "train.jsonl:3" in cluster.message("Succeeded")
    assert ("Warning", "Failed") in cluster.events


def test_08_running_means_that_the_pods_of_this_attempt_run_and_for_this_generation() -> None:
    cluster = running(parallelism__nodes=2)
    assert cluster.condition("Running") == ("True", "Running")
    cluster.pods()[1]["status"]["conditions"][1]["status"] = "False"
    cluster.resource["metadata"]["generation"] = 2
    cluster.settle()
    assert cluster.condition("Running") == ("False", "Starting")
    observed = {one["observedGeneration"] for one in cluster.status["conditions"]}
    assert cluster.status["observedGeneration"] == 2
    assert 2 in observed


def test_09_a_new_operator_or_an_unrelated_edit_restarts_nothing() -> None:
    cluster = running()
    job = cluster.job["metadata"]["uid"]
    cluster.resource["metadata"]["annotations"] = {"note": "mine"}
    cluster.resource["metadata"]["generation"] = 2
    cluster.resource["spec"]["image"] = "registry.example/unmask:2"
    cluster.resource["spec"]["runPolicy"]["maxRestarts"] = 9
    cluster.settle()
    assert cluster.job["metadata"]["uid"] == job
    assert cluster.status["attempt"] == 0


def test_a_suspended_job_does_not_make_the_operator_busy() -> None:
    cluster = running()
    cluster.resource["spec"]["suspend"] = True
    decision = cluster.settle()
    assert decision.requeue_after is None
    assert not decision.events


def test_13_a_job_that_is_stuck_at_the_start_is_told_from_one_that_takes_long() -> None:
    stuck = Cluster({"spec.runPolicy": {"startupDeadlineSeconds": 100, "maxRestarts": 0}})
    stuck.settle()
    stuck.make_pods()
    stuck.now += 100
    stuck.settle()
    assert stuck.condition("Failed") == ("True", "StartupDeadlineExceeded")
    slow = running(runPolicy={"startupDeadlineSeconds": 100, "maxRestarts": 0})
    slow.now += 100_000
    slow.settle()
    assert slow.condition("Running") == ("True", "Running")


def test_15_nothing_has_to_be_installed_for_a_job_to_run() -> None:
    cluster = running(parallelism__nodes=2)
    kinds = {child["apiVersion"] for kind in cluster.children.values() for child in kind}
    assert kinds == {"v1", "batch/v1"}


def test_10_two_attempts_never_hold_machines_side_by_side() -> None:
    cluster = running()
    cluster.fail(1)
    for _ in range(5):
        cluster.now += 1000
        cluster.step()  # the old Job is being deleted, but its pods take their time
    assert cluster.made.count("tiny-a1") == 0
    assert cluster.status["state"] == "Restarting"
    cluster.settle()
    assert cluster.made.count("tiny-a1") == 1


def test_10_another_size_needs_no_second_set_of_machines() -> None:
    cluster = running(elastic={"minNodes": 1, "maxNodes": 4})
    cluster.resource["spec"]["parallelism"]["nodes"] = 4
    cluster.settle()
    cluster.run()
    cluster.settle()
    assert [pod["metadata"]["name"] for pod in cluster.children["Pod"]] == [f"tiny-a0-{n}" for n in range(4)]


def test_11_a_lost_machine_of_an_elastic_job_takes_only_its_own_pod_with_it() -> None:
    cluster = running(parallelism__nodes=4, elastic={"minNodes": 2, "maxNodes": 4})
    spec = cluster.job["spec"]
    assert spec["backoffLimit"] > 0
    disruption = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert disruption in spec["podFailurePolicy"]["rules"]
    cluster.disrupt_pod(3)
    cluster.settle()
    assert (cluster.status["attempt"], cluster.status["restarts"]) == (0, 0)
    assert cluster.condition("Running") == ("True", "Running")
    assert cluster.status["nodes"] == {"desired": 4, "ready": 3, "failed": 1}


def test_12_weights_and_data_are_mounted_and_fetched_by_no_pod() -> None:
    cluster = running(model={"init": {"uri": "pvc://models/base"}}, parallelism__nodes=2)
    pod = cluster.job["spec"]["template"]["spec"]
    claims = {
        one["persistentVolumeClaim"]["claimName"]
        for one in pod["volumes"]
        if len(one) == 2 and "persistentVolumeClaim" in one
    }
    assert claims == {"data", "models", "run"}
    assert "initContainers" not in pod


def test_13_no_probe_ends_a_pod_that_takes_its_time() -> None:
    (container,) = running().job["spec"]["template"]["spec"]["containers"]
    assert not [key for key in container if key.endswith("Probe")]


def test_13_there_is_time_to_save_before_a_pod_is_ended() -> None:
    cluster = running(terminationGracePeriodSeconds=600)
    assert cluster.job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 600
    assert _env(cluster, "UNMASK_GRACE_SECONDS") == "600"


def test_14_an_operator_that_is_told_nothing_any_more_says_so() -> None:
    server, clock = ApiServer(), Clock()
    manager = Manager(
        DirectTransport(server), clock, RECONCILERS, identity="one", namespace=None, lease_namespace="system"
    )
    for cache in manager.caches.values():
        cache.step()
    assert (manager.ready(), manager.alive()) == ("", "")
    server.refusal = lambda request: (503, "ServiceUnavailable", "no") if "/pods" in request.path else None
    stop = threading.Event()
    while clock.time < 1_000 + 600 and not stop.is_set():
        for cache in manager.caches.values():
            if cache.resource.plural != "pods":
                cache.step()
        clock.time += 30
    assert manager.ready() == "Pod out of date"
    assert "watch of Pod hangs" in manager.alive(), "the kubelet starts it anew"


def test_each_of_the_fifteen_has_a_test() -> None:
    names = [name for name in dir(sys.modules[__name__]) if name.startswith("test_")]
    assert {match[1] for name in names if (match := re.match(r"test_(\d\d)_", name))} == {
        f"{number:02}" for number in range(1, 16)
    }


def test_times_survive_the_status() -> None:
    assert seconds(stamp(1_800_000_000.9)) == 1_800_000_000
    assert seconds("2027-01-15T09:00:00+01:00") == seconds("2027-01-15T08:00:00Z")
    assert (seconds(None), seconds("soon"), seconds("")) == (None, None, None)


def _env(cluster: Cluster, name: str) -> str:
    env = cluster.job["spec"]["template"]["spec"]["containers"][0]["env"]
    return str(next(one["value"] for one in env if one["name"] == name))
