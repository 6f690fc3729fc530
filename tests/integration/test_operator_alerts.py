"""The operator's alerts over hours of an operator: what it tells of itself each minute, and what fires then.

The operator is the real one, with a fake API server and a clock that nobody waits for. Each series that an
alert asks for is what the operator exported, minute by minute; promtool says what fires.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import yaml
from observability.alerts import ALERTS, rules
from prometheus_client.parser import text_string_to_metric_families

from support import fault_rig, inference_life, manifests
from support.monitoring import OPERATOR, promtool
from unmask_operator.control.api import Reply, Request, Unreachable
from unmask_operator.decision import Reconciler
from unmask_operator.resources import RESOURCES

pytestmark = pytest.mark.prometheus

_TURNS = 2
"""Times in a minute that the operator does what is due."""
_DEADLINE_S = 600
"""For progress of the service's rollouts."""


class Hours:
    """An operator, and what it has told at the end of each minute so far."""

    def __init__(self, reconciler: Reconciler) -> None:
        self.world = fault_rig.World(reconciler, lambda ordinal, request: None)
        self.told: list[dict[str, float]] = []

    def apply(self, kind: str, body: dict[str, object]) -> None:
        with self.world.by_people() as people:
            people.create(RESOURCES[kind], fault_rig.NAMESPACE, body)

    def go_on(self, minutes: int, *, pods: bool = True) -> "Hours":
        """Let time pass; ``pods``: the cluster makes them and gets them ready."""
        for _ in range(minutes):
            for _ in range(_TURNS):
                self.world.clock.time += 60 / _TURNS
                self.world.operator.turn()
                while pods and self.world.controllers is not None and self.world.controllers.act():
                    self.world.operator.turn()
            self.told.append(self._exported())
        return self

    def refusing(self, minutes: int, ending: str) -> "Hours":
        """Let time pass while the API server fails at paths that end so, and watches of them break."""
        server, transport = self.world.server, self.world.operator.transport
        usual = transport.stream

        def refusal(request: Request) -> tuple[int, str, str] | None:
            return (500, "InternalError", "no") if request.path.endswith(ending) else None

        def stream(request: Request) -> contextlib.AbstractContextManager[tuple[Reply, Iterator[bytes]]]:
            if request.path.endswith(ending):
                raise Unreachable("no")
            return usual(request)

        with mock.patch.object(server, "refusal", refusal), mock.patch.object(transport, "stream", stream):
            return self.go_on(minutes)

    def _exported(self) -> dict[str, float]:
        """Each series -> its value, as a scrape would find it."""
        text = self.world.operator.manager.metrics.exposition().decode()
        found = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = "".join(f",{name}={json.dumps(value)}" for name, value in sample.labels.items())
                found[f'{sample.name}{{{OPERATOR},pod="operator-0"{labels}}}'] = sample.value
        return found

    def series(self, expr: str) -> list[dict[str, str]]:
        """As promtool takes them: those that a query names, a minute apart.

        One that is not there any longer ends at once, as Prometheus has it after a scrape without it.
        """
        names = {name for minute in self.told for name in minute if name.partition("{")[0] in expr}
        return [
            {
                "series": name,
                "values": " ".join(f"{one[name]:f}" if name in one else "stale" for one in self.told),
            }
            for name in sorted(names)
        ]


def training() -> Hours:
    """A job that runs."""
    hours = Hours(fault_rig.TRAINING)
    hours.apply("DiffusionTrainJob", fault_rig.TRAIN_JOB)
    return hours.go_on(5)


def serving() -> Hours:
    """A service whose two groups are available."""
    hours = Hours(fault_rig.SERVING)
    rollout = {"progressDeadlineSeconds": _DEADLINE_S}
    hours.apply("DiffusionInferenceService", manifests.inference_service(rollout=rollout))
    hours.go_on(5)
    assert hours.world.server.objects(inference_life.KIND)[0]["status"]["state"] == "Ready"
    return hours


def failing(minutes: int) -> Hours:
    """The job's Job fails, and its status cannot be written."""
    hours = training()
    hours.world.job_status("Failed")
    return hours.refusing(minutes, "/status")


def waiting_for_a_model(kind: str, minutes: int) -> Hours:
    """A job or a service asks for the model of a job that is not there."""
    if kind == "DiffusionTrainJob":
        hours = Hours(fault_rig.TRAINING)
        tokenizer = {"uri": "pvc://data/tokenizer"}
        model = {"init": {"job": {"name": "base"}}, "tokenizer": tokenizer}
        hours.apply(kind, manifests.train_job(model=model))
    else:
        hours = Hours(fault_rig.SERVING)
        hours.apply(kind, manifests.inference_service(model={"job": {"name": "base"}}))
    return hours.go_on(minutes)


