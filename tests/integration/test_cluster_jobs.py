"""Training jobs on a cluster, from Python: against the API server in memory, and against a real one."""

import datetime
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from support import real_api_server
from support.client_places import Place, a_place
from support.cluster_client import Stage, refusing, staged
from support.manifests import changed, inference_service, train_job
from unmask.errors import UsageError
from unmask_operator import rbac
from unmask_operator.client import (
    ClusterError,
    JobState,
    NameTaken,
    NoCluster,
    NotAllowed,
    NotDefined,
    NotFound,
    Refused,
    TrainJobs,
    WaitedTooLong,
)
from unmask_operator.client.connection import AGENT
from unmask_operator.control.clock import SystemClock
from unmask_operator.resources import RESOURCES
from unmask_operator.transport import Request, Unreachable

Json = dict[str, Any]

TRAIN_JOB = RESOURCES["DiffusionTrainJob"]
SERVICE = RESOURCES["DiffusionInferenceService"]


@pytest.fixture(scope="module", params=["memory"] + ["real"] * real_api_server.AVAILABLE)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with a_place(request.param, tmp_path_factory) as made:
        yield made


@pytest.fixture
def jobs(place: Place) -> TrainJobs:
    return place.jobs(place.namespace())


def manifest(name: str = "tiny", **values: Any) -> Json:
    return changed(train_job(), {"metadata.name": name} | values)


# --- on both ------------------------------------------------------------------------------------------


def test_a_job_is_submitted_once_as_it_was_written(jobs: TrainJobs) -> None:
    made = jobs.submit(manifest())
    assert (made.name, made.namespace, made.state) == ("tiny", jobs.namespace, JobState.SUBMITTED)
    assert made.created is not None
    again = jobs.submit(json.dumps(manifest()))
    assert (again.uid, again.raw["metadata"]["generation"]) == (made.uid, 1)
    assert jobs.get("tiny").job.spec.stages[3].objective == "sft"
    entry = next(one for one in again.raw["metadata"]["managedFields"] if one["manager"] == AGENT)
    assert "f:spec" in entry["fieldsV1"]


def test_a_name_that_belongs_to_another_spec_is_left_alone(jobs: TrainJobs) -> None:
    jobs.submit(manifest())
    other = manifest(**{"spec.precision": "bf16", "spec.runPolicy": {"maxRestarts": 9}})
    with pytest.raises(NameTaken, match=r"another spec \(spec\.precision, spec\.runPolicy\)"):
        jobs.submit(other)
    assert jobs.get("tiny").job.spec.precision == "fp32"


def test_a_rehearsal_is_checked_by_the_cluster_and_keeps_nothing(jobs: TrainJobs) -> None:
    assert jobs.submit(manifest(), dry_run=True).name == "tiny"
    with pytest.raises(NotFound):
        jobs.get("tiny")
    jobs.submit(manifest())
    assert jobs.cancel("tiny", dry_run=True).cancelled
    assert jobs.delete("tiny", dry_run=True).name == "tiny"
    assert not jobs.get("tiny").cancelled


def test_a_cancelled_job_stands_still_until_it_is_submitted_again(jobs: TrainJobs) -> None:
    made = jobs.submit(manifest())
    cancelled = jobs.cancel("tiny")
    assert (cancelled.state, cancelled.raw["spec"]["suspend"]) == (JobState.CANCELLED, True)
    version = jobs.get("tiny").raw["metadata"]["resourceVersion"]
    assert jobs.cancel("tiny").raw["metadata"]["resourceVersion"] == version
    on = jobs.submit(manifest())
    assert (on.uid, on.state, on.raw["spec"]["suspend"]) == (made.uid, JobState.SUBMITTED, False)
    assert not on.raw["metadata"].get("annotations")


def test_a_pause_is_no_cancellation(jobs: TrainJobs) -> None:
    paused = jobs.submit(manifest(**{"spec.suspend": True}))
    assert (paused.state, paused.cancelled) == (JobState.SUSPENDED, False)
    assert jobs.submit(manifest()).state is JobState.SUSPENDED


def test_a_deleted_job_is_gone_and_its_name_free(jobs: TrainJobs) -> None:
    first = jobs.submit(manifest())
    assert jobs.delete("tiny").uid == first.uid
    with pytest.raises(NotFound, match="namespace test-.* has none of that name"):
        jobs.delete("tiny")
    assert jobs.submit(manifest(**{"spec.precision": "bf16"})).uid != first.uid


