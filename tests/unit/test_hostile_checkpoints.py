"""Model folders made to do harm: refused with exit code 66 and a reason, and nothing outside is opened."""

import json
import os
import random
import struct
import sys

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file

from support import counts
from support.checkpoints import write_gguf
from support.folders import add_tokenizer
from support.models import tiny_model
from support.mutations import mutated
from unmask.cli import main as command_line
from unmask.errors import ModelError, UnmaskError
from unmask.models.checkpoint_files import matching_slots
from unmask.models.gguf_file import GgufFile
from unmask.models.loading import build, load, save
from unmask.models.registry import parse_config
from unmask.models.tokenizer import Tokenizer
from unmask_api.exit_codes import ExitCode

_opened: list[str] | None = None


def _record(event, arguments):
    if event == "open" and _opened is not None and isinstance(arguments[0], str | bytes):
        _opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_record)  # there is no way to take one off again


def unmask(*arguments):
    """Run the command line in this process; returns its exit code and which files it opened."""
    global _opened
    _opened = []
    try:
        code = command_line._exit_code([str(argument) for argument in arguments])
        return code, _opened
    finally:
        _opened = None


@pytest.fixture(scope="module", autouse=True)
def everything_imported(tmp_path_factory):
    """Imports open files too; they are to be over before a test looks."""
    folder = tmp_path_factory.mktemp("warm")
    save(tiny_model(dtype=torch.float32), folder / "model")
    add_tokenizer(folder / "model")
    assert unmask("convert", folder / "model", folder / "target")[0] == ExitCode.OK
    assert unmask("inspect", folder / "model")[0] == ExitCode.OK


@pytest.fixture
def folder(tmp_path):
    """A good folder without checksums; what must not be read lies outside, next to it."""
    folder = tmp_path / "given" / "model"
    save(tiny_model(dtype=torch.float32), folder, companions={"generation_config.json": b"{}"})
    add_tokenizer(folder)
    (folder / "checksums.json").unlink()
    (tmp_path / "outside").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "outside" / name).write_bytes((folder / name).read_bytes())
    for name in ("generation_config.json", "special_tokens_map.json"):
        (tmp_path / "outside" / name).write_text("{}")
    return folder


def assert_nothing_outside_is_opened(folder, opened):
    inside = (str(folder.resolve()), str(folder.parent.parent / ".target-"))
    imported = (".py", ".pyc")
    assert [path for path in opened if not path.startswith(inside) and not path.endswith(imported)] == []


def assert_refused(folder, capsys, reason):
    target = folder.parent.parent / "target"
    code, opened = unmask("convert", folder, target)
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (ExitCode.MODEL, 1), error
    assert error.startswith("error: ") and reason in error
    assert_nothing_outside_is_opened(folder, opened)
    assert not target.exists() and not list(folder.parent.parent.glob(".target-*"))

    # What only describes the folder may not look at all of it, but does no harm either.
    code, opened = unmask("inspect", folder)
    error = capsys.readouterr().err
    assert (code, error.count("\n")) in [(ExitCode.MODEL, 1), (ExitCode.OK, 0)], error
    assert_nothing_outside_is_opened(folder, opened)


def test_the_folder_that_these_tests_damage_is_good(folder):
    code, opened = unmask("convert", folder, folder.parent.parent / "target")
    assert code == ExitCode.OK
    assert {os.path.basename(path) for path in opened if path.startswith(str(folder))} == {
        entry.name for entry in folder.iterdir()
    }


WEIGHTS = "model.safetensors"


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def edit_header(folder, change):
    content = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = change(content[8 : 8 + length])
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])


