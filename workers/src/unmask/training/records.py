"""Data files as typed records: text, conversations, prompts with their completions, and preferences.

A ``.jsonl`` file has one JSON object per line; blank lines are ignored, and so are keys
that are not named here. A ``.txt`` file, which only format ``text`` knows, holds
documents that blank lines separate.

* ``text``: ``{"text": "..."}``
* ``messages``: ``{"messages": [{"role": "user", "content": "..."}, ...]}``, ending with the assistant
* ``completion``: ``{"prompt": "...", "completion": "..."}``; ``"completions": [...]`` lists answers
  that an evaluation accepts as well (or instead: the first one is then what is learnt)
* ``preference``: ``{"prompt": "...", "chosen": "...", "rejected": "..."}``; ``"messages"``, a conversation
  up to the answer, may stand in place of the prompt

Everything that can be wrong with a file is one :class:`~unmask.errors.DataError` that
names the file and the line.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from unmask.errors import DataError

__all__ = ["Completion", "Document", "Format", "Messages", "Preference", "Record", "Text", "read_records"]

Format: TypeAlias = Literal["text", "messages", "completion", "preference"]

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Located:
    line: int
    """Of the file, from 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text(_Located):
    """Plain text: all of it is learnt."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Messages(_Located):
    """A conversation; its last turn, the assistant's, is the answer."""

    messages: tuple[Mapping[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion(_Located):
    """A prompt, the answer to learn, and every answer that counts as right."""

    prompt: str
    completion: str
    accepted: tuple[str, ...]
    """Includes ``completion``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference(_Located):
    """A prompt, or the conversation up to the answer, with the better and the worse of two answers."""

    prompt: str | tuple[Mapping[str, str], ...]
    chosen: str
    rejected: str


Document: TypeAlias = Text | Messages | Completion
Record: TypeAlias = Document | Preference


def read_records(path: Path, format: Format) -> list[Record]:  # noqa: A002  (the manifest's word)
    """Read all of ``path``.

    Raises:
        DataError: The file is missing, empty, not UTF-8, or a line of it is not what ``format`` says.
    """
    content = _read_text(path)
    if path.suffix == ".txt":
        if format != "text":
            raise DataError(f"{path}: a .txt file is of format text, got {format}; write it as .jsonl")
        records: list[Record] = list(_paragraphs(content))
    else:
        records = list(_json_lines(path, content, _PARSERS[format]))
    if not records:
        raise DataError(f"{path}: holds no documents; a data file needs at least one")
    return records


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; correct the uri in data") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 ({error.reason}); convert the file") from None


def _paragraphs(content: str) -> Iterator[Text]:
    for match in re.finditer(r"\S(?:.|\n(?!\s*\n))*", content):
        yield Text(text=match.group().rstrip(), line=content.count("\n", 0, match.start()) + 1)


def _json_lines(
    path: Path, content: str, parse: Callable[[Mapping[str, Any], int], Record]
) -> Iterator[Record]:
    # Not splitlines(): that also splits at characters which JSON strings may hold.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not valid JSON: {error}") from None
        if not isinstance(entry, dict):
            raise DataError(f"{path}:{number}: expected a JSON object, got {_kind(entry)}")
        try:
            yield parse(entry, number)
        except _Malformed as error:
            raise DataError(f"{path}:{number}: {error}") from None


class _Malformed(Exception):
    """What is wrong with one object; becomes a DataError once file and line are known."""


def _text(entry: Mapping[str, Any], line: int) -> Text:
    return Text(text=_string(entry, "text"), line=line)


def _messages(entry: Mapping[str, Any], line: int) -> Messages:
    messages = _turns(entry)
    if messages[-1]["role"] != "assistant":
        raise _Malformed(
            f"the last turn must be the assistant's, for it is what is learnt; got {messages[-1]['role']}"
        )
    return Messages(messages=messages, line=line)


def _turns(entry: Mapping[str, Any]) -> tuple[Mapping[str, str], ...]:
    turns = entry.get("messages")
    if not isinstance(turns, list) or not turns:
        raise _Malformed(f'"messages" must be a list with at least one turn, got {_kind(turns)}')
    return tuple(_turn(turn, place) for place, turn in enumerate(turns))


def _turn(turn: object, place: int) -> Mapping[str, str]:
    if not isinstance(turn, dict):
        raise _Malformed(f'"messages"[{place}] must be an object with role and content, got {_kind(turn)}')
    if turn.get("role") not in ROLES:
        raise _Malformed(
            f'"messages"[{place}].role must be one of {", ".join(ROLES)}, got {turn.get("role")!r}'
        )
    if not isinstance(turn.get("content"), str):
        raise _Malformed(f'"messages"[{place}].content must be a string, got {_kind(turn.get("content"))}')
    return {"role": turn["role"], "content": turn["content"]}


def _completion(entry: Mapping[str, Any], line: int) -> Completion:
    prompt = _string(entry, "prompt")
    accepted = entry.get("completions", [])
    if not isinstance(accepted, list) or not all(isinstance(one, str) and one for one in accepted):
        raise _Malformed('"completions" must be a list of strings that are not empty')
    if "completion" in entry or not accepted:
        completion = _string(entry, "completion")
    else:
        completion = accepted[0]
    unique = dict.fromkeys([completion, *accepted])
    return Completion(prompt=prompt, completion=completion, accepted=tuple(unique), line=line)


def _preference(entry: Mapping[str, Any], line: int) -> Preference:
    prompt: str | tuple[Mapping[str, str], ...]
    if "messages" in entry:
        if "prompt" in entry:
            raise _Malformed('"prompt" and "messages" are both there; keep one of them')
        prompt = _turns(entry)
        if prompt[-1]["role"] == "assistant":
            raise _Malformed(
                'the last turn is an answer already, but the answers are "chosen" and "rejected"; drop it'
            )
    else:
        prompt = _string(entry, "prompt")
    chosen, rejected = _string(entry, "chosen"), _string(entry, "rejected")
    if chosen == rejected:
        raise _Malformed('"chosen" and "rejected" are the same answer, which prefers nothing; drop the line')
    return Preference(prompt=prompt, chosen=chosen, rejected=rejected, line=line)


def _string(entry: Mapping[str, Any], key: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str):
        raise _Malformed(f'"{key}" must be a string, got {_kind(value)}')
    if not value:
        raise _Malformed(f'"{key}" is empty; drop the line or fill it in')
    return value


def _kind(value: object) -> str:
    """The JSON type of ``value``, in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "nothing"}
    return names.get(type(value), "a number")


_PARSERS: Mapping[Format, Callable[[Mapping[str, Any], int], Record]] = {
    "text": _text,
    "messages": _messages,
    "completion": _completion,
    "preference": _preference,
}