def test_jobs_are_listed_whoever_made_them(place: Place, jobs: TrainJobs) -> None:
    assert list(jobs.list()) == []
    jobs.submit(manifest("one"))
    body = manifest("two")
    place.admin.create(TRAIN_JOB, jobs.namespace, body)  # as kubectl would
    assert {job.name for job in jobs.list()} == {"one", "two"}
    assert jobs.get("two").job.metadata.name == "two"
    assert jobs.submit(body).uid == jobs.get("two").uid


def test_who_may_do_nothing_is_told_which_role_to_ask_for(place: Place) -> None:
    stranger = place.strangers(place.namespace())
    for call in (
        lambda: stranger.submit(manifest()),
        lambda: stranger.get("tiny"),
        stranger.list,
    ):
        with pytest.raises(NotAllowed, match="ask for the role edit or unmask-user there"):
            call()


def test_what_the_manifest_says_of_its_namespace_counts_unless_another_was_chosen(
    place: Place, jobs: TrainJobs
) -> None:
    own = place.namespace()
    there = place.jobs(own)
    free = TrainJobs(there._connection)
    assert free.submit(manifest(**{"metadata.namespace": own})).namespace == own
    with pytest.raises(UsageError, match=f"metadata.namespace is {own}, and the namespace asked for is"):
        jobs.submit(manifest(**{"metadata.namespace": own}))


def test_a_bad_manifest_is_refused_before_the_cluster_is_asked(jobs: TrainJobs) -> None:
    with pytest.raises(UsageError, match=r"spec\.precision: got .*allowed: fp32 | bf16"):
        jobs.submit(manifest(**{"spec.precision": "fp8"}))


def test_waiting_ends_in_time(jobs: TrainJobs) -> None:
    jobs.submit(manifest())
    with pytest.raises(WaitedTooLong, match="job tiny has not ended after 0 s: it is Submitted"):
        jobs.wait("tiny", timeout=0)


def test_events_and_pods_of_a_job_are_its_own(place: Place, jobs: TrainJobs) -> None:
    from unmask_operator.control.events import EventRecorder
    from unmask_operator.decision import Event

    one, other = jobs.submit(manifest("one")), jobs.submit(manifest("other"))
    recorder = EventRecorder(place.admin, SystemClock(), "test")
    recorder.record(one.raw, Event("Starting", "attempt 0: one-a0"))
    recorder.record(other.raw, Event("Starting", "attempt 0: other-a0"))
    assert [event["note"] for event in jobs.events(one)] == ["attempt 0: one-a0"]
    assert list(jobs.pods(one)) == []


def test_a_namespace_that_is_not_there_is_named(place: Place) -> None:
    with pytest.raises(NotFound, match=r"no namespace nowhere; make it \(kubectl create namespace nowhere\)"):
        place.nowhere().submit(manifest())


def test_a_cluster_without_the_definitions_is_told_apart(place: Place) -> None:
    assert "does not know DiffusionTrainJobs; install the operator" in place.undefined


# --- in memory only: what a real server does not do when asked -----------------------------------------


@pytest.fixture
def stage() -> Iterator[Stage]:
    with staged() as made:
        yield made


