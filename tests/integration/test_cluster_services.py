"""Services on a cluster, from Python: against the API server in memory, and against a real one."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from support import real_api_server
from support.client_places import Place, a_place
from support.cluster_client import Stage, staged
from support.manifests import changed, inference_service, train_job
from unmask.errors import UsageError
from unmask_operator.client import (
    Choice,
    Cluster,
    ClusterError,
    Conflicting,
    InferenceServices,
    NotAllowed,
    NotFound,
    ServiceState,
    WaitedTooLong,
)
from unmask_operator.resources import RESOURCES

Json = dict[str, Any]
SERVICE = RESOURCES["DiffusionInferenceService"]


@pytest.fixture(scope="module", params=["memory"] + ["real"] * real_api_server.AVAILABLE)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with a_place(request.param, tmp_path_factory) as made:
        yield made


@pytest.fixture
def services(place: Place) -> InferenceServices:
    return place.services(place.namespace())


def manifest(**values: Any) -> Json:
    return changed(inference_service(), values)


# --- on both ------------------------------------------------------------------------------------------


def test_a_service_becomes_what_its_manifest_says(services: InferenceServices) -> None:
    made = services.submit(manifest())
    assert (made.name, made.namespace, made.state) == ("chat", services.namespace, ServiceState.SUBMITTED)
    again = services.submit(manifest())
    assert (again.uid, again.raw["metadata"]["resourceVersion"]) == (
        made.uid,
        made.raw["metadata"]["resourceVersion"],
    )
    changed_one = services.submit(manifest(**{"spec.replicas": 3, "spec.rollout": {"maxSurge": 1}}))
    assert (changed_one.uid, changed_one.wanted) == (made.uid, 3)
    assert changed_one.service.spec.rollout.max_surge == 1
    # What a manifest no longer names goes back to its default.
    assert services.submit(manifest()).service.spec.rollout.max_surge == 0


def test_what_others_have_set_and_the_manifest_does_not_name_stays(services: InferenceServices) -> None:
    free = manifest()
    del free["spec"]["replicas"]
    services.submit(free)
    scaled = {"spec": {"replicas": 5}}
    services._connection.merge(SERVICE, services.namespace, "chat", scaled, what="scale", dry_run=False)
    assert services.submit(free).wanted == 5


def test_fields_that_somebody_else_set_are_a_conflict(place: Place, services: InferenceServices) -> None:
    place.admin.create(SERVICE, services.namespace, manifest(**{"spec.replicas": 4}))
    with pytest.raises(Conflicting, match=r"replicas.*--force-conflicts"):
        services.submit(manifest())
    assert services.get("chat").wanted == 4
    assert services.submit(manifest(), force=True).wanted == 2


def test_a_rehearsal_is_checked_by_the_cluster_and_keeps_nothing(services: InferenceServices) -> None:
    assert services.submit(manifest(), dry_run=True).name == "chat"
    with pytest.raises(NotFound):
        services.get("chat")
    services.submit(manifest())
    assert services.cancel("chat", dry_run=True).cancelled
    assert services.delete("chat", dry_run=True).name == "chat"
    assert not services.get("chat").cancelled


@pytest.mark.parametrize("said", [{}, {"spec.stopped": False}], ids=["left out", "said"])
def test_a_cancelled_service_stands_still_until_it_is_submitted_again(
    services: InferenceServices, said: Json
) -> None:
    made = services.submit(manifest(**said))
    cancelled = services.cancel("chat")
    assert (cancelled.raw["spec"]["stopped"], cancelled.wanted, cancelled.cancelled) == (True, 0, True)
    version = cancelled.raw["metadata"]["resourceVersion"]
    assert services.cancel("chat").raw["metadata"]["resourceVersion"] == version
    on = services.submit(manifest(**said))
    assert (on.uid, on.raw["spec"]["stopped"], on.wanted) == (made.uid, False, 2)
    assert not on.raw["metadata"].get("annotations")


def test_a_stop_that_the_manifest_asks_for_is_no_cancellation(services: InferenceServices) -> None:
    assert not services.submit(manifest(**{"spec.stopped": True})).cancelled
    assert services.get("chat").wanted == 0
    assert services.submit(manifest()).wanted == 2


def test_a_service_that_somebody_else_stopped_starts_where_the_manifest_says_so(
    services: InferenceServices,
) -> None:
    services.submit(manifest())
    stopped = {"spec": {"stopped": True}}
    services._connection.merge(SERVICE, services.namespace, "chat", stopped, what="stop", dry_run=False)
    assert services.submit(manifest()).wanted == 0
    assert services.submit(manifest(**{"spec.stopped": False})).wanted == 2


def test_a_deleted_service_is_gone_and_its_name_free(services: InferenceServices) -> None:
    first = services.submit(manifest())
    assert services.delete("chat").uid == first.uid
    with pytest.raises(NotFound, match="namespace test-.* has none of that name"):
        services.delete("chat")
    assert services.submit(manifest()).uid != first.uid


def test_names_are_found_among_jobs_and_services(place: Place) -> None:
    namespace = place.namespace()
    cluster = Cluster(place.jobs(namespace), place.services(namespace))
    cluster.services.submit(manifest())
    cluster.jobs.submit(train_job())
    assert cluster.find("chat").noun == "service"
    assert cluster.find("tiny").noun == "job"
    with pytest.raises(NotFound, match="cannot get job or service other: namespace .* has none of that name"):
        cluster.find("other")
    cluster.jobs.submit(changed(train_job(), {"metadata.name": "chat"}))
    with pytest.raises(UsageError, match="a job and a service chat: say job/chat or service/chat"):
        cluster.find("chat")
    assert [cluster.find(f"{kind}/chat").noun for kind in ("job", "service")] == ["job", "service"]
    with pytest.raises(UsageError, match="write NAME, job/NAME or service/NAME"):
        cluster.find("pod/chat")
    listed = cluster.list()
    assert ([one.name for one in listed.services], listed.notes) == (["chat"], [])
    assert {one.name for one in listed.jobs} == {"tiny", "chat"}


def test_who_may_do_nothing_is_told_which_role_to_ask_for(place: Place) -> None:
    strangers = place.strangers(place.namespace())
    services = InferenceServices(strangers._connection, strangers.namespace)
    for call in (lambda: services.submit(manifest()), lambda: services.get("chat"), services.list):
        with pytest.raises(NotAllowed, match="ask for the role edit or unmask-user there"):
            call()
    with pytest.raises(NotAllowed, match="cannot list training jobs"):
        Cluster(strangers, services).list()


# --- in memory only -----------------------------------------------------------------------------------


@pytest.fixture
def stage() -> Iterator[Stage]:
    with staged() as made:
        yield made


@pytest.mark.parametrize("fault", ["error before", "error after", "timeout", "429"])
def test_an_answer_that_was_lost_is_asked_for_again(stage: Stage, fault: str) -> None:
    services = stage.services()
    stage.server.fault = lambda ordinal, request: fault if ordinal in (1, 3, 5) else None
    made = services.submit(manifest())
    assert services.cancel("chat").cancelled
    assert services.delete("chat").uid == made.uid
    assert stage.server.objects(SERVICE.kind) == []
    assert [one.verb for one in stage.server.writes].count("create") == 1


def test_who_may_see_one_kind_alone_finds_that_and_is_told_of_the_other(stage: Stage) -> None:
    cluster = Cluster(stage.jobs(), stage.services())
    cluster.jobs.submit(train_job())
    stage.server.rules = [
        {"verbs": ["get", "list"], "apiGroups": ["unmask.dev"], "resources": ["diffusiontrainjobs"]}
    ]
    assert cluster.find("tiny").noun == "job"
    listed = cluster.list()
    assert [one.name for one in listed.jobs] == ["tiny"] and len(listed.notes) == 1
    assert listed.notes[0].startswith("cannot list services in namespace ml")
    with pytest.raises(NotAllowed, match="cannot get service chat"):
        cluster.find("chat")


def test_waiting_ends_where_the_last_change_has_settled(stage: Stage) -> None:
    services = stage.services()
    services.submit(manifest())
    stage.serve("chat")
    services.submit(manifest(**{"spec.replicas": 3}))  # the status is of the generation before
    seen = []

    def observe(service: Any) -> None:
        seen.append(str(service.state))
        stage.serve("chat", "Progressing" if len(seen) == 1 else "Ready")

    assert services.wait("chat", observe=observe).state is ServiceState.READY
    assert seen == ["Submitted", "Progressing", "Ready"]
    services.submit(manifest(**{"spec.replicas": 4}))
    with pytest.raises(WaitedTooLong, match="service chat has not settled after 0 s: it is Submitted"):
        services.wait("chat", timeout=0)


def test_a_status_of_a_newer_operator_is_read_as_far_as_it_is_known(stage: Stage) -> None:
    made = stage.services().submit(manifest())
    group = {"name": "chat-0-x7k2pd", "revision": "x7k2pd", "state": "Ready", "mood": "good"}
    status = {"state": "Dreaming", "observedGeneration": 1, "novelty": 1, "groups": [group]}
    service = type(made)(made.raw | {"status": status})
    assert service.state is ServiceState.UNKNOWN
    assert [one.name for one in service.status.groups] == ["chat-0-x7k2pd"]
    newer = type(made)(made.raw | {"spec": made.raw["spec"] | {"future": 1}})
    with pytest.raises(ClusterError, match="service chat has what this version .* not know: spec.future"):
        _ = newer.service


# --- logs ---------------------------------------------------------------------------------------------


@pytest.fixture
def printed(stage: Stage) -> InferenceServices:
    """A service of two groups, each with an engine and two shards; each pod has printed its name."""
    services = stage.services()
    services.submit(manifest())
    for ordinal in (0, 1):
        for role, number in (("engine", 1), ("shard", 2)):
            for index in range(number):
                uid = stage.server_pod("chat", ordinal, role, index)
                stage.server.logs.write(uid, f"{role} {ordinal} {index}", stamp="2026-11-27T10:00:00Z")
                stage.end(uid)
    return services


@pytest.mark.parametrize(
    ("choice", "texts"),
    [
        (None, ["engine 0 0", "engine 1 0"]),
        (Choice(roles=("shard",)), ["shard 0 0", "shard 0 1", "shard 1 0", "shard 1 1"]),
        (Choice(roles=("engine", "shard"), groups=(1,)), ["engine 1 0", "shard 1 0", "shard 1 1"]),
        (Choice(pods=("chat-1-x7k2pd-s-1",)), ["shard 1 1"]),
    ],
    ids=["default", "shards", "group", "pod"],
)
def test_engines_and_shards_can_be_chosen(
    printed: InferenceServices, choice: Choice | None, texts: list[str]
) -> None:
    lines = list(printed.logs("chat", choice))
    assert [line.text for line in lines] == texts
    assert lines[0].pod.startswith("chat-")


def test_lines_are_followed_through_groups_that_come_until_the_service_is_deleted(stage: Stage) -> None:
    services = stage.services()
    services.submit(manifest())
    first = stage.server_pod("chat", 0, "engine")
    stage.server.logs.write(first, "one", stamp="2026-11-27T10:00:00Z")
    stage.server_pod("chat", 1, "engine", state={"waiting": {"reason": "ContainerCreating"}})
    lines = services.logs("chat", follow=True, poll=0.05)
    assert next(lines).text == "one"
    second = stage.server_pod("chat", 2, "engine")  # while the first one goes on
    stage.server.logs.write(second, "two", stamp="2026-11-27T10:00:05Z")
    line = next(lines)
    assert (line.text, line.pod) == ("two", "chat-2-x7k2pd-e-0")
    services.delete("chat")
    for uid in (first, second):
        stage.end(uid)
    rest: list[str] = []
    thread = threading.Thread(target=lambda: rest.extend(one.text for one in lines), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive() and rest == []


def test_a_container_that_is_started_again_is_followed_on(stage: Stage) -> None:
    services = stage.services()
    services.submit(manifest())
    uid = stage.server_pod("chat", 0, "engine")
    logs, name = stage.server.logs, "chat-0-x7k2pd-e-0"
    logs.write(uid, "one", stamp="2026-11-27T10:00:00Z")
    lines = services.logs("chat", follow=True, poll=0.05)
    assert next(lines).text == "one"
    ended = {"terminated": {"exitCode": 1}}
    stage.pod_state(name, ended, phase="Running", container="engine")
    logs.end(uid)  # the stream ends, the pod does not
    limit = time.monotonic() + 60
    while logs.streams < 2 and time.monotonic() < limit:  # it was looked at while it stood still
        time.sleep(0.01)
    assert logs.streams >= 2
    logs.write(uid, "two", stamp="2026-11-27T10:00:20Z")
    stage.pod_state(name, {"running": {}}, phase="Running", container="engine", last=ended)
    assert next(lines).text == "two"
    stage.end(uid)
    services.delete("chat")
    assert list(lines) == []


def test_a_container_that_keeps_ending_can_be_read(stage: Stage) -> None:
    services = stage.services()
    services.submit(manifest())
    uid = stage.server_pod("chat", 0, "engine")
    stage.server.logs.write(uid, "no such model", stamp="2026-11-27T10:00:00Z")
    stage.server.logs.end(uid)
    stage.pod_state(
        "chat-0-x7k2pd-e-0",
        {"waiting": {"reason": "CrashLoopBackOff"}},
        phase="Running",
        container="engine",
        last={"terminated": {"exitCode": 66}},
    )
    assert [line.text for line in services.logs("chat")] == ["no such model"]


def test_a_log_that_cannot_be_there_is_explained(stage: Stage) -> None:
    services = stage.services()
    services.submit(manifest())
    with pytest.raises(NotFound, match="service chat is Submitted: there is no pod of engine; unmask"):
        list(services.logs("chat"))
    stage.server_pod("chat", 0, "engine", state={"waiting": {"reason": "ErrImagePull"}})
    with pytest.raises(NotFound, match="pod chat-0-x7k2pd-e-0 has not started yet"):
        list(services.logs("chat"))
    with pytest.raises(NotFound, match="there is no pod of shard of group 3"):
        list(services.logs("chat", Choice(roles=("shard",), groups=(3,))))
    with pytest.raises(NotFound, match="there is no pod chat-9"):
        list(services.logs("chat", Choice(pods=("chat-9",))))
    with pytest.raises(NotFound, match="has none of that name"):
        services.logs("another")


def test_who_may_not_read_logs_is_told(printed: InferenceServices, stage: Stage) -> None:
    stage.server.rules = [
        {"verbs": ["get"], "apiGroups": ["unmask.dev"], "resources": [SERVICE.plural]},
        {"verbs": ["list"], "apiGroups": [""], "resources": ["pods"]},
    ]
    for follow in (False, True):
        with pytest.raises(NotAllowed, match="cannot read the log of pod chat-"):
            list(printed.logs("chat", follow=follow, poll=0.05))
