"""Models on disk: published names, counts, round trips, and every way a folder can be wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from support.models import TINY, tiny_model
from unmask.errors import ModelError
from unmask.models.conversion import to_diffusion
from unmask.models.loading import build, load, save, slots_of
from unmask.models.registry import parse_config, read_config

GOLDEN = Path(__file__).parent.parent / "golden"

MINI = {
    "architectures": ["LLaDA2MoeModelLM"],
    "num_hidden_layers": 20,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "moe_intermediate_size": 512,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "vocab_size": 157184,
    "max_position_embeddings": 32768,
    "eos_token_id": None,
}
FLASH = MINI | {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
    "num_attention_heads": 32,
}


@pytest.mark.parametrize(("published", "parameters"), [(MINI, 16_255_643_392), (FLASH, 102_889_705_216)])
@pytest.mark.parametrize("architecture", ["LLaDA2MoeModelLM", "BailingMoeV2ForCausalLM"])
def test_published_configs_have_their_published_parameter_counts(published, parameters, architecture):
    model = build(parse_config(published | {"architectures": [architecture]}), device="meta")
    persistent = model.state_dict()
    assert sum(tensor.numel() for tensor in persistent.values()) == parameters
    assert sum(torch.Size(slot.shape).numel() for slot in slots_of(model.config)) == parameters
    assert all(tensor.device.type == "meta" for tensor in persistent.values())


def test_ids_that_published_configs_leave_out_are_those_of_the_tokenizer():
    config = parse_config(MINI)
    assert (config.eos_token_id, config.pad_token_id, config.mask_token_id) == (156892, 156892, 156895)


@pytest.fixture
def saved(tmp_path):
    model = tiny_model(dtype=torch.float32)
    save(model, tmp_path / "model", companions={"tokenizer.json": b"{}"})
    return model, tmp_path / "model"


def assert_equal_weights(first, second):
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 10_000])
def test_a_saved_model_reads_back_bit_for_bit(tmp_path, dtype, max_shard_bytes):
    model = tiny_model(dtype=dtype)
    save(model, tmp_path / "model", max_shard_bytes=max_shard_bytes)
    shards = list((tmp_path / "model").glob("*.safetensors"))
    assert (len(shards) > 3) == (max_shard_bytes == 10_000)
    assert_equal_weights(load(tmp_path / "model"), model)


def test_saving_a_published_checkpoint_again_gives_the_same_tensors(tmp_path):
    save(load(GOLDEN / "llada2_a"), tmp_path / "again")
    original = load_file(GOLDEN / "llada2_a" / "model.safetensors")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert original.keys() == again.keys()
    assert all(torch.equal(original[name], again[name]) for name in original)
    ours, theirs = (
        json.loads((folder / "config.json").read_text())
        for folder in (tmp_path / "again", GOLDEN / "llada2_a")
    )
    assert {name: ours[name] for name in theirs} == theirs


def test_saving_replaces_a_folder_and_leaves_nothing_beside_it(saved, tmp_path):
    _, folder = saved
    other = tiny_model(dtype=torch.float32, seed=5)
    save(other, folder)
    assert_equal_weights(load(folder), other)
    assert not (folder / "tokenizer.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_loads_in_another_dtype_with_its_router_in_float32(saved):
    model = load(saved[1], dtype=torch.bfloat16)
    assert model.head.weight.dtype == torch.bfloat16
    assert {router.weight.dtype for router in model.routers()} == {torch.float32}


def test_equal_seeds_give_equal_weights():
    config = parse_config(TINY)
    assert_equal_weights(build(config, seed=3), build(config, seed=3))
    different = build(config, seed=4).state_dict()["head.weight"]
    assert not torch.equal(build(config, seed=3).state_dict()["head.weight"], different)


# The autoregressive source


def as_ling(folder, target, extra=None):
    """The golden LLaDA2 as a Ling checkpoint; ``extra`` tensors are added."""
    target.mkdir()
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "architectures": ["BailingMoeV2ForCausalLM"],
        "model_type": "bailing_moe",
        "num_nextn_predict_layers": 1,
    }
    (target / "config.json").write_text(json.dumps(config))
    save_file(load_file(folder / "model.safetensors") | (extra or {}), target / "model.safetensors")
    return target


def causal_logits(model, ids):
    from unmask.attention import AttentionMetadata

    position = torch.arange(ids.shape[1]).expand(len(ids), -1)
    with torch.no_grad():
        return model.logits(model.hidden(ids, AttentionMetadata.causal(position, torch.zeros_like(position))))


@pytest.mark.parametrize("name", ["llada2_a", "llada2_b"])
def test_ling_computes_the_recorded_causal_logits(tmp_path, name):
    model = load(as_ling(GOLDEN / name, tmp_path / "ling"))
    assert model.causal
    with safe_open(GOLDEN / name / "golden.safetensors", "pt") as golden:
        got = causal_logits(model, golden.get_tensor("causal.input_ids"))
        assert (got - golden.get_tensor("causal.logits")).abs().max() < 2e-4


def test_multi_token_prediction_layers_are_dropped(tmp_path):
    extra = {
        "model.layers.3.eh_proj.weight": torch.zeros(2, 2),
        "model.layers.3.enorm.weight": torch.zeros(2),
    }
    model = load(as_ling(GOLDEN / "llada2_a", tmp_path / "ling", extra))
    assert len(model.layers) == 3


def test_conversion_keeps_every_tensor_and_changes_the_architecture(tmp_path):
    source = load(as_ling(GOLDEN / "llada2_a", tmp_path / "ling"))
    converted = to_diffusion(source, "LLaDA2MoeModelLM")
    assert not converted.causal
    assert_equal_weights(converted, source)
    save(converted, tmp_path / "llada2")
    assert read_config(tmp_path / "llada2").model_type == "llada2_moe"
    assert "num_nextn_predict_layers" not in json.loads((tmp_path / "llada2" / "config.json").read_text())


def test_only_an_autoregressive_sibling_can_be_converted():
    with pytest.raises(
        ModelError, match="cannot convert LLaDA2MoeModelLM to LLaDA2MoeModelLM; known conversions"
    ):
        to_diffusion(tiny_model(), "LLaDA2MoeModelLM")


# What is refused


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value != "remove"}))
    (folder / "checksums.json").unlink()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"architectures: got \['GPT2LMHeadModel'\], known are"),
        ({"architectures": "remove"}, "architectures: got None"),
        ({"hidden_size": "remove"}, "hidden_size: Field required"),
        ({"hidden_size": -1}, "hidden_size: Input should be greater than 0"),
        ({"n_group": 3}, "num_experts 8 is not a multiple of n_group 3"),
        ({"topk_group": 5}, "topk_group 5 exceeds n_group 4"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"mask_token_id": 64}, "mask_token_id 64 is outside the vocabulary of 64"),
        ({"use_bias": True}, "use_bias: Input should be False"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling: Input should be None"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: Input should be False"),
    ],
)
def test_configs_that_mean_something_else_are_refused(saved, changes, message):
    edit_config(saved[1], **changes)
    with pytest.raises(ModelError, match=message):
        load(saved[1])


def rewrite(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    (folder / "checksums.json").unlink()


HEAD = "lm_head.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(HEAD), "1 tensors are missing, first lm_head.weight"),
        (
            lambda t: t.update(stray=torch.zeros(1)),
            "1 tensors that config.json has no place for, first stray",
        ),
        (
            lambda t: t.update({HEAD: torch.zeros(2, 3)}),
            r"lm_head.weight: got shape \[2, 3\], config.json asks for \[64, 32\]",
        ),
        (
            lambda t: t.update({HEAD: torch.zeros(64, 32, dtype=torch.int32)}),
            "lm_head.weight: got dtype I32, allowed are F64, F32, BF16, F16",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(saved, change, message):
    rewrite(saved[1], change)
    with pytest.raises(ModelError, match=message):
        load(saved[1])


def test_missing_truncated_and_corrupted_files_are_named(saved, tmp_path):
    folder = saved[1]
    weights = folder / "model.safetensors"
    content = weights.read_bytes()

    middle = len(content) // 2
    weights.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(ModelError, match=r"model.safetensors: corrupted: its SHA-256"):
        load(folder)

    weights.write_bytes(content[:-10])
    with pytest.raises(ModelError, match=r"model.safetensors: corrupted"):
        load(folder)
    (folder / "checksums.json").unlink()
    with pytest.raises(ModelError, match=r"model.safetensors: truncated, or not a safetensors file"):
        load(folder)

    weights.unlink()
    with pytest.raises(ModelError, match="holds neither model.safetensors nor model.safetensors.index.json"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config.json: cannot be read as JSON"):
        load(folder)
    shutil.rmtree(folder)
    with pytest.raises(ModelError, match=r"config.json: no such file"):
        load(folder)


@pytest.fixture
def sharded(tmp_path):
    save(tiny_model(dtype=torch.float32), tmp_path / "model", max_shard_bytes=20_000)
    (tmp_path / "model" / "checksums.json").unlink()
    return tmp_path / "model"


def edit_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_an_index_may_not_leave_its_folder(sharded):
    edit_index(sharded, lambda weight_map: weight_map.update({HEAD: "../model.safetensors"}))
    with pytest.raises(ModelError, match=r"got file '../model.safetensors', allowed are"):
        load(sharded)


def test_an_index_that_disagrees_with_its_files_is_refused(sharded):
    first = sorted(sharded.glob("*.safetensors"))[0].name
    edit_index(sharded, lambda weight_map: weight_map.update({HEAD: first}))
    with pytest.raises(ModelError, match=f"{first}: tensor lm_head.weight is missing, though"):
        load(sharded)


def test_a_missing_shard_is_named(sharded):
    gone = sorted(sharded.glob("*.safetensors"))[-1]
    gone.unlink()
    with pytest.raises(ModelError, match=f"{gone.name}: no such file, though"):
        load(sharded)
