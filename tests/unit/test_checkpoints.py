"""Checkpoints: what is committed is read back bit for bit, and what is damaged is never used."""

import hashlib
import json
import random
import shutil

import pytest
import torch
from safetensors.torch import save_file

from support import counts
from unmask.errors import ModelError, UnmaskError, UsageError
from unmask.training import checkpoints
from unmask.training.checkpoints import CheckpointStore, checkpoint_name
from unmask.training.identity import refuse_other_job
from unmask.training.manifest import CheckpointFile, CheckpointManifest, Part, StoredTensor, TrainingState

STATE = TrainingState(stage=1, stage_step=4, cursor=77, stage_seconds=1.5)


def tensors(step=1):
    generator = torch.Generator().manual_seed(step)
    return {
        "model.a": torch.randn(5, 3, generator=generator),
        "model.b": torch.randn(4, generator=generator).bfloat16(),
        "optimizer.a.step": torch.tensor(float(step)),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
    }


def save(store, step):
    return store.save(
        step=step, state=STATE, job={"seed": 1}, config={"k": [1]}, tensors=tensors(step).items()
    )


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", keep_last=2)


def read(checkpoint):
    targets = {name: torch.empty_like(tensor) for name, tensor in tensors().items()}
    checkpoint.read_into(targets)
    return targets


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_what_was_saved_is_read_back_bit_for_bit(store):
    save(store, 3)
    newest = store.newest()
    assert newest.manifest.step == 3
    assert newest.manifest.state == STATE
    assert (newest.manifest.job, newest.manifest.config) == ({"seed": 1}, {"k": [1]})
    assert same(read(newest), tensors(3))


def test_tensors_beyond_a_files_size_go_to_further_files(store, monkeypatch):
    monkeypatch.setattr(checkpoints, "_MAX_FILE_BYTES", 64)
    checkpoint = save(store, 3)
    assert len(checkpoint.manifest.files) == 2
    assert same(read(store.newest()), tensors(3))


def test_a_tensor_in_parts_is_put_together(store):
    whole = torch.arange(24.0).reshape(4, 6)
    checkpoint = store.save(
        step=1, state=STATE, job={}, config={}, tensors=[("t", whole[:, :2]), ("u", whole[0])]
    )
    # What ranks that hold parts of a tensor will write: here made by hand.
    save_file({"t": whole[:, 2:].contiguous()}, checkpoint.path / "other.safetensors")
    manifest = checkpoint.manifest
    parts = [
        Part(file="shard-00000.safetensors", offsets=[0, 0], shape=[4, 2]),
        Part(file="other.safetensors", offsets=[0, 2], shape=[4, 4]),
    ]
    digest = CheckpointFile(
        size=(checkpoint.path / "other.safetensors").stat().st_size,
        sha256=hashlib.sha256((checkpoint.path / "other.safetensors").read_bytes()).hexdigest(),
    )
    content = manifest.model_dump() | {
        "tensors": manifest.model_dump()["tensors"]
        | {"t": {"dtype": "F32", "shape": [4, 6], "parts": parts}},
        "files": manifest.model_dump()["files"] | {"other.safetensors": digest},
    }
    content["tensors"]["t"]["parts"] = [part.model_dump() for part in parts]
    content["files"]["other.safetensors"] = digest.model_dump()
    data = CheckpointManifest.model_validate(content).to_bytes()
    (checkpoint.path / "manifest.json").write_bytes(data)
    targets = {"t": torch.empty(4, 6), "u": torch.empty(6)}
    store.newest().read_into(targets)
    assert torch.equal(targets["t"], whole)


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ([4], [([0], [3])]),
        ([4], [([0], [3]), ([2], [2])]),
        ([4], [([2], [4])]),
        ([2, 2], [([0], [4])]),
        ([4], []),
    ],
)
def test_parts_that_do_not_make_up_the_tensor_are_refused(shape, parts):
    made = [{"file": "a.safetensors", "offsets": offsets, "shape": size} for offsets, size in parts]
    with pytest.raises(ValueError):
        StoredTensor.model_validate({"dtype": "F32", "shape": shape, "parts": made})


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/a.safetensors", "a.bin", ".safetensors", "a/b.safetensors"]
)
def test_a_part_lies_in_a_file_beside_the_manifest(name):
    with pytest.raises(ValueError):
        Part(file=name, offsets=[0], shape=[1])


def test_only_the_newest_are_kept(store):
    for step in (1, 2, 5, 9):
        save(store, step)
    assert store.steps() == [5, 9]


def test_an_older_checkpoint_is_removed_only_after_the_new_one_is_committed(store, monkeypatch):
    save(store, 1)
    save(store, 2)
    seen = []
    monkeypatch.setattr(CheckpointStore, "_prune", lambda self, newest, spared: seen.append(self.steps()))
    save(store, 3)
    assert seen == [[1, 2, 3]]


def flip(path, at, bit):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


