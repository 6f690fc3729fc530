"""Where data may lie, and in which files: all read the same, and what cannot be read is named."""

import gzip
import json
import re
import sys

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.training import EOS, write_data, write_lines
from unmask.errors import DataError, UsageError
from unmask.models.tokenizer import Tokenizer
from unmask.training.encoding import encode
from unmask.training.records import Text, Tokens, read_records
from unmask.training.sources import data_files

ENTRIES = [{"text": f"w{number} \u2028 w9"} for number in range(8, 40)]
RECORDS = [Text(text=entry["text"], line=line) for line, entry in enumerate(ENTRIES, start=1)]


def content():
    return "".join(f"{json.dumps(entry, ensure_ascii=False)}\n" for entry in ENTRIES).encode()


def write_table(path, entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(entries), path, row_group_size=7)
    return path


def write_file(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffix:
        case ".gz":
            path.write_bytes(gzip.compress(content()))
        case ".zst":
            path.write_bytes(pyarrow.compress(content(), "zstd", asbytes=True))
        case ".parquet":
            write_table(path, ENTRIES)
        case _:
            path.write_bytes(content())
    return path


def refusal(location, data_format="text", error=DataError):
    with pytest.raises(error) as caught:
        read_records(location, data_format)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_every_kind_of_file_holds_the_same_records(tmp_path, name):
    path = tmp_path / name
    if name == "a.JSONL":
        path.write_bytes(content())
    else:
        write_file(path)
    assert read_records(path, "text") == RECORDS
    assert read_records(f"file://{path}", "text") == RECORDS
    with fsspec.open(f"memory://sources/{name}", "wb") as stream:
        stream.write(path.read_bytes())
    assert read_records(f"memory://sources/{name}", "text") == RECORDS


def test_frames_of_compressed_files_may_follow_each_other(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(pyarrow.compress(content(), "zstd", asbytes=True) * 2)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content()) * 2)
    texts = [record.text for record in RECORDS] * 2
    for name in ("a.jsonl.zst", "a.jsonl.gz"):
        assert [record.text for record in read_records(tmp_path / name, "text")] == texts


def paragraphs_at_once(text):
    """What a .txt file holds, by one expression over all of it."""
    return [
        Text(text=match.group().rstrip(), line=text.count("\n", 0, match.start()) + 1)
        for match in re.finditer(r"\S(?:.|\n(?!\s*\n))*", text)
    ]


@given(st.text(alphabet="ab \n\t\r\u2028\u00a0\x1c", max_size=40).filter(str.strip))
def test_paragraphs_read_line_by_line_are_those_of_the_whole_text(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode())
    assert read_records(path, "text") == paragraphs_at_once(text)


@pytest.mark.parametrize(
    ("names", "split", "chosen"),
    [
        (["data/train-00001-of-00002.parquet", "data/train-00000-of-00002.parquet"], None, [1, 0]),
        (["train.jsonl", "validation.jsonl", "README.md", ".train.jsonl"], None, [0]),
        (["train.jsonl", "dev.jsonl.gz", "test.jsonl"], "validation", [1]),
        (["train/a.jsonl", "train/b.jsonl.zst", "valid/a.jsonl"], "train", [0, 1]),
        (["a.jsonl", "constrained.jsonl", "notes.txt"], None, [0, 1]),
        (["b.txt", "a.txt"], None, [1, 0]),
        (["extra-1.jsonl", "train.jsonl"], "extra", [0]),
    ],
)
@pytest.mark.parametrize("remote", [False, True])
def test_a_folder_is_read_split_by_split_in_the_order_of_its_names(tmp_path, names, split, chosen, remote):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    where = str(tmp_path)
    if remote:
        where = f"memory:/{tmp_path}"
        fsspec.filesystem("memory").put(str(tmp_path), str(tmp_path), recursive=True)
    files = data_files(where, split=split)
    assert [file.uri for file in files] == [f"{where}/{names[place]}" for place in chosen]


def test_a_folder_that_does_not_hold_what_is_asked_for_says_what_it_holds(tmp_path):
    write_lines(tmp_path / "only" / "train.jsonl", ENTRIES)
    with pytest.raises(
        DataError, match=r"none of its 1 files is of split validation \(found: train\); set split"
    ):
        data_files(tmp_path / "only", split="validation")
    write_lines(tmp_path / "both" / "train.jsonl", ENTRIES)
    write_file(tmp_path / "both" / "train.parquet")
    assert "both as .parquet and as lines" in refusal(tmp_path / "both")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "data.arrow").touch()
    assert "holds no data files; known are .jsonl" in refusal(tmp_path / "none")


def test_a_missing_object_and_an_unknown_store_are_named():
    assert refusal("memory://nothing/a.jsonl") == (
        "memory://nothing/a.jsonl: no such file; correct the uri in data"
    )
    assert "use a path, file://, s3:// or gs://" in refusal("nosuch://a/b.jsonl", error=UsageError)


