"""A training job on a real node, by the operator in a pod of its own, with its own permissions.

Every namespace enforces restricted Pod Security. The job is the quickstart's small one, on two pods of one
process each.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from observability.alerts import rules
from observability.dashboards import queries
from safetensors.torch import load_file, save_file

from parent_death import bound
from real_cluster import programs
from support import real_clusters
from support.asking import answers
from support.certificates import Authority, client_tls
from support.charts import PAGE, Prompt, page_commands
from support.monitoring import monitoring_pods
from support.object_stores import BUCKET, store_server
from support.quickstart import EXAMPLE, load_module
from support.real_clusters import Cluster
from unmask.client import Client
from unmask.models.folder import CHECKSUMS
from unmask.telemetry import metrics
from unmask.training.fetching import fetch
from unmask_api import base, crd

pytestmark = [pytest.mark.slow, pytest.mark.real_images]

ROOT = Path(__file__).parents[2]
SYSTEM, TRAINING = "unmask-system", "training"
LOOK = ROOT / "docs/how-to/test-on-a-real-cluster.md"
STORES = LOOK.with_name("use-object-stores.md")
TUTORIAL = LOOK.parents[1] / "tutorials/cluster.md"
SERVING = LOOK.with_name("serve-on-a-cluster.md")
FOLDERS = "/srv/unmask"
"""Where the first page has the volumes."""
STEPS = 655


@dataclass(frozen=True)
class Place:
    """A node with the operator on it, and a namespace to train in."""

    cluster: Cluster
    volumes: Path
    """What the claims ``data`` and ``run`` are on the node."""
    prompt: Prompt
    began: float
    """When the cluster was there and empty, by the monotonic clock."""

    def job(self, name: str) -> Any:
        found = self.cluster.get("dtj", name, "-n", TRAINING)
        return found and found | {"status": found.get("status", {})}

    def step(self, name: str) -> int:
        return int(self.job(name)["status"].get("progress", {}).get("step", 0))

    def committed(self, name: str) -> int:
        """Return the newest checkpoint's step."""
        steps = (self.volumes / "run" / name / "checkpoints").glob("*/manifest.json")
        return max((int(path.parent.name.rpartition("-")[2]) for path in steps), default=0)

    def pods(self, name: str, attempt: int) -> dict[str, Any]:
        chosen = f"unmask.dev/job={name},unmask.dev/attempt={attempt}"
        return {
            pod["metadata"]["name"]: pod for pod in self.cluster.items("pods", "-n", TRAINING, "-l", chosen)
        }

    def until_state(self, name: str, state: str, seconds: float = 600.0) -> Any:
        def reached() -> Any:
            job = self.job(name)
            told = job["status"].get("state")
            assert told in (state, *_ON_THE_WAY), json.dumps(job["status"], indent=1) + self.story(name)
            return job if told == state else None

        try:
            return self.cluster.until(reached, f"{name}: {state}", seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.story(name)}") from None

    def story(self, name: str, kind: str = "dtj", label: str = "unmask.dev/job") -> str:
        """Return what helps whoever reads of a failure of a job, or of a service."""
        found = self.cluster.get(kind, name, "-n", TRAINING) or {}
        told = [json.dumps(found.get("status"), indent=1)]
        for arguments in (
            ["describe", "pods", "-n", TRAINING],
            ["get", "events", "-n", TRAINING],
            ["logs", "-n", TRAINING, "-l", f"{label}={name}", "--tail=30", "--prefix"],
            ["logs", "-n", SYSTEM, "-l", "app.kubernetes.io/name=unmask-operator", "--tail=30"],
        ):
            done = subprocess.run(self.cluster.command(*arguments), capture_output=True, text=True)
            told.append(f"$ kubectl {' '.join(arguments)}\n{done.stdout[-6000:]}{done.stderr}")
        return "\n".join(told)

    def weights(self, name: str) -> dict[str, str]:
        folder = self.volumes / "run" / name / "model"
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.glob("*.safetensors"))
        }


