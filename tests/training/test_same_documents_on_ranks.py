"""Runs whose number of processes changes see the same documents under the same noise, bit for bit."""

import itertools

import numpy as np
import pytest
import torch

from support.models import tiny_model
from support.training import training_job
from unmask.training.distributed import World
from unmask.training.packing import make_rows
from unmask.training.preparation import prepare
from unmask.training.steps import micro_batches, model_inputs
from unmask.training.stream import Purpose, philox_key

pytestmark = pytest.mark.training

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
STAGES = ["blocks", "full", "answers"]


@pytest.fixture(scope="module")
def preparation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    values = {f"spec.stages[{index}].embeddingNoise": {"std": "0.1", "steps": 4} for index in (1, 2, 3)}
    return prepare(training_job(folder, values | {"spec.stages[2].randomLength": "0.5"}).spec, ALONE)


def steps_of(preparation, name, worlds):
    """Of each step, its rows' model inputs in the order of the rows, computed by ``worlds[step]`` ranks."""
    stage = next(stage for stage in preparation.stages if stage.plan.name == name)
    plan, cursor, model = stage.plan, 0, tiny_model()
    for step, world in enumerate(worlds):
        layout = stage.stream.step(
            cursor,
            rows=plan.rows,
            length=plan.length,
            multiple=plan.multiple(step),
            random_length=plan.random_length,
        )
        rows = {}
        for rank in range(world):
            mine = make_rows(
                layout,
                stage.stream.corpus,
                rank=rank,
                world=world,
                responses_only=plan.responses_only,
                eos_token_id=62,
                pad_token_id=62,
            )
            for place, row in enumerate(micro_batches(mine, 1)):
                rows[rank + place * world] = (
                    row,
                    model_inputs(
                        row,
                        plan,
                        model,
                        block_length=plan.block_length(step),
                        noise_key=philox_key(7, Purpose.NOISE, plan.index),
                        disturbance=plan.disturbance(step),
                    ),
                )
        cursor += len(layout.document)
        yield cursor, [rows[number] for number in sorted(rows)]


@pytest.mark.parametrize("worlds", [(1, 1, 1, 1), (2, 1, 2, 1), (1, 2, 4, 2), (4, 4, 1, 2)])
@pytest.mark.parametrize("name", STAGES)
def test_ids_noise_and_packing_do_not_change_with_the_ranks(preparation, name, worlds):
    expected = steps_of(preparation, name, (1,) * 4)
    for (cursor, rows), (theirs, others) in zip(steps_of(preparation, name, worlds), expected, strict=True):
        assert cursor == theirs
        assert len(rows) == len(others)
        for (row, inputs), (other, reference) in zip(rows, others, strict=True):
            assert np.array_equal(row.ordinal, other.ordinal)
            for one, two in (
                (inputs.ids, reference.ids),
                (inputs.weights, reference.weights),
                (inputs.predict, reference.predict),
                (inputs.disturbance.lots, reference.disturbance.lots),
            ):
                assert torch.equal(one, two)


def test_no_two_documents_of_a_stage_are_masked_alike(preparation):
    """So what is compared above is not one noise for all."""
    masks = [
        tuple(inputs.predict.tolist())
        for _, rows in itertools.islice(steps_of(preparation, "full", (1,) * 4), 4)
        for _, inputs in rows
    ]
    assert len(set(masks)) == len(masks)
