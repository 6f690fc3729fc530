"""Data files as typed records: text, conversations, prompts with their completions, preferences, and tokens.

A ``.jsonl`` file has one JSON object per line; blank lines are ignored, and so are keys
that are not named here. A ``.parquet`` file has columns of the same names. A ``.txt`` file, which only
format ``text`` knows, holds documents that blank lines separate.

* ``text``: ``{"text": "..."}``
* ``messages``: ``{"messages": [{"role": "user", "content": "..."}, ...]}``, ending with the assistant; a
  turn may have ``"tool_calls"``, one of role ``tool`` a ``"tool_call_id"`` and a ``"name"``, and ``"tools"``
  beside the messages lists the functions that may be called
* ``completion``: ``{"prompt": "...", "completion": "..."}``, or ``response`` in place of ``completion``;
  ``"completions": [...]`` lists answers that an evaluation accepts as well (or instead: the first one is
  then what is learnt)
* ``preference``: ``{"prompt": "...", "chosen": "...", "rejected": "..."}``; ``"messages"``, a conversation
  up to the answer, may stand in place of the prompt
* ``tokens``: ``{"input_ids": [...]}``, with ``"loss_mask": [...]`` of 1 for what is learnt and 0 for what is
  given, or ``"labels": [...]`` of the same tokens with -100 for what is given, or neither

Everything that can be wrong with a file is one :class:`~unmask.errors.DataError` that
names the file, the line (of a table, the row) and the field.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from unmask.errors import DataError
from unmask.models.conversation import Tool, Turn, tool, tool_call, turn
from unmask.training.sources import DataFile, Location, data_files, entry_rows, lines

__all__ = [
    "Completion",
    "Document",
    "Format",
    "Messages",
    "Preference",
    "Record",
    "Text",
    "Tokens",
    "read_records",
    "records_of",
]

Format: TypeAlias = Literal["text", "messages", "completion", "preference", "tokens"]

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Located:
    line: int
    """Of the file, from 1; of a table, the row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text(_Located):
    """Plain text: all of it is learnt."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Messages(_Located):
    """A conversation; its last turn, the assistant's, is the answer."""

    messages: tuple[Turn, ...]
    tools: tuple[Tool, ...] = ()
    """Functions that may be called."""


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

    prompt: str | tuple[Turn, ...]
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens(_Located):
    """A document that is tokens already."""

    ids: tuple[int, ...]
    learnt: tuple[bool, ...] | None = None
    """For each token; None: all are."""


Document: TypeAlias = Text | Messages | Completion | Tokens
Record: TypeAlias = Document | Preference


def read_records(location: Location, format: Format) -> list[Record]:  # noqa: A002  (the manifest's word)
    """Read all of ``location``.

    Raises:
        DataError: The file is missing, empty, not UTF-8, or a line of it is not what ``format`` says.
    """
    records = [record for file in data_files(location) for record in records_of(file, format)]
    if not records:
        raise DataError(f"{location}: holds no documents; a data file needs at least one")
    return records


def records_of(file: DataFile, format: Format) -> Iterator[Record]:  # noqa: A002
    """The records of one file, read as they are asked for; none is no error here.

    Raises:
        DataError: As :func:`read_records`.
    """
    if file.kind == "paragraphs":
        if format != "text":
            raise DataError(f"{file.uri}: a .txt file is of format text, got {format}; write it as .jsonl")
        yield from _paragraphs(lines(file))
        return
    parse = _PARSERS[format]
    entries = entry_rows(file, _COLUMNS[format]) if file.kind == "table" else _json_lines(file)
    for number, entry in entries:
        try:
            yield parse(entry, number)
        except _Malformed as error:
            raise DataError(f"{file.place(number)}: {error}") from None


def _paragraphs(numbered: Iterator[tuple[int, str]]) -> Iterator[Text]:
    paragraph: list[str] = []
    first = 0
    for number, line in numbered:
        if line.strip():
            first = first if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield Text(text="\n".join(paragraph).strip(), line=first)
            paragraph = []
    if paragraph:
        yield Text(text="\n".join(paragraph).strip(), line=first)


def _json_lines(file: DataFile) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in lines(file):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file.place(number)}: not valid JSON: {error}") from None
        if not isinstance(entry, dict):
            raise DataError(f"{file.place(number)}: expected a JSON object, got {_kind(entry)}")
        yield number, entry


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
    return Messages(messages=messages, tools=_tools(entry), line=line)


def _tools(entry: Mapping[str, Any]) -> tuple[Tool, ...]:
    """A list of objects, or that as JSON text: a table's column has one shape in all rows, tools have not."""
    tools = entry.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
        if tools is None:
            return ()
        if not isinstance(tools, list) or not all(isinstance(one, dict | str) for one in tools):
            raise ValueError(f"got {_kind(tools)}")
        return tuple(tool(one) for one in tools)
    except (ValueError, RecursionError) as error:
        raise _Malformed(f'"tools" must be a list of JSON objects: {error}') from None


def _turns(entry: Mapping[str, Any]) -> tuple[Turn, ...]:
    turns = entry.get("messages")
    if not isinstance(turns, list) or not turns:
        raise _Malformed(f'"messages" must be a list with at least one turn, got {_kind(turns)}')
    return tuple(_turn(one, f'"messages"[{place}]') for place, one in enumerate(turns))


