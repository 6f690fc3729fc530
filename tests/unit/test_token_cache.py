"""Encoded data on disk: made once, the same for all, made anew when damaged, and never held in memory."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from support.training import EOS, exercise, write_data, write_lines
from unmask.errors import DataError, UsageError
from unmask.models.tokenizer import Tokenizer
from unmask.training import token_cache
from unmask.training.corpus import Joined, Library, Source
from unmask.training.encoding import encode
from unmask.training.records import read_records


@pytest.fixture
def tokenizer(tmp_path):
    write_data(tmp_path, chat=True)
    return Tokenizer.load(tmp_path / "tokenizer")


@pytest.fixture
def source(tmp_path, tokenizer):
    return Source(tmp_path / "train.jsonl", "completion")


def library(tokenizer, tmp_path):
    return Library(tokenizer, eos_token_id=EOS, cache=tmp_path / "cache")


def entries(tmp_path):
    """Those that are complete."""
    return sorted((tmp_path / "cache").glob("*/index.json"))


def encoded_one_by_one(source, tokenizer, *, turns):
    return [
        encode(record, tokenizer, eos_token_id=EOS, turns=turns)
        for record in read_records(source.path, source.format)
    ]


def write_format(path, data_format, count=40):
    made = [exercise(number) for number in range(count)]
    turns = [
        [{"role": "user", "content": one["prompt"]}, {"role": "assistant", "content": one["completion"]}] * 2
        for one in made
    ]
    write_lines(
        path,
        {
            "text": [{"text": one["prompt"]} for one in made],
            "completion": made,
            "messages": [{"messages": one} for one in turns],
            "tokens": [{"input_ids": [9, 10, 11], "loss_mask": [0, 1, 1]}] * count,
        }[data_format],
    )
    return Source(path, data_format)


@pytest.mark.parametrize("data_format", ["text", "messages", "completion", "tokens"])
@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_what_is_kept_is_what_encoding_one_by_one_gives(
    tmp_path, tokenizer, monkeypatch, data_format, turns, kept
):
    monkeypatch.setattr(token_cache, "_BATCH_RECORDS", 7)
    source = write_format(tmp_path / "a.jsonl", data_format)
    own = library(tokenizer, tmp_path) if kept else Library(tokenizer, eos_token_id=EOS)
    file = own.tokens(source, turns=turns)
    expected = encoded_one_by_one(source, tokenizer, turns=turns)
    assert file.ids.tolist() == [token for one in expected for token in one.ids]
    assert file.lengths.tolist() == [len(one.ids) for one in expected]
    assert file.prompt_lengths.tolist() == [one.prompt_length for one in expected]
    assert file.lines.tolist() == list(range(1, 41))
    assert (file.turns is not None) == turns
    if turns:
        starts = np.cumsum(file.lengths) - file.lengths
        for start, one in zip(starts, expected, strict=True):
            for number, (first, after) in enumerate(one.turns):
                assert (file.turns[start + first : start + after] == number).all()
        learnt = sum(after - first for one in expected for first, after in one.turns)
        assert (file.turns >= 0).sum() == learnt


def test_what_is_kept_is_not_encoded_again(tmp_path, tokenizer, source, monkeypatch):
    first = library(tokenizer, tmp_path).tokens(source)
    monkeypatch.setattr(token_cache, "encode", None)
    again = library(tokenizer, tmp_path).tokens(source)
    assert again.ids.tolist() == first.ids.tolist()
    assert again.digest == first.digest
    moved = tmp_path / "elsewhere.jsonl"
    shutil.copy(source.path, moved)
    assert library(tokenizer, tmp_path).tokens(Source(moved, "completion")).digest == first.digest
    assert len(entries(tmp_path)) == 1


def test_the_digest_is_that_of_the_documents_in_memory(tmp_path, tokenizer, source):
    import hashlib

    file = library(tokenizer, tmp_path).tokens(source, turns=True)
    arrays = (file.ids, file.lengths, file.prompt_lengths, file.turns)
    expected = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    assert file.digest == expected == Library(tokenizer, eos_token_id=EOS).digest(source, turns=True)


def other_content(folder, source):
    write_lines(source.path, [exercise(number) for number in range(49)])


def other_vocabulary(folder, source):
    path = folder / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace('"w58"', '"v58"'))


def other_template(folder, source):
    path = folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"chat_template": config["chat_template"] + " "}))


@pytest.mark.parametrize("change", [other_content, other_vocabulary, other_template])
def test_another_content_tokenizer_or_template_is_another_entry(tmp_path, tokenizer, source, change):
    library(tokenizer, tmp_path).tokens(source)
    change(tmp_path, source)
    library(Tokenizer.load(tmp_path / "tokenizer"), tmp_path).tokens(source)
    assert len(entries(tmp_path)) == 2


def test_another_encoding_is_another_entry(tmp_path, tokenizer, source, monkeypatch):
    library(tokenizer, tmp_path).tokens(source)
    monkeypatch.setattr(token_cache, "ENCODING_VERSION", token_cache.ENCODING_VERSION + 1)
    library(tokenizer, tmp_path).tokens(source)
    assert len(entries(tmp_path)) == 2


def test_a_change_that_keeps_size_and_time_is_seen(tmp_path, tokenizer, source):
    old = time.time() - 3600
    os.utime(source.path, (old, old))
    before = library(tokenizer, tmp_path).digest(source)
    text = source.path.read_text()
    source.path.write_text(text.replace("w9 ", "w8 "))
    os.utime(source.path, (old, old))
    assert library(tokenizer, tmp_path).digest(source) != before


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [cut, empty, flip, remove])
@pytest.mark.parametrize("name", ["ids", "lengths", "prompt_lengths", "turns", "lines", "files", "index"])
def test_a_damaged_entry_is_noticed_and_made_anew(tmp_path, tokenizer, source, damage, name, caplog):
    first = library(tokenizer, tmp_path).tokens(source, turns=True)
    expected = first.ids.tolist(), first.digest
    (index,) = entries(tmp_path)
    damage(index.parent / ("index.json" if name == "index" else f"{name}.bin"))
    again = library(tokenizer, tmp_path).tokens(source, turns=True)
    assert (again.ids.tolist(), again.digest) == expected
    assert "is damaged" in caplog.text
    assert len(entries(tmp_path)) == 1
    assert not list(index.parent.glob("damaged"))
    caplog.clear()
    library(tokenizer, tmp_path).tokens(source, turns=True)
    assert "is damaged" not in caplog.text


def test_nothing_that_was_begun_is_taken_for_an_entry_and_it_is_cleared_away(tmp_path, tokenizer, source):
    library(tokenizer, tmp_path).tokens(source)
    (index,) = entries(tmp_path)
    whole = index.parent
    left = whole.parent / f".{whole.name}.abc"
    shutil.move(whole, left)
    library(tokenizer, tmp_path).tokens(source)
    assert entries(tmp_path) == [index]
    assert not left.exists()


def test_a_bad_record_leaves_no_entry_behind(tmp_path, tokenizer):
    write_lines(tmp_path / "a.jsonl", [{"text": "w9"}, {"text": "\ud800"}])
    with pytest.raises(DataError, match=rf"{tmp_path / 'a.jsonl'}:2: the text has a lone surrogate"):
        library(tokenizer, tmp_path).tokens(Source(tmp_path / "a.jsonl", "text"))
    assert not entries(tmp_path)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_shards_of_a_folder_are_one_source_and_name_their_lines(tmp_path, tokenizer):
    whole = [{"text": "w9 w10"}, {"text": "w11"}, {"text": " ".join(["w12"] * 9)}]
    write_lines(tmp_path / "all.jsonl", whole)
    write_lines(tmp_path / "parts" / "train-0.jsonl", whole[:2])
    write_lines(tmp_path / "parts" / "train-1.jsonl", whole[2:])
    own = library(tokenizer, tmp_path)
    parts = Source(tmp_path / "parts", "text")
    assert own.digest(parts) == own.digest(Source(tmp_path / "all.jsonl", "text"))
    with pytest.raises(DataError, match=r"train-1.jsonl:1: 10 tokens, but rows hold 8"):
        own.corpus([parts], length=8, overlong="Error")


def test_a_folder_that_cannot_be_written_is_named(tmp_path, tokenizer, source):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UsageError, match=r"cannot keep encoded data there .*data.cache.uri"):
        library(tokenizer, tmp_path).tokens(source)


def test_joined_arrays_are_indexed_like_one():
    parts = [np.arange(5), np.arange(5, 6), np.arange(6, 20)]
    joined, whole = Joined(parts), np.concatenate(parts)
    index = np.random.default_rng(0).integers(0, 20, (7, 9))
    assert (joined[index] == whole[index]).all()
    assert len(joined) == 20
    for piece in (slice(None), slice(3, 8), slice(6, 6), slice(-2, None)):
        assert (joined[piece] == whole[piece]).all()


ENCODE = """
    import resource, sys, logging
    from pathlib import Path
    logging.basicConfig(level="DEBUG")
    from unmask.models.tokenizer import Tokenizer
    from unmask.training.corpus import Library, Source
    folder = Path(sys.argv[1])
    library = Library(Tokenizer.load(folder / "tokenizer"), eos_token_id={eos}, cache=folder / "cache")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    file = library.tokens(Source(folder / sys.argv[2], "text"))
    print(file.digest, len(file.ids), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def start(folder, name):
    code = textwrap.dedent(ENCODE.format(eos=EOS))
    return subprocess.run(
        [sys.executable, "-c", code, str(folder), name], check=True, capture_output=True, text=True
    )


def test_processes_at_once_make_one_entry(tmp_path, tokenizer):
    words = " ".join(f"w{number % 50 + 8}" for number in range(2000))
    write_lines(tmp_path / "big.jsonl", [{"text": words}] * 200)
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda _: start(tmp_path, "big.jsonl"), range(3)))
    assert len({one.stdout.split()[0] for one in done}) == 1
    assert sum("encoded " in one.stderr for one in done) == 1
    assert len(entries(tmp_path)) == 1


