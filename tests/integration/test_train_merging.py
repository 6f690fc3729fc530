"""A stage that ends with the mean of its best checkpoints: which they are, what follows, and restarts."""

import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from support import counts
from support.ranks import join, start_ranks, train_to_the_end
from support.training import metrics, training_job
from unmask.cli.main import main
from unmask_api.exit_codes import ExitCode

pytestmark = pytest.mark.training

BLOCKS = {
    "name": "blocks",
    "objective": "bdlm",
    "convertTo": "LLaDA2MoeModelLM",
    "blockSizes": [4],
    "steps": 12,
}
ANSWERS = {"name": "answers", "objective": "sft", "blockSizes": [4], "steps": 6}
SHARED = {"length": 32, "rowsPerStep": 4, "learningRate": {"peak": "3e-2", "warmupSteps": 2}}


def job_in(folder, name, *stages, **values):
    changes = {
        "spec.checkpoint.uri": str(folder / name),
        "spec.checkpoint.everySteps": 3,
        "spec.checkpoint.keepLast": 1,
        "spec.evaluation": {"everySteps": 3, "batches": 2},
        "spec.stages": [stage | SHARED for stage in stages or (BLOCKS | {"merge": {"best": 3}}, ANSWERS)],
    }
    return training_job(folder, changes | values)


def evaluated(run, stage):
    return {
        line["step"]: line["loss"]
        for line in metrics(run)
        if line["kind"] == "eval" and line["stage"] == stage
    }


@pytest.fixture(scope="module", params=[(1, "None"), (2, "Full")], ids=["one rank", "two shards"])
def run(request, tmp_path_factory):
    """The folder of a complete run whose first stage ends with the mean of its best three checkpoints."""
    folder = tmp_path_factory.mktemp("merging")
    ranks, shard = request.param
    train_to_the_end(job_in(folder, "kept", BLOCKS, **parallel(ranks, shard), **keeping_all()), ranks=ranks)
    train_to_the_end(job_in(folder, "run", **parallel(ranks, shard)), ranks=ranks)
    return folder, ranks, shard


