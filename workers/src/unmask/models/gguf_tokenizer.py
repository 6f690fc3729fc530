r"""The tokenizer that a GGUF file carries, as the files of a published checkpoint.

Only byte-level BPE is rebuilt ("gpt2" in the file): tokens, merges, and how text is cut
before them, which llama.cpp knows by a name. A wrong cut gives a model other tokens than it
was trained on, and nothing would show it but poor text; so an unknown name is refused.
No torch is needed here.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from gguf.constants import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from unmask.errors import ModelError
from unmask.models.tokenizer import CONFIG_FILE, TOKENIZER_FILE

__all__ = ["tokenizer_files"]

_ROLES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}


def _split(digits: str) -> pre_tokenizers.PreTokenizer:
    """The cut of Llama 3 and of Qwen, which differ in how many ``digits`` stay together."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_CUTS: Mapping[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": lambda: _split(r"\p{N}{1,3}"),
    "qwen2": lambda: _split(r"\p{N}"),
}
"""``tokenizer.ggml.pre`` -> how text is cut into pieces that no merge crosses."""
_WHOLE_WORDS = {"llama-bpe"}
"""Where a piece that is a token as a whole needs no merges."""


def tokenizer_files(metadata: Mapping[str, Any], *, source: str) -> dict[str, bytes]:
    """``tokenizer.json``, ``tokenizer_config.json`` and ``generation_config.json``, by name.

    Raises:
        ModelError: Naming ``source``, if the tokenizer is of another kind, cuts text in a way that is not
            known, or is not whole.
    """
    kind, cut = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise ModelError(
            f"{source}: tokenizer.ggml.model: got {ascii(kind)}, allowed is 'gpt2' (byte-level BPE)"
        )
    if cut not in _CUTS:
        known = ", ".join(_CUTS)
        raise ModelError(f"{source}: tokenizer.ggml.pre: got {ascii(cut)}, known are {known}")
    try:
        tokenizer = _build(metadata, str(cut))
        tokens: list[str] = metadata["tokenizer.ggml.tokens"]
        ids = {name: metadata.get(f"tokenizer.ggml.{role}_token_id") for name, role in _ROLES.items()}
        roles = {name: tokens[number] for name, number in ids.items() if number is not None}
    except Exception as error:  # the library raises bare Exception for whatever does not fit together
        raise ModelError(f"{source}: the tokenizer is not whole: {type(error).__name__}: {error}") from error
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **roles}
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    generation = {name.replace("_token", "_token_id"): ids[name] for name in roles if name != "unk_token"}
    return {
        TOKENIZER_FILE: tokenizer.to_str(pretty=True).encode(),
        CONFIG_FILE: _json(config),
        "generation_config.json": _json(generation),
    }


def _build(metadata: Mapping[str, Any], cut: str) -> Tokenizer:
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocab = {token: number for number, token in enumerate(tokens)}
    if len(vocab) < len(tokens) or len(types) != len(tokens):
        raise ValueError(f"{len(tokens)} tokens, {len(vocab)} different ones, {len(types)} types")
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=cut in _WHOLE_WORDS))
    tokenizer.pre_tokenizer = _CUTS[cut]()
    tokenizer.decoder = decoders.ByteLevel()
    added = (TokenType.CONTROL, TokenType.USER_DEFINED)
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == TokenType.CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in added
        ]
    )
    return tokenizer


def _json(content: object) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
