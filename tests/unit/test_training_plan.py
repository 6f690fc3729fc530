"""What each step of a job is: stage, block size, learning rate, and what a model cannot do."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.manifests import TINY_CONFIG
from support.training import training_job
from unmask.errors import ModelError, UsageError
from unmask.models.registry import parse_config
from unmask.training.distributed import World
from unmask.training.plan import RateSchedule, plan_stages, stage_after
from unmask.training.preparation import prepare

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


def stages(folder, values=None):
    spec = training_job(folder, values).spec
    return plan_stages(spec, parse_config(spec.model.init.config))


def rate(**changes):
    fields = {"peak": 1.0, "final": 0.1, "warmup": 4, "decay": 5, "steps": 20, "cosine": False}
    return RateSchedule(**(fields | changes))


def test_the_rate_warms_up_stays_and_falls():
    rates = [rate().at(step) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:16] == [1.0] * 12
    assert rates[16:] == pytest.approx([0.82, 0.64, 0.46, 0.28])


def test_a_cosine_falls_slowly_at_both_ends():
    rates = [rate(cosine=True).at(step) for step in range(15, 20)]
    expected = [0.55 + 0.45 * math.cos(math.pi * share / 5) for share in range(5)]
    assert rates == pytest.approx(expected)


def test_without_warm_up_and_decay_the_rate_is_constant():
    assert {rate(warmup=0, decay=0).at(step) for step in range(20)} == {1.0}


@given(
    steps=st.integers(1, 60),
    data=st.data(),
    cosine=st.booleans(),
)
def test_the_rate_rises_then_falls_and_never_leaves_its_band(steps, data, cosine):
    warmup = data.draw(st.integers(0, steps))
    decay = data.draw(st.integers(0, steps - warmup))
    rates = [rate(steps=steps, warmup=warmup, decay=decay, cosine=cosine).at(step) for step in range(steps)]
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < min(rates) and max(rates) == 1.0


def test_stages_follow_each_other(tmp_path):
    plans = stages(tmp_path)
    assert [(plan.first_step, plan.end) for plan in plans] == [(0, 6), (6, 12), (12, 16), (16, 22)]
    names = [plan.name if (plan := stage_after(plans, step)) else None for step in range(23)]
    assert names == ["pretrain"] * 6 + ["blocks"] * 6 + ["full"] * 4 + ["answers"] * 6 + [None]


def test_block_sizes_share_the_steps_and_documents_are_padded_to_them_in_block_objectives_only(tmp_path):
    ar, blocks, full, answers = stages(tmp_path)
    assert [blocks.block_length(step) for step in range(6)] == [1, 1, 1, 4, 4, 4]
    assert [plan.block_length(0) for plan in (ar, full, answers)] == [1, 32, 4]
    assert [plan.multiple(3) for plan in (ar, blocks, full, answers)] == [1, 4, 1, 4]


def test_what_is_learnt_and_how_it_is_masked_comes_from_the_stage(tmp_path):
    ar, blocks, full, answers = stages(
        tmp_path,
        {"spec.stages[1].noise": {"low": "0.2", "high": "0.9", "scope": "Document", "weight": "Flat"}},
    )
    assert ar.noise is None
    assert (blocks.noise.low, blocks.noise.high, blocks.noise.scope, blocks.noise.weight) == (
        0.2,
        0.9,
        "document",
        "flat",
    )
    assert (full.noise.scope, full.noise.weight) == ("block", "elbo")
    assert [plan.responses_only for plan in (ar, blocks, full, answers)] == [False, False, False, True]


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        (
            {"spec.stages[1].convertTo": None},
            UsageError,
            r"spec.stages\[1\].objective: got bdlm, but BailingMoeV2\w+ is autoregressive; set convertTo",
        ),
        (
            {"spec.stages[0].convertTo": "LLaDA2MoeModelLM"},
            UsageError,
            r"spec.stages\[0\].objective: got ar, but LLaDA2MoeModelLM is a diffusion model; use mdlm",
        ),
        ({"spec.stages[2].convertTo": "LLaDA2MoeModelLM"}, ModelError, "cannot convert LLaDA2MoeModelLM"),
        (
            {"spec.stages[0].length": 512},
            UsageError,
            r"spec.stages\[0\].length: got 512, .*max_position_embeddings allows at most 256",
        ),
    ],
)
def test_a_stage_that_the_model_cannot_run_is_named(tmp_path, values, error, words):
    with pytest.raises(error, match=words):
        stages(tmp_path, values)


def test_a_model_that_attends_to_its_whole_canvas_is_not_trained_by_blocks(tmp_path):
    config = {
        "architectures": ["LLaDAMoEModelLM"],
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "expert_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 128,
        "mask_token_id": 63,
        "eos_token_id": 62,
        "pad_token_id": 62,
    }
    spec = training_job(tmp_path, {"spec.stages[1].convertTo": None}).spec
    only = spec.model_copy(update={"stages": spec.stages[1:2]})
    with pytest.raises(UsageError, match="got bdlm, but LLaDAMoEModelLM is decoded over its whole canvas"):
        plan_stages(only, parse_config(config))
    full = spec.model_copy(update={"stages": spec.stages[2:3]})
    assert [plan.objective for plan in plan_stages(full, parse_config(config))] == ["mdlm"]


def test_the_tiny_config_is_autoregressive():
    assert TINY_CONFIG["architectures"] == ["BailingMoeV2ForCausalLM"]


def test_the_context_changes_at_its_stage_and_stays_changed(tmp_path):
    values = {
        "spec.stages[2].ropeTheta": "50000",
        "spec.stages[2].contextLength": 512,
        "spec.stages[3].length": 512,
    }
    configs = [plan.config for plan in stages(tmp_path, values)]
    assert [config.rope_theta for config in configs] == [600_000.0, 600_000.0, 50_000.0, 50_000.0]
    assert [config.max_position_embeddings for config in configs] == [256, 256, 512, 512]
    assert configs[1].to_json_dict() | {"rope_theta": 5e4, "max_position_embeddings": 512} == (
        configs[2].to_json_dict()
    )


def test_noise_on_embeddings_falls_evenly_to_nothing(tmp_path):
    plan = stages(tmp_path, {"spec.stages[1].embeddingNoise": {"std": "0.5", "steps": 4}})[1]
    assert [plan.disturbance(step) for step in range(6)] == [0.5, 0.375, 0.25, 0.125, 0.0, 0.0]
    assert stages(tmp_path)[1].disturbance(0) == 0.0


def test_what_a_job_is_does_not_change_with_fields_that_it_does_not_use(tmp_path):
    """A checkpoint from before there were such fields is still the job's."""
    job = training_job(tmp_path, {"spec.stages[1].randomLength": "0.01"})
    first, second = prepare(job.spec, ALONE).identity["stages"][:2]
    assert second["randomLength"] == "0.01"
    assert not {"randomLength", "embeddingNoise", "prediction", "ropeTheta", "documentMask"} & set(first)
