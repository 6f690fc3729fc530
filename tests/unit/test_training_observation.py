"""What is noted of a step, against plain counts."""

import json

import numpy as np
import pytest
import torch

from support.training import training_job
from unmask.attention.metadata import CLEAN, PADDING, AttentionMetadata, may_attend
from unmask.diffusion.layout import ModelInputs
from unmask.training.observation import BUCKETS, EXPERT_COUNTS_EVERY, StepWatch, pairs_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("seed", range(20))
def test_pairs_are_those_of_the_dense_mask(seed):
    chance = np.random.default_rng(seed)
    shape = (3, 40)
    document = np.sort(chance.integers(-1, 4, shape), axis=1)
    document[document < 0] = PADDING
    metadata = AttentionMetadata(
        position=torch.zeros(shape, dtype=torch.int64),
        document=torch.from_numpy(document),
        block=torch.from_numpy(chance.integers(0, 5, shape)),
        view=torch.from_numpy(np.where(chance.random(shape) < 0.5, CLEAN, chance.integers(1, 3, shape))),
    )
    real = metadata.document != PADDING
    dense = may_attend(metadata, metadata) & real[:, :, None] & real[:, None, :]
    assert pairs_of(metadata) == int(dense.sum())


def test_nothing_but_padding_has_no_pairs():
    nothing = torch.full((1, 4), PADDING)
    assert pairs_of(AttentionMetadata.causal(torch.zeros_like(nothing), nothing)) == 0


def inputs_with(ratio):
    many = len(ratio)
    place = torch.arange(many).unsqueeze(0)
    return ModelInputs(
        ids=place,
        metadata=AttentionMetadata.causal(place, torch.zeros_like(place)),
        predict=torch.arange(many),
        targets=torch.arange(many),
        weights=torch.ones(many),
        normaliser=float(many),
        ratio=torch.tensor(ratio),
    )


def test_losses_are_told_apart_by_the_ratio_and_work_is_counted():
    ratios = [0.05, 0.2, 0.200001, 0.5, 0.81, 1.0]
    terms = torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0, 11.0])
    watch = StepWatch(CPU)
    for inputs in watch.batches(iter([inputs_with(ratios)])):
        watch.note_losses(terms, inputs)
    work = watch.work(tokens=8)
    assert (work.tokens, work.positions, work.predictions, work.pairs) == (8, 6, 6.0, 21)
    found = watch.summary(
        tokens=8,
        seconds=2.0,
        useful_flops=100.0,
        peak_flops=200.0,
        expert_tokens=[torch.tensor([6, 2, 0, 0])],
        step=EXPERT_COUNTS_EVERY,
    )
    assert found["predictions_by_ratio"] == [2, 1, 1, 0, 2]
    assert found["loss_by_ratio"] == [2.0, 5.0, 7.0, None, 10.0]
    assert (found["tokens_per_second"], found["mfu"]) == (4.0, 0.25)
    assert (found["expert_imbalance"], found["experts_unused"]) == ([3.0], 2)
    assert found["expert_tokens"] == [[6, 2, 0, 0]]
    assert len(found["loss_by_ratio"]) == BUCKETS
    json.dumps(found, allow_nan=False)


def test_what_is_not_known_is_left_out():
    watch = StepWatch(CPU)
    found = watch.summary(
        tokens=8, seconds=2.0, useful_flops=1.0, peak_flops=None, expert_tokens=[], step=EXPERT_COUNTS_EVERY
    )
    assert not {"mfu", "loss_by_ratio", "expert_imbalance", "expert_tokens"} & found.keys()


def test_a_loss_that_is_not_finite_is_none_in_its_bucket_alone():
    watch = StepWatch(CPU)
    watch.note_losses(torch.tensor([float("nan"), 2.0]), inputs_with([0.1, 0.9]))
    found = watch.summary(tokens=1, seconds=1.0, useful_flops=1.0, peak_flops=None, expert_tokens=[], step=1)
    assert found["loss_by_ratio"] == [None, None, None, None, 2.0]


def test_phases_make_up_the_step():
    watch = StepWatch(CPU)
    with watch.phase("data"):
        pass
    with watch.phase("reduce"):
        pass
    assert set(watch.seconds) == {"data", "forward_backward", "reduce"}
    assert all(seconds >= 0 for seconds in watch.seconds.values())


def test_the_job_may_name_the_peak_of_its_devices(tmp_path):
    job = training_job(tmp_path, {"spec.telemetry": {"peakFlops": "989e12"}})
    assert float(job.spec.telemetry.peak_flops) == 989e12
