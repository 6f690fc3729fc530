"""A service on a cluster in memory, from its manifest to groups that answer, through rollouts and trouble.

The operator is the real one (`support.fault_rig`), the cluster is `support.inference_life`.
"""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from support import inference_life, manifests
from support.fault_rig import SERVING, World
from support.inference_life import NAME, NAMESPACE, SERVICE, make_job, patch, remove
from unmask_api.inference_service import InferenceSpec
from unmask_api.inference_status import ModelStatus
from unmask_operator import rbac, serving
from unmask_operator.decision import Observed
from unmask_operator.launch.admission import admit_service
from unmask_operator.resources import RESOURCES
from unmask_operator.serving import revisions
from unmask_operator.serving.model import resolve

Json = dict[str, Any]


class Stage:
    """A cluster with a service; ``values`` are fields of its manifest by path."""

    def __init__(self, values: Json | None = None, drop: tuple[str, ...] = ()) -> None:
        self.world = World(SERVING, lambda ordinal, request: None)
        assert self.world.controllers is not None
        self.controllers = self.world.controllers
        manifest = manifests.changed(manifests.inference_service(), values or {}, drop)
        with self.world.by_people() as people:
            people.create(SERVICE, NAMESPACE, manifest)

    def settle(self) -> "Stage":
        self.world.settle("here")
        assert not self.world.life.stuck
        return self

    def patch(self, spec: Json) -> "Stage":
        with self.world.by_people() as people:
            patch(people, spec)
        return self

    def scale(self, replicas: int) -> None:
        """Do what `kubectl scale` and autoscalers do."""
        path = SERVICE.path(NAMESPACE, NAME, "scale")
        merge = "application/merge-patch+json"
        with self.world.by_people() as people:
            people._json("PATCH", path, {"fieldManager": "kubectl"}, {"spec": {"replicas": replicas}}, merge)

    def remove(self, kind: str, name: str) -> None:
        with self.world.by_people() as people:
            remove(people, kind, name)

    def later(self, seconds: float) -> "Stage":
        self.world.clock.time += seconds
        return self.settle()

    @property
    def status(self) -> Json:
        (service,) = self.world.server.objects(inference_life.KIND)
        return dict(service.get("status") or {})

    def condition(self, kind: str) -> tuple[str, str]:
        for one in self.status["conditions"]:
            if one["type"] == kind:
                return one["status"], one["reason"]
        return "", ""

    def message(self, kind: str) -> str:
        return next(str(one["message"]) for one in self.status["conditions"] if one["type"] == kind)

    def counts(self) -> tuple[int, int, int]:
        """Groups, available ones, and those of the revision asked for."""
        status = self.status
        return status["replicas"], status["availableReplicas"], status["updatedReplicas"]

    def names(self, kind: str) -> list[str]:
        return [one["metadata"]["name"] for one in self.world.server.objects(kind)]

    def events(self) -> Counter[str]:
        return Counter(one["reason"] for one in self.world.server.objects("Event"))

    def groups(self) -> list[str]:
        return [one["name"] for one in self.status["groups"]]

    def images(self) -> set[str]:
        return {
            one["spec"]["template"]["spec"]["containers"][0]["image"]
            for one in self.world.server.objects("StatefulSet")
        }


# --- from the manifest to answers -----------------------------------------------------------------------


def test_a_service_is_ready_once_clients_reach_every_group() -> None:
    stage = Stage()
    told: list[str] = []

    def watch(change: Callable[[], None]) -> Callable[[], None]:
        def step() -> None:
            told.append(stage.status.get("state", ""))
            change()

        return step

    controllers = stage.controllers
    controllers._write_addresses = watch(controllers._write_addresses)  # type: ignore[method-assign]
    stage.settle()
    assert set(told[:-1]) >= {"Progressing"} and told[0] != "Ready", "not before anybody can be reached"
    assert stage.status["state"] == "Ready"
    assert stage.condition("Ready") == ("True", "Routable")
    assert stage.condition("Progressing") == ("False", "Settled")
    assert stage.counts() == (2, 2, 2)
    assert stage.status["endpoint"] == "chat.team.svc:50051"
    assert stage.status["selector"] == "unmask.dev/service=chat,unmask.dev/role=engine"
    assert [one["readyShards"] for one in stage.status["groups"]] == [2, 2]
    (service,) = stage.world.server.objects(inference_life.KIND)
    assert stage.status["observedGeneration"] == service["metadata"]["generation"]


