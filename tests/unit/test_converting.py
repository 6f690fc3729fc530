"""Checkpoints converted on disk: what changes, what stays bit for bit, and what is refused."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.checkpoints import SMALL_LING, ling_tokenizer, write_checkpoint
from support.folders import add_tokenizer
from support.models import TINY, tiny_model
from unmask.errors import ModelError, UsageError
from unmask.models import tensor_file
from unmask.models.converting import convert
from unmask.models.loading import build, load, save
from unmask.models.mask_token import MaskChoice
from unmask.models.registry import CONVERSIONS, parse_config
from unmask.models.tokenizer import Tokenizer

DECODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "eos_token_id": 62,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
SOURCES = {
    "LlamaForCausalLM": DECODER,
    "Qwen3ForCausalLM": DECODER | {"tie_word_embeddings": True},
    "Qwen3MoeForCausalLM": DECODER | EXPERTS,
    "OlmoeForCausalLM": DECODER | EXPERTS,
    "BailingMoeV2ForCausalLM": TINY,
}


def weights(folder):
    """All tensors of a folder, whatever its files."""
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_same_weights(first, second):
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_checksums(folder):
    digests = json.loads((folder / "checksums.json").read_text())
    others = {file.name for file in folder.iterdir()} - {"checksums.json"}
    assert digests == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in others}


@pytest.fixture
def ling(tmp_path):
    """A checkpoint with Ling's vocabulary and ids, a multi-token-prediction layer and two shards."""
    folder = tmp_path / "ling"
    extra = ("model.layers.2.eh_proj.weight", "model.layers.2.input_layernorm.weight")
    write_checkpoint(folder, SMALL_LING, shards=2, extra=extra)
    ling_tokenizer(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [156892, 156895]}))
    return folder


def test_ling_becomes_llada2_with_every_weight_as_it_was(ling, tmp_path):
    done = convert(ling, tmp_path / "llada2", architecture="LLaDA2MoeModelLM")
    before = {name: tensor for name, tensor in weights(ling).items() if ".layers.2." not in name}
    after = weights(tmp_path / "llada2")
    assert before.keys() == after.keys() and done.ignored == 2
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert_checksums(tmp_path / "llada2")


def test_ling_becomes_llada2_with_its_configuration(ling, tmp_path):
    convert(ling, tmp_path / "llada2", architecture="LLaDA2MoeModelLM")
    config = json.loads((tmp_path / "llada2" / "config.json").read_text())
    assert config["architectures"] == ["LLaDA2MoeModelLM"] and config["model_type"] == "llada2_moe"
    assert config["mask_token_id"] == 156895
    assert config["eos_token_id"] == config["pad_token_id"] == 156892
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_llada2_moe.LLaDA2MoeModelLM"
    assert config["torch_dtype"] == "bfloat16"
    assert not {"dtype", "num_nextn_predict_layers"} & config.keys()
    assert config["n_group"] == SMALL_LING["n_group"] and config["rope_theta"] == 600_000
    generation = json.loads((tmp_path / "llada2" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 156892, "pad_token_id": 156892, "mask_token_id": 156895}
    assert not load(tmp_path / "llada2").causal


def test_ling_becomes_llada2_with_its_tokenizer(ling, tmp_path):
    convert(ling, tmp_path / "llada2", architecture="LLaDA2MoeModelLM")
    tokenizer = Tokenizer.load(tmp_path / "llada2")
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        156895,
        156892,
        156892,
    )
    assert tokenizer.encode("w7 <|mask|><|role_end|> w8") == [7, 156895, 156900, 8]
    assert Tokenizer.load(ling).encode("<role>w7") == tokenizer.encode("<role>w7") == [157151, 7]
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    assert tokenizer.render_chat(chat, add_generation_prompt=True) == (
        "<role>SYSTEM</role>Be brief.\ndetailed thinking off<|role_end|>"
        "<role>HUMAN</role>Hi<|role_end|><role>ASSISTANT</role>Hello<|role_end|>"
        "<role>HUMAN</role>Bye<|role_end|><role>ASSISTANT</role>"
    )
    settings = json.loads((tmp_path / "llada2" / "tokenizer_config.json").read_text())
    assert settings["added_tokens_decoder"]["156895"]["content"] == "<|mask|>"
    roles = json.loads((tmp_path / "llada2" / "special_tokens_map.json").read_text())
    assert roles["mask_token"] == "<|mask|>"


def test_the_chat_template_writes_tools_and_their_results(ling, tmp_path):
    convert(ling, tmp_path / "llada2", architecture="LLaDA2MoeModelLM")
    call = {"name": "add", "arguments": {"x": 1}}
    chat = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": call}]},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "two"},
    ]
    assert Tokenizer.load(tmp_path / "llada2").render_chat(chat, add_generation_prompt=True) == (
        "<role>SYSTEM</role>detailed thinking off<|role_end|><role>HUMAN</role>1 + 1?<|role_end|>"
        '<role>ASSISTANT</role><tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call><|role_end|>'
        "<role>OBSERVATION</role>\n<tool_response>\n2\n</tool_response>\n<tool_response>\ntwo\n</tool_response>"
        "<|role_end|><role>ASSISTANT</role>"
    )