def test_a_process_that_is_killed_leaves_nothing_that_harms(tmp_path, tokenizer):
    words = " ".join(f"w{number % 50 + 8}" for number in range(2000))
    write_lines(tmp_path / "big.jsonl", [{"text": words}] * 1000)
    code = textwrap.dedent(ENCODE.format(eos=EOS))
    victim = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), "big.jsonl"], stderr=subprocess.DEVNULL
    )
    while victim.poll() is None and not list((tmp_path / "cache").glob(".*/ids.bin")):
        time.sleep(0.01)
    victim.kill()
    victim.wait()
    assert not entries(tmp_path)
    start(tmp_path, "big.jsonl")
    assert len(entries(tmp_path)) == 1
    assert not [path for path in (tmp_path / "cache").glob(".*") if path.is_dir()]


def test_memory_does_not_grow_with_the_data(tmp_path, tokenizer, record_measurement):
    words = " ".join(f"w{number % 50 + 8}" for number in range(2000))
    grown = {}
    for count in (500, 5000):
        name = f"{count}.jsonl"
        with Path(tmp_path / name).open("w") as stream:
            for _ in range(count):
                stream.write(json.dumps({"text": words}) + "\n")
        _, tokens, kilobytes = start(tmp_path, name).stdout.split()
        assert int(tokens) == count * 2001
        grown[count] = int(kilobytes) / 1024
    record_measurement("MiB more for ten times the data", grown[5000] - grown[500])
    # Ten times as many tokens are 69 MiB more as numbers in files, and 600 MiB as numbers in Python's lists.
    assert grown[5000] - grown[500] < 30, grown
