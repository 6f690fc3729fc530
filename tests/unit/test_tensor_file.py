"""The format of weights on disk: the same as the safetensors library's, and nothing else is taken."""

import json
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.errors import ModelError
from unmask.models import tensor_file
from unmask.models.folder import open_file
from unmask.models.tensor_file import StoredTensor, read_header, read_pieces, write_tensor_file

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F64": torch.float64, "F16": torch.float16}

tensors = st.dictionaries(
    st.text("abc.xyz_0123", min_size=1, max_size=20),
    st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(1, 5), max_size=3)),
    min_size=1,
    max_size=6,
)


def drawn(described):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(DTYPES[dtype])
        for name, (dtype, shape) in described.items()
    }


@given(tensors)
@settings(deadline=None, max_examples=60)
def test_what_the_library_writes_is_read(tmp_path_factory, described):
    path = tmp_path_factory.mktemp("theirs") / "file.safetensors"
    written = drawn(described)
    safetensors.torch.save_file(written, path)
    with open_file(path) as file:
        header = read_header(file, source="file")
        assert header.keys() == written.keys()
        for name, stored in header.items():
            content = b"".join(read_pieces(file, stored.start, stored.nbytes, source="file"))
            read = torch.frombuffer(bytearray(content), dtype=DTYPES[stored.dtype]).reshape(stored.shape)
            assert torch.equal(read, written[name])


@given(tensors)
@settings(deadline=None, max_examples=60)
def test_what_is_written_the_library_reads(tmp_path_factory, described):
    path = tmp_path_factory.mktemp("ours") / "file.safetensors"
    written = drawn(described)
    stored = [StoredTensor(name, dtype, tuple(shape)) for name, (dtype, shape) in described.items()]

    def pieces(tensor):
        yield written[tensor.name].reshape(-1).view(torch.uint8).numpy().tobytes()

    write_tensor_file(path, stored, pieces)
    read = safetensors.torch.load_file(path)
    assert read.keys() == written.keys()
    assert all(torch.equal(read[name], written[name]) for name in written)


def test_large_tensors_pass_in_small_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "PIECE_BYTES", 24)
    written = {"a": torch.arange(25.0), "b": torch.ones(3)}
    safetensors.torch.save_file(written, tmp_path / "file.safetensors")
    with open_file(tmp_path / "file.safetensors") as file:
        stored = read_header(file, source="file")["a"]
        pieces = list(read_pieces(file, stored.start, stored.nbytes, source="file"))
    assert [len(piece) for piece in pieces] == [24, 24, 24, 24, 4]
    assert torch.equal(torch.frombuffer(bytearray(b"".join(pieces)), dtype=torch.float32), written["a"])


def test_each_tensor_starts_at_a_multiple_of_its_elements_size(tmp_path):
    stored = [StoredTensor("half", "F16", (3,)), StoredTensor("whole", "F64", (2,))]
    write_tensor_file(tmp_path / "file", stored, lambda tensor: [bytes(tensor.nbytes)])
    with open_file(tmp_path / "file") as file:
        assert all(stored.start % 8 == 0 for stored in read_header(file, source="file").values())


GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def parse(tmp_path, header, data=bytes(8)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(text)) + text + data)
    with open_file(tmp_path / "file") as file:
        return read_header(file, source="file")


def test_a_good_header_is_taken(tmp_path):
    assert parse(tmp_path, GOOD)["a"].shape == (2,)


def entry(**changes):
    return {"a": GOOD["a"] | changes}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},' * 2, "cannot be read as JSON"),
        (
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
            "'a' is there twice",
        ),
        (b"[]", "got a JSON list"),
        (b"\xff{}", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', "NaN is not a number of JSON"),
        (b'{"\\ud800":1}', "cannot be read as JSON"),
        ({"a": 1}, "a: got 1, not a dtype, a shape and an extent"),
        ({"\x1b[31m": GOOD["a"]}, r"'\\x1b\[31m' is not the name of a tensor"),
        ({"n" * 600: GOOD["a"]}, "is not the name of a tensor"),
        (entry(dtype="F33"), "got dtype 'F33', known are"),
        (entry(shape=[-2]), r"got shape \[-2\], expected positive whole numbers"),
        (entry(shape=[0]), "expected positive whole numbers"),
        (entry(shape=[True, 2]), "expected positive whole numbers"),
        (entry(shape=[2.0]), "expected positive whole numbers"),
        (entry(shape=[10**400]), "expected positive whole numbers"),
        (entry(shape=[1] * 50 + [2]), "expected positive whole numbers"),
        (entry(shape=[2**49] * 8), "got 8 bytes, its shape and dtype need"),
        (entry(shape=[3]), "got 8 bytes, its shape and dtype need 12"),
        (entry(data_offsets=[-8, 0]), "an extent that does not lie in the file"),
        (entry(data_offsets=[8, 0]), "an extent that does not lie in the file"),
        (entry(data_offsets=[10**400, 10**400 + 8]), "an extent that does not lie in the file"),
        (entry(data_offsets=[8, 16]), "a: got data that starts at"),
        ({"a": GOOD["a"], "b": GOOD["a"]}, "b: got data that starts at"),
        ({}, "truncated, or not a safetensors file"),
    ],
)
def test_headers_that_do_not_say_one_thing_are_refused(tmp_path, header, message):
    with pytest.raises(ModelError, match=message):
        parse(tmp_path, header)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 3) + b"{}",
        b"PK\x03\x04" + b"\x00" * 40,
        b"\x80\x02}q\x00." + b"\x00" * 40,
    ],
)
def test_what_is_no_such_file_is_refused_before_memory_is_taken(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with (
        open_file(tmp_path / "file") as file,
        pytest.raises(ModelError, match="truncated, or not a safetensors file"),
    ):
        read_header(file, source="file")


def test_bytes_behind_the_last_tensor_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"truncated, or not a safetensors file \(got"):
        parse(tmp_path, GOOD, data=bytes(9))


def test_a_header_larger_than_any_model_needs_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "_LONGEST_HEADER", 20)
    with pytest.raises(ModelError, match="allowed are 20"):
        parse(tmp_path, GOOD)