def test_a_ling_that_was_taught_to_chat_is_refused(ling, tmp_path):
    ling_tokenizer(ling, chat=True)
    with pytest.raises(
        ModelError, match=r"id 156895, LLaDA2.0's mask, is <\|role_end\|>: .*convert the base"
    ):
        convert(ling, tmp_path / "llada2", architecture="LLaDA2MoeModelLM")
    assert [entry.name for entry in tmp_path.iterdir()] == ["ling"]


@pytest.mark.parametrize("architecture", SOURCES)
def test_every_autoregressive_family_becomes_its_diffusion_sibling(architecture, tmp_path):
    config = parse_config(SOURCES[architecture] | {"architectures": [architecture]})
    save(build(config, seed=1), tmp_path / "source")
    target = CONVERSIONS[architecture]
    convert(tmp_path / "source", tmp_path / "target", architecture=target, mask=MaskChoice(token_id=61))
    assert_same_weights(tmp_path / "source", tmp_path / "target")
    model = load(tmp_path / "target")
    assert model.config.architecture == target and model.mask_token_id == 61 and not model.causal


# The mask token


@pytest.fixture
def llama(tmp_path):
    config = parse_config(DECODER | {"architectures": ["LlamaForCausalLM"], "mask_token_id": 61})
    save(build(config), tmp_path / "llama")
    add_tokenizer(tmp_path / "llama")
    settings = tmp_path / "llama" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"mask_token_id": None}))
    (tmp_path / "llama" / "checksums.json").unlink()
    return tmp_path / "llama"


A2D = "A2DLlamaLMHeadModel"


def converted(llama, **choice):
    target = llama.parent / "target"
    convert(llama, target, architecture=A2D, mask=MaskChoice(**choice))
    tokenizer = Tokenizer.load(target)
    return tokenizer, load(target).mask_token_id


def test_a_special_token_becomes_the_mask(llama):
    tokenizer, mask_id = converted(llama, token="<mask>")
    assert tokenizer.mask_token_id == mask_id == 61


def test_a_special_token_is_renamed(llama):
    tokenizer, mask_id = converted(llama, token="<blank>", token_id=61)
    assert tokenizer.mask_token_id == mask_id == 61
    assert tokenizer.encode("w1 <blank>") == [0, 61] and tokenizer.encode("<mask>") == [0]


def edit_tokenizer(folder, change):
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def drop_last_tokens(data):
    data["model"]["vocab"] = {word: number for word, number in data["model"]["vocab"].items() if number < 60}
    data["added_tokens"] = [{**data["added_tokens"][0], "id": 60, "content": "<eos>"}]


def test_a_new_token_takes_the_next_row(llama):
    edit_tokenizer(llama, drop_last_tokens)
    tokenizer, mask_id = converted(llama, token="<blank>")
    assert tokenizer.mask_token_id == mask_id == 61
    assert tokenizer.encode("<blank>") == [61]


def test_a_row_that_no_token_has_can_be_the_mask_without_a_name(llama):
    edit_tokenizer(llama, drop_last_tokens)
    settings = llama / "tokenizer_config.json"
    settings.write_text(json.dumps({"eos_token": "<eos>"}))
    tokenizer, mask_id = converted(llama, token_id=63)
    assert (tokenizer.mask_token_id, mask_id) == (None, 63)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({}, r"which token is the mask\? give --mask-token or --mask-token-id .*: <mask>\)"),
        ({"token_id": 64}, "mask token id 64 is outside the 64 rows"),
        ({"token": "<mask>", "token_id": 5}, "mask token '<mask>' has id 61, not 5"),
        ({"token_id": 5}, "token id 5 is 'w5', which texts use; choose a special token"),
        ({"token": "w5"}, "token id 5 is 'w5', which texts use"),
        ({"token_id": 62}, "token id 62 is '<eos>', the eos_token; choose one without a role"),
        ({"token": "<blank>"}, "mask token id 64 is outside the 64 rows"),
    ],
)
def test_tokens_that_cannot_be_the_mask_are_refused(llama, choice, message):
    with pytest.raises(UsageError, match=message):
        converted(llama, **choice)


def test_without_a_tokenizer_the_mask_is_an_id(llama):
    (llama / "tokenizer.json").unlink()
    convert(llama, llama.parent / "target", architecture=A2D, mask=MaskChoice(token_id=5))
    assert load(llama.parent / "target").mask_token_id == 5


# Layouts, dtypes and shards


@pytest.fixture
def llada2(tmp_path):
    save(tiny_model(dtype=torch.bfloat16), tmp_path / "source", companions={"generation_config.json": b"{}"})
    return tmp_path / "source"


