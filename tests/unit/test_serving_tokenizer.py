"""Text to tokens and back, and conversations to text."""

import json
from pathlib import Path

import pytest

from support.folders import served_folder, word_tokenizer
from unmask.errors import ModelError, UsageError
from unmask.models.conversation import tool, tool_call, turn
from unmask.models.tokenizer import Tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return served_folder(tmp_path / "tiny")


def configure(folder: Path, **keys: object) -> Tokenizer:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | keys), encoding="utf-8")
    return Tokenizer.load(folder)


TURN = [{"role": "user", "content": "w5"}]


def test_text_becomes_its_tokens_and_nothing_else(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("w5 w6") == [5, 6]
    assert tokenizer.encode("") == []
    assert tokenizer.decode([5, 510, 6]) == "w5 w6"
    assert tokenizer.decode([5, 510, 6], skip_special_tokens=False) == "w5 <eos> w6"
    assert tokenizer.vocab_size == 512


def test_a_special_token_s_text_is_that_token(folder: Path) -> None:
    assert Tokenizer.load(folder).encode("w5 <mask> w6") == [5, 511, 6]


def test_special_tokens_are_named_as_text_or_as_an_object(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.eos_token_id, tokenizer.mask_token_id) == (510, 511)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id) == (None, None)


def test_truncation_and_padding_that_the_file_asks_for_are_left_out(folder: Path) -> None:
    backend = word_tokenizer(512, eos=510, mask=511)
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.save(str(folder / "tokenizer.json"))
    assert Tokenizer.load(folder).encode("w5 w6 w7") == [5, 6, 7]


def test_a_conversation_is_rendered_with_and_without_the_opening_of_an_answer(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.has_chat_template
    assert tokenizer.render_chat(TURN, add_generation_prompt=True) == "user w5 assistant"
    assert tokenizer.render_chat(TURN, add_generation_prompt=False) == "user w5 "


def test_a_template_in_its_own_file_wins(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("own {{ eos_token }}", encoding="utf-8")
    assert Tokenizer.load(folder).render_chat(TURN, add_generation_prompt=True) == "own <eos>"


def test_of_several_templates_the_default_is_used(folder: Path) -> None:
    templates = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert configure(folder, chat_template=templates).render_chat(TURN, add_generation_prompt=True) == "d"


def test_json_in_a_template_is_not_escaped_for_html(folder: Path) -> None:
    tokenizer = configure(folder, chat_template="{{ messages[0].content | tojson }}")
    turn = [{"role": "user", "content": "<a> & \N{EURO SIGN}"}]
    assert tokenizer.render_chat(turn, add_generation_prompt=False) == '"<a> & \N{EURO SIGN}"'


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''['__cla' ~ 'ss__'] | list }}",
        "{{ (messages | attr('__in' ~ 'it__'))() }}",
        "{{ messages.append(1) }}",
        "{% for x in range(10**9) %}{% endfor %}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content + 1 }}",
    ],
)
def test_a_template_that_goes_too_far_or_refuses_is_an_error_of_the_call(folder: Path, template: str) -> None:
    tokenizer = configure(folder, chat_template=template)
    with pytest.raises(UsageError, match="the chat template refuses the messages"):
        tokenizer.render_chat(TURN, add_generation_prompt=True)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__'] }}",
        "{{ messages | attr('__class__') }}",
        "{{ messages | map(attribute='__class__') | list }}",
        "{% if messages | length > 9 %}{{ cycler.__init__.__globals__ }}{% endif %}",
        "{% macro f() %}{{ self.__init__ }}{% endmacro %}",
    ],
)
def test_a_template_that_asks_for_pythons_inner_attributes_is_refused_unrun(
    folder: Path, template: str
) -> None:
    with pytest.raises(ModelError, match="the chat template tries to run other code: line 1 asks for '__"):
        configure(folder, chat_template=template)


def test_a_template_nested_without_end_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="chat template"):
        configure(folder, chat_template="{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}")


def test_files_that_became_links_to_outside_are_not_copied(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}", encoding="utf-8")
    (folder / "special_tokens_map.json").symlink_to(tmp_path / "secret")
    tokenizer = Tokenizer.load(folder)
    with pytest.raises(ModelError, match="is a link to outside the folder"):
        tokenizer.contents(mask_token_id=None)
    (tmp_path / "copy").mkdir()
    with pytest.raises(ModelError, match="is a link to outside the folder"):
        tokenizer.save(tmp_path / "copy")


TOOLS = (
    "{% for t in tools or [] %}tool {{ t | tojson }} {% endfor %}"
    "{% for m in messages %}{{ m.role }} {{ m.content }} "
    "{% for c in m.tool_calls or [] %}{{ c.id }} {{ c.function.name }} "
    "{{ c.function.arguments | tojson }} {% endfor %}{{ m.tool_call_id }} {{ m.name }} {% endfor %}"
)


def test_calls_of_tools_and_what_they_return_reach_the_template(folder: Path) -> None:
    turns = [
        turn("user", "1 + 1?"),
        turn("assistant", None, tool_calls=[tool_call("add", '{"b": 1, "a": 1}', call_id="c1")]),
        turn("tool", "2", tool_call_id="c1", name="add"),
    ]
    tokenizer = configure(folder, chat_template=TOOLS)
    text = tokenizer.render_chat(turns, add_generation_prompt=True, tools=[tool('{"name": "add"}')])
    assert text.split() == (
        'tool {"name": "add"} user 1 + 1? assistant c1 add {"b": 1, "a": 1} tool 2 c1 add'.split()
    )
    assert "tools" not in tokenizer.render_chat(turns[:1], add_generation_prompt=True)


def test_a_template_cannot_change_the_callers_messages(folder: Path) -> None:
    turn = [{"role": "user", "content": "w5"}]
    tokenizer = configure(folder, chat_template="{% set _ = messages[0].update({'content': 'x'}) %}")
    with pytest.raises(UsageError):
        tokenizer.render_chat(turn, add_generation_prompt=True)
    assert turn == TURN


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"chat_template": "{% for %}"}, "the chat template, line 1"),
        ({"chat_template": 3}, "chat_template must be a string, got int"),
        ({"eos_token": "<end>"}, "eos_token is '<end>', which tokenizer.json lacks"),
        ({"eos_token": 5}, "eos_token must be a string, got int"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    folder: Path, keys: dict[str, object], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        configure(folder, **keys)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_is_not_json_is_named(folder: Path, name: str) -> None:
    (folder / name).write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match=name):
        Tokenizer.load(folder)


def test_without_a_template_text_still_works(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(served_folder(tmp_path / "tiny", chat=False))
    assert not tokenizer.has_chat_template
    with pytest.raises(ModelError, match="no chat template"):
        tokenizer.render_chat(TURN, add_generation_prompt=True)


def test_a_lone_surrogate_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="lone surrogate at character 2"):
        Tokenizer.load(folder).encode("w5\ud800")


def test_saving_copies_every_file_as_it_is(folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").write_text("own", encoding="utf-8")
    copy = tmp_path / "copy"
    copy.mkdir()
    tokenizer = Tokenizer.load(folder)
    tokenizer.save(copy)
    assert sorted(path.name for path in copy.iterdir()) == sorted(path.name for path in tokenizer.files)
    for path in tokenizer.files:
        assert (copy / path.name).read_bytes() == path.read_bytes()