def shard(folder):
    """Make it two files and an index."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / WEIGHTS).unlink()
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def truncate(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])


def integers(folder):
    edit_weights(folder, lambda t: t.update({"lm_head.weight": torch.zeros(64, 32, dtype=torch.int32)}))


def huge_header(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**62) + content[8:])


def duplicate_in_header(folder):
    def change(header):
        return (
            header.rstrip()[:-1] + b',"model.norm.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        )

    edit_header(folder, change)


def duplicate_in_index(folder):
    weight_map = shard(folder)
    text = json.dumps({"weight_map": weight_map}).replace('"lm_head', '"model.norm.weight": "b", "lm_head', 1)
    (folder / "model.safetensors.index.json").write_text(text)


def duplicate_in_files(folder):
    shard(folder)
    again = load_file(folder / "b.safetensors") | {"lm_head.weight": torch.zeros(64, 32)}
    save_file(again, folder / "b.safetensors")


def names_in_index(file):
    def change(folder):
        weight_map = shard(folder)
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": weight_map | {"lm_head.weight": file}})
        )

    return change


def poison(value):
    def change(folder):
        edit_weights(folder, lambda tensors: tensors["model.norm.weight"].__setitem__(7, value))

    return change


def pickled(name):
    def change(folder):
        (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(b"\x80\x02cos\nsystem\n(X\x04\x00\x00\x00exittR.")

    return change


def template(text):
    return lambda folder: edit_json(folder / "tokenizer_config.json", chat_template=text)


def link(name):
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(folder.parent.parent / "outside" / name)

    return change


def link_to_folder(folder):
    (folder / "inner").symlink_to(folder.parent.parent / "outside")
    names_in_index("inner/model.safetensors")(folder)


def circle(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(WEIGHTS)


def pipe(folder):
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def directory(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def checksums(**digests):
    return lambda folder: (folder / "checksums.json").write_text(json.dumps(digests))


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def config(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


def flat_experts(folder):
    edit_weights(folder, lambda t: t.update({"model.layers.1.mlp.experts.gate_proj": torch.zeros(5)}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "truncated, or not a safetensors file"),
        (integers, "lm_head.weight: got dtype I32, allowed are F64, F32, BF16, F16"),
        (huge_header, "truncated, or not a safetensors file"),
        (duplicate_in_header, "'model.norm.weight' is there twice"),
        (duplicate_in_index, "'model.norm.weight' is there twice"),
        (duplicate_in_files, "tensor lm_head.weight is also in a.safetensors"),
        (
            names_in_index("../../outside/model.safetensors"),
            "allowed are .safetensors files beside the index",
        ),
        (names_in_index("/etc/hostname"), "allowed are .safetensors files beside the index"),
        (names_in_index("c\x00.safetensors"), "got file name"),
        (names_in_index(".safetensors"), "got file name"),
        (link_to_folder, "allowed are .safetensors files beside the index"),
        (poison(float("nan")), "model.norm.weight: has elements that are infinite or not a number"),
        (poison(float("-inf")), "model.norm.weight: has elements that are infinite or not a number"),
        (pickled("pytorch_model.bin"), "pickled weights are never read"),
        (pickled("model.pt"), "convert them to safetensors first"),
        (pickled(WEIGHTS), "truncated, or not a safetensors file"),
        (
            template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
            "the chat template tries to run other code",
        ),
        (
            template("{{ cycler.__init__.__globals__.os.system('id') }}"),
            "chat template tries to run other code",
        ),
        (
            template("{{ ''['__cla' ~ 'ss__'] | list }}"),
            "the chat template tries to run other code",
        ),
        (template("{% for"), "the chat template, line 1"),
        (link("config.json"), "config.json: is a link to outside the folder"),
        (link(WEIGHTS), "model.safetensors: is a link to outside the folder"),
        (link("tokenizer.json"), "tokenizer.json: is a link to outside the folder"),
        (link("tokenizer_config.json"), "tokenizer_config.json: is a link to outside the folder"),
        (link("special_tokens_map.json"), "special_tokens_map.json: is a link to outside the folder"),
        (link("generation_config.json"), "generation_config.json: is a link to outside the folder"),
        (circle, "model.safetensors: cannot be read"),
        (pipe, "model.safetensors: not a regular file"),
        (directory, "model.safetensors: not a regular file"),
        (checksums(**{"../../outside/config.json": "0"}), "got file name '../../outside/config.json'"),
        (checksums(**{"config.json": "0"}), "config.json: corrupted: its SHA-256"),
        (checksums(), "config.json: checksums.json does not list it; the folder has been altered"),
        (write("config.json", b"[" * 200_000), "config.json: cannot be read as JSON"),
        (write("config.json", b"[1]"), "got a JSON list, expected an object"),
        (write("config.json", b'{"architectures": ["LlamaForCausalLM"], "vocab_size": 1e999}'), "vocab_size"),
        (write("tokenizer.json", b'{"model": {"vocab": 5}}'), "tokenizer.json: not a tokenizer file"),
        (write("tokenizer.json", b"\xff\xfe"), "tokenizer.json: not UTF-8"),
        (config(num_hidden_layers=10**12), "describes more than 250000 tensors"),
        (config(vocab_size=10**15), "config.json asks for [1000000000000000, 32]"),
        (config(rms_norm_eps="1e-6; import os"), "rms_norm_eps"),
        (flat_experts, "got shape [5], expected experts x rows x columns"),
    ],
)
def test_a_hostile_folder_is_refused_and_nothing_outside_it_opened(folder, capsys, damage, reason):
    damage(folder)
    assert_refused(folder, capsys, reason)


def test_both_layouts_at_once_are_refused(folder, capsys):
    original = (folder / WEIGHTS).read_bytes()
    shard(folder)
    (folder / WEIGHTS).write_bytes(original)
    assert_refused(folder, capsys, "holds both model.safetensors and model.safetensors.index.json")


def test_links_that_stay_inside_are_followed(folder):
    """As Kubernetes lays out what it mounts."""
    (folder / "..data").mkdir()
    (folder / "config.json").rename(folder / "..data" / "config.json")
    (folder / "config.json").symlink_to("..data/config.json")
    assert load(folder).config.vocab_size == 64


def test_weights_that_are_not_numbers_do_not_load(folder):
    poison(float("nan"))(folder)
    with pytest.raises(ModelError, match="model.norm.weight: has elements that are infinite or not a number"):
        load(folder)


# Damage at random

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 16,
    "eos_token_id": 38,
    "mask_token_id": 39,
}


@pytest.fixture
def small(tmp_path):
    """A folder of a few kilobytes with every kind of file, its content and its model."""
    model = build(parse_config(SHAPE))
    save(model, tmp_path / "plain", max_shard_bytes=2_000)
    add_tokenizer(tmp_path / "plain")
    files = [file for file in (tmp_path / "plain").iterdir() if file.suffix != ".safetensors"]
    names = ("tokenizer.json", "tokenizer_config.json")
    companions = {file.name: file.read_bytes() for file in files if file.name in names}
    save(model, tmp_path / "small", max_shard_bytes=2_000, companions=companions)
    contents = {file.name: file.read_bytes() for file in sorted((tmp_path / "small").iterdir())}
    return tmp_path / "small", contents, model


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_no_damaged_file_is_read_wrongly_where_there_are_checksums(small, record_measurement):
    folder, contents, model = small
    expected, config = model.state_dict(), load(folder).config
    rng = random.Random(0)
    taken = 0
    tried = counts.of(sample=400, full=100_000)
    for _ in range(tried):
        name = rng.choice(sorted(contents))
        (folder / name).write_bytes(mutated(contents[name], rng))
        try:
            read = load(folder)
        except ModelError:
            pass
        else:  # a blank more in the list of checksums does no harm
            taken += 1
            assert name == "checksums.json"
            assert read.config == config
            assert all(torch.equal(tensor, expected[key]) for key, tensor in read.state_dict().items())
        finally:
            (folder / name).write_bytes(contents[name])
    record_measurement("damaged files, with checksums", tried)
    record_measurement("of which refused with a reason", tried - taken)
    record_measurement("of which harmless: the list of checksums says the same in other bytes", taken)
    assert taken < tried // 50


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_damage_without_checksums_is_refused_in_a_line_or_harmless(small, record_measurement):
    folder, contents, _ = small
    (folder / "checksums.json").unlink()
    rng = random.Random(1)
    refused = 0
    tried = counts.of(sample=300, full=20_000)
    for _ in range(tried):
        name = rng.choice(sorted(contents.keys() - {"checksums.json"}))
        (folder / name).write_bytes(mutated(contents[name], rng))
        try:
            load(folder)
            Tokenizer.load(folder).encode("w1 w2")
        except UnmaskError as error:
            refused += 1
            str(error).encode("utf-8")
        finally:
            (folder / name).write_bytes(contents[name])
    record_measurement("damaged files, without checksums", tried)
    record_measurement("of which refused with a reason", refused)
    assert refused > tried // 3


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_damaged_gguf_file_is_refused_in_a_line_or_harmless(tmp_path, record_measurement):
    model = build(parse_config(SHAPE | {"vocab_size": 262, "hidden_size": 32}))
    file = tmp_path / "model.gguf"
    write_gguf(file, model, kind="llama", quantised=GGMLQuantizationType.F16)
    content = file.read_bytes()
    rng = random.Random(2)
    refused = 0
    tried = counts.of(sample=300, full=20_000)
    for _ in range(tried):
        file.write_bytes(mutated(content, rng))
        try:
            with GgufFile(file) as gguf:
                matching_slots(gguf)
                gguf.companions()
                for name in gguf.tensors:
                    for _piece in gguf.pieces(name):
                        pass
        except ModelError as error:
            refused += 1
            str(error).encode("utf-8")
    record_measurement("damaged GGUF files", tried)
    record_measurement("of which refused with a reason", refused)
    assert refused > tried // 5
