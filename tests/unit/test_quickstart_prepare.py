"""The quickstart's data: split by word, the same every time, and a tokenizer that loses nothing."""

import json
import re
from pathlib import Path

import pytest
import yaml

from support.quickstart import EXAMPLE, load_module
from unmask.models.tokenizer import Tokenizer

prepare = load_module("prepare")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    prepare.prepare(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder / "tokenizer")


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_no_word_is_both_learnt_and_held_out(folder):
    learnt = {one["prompt"] for one in records(folder / "train.jsonl")}
    held_out = {one["prompt"] for one in records(folder / "validation.jsonl")}
    assert not learnt & held_out
    assert len(learnt) > 100_000
    assert len(held_out) > 2_000


def test_a_word_is_held_out_or_not_whatever_else_the_dictionary_holds():
    assert prepare.is_held_out("descended")
    assert not prepare.is_held_out("abandon")


def test_every_listed_pronunciation_of_a_held_out_word_counts_once(folder):
    found = {one["prompt"]: one["completions"] for one in records(folder / "validation.jsonl")}
    assert found["descended"] == ["D IH0 S EH1 N D AH0 D", "D IH0 S EH1 N D IH0 D"]
    assert all(len(said) == len(set(said)) for said in found.values())


def test_validation_words_are_not_in_the_order_of_the_alphabet(folder):
    first = [one["prompt"] for one in records(folder / "validation.jsonl")[:100]]
    assert len({word[0] for word in first}) > 10


def test_the_files_are_the_same_every_time(folder, tmp_path):
    prepare.prepare(tmp_path)
    for path in (path for path in folder.rglob("*") if path.is_file()):
        assert path.read_bytes() == (tmp_path / path.relative_to(folder)).read_bytes()


def test_every_document_is_one_token_per_letter_and_phoneme_and_comes_back_as_it_was(folder, tokenizer):
    for one in records(folder / "validation.jsonl"):
        spelt, said = tokenizer.encode(one["prompt"]), tokenizer.encode(one["completions"][0])
        assert len(spelt) == len(one["prompt"])
        assert len(said) == len(one["completions"][0].split())
        assert tokenizer.decode(spelt).replace(" ", "") == one["prompt"]
        assert tokenizer.decode(said) == one["completions"][0]


def test_a_greeting_is_decoded_as_phonemes_with_spaces(tokenizer):
    ids = [*tokenizer.encode("HH AH0 L OW1"), tokenizer.eos_token_id]
    assert tokenizer.decode(ids) == "HH AH0 L OW1"


def test_a_users_turn_becomes_letters_and_the_token_that_ends_a_prompt(tokenizer):
    text = tokenizer.render_chat([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    assert text == "hello<|say|>"
    assert len(tokenizer.encode(text)) == 6


def test_an_assistants_turn_ends_with_the_end_of_text(tokenizer):
    turns = [{"role": "user", "content": "at"}, {"role": "assistant", "content": "AE1 T"}]
    ids = tokenizer.encode(tokenizer.render_chat(turns, add_generation_prompt=False))
    assert ids[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id
    assert len(ids) == 6


@pytest.mark.parametrize("name", ["quickstart.yaml", "quickstart-small.yaml"])
def test_the_manifests_model_has_the_tokenizers_vocabulary(tokenizer, name):
    config = yaml.safe_load((EXAMPLE / name).read_text())["spec"]["model"]["init"]["config"]
    assert config["vocab_size"] == tokenizer.vocab_size
    assert config["mask_token_id"] == tokenizer.mask_token_id
    assert config["eos_token_id"] == config["pad_token_id"] == tokenizer.eos_token_id


def test_both_manifests_have_the_same_stages_and_model_family():
    full, small = (
        yaml.safe_load((EXAMPLE / name).read_text())["spec"]
        for name in ("quickstart.yaml", "quickstart-small.yaml")
    )
    fields = ("name", "objective", "convertTo", "blockSizes")
    shapes = [[[one.get(field) for field in fields] for one in spec["stages"]] for spec in (full, small)]
    assert shapes[0] == shapes[1]
    assert full["model"]["init"]["config"].keys() == small["model"]["init"]["config"].keys()


def test_the_letters_of_the_dictionary_are_those_of_the_tokenizer(tokenizer):
    assert all(re.fullmatch(f"[{prepare.LETTERS}]+", word) for word in prepare.pronunciations())
