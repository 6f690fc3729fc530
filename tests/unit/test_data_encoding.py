"""Records as tokens: what is given, what is learnt, and what an evaluation accepts."""

import json

import pytest

from support.training import EOS, write_data
from unmask.errors import DataError, ModelError, UsageError
from unmask.models.conversation import tool, tool_call, turn
from unmask.models.tokenizer import Tokenizer
from unmask.training.corpus import Library, Source
from unmask.training.encoding import encode, question
from unmask.training.records import Completion, Messages, Text

USER, ASSISTANT = 2, 3


def tokenizer(folder, *, template=None):
    write_data(folder)
    if template is not None:
        names = {"eos_token": "<eos>", "chat_template": template}
        (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    return Tokenizer.load(folder / "tokenizer")


CHAT = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
TURNS = tuple(
    {"role": role, "content": content}
    for role, content in [("user", "w9"), ("assistant", "w10"), ("user", "w11"), ("assistant", "w12 w13")]
)


def completion(*accepted, prompt="w9 w10"):
    return Completion(prompt=prompt, completion=accepted[0], accepted=accepted, line=1)


def test_text_is_learnt_whole_and_ends_with_the_end_of_text(tmp_path):
    encoded = encode(Text(text="w9 w10", line=1), tokenizer(tmp_path), eos_token_id=EOS)
    assert (encoded.ids, encoded.prompt_length) == ([9, 10, EOS], 0)


def test_a_completion_without_chat_template_follows_the_plain_prompt(tmp_path):
    encoded = encode(completion("w11"), tokenizer(tmp_path), eos_token_id=EOS)
    assert (encoded.ids, encoded.prompt_length) == ([9, 10, 11, EOS], 2)


def test_a_completion_with_chat_template_answers_a_users_turn(tmp_path):
    encoded = encode(completion("w11"), tokenizer(tmp_path, template=CHAT), eos_token_id=EOS)
    assert (encoded.ids, encoded.prompt_length) == ([USER, 9, 10, ASSISTANT, 11, EOS], 4)


def test_only_the_last_turn_of_a_conversation_is_the_answer(tmp_path):
    encoded = encode(Messages(messages=TURNS, line=1), tokenizer(tmp_path, template=CHAT), eos_token_id=EOS)
    assert encoded.ids == [USER, 9, ASSISTANT, 10, USER, 11, ASSISTANT, 12, 13, EOS]
    assert encoded.prompt_length == 7


def test_tools_are_written_before_what_is_learnt(tmp_path):
    calling = (
        "{% for t in tools or [] %}{{ t.name }} {% endfor %}"
        "{% for m in messages %}{{ m.role }} {{ m.content }} "
        "{% for c in m.tool_calls or [] %}{{ c.function.name }} {{ c.function.arguments.x }} {% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    )
    turns = (turn("user", "w9"), turn("assistant", None, tool_calls=[tool_call("w20", {"x": "w21"})]))
    record = Messages(messages=turns, tools=(tool({"name": "w20"}),), line=1)
    encoded = encode(record, tokenizer(tmp_path, template=calling), eos_token_id=EOS)
    assert encoded.ids == [20, USER, 9, ASSISTANT, 20, 21, EOS]
    assert encoded.prompt_length == 4
    every = encode(record, tokenizer(tmp_path, template=calling), eos_token_id=EOS, turns=True)
    assert (every.ids, every.turns) == (encoded.ids, ((4, 7),))
    asked = question(record, tokenizer(tmp_path, template=calling), eos_token_id=EOS)
    assert (asked.prompt, asked.answers) == (encoded.ids[:4], ([20, 21],))


def test_an_end_of_text_that_the_template_wrote_is_not_doubled(tmp_path):
    ending = CHAT.replace(
        "{{ m.content }} ", "{{ m.content }} {% if m.role == 'assistant' %}<eos> {% endif %}"
    )
    encoded = encode(Messages(messages=TURNS, line=1), tokenizer(tmp_path, template=ending), eos_token_id=EOS)
    assert encoded.ids[-3:] == [12, 13, EOS]
    asked = question(Messages(messages=TURNS, line=1), tokenizer(tmp_path, template=ending), eos_token_id=EOS)
    assert asked.answers == ([12, 13],)
    assert asked.prompt == encoded.ids[: encoded.prompt_length]


def test_every_accepted_answer_of_a_question_is_encoded(tmp_path):
    asked = question(completion("w11", "w12 w13"), tokenizer(tmp_path), eos_token_id=EOS)
    assert (asked.prompt, asked.answers) == ([9, 10], ([11], [12, 13]))


def test_a_template_that_rewrites_the_conversation_is_refused(tmp_path):
    rewriting = "{{ messages | length }} {{ messages[-1].content }}"
    with pytest.raises(ModelError, match="does not write a conversation as its beginning plus the answer"):
        encode(Messages(messages=TURNS, line=1), tokenizer(tmp_path, template=rewriting), eos_token_id=EOS)


def test_conversations_need_a_chat_template(tmp_path):
    with pytest.raises(ModelError, match="no chat template"):
        encode(Messages(messages=TURNS, line=1), tokenizer(tmp_path), eos_token_id=EOS)


def test_what_the_tokenizer_refuses_is_named_by_file_and_line(tmp_path):
    library = Library(tokenizer(tmp_path), eos_token_id=EOS)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "w9"}\n{"text": "\\ud800"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=rf"{path}:2: .*lone surrogate"):
        library.corpus([Source(path, "text")], length=8, overlong="Error")
    with pytest.raises(UsageError):
        encode(Text(text="\ud800", line=1), tokenizer(tmp_path), eos_token_id=EOS)