def test_experts_are_stacked_and_taken_apart_again(llada2, tmp_path):
    convert(llada2, tmp_path / "merged", layout="merged")
    split, merged = weights(llada2), weights(tmp_path / "merged")
    for part in ("gate_proj", "up_proj", "down_proj"):
        names = [f"model.layers.1.mlp.experts.{number}.{part}.weight" for number in range(8)]
        stacked = torch.stack([split[name] for name in names])
        assert torch.equal(merged[f"model.layers.1.mlp.experts.{part}"], stacked)
    assert len(merged) == len(split) - 3 * 8 + 3
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["model_type"] == "llada2_moe_veomni"

    convert(tmp_path / "merged", tmp_path / "again")
    assert_same_weights(llada2, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == "llada2_moe"
    assert_checksums(tmp_path / "merged")


def test_stacked_experts_load_as_they_are(llada2, tmp_path):
    convert(llada2, tmp_path / "merged", layout="merged")
    ours, theirs = load(tmp_path / "merged").state_dict(), load(llada2).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert load(tmp_path / "merged").config.model_type == "llada2_moe"


def test_stacked_experts_may_have_a_suffix(llada2, tmp_path):
    convert(llada2, tmp_path / "merged", layout="merged")
    file = tmp_path / "merged" / "model.safetensors"
    stacked = (".experts.gate_proj", ".experts.up_proj", ".experts.down_proj")
    renamed = {f"{n}.weight" if n.endswith(stacked) else n: tensor for n, tensor in load_file(file).items()}
    save_file(renamed, file)
    (tmp_path / "merged" / "checksums.json").unlink()
    convert(tmp_path / "merged", tmp_path / "again")
    assert_same_weights(llada2, tmp_path / "again")


def test_one_file_becomes_several_and_one_again(llada2, tmp_path):
    convert(llada2, tmp_path / "shards", max_shard_bytes=10_000)
    files = sorted(tmp_path.glob("shards/*.safetensors"))
    assert len(files) > 3 and all(file.stat().st_size < 16_000 for file in files)
    assert_same_weights(llada2, tmp_path / "shards")
    assert_checksums(tmp_path / "shards")
    convert(tmp_path / "shards", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").exists()
    assert_same_weights(llada2, tmp_path / "again")


def test_another_dtype_leaves_the_router_as_it_is(llada2, tmp_path):
    convert(llada2, tmp_path / "halves", dtype=torch.float16)
    before, after = weights(llada2), weights(tmp_path / "halves")
    for name, tensor in after.items():
        router = ".mlp.gate." in name
        assert tensor.dtype == (torch.float32 if router else torch.float16)
        assert torch.equal(tensor, before[name] if router else before[name].to(torch.float16))
    assert json.loads((tmp_path / "halves" / "config.json").read_text())["torch_dtype"] == "float16"


def test_companions_that_need_no_change_stay_byte_for_byte(llada2, tmp_path):
    add_tokenizer(llada2)
    convert(llada2, tmp_path / "copy")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (llada2 / name).read_bytes()


def test_pieces_smaller_than_a_tensor_give_the_same(llada2, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(tensor_file, "PIECE_BYTES", 64)
    convert(llada2, tmp_path / "copy", progress=lambda written, total: told.append((written, total)))
    assert_same_weights(llada2, tmp_path / "copy")
    written, total = told[-1]
    assert written == total and len(told) > 100


# What is refused


def test_a_target_that_exists_is_left_alone(llada2, tmp_path):
    (tmp_path / "target").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        convert(llada2, tmp_path / "target")


def test_a_mask_is_for_a_conversion(llada2, tmp_path):
    with pytest.raises(UsageError, match="say to which architecture"):
        convert(llada2, tmp_path / "target", mask=MaskChoice(token_id=1))


def test_only_llada2_has_a_merged_layout(llama, tmp_path):
    with pytest.raises(UsageError, match="LlamaForCausalLM has no merged layout"):
        convert(llama, tmp_path / "target", layout="merged")


def test_an_unknown_conversion_names_those_that_there_are(llama, tmp_path):
    with pytest.raises(ModelError, match="cannot convert LlamaForCausalLM to SDARForCausalLM; known"):
        convert(llama, tmp_path / "target", architecture="SDARForCausalLM")


def test_weights_that_a_dtype_cannot_hold_are_refused(tmp_path):
    model = tiny_model(dtype=torch.float32)
    with torch.no_grad():
        model.head.weight[0, 0] = 1e6
    save(model, tmp_path / "source")
    with pytest.raises(ModelError, match=r"lm_head.weight: has elements too large for torch.float16"):
        convert(tmp_path / "source", tmp_path / "target", dtype=torch.float16)
    assert not (tmp_path / "target").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_a_tokenizer_larger_than_the_embedding_is_refused(llada2, tmp_path):
    add_tokenizer(llada2)
    edit_tokenizer(llada2, lambda data: data["model"]["vocab"].update(extra=64))
    with pytest.raises(ModelError, match="the tokenizer has 65 ids, the embedding 64 rows"):
        convert(llada2, tmp_path / "target")


def test_a_file_that_is_neither_folder_nor_gguf_is_refused(tmp_path):
    (tmp_path / "weights.zip").write_bytes(b"")
    with pytest.raises(ModelError, match=r"weights.zip: got neither a model folder nor a .gguf file"):
        convert(tmp_path / "weights.zip", tmp_path / "target")
