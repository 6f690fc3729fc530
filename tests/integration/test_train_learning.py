"""Training teaches: a tiny model copies words backwards, token by token and block by block."""

import pytest

from support.ranks import train_to_the_end
from support.training import metrics, training_job


@pytest.mark.slow
def test_an_autoregressive_model_and_the_diffusion_model_made_of_it_learn_their_exercises(
    tmp_path, record_measurement
):
    rate = {"peak": "1e-2", "final": "1e-3", "warmupSteps": 10, "decaySteps": 60}
    shared = {"length": 64, "rowsPerStep": 8, "learningRate": rate}
    values = {
        "spec.stages": [
            {"name": "first", "objective": "ar", "steps": 120} | shared,
            {
                "name": "second",
                "objective": "sft",
                "convertTo": "LLaDA2MoeModelLM",
                "blockSizes": [4],
                "steps": 200,
            }
            | shared,
        ],
        "spec.data.validation[0].uri": str(tmp_path / "train.jsonl"),
        "spec.evaluation": {"everySteps": 1000, "generation": {"samples": 50, "maxNewTokens": 8}},
        "spec.parallelism.microBatchRows": 8,
        "spec.checkpoint.everySteps": 1000,
    }
    train_to_the_end(training_job(tmp_path, values))
    first, second = (line for line in metrics(tmp_path / "run") if line["kind"] == "eval")
    record_measurement("exercises copied autoregressively", first["exact_match"])
    record_measurement("exercises copied by diffusion", second["exact_match"])
    assert first["exact_match"] >= 0.9
    assert second["exact_match"] >= 0.9
    assert second["tpf_denoise"] > 1
    assert first["samples"] == second["samples"] == 50