def test_a_pod_that_is_ready_and_that_nobody_is_sent_to_does_not_count() -> None:
    stage = Stage({"spec.replicas": 1})
    stage.controllers._write_addresses = lambda: None  # type: ignore[method-assign]
    stage.settle()
    assert stage.counts() == (1, 0, 1)
    assert stage.condition("Ready")[0] == stage.condition("Available")[0] == "False"


def test_an_engine_without_its_shards_is_not_ready() -> None:
    stage = Stage({"spec.replicas": 1})
    stage.controllers.sick.add("-s-1")
    stage.settle()
    assert stage.counts() == (1, 0, 1)
    assert stage.status["groups"][0]["readyShards"] == 1


def test_a_group_has_to_be_ready_for_a_while() -> None:
    stage = Stage({"spec.replicas": 1, "spec.rollout": {"minReadySeconds": 300}}).settle()
    assert (stage.status["readyReplicas"], stage.status["availableReplicas"]) == (1, 0)
    assert stage.condition("Ready")[0] == "False"
    stage.later(301)
    assert stage.condition("Ready")[0] == "True"


def test_without_an_image_nothing_is_made_and_it_says_so() -> None:
    reconciler = serving.reconciler(serving.Settings())
    resource = json.loads(json.dumps(manifests.inference_service()))
    resource = admit_service(json.dumps(resource)).to_json_dict()
    resource["metadata"] |= {"namespace": "ml", "uid": "u", "generation": 1}
    children: dict[str, list[Json]] = {kind: [] for kind in (*reconciler.owns, *reconciler.reads)}
    decision = reconciler.decide(Observed(resource, children, 0.0))
    assert {one["kind"] for one in decision.apply} == {"Service", "PodDisruptionBudget", "NetworkPolicy"}
    assert decision.status is not None
    stalled = {one["type"]: one for one in decision.status["conditions"]}["Stalled"]
    assert (stalled["status"], stalled["reason"]) == ("True", "InvalidSpec")
    assert "spec.image" in stalled["message"]


# --- rollouts -------------------------------------------------------------------------------------------


class Budget:
    """What there was at every write: most groups, fewest that clients reached, pods of another revision."""

    def __init__(self, stage: Stage) -> None:
        self.most, self.fewest, self.mixed = 0, 99, 0
        server = stage.world.server
        real = server._answer

        def answer(request: Any, user: str) -> Any:
            reply = real(request, user)
            self._look(stage)
            return reply

        server._answer = answer  # type: ignore[method-assign]

    def _look(self, stage: Stage) -> None:
        controllers = stage.controllers
        sets = controllers._all("StatefulSet")
        engines = {
            one["metadata"]["labels"]["unmask.dev/group"]
            for one in sets
            if one["metadata"]["name"].endswith("-e") and "deletionTimestamp" not in one["metadata"]
        }
        self.most = max(self.most, len({one["metadata"]["labels"]["unmask.dev/group"] for one in sets}))
        reached = [
            pod
            for pod in controllers._all("Pod")
            if controllers._role(pod) == "engine"
            and controllers._group(pod) in engines
            and (pod.get("status") or {}).get("conditions", [{}])[0].get("status") == "True"
        ]
        self.fewest = min(self.fewest, len(reached))
        for pod in controllers._all("Pod"):
            labels = pod["metadata"]["labels"]
            self.mixed += not labels["unmask.dev/group"].endswith(labels["unmask.dev/revision"])


