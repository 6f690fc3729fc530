"""The Helm charts on a real API server that enforces restricted Pod Security: installed, upgraded, removed.

Nothing runs there: no controller makes a pod. What it needs pods for is tried on a real node (tests/e2e).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from support import real_api_server
from support.charts import PAGE, Json, Prompt, page_commands
from support.operated import RESTRICTED, namespace
from support.real_api_server import DEFINITION
from unmask_operator.control.api import Api, KubernetesTransport
from unmask_operator.control.clock import SystemClock
from unmask_operator.resources import RESOURCES

pytestmark = [pytest.mark.slow, pytest.mark.helm, pytest.mark.real_api]

TRAIN_JOB, SERVICE = RESOURCES["DiffusionTrainJob"], RESOURCES["DiffusionInferenceService"]
SYSTEM, TRAINING = "unmask-system", "training"
NEEDS_PODS = re.compile(r" rollout status |^helm test | port-forward |^unmask generate ")
# What a release may consist of.
KINDS = "deployments,services,serviceaccounts,configmaps,roles,rolebindings,pdb,networkpolicies,pods"
WIDE = "clusterroles,clusterrolebindings"


@dataclass(frozen=True)
class Place:
    """An API server, and who administrates it."""

    api: Api
    prompt: Prompt

    def objects(self, release: str) -> dict[tuple[str, str], Json]:
        """Return what there is of a release, by kind and name."""
        chosen = f"-l app.kubernetes.io/instance={release} -o yaml"
        found = [f"kubectl get {KINDS} --all-namespaces {chosen}", f"kubectl get {WIDE} {chosen}"]
        items = [one for line in found for one in yaml.safe_load(self.prompt.run(line))["items"]]
        return {(one["kind"], one["metadata"]["name"]): one for one in items}

    def dry_run(self, namespace: str, pod: Json) -> None:
        """Have the API server admit a pod and forget it."""
        self.prompt.run(f"kubectl create --namespace {namespace} --dry-run=server -f -", pod)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("plane")
    with real_api_server.running(folder, "nobody") as server:
        api = Api(KubernetesTransport(server.client()), SystemClock(), timeout=60.0)
        for name in (SYSTEM, TRAINING):
            namespace(api, name, **RESTRICTED, **{"pod-security.kubernetes.io/warn": "restricted"})
        yield Place(api, Prompt(server.kubeconfig(folder, admin=True), folder / "helm"))


def versions(objects: dict[tuple[str, str], Json]) -> dict[tuple[str, str], Any]:
    return {key: one["metadata"]["resourceVersion"] for key, one in objects.items()}


def pod_of(deployment: Json) -> Json:
    """Return a pod as a Deployment would make it."""
    spec = deployment["spec"]["template"]["spec"]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": spec}


def pods_of(place: Place, release: str, space: str) -> list[Json]:
    """Return the pods that a release's Deployments and tests would make."""
    made = [one for (kind, _), one in place.objects(release).items() if kind == "Deployment"]
    pods = [pod_of(one) for one in made]
    hooks = place.prompt.run(f"helm get hooks {release} --namespace {space}")
    pods += [one for one in yaml.safe_load_all(hooks) if one]
    assert len(pods) == 2
    return pods


def test_every_command_of_the_page_works_up_to_where_pods_are_needed(place: Place) -> None:
    headings = ("## The operator", "## An engine", "## Upgrade and remove")
    lines = [line for heading in headings for line in page_commands(PAGE, heading)]
    assert sum(bool(NEEDS_PODS.search(line)) for line in lines) == 6
    tried = set()
    for line in lines:
        if NEEDS_PODS.search(line):
            continue
        if "apply" in line:
            real_api_server.until_served(place.api, TRAIN_JOB)
        release = line.split()[2]
        match line.split()[:2]:
            case ["helm", "install"]:
                place.prompt.run(line)
                space = SYSTEM if release == "unmask-operator" else TRAINING
                for pod in pods_of(place, release, space):
                    place.dry_run(space, pod)
            case ["helm", "upgrade"]:
                before = place.objects(release)
                place.prompt.run(line)
                after = place.objects(release)
                changed = {key for key, one in versions(after).items() if one != versions(before)[key]}
                assert changed == {("Deployment", "words-unmask-inference")}
                (engine,) = after[changed.pop()]["spec"]["template"]["spec"]["containers"]
                assert "--rows=4" in engine["args"]
                assert engine["image"].startswith("registry.example/"), "the other values are kept"
            case ["helm", "uninstall"]:
                assert place.objects(release)
                place.prompt.run(line)
                assert place.objects(release) == {}
            case ["kubectl", "get"]:
                assert "quickstart-small" in place.prompt.run(line)
            case _:
                place.prompt.run(line)
        tried.add(tuple(line.split()[:2]))
    assert tried == {
        ("helm", "install"),
        ("helm", "upgrade"),
        ("helm", "uninstall"),
        ("kubectl", "apply"),
        ("kubectl", "get"),
    }
    # Jobs and what defines them outlive the operator, and its next release takes over.
    assert place.api.get(DEFINITION, None, f"{TRAIN_JOB.plural}.{TRAIN_JOB.group}")
    job = place.api.get(TRAIN_JOB, TRAINING, "quickstart-small")
    place.prompt.run(next(line for line in lines if line.startswith("helm install unmask-operator")))
    assert place.api.get(TRAIN_JOB, TRAINING, "quickstart-small")["metadata"]["uid"] == job["metadata"]["uid"]
    place.prompt.run(f"helm uninstall unmask-operator --namespace {SYSTEM}")


