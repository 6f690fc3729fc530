"""Model folders with a tokenizer: what ``unmask serve`` reads."""

import json
import shutil
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers

GOLDEN = Path(__file__).parents[1] / "golden"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def word_tokenizer(vocab_size: int, *, eos: int, mask: int) -> tokenizers.Tokenizer:
    """A word is a token: ``w7`` is token 7. A chat's roles are 1 to 3; ``<eos>``, ``<mask>`` are special."""
    words = [f"w{number}" for number in range(vocab_size)]
    words[1:4] = ["system", "user", "assistant"]
    words[eos], words[mask] = "<eos>", "<mask>"
    tokenizer = tokenizers.Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="w0")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<eos>", "<mask>"])
    return tokenizer


def add_tokenizer(folder: Path, *, chat: bool = True) -> None:
    """Write a word tokenizer that fits the folder's ``config.json``."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    eos, mask = config["eos_token_id"], config["mask_token_id"]
    word_tokenizer(config["vocab_size"], eos=eos, mask=mask).save(str(folder / "tokenizer.json"))
    names: dict[str, Any] = {"eos_token": "<eos>", "mask_token": {"content": "<mask>"}}
    if chat:
        names["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")


def served_folder(
    folder: Path,
    *,
    golden: str = "llada2_a",
    block_length: int = 8,
    threshold: float = 0.9,
    chat: bool = True,
    **defaults: Any,
) -> Path:
    """A copy of a golden model with a tokenizer and decoding defaults, in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDEN / golden / name, folder / name)
    add_tokenizer(folder, chat=chat)
    defaults |= {"block_length": block_length, "threshold": threshold}
    (folder / "generation_config.json").write_text(json.dumps(defaults), encoding="utf-8")
    return folder