@pytest.mark.parametrize(
    ("surge", "unavailable", "most", "fewest"), [(0, 1, 3, 2), (1, 0, 4, 3), (1, 1, 4, 2), (0, 3, 3, 0)]
)
def test_a_rollout_keeps_to_its_budget_at_every_write(
    surge: int, unavailable: int, most: int, fewest: int
) -> None:
    rollout = {"maxSurge": surge, "maxUnavailable": unavailable}
    stage = Stage({"spec.replicas": 3, "spec.rollout": rollout}).settle()
    before = stage.status["currentRevision"]
    budget = Budget(stage)
    stage.patch({"image": "registry.example/unmask:2"}).settle()
    assert (budget.most, budget.fewest, budget.mixed) == (most, fewest, 0)
    assert stage.counts() == (3, 3, 3)
    assert stage.images() == {"registry.example/unmask:2"}
    assert stage.status["currentRevision"] == stage.status["updateRevision"] != before
    assert stage.events()["RolledOut"] == 1


def test_shards_outlive_their_engine_and_names_both() -> None:
    stage = Stage({"spec.replicas": 1}).settle()
    gone: list[str] = []
    server = stage.world.server
    real = server._gone

    def _gone(store: Any, place: Any) -> None:
        if store.resource.kind in ("StatefulSet", "Service", "Pod"):
            gone.append(place[1])
        real(store, place)

    server._gone = _gone  # type: ignore[method-assign]
    (name,) = stage.groups()
    stage.scale(0)
    stage.settle()
    order = [f"{name}-e-0", f"{name}-e", f"{name}-s-0", f"{name}-s-1", f"{name}-s", name]
    assert sorted(order, key=gone.index) == order


def test_a_revision_that_does_not_start_stops_there_says_so_and_is_taken_back() -> None:
    stage = Stage({"spec.replicas": 3}).settle()
    first = stage.status["currentRevision"]
    stage.patch({"image": "registry.example/broken:1"})
    stage.controllers.sick |= {f"chat-{ordinal}-{_next(stage)}" for ordinal in range(3)}
    stage.settle()
    assert stage.counts() == (3, 2, 1)
    assert stage.condition("Progressing") == ("True", "Changing")
    assert stage.condition("Available") == ("True", "EnoughGroups")
    assert stage.condition("Ready")[0] == "False"
    stage.later(1801)
    assert stage.condition("Progressing") == ("False", "ProgressDeadlineExceeded")
    assert stage.status["state"] == "Stuck"
    assert "or apply the manifest of before" in stage.message("Ready")
    assert stage.counts() == (3, 2, 1), "nothing else happens"
    stage.patch({"image": None}).settle()
    assert stage.counts() == (3, 3, 3)
    assert stage.status["currentRevision"] == stage.status["updateRevision"] == first


def _next(stage: Stage) -> str:
    """Return what the revision that the manifest asks for is called."""
    (service,) = stage.world.server.objects(inference_life.KIND)
    spec = InferenceSpec.model_validate(service["spec"], by_alias=True, strict=False)
    assert spec.model.uri is not None
    image = spec.image or "registry.example/unmask:1"
    return revisions.of_spec(spec, image=image, model=ModelStatus(uri=spec.model.uri)).name


def test_what_no_pod_is_made_from_replaces_none() -> None:
    stage = Stage().settle()
    uids = {one["metadata"]["uid"] for one in stage.world.server.objects("Pod")}
    stage.patch(
        {
            "rollout": {"maxSurge": 1, "progressDeadlineSeconds": 3600},
            "disruption": {"minAvailable": 1},
            "autoscaling": {"maxReplicas": 4},
            "service": {"annotations": {"a": "b"}},
        }
    ).settle()
    assert {one["metadata"]["uid"] for one in stage.world.server.objects("Pod")} == uids