@pytest.mark.parametrize(("uri", "package"), [("az://b/a.jsonl", "adlfs"), ("gs://b/a.jsonl", "gcsfs")])
def test_a_store_without_its_package_names_the_package(monkeypatch, uri, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert f"needs the package {package}, which is not installed" in refusal(uri, error=UsageError)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.zst"])
def test_a_file_that_needs_pyarrow_says_so_where_there_is_none(tmp_path, monkeypatch, name):
    path = write_file(tmp_path / name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refusal(path, error=UsageError).endswith(
        "needs the package pyarrow; install unmask[data], or write it as .jsonl.gz"
    )


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_compressed_file_that_is_cut_short_is_refused(tmp_path, name):
    path = write_file(tmp_path / name)
    path.write_bytes(path.read_bytes()[:-9])
    assert re.search(
        rf"{path}:\d+: the compressed file is damaged or cut short .*fetch it again", refusal(path)
    )


def test_a_table_that_is_damaged_or_lacks_the_column_is_refused(tmp_path):
    path = write_table(tmp_path / "a.parquet", [{"content": "a", "id": 1}])
    assert refusal(path) == (
        f"{path}: has the columns content, id, but not text; rename one, or correct the format"
    )
    path.write_bytes(path.read_bytes()[:-5])
    assert "not a readable Parquet file" in refusal(path)


def test_a_bad_row_of_a_table_is_named_with_its_field(tmp_path):
    path = write_table(tmp_path / "a.parquet", [{"text": "a"}, {"text": None}])
    assert refusal(path) == f'{path}, row 2: "text" must be a string, got nothing'
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write_table(tmp_path / "b.parquet", [{"messages": turns}, {"messages": turns[:1]}])
    assert f"{path}, row 2: the last turn must be the assistant's" in refusal(path, "messages")


def test_a_response_is_a_completion(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"prompt": "a", "response": "b"}, {"prompt": "a", "completion": "b"}])
    one, other = read_records(tmp_path / "a.jsonl", "completion")
    assert (one.prompt, one.completion, one.accepted) == (other.prompt, other.completion, other.accepted)


TOKENS = [
    ({}, '"input_ids" must be a list of whole numbers, got nothing'),
    ({"input_ids": []}, '"input_ids" is empty'),
    ({"input_ids": [1, "2"]}, '"input_ids"[1] must be a whole number of at least 0, got a string'),
    ({"input_ids": [1, -2]}, '"input_ids"[1] must be a whole number of at least 0, got -2'),
    ({"input_ids": [1, 2], "loss_mask": [1]}, '"loss_mask" has 1 entries, "input_ids" 2'),
    ({"input_ids": [1, 2], "loss_mask": [1, 2]}, '"loss_mask" must hold 1'),
    ({"input_ids": [1, 2], "loss_mask": [0, 0]}, "no token of the document is learnt"),
    ({"input_ids": [1, 2], "labels": [-100, 3]}, "labels must be the same tokens, not shifted"),
]


@pytest.mark.parametrize(("entry", "words"), TOKENS)
def test_tokens_that_make_no_sense_are_refused(tmp_path, entry, words):
    write_lines(tmp_path / "a.jsonl", [{"input_ids": [3]}, entry])
    message = refusal(tmp_path / "a.jsonl", "tokens")
    assert message.startswith(f"{tmp_path / 'a.jsonl'}:2: ")
    assert words in message


@pytest.fixture
def tokenizer(tmp_path):
    write_data(tmp_path)
    return Tokenizer.load(tmp_path / "tokenizer")


@pytest.mark.parametrize(
    ("extra", "prompt", "turns"),
    [
        ({}, 0, ((0, 4),)),
        ({"loss_mask": [0, 0, 1, 1]}, 2, ((2, 4),)),
        ({"loss_mask": [False, True, True, True]}, 1, ((1, 4),)),
        ({"labels": [-100, -100, -100, 12]}, 3, ((3, 4),)),
        ({"loss_mask": [1, 0, 0, 1]}, None, ((0, 1), (3, 4))),
        ({"loss_mask": [0, 1, 1, 0]}, None, ((1, 3),)),
    ],
)
def test_tokens_stay_as_they_are_and_their_mask_says_what_is_learnt(
    tmp_path, tokenizer, extra, prompt, turns
):
    write_lines(tmp_path / "a.jsonl", [{"input_ids": [9, 10, 11, 12], **extra}])
    (record,) = read_records(tmp_path / "a.jsonl", "tokens")
    found = encode(record, tokenizer, eos_token_id=EOS, turns=True)
    assert (found.ids, found.turns) == ([9, 10, 11, 12], turns)
    if prompt is None:
        with pytest.raises(
            DataError, match="supervise: AllTurns alone can learn; set that, or drop loss_mask"
        ):
            encode(record, tokenizer, eos_token_id=EOS)
    else:
        assert encode(record, tokenizer, eos_token_id=EOS).prompt_length == prompt


def test_tokens_of_another_tokenizer_are_refused(tokenizer):
    record = Tokens(ids=(3, tokenizer.vocab_size), line=1)
    with pytest.raises(DataError, match=r'"input_ids"\[1\] is .* tokenise with the model\'s own tokenizer'):
        encode(record, tokenizer, eos_token_id=EOS)
