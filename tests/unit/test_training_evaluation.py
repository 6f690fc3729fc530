"""Measurements: edit distances, greedy answers, and figures that are the same at every look."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.models import random_tokens, tiny_canvas_model, tiny_model
from support.training import training_job
from unmask.attention import AttentionMetadata
from unmask.training.distributed import World
from unmask.training.evaluation import edit_distance
from unmask.training.greedy import generate_greedily
from unmask.training.preparation import prepare

CPU = torch.device("cpu")
CAUSAL = {"architectures": ["BailingMoeV2ForCausalLM"]}


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [
        ("", "", 0),
        ("abc", "", 3),
        ("kitten", "sitting", 3),
        ("abc", "abc", 0),
        ("abcd", "bcd", 1),
        ("ab", "ba", 2),
    ],
)
def test_edit_distance_counts_insertions_deletions_and_replacements(first, second, distance):
    assert edit_distance([*map(ord, first)], [*map(ord, second)]) == distance


words = st.lists(st.integers(0, 3), max_size=7)


@given(words, words, words)
def test_edit_distance_is_a_metric(a, b, c):
    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


def greedy_without_cache(model, prompt, max_new_tokens, eos):
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_new_tokens and eos not in tokens[len(prompt) :]:
        metadata = AttentionMetadata.single_row(len(tokens), block_length=1)
        with torch.no_grad():
            hidden = model.hidden(torch.tensor([tokens]), metadata)
        tokens.append(int(model.logits(hidden[0, -1]).argmax()))
    return tokens[len(prompt) :]


def test_greedy_answers_together_are_those_of_each_prompt_alone_without_a_cache():
    model = tiny_model(**CAUSAL)
    prompts = [random_tokens(length, seed=length) for length in (1, 7, 4, 12)]
    # A token that the model likes becomes the end of text, so that some answers end early.
    eos = greedy_without_cache(model, prompts[1], 6, eos=-1)[2]
    answers = generate_greedily(model, prompts, max_new_tokens=6, eos_token_id=eos)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = greedy_without_cache(model, prompt, 6, eos)
        assert answer.token_ids == expected
        assert answer.reason == ("eos" if expected[-1] == eos else "length")
        assert answer.kept_tokens == len([token for token in expected if token != eos])
        assert (answer.usage.prefill, answer.usage.denoise) == (1, len(expected) - 1)
    assert {answer.reason for answer in answers} == {"eos", "length"}


class Shares(World):
    """One of several ranks whose sums are added up by hand."""

    def sum(self, *tensors):
        type(self).seen.extend(tensor.clone() for tensor in tensors)


def figures(tmp_path, index, **model_changes):
    preparation = prepare(training_job(tmp_path).spec, World(rank=0, size=1, device=CPU))
    evaluator = preparation.stages[index].evaluator
    return evaluator, tiny_model(dtype=torch.float32, **model_changes)


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_a_measurement_repeated_is_the_same_and_leaves_the_model_in_training(tmp_path, index):
    evaluator, model = figures(tmp_path, index, **(CAUSAL if index == 0 else {}))
    model.train()
    first = evaluator.measure(model, stage_step=3)
    assert evaluator.measure(model, stage_step=3) == first
    assert model.training
    assert not any(router.tokens_per_expert.any() for router in model.routers())
    assert first["samples"] == 4
    assert ("tpf_denoise" in first) == (index > 0)
    if index:
        assert first["tpf"] <= first["tpf_decode"] <= first["tpf_denoise"]


@pytest.mark.parametrize("index", [1, 2])
def test_a_model_that_attends_to_the_whole_canvas_is_asked_as_it_would_be_served(tmp_path, index):
    evaluator, _ = figures(tmp_path, index)
    measured = evaluator.measure(tiny_canvas_model(dtype=torch.float32), stage_step=0)
    assert measured["samples"] == 4
    # There is nothing to prefill or to persist: all three figures count the same forwards.
    assert measured["tpf"] == measured["tpf_decode"] == measured["tpf_denoise"] >= 1


def test_ranks_share_a_measurement(tmp_path):
    model = tiny_model(dtype=torch.float32)
    alone = prepare(training_job(tmp_path).spec, World(rank=0, size=1, device=CPU)).stages[1].evaluator
    whole = alone.measure(model, stage_step=0)
    sums = []
    for rank in range(3):
        Shares.seen = []
        evaluator = (
            prepare(training_job(tmp_path).spec, Shares(rank=rank, size=3, device=CPU)).stages[1].evaluator
        )
        evaluator.measure(model, stage_step=0)
        sums.append(Shares.seen)
    loss, answers = (sum(parts) for parts in zip(*sums, strict=True))
    assert float(loss[0] / loss[1]) == pytest.approx(whole["loss"], abs=1e-6)
    assert float(answers[0]) == 4
    assert float(answers[2] / answers[3]) == whole["token_error_rate"]


def test_a_right_answer_counts_in_full(tmp_path, monkeypatch):
    evaluator, model = figures(tmp_path, 1)
    from unmask.diffusion.generation import ForwardCounts, Generation
    from unmask.training import evaluation

    def perfect(model, prompts, params, rows):
        assert (params.block_length, params.max_new_tokens, params.threshold) == (4, 8, 0.9)
        counts = ForwardCounts(prefill=1, denoise=2, persist=1)
        return [Generation([*prompt[::-1], 62], "eos", counts, len(prompt)) for prompt in prompts]

    monkeypatch.setattr(evaluation, "generate", perfect)
    measured = evaluator.measure(model, stage_step=5)
    kept = sum(len(question.prompt) for question in evaluator._questions) / 4
    assert (measured["exact_match"], measured["token_error_rate"]) == (1.0, 0.0)
    assert (measured["tpf"], measured["tpf_decode"], measured["tpf_denoise"]) == (
        kept / 4,
        kept / 3,
        kept / 2,
    )
