"""Weights laid out for oneDNN: the model computes the same, and they come and go as others do."""

import pytest
import torch

from support import counts
from support.models import TINY, random_tokens, tiny_canvas_model, tiny_model
from unmask.attention import AttentionMetadata
from unmask.diffusion.batch import run_to_end
from unmask.diffusion.decoding import DecodingParams
from unmask.diffusion.generation import generate_uncached
from unmask.models.loading import build, load, save
from unmask.models.onednn import ReorderedExperts, ReorderedLinear, can_reorder, reorder
from unmask.models.products import products_of
from unmask.models.registry import parse_config
from unmask.models.replacement import Replacement
from unmask.serving.ragged import RaggedBatch

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2,
    "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "initializer_range": 0.3, "eos_token_id": 62, "rope_theta": 10_000.0,
}  # fmt: skip
CONFIGS = {
    "experts": TINY,
    "dense": LLAMA | {"tie_word_embeddings": False},
    "tied": LLAMA | {"tie_word_embeddings": True},
}


@torch.inference_mode()
def scores(model):
    ids = torch.tensor([random_tokens(24)])
    return model.logits(model.hidden(ids, AttentionMetadata.single_row(24, block_length=4)))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_model_computes_the_same(tmp_path, config):
    save(build(parse_config(config)), tmp_path / "model")
    plain, loaded = (load(tmp_path / "model", reordered=reordered) for reordered in (False, True))
    torch.testing.assert_close(scores(loaded), scores(plain), rtol=0, atol=2e-5)
    assert torch.equal(scores(loaded), scores(reorder(plain))), "the one that is laid out afterwards"
    left = {name.split(".")[-2] for name, _ in loaded.named_parameters()}
    norms = {name for name in left if name.endswith("norm")}
    assert left - norms <= {"embedding", "router"}, "weights are there once"


def test_a_model_of_the_whole_canvas_can_be_laid_out():
    model = tiny_canvas_model(dtype=torch.float32)
    expected = scores(model)
    torch.testing.assert_close(scores(reorder(model)), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_weights_that_take_the_place_of_others_leave_nothing_of_them(tmp_path, config):
    for seed in (1, 2):
        save(build(parse_config(config), seed=seed), tmp_path / str(seed))
    model, expected = (load(tmp_path / name, reordered=True) for name in ("1", "2"))
    assert not torch.equal(scores(model), scores(expected))
    with Replacement(tmp_path / "2", model.config) as new:
        new.fill(model)
    assert torch.equal(scores(model), scores(expected))


def test_weights_come_in_parts_and_are_complete_with_the_last():
    whole = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    made, at_once = ReorderedLinear(8, 6), ReorderedLinear(8, 6)
    at_once.put("weight", (), whole)
    for rows in (slice(4, 6), slice(0, 4)):
        assert not made.is_complete
        made.put("weight", (rows,), whole[rows])
    assert made.is_complete
    x = torch.randn(4, 8)
    with torch.inference_mode():
        assert torch.equal(made(x), at_once(x))
    made.clear()
    assert not made.is_complete


def test_what_is_not_float32_on_a_cpu_stays_as_it_is(tmp_path):
    assert can_reorder("cpu", torch.float32)
    assert not can_reorder("cpu", torch.bfloat16) and not can_reorder("cuda", torch.float32)
    save(build(parse_config(TINY), dtype=torch.bfloat16), tmp_path / "model")
    assert not products_of(load(tmp_path / "model", reordered=True))


def test_memory_is_that_of_the_numbers():
    experts = ReorderedExperts(3, 32, 16)
    assert (experts.count, experts.nbytes) == (3, 3 * 3 * 32 * 16 * 4)


@pytest.mark.parametrize("seed", range(counts.of(sample=2, full=30)))
def test_requests_get_the_tokens_that_they_get_without_a_cache(seed):
    model = reorder(tiny_model(dtype=torch.float32, seed=seed))
    params = DecodingParams(
        max_new_tokens=14, block_length=4, threshold=0.3, eos_token_id=62, mask_token_id=63
    )
    prompts = [random_tokens(5 + 3 * row, seed=row) for row in range(4)]
    batch = RaggedBatch(model, rows=3, capacity=64, block_length=4)
    found = [one.token_ids for one in run_to_end(batch, prompts, params)]
    exact = tiny_model(dtype=torch.float64, seed=seed)
    assert found == [generate_uncached(exact, prompt, params).token_ids for prompt in prompts]
