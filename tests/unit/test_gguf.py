"""GGUF files: read as the checkpoint that they were made from, or refused."""

import struct

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFValueType
from safetensors.torch import load_file

from support.checkpoints import gguf_tokenizer, write_gguf
from unmask.errors import ModelError
from unmask.models.converting import convert
from unmask.models.gguf_file import GgufFile
from unmask.models.gguf_tokenizer import tokenizer_files
from unmask.models.loading import build, load
from unmask.models.mask_token import MaskChoice
from unmask.models.registry import parse_config
from unmask.models.tokenizer import Tokenizer

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "intermediate_size": 64,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50_000.0,
    "eos_token_id": 0,
    "initializer_range": 0.2,
}


def model_of(architecture, **changes):
    return build(parse_config(SHAPE | changes | {"architectures": [architecture]}), seed=3).eval()


def written(tmp_path, model, *, kind="llama", quantised=GGMLQuantizationType.F32, **metadata):
    write_gguf(tmp_path / "model.gguf", model, kind=kind, quantised=quantised, **metadata)
    return tmp_path / "model.gguf"


@pytest.mark.parametrize(
    ("kind", "architecture", "changes"),
    [
        ("llama", "LlamaForCausalLM", {}),
        ("llama", "LlamaForCausalLM", {"tie_word_embeddings": True}),
        ("qwen3", "Qwen3ForCausalLM", {}),
    ],
)
def test_a_model_comes_back_from_gguf_bit_for_bit(tmp_path, kind, architecture, changes):
    model = model_of(architecture, **changes)
    convert(written(tmp_path, model, kind=kind), tmp_path / "folder")
    back = load(tmp_path / "folder")
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    ours, theirs = back.config.to_json_dict(), model.config.to_json_dict()
    ignored = ("initializer_range", "torch_dtype", "bos_token_id")
    assert {k: v for k, v in ours.items() if k not in ignored} == {
        k: v for k, v in theirs.items() if k not in ignored
    }


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_1", "F16", "BF16"])
def test_quantised_weights_become_the_numbers_that_they_stand_for(tmp_path, name):
    model = model_of("LlamaForCausalLM")
    kind = GGMLQuantizationType[name]
    convert(written(tmp_path, model, quantised=kind), tmp_path / "folder")
    tensors = load_file(tmp_path / "folder" / "model.safetensors")
    original = model.state_dict()["layers.0.feed_forward.up_proj.weight"].numpy()
    expected = gguf.quants.dequantize(gguf.quants.quantize(original, kind), kind)
    assert np.array_equal(tensors["model.layers.0.mlp.up_proj.weight"].numpy(), expected)
    # Shuffled rows are quantised as they lie in the file, and rows do not share blocks.
    query = model.state_dict()["layers.0.attention.query_key_value.weight"][:96].numpy()
    expected = gguf.quants.dequantize(gguf.quants.quantize(query, kind), kind)
    assert np.array_equal(tensors["model.layers.0.self_attn.q_proj.weight"].numpy(), expected)


def test_pieces_of_some_rows_give_the_same(tmp_path, monkeypatch):
    model = model_of("LlamaForCausalLM")
    file = written(tmp_path, model, quantised=GGMLQuantizationType.Q8_0)
    convert(file, tmp_path / "whole")
    monkeypatch.setattr("unmask.models.gguf_file.PIECE_BYTES", 1000)
    convert(file, tmp_path / "pieces")
    contents = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "pieces")]
    assert contents[0] == contents[1]


def test_a_diffusion_model_is_made_from_gguf_in_one_step(tmp_path):
    file = written(tmp_path, model_of("LlamaForCausalLM"))
    convert(file, tmp_path / "a2d", architecture="A2DLlamaLMHeadModel", mask=MaskChoice(token="<unused3>"))
    tokenizer = Tokenizer.load(tmp_path / "a2d")
    assert load(tmp_path / "a2d").mask_token_id == tokenizer.mask_token_id == tokenizer.encode("<unused3>")[0]


def test_the_tokenizer_comes_with_it(tmp_path):
    convert(written(tmp_path, model_of("LlamaForCausalLM")), tmp_path / "folder")
    tokenizer = Tokenizer.load(tmp_path / "folder")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 0)
    assert len(tokenizer.encode("hehe")) == 2 and len(tokenizer.encode("<start>h<end>")) == 3
    assert tokenizer.decode(tokenizer.encode("he said: d\u00e9j\u00e0 vu")) == "he said: d\u00e9j\u00e0 vu"
    assert tokenizer.render_chat([{"role": "user", "content": "he"}], False) == "he<end>"


