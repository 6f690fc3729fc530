"""A worker process that follows a script: ``python -m support.stub_worker train --job PATH``.

The run folder's ``script.json`` is a list with an entry for each attempt: ``exit_code``, ``report`` (leave a
termination.json), ``hang`` (wait for SIGTERM), ``metrics`` (records to write). What each attempt was given is
appended to ``attempts-RANK.jsonl``; ``pids`` holds the ids of all workers.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

KEPT = ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "MASTER_ADDR")


def main() -> int:
    job = json.loads(Path(sys.argv[sys.argv.index("--job") + 1]).read_text(encoding="utf-8"))
    run = Path(job["spec"]["checkpoint"]["uri"])
    (run / "pids").mkdir(exist_ok=True)
    (run / "pids" / str(os.getpid())).touch()
    attempts = run / f"attempts-{os.environ['RANK']}.jsonl"
    count = len(attempts.read_text(encoding="utf-8").splitlines()) if attempts.exists() else 0
    script = json.loads((run / "script.json").read_text(encoding="utf-8"))[count]
    with attempts.open("a", encoding="utf-8") as file:
        entry = {"job": job, "environment": {name: os.environ[name] for name in KEPT}}
        file.write(json.dumps(entry) + "\n")
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in script.get("metrics", ()))
    if script.get("hang"):
        wait_for_sigterm()
    if script.get("report"):
        report = {"exit_code": script["exit_code"], "message": f"told to end in attempt {count}"}
        (run / "termination.json").write_text(json.dumps(report), encoding="utf-8")
    return int(script["exit_code"])


def wait_for_sigterm() -> None:
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    while not stopped:
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