_ON_THE_WAY = ("None", None, "Queued", "Starting", "Running", "Restarting", "Suspended")


def train_job(name: str) -> Any:
    """Return the quickstart's small job as two pods, with results below ``name`` on the volume."""
    job = yaml.safe_load((EXAMPLE / "quickstart-small.yaml").read_text())
    job["metadata"] = {"name": name, "namespace": TRAINING}
    job["spec"]["parallelism"] |= {"nodes": 2, "processesPerNode": 1}
    job["spec"]["checkpoint"]["uri"] = f"pvc://run/{name}"
    job["spec"]["stages"][-1]["steps"] += 500  # or it ends before all has happened to it
    job["spec"]["observability"] = {"progressIntervalSeconds": 5}
    job["spec"]["runPolicy"] = {"restartBackoffSeconds": 1}
    return job


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    volumes = tmp_path_factory.mktemp("volumes")
    with real_clusters.running("node") as cluster:
        began = time.monotonic()
        prompt = Prompt(cluster.kubeconfig, tmp_path_factory.mktemp("helm"))
        restricted = [f"pod-security.kubernetes.io/{mode}=restricted" for mode in ("enforce", "warn")]
        cluster.kubectl("create", "namespace", SYSTEM)
        cluster.kubectl("label", "namespace", SYSTEM, *restricted)
        claims = (EXAMPLE / "volumes.yaml").read_text().replace(FOLDERS, str(volumes))
        for line in page_commands(LOOK, "## A cluster to look at"):
            line = line.replace(FOLDERS, str(volumes))
            if line.startswith("kubectl apply"):
                cluster.kubectl("apply", "-f", "-", given=list(yaml.safe_load_all(claims)))
            elif line.startswith("helm install"):
                line = line.replace('"$OPERATOR_VALUES"', str(cluster.operator_values))
                prompt.run(f"{line} --set lease.seconds=5")
            elif not line.startswith(("make", "export")):
                prompt.run(line)
            if line.startswith("kubectl create namespace"):
                cluster.kubectl("label", "namespace", TRAINING, *restricted)
        yield Place(cluster, volumes, prompt, began)