def with_model(hours: Hours) -> Hours:
    inference_life.make_job(hours.world.server, "uid-of-base", name="base")
    return hours.go_on(20)


def growing(minutes: int) -> Hours:
    """A third group is asked for, and nobody makes its pods."""
    hours = serving()
    with hours.world.by_people() as people:
        inference_life.patch(people, {"replicas": 3})
    return hours.go_on(minutes, pods=False)


def ill(minutes: int) -> Hours:
    """No pod of the service is ready any longer."""
    hours = serving()
    controllers = hours.world.controllers
    assert controllers is not None
    controllers.sick.add(inference_life.NAME)
    hours.go_on(minutes)
    controllers.sick.clear()
    return hours


JOB, SERVICE = "DiffusionTrainJob", inference_life.KIND
# For each alert what lets it fire at the end, and what is much like it and lets it fire at no time.
CASES: dict[str, tuple[str, Callable[[], Hours], Callable[[], Hours]]] = {
    "no lease": (
        "UnmaskOperatorWithoutLeader",
        lambda: training().refusing(10, "/leases/unmask-operator"),
        lambda: training().refusing(3, "/leases/unmask-operator").go_on(10),
    ),
    "Jobs cannot be watched": (
        "UnmaskOperatorWatchIsSilent",
        lambda: training().refusing(20, "/jobs"),
        lambda: training().refusing(12, "/jobs").go_on(15),
    ),
    "a status cannot be written": (
        "UnmaskOperatorRetries",
        lambda: failing(50),
        lambda: failing(10).go_on(35),
    ),
    "a job without its model": (
        "UnmaskResourcesStalled",
        lambda: waiting_for_a_model(JOB, 15),
        lambda: with_model(waiting_for_a_model(JOB, 8)),
    ),
    "a service without its model": (
        "UnmaskResourcesStalled",
        lambda: waiting_for_a_model(SERVICE, 15),
        lambda: with_model(waiting_for_a_model(SERVICE, 8)),
    ),
    "a rollout that stands still": (
        "UnmaskResourcesStalled",
        lambda: growing(22),
        lambda: growing(8).go_on(15),
    ),
    # After ten minutes they are Stuck instead of Degraded: the alert goes on.
    "lost groups": (
        "UnmaskServiceGroupsUnavailable",
        lambda: ill(20),
        lambda: ill(8).go_on(15),
    ),
}


def tried(name: str, hours: Hours, *, fires: bool) -> dict[str, object]:
    """A test of promtool's: one series of the alert fires at the end, or none has ever."""
    (alert,) = (one for one in ALERTS if one.name == name)
    firing = f'ALERTS{{alertname="{name}",alertstate="firing"}}'
    return {
        "interval": "1m",
        "input_series": hours.series(alert.expr),
        "promql_expr_test": [
            {
                "expr": f"count({firing})" if fires else f"count(max_over_time({firing}[1d]))",
                "eval_time": f"{len(hours.told) - 1}m",
                "exp_samples": [{"labels": "{}", "value": 1}] if fires else [],
            }
        ],
    }


def judged(name: str, tests: list[dict[str, object]], folder: Path) -> None:
    own = [rule for rule in rules(operator=OPERATOR) if rule["alert"] == name]
    (folder / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "unmask", "rules": own}]}))
    settings = {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": tests}
    (folder / "tests.yml").write_text(yaml.safe_dump(settings))
    assert "SUCCESS" in promtool("check", "rules", "rules.yml", where=folder)
    assert "SUCCESS" in promtool("test", "rules", "tests.yml", where=folder)


@pytest.mark.parametrize("case", CASES)
def test_an_alert_fires_when_it_should_and_not_when_it_nearly_should(case: str, tmp_path: Path) -> None:
    name, loud, quiet = CASES[case]
    tests = [tried(name, loud(), fires=True), tried(name, quiet(), fires=False)]
    assert tests[0]["input_series"], "the operator has told nothing of it"
    judged(name, tests, tmp_path)


def test_without_any_operator_none_leads(tmp_path: Path) -> None:
    name = "UnmaskOperatorWithoutLeader"
    gone = Hours(fault_rig.TRAINING)
    gone.told = [{} for _ in range(10)]
    judged(name, [tried(name, gone, fires=True)], tmp_path)


def test_each_alert_of_the_operator_has_a_case() -> None:
    assert {name for name, _, _ in CASES.values()} == {a.name for a in ALERTS if a.whose == "operator"}
