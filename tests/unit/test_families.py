"""Each family against an independent implementation, on random weights, saved and loaded both ways."""

import json

import pytest
import torch
import transformers

from unmask.attention import AttentionMetadata
from unmask.errors import ModelError
from unmask.models.conversion import CONVERSIONS, to_diffusion
from unmask.models.loading import build, load, save
from unmask.models.registry import FAMILIES, parse_config

SMALL = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 128,
    "eos_token_id": 3,
    "pad_token_id": 3,
    "bos_token_id": None,
    "initializer_range": 0.2,
}
CASES = {
    "llama": ("Llama", {}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True, "head_dim": 16}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3, tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
    "olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 3}),
}


@pytest.fixture(params=CASES)
def theirs(request):
    """A random model of the reference implementation; its norms are not 1 either."""
    name, changes = CASES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def our_logits(model, ids):
    position = torch.arange(ids.shape[1]).expand(len(ids), -1)
    with torch.no_grad():
        return model.logits(model.hidden(ids, AttentionMetadata.causal(position, torch.zeros_like(position))))


def their_logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


IDS = torch.randint(0, 96, (2, 17), generator=torch.Generator().manual_seed(1))


def test_their_checkpoint_gives_the_same_logits_here(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    assert (our_logits(ours, IDS) - their_logits(theirs, IDS)).abs().max() < 2e-4


def test_our_checkpoint_gives_the_same_logits_there(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    save(ours, tmp_path / "ours")
    back = type(theirs).from_pretrained(tmp_path / "ours").eval()
    assert (our_logits(ours, IDS) - their_logits(back, IDS)).abs().max() < 2e-4


def test_a_cached_forward_equals_the_whole(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    cache = ours.new_cache(rows=1, capacity=20, block_length=1)
    whole = our_logits(ours, IDS[:1])[0]
    for start, stop in ((0, 9), (9, 10), (10, 17)):
        metadata = AttentionMetadata.single_row(stop - start, block_length=1, start=start)
        with torch.no_grad():
            part = ours.logits(ours.hidden(IDS[:1, start:stop], metadata, cache=cache.select(0, 1)))[0]
        cache.commit(0, stop - start)
        assert torch.allclose(part, whole[start:stop], atol=1e-4)


def test_a_conversion_computes_the_same_under_the_same_mask(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    source = load(tmp_path)
    converted = to_diffusion(source, CONVERSIONS[source.config.architecture], mask_token_id=95)
    assert source.causal and not converted.causal
    assert converted.mask_token_id == 95
    assert torch.equal(our_logits(converted, IDS), our_logits(source, IDS))
    save(converted, tmp_path / "converted")
    assert torch.equal(our_logits(load(tmp_path / "converted"), IDS), our_logits(source, IDS))


QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "eos_token_id": 151645,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "sliding_window": None,
    "use_sliding_window": False,
}
LLADA_MOE_7B_A1B = {
    "architectures": ["LLaDAMoEModelLM"],
    "model_type": "llada",
    "vocab_size": 157184,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "expert_intermediate_size": 1024,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 50000,
    "moe_layer_freq": [1] * 16,
    "qk_layernorm": True,
    "norm_topk_prob": None,
}


@pytest.mark.parametrize(
    ("published", "parameters"), [(QWEN3_30B_A3B, 30_532_122_624), (LLADA_MOE_7B_A1B, 7_356_880_896)]
)
def test_published_configs_have_their_published_parameter_counts(published, parameters):
    model = build(parse_config(published), device="meta")
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == parameters


def test_every_architecture_is_a_class_of_its_family():
    for architecture, family in FAMILIES.items():
        assert family.config_class().architecture == architecture


@pytest.mark.parametrize("architectures", [["LLaDAModelLM"], [], None])
def test_a_model_is_known_by_its_architecture_and_not_by_its_type(architectures):
    """Dense LLaDA has the model_type of LLaDA-MoE, and is another model."""
    assert parse_config(LLADA_MOE_7B_A1B).model_type == "llada"
    with pytest.raises(ModelError, match="architectures: got .*, known are .*LLaDAMoEModelLM"):
        parse_config(LLADA_MOE_7B_A1B | {"architectures": architectures})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling: Input should be None"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_scaling: Input should be None"),
        ({"attention_bias": True}, "attention_bias: Input should be False"),
        ({"hidden_act": "gelu"}, "hidden_act: Input should be 'silu'"),
    ],
)
def test_options_that_would_change_the_computation_are_refused(changes, message):
    config = {**SMALL, "architectures": ["LlamaForCausalLM"], **changes}
    with pytest.raises(ModelError, match=message):
        parse_config(json.loads(json.dumps(config)))
