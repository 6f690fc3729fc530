"""A cluster in a few lines: one training job, what its decisions made, and a Job controller to prod.

Time stands still until it is advanced. Pods do what the test says. A decision can be cut off after any number
of its writes, as a crash of the operator would.
"""

import functools
import json
from collections.abc import Sequence
from itertools import count
from typing import Any

from support.manifests import changed, train_job
from unmask_operator.decision import Answer, Decision, JsonObject, Observed
from unmask_operator.launch.admission import admit
from unmask_operator.times import stamp
from unmask_operator.training import Settings, reconciler

__all__ = ["START", "Cluster"]

START = 1_800_000_000.0
RECONCILER = reconciler(Settings(image="registry.example/unmask:1"))
_INDEX = "batch.kubernetes.io/job-completion-index"


@functools.cache
def _admitted(manifest: str) -> str:
    return json.dumps(admit(manifest).to_json_dict())


class Cluster:
    """One job on a cluster; ``values`` changes its manifest, as ``support.manifests.changed`` does."""

    def __init__(self, values: dict[str, Any] | None = None, *, served: Sequence[str] = ()) -> None:
        manifest = changed(train_job(), values or {})
        self.resource: JsonObject = json.loads(_admitted(json.dumps(manifest)))
        self.resource["metadata"] = {
            "name": "tiny",
            "namespace": "ml",
            "uid": "uid-of-the-job",
            "generation": 1,
        }
        self.children: dict[str, list[JsonObject]] = {
            kind: [] for kind in (*RECONCILER.owns, *RECONCILER.reads)
        }
        self.now = START
        self.served = frozenset(served)
        self.conflicts: frozenset[tuple[str, str]] = frozenset()
        self.rejections: dict[tuple[str, str], str] = {}
        self.answers: dict[str, Answer] = {}
        self.referred: dict[str, JsonObject] = {}
        self.events: list[tuple[str, str]] = []
        self.made: list[str] = []
        self.gone = False
        self._uids = count(1)

    # --- the operator -------------------------------------------------------------------------------------

    def observe(self) -> Observed:
        """What a pass would see now; a copy."""
        copied = json.loads(json.dumps([self.resource, self.children]))
        return Observed(
            resource=copied[0],
            children=copied[1],
            now=self.now,
            conflicts=self.conflicts,
            rejections=self.rejections,
            answers=self.answers,
            referred=self.referred,
            served=self.served,
        )

    def step(self, *, writes: int | None = None) -> Decision:
        """One pass, its first ``writes`` writes carried out; all of them by default."""
        decision = RECONCILER.decide(self.observe())
        acts: list[tuple[str, Any]] = [("event", one) for one in decision.events]
        if decision.status is not None and decision.status != self.resource.get("status"):
            acts.append(("status", decision.status))
        acts += [("delete", one) for one in decision.delete]
        acts += [("apply", one) for one in decision.apply]
        for act, what in acts[:writes]:
            getattr(self, f"_{act}")(what)
        return decision

    def settle(self, passes: int = 12) -> Decision:
        """Passes, and the garbage collector, until nothing changes."""
        for _ in range(passes):
            before = json.dumps([self.resource, self.children])
            decision = self.step()
            self.collect()
            if json.dumps([self.resource, self.children]) == before:
                return decision
        raise AssertionError(f"the operator does not come to rest: {self.status}")

    def _event(self, event: Any) -> None:
        self.events.append((event.type, event.reason))

    def _status(self, status: JsonObject) -> None:
        self.resource["status"] = json.loads(json.dumps(status))

    def _delete(self, deletion: Any) -> None:
        if deletion.kind == "DiffusionTrainJob":
            assert deletion.uid == self.resource["metadata"]["uid"]
            self.gone = True
            return
        for child in self.children[deletion.kind]:
            if child["metadata"]["uid"] == deletion.uid:
                child["metadata"].setdefault("deletionTimestamp", stamp(self.now))

    def _apply(self, wanted: JsonObject) -> None:
        kind, name = wanted["kind"], wanted["metadata"]["name"]
        if (kind, name) in self.conflicts or (kind, name) in self.rejections:
            return
        for child in self.children[kind]:
            if child["metadata"]["name"] == name:
                if kind == "Job":
                    same = child["spec"]["template"] == wanted["spec"]["template"]
                    assert same, "the API server refuses to change a Job's pods"
                    child["spec"] = child["spec"] | wanted["spec"]
                return
        made = json.loads(json.dumps(wanted))
        made["metadata"] |= {"uid": f"uid-{next(self._uids)}", "creationTimestamp": stamp(self.now)}
        if kind == "Job":
            queued = "kueue.x-k8s.io/queue-name" in made["metadata"]["labels"]
            made["spec"].setdefault("suspend", queued)
            made["status"] = {} if made["spec"]["suspend"] else {"startTime": stamp(self.now)}
        self.children[kind].append(made)
        self.made.append(name if kind == "Job" else f"{kind}/{name}")

    # --- the cluster --------------------------------------------------------------------------------------

    @property
    def status(self) -> JsonObject:
        """The job's status."""
        return self.resource.get("status", {})

    def condition(self, kind: str) -> tuple[str, str] | None:
        """Status and reason of a condition."""
        for one in self.status.get("conditions", ()):
            if one["type"] == kind:
                return one["status"], one["reason"]
        return None

    def message(self, kind: str) -> str:
        """Message of a condition."""
        return next(one["message"] for one in self.status["conditions"] if one["type"] == kind)

    @property
    def job(self) -> JsonObject:
        """The newest Job that is not being deleted."""
        return next(
            one for one in reversed(self.children["Job"]) if "deletionTimestamp" not in one["metadata"]
        )

    def pods(self, job: JsonObject | None = None) -> list[JsonObject]:
        """Pods of ``job``, the newest one by default."""
        uid = (job or self.job)["metadata"]["uid"]
        return [pod for pod in self.children["Pod"] if pod["metadata"]["ownerReferences"][0]["uid"] == uid]

    def make_pods(self) -> list[JsonObject]:
        """The Job controller makes the pods of the newest Job that are missing."""
        job = self.job
        there = {pod["metadata"]["annotations"][_INDEX] for pod in self.pods(job)}
        for index in range(job["spec"]["parallelism"]):
            if str(index) not in there:
                self.children["Pod"].append(
                    {
                        "apiVersion": "v1",
                        "kind": "Pod",
                        "metadata": {
                            "name": f"{job['metadata']['name']}-{index}",
                            "uid": f"uid-{next(self._uids)}",
                            "labels": job["spec"]["template"]["metadata"]["labels"],
                            "annotations": {_INDEX: str(index)},
                            "ownerReferences": [{"uid": job["metadata"]["uid"]}],
                        },
                        "spec": {},
                        "status": {"phase": "Pending"},
                    }
                )
        return self.pods(job)

    def run(self) -> None:
        """Pods of the newest Job are made, placed, and run."""
        for index, pod in enumerate(self.make_pods()):
            pod["spec"]["nodeName"] = f"node-{index}"
            pod["status"] = {
                "phase": "Running",
                "podIP": f"10.0.0.{index + 1}",
                "conditions": [
                    {"type": "PodScheduled", "status": "True"},
                    {"type": "Ready", "status": "True"},
                ],
                "containerStatuses": [
                    {"name": "trainer", "state": {"running": {"startedAt": stamp(self.now)}}}
                ],
            }

    def start(self) -> None:
        """From the manifest to pods that run."""
        self.settle()
        self.run()
        self.settle()

    def report(self, step: int, **more: Any) -> None:
        """The first pod answers at this time that ``step`` of 32 is done."""
        document = {"attempt": self.status["attempt"], "step": step, "totalSteps": 32} | more
        self.answers[self.pods()[0]["metadata"]["uid"]] = Answer(json.dumps(document).encode(), self.now)

    def end_pod(self, index: int, exit_code: int, *, message: object = "", reason: str = "Error") -> None:
        """The process of a pod ends; ``message`` is its termination message."""
        text = message if isinstance(message, str) else json.dumps(message)
        pod = self.pods()[index]
        terminated = {
            "exitCode": exit_code,
            "reason": reason,
            "message": text,
            "finishedAt": stamp(self.now),
        }
        status = pod["status"]
        status["phase"] = "Failed" if exit_code else "Succeeded"
        status["containerStatuses"] = [{"name": "trainer", "state": {"terminated": terminated}}]

    def disrupt_pod(self, index: int, why: str = "PreemptionByScheduler") -> None:
        """The cluster takes a pod away."""
        self.end_pod(index, 143)
        self.pods()[index]["status"].setdefault("conditions", []).append(
            {"type": "DisruptionTarget", "status": "True", "reason": why, "message": why}
        )

    def end_job(self, kind: str) -> None:
        """The Job controller says ``Failed`` or ``Complete`` of the newest Job, and ends its pods."""
        for index, pod in enumerate(self.pods()):
            if pod["status"]["phase"] not in ("Failed", "Succeeded"):
                self.end_pod(index, 143 if kind == "Failed" else 0)
        self.job["status"]["conditions"] = [{"type": kind, "status": "True", "message": "as told"}]

    def fail(self, exit_code: int = 1, *, message: object = "", reason: str = "Error") -> None:
        """A pod fails, and a second later the others and the Job."""
        self.end_pod(0, exit_code, message=message, reason=reason)
        self.now += 1
        self.end_job("Failed")

    def collect(self) -> None:
        """What is being deleted is gone, with all that it owns."""
        for kind, children in self.children.items():
            self.children[kind] = [one for one in children if "deletionTimestamp" not in one["metadata"]]
        jobs = {job["metadata"]["uid"] for job in self.children["Job"]}
        self.children["Pod"] = [
            pod for pod in self.children["Pod"] if pod["metadata"]["ownerReferences"][0]["uid"] in jobs
        ]