def test_who_may_connect_changes_without_replacing_a_pod() -> None:
    stage = Stage().settle()
    uids = {one["metadata"]["uid"] for one in stage.world.server.objects("Pod")}
    assert stage.names("NetworkPolicy") == ["chat-shards"]
    stage.patch({"network": {"clients": [{"namespaceSelector": {}}]}}).settle()
    assert stage.names("NetworkPolicy") == ["chat-engines", "chat-shards"]
    stage.patch({"network": {"clients": [], "isolateShards": False}}).settle()
    assert stage.names("NetworkPolicy") == []
    assert {one["metadata"]["uid"] for one in stage.world.server.objects("Pod")} == uids


def test_every_field_of_a_spec_is_either_what_pods_are_made_from_or_not() -> None:
    assert revisions.REVISED | revisions.NOT_REVISED == set(InferenceSpec.model_fields)
    assert not revisions.REVISED & revisions.NOT_REVISED


def test_a_partition_keeps_the_first_groups_as_they_are_also_when_one_is_lost() -> None:
    stage = Stage({"spec.replicas": 3, "spec.rollout": {"partition": 2}}).settle()
    old = stage.status["currentRevision"]
    stage.patch({"image": "registry.example/unmask:2"}).settle()
    new = stage.status["updateRevision"]
    assert stage.groups() == [f"chat-0-{old}", f"chat-1-{old}", f"chat-2-{new}"]
    assert stage.condition("Ready") == ("True", "Routable"), "as the manifest asks for"
    stage.remove("StatefulSet", f"chat-0-{old}-e")
    stage.settle()
    assert stage.groups() == [f"chat-0-{old}", f"chat-1-{old}", f"chat-2-{new}"]
    stage.patch({"rollout": {"partition": 0}}).settle()
    assert stage.groups() == [f"chat-{ordinal}-{new}" for ordinal in range(3)]


def test_paused_nothing_is_replaced_and_more_are_made_as_before() -> None:
    stage = Stage().settle()
    old = stage.status["currentRevision"]
    stage.patch({"rollout": {"paused": True}, "image": "registry.example/unmask:2"}).settle()
    assert stage.condition("Ready") == ("False", "Paused")
    assert "set rollout.paused to false" in stage.message("Ready")
    assert stage.condition("Available")[0] == "True"
    stage.scale(3)
    stage.settle()
    assert stage.groups() == [f"chat-{ordinal}-{old}" for ordinal in range(3)]
    stage.patch({"rollout": {"paused": False}}).settle()
    assert stage.counts() == (3, 3, 3)
    assert stage.images() == {"registry.example/unmask:2"}


def test_a_restarted_operator_goes_on_within_the_budget() -> None:
    """A controller that begins anew in the middle of a rollout must not update all groups at once."""
    stage = Stage({"spec.replicas": 4}).settle()
    stage.controllers.sick |= {"-e-0"}
    stage.patch({"image": "registry.example/unmask:2"})
    stage.controllers.sick.clear()
    stage.world.operator.turn()
    budget = Budget(stage)
    for _ in range(5):
        stage.world.operator = stage.world.start()
        stage.world.operator.turn()
    assert budget.fewest >= 3
    stage.settle()
    assert stage.counts() == (4, 4, 4)


def test_former_revisions_are_kept_as_many_as_asked_for_and_found_again() -> None:
    stage = Stage({"spec.rollout": {"revisionHistoryLimit": 2}}).settle()
    first = stage.status["currentRevision"]
    for number in (2, 3, 4):
        stage.patch({"image": f"registry.example/unmask:{number}"}).settle()
    kept = stage.names("ControllerRevision")
    assert len(kept) == 3
    assert f"chat-{first}" not in kept
    stage.patch({"image": None}).settle()
    assert stage.status["currentRevision"] == first, "the same spec is the same revision"


