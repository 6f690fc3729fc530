"""The operator as a process, over HTTP: it makes a job, a standby takes over, and it stops when told to."""

import contextlib
import copy
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from support import fault_rig
from support.api_server import ApiServer, listening
from support.operator_process import operator_process
from unmask_operator.control.api import Api, Request
from unmask_operator.control.clock import SystemClock
from unmask_operator.resources import RESOURCES

# The small reconciler of the rig, in the real process.
_PROGRAM = (
    "import sys; from unmask_operator.entry import main; from support.attempts_reconciler import RECONCILER;"
    " sys.exit(main(sys.argv[1:], [RECONCILER]))"
)


@contextlib.contextmanager
def operator(folder: Path, address: str) -> Iterator["subprocess.Popen[bytes]"]:
    cluster = {
        "clusters": [{"name": "c", "cluster": {"server": address}}],
        "users": [{"name": "u", "user": {}}],
    }
    context = {"contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}], "current-context": "x"}
    config = folder / "kubeconfig"
    config.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config"} | cluster | context))
    flags = [f"--kubeconfig={config}", "--lease-namespace=system", "--lease-seconds=3"]
    flags += ["--host=127.0.0.1", "--port=0", "--workers=2"]
    with operator_process(_PROGRAM, *flags, log=folder / "log") as process:
        yield process


def until(true: Callable[[], bool], folder: Path, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, (folder / "log").read_text()[-3000:]
        time.sleep(0.05)


def test_a_standby_takes_over_and_the_last_one_stops_when_told_to(tmp_path: Path) -> None:
    server = ApiServer()
    # Each third write fails though it was done, so that nothing rests on answers.
    server.fault = lambda ordinal, request: (
        "error after" if ordinal % 3 == 0 and "/leases" not in request.path else None
    )
    people = Api(fault_rig.DirectTransport(server, "people"), SystemClock())

    def state() -> str:
        status = server.objects("DiffusionTrainJob")[0].get("status") or {}
        return str(status.get("state"))

    with listening(server) as address, operator(tmp_path, address) as first:
        until(lambda: bool(server.objects("Lease")), tmp_path)
        usual, server.fault = server.fault, lambda ordinal, request: None
        people.create(RESOURCES["DiffusionTrainJob"], fault_rig.NAMESPACE, copy.deepcopy(fault_rig.TRAIN_JOB))
        server.fault = usual
        until(lambda: [one["metadata"]["name"] for one in server.objects("Job")] == ["mini-a0"], tmp_path)
        with operator(tmp_path, address) as second:
            first.kill()
            failed = {"conditions": [{"type": "Failed", "status": "True"}]}
            server.set_status("Job", fault_rig.NAMESPACE, "mini-a0", failed)
            until(lambda: [one["metadata"]["name"] for one in server.objects("Job")] == ["mini-a1"], tmp_path)
            server.set_status(
                "Job",
                fault_rig.NAMESPACE,
                "mini-a1",
                {"conditions": [{"type": "Complete", "status": "True"}]},
            )
            until(lambda: state() == "Complete" and not server.objects("Service"), tmp_path)
            second.send_signal(signal.SIGTERM)
            assert second.wait(timeout=30) == 0
    lease = server.objects("Lease")[0]["spec"]
    assert lease["holderIdentity"] == ""
    assert lease["leaseTransitions"] == 1


def test_a_leader_that_cannot_renew_its_lease_ends(tmp_path: Path) -> None:
    server = ApiServer()
    with listening(server) as address, operator(tmp_path, address) as process:
        until(lambda: bool(server.objects("Lease")), tmp_path)

        def no_leases(request: Request) -> tuple[int, str, str] | None:
            return (500, "InternalError", "planned") if "/leases" in request.path else None

        server.refusal = no_leases
        assert process.wait(timeout=30) == 1
    assert "the lease is lost" in (tmp_path / "log").read_text()
