"""Stages that disturb embeddings, shift predictions, cut documents and learn every turn, as whole runs."""

import json

import pytest
import torch
from safetensors.torch import load_file

from support.ranks import train_to_the_end
from support.sharding import stop_after
from support.training import CHATS, metrics, training_job, write_chats
from unmask.errors import ModelError
from unmask.models.registry import read_config
from unmask.serving.model import GenerationDefaults

pytestmark = pytest.mark.training

SHARED = {"steps": 6, "length": 64, "rowsPerStep": 4, "learningRate": {"peak": "1e-2", "warmupSteps": 2}}
STAGES = [
    {
        "name": "blocks",
        "objective": "bdlm",
        "convertTo": "LLaDA2MoeModelLM",
        "blockSizes": [1, 8],
        "embeddingNoise": {"std": "0.02", "steps": 5},
        "randomLength": "0.3",
    },
    {"name": "turns", "objective": "sft", "blockSizes": [8], "supervise": "AllTurns", "routerBias": "Frozen"},
    {"name": "shifted", "objective": "bdlm", "blockSizes": [8], "prediction": "Shifted", "export": True},
]


def job(folder, name, **values):
    source = {"uri": str(folder / CHATS), "format": "messages"}
    return training_job(
        folder,
        {
            "spec.stages": [stage | SHARED for stage in STAGES],
            "spec.data.train": [source],
            "spec.data.validation": [source],
            "spec.evaluation": {"everySteps": 4, "batches": 1},
            "spec.checkpoint": {"uri": str(folder / name), "everySteps": 3, "keepLast": 9},
        }
        | values,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, and the run of one process in ``whole``."""
    folder = tmp_path_factory.mktemp("options")
    write_chats(folder)
    train_to_the_end(job(folder, "whole"))
    return folder


def biases(run, step):
    (file,) = (run / "checkpoints").glob(f"*{step}/*.safetensors")
    return {name: tensor for name, tensor in load_file(file).items() if name.endswith("expert_bias")}


def test_a_run_stopped_in_every_stage_goes_on_bit_for_bit(folder):
    stopped = job(folder, "stopped")
    for step in (2, 8, 14):
        stop_after(stopped, step, ranks=1)
    train_to_the_end(stopped)
    assert metrics(folder / "stopped") == metrics(folder / "whole")
    ours, theirs = (load_file(folder / run / "model" / "model.safetensors") for run in ("stopped", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())


def test_two_processes_follow_the_same_curve(folder):
    parallelism = {"microBatchRows": 2, "processesPerNode": 2}
    train_to_the_end(job(folder, "two", **{"spec.parallelism": parallelism}), ranks=2)
    for ours, theirs in zip(metrics(folder / "two"), metrics(folder / "whole"), strict=True):
        if ours["kind"] != "stage":
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-3)


def test_without_noise_on_embeddings_it_is_another_curve_from_the_first_step(folder):
    plain = {key: value for key, value in STAGES[0].items() if key != "embeddingNoise"} | SHARED
    train_to_the_end(job(folder, "without", **{"spec.stages": [plain]}))
    losses = [line["loss"] for line in metrics(folder / "without") if line["kind"] == "step"]
    assert losses[0] != metrics(folder / "whole")[0]["loss"]


def test_the_bias_of_a_frozen_stage_stays(folder):
    run = folder / "whole"
    before, frozen, after = (biases(run, step) for step in (6, 12, 18))
    assert before
    assert all(torch.equal(before[name], frozen[name]) for name in before)
    assert not any(torch.equal(frozen[name], after[name]) for name in before)


def test_a_model_that_predicts_from_the_place_before_says_so_and_is_not_decoded_here(folder):
    model = folder / "whole" / "model"
    assert json.loads((model / "generation_config.json").read_text())["prediction"] == "shifted"
    with pytest.raises(ModelError, match="prediction: Input should be 'same'"):
        GenerationDefaults.read(model, read_config(model), "blocks")