def test_other_fields_with_their_defaults_do_not_change_a_revision() -> None:
    spec = admit_service(json.dumps(manifests.inference_service())).spec
    said = manifests.inference_service()["spec"] | {"server": {"rows": 8}, "nodeSelector": {}}
    same = admit_service(json.dumps(manifests.inference_service(**said))).spec
    model = ModelStatus(uri="pvc://models/mini")
    one, other = (revisions.of_spec(each, image="i", model=model) for each in (spec, same))
    assert one.name == other.name
    kept = revisions.controller_revision("chat", one, 1)
    assert revisions.stored([kept])[one.name].spec == one.spec
    assert revisions.of_spec(spec, image="j", model=model).name != one.name
    assert revisions.stored([kept | {"data": {"spec": {"model": 1}}}, kept | {"data": None}]) == {}


# --- scale, stop, start ---------------------------------------------------------------------------------


def test_it_scales_by_its_subresource_and_the_last_groups_go_first() -> None:
    stage = Stage({"spec.replicas": 1}).settle()
    revision = stage.status["currentRevision"]
    stage.scale(3)
    stage.settle()
    assert stage.groups() == [f"chat-{ordinal}-{revision}" for ordinal in range(3)]
    stage.scale(1)
    stage.settle()
    assert stage.groups() == [f"chat-0-{revision}"]
    assert stage.condition("Ready")[0] == "True"


def test_stopped_nothing_runs_and_started_again_everything_does() -> None:
    stage = Stage({"spec.autoscaling": {"maxReplicas": 4}}).settle()
    stage.patch({"stopped": True}).settle()
    assert (stage.names("Pod"), stage.names("StatefulSet")) == ([], [])
    assert stage.names("HorizontalPodAutoscaler") == []
    assert stage.condition("Ready") == ("False", "Stopped")
    assert stage.message("Ready") == "set spec.stopped to false to start"
    stage.patch({"stopped": False}).settle()
    assert stage.condition("Ready")[0] == "True"
    assert stage.names("HorizontalPodAutoscaler") == ["chat"]


def test_what_the_autoscaler_says_is_said_of_the_service() -> None:
    stage = Stage({"spec.autoscaling": {"maxReplicas": 4}}).settle()
    assert stage.condition("ScalingReady") == ("False", "Starting")
    able = {"type": "AbleToScale", "status": "True"}
    active = {"type": "ScalingActive", "status": "False", "reason": "FailedGetPodsMetric", "message": "none"}
    scaler = RESOURCES["HorizontalPodAutoscaler"].kind
    stage.world.server.set_status(scaler, NAMESPACE, NAME, {"conditions": [able, active]})
    stage.settle()
    assert stage.condition("ScalingReady") == ("False", "FailedGetPodsMetric")
    stage.world.server.set_status(
        scaler, NAMESPACE, NAME, {"conditions": [able, active | {"status": "True"}]}
    )
    stage.settle()
    assert stage.condition("ScalingReady") == ("True", "Scaling")
    stage.patch({"autoscaling": None}).settle()
    assert stage.condition("ScalingReady") == ("", "")
    assert stage.names("HorizontalPodAutoscaler") == []


# --- models of jobs -------------------------------------------------------------------------------------

FROM_JOB: Json = {"spec.model": {"job": {"name": "mini", "update": "WhenImproved"}}}


def test_a_job_s_model_is_served_when_the_job_is_complete() -> None:
    stage = Stage(FROM_JOB).settle()
    assert stage.condition("ModelReady") == ("False", "JobMissing")
    assert stage.condition("Stalled") == ("True", "ModelJobMissing")
    assert stage.names("StatefulSet") == []
    make_job(stage.world.server, "uid-1")
    stage.settle()
    assert stage.condition("Ready") == ("True", "Routable")
    assert stage.status["model"] == {
        "uri": "pvc://run/tiny/model",
        "job": "mini",
        "revision": "uid-1",
        "loss": "1.5",
    }


