"""The SmolLM2 example: what is made of the packages' files, and a manifest that fits them."""

import base64
import gzip
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml

from unmask_api.train_job import DiffusionTrainJob

EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2"


@pytest.fixture(scope="module")
def prepare():
    spec = importlib.util.spec_from_file_location("smollm2_prepare", EXAMPLE / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


ENTRIES = {
    "gadget": "gadget\n\n   <tool, jargon> A small {device (http://example.org/)} that does __one__ thing\n"
    "   and does it well, unlike a {gizmo}.\n\n   It is older than it looks.\n\n   (1995-02-08)\n\n",
    "gizmo": "gizmo\n\n   {gadget}\n\n",
    "00-database-info": "00-database-info\n\n   About this dictionary, at some length, so that it would do. "
    * 2,
}


def dictd_number(number: int) -> str:
    """As an index has it: base 64, without leading zeros."""
    text = base64.b64encode(number.to_bytes(6, "big")).decode()
    return text.lstrip("A") or "A"


@pytest.fixture
def foldoc(tmp_path):
    content, index = b"", []
    for word, entry in ENTRIES.items():
        index.append("\t".join((word, dictd_number(len(content)), dictd_number(len(entry)))))
        content += entry.encode()
    (tmp_path / "foldoc.dict.dz").write_bytes(gzip.compress(content))
    (tmp_path / "foldoc.index").write_text("\n".join([*index, index[0].replace("gadget", "gadgets")]))
    return tmp_path


def test_an_entry_loses_its_markup_and_one_that_only_refers_is_left_out(prepare, foldoc):
    [entry] = prepare.entries(foldoc)
    assert entry.headword == "gadget"
    assert entry.text == (
        "A small device that does one thing and does it well, unlike a gizmo.\n\nIt is older than it looks."
    )


def test_a_first_paragraph_of_the_right_length_answers_a_question(prepare):
    right, short = "A thing. " * 12, "A thing."
    assert prepare.Entry("x", f"{right}\n\nMore.").answer == right
    assert prepare.Entry("x", f"{short}\n\n{right}").answer == ""
    assert "gadget" in prepare.question(prepare.Entry("gadget", right))


def test_what_is_held_out_depends_on_the_words_alone(prepare):
    keys = [f"entry {number}" for number in range(2000)]
    held_out = {key for key in keys if prepare.is_held_out(key)}
    assert 60 < len(held_out) < 140
    assert {key for key in keys if prepare.is_held_out(f"  {key.upper()} ")} == held_out


@pytest.fixture
def chatterbot_corpus(tmp_path, monkeypatch):
    """A package with the shape of chatterbot-corpus."""
    folder = tmp_path / "chatterbot_corpus"
    (folder / "data" / "english").mkdir(parents=True)
    (folder / "__init__.py").touch()
    conversations = [["Hi", "Hello  you"], ["Hi", "Hello  you"], ["a", "b", "c", "d", "e"], ["three?", 3]]
    text = yaml.safe_dump({"conversations": conversations})
    (folder / "data" / "english" / "greetings.yml").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("chatterbot_corpus")
def test_conversations_are_cut_behind_each_answer_and_are_there_once(prepare):
    assert list(prepare.dialogues()) == [["Hi", "Hello  you"], ["a", "b"], ["a", "b", "c", "d"]]
    assert prepare.exchange(["Hi", "Hello  you"]) == {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello you"}]
    }


@pytest.mark.parametrize("turns", [["a", 7], ["a", " "], ["a" * 400, "b" * 200]])
def test_what_is_no_text_or_too_long_is_no_conversation(prepare, turns):
    assert not prepare.is_conversation(turns)


@pytest.mark.usefixtures("chatterbot_corpus")
@pytest.mark.parametrize("manifest", ["smollm2.yaml", "smollm2-long.yaml"])
def test_a_manifest_reads_the_files_that_are_written(prepare, monkeypatch, manifest):
    job = DiffusionTrainJob.from_json(
        json.dumps(yaml.safe_load((EXAMPLE / manifest).read_text(encoding="utf-8")))
    )
    monkeypatch.setattr(prepare, "entries", lambda folder: [])
    monkeypatch.setattr(prepare, "chapters", lambda folder: {"Ge 1": "In the beginning"})
    written = {f"pvc://data/{name}" for name in prepare.data(Path("/"))}
    read = {
        source.uri
        for stage in job.spec.stages
        for data in [job.spec.data_of(stage)]
        for source in (*data.train, *data.validation)
    }
    assert read <= written
    assert job.spec.stages[0].mask_token is not None
