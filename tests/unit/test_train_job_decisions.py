"""What the operator decides about a training job, rule by rule, on a cluster of a few lines."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support import counts
from support.cluster import RECONCILER, START, Cluster
from unmask_operator.decision import Answer, Decision
from unmask_operator.times import seconds, stamp
from unmask_operator.training import Settings, reconciler

TWO_NODES = {"spec.parallelism.nodes": 2}
EXIT = {
    "reason": "DataError",
    "exitCode": 65,
    "message": "train.jsonl:3: field 'text' is missing",
    "step": 4,
}


def failing(values: dict[str, Any] | None = None) -> Cluster:
    cluster = Cluster(values)
    cluster.start()
    return cluster


# --- making an attempt --------------------------------------------------------------------------------


def test_a_new_job_gets_job_file_service_and_indexed_job_in_that_order_and_says_so() -> None:
    cluster = Cluster()
    cluster.settle()
    assert cluster.made == ["ConfigMap/tiny-a0", "Service/tiny-a0", "tiny-a0"]
    assert cluster.status["attempt"] == 0
    assert cluster.status["state"] == "Starting"
    assert cluster.condition("Succeeded") == ("Unknown", "Active")
    assert ("Normal", "Starting") in cluster.events


def test_a_job_under_deletion_and_one_of_another_manager_are_left_alone() -> None:
    cluster = Cluster({"spec.managedBy": "kueue.x-k8s.io/multikueue"})
    assert cluster.step() == Decision()
    cluster = Cluster()
    cluster.resource["metadata"]["deletionTimestamp"] = stamp(START)
    assert cluster.step() == Decision()


def test_without_an_image_a_job_waits_for_one_and_says_so_once() -> None:
    observed = Cluster().observe()
    decision = reconciler(Settings()).decide(observed)
    assert not decision.apply
    assert decision.requeue_after is None
    stalled = next(one for one in (decision.status or {})["conditions"] if one["type"] == "Stalled")
    assert stalled["reason"] == "InvalidSpec"
    assert "spec.image" in stalled["message"]


@pytest.mark.parametrize(
    ("values", "served", "says"),
    [
        ({"spec.scheduling": {"gang": {"mode": "Native"}}}, (), "Native"),
        ({"spec.scheduling": {"gang": {"mode": "Kueue"}, "queueName": "q"}}, (), "Kueue"),
        ({"spec.scheduling": {"queueName": "q"}}, (), "Auto"),
        ({"spec.scheduling": {"gang": {"mode": "Volcano"}, "schedulerName": "volcano"}}, (), "Volcano"),
    ],
)
def test_a_gang_that_the_cluster_cannot_start_is_said_not_ignored(
    values: dict[str, Any], served: tuple[str, ...], says: str
) -> None:
    cluster = Cluster(values, served=served)
    cluster.settle()
    assert cluster.made == []
    assert cluster.condition("Stalled") == ("True", "GangUnsupported")
    assert says in cluster.message("Stalled")


def test_pods_that_nothing_starts_together_get_a_warning() -> None:
    cluster = Cluster(TWO_NODES)
    cluster.settle()
    assert ("Warning", "NoGangScheduling") in cluster.events


def test_volcano_is_told_how_many_pods_belong_together() -> None:
    volcano = {"spec.scheduling": {"schedulerName": "volcano"}} | TWO_NODES
    cluster = Cluster(volcano, served=["scheduling.volcano.sh/v1beta1"])
    cluster.settle()
    annotations = cluster.job["metadata"]["annotations"]
    assert annotations == {"scheduling.volcano.sh/group-min-member": "2"}


def test_a_native_pod_group_is_made_where_the_cluster_keeps_them() -> None:
    cluster = Cluster(TWO_NODES, served=["scheduling.k8s.io/v1beta1"])
    cluster.children["PodGroup"] = []
    cluster.settle()
    assert "PodGroup/tiny-a0" in cluster.made
    group = cluster.children["PodGroup"][0]
    assert group["spec"]["schedulingPolicy"] == {"gang": {"minCount": 2}}
    assert cluster.job["spec"]["template"]["spec"]["schedulingGroup"] == {"podGroupName": "tiny-a0"}


def test_a_gang_that_the_api_server_drops_from_the_pods_is_reported() -> None:
    cluster = Cluster(TWO_NODES, served=["scheduling.k8s.io/v1beta1"])
    cluster.children["PodGroup"] = []
    cluster.step()
    assert cluster.condition("GangScheduled") == ("True", "Native")
    del cluster.job["spec"]["template"]["spec"]["schedulingGroup"]  # as with the gate off
    cluster.settle()
    assert cluster.condition("GangScheduled") == ("False", "SchedulingGroupDropped")
    assert ("Warning", "SchedulingGroupDropped") in cluster.events
    assert cluster.status["attempt"] == 0, "it runs, if not all together"


def test_who_starts_the_pods_together_is_said_and_of_one_pod_nothing() -> None:
    alone, many = Cluster(), Cluster(TWO_NODES)
    alone.settle()
    many.settle()
    assert alone.condition("GangScheduled") is None
    assert many.condition("GangScheduled") == ("False", "NotInstalled")


# --- another job's model ------------------------------------------------------------------------------

FROM_JOB = {"spec.model": {"init": {"job": {"name": "first"}}}}


def other(*conditions: str, **spec: Any) -> dict[str, Any]:
    """The job whose model is waited for."""
    stages = [{"name": "a", "export": True}, {"name": "b"}, {"name": "c", "merge": {"best": 2}}]
    return {
        "metadata": {"name": "first"},
        "spec": {"checkpoint": {"uri": "pvc://models/first/"}, "stages": stages} | spec,
        "status": {
            "state": "Running",
            "conditions": [{"type": kind, "status": "True", "message": "as told"} for kind in conditions],
        },
    }


def test_a_job_waits_for_the_job_whose_model_it_begins_with_and_then_keeps_where_it_lay() -> None:
    cluster = Cluster(FROM_JOB)
    cluster.settle()
    assert cluster.made == []
    assert cluster.condition("Stalled") == ("True", "ModelJobMissing")
    cluster.referred = {"first": other()}
    assert cluster.settle().requeue_after is None, "it is told when that changes"
    assert cluster.condition("ModelReady") == ("False", "WaitingForJob")
    assert cluster.condition("Stalled") == ("False", "WaitingForJob")
    assert cluster.status["state"] == "Waiting"
    cluster.referred = {"first": other("Complete")}
    cluster.start()
    assert cluster.condition("ModelReady") == ("True", "Found")
    assert cluster.status["modelUri"] == "pvc://models/first/model"
    given = json.loads(cluster.children["ConfigMap"][0]["data"]["job.json"])
    assert given["spec"]["model"]["init"] == {"uri": "/volumes/models/first/model"}
    cluster.referred = {}
    cluster.now += 100
    cluster.fail(75)
    cluster.start()
    assert cluster.job["metadata"]["name"] == "tiny-a1", "the other job may be gone by then"
    given = json.loads(cluster.children["ConfigMap"][0]["data"]["job.json"])
    assert given["spec"]["model"]["init"] == {"uri": "/volumes/models/first/model"}


@pytest.mark.parametrize(
    ("export", "there", "reason", "says"),
    [
        (
            None,
            other("Failed"),
            "ModelJobFailed",
            "job first, whose model is needed here, failed: as told",
        ),
        ("b", other("Complete"), "ModelJobFailed", "exports no stage b: it exports a, c"),
        ("x", other(stages=[{"name": "x"}]), "ModelJobFailed", "exports no stage x: it exports none"),
    ],
)
def test_a_model_that_will_never_come_fails_the_job_and_says_why(
    export: str | None, there: dict[str, Any], reason: str, says: str
) -> None:
    source = {"name": "first"} | ({"export": export} if export else {})
    cluster = Cluster({"spec.model": {"init": {"job": source}}})
    cluster.referred = {"first": there}
    cluster.settle()
    assert cluster.condition("Failed") == ("True", reason)
    assert says in cluster.message("Failed")
    assert says in cluster.status["failure"]["message"]
    assert cluster.made == []


@pytest.mark.parametrize("export", ["a", "c"])
def test_an_export_of_a_stage_can_be_begun_with(export: str) -> None:
    cluster = Cluster({"spec.model": {"init": {"job": {"name": "first", "export": export}}}})
    cluster.referred = {"first": other("Complete")}
    cluster.settle()
    assert cluster.status["modelUri"] == f"pvc://models/first/exports/{export}"


def test_a_job_that_nobody_makes_is_not_waited_for_for_ever() -> None:
    cluster = Cluster(FROM_JOB | {"spec.runPolicy.startupDeadlineSeconds": 600})
    assert cluster.settle().requeue_after == 600
    cluster.now += 599
    cluster.settle()
    assert cluster.condition("Failed") == ("False", "Active")
    cluster.now += 1
    cluster.settle()
    assert cluster.condition("Failed") == ("True", "ModelJobMissing")
    assert "startupDeadlineSeconds (600 s)" in cluster.message("Failed")


def test_what_stands_in_the_way_of_a_child_is_in_the_status_and_it_is_tried_again() -> None:
    cluster = Cluster()
    cluster.conflicts = frozenset({("Service", "tiny-a0")})
    cluster.step()
    assert cluster.condition("Stalled") == ("True", "NameConflict")
    assert "Service tiny-a0 belongs to somebody else" in cluster.message("Stalled")
    cluster.conflicts = frozenset()
    cluster.rejections = {("Job", "tiny-a0"): "exceeded quota: gpus"}
    cluster.step()
    assert cluster.condition("Stalled") == ("True", "Refused")
    assert "exceeded quota: gpus" in cluster.message("Stalled")
    cluster.rejections = {}
    cluster.settle()
    assert "tiny-a0" in cluster.made
    assert cluster.condition("Stalled") == ("False", "Following")


def test_a_path_that_leaves_its_volume_is_refused_before_anything_is_made() -> None:
    cluster = Cluster({"spec.checkpoint.uri": "pvc://run/../other"})
    cluster.settle()
    assert cluster.made == []
    assert "leaves volume run" in cluster.message("Stalled")


# --- waiting and running --------------------------------------------------------------------------------


def test_pods_without_a_place_are_reported_with_the_schedulers_words() -> None:
    cluster = Cluster(TWO_NODES)
    cluster.settle()
    pods = cluster.make_pods()
    condition = {
        "type": "PodScheduled",
        "status": "False",
        "message": "0/3 nodes: insufficient nvidia.com/gpu",
    }
    pods[1]["status"]["conditions"] = [condition]
    decision = cluster.settle()
    assert cluster.condition("Scheduled") == ("False", "Unschedulable")
    assert "insufficient nvidia.com/gpu" in cluster.message("Scheduled")
    assert decision.requeue_after == 600
    cluster.now += 600
    cluster.settle()
    assert ("Warning", "Unschedulable") in cluster.events


def test_an_image_that_cannot_be_pulled_is_named_while_waiting_and_in_the_failure() -> None:
    cluster = Cluster({"spec.runPolicy.maxRestarts": 0})
    cluster.settle()
    waiting = {"reason": "ImagePullBackOff", "message": "no such image"}
    cluster.make_pods()[0]["status"]["containerStatuses"] = [
        {"name": "trainer", "state": {"waiting": waiting}}
    ]
    cluster.settle()
    assert "ImagePullBackOff: no such image" in cluster.message("Running")
    cluster.now += 1800
    cluster.settle()
    assert cluster.condition("Failed") == ("True", "StartupDeadlineExceeded")
    assert "ImagePullBackOff: no such image" in cluster.message("Failed")


def warning(note: str, uid: str, at: float, **more: Any) -> dict[str, Any]:
    """An event about the object with ``uid``, last seen at ``at``."""
    return {
        "metadata": {"name": note, "creationTimestamp": stamp(at)},
        "regarding": {"uid": uid},
        "note": note,
    } | more


def test_pods_that_are_refused_are_reported_with_the_newest_of_the_clusters_words() -> None:
    cluster = Cluster(TWO_NODES)
    cluster.settle()
    uid = cluster.job["metadata"]["uid"]
    quota = 'Error creating: pods "tiny-a0-0-x7k2p" is forbidden: exceeded quota: gpus, limited: gpu=0'
    account = 'Error creating: pods "tiny-a0-0-q3k9w" is forbidden: serviceaccount "a" not found'
    series = {"series": {"lastObservedTime": stamp(START + 9)}}
    cluster.children["JobWarning"] = [
        warning(account, uid, START + 5),
        warning(quota, uid, START, **series),
        warning("of another job", "another", START + 99),
    ]
    cluster.settle()
    assert cluster.condition("Scheduled") == ("False", "QuotaExceeded")
    assert cluster.message("Scheduled") == "a pod is forbidden: exceeded quota: gpus, limited: gpu=0"
    del cluster.children["JobWarning"][1]
    cluster.settle()
    assert cluster.condition("Scheduled") == ("False", "PodsRefused")
    cluster.run()
    cluster.settle()
    assert cluster.condition("Scheduled") == ("True", "Scheduled"), "what was said before is over"


def test_a_volume_that_cannot_be_mounted_is_reported_until_the_pod_runs() -> None:
    cluster = Cluster()
    cluster.settle()
    (pod,) = cluster.make_pods()
    pod["status"] = {
        "phase": "Pending",
        "containerStatuses": [{"state": {"waiting": {"reason": "ContainerCreating"}}}],
    }
    cluster.children["PodWarning"] = [warning('secret "key" not found', pod["metadata"]["uid"], START)]
    cluster.settle()
    assert cluster.condition("Running") == ("False", "VolumeUnavailable")
    assert cluster.message("Running") == 'tiny-a0-0: secret "key" not found'
    cluster.run()
    cluster.settle()
    assert cluster.condition("Running") == ("True", "Running")


def test_startup_deadline_counts_from_admission_not_from_the_queue() -> None:
    queue = {"spec.scheduling.queueName": "team"}
    cluster = Cluster(queue, served=["kueue.x-k8s.io/v1beta2"])
    cluster.settle()
    cluster.now += 100_000
    cluster.settle()
    assert cluster.condition("Admitted") == ("False", "WaitingForQuota")
    cluster.job["spec"]["suspend"] = False
    cluster.job["status"]["startTime"] = stamp(cluster.now)
    cluster.settle()
    assert cluster.condition("Running") == ("False", "Starting")
    assert cluster.status["attempt"] == 0


def test_progress_of_the_first_pod_comes_into_the_status() -> None:
    cluster = failing()
    decision = cluster.step()
    assert [one.url for one in decision.ask] == ["http://10.0.0.1:9091/progress"]
    assert decision.requeue_after == 15
    cluster.now += 15
    cluster.report(
        8, stage="blocks", loss="1.25", secondsPerStep="2.5", checkpoint={"step": 8, "uri": "/volumes/run/x"}
    )
    cluster.settle()
    progress = cluster.status["progress"]
    assert progress["step"] == 8
    assert progress["percentage"] == 25
    assert progress["stage"] == "blocks"
    assert progress["estimatedRemainingSeconds"] == 60
    assert progress["lastProgressTime"] == stamp(cluster.now)
    assert cluster.status["checkpoint"]["latestStep"] == 8
    cluster.now += 15
    cluster.report(8)
    cluster.settle()
    assert cluster.status["progress"]["lastProgressTime"] == stamp(cluster.now - 15)
    assert cluster.status["progress"]["lastReportTime"] == stamp(cluster.now)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"<html>",
        b"[]",
        b"{}",
        b'{"attempt": 0, "step": -1, "totalSteps": 2}',
        b'{"attempt": 0, "step": "1", "totalSteps": 2}',
        b'{"attempt": 7, "step": 1, "totalSteps": 2}',
        b'{"attempt": 0, "step": 1, "totalSteps": 2, "loss": "nan"}',
        b'{"attempt": 0, "step": 1, "totalSteps": 2, "stage": "' + b"x" * 5000 + b'"}',
        b"\xff\xfe",
        b'{"attempt": 0, "step": 1e400, "totalSteps": 2}',
    ],
)
def test_an_answer_that_is_no_report_changes_nothing(text: bytes) -> None:
    cluster = failing()
    before = json.dumps(cluster.status)
    cluster.answers[cluster.pods()[0]["metadata"]["uid"]] = Answer(text, cluster.now)
    cluster.settle()
    assert json.dumps(cluster.status) == before


def hanging() -> Cluster:
    """Two pods whose step has stood still for long enough."""
    cluster = failing(TWO_NODES | {"spec.runPolicy.stallTimeoutSeconds": 600})
    cluster.report(7)
    cluster.settle()
    cluster.now += 600
    cluster.report(7)
    return cluster


def test_before_an_attempt_that_hangs_is_ended_its_processes_are_asked_where_they_are() -> None:
    cluster = hanging()
    decision = cluster.step()
    assert cluster.condition("Hung") == ("True", "StepStands")
    assert [one.url for one in decision.ask] == [f"http://10.0.0.{n}:9091/stacks" for n in (1, 2)]
    assert (decision.requeue_after, cluster.status["attempt"]) == (10, 0)
    for number, pod in enumerate(cluster.pods()):
        said = {"attempt": 0, "stacks": [f"rank {number} is in all_reduce (distributed.py:88)"]}
        cluster.answers[pod["metadata"]["uid"]] = Answer(json.dumps(said).encode(), cluster.now)
    cluster.now += 9
    decision = cluster.step()
    assert (decision.ask, decision.requeue_after) == ((), 1)
    cluster.now += 1
    cluster.settle()
    assert cluster.status["attempt"] == 1
    assert cluster.status["failure"]["reason"] == "Stalled"
    assert (
        "; rank 0 is in all_reduce (distributed.py:88); rank 1 is in" in cluster.status["failure"]["message"]
    )
    assert cluster.condition("Hung") is None


def test_an_attempt_that_does_not_say_where_it_hangs_is_ended_all_the_same() -> None:
    cluster = hanging()
    cluster.step()
    for text in (b"{}", b"<html>", b'{"attempt": 9, "stacks": ["of another attempt"]}'):
        cluster.answers[cluster.pods()[0]["metadata"]["uid"]] = Answer(text, cluster.now)
        assert cluster.step().ask, "asked again"
    cluster.now += 10
    cluster.settle()
    assert cluster.status["attempt"] == 1
    assert "of another attempt" not in cluster.status["failure"]["message"]


# --- ends ---------------------------------------------------------------------------------------------


def test_a_complete_job_keeps_its_last_words_and_its_time() -> None:
    cluster = failing()
    cluster.report(30, stage="pretrain")
    cluster.settle()
    cluster.now += 60
    words = {"reason": "Completed", "exitCode": 0, "message": "tiny is complete", "step": 32}
    cluster.end_pod(0, 0, message=words | {"checkpoint": "pvc://run/checkpoints/step-00000032"})
    cluster.end_job("Complete")
    cluster.settle()
    assert cluster.condition("Complete") == ("True", "Completed")
    assert cluster.condition("Succeeded") == ("True", "Completed")
    assert cluster.message("Complete") == "tiny is complete"
    assert cluster.status["progress"]["percentage"] == 100
    assert cluster.status["progress"]["stage"] == "answers"
    assert cluster.status["checkpoint"] == {
        "latestStep": 32,
        "latestUri": "pvc://run/checkpoints/step-00000032",
        "lastSavedTime": stamp(cluster.now),
    }
    assert cluster.status["completionTime"] == stamp(cluster.now)
    assert cluster.status["state"] == "Succeeded"
    assert len(cluster.children["Job"]) == 1, "its pods keep their logs"


def test_a_job_that_is_only_about_to_fail_is_waited_for() -> None:
    cluster = failing(TWO_NODES)
    cluster.end_pod(1, 1)
    cluster.job["status"]["conditions"] = [{"type": "FailureTarget", "status": "True"}]
    cluster.settle()
    assert cluster.status["attempt"] == 0
    assert "tiny-a0-1 failed" in cluster.message("Running")


@pytest.mark.parametrize(
    ("exit_code", "message", "reason", "word", "follows"),
    [
        (64, "", "Error", "UsageError", "Failed"),
        (65, EXIT, "Error", "DataError", "Failed"),
        (66, "", "Error", "ModelError", "Failed"),
        (71, "", "Error", "Diverged", "Failed"),
        (1, "", "Error", "Failed", "counted"),
        (70, "", "Error", "Hung", "counted"),
        (75, "", "Error", "Saved", "uncounted"),
        (137, "", "OOMKilled", "OutOfMemory", "counted"),
        (137, {"reason": "OutOfMemory", "exitCode": 137}, "Error", "OutOfMemory", "counted"),
        (128, "exec: no such file", "StartError", "ContainerCannotStart", "counted"),
        (139, "", "Error", "Failed", "counted"),
    ],
)
def test_what_follows_from_how_the_first_pod_ended(
    exit_code: int, message: object, reason: str, word: str, follows: str
) -> None:
    cluster = failing()
    cluster.now += 300
    cluster.fail(exit_code, message=message, reason=reason)
    cluster.settle()
    failure = cluster.status["failure"]
    assert (failure["reason"], failure["exitCode"]) == (word, exit_code)
    assert (failure["pod"], failure["node"], failure["attempt"]) == ("tiny-a0-0", "node-0", 0)
    if follows == "Failed":
        assert cluster.condition("Failed") == ("True", word)
        assert (cluster.status["attempt"], cluster.status["restarts"]) == (0, 0)
    else:
        assert cluster.status["attempt"] == 1
        assert cluster.status["restarts"] == 1
        assert cluster.status["restartsCounted"] == (follows == "counted")
        assert cluster.condition("Restarting") is not None


def test_the_cause_is_the_first_pod_that_failed_and_not_those_that_followed() -> None:
    cluster = failing({"spec.parallelism.nodes": 4})
    cluster.now += 100
    cluster.end_pod(2, 65, message=EXIT)
    cluster.end_pod(0, 143)  # in the same second, ended because of the other
    cluster.now += 3
    cluster.end_pod(1, 1)
    cluster.end_job("Failed")
    cluster.settle()
    assert cluster.status["failure"]["pod"] == "tiny-a0-2"
    assert cluster.message("Failed").startswith("train.jsonl:3: field 'text' is missing")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Traceback (most recent call last):\n  x\nKeyError: 'a'\n",
        '{"reason": "Dat',
        '{"reason": 1}',
        "[]",
    ],
)
def test_a_termination_message_that_is_cut_off_or_a_log_still_gives_a_cause(text: str) -> None:
    cluster = failing()
    cluster.fail(1, message=text)
    cluster.settle()
    message = cluster.status["failure"]["message"]
    assert message.startswith("tiny-a0-0 ended with exit code 1")
    assert "KeyError" in message or "Traceback" not in text


def test_out_of_memory_twice_in_a_row_fails_the_job_and_says_what_to_change() -> None:
    cluster = failing()
    for _ in range(2):
        cluster.fail(137, reason="OOMKilled")
        cluster.settle()
        cluster.now += 3600
        if not cluster.status.get("completionTime"):
            cluster.start()
    assert cluster.condition("Failed") == ("True", "OutOfMemory")
    assert "microBatchRows" in cluster.message("Failed")
    assert cluster.status["restarts"] == 1


def test_restarts_end_at_the_limit_and_the_pauses_double() -> None:
    cluster = failing({"spec.runPolicy.maxRestarts": 3})
    pauses = []
    for _ in range(3):
        cluster.fail(1)
        failed = cluster.now
        decision = cluster.settle()
        pause = (seconds(cluster.status["nextAttemptTime"]) or 0) - failed
        pauses.append(pause)
        assert decision.requeue_after == pause
        made = len(cluster.made)
        cluster.now += pause - 1
        cluster.settle()
        assert len(cluster.made) == made, "not before the pause is over"
        cluster.now += 1
        cluster.start()
    assert pauses == [10, 20, 40]
    cluster.fail(1)
    cluster.settle()
    assert cluster.condition("Failed") == ("True", "Failed")
    assert "runPolicy.maxRestarts is 3" in cluster.message("Failed")
    assert [one["attempt"] for one in cluster.status["history"]] == [0, 1, 2, 3]


def test_an_attempt_that_ran_long_starts_the_pauses_over() -> None:
    cluster = failing({"spec.runPolicy.maxRestarts": 9})
    for _ in range(2):
        cluster.fail(1)
        cluster.settle()
        cluster.now += 100
        cluster.start()
    cluster.now += 3600
    cluster.fail(1)
    cluster.settle()
    assert (seconds(cluster.status["nextAttemptTime"]) or 0) - cluster.now == 10


@pytest.mark.parametrize(
    ("rule", "exit_code", "follows"),
    [
        ({"action": "Fail", "onExitCodes": {"values": [1]}}, 1, "Failed"),
        ({"action": "Fail", "onExitCodes": {"values": [2]}}, 1, "counted"),
        ({"action": "Fail", "onExitCodes": {"operator": "NotIn", "values": [2]}}, 1, "Failed"),
        ({"action": "Restart", "onExitCodes": {"values": [65]}}, 65, "counted"),
        ({"action": "RestartIgnoreLimit", "onReasons": ["Hung"]}, 70, "uncounted"),
        ({"action": "RestartIgnoreLimit", "onReasons": ["Hung"]}, 1, "counted"),
        ({"action": "Fail", "onReasons": ["Hung"], "onExitCodes": {"values": [1]}}, 70, "counted"),
    ],
)
def test_the_rules_of_the_manifest_come_before_the_usual_ones(
    rule: dict[str, Any], exit_code: int, follows: str
) -> None:
    cluster = failing({"spec.runPolicy.failureRules": [{"name": "mine"} | rule]})
    cluster.fail(exit_code)
    cluster.settle()
    if follows == "Failed":
        assert cluster.condition("Failed") is not None
        assert "failure rule mine says so" in cluster.message("Failed")
    else:
        assert cluster.status["restartsCounted"] == (follows == "counted")


# --- suspension, queues, size -------------------------------------------------------------------------


def test_a_suspended_job_has_no_pods_and_goes_on_as_a_new_uncounted_attempt() -> None:
    cluster = failing({"spec.runPolicy.activeDeadlineSeconds": 1000})
    cluster.resource["spec"]["suspend"] = True
    cluster.step()
    assert [one["metadata"].get("deletionTimestamp") for one in cluster.children["Job"]] == [stamp(START)]
    cluster.settle()
    assert cluster.children["Job"] == []
    assert cluster.condition("Suspended") == ("True", "Suspended")
    assert "startTime" not in cluster.status
    cluster.now += 5000
    decision = cluster.settle()
    assert decision.requeue_after is None, "no timer runs while a job is suspended"
    assert cluster.condition("Failed") == ("False", "Active")
    cluster.resource["spec"]["suspend"] = False
    cluster.start()
    assert cluster.made[-1] == "tiny-a1"
    assert (cluster.status["restarts"], cluster.status["restartsCounted"]) == (1, 0)
    assert cluster.status["state"] == "Running"


def test_a_job_that_starts_suspended_makes_nothing_and_uses_no_attempt() -> None:
    cluster = Cluster({"spec.suspend": True})
    cluster.settle()
    assert cluster.made == []
    cluster.resource["spec"]["suspend"] = False
    cluster.settle()
    assert cluster.made[-1] == "tiny-a0"


def test_an_eviction_by_the_queue_is_no_failure_and_suspend_is_left_to_the_queue() -> None:
    cluster = Cluster({"spec.scheduling.queueName": "team"}, served=["kueue.x-k8s.io/v1beta2"])
    cluster.settle()
    applied = next(one for one in RECONCILER.decide(Cluster().observe()).apply if one["kind"] == "Job")
    assert applied["spec"]["suspend"] is False
    assert cluster.job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    cluster.job["spec"]["suspend"] = False
    cluster.run()
    cluster.settle()
    assert cluster.condition("Admitted") == ("True", "Admitted")
    cluster.job["spec"]["suspend"] = True
    cluster.children["Pod"].clear()
    for _ in range(3):
        cluster.settle()
        cluster.now += 60
    assert cluster.condition("Admitted") == ("False", "Evicted")
    assert (cluster.status["attempt"], cluster.status["state"]) == (0, "Queued")
    assert "startTime" not in cluster.status


def test_an_elastic_job_is_given_more_nodes_without_a_new_attempt() -> None:
    cluster = failing({"spec.elastic": {"minNodes": 1, "maxNodes": 4}})
    cluster.resource["spec"]["parallelism"]["nodes"] = 4
    cluster.settle()
    assert (cluster.job["spec"]["parallelism"], cluster.job["spec"]["completions"]) == (4, 4)
    assert cluster.status["attempt"] == 0
    assert cluster.status["nodes"]["desired"] == 4


def test_an_elastic_job_in_a_queue_asks_it_anew() -> None:
    values = {"spec.elastic": {"minNodes": 1, "maxNodes": 4}, "spec.scheduling.queueName": "team"}
    cluster = Cluster(values, served=["kueue.x-k8s.io/v1beta2"])
    cluster.settle()
    cluster.job["spec"]["suspend"] = False
    cluster.run()
    cluster.settle()
    cluster.resource["spec"]["parallelism"]["nodes"] = 2
    cluster.settle()
    assert cluster.job["metadata"]["name"] == "tiny-a1"
    assert cluster.job["spec"]["completions"] == 2
    assert cluster.status["restartsCounted"] == 0


def test_an_elastic_job_that_waits_in_a_queue_is_resized_and_stays_suspended() -> None:
    values = {"spec.elastic": {"minNodes": 1, "maxNodes": 4}, "spec.scheduling.queueName": "team"}
    cluster = Cluster(values, served=["kueue.x-k8s.io/v1beta2"])
    cluster.settle()
    cluster.resource["spec"]["parallelism"]["nodes"] = 2
    (resized,) = [one for one in cluster.step(writes=0).apply if one["kind"] == "Job"]
    assert resized["metadata"]["name"] == "tiny-a0"
    assert (resized["spec"]["parallelism"], resized["spec"]["completions"]) == (2, 2)
    assert resized["spec"]["suspend"] is True


def test_the_next_attempt_in_a_queue_waits_for_quota_and_was_not_evicted() -> None:
    cluster = Cluster({"spec.scheduling.queueName": "team"}, served=["kueue.x-k8s.io/v1beta2"])
    cluster.settle()
    cluster.job["spec"]["suspend"] = False
    cluster.run()
    cluster.settle()
    cluster.fail(75)
    cluster.now += 600
    cluster.settle()
    assert cluster.job["metadata"]["name"] == "tiny-a1"
    assert cluster.condition("Admitted") == ("False", "WaitingForQuota")


def test_the_time_limit_ends_the_job_and_its_pods() -> None:
    cluster = failing({"spec.runPolicy.activeDeadlineSeconds": 1000})
    cluster.now += 999
    assert cluster.settle().requeue_after == 1
    cluster.now += 1
    cluster.settle()
    assert cluster.condition("Failed") == ("True", "DeadlineExceeded")
    assert cluster.children["Job"] == []


@pytest.mark.parametrize(("cleanup", "left"), [("Running", 1), ("All", 0), ("None", 1)])
def test_what_a_finished_job_leaves_behind(cleanup: str, left: int) -> None:
    cluster = failing({"spec.runPolicy.podCleanup": cleanup})
    cluster.end_job("Complete")
    cluster.settle()
    assert len(cluster.children["Job"]) == left


def test_the_time_to_live_deletes_the_job_itself() -> None:
    cluster = failing({"spec.runPolicy.ttlSecondsAfterFinished": 60})
    cluster.end_job("Complete")
    assert cluster.settle().requeue_after == 60
    cluster.now += 60
    cluster.settle()
    assert cluster.gone


# --- crashes and random histories -----------------------------------------------------------------------


def test_a_crash_after_any_write_makes_no_second_child_and_counts_no_restart_twice() -> None:
    def history(cut: int | None) -> Cluster:
        cluster = Cluster({"spec.runPolicy.maxRestarts": 5})
        budget = cut

        def settle() -> None:
            nonlocal budget
            for _ in range(8):
                if budget is not None:
                    decision = RECONCILER.decide(cluster.observe())
                    writes = len(decision.events) + 1 + len(decision.delete) + len(decision.apply)
                    if budget < writes:
                        cluster.step(writes=budget)
                        budget = None
                        cluster.collect()
                        continue
                    budget -= writes
                cluster.step()
                cluster.collect()

        settle()
        cluster.run()
        settle()
        cluster.now += 100
        cluster.fail(1)
        settle()
        cluster.now += 100
        settle()
        cluster.run()
        settle()
        cluster.end_job("Complete")
        settle()
        return cluster

    whole = history(None)
    assert whole.condition("Complete") == ("True", "Completed")
    for cut in range(60):
        crashed = history(cut)
        assert crashed.made == whole.made, f"crash after write {cut}"
        assert crashed.status == whole.status, f"crash after write {cut}"


FAULTS = st.sampled_from(
    ["run", "wait", "report", "exit 1", "exit 65", "exit 70", "exit 75", "oom", "disrupt", "complete"]
    + ["suspend", "resume", "delete the Job", "delete the Service", "long", "crash"]
)


@settings(max_examples=counts.of(sample=40, full=2000), deadline=None)
@given(st.lists(FAULTS, max_size=30), st.sampled_from([1, 2, 4]))
def test_whatever_happens_there_is_one_attempt_at_a_time_and_the_job_comes_to_rest(
    faults: list[str], nodes: int
) -> None:
    policy = {"maxRestarts": 2, "ttlSecondsAfterFinished": 10_000_000}
    cluster = Cluster({"spec.runPolicy": policy, "spec.parallelism.nodes": nodes})
    for fault in faults:
        _happen(cluster, fault)
        before = cluster.status
        finished = "completionTime" in before
        made = len(cluster.made)
        cluster.settle()
        if finished:
            assert len(cluster.made) == made
            assert cluster.status == before | {
                key: cluster.status[key] for key in ("conditions",) if key in before
            }
        live = [one for one in cluster.children["Job"] if "deletionTimestamp" not in one["metadata"]]
        assert len(live) <= 1
        assert cluster.status["restartsCounted"] <= 2
        assert cluster.status["restarts"] <= cluster.status["attempt"]
    cluster.resource["spec"]["suspend"] = False
    for _ in range(20):
        cluster.now += 3600
        cluster.settle()
        if "completionTime" in cluster.status:
            break
        if cluster.children["Job"]:
            cluster.run()
            cluster.end_job("Complete")
    assert "completionTime" in cluster.status
    assert cluster.condition("Succeeded") in {("True", "Completed")} | {
        ("False", str(cluster.status.get("failure", {}).get("reason")))
    }


def _happen(cluster: Cluster, fault: str) -> None:
    has_job = any("deletionTimestamp" not in one["metadata"] for one in cluster.children["Job"])
    active = has_job and not cluster.job["status"].get("conditions")
    runs = active and bool(cluster.pods())
    match fault.split():
        case ["run"] if active:
            cluster.run()
        case ["wait"]:
            cluster.now += 15
        case ["long"]:
            cluster.now += 1801
        case ["report"] if runs:
            cluster.report(int(cluster.now - START) % 32)
        case ["exit", code] if runs:
            cluster.fail(int(code))
        case ["oom"] if runs:
            cluster.fail(137, reason="OOMKilled")
        case ["disrupt"] if runs:
            cluster.disrupt_pod(0)
            cluster.end_job("Failed")
        case ["complete"] if runs:
            cluster.end_job("Complete")
        case ["suspend"]:
            cluster.resource["spec"]["suspend"] = True
        case ["resume"]:
            cluster.resource["spec"]["suspend"] = False
        case ["delete", "the", kind] if cluster.children[kind]:
            cluster.children[kind].pop()
            cluster.collect()
        case ["crash"]:
            cluster.step(writes=1)
