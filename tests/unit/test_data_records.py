"""Data files: what is read from them, and that whatever is wrong is one line with file and line number."""

import json

import pytest

from support.training import write_lines
from unmask.errors import DataError
from unmask.training.records import Completion, Messages, Text, read_records


def test_a_text_file_is_split_at_blank_lines_and_remembers_where(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\none\ntwo\n\n \n\nthree  \n", encoding="utf-8")
    assert read_records(path, "text") == [Text(text="one\ntwo", line=2), Text(text="three", line=7)]


def test_json_lines_of_text_keep_their_line_numbers_over_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"text": "a", "id": 3}\n\n{"text": "b\u2028c"}\n', encoding="utf-8")
    assert read_records(path, "text") == [Text(text="a", line=1), Text(text="b\u2028c", line=3)]


def test_a_conversation_keeps_roles_and_contents(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}]
    write_lines(tmp_path / "a.jsonl", [{"messages": [turns[0] | {"name": "x"}, turns[1]]}])
    assert read_records(tmp_path / "a.jsonl", "messages") == [Messages(messages=tuple(turns), line=1)]


CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLING = [
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "tool_call_id": "c", "name": "add"},
    {"role": "assistant", "content": "2"},
]
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def test_calls_of_tools_are_kept_in_either_form(tmp_path):
    said = {"name": "add", "arguments": '{"a": 1}'}
    other = [dict(turn) for turn in CALLING]
    other[1] = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": said}]}
    lines = [{"messages": CALLING, "tools": [ADD]}, {"messages": other, "tools": json.dumps([ADD])}]
    write_lines(tmp_path / "a.jsonl", lines)
    for record in read_records(tmp_path / "a.jsonl", "messages"):
        assert (record.messages, record.tools) == (tuple(CALLING), (ADD,))


@pytest.mark.parametrize(
    ("entry", "learnt", "accepted"),
    [
        ({"completion": "a"}, "a", ("a",)),
        ({"completion": "a", "completions": ["b", "a"]}, "a", ("a", "b")),
        ({"completions": ["b", "a"]}, "b", ("b", "a")),
    ],
)
def test_a_completion_may_list_further_answers(tmp_path, entry, learnt, accepted):
    write_lines(tmp_path / "a.jsonl", [{"prompt": "p"} | entry])
    expected = Completion(prompt="p", completion=learnt, accepted=accepted, line=1)
    assert read_records(tmp_path / "a.jsonl", "completion") == [expected]


def broken(path, data_format):
    with pytest.raises(DataError) as caught:
        read_records(path, data_format)
    assert "\n" not in str(caught.value)
    return str(caught.value)


WRONG = [
    ("text", '{"text": ', "not valid JSON"),
    ("text", '{"text": NaN}', '"text" must be a string, got a number'),
    ("text", "[]", "expected a JSON object, got a list"),
    ("text", "null", "expected a JSON object, got nothing"),
    ("text", "{}", '"text" must be a string, got nothing'),
    ("text", '{"text": ""}', '"text" is empty'),
    ("text", "[" * 100_000, "not valid JSON"),
    ("messages", '{"messages": []}', "at least one turn"),
    ("messages", '{"messages": "hi"}', "got a string"),
    ("messages", '{"messages": ["hi"]}', '"messages"[0] must be an object'),
    ("messages", '{"messages": [{"role": "bot", "content": ""}]}', "one of system, user, assistant, tool"),
    ("messages", '{"messages": [{"role": "user", "content": 3}]}', "content must be a string, got a number"),
    ("messages", '{"messages": [{"role": "user", "content": "a"}]}', "the last turn must be the assistant's"),
    ("messages", '{"messages": [{"role": "assistant"}]}', "content must be a string, got nothing"),
    ("messages", '{"messages": [{"role": "assistant", "tool_calls": 3}]}', "tool_calls must be a list"),
    (
        "messages",
        '{"messages": [{"role": "assistant", "tool_calls": [{}]}]}',
        "tool_calls[0] must be an object",
    ),
    (
        "messages",
        '{"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "["}]}]}',
        '"messages"[0].tool_calls[0]: arguments must be a JSON object',
    ),
    ("messages", '{"messages": [{"role": "tool", "content": "", "name": 3}]}', "name must be a string"),
    (
        "messages",
        '{"messages": [{"role": "assistant", "content": ""}], "tools": "[3]"}',
        '"tools" must be a list of JSON objects',
    ),
    ("completion", '{"completion": "a"}', '"prompt" must be a string'),
    ("completion", '{"prompt": "", "completion": "a"}', '"prompt" is empty'),
    ("completion", '{"prompt": "a"}', '"completion" must be a string, got nothing'),
    ("completion", '{"prompt": "a", "completion": true}', "got a boolean"),
    ("completion", '{"prompt": "a", "completions": "b"}', '"completions" must be a list'),
    ("completion", '{"prompt": "a", "completions": [""]}', '"completions" must be a list'),
]


@pytest.mark.parametrize(("data_format", "line", "words"), WRONG)
def test_a_malformed_line_is_named_with_what_is_wrong(tmp_path, data_format, line, words):
    good = {
        "text": {"text": "a"},
        "messages": {"messages": [{"role": "assistant", "content": "a"}]},
        "completion": {"prompt": "a", "completion": "b"},
    }[data_format]
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(good)}\n{line}\n", encoding="utf-8")
    message = broken(path, data_format)
    assert message.startswith(f"{path}:2: ")
    assert words in message


def test_a_missing_file_an_empty_file_and_a_folder_are_named(tmp_path):
    assert "no such file" in broken(tmp_path / "a.jsonl", "text")
    (tmp_path / "a.jsonl").write_text("\n \n", encoding="utf-8")
    assert "holds no documents" in broken(tmp_path / "a.jsonl", "text")
    (tmp_path / "a.txt").touch()
    assert "holds no documents" in broken(tmp_path / "a.txt", "text")
    (tmp_path / "empty").mkdir()
    assert "holds no data files; known are .jsonl" in broken(tmp_path / "empty", "text")


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    assert broken(tmp_path / "a.jsonl", "text").startswith(f"{tmp_path / 'a.jsonl'}:2: not UTF-8")


def test_a_text_file_cannot_hold_completions(tmp_path):
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    assert "write it as .jsonl" in broken(tmp_path / "a.txt", "completion")