@pytest.mark.parametrize(
    ("update", "loss", "rolls"),
    [
        ("Never", "1.0", False),
        ("WhenComplete", "2.0", True),
        ("WhenImproved", "2.0", False),
        ("WhenImproved", "1.0", True),
    ],
)
def test_a_job_that_was_made_anew_rolls_the_groups_if_that_is_asked_for(
    update: str, loss: str, rolls: bool
) -> None:
    stage = Stage({"spec.model": {"job": {"name": "mini", "update": update}}, "spec.replicas": 1})
    make_job(stage.world.server, "uid-1", loss="1.5")
    before = stage.settle().status["currentRevision"]
    make_job(stage.world.server, "uid-2", loss=loss)
    stage.settle()
    assert (stage.status["currentRevision"] != before) is rolls
    assert stage.status["model"]["revision"] == ("uid-2" if rolls else "uid-1")
    assert stage.condition("Ready")[0] == "True"


def test_a_model_goes_on_being_served_when_its_job_is_gone() -> None:
    stage = Stage(FROM_JOB)
    make_job(stage.world.server, "uid-1")
    stage.settle()
    stage.world.server.take("DiffusionTrainJob", NAMESPACE, "mini")
    stage.scale(3)
    stage.settle()
    assert stage.counts() == (3, 3, 3)
    assert stage.condition("ModelReady") == ("True", "Found")


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ({"state": "Running"}, "WaitingForJob"),
        ({"conditions": [{"type": "Failed", "status": "True", "message": "no memory"}]}, "NotComing"),
    ],
)
def test_what_becomes_of_a_job_is_said(status: Json, reason: str) -> None:
    source = admit_service(json.dumps(manifests.changed(manifests.inference_service(), FROM_JOB))).spec.model
    job = manifests.train_job() | {"status": status}
    job["metadata"]["uid"] = "u"
    found = resolve(source, job, None)
    assert (found.model, found.reason, found.ready) == (None, reason, False)
    before = {"uri": "pvc://other", "job": "other"}
    kept = resolve(source, job, before).model
    assert kept is not None and kept.uri == "pvc://other", "another model is served meanwhile"
    assert resolve(source, job, {"no": "model"}).model is None


def test_an_improvement_needs_both_losses() -> None:
    source = admit_service(json.dumps(manifests.changed(manifests.inference_service(), FROM_JOB))).spec.model
    job = manifests.train_job() | {"status": {"conditions": [{"type": "Complete", "status": "True"}]}}
    job["metadata"]["uid"] = "new"
    before = {"uri": "pvc://run/tiny/model", "job": "mini", "revision": "old", "loss": "2.0"}
    kept = resolve(source, job, before).model
    assert kept is not None and kept.revision == "old"
    job["status"]["progress"] = {"loss": "1.9"}
    taken = resolve(source, job, before).model
    assert taken is not None and taken.revision == "new"


# --- trouble --------------------------------------------------------------------------------------------


def test_a_group_that_finds_no_machine_is_told_of_after_a_while() -> None:
    stage = Stage({"spec.replicas": 3}).settle()
    stage.patch({"image": "registry.example/unmask:2"})
    stage.controllers.placeless |= {f"chat-{ordinal}-{_next(stage)}-e" for ordinal in range(3)}
    stage.settle()
    for kind in ("Progressing", "Ready"):
        assert "Insufficient nvidia.com/gpu" in stage.message(kind)
    assert stage.events()["Unschedulable"] == 0
    stage.later(121)
    assert stage.events()["Unschedulable"] == 1
    assert stage.counts() == (3, 2, 1), "no other group is taken for it"


