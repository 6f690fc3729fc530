"""A small reconciler with the shape of the real one: a Job for each attempt, restarts that are counted, an
end."""

from typing import Any

from unmask_operator.decision import Decision, Deletion, Event, Observed, Reconciler

Json = dict[str, Any]


def decide(observed: Observed) -> Decision:
    resource = observed.resource
    name, spec, old = resource["metadata"]["name"], resource["spec"], resource.get("status") or {}
    status: Json = {**old, "observedGeneration": resource["metadata"]["generation"]}
    attempt = int(old.get("attempt") or 0)
    service = next((one for one in observed.children["Service"] if one["metadata"]["name"] == name), None)
    if old.get("state") in ("Complete", "Failed"):
        gone = [_deletion(service)] if service else []
        return Decision(delete=gone, status=status)
    stale = [
        one
        for kind in ("Job", "ConfigMap")
        for one in observed.children[kind]
        if one["metadata"]["labels"]["unmask.dev/attempt"] != str(attempt)
    ]
    job = next((one for one in observed.children["Job"] if one not in stale), None)
    ended = {
        one["type"]
        for one in ((job or {}).get("status") or {}).get("conditions", ())
        if one["status"] == "True"
    }
    if "Complete" in ended:
        event = Event("Completed", f"Attempt {attempt} is complete.", action="Complete")
        return Decision(status=status | {"state": "Complete"}, events=[event])
    if "Failed" in ended:
        assert job is not None
        restarts = int(old.get("restarts") or 0)
        if restarts >= spec["runPolicy"]["maxRestarts"]:
            event = Event("Failed", f"Attempt {attempt} failed, the last one.", "Warning", "Fail")
            return Decision(status=status | {"state": "Failed"}, events=[event])
        event = Event("Restarting", f"Attempt {attempt} failed.", "Warning", "Restart")
        status |= {"state": "Restarting", "attempt": attempt + 1, "restarts": restarts + 1}
        return Decision(status=status, delete=[_deletion(job, "Foreground")], events=[event])
    if stale:
        # Two attempts at once would write the same checkpoints.
        return Decision(
            status=status, delete=[_deletion(one, "Foreground") for one in stale], requeue_after=5.0
        )
    if observed.conflicts:
        taken = ", ".join(f"{kind} {one}" for kind, one in sorted(observed.conflicts))
        status |= {"state": "NameConflict"}
        event = Event("NameConflict", f"Somebody else has {taken}.", "Warning", "Wait")
        return Decision(apply=children(name, attempt, spec), status=status, events=[event])
    if observed.rejections:
        told = "; ".join(text for _, text in sorted(observed.rejections.items()))
        event = Event("Refused", told, "Warning", "Wait")
        return Decision(
            apply=children(name, attempt, spec), status=status | {"state": "Blocked"}, events=[event]
        )
    return Decision(
        apply=children(name, attempt, spec), status=status | {"state": "Running"}, requeue_after=60.0
    )


def children(name: str, attempt: int, spec: Json) -> list[Json]:
    of_attempt = {"name": f"{name}-a{attempt}", "labels": {"unmask.dev/attempt": str(attempt)}}
    budget = str(spec["runPolicy"]["maxRestarts"])
    # A field that is there at first and then is not: it has to go.
    data = {"maxRestarts": budget} | ({"first": "yes"} if budget == "3" else {})
    container = {"name": "worker", "image": "example.com/worker:1"}
    return [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": dict(of_attempt), "data": data},
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name},
            "spec": {"clusterIP": "None", "selector": {"unmask.dev/job": name}},
        },
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": dict(of_attempt),
            "spec": {
                "backoffLimit": 0,
                "template": {"spec": {"restartPolicy": "Never", "containers": [container]}},
            },
        },
    ]


def _deletion(child: Json, propagation: Any = "Background") -> Deletion:
    return Deletion(child["kind"], child["metadata"]["name"], child["metadata"]["uid"], propagation)


RECONCILER = Reconciler(
    kind="DiffusionTrainJob", owns=("ConfigMap", "Service", "Job"), reads=("Pod",), decide=decide
)