def unmask(*arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def parallel(ranks, shard):
    return {"spec.parallelism": {"processesPerNode": ranks, "microBatchRows": 2, "shard": shard}}


def keeping_all():
    return {"spec.checkpoint.keepLast": 99}


def test_the_stage_ends_with_the_mean_of_its_best_checkpoints(run, capsys):
    folder, _, _ = run
    losses = evaluated(folder / "kept", "blocks")
    assert evaluated(folder / "run", "blocks") == losses, "the same stage up to its end"
    best = sorted(sorted(losses, key=losses.get)[:3])
    target = folder / "by-command"
    assert unmask("merge", "--run", folder / "kept", "--best", 3, target) == 0
    told = capsys.readouterr().out.splitlines()
    assert [int(line.split()[1].rstrip(":")) for line in told[:3]] == best
    ours = load_file(folder / "run" / "exports" / "blocks" / "model.safetensors")
    theirs = load_file(target / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert (folder / "run" / "exports" / "blocks" / "tokenizer.json").is_file()
    line = next(line for line in metrics(folder / "run") if line["kind"] == "merge")
    assert (line["steps"], line["step"], line["stage"]) == (best, 12, "blocks")
    assert line["loss"] != losses[12]


def test_the_next_stage_begins_from_the_mean_and_removes_the_checkpoints(run):
    folder, ranks, shard = run
    restarted = job_in(
        folder,
        "plain",
        BLOCKS,
        ANSWERS,
        **parallel(ranks, shard),
    )
    train_to_the_end(restarted, ranks=ranks)
    of_mean = [
        line["loss"]
        for line in metrics(folder / "run")
        if line["stage"] == "answers" and line["kind"] == "step"
    ]
    of_last = [
        line["loss"]
        for line in metrics(folder / "plain")
        if line["stage"] == "answers" and line["kind"] == "step"
    ]
    assert of_mean != of_last
    names = sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())
    assert names == ["step-00000018"]
    shutil.rmtree(folder / "plain")


def test_a_run_killed_around_the_merge_ends_as_if_it_had_not_been(run):
    folder, ranks, shard = run
    job = job_in(folder, "killed", **parallel(ranks, shard))
    for moment in ("step-00000012", "blocks"):  # before the mean is written, and once it is
        processes = start_ranks(job, ranks=ranks)
        wait_for(folder / "killed", moment, processes)
        for process in processes:
            process.kill()
        codes = join(processes)
        assert all(code in (-signal.SIGKILL, 0) for code in codes), codes
    train_to_the_end(job, ranks=ranks)
    assert metrics(folder / "killed") == metrics(folder / "run")
    ours, theirs = (folder / name / "model" / "model.safetensors" for name in ("killed", "run"))
    assert ours.read_bytes() == theirs.read_bytes()
    shutil.rmtree(folder / "killed")


def wait_for(run, name, processes):
    deadline = time.monotonic() + 60
    while processes[0].is_alive() and not any(run.glob(f"*/{name}")):
        assert time.monotonic() < deadline, "waited for a minute"
        time.sleep(0.0005)


def test_a_last_stage_that_merges_makes_the_final_model_and_makes_it_again(run):
    folder, ranks, shard = run
    job = job_in(folder, "last", BLOCKS | {"merge": {"best": 2}}, **parallel(ranks, shard))
    train_to_the_end(job, ranks=ranks)
    model = folder / "last" / "model" / "model.safetensors"
    exported = (folder / "last" / "exports" / "blocks" / "model.safetensors").read_bytes()
    assert model.read_bytes() == exported
    shutil.rmtree(model.parent)
    train_to_the_end(job, ranks=ranks)
    assert model.read_bytes() == exported
    assert [line["kind"] for line in metrics(folder / "last")].count("merge") == 1
    shutil.rmtree(folder / "last")


def test_a_run_without_enough_measured_checkpoints_says_what_to_change(run, capsys):
    folder, _, _ = run
    assert unmask("merge", "--run", folder / "run", "--best", 3, folder / "never") == ExitCode.USAGE
    told = capsys.readouterr().err
    assert "1 checkpoints of stage answers are there and measured, but 3 are to be merged" in told
    assert "checkpoint.keepLast" in told
    assert not (folder / "never").exists()


@pytest.mark.slow
def test_the_mean_of_checkpoints_predicts_better_than_they_do_on_average(tmp_path, record_measurement):
    """At a learning rate that never falls; whether it is better than the best of them is recorded."""
    against_each, against_best = [], []
    for seed in range(counts.of(sample=2, full=10)):
        stage = BLOCKS | {"steps": 300, "merge": {"best": 8}} | SHARED | {"learningRate": {"peak": "1e-2"}}
        values = {"spec.data.seed": seed, "spec.checkpoint.everySteps": 20, "spec.stages": [stage]}
        values |= {"spec.evaluation": {"everySteps": 20, "batches": 4}}
        train_to_the_end(job_in(tmp_path, f"seed-{seed}", **values))
        lines = metrics(tmp_path / f"seed-{seed}")
        (merged,) = [line for line in lines if line["kind"] == "merge"]
        losses = evaluated(tmp_path / f"seed-{seed}", "blocks")
        own = [losses[step] for step in merged["steps"]]
        against_each.append(sum(own) / len(own) - merged["loss"])
        against_best.append(min(own) - merged["loss"])
    runs = len(against_each)
    record_measurement(
        "mean loss of 8 checkpoints less the loss of their mean, nats", sum(against_each) / runs
    )
    record_measurement("loss of the best of 8 less the loss of their mean, nats", sum(against_best) / runs)
    record_measurement("runs whose best 8 checkpoints were merged", runs)
    record_measurement("of them, runs whose mean is better than their best", sum(x > 0 for x in against_best))
    assert sum(against_each) > 0