def metadata_of(tmp_path, pre):
    writer = gguf.GGUFWriter(tmp_path / "tokenizer.gguf", "llama")
    gguf_tokenizer(writer, 320, pre=pre)
    return {key: value.value for key, value in writer.kv_data[0].items()}


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["I", "'ll", " count", " 1234", ":", "  ", " go"]),
        ("smollm", ["I", "'ll", " count", " ", "1", "2", "3", "4", ":", "  ", " go"]),
        ("llama-bpe", ["I", "'ll", " count", " ", "123", "4", ":", "  ", " go"]),
        ("qwen2", ["I", "'ll", " count", " ", "1", "2", "3", "4", ":", "  ", " go"]),
    ],
)
def test_text_is_cut_as_the_model_was_taught(tmp_path, pre, pieces):
    from tokenizers import Tokenizer as Backend

    content = tokenizer_files(metadata_of(tmp_path, pre), source="file")["tokenizer.json"]
    cut = Backend.from_str(content.decode()).pre_tokenizer.pre_tokenize_str("I'll count 1234:   go")
    assert [piece.replace("\u0120", " ") for piece, _ in cut] == pieces


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model: got 'llama', allowed is 'gpt2'"),
        ({"tokenizer.ggml.pre": "viking"}, "tokenizer.ggml.pre: got 'viking', known are gpt-2, smollm"),
        (
            {"tokenizer.ggml.tokens": ["a", "a"]},
            "the tokenizer is not whole: ValueError: 2 tokens, 1 different",
        ),
        ({"tokenizer.ggml.tokens": None}, "the tokenizer is not whole"),
        ({"tokenizer.ggml.merges": ["h q"]}, "the tokenizer is not whole"),
        ({"tokenizer.ggml.eos_token_id": 9999}, "the tokenizer is not whole: IndexError"),
    ],
)
def test_tokenizers_that_cannot_be_rebuilt_are_refused(tmp_path, changes, message):
    with pytest.raises(ModelError, match=message):
        tokenizer_files(metadata_of(tmp_path, "gpt-2") | changes, source="file")


FLOAT, TEXT, WHOLE = GGUFValueType.FLOAT32, GGUFValueType.STRING, GGUFValueType.UINT32


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama__rope__scaling__type": ("yarn", TEXT)}, "rope_scaling: Input should be None"),
        ({"llama__rope__dimension_count": (8, WHOLE)}, "rope.dimension_count: got 8, allowed is 16"),
        ({"llama__expert_count": (4, WHOLE)}, "expert_count: got 4, allowed is 0"),
    ],
)
def test_options_that_would_change_the_computation_are_refused(tmp_path, metadata, message):
    file = written(tmp_path, model_of("LlamaForCausalLM"), **metadata)
    with pytest.raises(ModelError, match=message):
        GgufFile(file)


def test_an_architecture_that_is_not_known_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match="general.architecture: got 'mamba', known are llama, qwen3"):
        GgufFile(tmp_path / "model.gguf")


def test_a_tensor_that_the_model_has_no_place_for_is_refused(tmp_path):
    """Llama 3.1 scales its positions by such a tensor."""
    file = written(tmp_path, model_of("LlamaForCausalLM"))
    content = file.read_bytes().replace(b"blk.1.attn_norm.weight", b"rope_freqs_____.weight")
    file.write_bytes(content)
    with pytest.raises(
        ModelError, match="1 tensors are missing, first model.layers.1.input_layernorm.weight"
    ):
        convert(file, tmp_path / "folder")


# Damaged and hostile files


def head(*, version=3, tensors=0, pairs=0):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs)


def text(value):
    return struct.pack("<Q", len(value)) + value


PAIR = text(b"key") + struct.pack("<II", 4, 7)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated, or not a GGUF file"),
        (b"GGML" + bytes(40), "not a GGUF file"),
        (head(version=1), "got GGUF version 1"),
        (head(pairs=1), "truncated"),
        (head(pairs=2) + PAIR + PAIR, "'key' is there twice"),
        (head(pairs=1) + struct.pack("<Q", 2**60), "got a text of"),
        (head(pairs=1) + struct.pack("<Q", 1000) + b"key", "truncated"),
        (head(pairs=1) + text(b"\xff"), "got a text that is not UTF-8"),
        (head(pairs=1) + text(b"key") + struct.pack("<I", 99), "got a value of type 99"),
        (head(pairs=1) + text(b"key") + struct.pack("<IIQ", 9, 4, 2**60), "got a list of"),
        (head(pairs=1) + text(b"key") + struct.pack("<IIQ", 9, 9, 1), "got a list of 1 ARRAY"),
        (head(pairs=1) + text(b"key") + struct.pack("<IIQ", 9, 4, 1000), "truncated"),
        (head(pairs=2**60), "truncated"),
        (head(tensors=2**60), "truncated"),
        (head(tensors=1) + text(b"t") + struct.pack("<I", 2**31), "dimensions"),
        (head(tensors=1) + text(b"t") + struct.pack("<IQIQ", 1, 4, 99, 0), "got type 99"),
        (head(tensors=1) + text(b"t") + struct.pack("<IQIQ", 1, 0, 0, 0), r"got shape \[0\]"),
        (head(tensors=1) + text(b"t") + struct.pack("<IQIQ", 1, 33, 8, 0), "with blocks of 32"),
        (head(tensors=1) + text(b"t") + struct.pack("<IQIQ", 1, 4, 0, 2**60), "ends behind the file"),
        (head(tensors=1) + text(b"t") + struct.pack("<IQIQ", 1, 2**62, 0, 0), "ends behind the file"),
        (
            head(tensors=2) + 2 * (text(b"t") + struct.pack("<IQIQ", 1, 1, 0, 0)) + bytes(64),
            "tensor t is there twice",
        ),
    ],
)
def test_files_that_lie_about_their_lengths_are_refused(tmp_path, content, message):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        GgufFile(tmp_path / "model.gguf")


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    file = written(tmp_path, model_of("LlamaForCausalLM", num_hidden_layers=1, vocab_size=262))
    content = file.read_bytes()
    for length in range(0, len(content) - 64, 997):
        file.write_bytes(content[:length])
        with pytest.raises(ModelError, match="truncated"):
            GgufFile(file)


def test_weights_that_are_not_numbers_are_refused(tmp_path):
    model = model_of("LlamaForCausalLM")
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    with pytest.raises(ModelError, match=r"model.gguf: model.norm.weight: has elements that are infinite"):
        convert(written(tmp_path, model), tmp_path / "folder")