def helm(cluster: Cluster, *arguments: str) -> None:
    command = [str(programs.folder() / "helm"), f"--kubeconfig={cluster.kubeconfig}", *arguments]
    done = subprocess.run([*command, "--wait", "--timeout=10m"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def shown(*starts: str) -> Iterator[str]:
    """Yield the commands of docs/how-to/install-with-helm.md that begin with ``starts``, one for each."""
    headings = ("## The operator", "## An engine", "## Upgrade and remove")
    lines = [line for heading in headings for line in page_commands(PAGE, heading)]
    for start in starts:
        (line,) = [line for line in lines if line.startswith(start)]
        yield line


def kill(pod: str) -> None:
    """Kill all processes of a pod: those in a control group with its UID in the name."""
    killed = 0
    for path in Path("/proc").glob("[0-9]*/cgroup"):
        with suppress(OSError):  # it has ended
            if f"pod{pod}" in path.read_text():
                os.kill(int(path.parent.name), signal.SIGKILL)
                killed += 1
    assert killed


@contextmanager
def watching(place: Place, path: Path) -> Iterator[None]:
    """Write what ``kubectl get dtj -w`` prints to ``path``."""
    with (
        path.open("wb") as printed,
        subprocess.Popen(
            bound(place.cluster.command("get", "dtj", "-n", TRAINING, "-w")), stdout=printed
        ) as process,
    ):
        try:
            yield
        finally:
            process.terminate()


@contextmanager
def forwarded(cluster: Cluster, target: str, port: int) -> Iterator[str]:
    """Yield an address of this machine from which kubectl forwards to a port in the cluster."""
    command = bound(cluster.command("port-forward", "-n", TRAINING, target, f":{port}"))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            found = re.search(r"127\.0\.0\.1:\d+", line)
            assert found, line
            yield found[0]
        finally:
            process.terminate()


def test_a_page_takes_a_stranger_from_an_empty_cluster_to_tokens_in_ten_minutes(
    place: Place, record_measurement: Callable[[str, float | str], None]
) -> None:
    headings = ("## Train", "## Serve", "## Ask from outside", "## Away with it")
    train, serve, ask, away = ([*page_commands(TUTORIAL, heading)] for heading in headings)
    for line in [*train, *serve]:
        said = place.prompt.run(line.replace('"$ENGINE_VALUES"', str(place.cluster.engine_values)))
    assert "Succeeded" in said and '"text"' in said, said
    forward, generate = ask
    assert forward.split()[3:6] == ["port-forward", "service/words", "50051:50051"]
    with forwarded(place.cluster, "service/words", 50051) as address:
        program, *arguments = generate.replace("127.0.0.1:50051", address).split()
        command = [sys.executable, "-m", f"{program}.cli.main", *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds = time.monotonic() - place.began
    told = json.loads(done.stdout)
    assert told["text"] and told["usage"]["tpf"] > 0
    record_measurement("seconds from an empty cluster to tokens", round(seconds))
    assert seconds < 600
    for line in away:
        place.prompt.run(line)


@pytest.fixture(scope="module")
def undisturbed(place: Place, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A job that nothing happened to; returns what ``kubectl get dtj -w`` printed of it."""
    printed = tmp_path_factory.mktemp("watch") / "printed"
    with watching(place, printed):
        place.cluster.kubectl("apply", "-f", "-", given=train_job("quiet"))
        place.until_state("quiet", "Succeeded")
    return printed.read_text()


def test_the_job_trains_keeps_checkpoints_and_completes(place: Place, undisturbed: str) -> None:
    status = place.job("quiet")["status"]
    told = {one["type"]: one for one in status["conditions"]}
    assert told["Complete"]["status"] == "True" and told["Succeeded"]["status"] == "True"
    assert status["attempt"] == 0 and status["restarts"] == 0
    assert status["progress"]["step"] == STEPS and status["progress"]["percentage"] == 100
    assert place.committed("quiet") == STEPS
    assert place.weights("quiet")
    ended = [
        state["state"]["terminated"]
        for pod in place.pods("quiet", 0).values()
        for state in pod["status"]["containerStatuses"]
    ]
    assert [json.loads(one["message"])["reason"] for one in ended] == ["Completed"] * 2


def test_kubectl_get_shows_step_loss_and_what_is_left_as_they_change(undisturbed: str) -> None:
    head, *rows = (line.split() for line in undisturbed.splitlines())
    assert head == "NAME STATE STAGE STEP LOSS LEFT RESTARTS AGE".split()
    # Before the first step some columns are empty.
    shown = [(int(row[3]), float(row[4]), int(row[5])) for row in rows if len(row) == len(head)]
    steps = [step for step, _, _ in shown]
    assert steps == sorted(steps) and len(set(steps)) >= 3, undisturbed
    assert all(loss > 0 for _, loss, _ in shown)
    assert any(left > 0 for _, _, left in shown) and shown[-1][2] == 0


def test_a_lost_pod_a_new_operator_and_a_pause_change_no_weight(place: Place, undisturbed: str) -> None:
    name, cluster = "disturbed", place.cluster
    cluster.kubectl("apply", "-f", "-", given=train_job(name))
    cluster.until(lambda: place.committed(name) >= 20 and place.step(name), "a checkpoint", 600)

    # The operator ends and another takes its place: the pods are the same, and none was restarted.
    before = {pod: found["metadata"]["uid"] for pod, found in place.pods(name, 0).items()}
    assert len(before) == 2
    cluster.kubectl("delete", "pod", "-n", SYSTEM, "-l", "app.kubernetes.io/name=unmask-operator", "--wait")
    cluster.kubectl("rollout", "status", "deployment/unmask-operator", "-n", SYSTEM, "--timeout=300s")
    seen = place.step(name)
    cluster.until(lambda: place.step(name) > seen, "progress under the new operator", 600)
    after = place.pods(name, 0)
    assert {pod: found["metadata"]["uid"] for pod, found in after.items()} == before
    assert all(
        one["restartCount"] == 0 for pod in after.values() for one in pod["status"]["containerStatuses"]
    )

    # A pod's processes are killed, which no trainer can do anything about.
    (lost,) = (pod for pod in after.values() if "-a0-1-" in pod["metadata"]["name"])
    kill(lost["metadata"]["uid"])
    cluster.until(lambda: len(place.pods(name, 1)) == 2, "another attempt", 600)
    # It goes on from the last commit, and commits again.
    since = place.committed(name)
    cluster.until(lambda: place.committed(name) > since >= 20, "a checkpoint of the second attempt", 600)

    pause = {"spec": {"suspend": True}}
    cluster.kubectl("patch", "dtj", name, "-n", TRAINING, "--type=merge", "-p", json.dumps(pause))
    place.until_state(name, "Suspended")
    chosen = ["-n", TRAINING, "-l", f"unmask.dev/job={name}"]
    cluster.until(lambda: not cluster.items("pods,jobs", *chosen), "no pods while it is suspended")
    saved = place.committed(name)
    assert saved < STEPS
    pause["spec"]["suspend"] = False
    cluster.kubectl("patch", "dtj", name, "-n", TRAINING, "--type=merge", "-p", json.dumps(pause))
    status = place.until_state(name, "Succeeded")["status"]

    assert status["restarts"] == 2 and status["restartsCounted"] == 1
    told = [one["reason"] for one in status["history"]]
    assert len(told) == 3 and told[1:] == ["Suspended", "Completed"], told
    assert place.weights(name) == place.weights("quiet")
    records = (place.volumes / "run" / name / "metrics.jsonl").read_text().splitlines()
    steps = [one["step"] for one in map(json.loads, records) if one["kind"] == "step"]
    assert steps == list(range(1, STEPS + 1))


def stored_job(name: str) -> Any:
    """Return a job of one pod whose run is in the object store of the test, with the keys of a Secret."""
    job = train_job(name)
    spec = job["spec"]
    spec["stages"] = [spec["stages"][0] | {"steps": 80}]
    spec["parallelism"] |= {"nodes": 1}
    spec["credentials"] = ["s3-key"]
    spec["checkpoint"] = {"uri": f"s3://{BUCKET}/{name}", "everySteps": 10, "keepLast": 2}
    del spec["evaluation"]
    return job


def test_a_job_goes_on_from_a_checkpoint_in_an_object_store(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, cluster = "stored", place.cluster
    with cluster.listen() as listener, store_server(also=listener) as server:
        host, port = listener.getsockname()
        keys = server.environment | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}
        variables = tmp_path / "s3.env"
        variables.write_text("".join(f"{variable}={value}\n" for variable, value in keys.items()))
        (line,) = [line for line in page_commands(STORES) if line.startswith("kubectl")]
        place.prompt.run(line.replace("s3.env", str(variables)))
        for variable, value in server.environment.items():
            monkeypatch.setenv(variable, value)
        store = server.store(name)

        def committed() -> set[int]:
            manifests = [one for one in store.sizes("checkpoints") if one.endswith("/manifest.json")]
            return {int(one.split("/")[-2].rpartition("-")[2]) for one in manifests}

        cluster.kubectl("apply", "-f", "-", given=stored_job(name))
        cluster.until(committed, "a checkpoint in the store", 600)
        pause = {"spec": {"suspend": True}}
        cluster.kubectl("patch", "dtj", name, "-n", TRAINING, "--type=merge", "-p", json.dumps(pause))
        place.until_state(name, "Suspended")
        chosen = ["-n", TRAINING, "-l", f"unmask.dev/job={name}"]
        cluster.until(lambda: not cluster.items("pods,jobs", *chosen), "the first pod has saved, and ended")
        saved = max(committed())
        assert saved < 80

        # The next pod has a machine of its own, as far as the run can tell: its scratch folder is empty.
        pause["spec"]["suspend"] = False
        cluster.kubectl("patch", "dtj", name, "-n", TRAINING, "--type=merge", "-p", json.dumps(pause))
        status = place.until_state(name, "Succeeded")["status"]
        assert [one["reason"] for one in status["history"]] == ["Suspended", "Completed"]
        assert status["checkpoint"]["latestStep"] == 80 and max(committed()) == 80
        assert status["checkpoint"]["latestUri"] == f"s3://{BUCKET}/{name}/checkpoints/step-00000080"
        records = store.read("metrics.jsonl").decode().splitlines()
        steps = [one["step"] for one in map(json.loads, records) if one["kind"] == "step"]
        assert steps == list(range(1, 81))
        said = cluster.kubectl("logs", *chosen, "--tail=-1")
        assert f"going on from s3://{BUCKET}/{name}/checkpoints/step-{saved:08d}" in said, said

        # What the last checkpoint holds is what its manifest says, and so is the model.
        for folder in ("checkpoints/step-00000080", "model"):
            found = fetch(f"s3://{BUCKET}/{name}/{folder}", tmp_path / folder)
            assert found.verified > 0
        assert (tmp_path / "model" / "model.safetensors").stat().st_size > 0
        cluster.kubectl("delete", "dtj/stored", "secret/s3-key", "-n", TRAINING, "--wait")


def test_the_operator_s_own_test_passes(place: Place) -> None:
    for line in shown("kubectl --namespace unmask-system rollout", "helm test unmask-operator"):
        place.prompt.run(line)
    left = place.cluster.items("pods", "-n", SYSTEM, "-l", "app.kubernetes.io/component=test")
    assert left == [], "what has succeeded is gone"


def test_the_model_is_served_and_a_client_outside_the_cluster_generates(
    place: Place, undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)
    demo, cluster = load_module("demo"), place.cluster
    chosen = ["--set=model.uri=pvc://run/quiet/model", f"--values={cluster.engine_values}"]
    chart = str(ROOT / "deploy/helm/unmask-inference")
    helm(cluster, "install", "words", chart, "--namespace", TRAINING, *chosen)
    ready, test, forward, ask, upgrade, remove = shown(
        "kubectl --namespace training rollout",
        "helm test words",
        "kubectl --namespace training port-forward",
        "unmask generate",
        "helm upgrade words",
        "helm uninstall words",
    )
    place.prompt.run(ready)
    said = place.prompt.run(test)
    assert "Succeeded" in said and '"text"' in said, said

    service = "service/words-unmask-inference"
    assert forward.split()[3:6] == ["port-forward", service, "50051:50051"]

    def answers() -> list[list[int]]:
        with forwarded(cluster, service, 50051) as address, Client(address) as client:
            found = [client.generate(messages=word, threshold=0.9, max_tokens=24) for word in words]
        assert all(one.usage.forwards_denoise > 0 for one in found)
        return [list(one.token_ids) for one in found]

    words = [[{"role": "user", "content": word}] for word in ("hello", "diffusion", "unmasked")]
    folder = place.volumes / "run" / "quiet" / "model"
    with demo.serving(folder, log=tmp_path / "log") as local, Client(local) as client:
        expected = [client.generate(messages=word, threshold=0.9, max_tokens=24) for word in words]
    assert answers() == [list(one.token_ids) for one in expected]
    with forwarded(cluster, service, 50051) as address:
        program, *arguments = ask.replace("127.0.0.1:50051", address).split()
        command = [sys.executable, "-m", f"{program}.cli.main", *arguments]
        assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    # One engine ends, another one with more rows takes its place, and answers as the first did.
    chosen = ["-n", TRAINING, "-l", "app.kubernetes.io/instance=words"]
    (before,) = cluster.items("pods", *chosen)
    place.prompt.run(upgrade)
    place.prompt.run(ready)
    cluster.until(lambda: len(cluster.items("pods", *chosen)) == 1, "the first engine is gone")
    (after,) = cluster.items("pods", *chosen)
    assert before["metadata"]["uid"] != after["metadata"]["uid"]
    assert "--rows=4" in after["spec"]["containers"][0]["args"]
    assert after["spec"]["containers"][0]["image"] == before["spec"]["containers"][0]["image"]
    assert answers() == [list(one.token_ids) for one in expected]

    place.prompt.run(remove)
    cluster.until(lambda: not cluster.items("all", *chosen), "nothing of the release is left")


def release_values(name: str, job: str) -> Any:
    """Return values of a release: what ``job`` trained, an engine and two shards a group, TLS everywhere."""
    secret = f"{name}-tls"
    return {
        "standalone": False,
        "fullnameOverride": name,
        "spec": {
            "model": {"job": {"name": job}},
            "group": {"shards": 2, "replication": 2, "tls": {"secretName": secret}},
            "rollout": {"maxSurge": 1, "maxUnavailable": 0},
            "server": {
                "threads": 1,
                "drainSeconds": 5,
                "preStopSeconds": 5,
                "tls": {"secretName": secret, "clientCaSecretName": secret},
            },
        },
        "gateway": {
            "enabled": True,
            "replicas": 1,
            "tlsSecretName": secret,
            "resources": {"requests": {"cpu": "50m"}},
        },
    }


def retold(model: Path, folder: Path) -> None:
    """Write a model that says the next token where ``model`` says one, but for the first few, the special."""
    shutil.copytree(model, folder)
    changed = 0
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if (head := tensors.get("lm_head.weight")) is not None:
            tensors["lm_head.weight"] = torch.cat([head[:10], head[10:].roll(1, 0)])
            changed += 1
        save_file(tensors, path, {"format": "pt"})
        path.chmod(0o644)  # pods run as another user
    assert changed == 1
    (folder / CHECKSUMS).unlink()


@contextmanager
def asked_all_the_time(
    cluster: Cluster, address: str, tls: Path, name: str, printed: Path
) -> Iterator[Callable[[], list[Any]]]:
    """Have a process in the node's network ask a server; yields what gives the answers of each round.

    At the end it must still be at it: it would have ended with the first request that got no answer.
    """
    command = cluster.inside(sys.executable, "-m", "support.asking", address, str(tls), name)
    with (
        printed.open("wb") as out,
        subprocess.Popen(bound(command), stdout=out, stderr=subprocess.PIPE, cwd=ROOT / "tests") as process,
    ):

        def rounds() -> list[Any]:
            if process.poll() is not None:
                assert process.stderr is not None
                raise AssertionError(process.stderr.read().decode()[-3000:])
            return [json.loads(line) for line in printed.read_text().split("\n")[:-1]]

        try:
            yield rounds
            rounds()
        finally:
            process.terminate()


def spoken(model: Path, log: Path) -> list[list[int]]:
    """Return what one process answers with a model."""
    with load_module("demo").serving(model, log=log) as local, Client(local) as client:
        return answers(client)


def test_a_release_of_an_engine_and_shards_goes_through_a_kill_an_upgrade_and_scaling(
    place: Place, undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)
    cluster, name = place.cluster, "chat"
    model, other = place.volumes / "run/quiet/model", place.volumes / "run/other/model"
    retold(model, other)
    expected, changed = spoken(model, tmp_path / "log"), spoken(other, tmp_path / "other-log")
    assert all(one != another for one, another in zip(expected, changed, strict=True))

    authority, server_name = Authority(), f"{name}.{TRAINING}.svc"
    pair = authority.issue(server_name, f"{name}-gateway")
    files = {"tls.crt": pair.certificate, "tls.key": pair.key, "ca.crt": authority.pem}
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": f"{name}-tls", "namespace": TRAINING},
        "data": {key: base64.b64encode(value).decode() for key, value in files.items()},
    }
    cluster.kubectl("apply", "-f", "-", given=secret)
    tls = client_tls(tmp_path / "tls", authority.pem, authority.issue("client"), server_name=server_name)
    values = tmp_path / "chat.yaml"
    values.write_text(yaml.safe_dump(release_values(name, "quiet")))
    install, ready, test, upgrade, remove = page_commands(SERVING, "## By Helm")
    place.prompt.run(f"{install.replace('chat.yaml', str(values))} --values {cluster.engine_values}")
    place.prompt.run(ready)

    def pods() -> dict[str, Any]:
        found = cluster.items("pods", "-n", TRAINING, "-l", f"unmask.dev/service={name}")
        return {pod["metadata"]["name"]: pod for pod in found}

    def until_ready(groups: int) -> list[str]:
        """Wait until the service is as it should be; return its groups."""

        def reached() -> Any:
            one = cluster.get("dis", name, "-n", TRAINING)
            status = one.get("status", {})
            ready = [each for each in status.get("conditions", ()) if each["type"] == "Ready"]
            current = one["metadata"]["generation"] == status.get("observedGeneration")
            settled = current and ready and ready[0]["status"] == "True" and len(pods()) == 3 * groups
            return settled and [each["name"] for each in status["groups"]]

        try:
            return list(cluster.until(reached, f"{groups} groups of {name} are ready", 400))
        except AssertionError as error:
            raise AssertionError(f"{error}\n{place.story(name, 'dis', 'unmask.dev/service')}") from None

    (group,) = until_ready(1)
    rollout = ["rollout", "status", f"deployment/{name}-gateway", "-n", TRAINING, "--timeout=120s"]
    cluster.kubectl(*rollout)
    said = place.prompt.run(test)
    assert "Succeeded" in said and '"text"' in said, said
    of = f'namespace="{TRAINING}",job="{TRAINING}/{name}",container="engine"'
    (scratch := tmp_path / "prometheus").mkdir()
    found: list[list[list[int]]] = []
    enough = threading.Event()

    def ask() -> None:
        with forwarded(cluster, f"service/{name}", 50051) as address, Client(address, tls=tls) as client:
            while not enough.is_set():
                found.append(answers(client))

    with (
        monitoring_pods(scratch, list(pods().values()), name, rules(of=of), cluster.inside) as monitor,
        ThreadPoolExecutor(1) as pool,
    ):
        asking = pool.submit(ask)
        try:
            cluster.until(lambda: len(found) >= 2 or asking.done(), "answers", 120)
            # What the dashboard shows first; `answers` has seen in each reply that there is one.
            per_forward = queries()[0].replace("$of", of).replace("$__rate_interval", "20s")
            assert metrics.TOKENS_PER_FORWARD.name in per_forward
            (ratio,) = cluster.until(lambda: monitor.values(per_forward) or asking.done(), "metrics", 120)
            assert ratio > 0
            assert len(monitor.values(f'up{{job="{TRAINING}/{name}"}} == 1')) == 3
            assert monitor.values('unmask_expert_shards{state="lost"}') == [0]
            lost = pods()[f"{group}-s-0"]["metadata"]["uid"]
            kill(lost)
            before = len(found)
            # Asked all the time, so some of it was being generated at the kill, and more is while it is away.
            cluster.until(lambda: len(found) >= before + 2 or asking.done(), "answers without the shard", 120)

            def is_back() -> bool:
                pod = pods()[f"{group}-s-0"]
                assert pod["metadata"]["uid"] == lost
                (state,) = pod["status"]["containerStatuses"]
                return bool(state["restartCount"] and state["ready"])

            cluster.until(is_back, "the shard is back", 180)
        finally:
            enough.set()
        asking.result(timeout=120)
    assert all(one == expected for one in found)

    # Another model, and whoever asks at the gateway gets an answer each time: of the one, or of the other.
    address = f"{cluster.get('service', f'{name}-gateway', '-n', TRAINING)['spec']['clusterIP']}:50050"
    with asked_all_the_time(cluster, address, tmp_path / "tls", server_name, tmp_path / "asked") as rounds:
        cluster.until(lambda: len(rounds()) >= 2, "answers", 120)
        assert rounds()[0] == expected
        # The page's goes from one uri to another; from a job's model to a uri all values are given anew.
        given = release_values(name, "quiet")
        given["spec"]["model"] = {"uri": "pvc://run/other/model"}
        values.write_text(yaml.safe_dump(given))
        start, _, _ = upgrade.partition("--reuse-values")
        place.prompt.run(f"{start} --values {values} --values {cluster.engine_values}")
        (rolled,) = until_ready(1)
        assert rolled != group
        seen = len(rounds())
        cluster.until(lambda: len(rounds()) >= seen + 2, "answers of the new group", 120)
        told = rounds()
    assert told[-1] == changed
    for one in told:
        assert all(answer in both for answer, *both in zip(one, expected, changed, strict=True))

    for groups in (2, 1):
        cluster.kubectl("scale", f"dis/{name}", "-n", TRAINING, f"--replicas={groups}")
        for one in until_ready(groups):
            with forwarded(cluster, f"pod/{one}-e-0", 50051) as address, Client(address, tls=tls) as client:
                assert answers(client) == changed

    described = cluster.kubectl("describe", "dis", name, "-n", TRAINING)
    assert "Routable" in described and "clients can connect to" in described, described
    place.prompt.run(remove)
    cluster.kubectl("delete", f"secret/{name}-tls", "-n", TRAINING, "--wait")
    kinds = (
        "statefulsets,deployments,pods,services,endpointslices,controllerrevisions,pdb,hpa,networkpolicies,"
        "secrets,serviceaccounts,dis"
    )

    def left() -> list[str]:
        items = cluster.items(kinds, "-n", TRAINING)
        return [one["metadata"]["name"] for one in items if one["metadata"]["name"].startswith(name)]

    cluster.until(lambda: not left(), "nothing of the service is left")
    assert {one["metadata"]["name"] for one in cluster.items("pvc", "-n", TRAINING)} == {"data", "run"}


def test_deleting_jobs_leaves_only_what_they_wrote(place: Place, undisturbed: str) -> None:
    cluster = place.cluster
    cluster.kubectl("delete", "dtj", "--all", "-n", TRAINING, "--wait")

    def left() -> list[str]:
        kinds = "jobs,pods,services,configmaps,secrets,dtj"
        found = [one["metadata"]["name"] for one in cluster.items(kinds, "-n", TRAINING)]
        return [name for name in found if name != "kube-root-ca.crt"]

    cluster.until(lambda: not left(), "nothing is left")
    claims = cluster.items("pvc", "-n", TRAINING)
    assert {one["metadata"]["name"] for one in claims} == {"data", "run"}
    assert place.weights("quiet")


def test_the_operator_s_release_leaves_nothing_but_its_definitions(place: Place) -> None:
    cluster = place.cluster
    (line,) = shown("helm uninstall unmask-operator")
    place.prompt.run(line)
    kinds = (
        "all,secrets,configmaps,serviceaccounts,roles,rolebindings,pdb,networkpolicies,leases,endpointslices,"
        "controllerrevisions"
    )

    def left() -> list[str]:
        wide = cluster.items("clusterroles,clusterrolebindings")
        named = [one for one in wide if "unmask" in one["metadata"]["name"]]
        found = (*cluster.items(kinds, "-n", SYSTEM), *named)
        names = [f"{one['kind']}/{one['metadata']['name']}" for one in found]
        return [
            name for name in names if name not in ("ConfigMap/kube-root-ca.crt", "ServiceAccount/default")
        ]

    cluster.until(lambda: not left(), "nothing of the operator is left", 120)
    definitions = [one["metadata"]["name"] for one in cluster.items("crd")]
    assert [name for name in definitions if name.endswith("unmask.dev")] == sorted(
        f"{one.plural}.{base.GROUP}" for one in crd.RESOURCES
    )