def test_an_upgrade_of_the_operator_changes_what_its_values_say_and_nothing_else(place: Place) -> None:
    chart = "unmask-operator deploy/helm/unmask-operator"
    place.prompt.run(f"helm install {chart} --namespace {SYSTEM}")
    name = f"{TRAIN_JOB.plural}.{TRAIN_JOB.group}"
    before, definition = place.objects("unmask-operator"), place.api.get(DEFINITION, None, name)
    place.prompt.run(f"helm upgrade {chart} --namespace {SYSTEM}")
    assert versions(place.objects("unmask-operator")) == versions(before), "nothing new"
    place.prompt.run(f"helm upgrade {chart} --namespace {SYSTEM} --set replicas=2 --set lease.seconds=30")
    after = place.objects("unmask-operator")
    deployment = after["Deployment", "unmask-operator"]
    assert deployment["spec"]["replicas"] == 2
    assert "--lease-seconds=30" in deployment["spec"]["template"]["spec"]["containers"][0]["args"]
    assert after.keys() - before.keys() == {("PodDisruptionBudget", "unmask-operator")}
    assert before.keys() <= after.keys()
    same = place.api.get(DEFINITION, None, name)["metadata"]
    assert (same["uid"], same["generation"]) == (
        definition["metadata"]["uid"],
        definition["metadata"]["generation"],
    )
    history = yaml.safe_load(
        place.prompt.run(f"helm history unmask-operator --namespace {SYSTEM} --output yaml")
    )
    assert [one["status"] for one in history] == ["superseded", "superseded", "deployed"]
    place.prompt.run(f"helm uninstall unmask-operator --namespace {SYSTEM}")
    assert place.objects("unmask-operator") == {}


def test_a_release_that_the_operator_makes_pods_of_comes_changes_and_goes(
    place: Place, tmp_path: Path
) -> None:
    place.prompt.run(f"helm install unmask-operator deploy/helm/unmask-operator --namespace {SYSTEM}")
    real_api_server.until_served(place.api, SERVICE)
    page, heading = PAGE.with_name("serve-on-a-cluster.md"), "## By Helm"
    section = page.read_text(encoding="utf-8").partition(f"\n{heading}\n")[2]
    values = tmp_path / "chat.yaml"
    values.write_text(section.partition("```yaml\n")[2].partition("```")[0], encoding="utf-8")
    install, _, _, upgrade, remove = page_commands(page, heading)
    # There is no pod that could pass the cluster's test, and nobody who says that it is ready.
    place.prompt.run(install.replace("chat.yaml", str(values)))
    made = place.api.get(SERVICE, TRAINING, "chat")
    assert made["spec"]["model"]["uri"] == "pvc://models/LLaDA2.0-mini"
    (front,) = (one for (kind, _), one in place.objects("chat").items() if kind == "Deployment")
    place.dry_run(TRAINING, pod_of(front))
    place.prompt.run(upgrade)
    changed = place.api.get(SERVICE, TRAINING, "chat")
    assert changed["metadata"]["uid"] == made["metadata"]["uid"]
    assert changed["metadata"]["generation"] == made["metadata"]["generation"] + 1
    assert changed["spec"] == made["spec"] | {"model": made["spec"]["model"] | {"uri": "pvc://models/other"}}
    place.prompt.run(remove)
    assert place.objects("chat") == {}
    assert place.prompt.run(f"kubectl get diffusioninferenceservices --namespace {TRAINING} -o name") == ""
    place.prompt.run(f"helm uninstall unmask-operator --namespace {SYSTEM}")


def test_a_pod_that_is_not_restricted_is_refused_there(place: Place) -> None:
    """What the tests above would find if a chart's pods were not."""
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "one"},
        "spec": {"containers": [{"name": "c", "image": "i"}]},
    }
    command = ["kubectl", "create", f"--namespace={TRAINING}", "--dry-run=server", "-f", "-"]
    with pytest.raises(AssertionError, match='violates PodSecurity "restricted'):
        place.prompt.run(" ".join(command), pod)