def test_the_role_of_people_allows_what_the_client_asks_and_no_more(stage: Stage) -> None:
    jobs = stage.jobs()
    jobs.submit(manifest())
    jobs.submit(manifest())
    jobs.cancel("tiny")
    jobs.list()
    jobs.events(jobs.get("tiny"))
    uid = stage.pod("tiny")
    stage.end(uid)
    list(jobs.logs("tiny", follow=True))
    jobs.delete("tiny")
    services = stage.services()
    services.submit(inference_service())
    services.cancel("chat")
    services.submit(inference_service())
    services.list()
    services.events(services.get("chat"))
    stage.end(stage.server_pod("chat", 0, "engine"))
    list(services.logs("chat"))
    services.delete("chat")
    allowed = {
        (verb, group, resource)
        for rule in rbac.user_role()["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    used = {one for one in stage.asked() if one[0] != "watch"}
    # Watching is for kubectl, as in `kubectl wait`.
    watched = {("watch", one.group, one.plural) for one in (TRAIN_JOB, SERVICE)}
    assert used == allowed - watched


@pytest.mark.parametrize("fault", ["error before", "error after", "timeout", "429"])
def test_an_answer_that_was_lost_is_asked_for_again(stage: Stage, fault: str) -> None:
    jobs = stage.jobs()
    stage.server.fault = lambda ordinal, request: fault if ordinal in (1, 3, 5) else None
    made = jobs.submit(manifest())
    assert jobs.cancel("tiny").cancelled
    assert jobs.delete("tiny").uid == made.uid
    assert stage.server.objects("DiffusionTrainJob") == []
    assert [one.verb for one in stage.server.writes].count("create") == 1


def test_a_server_that_stays_silent_is_named(stage: Stage) -> None:
    def silent(request: Request) -> None:
        raise Unreachable("planned")

    jobs = stage.jobs()
    stage.server.refusal = silent  # type: ignore[assignment]
    with pytest.raises(NoCluster, match=f"no answer from the cluster at {stage.address}"):
        jobs.get("tiny")


@pytest.mark.parametrize(
    ("status", "reason", "message", "kind", "says"),
    [
        (401, "Unauthorized", "Unauthorized", NotAllowed, "does not know you; log in again"),
        (
            404,
            "NotFound",
            "the server could not find the requested resource",
            NotDefined,
            "does not know DiffusionTrainJobs; install the operator",
        ),
        (422, "Invalid", "spec.stages: Invalid value", Refused, "refuses it: spec.stages: Invalid value"),
        (400, "BadRequest", 'unknown field "spec.new"', Refused, 'refuses it: unknown field "spec.new"'),
        (503, "ServiceUnavailable", "draining", ClusterError, "answered: 503 ServiceUnavailable: draining"),
    ],
)
def test_each_refusal_says_what_to_do(
    stage: Stage, status: int, reason: str, message: str, kind: type[Exception], says: str
) -> None:
    jobs = stage.jobs()
    stage.server.refusal = refusing("POST", status, reason, message)
    with pytest.raises(kind, match=says.replace("(", r"\(")) as caught:
        jobs.submit(manifest())
    assert str(caught.value).startswith("cannot submit job tiny")
    assert type(caught.value) is kind


def test_waiting_sees_each_change_and_the_end(stage: Stage) -> None:
    jobs = stage.jobs()
    jobs.submit(manifest())
    steps = iter(
        [
            {"state": "Running", "progress": {"step": 4, "totalSteps": 32, "loss": "0.5"}},
            {
                "state": "Failed",
                "failure": {"reason": "DataError", "message": "bad", "attempt": 0, "time": "x"},
            },
        ]
    )
    seen = []

    def observe(job: Any) -> None:
        seen.append(str(job.state))
        if (status := next(steps, None)) is not None:
            stage.set_status("tiny", **status)

    assert jobs.wait("tiny", observe=observe).state is JobState.FAILED
    assert seen == ["Submitted", "Running", "Failed"]


def test_waiting_does_not_take_a_later_job_for_the_one_that_was_deleted(stage: Stage) -> None:
    jobs = stage.jobs()
    jobs.submit(manifest())

    def replace(job: Any) -> None:
        jobs.delete("tiny")
        jobs.submit(manifest())

    with pytest.raises(NotFound, match="was deleted while it was waited for"):
        jobs.wait("tiny", observe=replace)


def test_a_status_of_a_newer_operator_is_read_as_far_as_it_is_known(stage: Stage) -> None:
    jobs = stage.jobs()
    made = jobs.submit(manifest())
    raw = made.raw | {
        "status": {
            "state": "Dreaming",
            "novelty": 1,
            "progress": {"step": 4, "totalSteps": 32, "mood": "good"},
            "conditions": [
                {
                    "type": "Running",
                    "status": "True",
                    "reason": "Running",
                    "message": "",
                    "lastTransitionTime": "2026-11-27T10:00:00Z",
                    "colour": "red",
                }
            ],
        }
    }
    job = type(made)(raw)
    assert job.state is JobState.UNKNOWN
    assert job.status.progress is not None and job.status.progress.step == 4
    assert job.condition("Running") is not None
    newer = type(made)(raw | {"spec": raw["spec"] | {"future": 1}})
    with pytest.raises(ClusterError, match="what this version of unmask does not know: spec.future"):
        _ = newer.job


# --- logs -----------------------------------------------------------------------------------------------


def stamps(number: int) -> list[str]:
    """Times with several digits behind the point, several lines at some of them."""
    return [
        f"2026-11-27T10:00:{10 + index // 4}.{'5' if index % 4 < 2 else '75'}Z" for index in range(number)
    ]


@pytest.fixture
def running(stage: Stage) -> str:
    stage.jobs().submit(manifest())
    stage.set_status("tiny", state="Running")
    return stage.pod("tiny")


def test_lines_come_with_node_attempt_and_time(stage: Stage, running: str) -> None:
    stage.server.logs.write(running, "step 1 loss 2.0", stamp="2026-11-27T10:00:00.123456789Z")
    (line,) = stage.jobs().logs("tiny")
    assert (line.text, line.node, line.attempt) == ("step 1 loss 2.0", 0, 0)
    assert line.time == datetime.datetime(2026, 11, 27, 10, 0, 0, 123456, tzinfo=datetime.UTC)


@pytest.mark.parametrize("cuts", [[0], [3], [5, 1, 0], [1] * 5, [7, 7]])
def test_a_stream_that_breaks_goes_on_where_it_was(stage: Stage, running: str, cuts: list[int]) -> None:
    texts = [f"line {number}" for number in range(20)]
    for text, stamp in zip(texts, stamps(20), strict=True):
        stage.server.logs.write(running, text, stamp=stamp)
    stage.end(running)
    stage.set_status("tiny", state="Succeeded")
    stage.server.logs.cuts = list(cuts)
    assert [line.text for line in stage.jobs().logs("tiny", follow=True)] == texts
    assert stage.server.logs.streams > len(cuts)


def test_lines_are_followed_through_a_restart_to_the_end(stage: Stage, running: str) -> None:
    found: list[str] = []
    first = threading.Event()

    def follow() -> None:
        for line in stage.jobs().logs("tiny", follow=True):
            found.append(f"{line.attempt}: {line.text}")
            first.set()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    stage.server.logs.write(running, "one", stamp="2026-11-27T10:00:00Z")
    assert first.wait(30)
    stage.end(running, 1)
    stage.set_status("tiny", state="Restarting", attempt=1)
    second = stage.pod("tiny", attempt=1, state={"waiting": {"reason": "ContainerCreating"}}, phase="Pending")
    stage.server.logs.write(second, "two", stamp="2026-11-27T10:00:05Z")
    stage.pod_state("tiny-a1-0-xyz10", {"running": {}}, phase="Running")
    stage.end(second)
    stage.set_status("tiny", state="Succeeded", attempt=1)
    thread.join(60)
    assert not thread.is_alive()
    assert found == ["0: one", "1: two"]


def test_following_ends_where_the_job_is_deleted(stage: Stage, running: str) -> None:
    stage.server.logs.write(running, "one", stamp="2026-11-27T10:00:00Z")
    lines = stage.jobs().logs("tiny", follow=True)
    assert next(lines).text == "one"
    stage.jobs().delete("tiny")
    stage.end(running)
    assert list(lines) == []


def test_part_of_a_log_can_be_asked_for(stage: Stage, running: str) -> None:
    for number, stamp in enumerate(stamps(12)):
        stage.server.logs.write(running, f"line {number}", stamp=stamp)
    jobs = stage.jobs()
    assert [line.text for line in jobs.logs("tiny", tail=2)] == ["line 10", "line 11"]
    since = datetime.datetime(2026, 11, 27, 10, 0, 12, tzinfo=datetime.UTC)
    assert [line.text for line in jobs.logs("tiny", since=since)][0] == "line 8"
    with pytest.raises(NotFound, match="there is no pod of node 1 yet"):
        list(jobs.logs("tiny", node=1))
    with pytest.raises(NotFound):
        list(jobs.logs("tiny", attempt=1))


def test_a_log_that_cannot_be_there_is_explained(stage: Stage) -> None:
    jobs = stage.jobs()
    jobs.submit(manifest())
    with pytest.raises(NotFound, match="job tiny is Submitted: there is no pod of node 0 yet"):
        list(jobs.logs("tiny"))
    stage.pod("tiny", state={"waiting": {"reason": "ErrImagePull"}}, phase="Pending")
    with pytest.raises(
        NotFound, match="pod tiny-a0-0-xyz00 has not started yet; unmask describe tiny --namespace ml says"
    ):
        list(jobs.logs("tiny"))
    with pytest.raises(NotFound, match="has none of that name"):
        jobs.logs("another")


def test_a_job_whose_pods_were_removed_says_that_logs_go_with_them(stage: Stage) -> None:
    jobs = stage.jobs()
    jobs.submit(manifest())
    stage.set_status("tiny", state="Succeeded")
    with pytest.raises(NotFound, match="their logs with them"):
        list(jobs.logs("tiny"))
    assert list(jobs.logs("tiny", follow=True)) == []
