"""Many jobs at once on a real API server: how long until all are made, and what the operator takes for it.

No controller makes pods, so a job is at rest when its objects are there and its status says so. Then nothing
is done for a while, and what the operator asks for meanwhile is counted. `python -m support.operator_scale`
(as `make bench-operator` calls it) does so for several numbers of jobs, each on a server of its own, and
prints one JSON object.
"""

import argparse
import concurrent.futures
import json
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from support import real_api_server
from support.manifests import changed, train_job
from support.operated import ACCOUNT, TRAIN_JOB, install, namespace, started, until
from unmask_operator.control.api import Api, KubernetesTransport
from unmask_operator.control.clock import SystemClock
from unmask_operator.resources import RESOURCES

__all__ = ["measure"]

Json = dict[str, Any]
FLAGS = ("--qps=500", "--burst=1000", "--workers=8")
_WRITES = {"create", "update", "patch", "delete"}


def measure(folder: Path, jobs: int, *, idle: float) -> Json:
    """Return what it takes to bring ``jobs`` jobs of two nodes to rest, and what is asked for after that."""
    with real_api_server.running(folder, ACCOUNT) as server:
        api = Api(KubernetesTransport(server.client()), SystemClock(), timeout=60.0)
        install(api)
        namespace(api, "team")
        with started(server, folder, *FLAGS) as process:
            until(lambda: _log(folder).count(" leading"), "the operator leads", 300.0)
            before = _audited(server.audit)
            used = _cpu(process.pid)
            begun = time.monotonic()
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda number: _submit(api, number), range(jobs)))
            submitted = time.monotonic() - begun
            until(lambda: len(_started(api)) == jobs, "every job is made", 1800.0)
            made = time.monotonic() - begun
            asked = -1
            while (now := sum(_more(_audited(server.audit), before, lease=False).values())) != asked:
                asked = now
                time.sleep(3.0)  # until nothing is asked for in that time but the lease
            cpu = _cpu(process.pid) - used
            memory = _memory(process.pid)
            calls = _more(_audited(server.audit), before, lease=False)
            rest = _audited(server.audit)
            resting = _cpu(process.pid)
            time.sleep(idle)
            idle_calls = _more(_audited(server.audit), rest, lease=True)
            idle_cpu = _cpu(process.pid) - resting
    writes = {f"{verb} {kind}": number for (verb, kind), number in idle_calls.items() if verb in _WRITES}
    return {
        "jobs": jobs,
        "seconds": round(made, 1),
        "submitting_seconds": round(submitted, 1),
        "milliseconds_per_job": round(1000 * made / jobs, 1),
        "cpu_milliseconds_per_job": round(1000 * cpu / jobs, 1),
        "calls_per_job": round(sum(calls.values()) / jobs, 2),
        "calls": {f"{verb} {kind}": number for (verb, kind), number in sorted(calls.items())},
        "peak_memory_mib": round(memory / 2**20),
        "idle_seconds": idle,
        "idle_cpu_seconds": round(idle_cpu, 2),
        "idle_writes": writes,
    }


def _submit(api: Api, number: int) -> None:
    name = f"job-{number:05d}"
    # After the gang's time a job says once that its pods have no place, and none will have.
    late = {"spec.scheduling.gang.timeoutSeconds": 86_400, "spec.runPolicy.startupDeadlineSeconds": 0}
    body = changed(train_job(), {"metadata.name": name, "spec.parallelism.nodes": 2} | late)
    api.create(TRAIN_JOB, "team", body)


def _started(api: Api) -> set[str]:
    told = {
        one["metadata"]["name"]
        for one in api.list(TRAIN_JOB, "team")[0]
        if (one.get("status") or {}).get("state") == "Starting"
    }
    there = {one["metadata"]["name"].removesuffix("-a0") for one in api.list(RESOURCES["Job"], "team")[0]}
    time.sleep(0.5)  # these lists are large
    return told & there


def _audited(log: Path) -> Counter[tuple[str, str]]:
    """Return the operator's requests by verb and kind, those that are answered."""
    found: Counter[tuple[str, str]] = Counter()
    for line in log.read_text().splitlines():
        if line.endswith("}"):
            entry = json.loads(line)
            where = entry.get("objectRef") or {}
            found[
                entry["verb"], "/".join(filter(None, (where.get("resource"), where.get("subresource"))))
            ] += 1
    return found


def _more(now: Counter[Any], before: Counter[Any], *, lease: bool) -> Counter[Any]:
    more = now - before
    if not lease:
        more = Counter({key: number for key, number in more.items() if key[1] != "leases"})
    return more


def _cpu(pid: int) -> float:
    """Return the seconds that a process has computed for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _memory(pid: int) -> int:
    """Return the most bytes of memory that a process has held at once."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"process {pid} has no VmHWM")


def _log(folder: Path) -> str:
    return (folder / "operator.log").read_text()


def main(arguments: list[str] | None = None) -> int:
    """Measure, and print one JSON object."""
    flags = argparse.ArgumentParser()
    flags.add_argument("--jobs", type=int, nargs="+", default=[250, 500, 1000])
    flags.add_argument("--idle", type=float, default=30.0)
    chosen = flags.parse_args(arguments)
    results = []
    for jobs in chosen.jobs:
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure(Path(folder), jobs, idle=chosen.idle))
    told = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[1], 1),
        "flags": list(FLAGS),
        "runs": results,
    }
    sys.stdout.write(json.dumps(told) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
