"""Kills one of two ranks at random moments, again and again, and compares what comes of it with a quiet run.

A model replicated and one shared out take turns, checkpoints are written beside the training.
A third of the kills comes at any moment of an attempt, the start included, a third soon after a step, and a
third while a checkpoint is being written. ``make test-kills KILLS=300`` runs this; the last line is JSON.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import click

from support.ranks import join, start_ranks, train_to_the_end
from support.training import metrics, training_job
from unmask_api.train_job import DiffusionTrainJob

__all__ = ["Tally", "kill_until"]

RANKS = 2
EVERY = 5
"""Steps between checkpoints."""
_ARRANGEMENTS = {
    "replicated": {"microBatchRows": 2},
    "shared out": {"shard": "Full", "microBatchRows": 2},
}
_PATIENCE_S = 90.0


@dataclass
class Tally:
    """What was done, and what came of it."""

    kills: int = 0
    kills_in_saves: int = 0
    """Of these, how many left a checkpoint half written."""
    kills_before_a_step: int = 0
    restarts: int = 0
    runs: int = 0
    steps: int = 0
    """Of each run."""
    equal: bool = True
    seconds: float = 0.0


def kill_until(kills: int, folder: Path, *, steps: int, seed: int = 0, progress_every: int = 0) -> Tally:
    """Run jobs in ``folder``, killing a rank at a time, until there were ``kills``; all runs end."""
    started, chance = time.monotonic(), random.Random(seed)
    tally = Tally(steps=2 * steps)
    for name in _ARRANGEMENTS:
        train_to_the_end(_job(folder, f"quiet {name}", name, steps), ranks=RANKS)
    while tally.kills < kills:
        for name in _ARRANGEMENTS:
            run = folder / "killed"
            shutil.rmtree(run, ignore_errors=True)
            job = _job(folder, run.name, name, steps)
            while tally.kills < kills and _killed(job, run, chance, tally):
                tally.restarts += 1
                if progress_every and tally.kills % progress_every == 0:
                    click.echo(f"{tally.kills} kills, {time.monotonic() - started:.0f} s", err=True)
            if not (run / "model").exists():
                train_to_the_end(job, ranks=RANKS)
            tally.runs += 1
            tally.equal &= _same(run, folder / f"quiet {name}")
    tally.seconds = round(time.monotonic() - started, 1)
    return tally


def _job(folder: Path, run: str, arrangement: str, steps: int) -> DiffusionTrainJob:
    """A stage from left to right and one that denoises, ``steps`` each."""
    manifest = training_job(folder).to_json_dict()
    spec = manifest["spec"]
    del spec["evaluation"]
    spec["stages"] = [stage | {"steps": steps} for stage in spec["stages"][:2]]
    spec["parallelism"] = _ARRANGEMENTS[arrangement]
    spec["checkpoint"] = {
        "uri": str(folder / run),
        "everySteps": EVERY,
        "keepLast": 2,
        "asynchronous": True,
    }
    return DiffusionTrainJob.from_json(json.dumps(manifest))


def _killed(job: DiffusionTrainJob, run: Path, chance: random.Random, tally: Tally) -> bool:
    """Start an attempt and kill one of its ranks; False if it ended before."""
    before = _logged(run)
    processes = start_ranks(job, ranks=RANKS)
    match chance.randrange(3):
        case 0:
            time.sleep(chance.random() * 3.0)
        case 1:
            _wait(processes, lambda: _logged(run) not in {before, 0})
            time.sleep(chance.random() * 0.3)
        case _:
            # Not the first one: an attempt that never commits would make no way.
            for _ in range(chance.randint(2, 4)):
                _wait(processes, lambda: not _is_saving(run))
                _wait(processes, lambda: _is_saving(run))
            time.sleep(chance.random() * 0.01)
    chance.choice(processes).kill()
    if -signal.SIGKILL not in _codes_when_ended(processes, run, before):
        return False
    tally.kills += 1
    tally.kills_in_saves += _is_saving(run)
    tally.kills_before_a_step += _logged(run) in {before, 0}
    if run.exists():
        tally.equal &= _log_is_sound(run)
    return True


def _codes_when_ended(processes: list[BaseProcess], run: Path, before: int) -> list[int | None]:
    """The exit codes. A rank that waits for one that was killed before they met is killed, as by torchrun."""
    deadline = time.monotonic() + _PATIENCE_S
    while any(process.is_alive() for process in processes):
        if time.monotonic() > deadline:
            raise AssertionError("a rank outlives its peer")
        if _logged(run) in {before, 0}:
            for process in processes:
                process.kill()
        time.sleep(0.005)
    codes = join(processes)
    assert all(code in (0, 1, -signal.SIGKILL) for code in codes), f"not by our doing: {codes}"
    return codes


def _wait(processes: list[BaseProcess], come: object) -> None:
    """Until ``come()``, or a rank has ended."""
    assert callable(come)
    while all(process.is_alive() for process in processes) and not come():
        time.sleep(0.0005)


def _is_saving(run: Path) -> bool:
    return any((run / "checkpoints").glob(".writing-*"))


def _logged(run: Path) -> int:
    """When the log was last written to; 0 if there is none."""
    try:
        return (run / "metrics.jsonl").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _log_is_sound(run: Path) -> bool:
    """Whether no step is there twice or missing, and every committed one is there."""
    log = run / "metrics.jsonl"
    if not log.exists():
        return True
    lines = [json.loads(line) for line in log.read_text().split("\n")[:-1]]
    steps = [line["step"] for line in lines if line["kind"] == "step"]
    committed = [int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")]
    gaps = [later - earlier for earlier, later in zip(sorted(committed), sorted(committed)[1:], strict=False)]
    return (
        steps == [*range(1, len(steps) + 1)]
        and max(committed, default=0) <= len(steps)
        and max(gaps, default=0) <= EVERY
        and len(steps) - max(committed, default=0) <= 2 * EVERY
    )


def _same(run: Path, quiet: Path) -> bool:
    models = [path.relative_to(quiet) for path in quiet.rglob("model.safetensors")]
    return metrics(run) == metrics(quiet) and all(
        (run / path).read_bytes() == (quiet / path).read_bytes() for path in models
    )


def main() -> None:
    """Print a tally as one line of JSON; exit code 1 if anything differs."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--kills", type=int, default=300)
    options.add_argument("--steps", type=int, default=100, help="of each of the two stages")
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="unmask-kills-") as folder:
        tally = kill_until(given.kills, Path(folder), steps=given.steps, seed=given.seed, progress_every=10)
    click.echo(json.dumps(asdict(tally)))
    sys.exit(0 if tally.equal else 1)


if __name__ == "__main__":
    main()