def _turn(entry: object, place: str) -> Turn:
    if not isinstance(entry, dict):
        raise _Malformed(f"{place} must be an object with role and content, got {_kind(entry)}")
    role, content = entry.get("role"), entry.get("content")
    if role not in ROLES:
        raise _Malformed(f"{place}.role must be one of {', '.join(ROLES)}, got {role!r}")
    calls = _tool_calls(entry.get("tool_calls"), place) if role == "assistant" else ()
    if not isinstance(content, str) and not (content is None and calls):
        raise _Malformed(f"{place}.content must be a string, got {_kind(content)}")
    answered = {}
    for key in ("tool_call_id", "name") if role == "tool" else ():
        if not isinstance(entry.get(key), str | None):
            raise _Malformed(f"{place}.{key} must be a string, got {_kind(entry[key])}")
        answered[key] = entry.get(key)
    return turn(role, content, tool_calls=calls, **answered)


def _tool_calls(calls: object, place: str) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(calls, list | None):
        raise _Malformed(f"{place}.tool_calls must be a list, got {_kind(calls)}")
    found = []
    for number, call in enumerate(calls or ()):
        at = f"{place}.tool_calls[{number}]"
        function = call.get("function", call) if isinstance(call, dict) else None
        match function:
            case {"name": str(name), "arguments": str() | dict() as arguments}:
                call_id = call.get("id")
            case _:
                raise _Malformed(f"{at} must be an object whose function has a name and arguments")
        try:
            found.append(tool_call(name, arguments, call_id=call_id if isinstance(call_id, str) else None))
        except ValueError as error:
            raise _Malformed(f"{at}: arguments must be a JSON object: {error}") from None
    return tuple(found)


def _completion(entry: Mapping[str, Any], line: int) -> Completion:
    prompt = _string(entry, "prompt")
    accepted = entry.get("completions")
    accepted = [] if accepted is None else accepted
    if not isinstance(accepted, list) or not all(isinstance(one, str) and one for one in accepted):
        raise _Malformed('"completions" must be a list of strings that are not empty')
    key = (
        "response" if entry.get("completion") is None and entry.get("response") is not None else "completion"
    )
    if entry.get(key) is not None or not accepted:
        completion = _string(entry, key)
    else:
        completion = accepted[0]
    unique = dict.fromkeys([completion, *accepted])
    return Completion(prompt=prompt, completion=completion, accepted=tuple(unique), line=line)


def _preference(entry: Mapping[str, Any], line: int) -> Preference:
    prompt: str | tuple[Turn, ...]
    if entry.get("messages") is not None:
        if entry.get("prompt") is not None:
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


def _tokens(entry: Mapping[str, Any], line: int) -> Tokens:
    ids = _whole_numbers(entry, "input_ids", least=0)
    if not ids:
        raise _Malformed('"input_ids" is empty; drop the line or fill it in')
    learnt = None
    if entry.get("loss_mask") is not None:
        mask = _whole_numbers(entry, "loss_mask", least=0)
        if max(mask, default=0) > 1:
            raise _Malformed('"loss_mask" must hold 1 for what is learnt and 0 for what is given')
        learnt = tuple(bool(one) for one in mask)
    elif entry.get("labels") is not None:
        labels = _whole_numbers(entry, "labels", least=-100)
        learnt = tuple(label != -100 for label in labels)
        if len(labels) == len(ids):
            for place, (label, token) in enumerate(zip(labels, ids, strict=True)):
                if label not in (-100, token):
                    raise _Malformed(
                        f'"labels"[{place}] is {label}, but "input_ids"[{place}] is {token}: labels must be '
                        "the same tokens, not shifted, or -100 for what is given"
                    )
    if learnt is not None and len(learnt) != len(ids):
        name = "loss_mask" if entry.get("loss_mask") is not None else "labels"
        raise _Malformed(f'"{name}" has {len(learnt)} entries, "input_ids" {len(ids)}; they must be as many')
    if learnt is not None and not any(learnt):
        raise _Malformed("no token of the document is learnt; drop the line")
    return Tokens(ids=ids, learnt=learnt, line=line)


def _whole_numbers(entry: Mapping[str, Any], key: str, *, least: int) -> tuple[int, ...]:
    values = entry.get(key)
    if not isinstance(values, list):
        raise _Malformed(f'"{key}" must be a list of whole numbers, got {_kind(values)}')
    for place, value in enumerate(values):
        if not isinstance(value, int) or (isinstance(value, bool) and key != "loss_mask") or value < least:
            raise _Malformed(
                f'"{key}"[{place}] must be a whole number of at least {least}, '
                f"got {value if isinstance(value, int | float) else _kind(value)}"
            )
    return tuple(values)


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
    "tokens": _tokens,
}
_COLUMNS: Mapping[Format, tuple[str, ...]] = {
    "text": ("text",),
    "messages": ("messages", "tools"),
    "completion": ("prompt", "completion", "response", "completions"),
    "preference": ("prompt", "messages", "chosen", "rejected"),
    "tokens": ("input_ids", "loss_mask", "labels"),
}
"""Of a table; it needs one of them, and a row without the others says what it lacks."""