DAMAGES = {
    "a flipped bit": lambda path, chance: flip(
        path, chance.randrange(path.stat().st_size), chance.randrange(8)
    ),
    "a truncated file": lambda path, chance: path.write_bytes(
        path.read_bytes()[: chance.randrange(path.stat().st_size)]
    ),
    "a missing file": lambda path, chance: path.unlink(),
    "bytes added": lambda path, chance: path.write_bytes(path.read_bytes() + b"\0"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["manifest.json", "shard-00000.safetensors"])
def test_damage_is_found_and_the_checkpoint_before_is_used(store, caplog, damage, name):
    save(store, 1)
    save(store, 2)
    pristine = (store.folder / checkpoint_name(2) / name).read_bytes()
    chance = random.Random(f"{damage} {name}")
    for _ in range(counts.of(sample=25, full=1250)):
        DAMAGES[damage](store.folder / checkpoint_name(2) / name, chance)
        caplog.clear()
        newest = store.newest()
        if newest.manifest.step == 2:  # what JSON does not care about, such as a space
            assert name == "manifest.json" and newest.manifest.state == STATE
        else:
            assert newest.manifest.step == 1
            assert "is damaged and skipped" in caplog.text
        assert same(read(newest), tensors(newest.manifest.step))
        (store.folder / checkpoint_name(2) / name).write_bytes(pristine)


def test_files_swapped_between_two_checkpoints_are_found(store):
    save(store, 1)
    save(store, 2)
    one, two = (store.folder / checkpoint_name(step) for step in (1, 2))
    shutil.copyfile(one / "shard-00000.safetensors", two / "shard-00000.safetensors")
    assert store.newest().manifest.step == 1
    shutil.copytree(one, store.folder / checkpoint_name(7))
    assert store.newest().manifest.step == 1


def test_when_all_are_damaged_the_run_does_not_start_anew_by_itself(store):
    save(store, 1)
    (store.folder / checkpoint_name(1) / "manifest.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match="all 1 checkpoints are damaged; .* remove the folder"):
        store.newest()


def test_a_damaged_checkpoint_is_replaced_when_the_run_comes_there_again(store):
    save(store, 1)
    save(store, 2)
    (store.folder / checkpoint_name(2) / "manifest.json").unlink()
    save(store, 2)
    assert store.newest().manifest.step == 2
    assert store.steps() == [1, 2]


def test_a_write_that_fails_leaves_no_trace_and_harms_nothing(store, monkeypatch):
    save(store, 1)

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(UnmaskError, match="No space left on device.*earlier checkpoints stand"):
        save(store, 2)
    assert [path.name for path in store.folder.iterdir()] == [checkpoint_name(1)]
    assert same(read(store.newest()), tensors(1))


@pytest.mark.parametrize("call", ["save_file", "_sync", "_sha256"])
def test_a_process_that_ends_at_any_call_of_a_save_leaves_the_last_commit(store, monkeypatch, call):
    class Killed(BaseException):
        pass

    save(store, 1)
    for survived in range(20):
        shutil.rmtree(store.folder / checkpoint_name(2), ignore_errors=True)
        calls = iter(range(100))
        with monkeypatch.context() as patch:
            original = getattr(checkpoints, call)

            def dying(*args, calls=calls, survived=survived, original=original):
                if next(calls) == survived:
                    raise Killed
                return original(*args)

            patch.setattr(checkpoints, call, dying)
            patch.setattr(
                shutil, "rmtree", lambda *args, **options: None
            )  # a killed process cleans up nothing
            try:
                save(store, 2)
            except Killed:
                assert store.newest().manifest.step in (1, 2)
                assert same(read(store.newest()), tensors(store.newest().manifest.step))
            else:
                break
    else:
        raise AssertionError("the save never came to its end")
    assert survived
    store.remove_leftovers()
    assert all(path.name.startswith("step-") for path in store.folder.iterdir())


def test_an_empty_folder_and_none_at_all_hold_no_checkpoint(store):
    assert store.newest() is None
    store.folder.mkdir()
    (store.folder / "notes.txt").touch()
    assert store.newest() is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda targets: targets.pop("flags"), "has an unexpected tensor flags"),
        (lambda targets: targets.update(new=torch.zeros(1)), "lacks tensor new"),
        (lambda targets: targets.update({"model.a": torch.zeros(5, 4)}), r"model.a is F32 \[5, 3\]"),
        (lambda targets: targets.update({"model.b": torch.zeros(4)}), r"model.b is BF16 \[4\]"),
    ],
)
def test_tensors_of_another_model_are_refused_by_name(store, change, words):
    checkpoint = save(store, 1)
    targets = tensors()
    change(targets)
    with pytest.raises(ModelError, match=words):
        checkpoint.read_into(targets)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "unmask.checkpoint/v2"},
        {"extra": 1},
        {"step": -1},
        {"step": "3"},
        {"files": {}},
        {"state": {}},
    ],
)
def test_a_manifest_with_a_right_digest_but_wrong_fields_is_refused(store, change):
    checkpoint = save(store, 3)
    content = json.loads(checkpoint.manifest.to_bytes()) | change
    content.pop("sha256")
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    content["sha256"] = hashlib.sha256(canonical).hexdigest()
    with pytest.raises(ValueError):
        CheckpointManifest.from_bytes(json.dumps(content).encode())


JOB = {"model": {"hidden_size": 32}, "stages": [{"steps": 600, "train": [{"sha256": "a" * 64}]}]}


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({**JOB, "model": {"hidden_size": 64}}, r"spec.model.hidden_size: the job has 64, .* made with 32"),
        ({**JOB, "stages": [{**JOB["stages"][0], "steps": 601}]}, r"spec.stages\[0\].steps: the job has 601"),
        (
            {**JOB, "stages": [{"steps": 600, "train": [{"sha256": "b" * 64}]}]},
            r"spec.stages\[0\].train\[0\].sha256",
        ),
        ({**JOB, "stages": JOB["stages"] * 2}, r"spec.stages: the job has 2 entries, .* with 1 entries"),
        ({**JOB, "precision": "bf16"}, r"spec.precision: the job has 'bf16', .* made with none"),
    ],
)
def test_a_checkpoint_of_another_job_is_refused_with_what_differs(other, words):
    refuse_other_job(JOB, JOB, where="here")
    with pytest.raises(UsageError, match=words):
        refuse_other_job(JOB, other, where="here")
