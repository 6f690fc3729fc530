"""The gradient of a step depends on its rows alone: not on micro-batches, nor on ranks."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from support.models import tiny_model
from support.training import training_job
from unmask.training.distributed import World
from unmask.training.learner import Learner
from unmask.training.packing import make_rows
from unmask.training.preparation import prepare
from unmask.training.steps import gradient_step, micro_batches, model_inputs
from unmask.training.stream import Purpose, philox_key

pytestmark = pytest.mark.training

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
STAGES = {"pretrain": 0, "blocks": 1, "full": 2, "answers": 3}


@pytest.fixture
def preparation(tmp_path):
    views = {
        "low": "0.1",
        "high": "0.9",
        "scope": "Block",
        "weight": "Elbo",
        "views": 2,
        "complementary": True,
    }
    return prepare(training_job(tmp_path, {"spec.stages[1].noise": views}).spec, ALONE)


def step_of(preparation, name, *, step=3, micro_batch=4, ranks=1, precision="fp32"):
    """Loss, gradient and expert counts of a step, its rows shared by ``ranks``."""
    stage = preparation.stages[STAGES[name]]
    plan = stage.plan
    architecture = "BailingMoeV2ForCausalLM" if plan.objective == "ar" else "LLaDA2MoeModelLM"
    model = tiny_model(dtype=torch.float32, architectures=[architecture])
    learner = Learner(model, preparation.spec.model_copy(update={"precision": precision}))
    layout = stage.stream.step(40, rows=plan.rows, length=plan.length, multiple=plan.multiple(step))
    loss, normaliser, gradient, counts = 0.0, 0.0, 0.0, 0
    for rank in range(ranks):
        rows = make_rows(
            layout,
            stage.stream.corpus,
            rank=rank,
            world=ranks,
            responses_only=plan.responses_only,
            eos_token_id=62,
            pad_token_id=62,
        )
        batches = (
            model_inputs(
                batch,
                plan,
                model,
                block_length=plan.block_length(step),
                noise_key=philox_key(7, Purpose.NOISE, plan.index),
            )
            for batch in micro_batches(rows, micro_batch)
        )
        learner.weights.gradient.zero_()
        totals = gradient_step(learner.weights, batches, ALONE, stop=False)
        loss += totals.loss * totals.normaliser
        normaliser += totals.normaliser
        gradient = gradient + learner.weights.gradient.double()
        counts = counts + torch.stack(totals.expert_tokens)
    return loss / normaliser, gradient / normaliser, counts


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize(("micro_batch", "ranks"), [(1, 1), (2, 1), (3, 1), (4, 2), (1, 4)])
def test_a_step_is_the_same_however_its_rows_are_split(preparation, name, micro_batch, ranks):
    loss, gradient, counts = step_of(preparation, name)
    split = step_of(preparation, name, micro_batch=micro_batch, ranks=ranks)
    assert split[0] == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(split[1], gradient, atol=1e-6, rtol=1e-5)
    assert loss > 1
    assert torch.equal(counts, split[2]), "padding, which depends on the split, is not counted"


def test_each_stage_masks_by_its_own_noise(preparation):
    losses = {name: step_of(preparation, name)[0] for name in STAGES}
    assert len(set(losses.values())) == len(STAGES)


def test_a_stop_of_one_rank_and_counts_are_reported_and_counting_starts_anew(preparation):
    stage = preparation.stages[0]
    learner = Learner(tiny_model(dtype=torch.float32), preparation.spec)
    totals = gradient_step(learner.weights, iter(()), ALONE, stop=True)
    assert totals.stop
    assert (totals.loss, totals.normaliser) == (0.0, 1.0)
    assert not any(counts.any() for counts in totals.expert_tokens)
    assert stage.plan.name == "pretrain"


def test_bf16_gives_nearly_the_gradient_of_fp32(preparation):
    loss, gradient, _ = step_of(preparation, "blocks")
    rough_loss, rough_gradient, _ = step_of(preparation, "blocks", precision="bf16", micro_batch=1)
    assert rough_loss == pytest.approx(loss, rel=0.02)
    assert rough_loss != loss
    similarity = torch.cosine_similarity(gradient, rough_gradient, dim=0)
    assert similarity > 0.98


@pytest.mark.parametrize("name", STAGES)
def test_without_the_document_mask_a_row_is_one_document_with_the_same_noise(preparation, name):
    stage = preparation.stages[STAGES[name]]
    plan, model = stage.plan, tiny_model(dtype=torch.float32)
    layout = stage.stream.step(0, rows=plan.rows, length=plan.length, multiple=plan.multiple(3))
    rows = make_rows(
        layout, stage.stream.corpus, rank=0, world=1, responses_only=False, eos_token_id=62, pad_token_id=62
    )
    assert rows.document.max() > 0
    one = replace(
        rows,
        document=np.minimum(rows.document, 0),
        position=np.where(rows.document < 0, 0, np.arange(plan.length)),
    )

    def inputs(rows, mask):
        settings = replace(plan, document_mask=mask)
        return model_inputs(rows, settings, model, block_length=plan.block_length(3), noise_key=5)

    apart, together = inputs(rows, True), inputs(rows, False)
    if plan.objective in ("ar", "mdlm"):  # whose noise does not count positions
        expected = inputs(one, True)
        assert together.metadata.document.equal(expected.metadata.document)
        assert together.metadata.position.equal(expected.metadata.position)
    assert together.metadata.document.unique().tolist() in ([0], [-1, 0])
    if plan.objective != "ar":
        assert together.targets.equal(apart.targets)
        assert together.weights.equal(apart.weights)