def test_pods_that_the_cluster_refuses_are_told_of() -> None:
    stage = Stage({"spec.replicas": 1})
    stage.controllers._make_pods = lambda: None  # type: ignore[method-assign]
    stage.settle()
    shards = next(
        one for one in stage.world.server.objects("StatefulSet") if one["metadata"]["name"][-2:] == "-s"
    )
    name = shards["metadata"]["name"]
    note = f"create Pod {name}-0 in StatefulSet {name} failed error: "
    note += f'pods "{name}-0" is forbidden: exceeded quota: a'
    regarding = {"kind": "StatefulSet", "name": name, "uid": shards["metadata"]["uid"]}
    body = {"metadata": {"name": "refused"}, "regarding": regarding, "reason": "FailedCreate", "note": note}
    stage.world.server.put("Event", NAMESPACE, body)
    stage.settle()
    assert stage.message("Progressing").endswith("a pod is forbidden: exceeded quota: a")
    stage.later(121)
    assert stage.events()["QuotaExceeded"] == 1


def test_a_lost_group_is_degradation_and_not_progress() -> None:
    stage = Stage().settle()
    stage.controllers.sick.add("chat-0")
    stage.settle()
    assert stage.status["state"] == "Degraded"
    assert stage.condition("Ready") == ("False", "GroupsNotAvailable")
    assert stage.condition("Available")[0] == "True"
    stage.controllers.sick.clear()
    stage.settle()
    assert stage.status["state"] == "Ready"


def test_what_somebody_deletes_or_changes_is_as_it_was_again() -> None:
    stage = Stage().settle()
    before = {kind: set(stage.names(kind)) for kind in ("Service", "StatefulSet", "PodDisruptionBudget")}
    for kind, names in before.items():
        for name in sorted(names):
            stage.remove(kind, name)
            stage.settle()
            assert set(stage.names(kind)) == names, f"{kind} {name}"
    assert stage.condition("Ready")[0] == "True"


def test_a_name_that_is_taken_is_an_obstacle_that_is_told() -> None:
    stage = Stage()
    theirs = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "chat"}, "spec": {"selector": {}}}
    with stage.world.by_people() as people:
        people.create(RESOURCES["Service"], NAMESPACE, theirs)
    for _ in range(6):
        stage.world.operator.turn()
        stage.world.clock.time += 1
    assert stage.condition("Stalled") == ("True", "NameConflict")
    assert stage.condition("Ready")[0] == "False"
    assert "Service chat" in stage.message("Stalled") == stage.message("Ready")


def test_a_spec_that_this_version_cannot_read_is_left_alone() -> None:
    reconciler = serving.reconciler(serving.Settings(image="i"))
    resource: Json = json.loads(json.dumps(manifests.inference_service()))
    resource["metadata"] |= {"namespace": "ml", "uid": "u", "generation": 3}
    resource["spec"]["group"] = {"shards": "two"}
    decision = reconciler.decide(Observed(resource, {}, 0.0))
    assert (decision.apply, decision.delete) == ((), ())
    assert decision.status is not None and decision.status["state"] == "Stalled"
    deleted = resource | {"metadata": resource["metadata"] | {"deletionTimestamp": "2026-11-28T00:00:00Z"}}
    assert reconciler.decide(Observed(deleted, {}, 0.0)).status is None


# --- permissions ----------------------------------------------------------------------------------------


def test_the_permissions_are_those_of_what_is_declared_and_do_for_a_whole_life() -> None:
    world = World(SERVING, lambda ordinal, request: None)
    real = world.server._allow
    used: set[tuple[str, str]] = set()
    rules = rbac.rules([SERVING]) + rbac.lease_rules()

    def allow(verb: str, resource: Any, subresource: str, namespace: str, name: str) -> None:
        if world._by_people:
            return
        used.add((verb, resource.plural + (f"/{subresource}" if subresource else "")))
        world.server.rules = rules
        try:
            real(verb, resource, subresource, namespace, name)
        finally:
            world.server.rules = None

    world.server._allow = allow  # type: ignore[method-assign]
    assert not world.live().stuck
    granted = {(verb, name) for rule in rules for verb in rule["verbs"] for name in rule["resources"]}
    assert used <= granted
    assert ("delete", "diffusioninferenceservices") not in granted
    assert {verb for verb, name in granted if name in ("pods", "endpointslices", "diffusiontrainjobs")} == {
        "list",
        "watch",
    }
