"""Runs that train adapters: restarts, processes, preferences, exports, and the memory that they take."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.manifests import TINY_CONFIG
from support.ranks import join, start_ranks, train_to_the_end
from support.training import metrics, preferences, training_job, write_data, write_lines
from unmask.models import loading
from unmask.models.loading import build
from unmask.models.registry import parse_config
from unmask_api.exit_codes import ExitCode

SHARED = {"length": 32, "rowsPerStep": 4, "learningRate": {"peak": "1e-2"}, "blockSizes": [4]}


def base_in(folder, *, seed=0):
    """A diffusion model with its tokenizer, and data."""
    write_data(folder)
    config = parse_config({**TINY_CONFIG, "architectures": ["LLaDA2MoeModelLM"]})
    files = {file.name: file.read_bytes() for file in (folder / "tokenizer").iterdir()}
    loading.save(build(config, seed=seed), folder / "base", companions=files)
    write_lines(folder / "pairs.jsonl", preferences(range(60)))


def job_in(folder, name, *, ranks=1, **values):
    pairs = [{"uri": str(folder / "pairs.jsonl"), "format": "preference"}]
    changes = {
        "spec.checkpoint.uri": str(folder / name),
        "spec.model": {"init": {"uri": str(folder / "base")}},
        "spec.lora": {"rank": 4, "alpha": "8"},
        "spec.stages": [
            SHARED | {"name": "answers", "objective": "sft", "steps": 6},
            SHARED
            | {"name": "prefer", "objective": "dpo", "steps": 5}
            | {"data": {"train": pairs, "validation": pairs}},
        ],
        "spec.evaluation": {"everySteps": 4, "batches": 2},
        "spec.parallelism": {"processesPerNode": ranks, "microBatchRows": 1},
    }
    return training_job(folder, changes | values)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    base_in(folder)
    train_to_the_end(job_in(folder, "run"))
    return folder


def test_answers_and_preferences_are_learnt_by_adapters_alone(run):
    lines = metrics(run / "run")
    steps = [line for line in lines if line["kind"] == "step"]
    assert steps[6]["loss"] == pytest.approx(math.log(2), abs=1e-7), "the reference has learnt the answers"
    assert steps[6]["margin"] == 0
    assert steps[-1]["margin"] != 0
    base, model = (load_file(run / name / "model.safetensors") for name in ("base", "run/model"))
    changed = {name for name in base if not torch.equal(base[name], model[name])}
    assert any("query_key_value" in name for name in changed)
    assert any("shared_experts" in name for name in changed)
    assert not any(".experts." in name or "gate.weight" in name or "bias" in name for name in changed)
    largest = max((run / "run/checkpoints").glob("*/*.safetensors"), key=lambda file: file.stat().st_size)
    names = set(load_file(largest))
    assert all(".down" in name or ".up" in name for name in names)


def test_two_processes_compute_what_one_does(run):
    train_to_the_end(job_in(run, "two", ranks=2), ranks=2)
    for ours, theirs in zip(metrics(run / "two"), metrics(run / "run"), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            expected = pytest.approx(value, rel=2e-3, abs=2e-4) if isinstance(value, float) else value
            assert ours[key] == expected


@pytest.mark.parametrize("step", [4, 9])
def test_a_killed_run_goes_on_to_the_same_bits(run, step):
    job = job_in(run, "killed")
    processes = start_ranks(job, pause_after=step)
    log = run / "killed" / "metrics.jsonl"
    while processes[0].is_alive() and not (log.exists() and f'"step": {step},' in log.read_text()):
        processes[0].join(0.05)
    processes[0].kill()
    join(processes)
    (run / "killed.go").touch()
    train_to_the_end(job)
    assert metrics(run / "killed") == metrics(run / "run")
    ours, theirs = (run / name / "model" / "model.safetensors" for name in ("killed", "run"))
    assert ours.read_bytes() == theirs.read_bytes()
    shutil.rmtree(run / "killed")
    (run / "killed.go").unlink()


def test_another_base_or_another_rank_is_refused_for_a_run_that_has_begun(tmp_path):
    base_in(tmp_path)
    train_to_the_end(job_in(tmp_path, "run"))
    shutil.rmtree(tmp_path / "run" / "model")
    for change, says in (
        ({"spec.lora": {"rank": 2, "alpha": "8"}}, "spec.lora.rank"),
        ({"spec.lora": None}, "spec.base"),
    ):
        job = job_in(tmp_path, "run", **change)
        assert join(start_ranks(job)) == [ExitCode.USAGE]
        assert says in (tmp_path / "run" / "termination.json").read_text()
    base_in(tmp_path, seed=1)
    assert join(start_ranks(job_in(tmp_path, "run"))) == [ExitCode.USAGE]
    assert "spec.base" in (tmp_path / "run" / "termination.json").read_text()


# A dense model of 317 million weights: large beside what Python and torch take for themselves.
LARGE = {
    "architectures": ["A2DLlamaLMHeadModel"],
    "vocab_size": 4096,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 2816,
    "max_position_embeddings": 256,
    "mask_token_id": 63,
    "eos_token_id": 62,
    "pad_token_id": 62,
}
CHILD = """
import json, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from support.models import packed_row, random_tokens
from support.training import training_job
from unmask.diffusion import layout
from unmask.diffusion.noise import NoiseConfig, corrupt
from unmask.models.registry import parse_config
from unmask.training.arrangement import first_weights
from unmask.training.distributed import World
from unmask.training.learner import Learner
from unmask.training.steps import gradient_step

def most():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

config, lora, folder = json.loads(sys.argv[2]), json.loads(sys.argv[3]), Path(sys.argv[4])
spec = training_job(folder, {"spec.model.init": {"config": config}, "spec.lora": lora}).spec
alone = World(rank=0, size=1, device=torch.device("cpu"))
before = most()
learner = Learner(first_weights(spec, parse_config(config), alone), spec)
rows = packed_row(random_tokens(16), length=16)
for step in range(2):
    inputs = layout.two_copy(
        rows, corrupt(rows, NoiseConfig(), seed=step, block_length=8), block_length=8, mask_token_id=63
    )
    totals = gradient_step(learner.weights, iter([inputs]), alone, stop=False)
    learner.gradient_norm(totals)
    learner.step(totals, 1e-4, freeze_router_bias=True)
print(json.dumps([most(), before, sum(one.numel() for one in learner.model.parameters())]))
"""


def peak_of(folder, lora):
    """Peak resident memory of a process that takes two steps, what it was before, and its weights."""

    arguments = [str(Path(__file__).parents[1]), json.dumps(LARGE), json.dumps(lora), str(folder)]
    command = [sys.executable, "-c", CHILD, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    peak, before, weights = json.loads(done.stdout)
    return peak, before, weights


@pytest.mark.slow
def test_adapters_train_in_less_than_two_fifths_of_the_memory(tmp_path, record_measurement):
    write_data(tmp_path)
    full, before, weights = peak_of(tmp_path, None)
    adapted, _, _ = peak_of(tmp_path, {"rank": 8, "alpha": "16"})
    record_measurement("weights of the model that is trained in full and by adapters", weights)
    record_measurement("peak memory of training all weights, bytes", full)
    record_measurement("peak memory of training adapters of rank 8, bytes", adapted)
    record_measurement("peak memory before there is a model, bytes", before)
    record_measurement("memory of adapters / of all weights", adapted / full)
    record_measurement("the same without what the process had before", (adapted - before) / (full - before))
    assert adapted / full < 0.40
