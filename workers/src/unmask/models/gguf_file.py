"""A GGUF file, as llama.cpp has it, read as the published checkpoint that it was made from.

Weights are turned back from quantised blocks into float32, some rows at a time. llama.cpp
rotates neighbouring elements of a Llama head where the published model rotates its two
halves, so the rows of its query and key projections are shuffled in the file; that is undone.
Qwen3's are not. No torch is needed here.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from gguf.quants import dequantize

from unmask.errors import ModelError
from unmask.models.config import ModelConfig
from unmask.models.folder import open_file
from unmask.models.gguf_header import GgufTensor, read_gguf_header
from unmask.models.gguf_tokenizer import tokenizer_files
from unmask.models.registry import parse_config
from unmask.models.tensor_file import PIECE_BYTES, StoredTensor, read_pieces

__all__ = ["GgufFile"]

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""``general.architecture`` -> ours."""
_SHUFFLED = {"llama": ("attn_q", "attn_k"), "qwen3": ()}
_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""What llama.cpp calls a tensor -> its published name."""
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


class GgufFile:
    """A GGUF file, open for reading; a context manager.

    Attributes:
        path: The file.
        config: What its metadata say, as a ``config.json``.
        tensors: Under their published names; all are float32 once read.
        types: How many tensors are stored in which way.
    """

    def __init__(self, path: Path) -> None:
        """Read all that is not weights.

        Raises:
            ModelError: If the file is no GGUF file, cut short, or not of a model that we know.
        """
        self.path = path
        self._file = open_file(path)
        try:
            header = read_gguf_header(self._file, source=str(path))
            self._metadata = header.metadata
            self._kind = _known_architecture(header.metadata, path)
            self._stored = {_published(name): tensor for name, tensor in header.tensors.items()}
            self.types = Counter(tensor.type.name for tensor in self._stored.values())
            _check_readable(self._stored, path)
            self.tensors = {
                name: StoredTensor(name, "F32", tensor.shape) for name, tensor in self._stored.items()
            }
            self.config = _config(header.metadata, self._kind, self.tensors, path)
        except ModelError:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def file_of(self, name: str) -> Path:
        """See :class:`~unmask.models.checkpoint_files.TensorSource`."""
        return self.path

    def pieces(self, name: str) -> Iterator[bytearray]:
        """See :class:`~unmask.models.checkpoint_files.TensorSource`."""
        tensor = self._stored[name]
        head = self.config.head_dim if self._is_shuffled(tensor.name) else 1
        rows = max(1, PIECE_BYTES // (4 * tensor.shape[-1]) // head) * head
        for first in range(0, tensor.rows, rows):
            raw = self._rows(tensor, first, min(rows, tensor.rows - first))
            if head > 1:
                raw = raw[_unshuffled(len(raw), head)]
            with np.errstate(all="ignore"):  # whether all is finite is checked behind this
                yield bytearray(np.ascontiguousarray(dequantize(raw, tensor.type)).data)

    def companions(self) -> dict[str, bytes]:
        """The files that go with a published checkpoint: tokenizer and what ends a text.

        Raises:
            ModelError: If the tokenizer is of a kind that cannot be rebuilt.
        """
        return tokenizer_files(self._metadata, source=str(self.path))

    @property
    def has_chat_template(self) -> bool:
        """Whether the file says how a conversation is written out."""
        return isinstance(self._metadata.get("tokenizer.chat_template"), str)

    def _is_shuffled(self, name: str) -> bool:
        layer = _LAYER.fullmatch(name)
        return layer is not None and layer[2] in _SHUFFLED[self._kind]

    def _rows(self, tensor: GgufTensor, first: int, count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The bytes of ``count`` rows, (count, row_bytes)."""
        start = tensor.start + first * tensor.row_bytes
        pieces = read_pieces(self._file, start, count * tensor.row_bytes, source=str(self.path))
        raw = np.frombuffer(b"".join(pieces), np.uint8)
        return raw.reshape(count, tensor.row_bytes)


def _unshuffled(rows: int, head: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """For each row of the published projection, its row in the file: halves instead of neighbours."""
    return np.arange(rows).reshape(-1, head // 2, 2).swapaxes(1, 2).ravel()


def _published(name: str) -> str:
    """The published name of a tensor; llama.cpp's own if it has none."""
    layer = _LAYER.fullmatch(name)
    if layer is not None and layer[2] in _LAYER_NAMES:
        return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.weight"
    stem = name.removesuffix(".weight")
    return f"{_NAMES[stem]}.weight" if stem in _NAMES else name


def _known_architecture(metadata: Mapping[str, Any], path: Path) -> str:
    kind = metadata.get("general.architecture")
    if kind not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise ModelError(f"{path}: general.architecture: got {ascii(kind)}, known are {known}")
    return str(kind)


def _check_readable(tensors: Mapping[str, GgufTensor], path: Path) -> None:
    """One block of each type is tried, so that an unknown type is found before hours of work."""
    for tensor in {tensor.type: tensor for tensor in tensors.values()}.values():
        try:
            with np.errstate(all="ignore"):
                dequantize(np.zeros((1, tensor.row_bytes), np.uint8), tensor.type)
        except NotImplementedError:
            raise ModelError(f"{path}: {tensor.name}: cannot turn {tensor.type.name} into numbers") from None


def _config(
    metadata: Mapping[str, Any], kind: str, tensors: Mapping[str, StoredTensor], path: Path
) -> ModelConfig:
    """The metadata under the names of ``config.json``."""

    def get(key: str, default: object = None) -> Any:
        return metadata.get(f"{kind}.{key}", default)

    embedding = tensors.get("model.embed_tokens.weight")
    hidden, heads = get("embedding_length"), get("attention.head_count")
    data = {
        "architectures": [_ARCHITECTURES[kind]],
        "vocab_size": embedding.shape[0] if embedding else None,
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length"),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": _shortest(get("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(get("rope.freq_base")),
        "rope_scaling": _rope_scaling(get("rope.scaling.type", "none")),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    if get("expert_count"):
        raise ModelError(f"{path}: {kind}.expert_count: got {get('expert_count')}, allowed is 0")
    config = parse_config(data, source=str(path))
    if config.head_dim % 2:
        raise ModelError(
            f"{path}: {kind}.attention.key_length: got {config.head_dim}, expected an even number"
        )
    if get("rope.dimension_count", config.head_dim) != config.head_dim:
        got = get("rope.dimension_count")
        raise ModelError(f"{path}: {kind}.rope.dimension_count: got {got}, allowed is {config.head_dim}")
    return config


def _rope_scaling(kind: object) -> dict[str, object] | None:
    """What ``config.json`` says of positions that are scaled; its own check refuses them."""
    return None if kind == "none" else {"rope_type": kind}


def _shortest(number: Any) -> Any:
    """A float32 as the shortest decimal that means it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(number))) if isinstance(number, float) and math.isfinite(number) else number
