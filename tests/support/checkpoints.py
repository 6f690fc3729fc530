"""Model folders on disk: Ling's tokenizer in little, checkpoints of any size, and GGUF files."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
from tokenizers import AddedToken, models, pre_tokenizers

from unmask.models.checkpoint_files import slots_of
from unmask.models.registry import parse_config
from unmask.models.tensor_file import PIECE_BYTES, StoredTensor, write_tensor_file

LING_MINI: dict[str, Any] = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "model_type": "bailing_moe",
    "vocab_size": 157184,
    "hidden_size": 2048,
    "num_hidden_layers": 20,
    "intermediate_size": 5120,
    "moe_intermediate_size": 512,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 32768,
    "num_nextn_predict_layers": 1,
    "rope_scaling": None,
    "dtype": "bfloat16",
    "auto_map": {"AutoConfig": "configuration_bailing_moe_v2.BailingMoeV2Config"},
}
"""The shapes of Ling-mini-base-2.0."""
SMALL_LING = LING_MINI | {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
}
"""Ling's vocabulary on a body of few parameters."""


def ling_tokenizer(folder: Path, *, chat: bool = False) -> None:
    """Write a tokenizer with Ling's special ids, of the base model or of the one that chats."""
    words = {f"w{number}": number for number in range(156_891)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {156_891: "<|startoftext|>", 156_892: "<|endoftext|>", 157_151: "<role>", 157_152: "</role>"}
    if chat:
        named[156_895] = "<|role_end|>"
    ids = range(156_891, 157_153)
    tokens = [named.get(token_id, f"<|reserved_token_{token_id}|>") for token_id in ids]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    decoder = {str(token_id): {"content": token} for token_id, token in zip(ids, tokens, strict=True)}
    config = {**roles, "added_tokens_decoder": decoder, "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(roles))


def write_checkpoint(
    folder: Path, config: dict[str, Any], *, shards: int = 1, dtype: str = "BF16", extra: tuple[str, ...] = ()
) -> None:
    """Write random weights for ``config``, in little memory, without checksums; ``extra`` ones besides."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = [
        StoredTensor(slot.name, "F32" if slot.name.endswith("expert_bias") else dtype, slot.shape)
        for slot in slots_of(parse_config(config))
    ]
    tensors += [StoredTensor(name, dtype, (4, 4)) for name in extra]
    if shards == 1:
        write_tensor_file(folder / "model.safetensors", tensors, _random)
        return
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = tensors[number * len(tensors) // shards : (number + 1) * len(tensors) // shards]
        write_tensor_file(folder / name, part, _random)
        weight_map |= {tensor.name: name for tensor in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


_POOL = np.random.default_rng(0).integers(0, 1 << 16, PIECE_BYTES // 2 + 4096, np.uint16)
_POOL &= 0xBF7F  # exponents whose numbers are finite and not large, in every dtype


def _random(tensor: StoredTensor) -> Iterator[bytes]:
    """Numbers that differ from tensor to tensor: one random pool, from a place that the name gives."""
    start = sum(tensor.name.encode()) * 7 % 4096
    for offset in range(0, tensor.nbytes, PIECE_BYTES):
        count = min(PIECE_BYTES, tensor.nbytes - offset)
        yield _POOL[start : start + count // 2].tobytes()


def write_gguf(
    file: Path, model: torch.nn.Module, *, kind: str, quantised: gguf.GGMLQuantizationType, **metadata: Any
) -> None:
    """Write ``model`` (Llama or Qwen3, published layout) as llama.cpp's converter does."""
    config = model.config
    writer = gguf.GGUFWriter(file, kind)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    gguf_tokenizer(writer, config.vocab_size)
    for key, value in metadata.items():
        writer.add_key_value(key.replace("__", "."), *value)
    state = model.state_dict()
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, kind.upper()), config.num_hidden_layers)
    for slot in slots_of(config):
        array = slot.view(state).float().contiguous().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        part = slot.name.split(".")[-2]
        if kind == "llama" and part in heads:
            array = _shuffled(array, heads[part])
        name = names.get_name(slot.name, try_suffixes=(".weight",))
        assert name is not None
        raw_type = quantised if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(array, raw_type), raw_dtype=raw_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _shuffled(weights: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of Llama's query and key projections."""
    rows, columns = weights.shape
    return weights.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def gguf_tokenizer(writer: gguf.GGUFWriter, vocab_size: int, *, pre: str = "gpt-2") -> None:
    """Add a byte-level BPE: two special tokens, the bytes, one merge, and then words that no text makes."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<end>", "<start>", *alphabet, "he", "<empty_output>"]
    tokens += [f"<unused{number}>" for number in range(vocab_size - len(tokens))]
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([normal if token in alphabet or token == "he" else control for token in tokens])
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}<end>{% endfor %}")
