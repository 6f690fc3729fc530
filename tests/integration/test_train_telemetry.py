"""What a run tells of itself: the same from one rank and two, and what plain counting of its data says."""

import json
import time
import urllib.request
from pathlib import Path

import pytest

from support.ranks import join, start_ranks, train_to_the_end
from support.training import training_job
from unmask.models.registry import parse_config
from unmask.models.shape import shape_of
from unmask.training.sizing.flops import flops_of
from unmask.training.sizing.work import Work
from unmask_api.train_job import DiffusionTrainJob

STEPS = 6


def job_in(folder, name, **spec):
    manifest = training_job(folder).to_json_dict()
    del manifest["spec"]["evaluation"]
    stages = [stage | {"steps": STEPS} for stage in manifest["spec"]["stages"][:2]]
    stages[1]["noise"] = (stages[1].get("noise") or {}) | {"weight": "Flat"}
    manifest["spec"]["stages"] = stages
    manifest["spec"]["checkpoint"] = {"uri": str(folder / name), "everySteps": 2, "asynchronous": True}
    manifest["spec"] |= spec
    return DiffusionTrainJob.from_json(json.dumps(manifest))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def runs(folder):
    found = {}
    for ranks in (1, 2):
        run = folder / f"{ranks} ranks"
        train_to_the_end(job_in(folder, run.name, telemetry={"peakFlops": "1e9"}), ranks=ranks)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found[ranks] = [line for line in lines if line["kind"] == "step"]
    return found


def test_counts_do_not_depend_on_the_number_of_ranks(runs):
    for one, two in zip(runs[1], runs[2], strict=True):
        for name in ("supervised_tokens", "useful_flops", "predictions_by_ratio"):
            assert one["telemetry"].get(name) == two["telemetry"].get(name), name
        for ours, theirs in zip(
            one["telemetry"].get("loss_by_ratio", []), two["telemetry"].get("loss_by_ratio", []), strict=True
        ):
            assert ours == (None if theirs is None else pytest.approx(theirs, abs=1e-4))


def test_the_tokens_of_each_expert_are_listed_now_and_then_whatever_the_ranks(runs):
    assert ["expert_tokens" in line["telemetry"] for line in runs[1]] == [True] + [False] * (len(runs[1]) - 1)
    one, two = (runs[ranks][0]["telemetry"] for ranks in (1, 2))
    assert one["expert_tokens"] == two["expert_tokens"]
    for counts, imbalance in zip(one["expert_tokens"], one["expert_imbalance"], strict=True):
        assert max(counts) * len(counts) / sum(counts) == pytest.approx(imbalance, abs=1e-4)
    assert sum(counts.count(0) for counts in one["expert_tokens"]) == one["experts_unused"]


def test_losses_by_ratio_make_up_the_loss_of_a_flat_weight(runs):
    denoising = [line for line in runs[2] if "loss_by_ratio" in line["telemetry"]]
    assert len(denoising) == STEPS
    for line in denoising:
        notes = line["telemetry"]
        pairs = zip(notes["loss_by_ratio"], notes["predictions_by_ratio"], strict=True)
        total = sum((loss or 0.0) * count for loss, count in pairs)
        assert total / sum(notes["predictions_by_ratio"]) == pytest.approx(line["loss"], rel=1e-5)


def test_useful_operations_are_those_of_the_plan_for_the_documents_that_were_packed(folder, runs):
    """A stage from left to right whose documents fill rows: each position sees what precedes it."""
    job = job_in(folder, "1 ranks")
    shape = shape_of(parse_config(job.spec.model.init.config, source="test"))
    for line in runs[1][:STEPS]:
        notes = line["telemetry"]
        known = (
            notes["useful_flops"]
            - flops_of(
                shape,
                Work(tokens=0, positions=line["tokens"], predictions=notes["supervised_tokens"], pairs=0),
            ).useful
        )
        per_pair = flops_of(shape, Work(tokens=0, positions=0, predictions=0, pairs=1)).useful
        head = flops_of(shape, Work(tokens=0, positions=0, predictions=1, pairs=0)).useful
        # A document's first token is supervised but cannot be predicted: that many heads fewer.
        options = {(known + first * head) / per_pair for first in range(1, 40)}
        assert any(abs(pairs - round(pairs)) < 1e-6 and pairs > line["tokens"] for pairs in options)
        assert notes["mfu"] == pytest.approx(notes["useful_flops"] / line["seconds"] / 1e9)


def test_phases_are_part_of_the_step(runs):
    for line in runs[2]:
        phases = dict(line["telemetry"]["seconds"])
        phases.pop("checkpoint")  # before the step
        assert set(phases) == {"data", "forward_backward", "reduce", "optimizer"}
        assert 0 < sum(phases.values()) <= line["seconds"] + 1e-3
    assert any(line["telemetry"]["seconds"]["checkpoint"] > 0 for line in runs[2])
    assert any(line["telemetry"].get("checkpoint_write_seconds", 0) > 0 for line in runs[2])


def test_a_running_job_answers_prometheus_and_probes(folder, unused_port):
    job = job_in(folder, "scraped", telemetry={"port": unused_port}, runPolicy={"hangTimeoutSeconds": 100})
    processes = start_ranks(job, ranks=2, pause_after=3)
    deadline = time.monotonic() + 60
    text = ""
    while "unmask_train_step 3.0" not in text:
        assert time.monotonic() < deadline
        time.sleep(0.02)
        try:
            text = read(unused_port, "/metrics")
        except OSError:
            continue
    assert 'unmask_train_steps_total{verdict="Taken"} 3.0' in text
    assert json.loads(read(unused_port, "/healthz"))["step"] == 3
    Path(f"{folder / 'scraped'}.go").touch()
    assert join(processes) == [0, 0]


def read(port, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return answer.read().decode()


@pytest.fixture
def unused_port():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
