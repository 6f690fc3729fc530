"""Runs in object stores: who may write, what a commit is, what is removed when; with a store in memory."""

import json
import uuid
from pathlib import Path

import pytest
import torch

from support.manifests import train_job
from unmask.errors import ModelError, UnmaskError, UsageError
from unmask.models.folder import new_folder
from unmask.training.distributed import World
from unmask.training.fetching import fetch
from unmask.training.manifest import TrainingState
from unmask.training.mirror import Mirror
from unmask.training.mirrored_checkpoints import MirroredCheckpoints
from unmask.training.model_copies import ModelCopies
from unmask.training.object_store import ObjectStore, StoreError
from unmask_api.places import working_folder
from unmask_api.train_job import DiffusionTrainJob

STATE = TrainingState(stage=0, stage_step=1, cursor=3, stage_seconds=0.5)
WORLD = World(rank=0, size=1, device=torch.device("cpu"))


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def uri():
    return f"memory://runs-{uuid.uuid4().hex}/one"


@pytest.fixture
def machine(uri, tmp_path):
    """Makes an attempt on a machine of its own."""

    def make(name="first", *, uri=uri, clock=None, grace_s=900.0):
        folder = tmp_path / name
        store = ObjectStore(uri, wait=lambda seconds: None)
        mirror = Mirror(store, folder, clock=clock or Clock(), grace_s=grace_s)
        mirror.join(mirror.claim())
        (folder / "metrics.jsonl").write_text('{"step": 1}\n')
        return mirror, MirroredCheckpoints(mirror, folder / "checkpoints", keep_last=2)

    return make


def tensors(step):
    return {"model.a": torch.full((3, 2), float(step)), "model.b": torch.arange(4.0) * step}


def save(checkpoints, step, **options):
    return checkpoints.save(
        step=step, state=STATE, job={}, config={}, tensors=tensors(step).items(), **options
    )


def restored(checkpoint):
    targets = {name: torch.empty_like(tensor) for name, tensor in tensors(0).items()}
    checkpoint.read_into(targets)
    return targets


def is_of(checkpoint, step):
    return all(torch.equal(value, tensors(step)[name]) for name, value in restored(checkpoint).items())


# Commits


def test_another_machine_reads_what_was_committed(machine):
    _, checkpoints = machine()
    save(checkpoints, 1)
    assert save(checkpoints, 2).place.endswith("/one/checkpoints/step-00000002")
    mirror, elsewhere = machine("second")
    (mirror.folder / "metrics.jsonl").unlink()
    newest = elsewhere.agreed(WORLD)
    assert newest.manifest.step == 2
    assert is_of(newest, 2)
    assert (mirror.folder / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_process_reads_only_files_that_it_needs(machine, monkeypatch):
    monkeypatch.setattr("unmask.training.checkpoints._MAX_FILE_BYTES", 16)
    _, checkpoints = machine()
    saved = save(checkpoints, 1)
    assert len(saved.manifest.files) == 2
    _, elsewhere = machine("second")
    path = elsewhere._opened(1, saved.manifest.to_bytes()).path
    assert [file.name for file in path.iterdir()] == ["manifest.json"]
    part = saved.manifest.tensors["model.b"].parts[0].file
    elsewhere._opened(1, saved.manifest.to_bytes()).fetch(part)
    assert sorted(file.name for file in path.iterdir()) == sorted([part, "manifest.json"])


def test_without_its_manifest_a_checkpoint_does_not_exist(machine):
    mirror, checkpoints = machine()
    save(checkpoints, 1)
    save(checkpoints, 2)
    mirror.store.remove(["checkpoints/step-00000002/manifest.json"])
    assert checkpoints.steps() == [1]
    assert machine("second")[1].agreed(WORLD).manifest.step == 1


def test_the_one_that_is_later_at_a_step_changes_nothing(machine, monkeypatch):
    late, behind = machine()
    _, ahead = machine("second")
    monkeypatch.setattr(late, "insist", lambda: None)  # it looked just before the other took over
    save(ahead, 1)
    before = all_of(late.store)
    with pytest.raises(UnmaskError, match="another attempt has committed this step first") as refusal:
        save(behind, 1)
    assert refusal.value.exit_code == 1
    assert all_of(late.store) == before
    assert is_of(machine("third")[1].agreed(WORLD), 1)


def test_an_attempt_that_is_over_commits_nothing(machine):
    mirror, checkpoints = machine()
    save(checkpoints, 1)
    machine("second")
    before = set(mirror.store.sizes())
    with pytest.raises(UsageError, match="another attempt has taken memory://.* over"):
        save(checkpoints, 2)
    left = set(mirror.store.sizes()) - before
    assert all("/step-00000002/a00001-00002-" in name for name in left)
    assert checkpoints.steps() == [1]


def all_of(store):
    return {name: store.read(name) for name in store.sizes()}


def test_a_file_that_did_not_arrive_is_not_committed(machine, monkeypatch):
    mirror, checkpoints = machine()
    upload = mirror.store.upload

    def lossy(file, name):
        if not name.endswith("safetensors"):
            upload(file, name)

    monkeypatch.setattr(mirror.store, "upload", lossy)
    with pytest.raises(UnmaskError, match="is not there as it was written.*earlier checkpoints stand"):
        save(checkpoints, 1)
    assert checkpoints.steps() == []


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "manifest", "log"])
def test_a_damaged_one_is_skipped_and_replaced_in_its_turn(machine, damage, caplog):
    mirror, checkpoints = machine()
    save(checkpoints, 1)
    saved = save(checkpoints, 2)
    folder = "checkpoints/step-00000002"
    name = f"{folder}/{next(iter(saved.manifest.files))}"
    match damage:
        case "truncated":
            mirror.store.write(name, mirror.store.read(name)[:-1])
        case "changed":
            mirror.store.write(name, mirror.store.read(name)[:-1] + b"!")
        case "missing":
            mirror.store.remove([name])
        case "manifest":
            mirror.store.write(f"{folder}/manifest.json", b"{}")
        case "log":
            log = next(name for name in mirror.store.sizes(folder) if "metrics" in name)
            mirror.store.write(log, b"{}\n")
    mirror, elsewhere = machine("second")
    (mirror.folder / "metrics.jsonl").unlink()
    assert elsewhere.agreed(WORLD).manifest.step == 1
    assert "step-00000002 is damaged and skipped" in caplog.text
    save(elsewhere, 2)
    assert is_of(machine("third")[1].agreed(WORLD), 2)


def test_if_all_are_damaged_the_run_does_not_begin_anew(machine):
    mirror, checkpoints = machine()
    save(checkpoints, 1)
    mirror.store.write("checkpoints/step-00000001/manifest.json", b"no")
    with pytest.raises(ModelError, match="all 1 checkpoints are damaged"):
        machine("second")[1].agreed(WORLD)


# What is removed


def test_of_an_old_checkpoint_the_manifest_goes_first(machine, monkeypatch):
    mirror, checkpoints = machine()
    removed = []
    remove = mirror.store.remove

    def noted(names):
        names = list(names)
        removed.extend(names)
        remove(names)

    monkeypatch.setattr(mirror.store, "remove", noted)
    for step in (1, 2, 3):
        save(checkpoints, step)
    assert removed[0] == "checkpoints/step-00000001/manifest.json"
    assert len(removed) == 3  # and a file, and the log
    assert checkpoints.steps() == [2, 3]
    assert not mirror.store.sizes("checkpoints/step-00000001")


def test_spared_ones_stay(machine):
    _, checkpoints = machine()
    for step in (1, 2, 3, 4):
        save(checkpoints, step, spared=[1])
    assert checkpoints.steps() == [1, 3, 4]


def test_what_an_attempt_left_half_written_goes_after_a_while(machine):
    mirror, checkpoints = machine()
    save(checkpoints, 1)
    left = "checkpoints/step-00000002/a00001-00002-shard-00000.safetensors"
    mirror.store.write(left, b"half")
    clock = Clock()
    later, elsewhere = machine("second", clock=clock, grace_s=900.0)
    own = "checkpoints/step-00000009/a00002-00009-shard-00000.safetensors"
    later.store.write(own, b"being written")
    save(elsewhere, 3)
    assert left in later.store.sizes()
    clock.now = 901.0
    save(elsewhere, 4, spared=[1])
    there = later.store.sizes()
    assert left not in there
    assert own in there
    assert "attempts/00001.json" not in there
    assert elsewhere.steps() == [1, 3, 4]
    assert is_of(machine("third")[1].agreed(WORLD), 4)


def test_the_working_copy_keeps_the_newest_alone(machine):
    mirror, checkpoints = machine()
    for step in (1, 2, 3):
        save(checkpoints, step)
    assert [path.name for path in (mirror.folder / "checkpoints").iterdir()] == ["step-00000003"]


def test_an_attempt_finds_nothing_of_another_in_its_working_copy(machine):
    mirror, _ = machine()
    (mirror.folder / "model").mkdir()
    (mirror.folder / "termination.json").write_text("{}")
    (mirror.folder / "data").mkdir()
    mirror, _ = machine()
    assert not (mirror.folder / "model").exists()
    assert not (mirror.folder / "termination.json").exists()
    assert (mirror.folder / "data").exists()


# Whose run it is


def test_attempts_are_numbered(machine):
    assert [machine(name)[0].number for name in ("a", "b", "c")] == [1, 2, 3]


def test_a_store_that_overwrites_what_is_to_be_new_is_refused(uri, tmp_path, monkeypatch):
    store = ObjectStore(uri)
    pipe = store._system.pipe_file
    monkeypatch.setattr(store._system, "pipe_file", lambda path, content, mode="": pipe(path, content))
    with pytest.raises(UsageError, match="use a store that heeds it, or a volume"):
        Mirror(store, tmp_path).claim()


def test_of_two_logs_that_of_the_checkpoint_counts(machine):
    mirror, checkpoints = machine()
    save(checkpoints, 1)
    mirror.store.write("metrics.jsonl", b'{"of": "another attempt"}\n')
    mirror, elsewhere = machine("second")
    log = mirror.folder / "metrics.jsonl"
    log.unlink()
    elsewhere.agreed(WORLD)
    assert log.read_text() == '{"step": 1}\n'
    mirror.store.write("metrics.jsonl", b'{"step": 1}\n{"step": 2}\n')  # the same, and then more
    log.unlink()
    elsewhere.agreed(WORLD)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'


# Models


def model_in(mirror, name, text):
    with new_folder(mirror.folder / name) as folder:
        folder.write("config.json", b"{}")
        folder.write("model.safetensors", text)


def test_a_reader_never_finds_half_a_model(machine, monkeypatch):
    mirror, _ = machine()
    model_in(mirror, "exports/one", b"first")
    asked, upload, remove = [], mirror.store.upload, mirror.store.remove

    def uploading(file, name):
        asked.append(f"put {file.name}")
        upload(file, name)

    def removing(names):
        names = list(names)
        asked.extend(f"remove {name.rpartition('/')[2]}" for name in names)
        remove(names)

    monkeypatch.setattr(mirror.store, "upload", uploading)
    monkeypatch.setattr(mirror.store, "remove", removing)
    mirror.publish("exports/one")
    written = ["put model.safetensors", "put checksums.json", "put config.json"]
    assert asked[-3:] == written
    assert mirror.holds("exports/one")
    asked.clear()
    mirror.publish("exports/one")
    assert asked == []  # it is there
    model_in(mirror, "exports/one", b"second")
    mirror.publish("exports/one")
    assert asked == ["remove config.json", "remove checksums.json", *written]


def test_a_model_is_brought_to_another_machine_and_verified(machine):
    mirror, _ = machine()
    model_in(mirror, "exports/one", b"first")
    mirror.publish("exports/one")
    elsewhere, _ = machine("second")
    elsewhere.bring("exports/one")
    assert (elsewhere.folder / "exports/one/model.safetensors").read_bytes() == b"first"
    elsewhere.store.write("exports/one/model.safetensors", b"f1rst")
    third, _ = machine("third")
    with pytest.raises(ModelError, match="corrupted: its SHA-256 is not the one"):
        third.bring("exports/one")
    assert not (third.folder / "exports/one").exists()
    with pytest.raises(ModelError, match="begin the run anew"):
        third.bring("exports/two")


def job_from(uri, **model):
    manifest = train_job(model={"init": {"uri": "/m"}, **model})
    job = DiffusionTrainJob.from_json(json.dumps(manifest))
    init = job.spec.model.init.model_copy(update={"uri": uri})
    return job.spec.model_copy(update={"model": job.spec.model.model_copy(update={"init": init})})


def test_weights_of_a_first_model_are_copied_when_they_are_needed(uri, tmp_path):
    store = ObjectStore(uri)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        store.write(name, name.encode())
    environment = {"UNMASK_SCRATCH": str(tmp_path)}
    copies = ModelCopies(job_from(uri), environment)
    folder = Path(copies.described().model.init.uri)
    assert sorted(path.name for path in folder.glob("[a-z]*")) == ["config.json", "tokenizer.json"]
    copies.complete()
    assert (folder / "model.safetensors").read_bytes() == b"model.safetensors"
    store.write("model.safetensors", b"other")
    copies = ModelCopies(job_from(uri), environment)
    assert Path(copies.described().model.init.uri) != folder


def test_a_model_that_is_not_complete_is_none(uri, tmp_path):
    ObjectStore(uri).write("model.safetensors", b"half")
    with pytest.raises(ModelError, match=r"holds no config\.json, so it is no model, or one that"):
        ModelCopies(job_from(uri), {"UNMASK_SCRATCH": str(tmp_path)}).described()


# Fetching


def test_a_run_is_fetched_and_verified(machine, uri, tmp_path):
    mirror, checkpoints = machine()
    save(checkpoints, 1)
    model_in(mirror, "model", b"first")
    mirror.publish("model")
    done = fetch(uri, tmp_path / "copy")
    assert done.verified == 3
    assert (tmp_path / "copy" / "model" / "config.json").exists()
    with pytest.raises(UsageError, match="exists already"):
        fetch(uri, tmp_path / "copy")
    mirror.store.write("model/model.safetensors", b"f1rst")
    with pytest.raises(ModelError, match="corrupted"):
        fetch(uri, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(ModelError, match="holds nothing"):
        fetch(f"{uri}/nothing", tmp_path / "other")
    with pytest.raises(UsageError, match="not in an object store"):
        fetch("/a/path", tmp_path / "other")


def test_what_is_there_is_not_fetched_again_where_that_is_asked_for(machine, uri, tmp_path, monkeypatch):
    mirror, _ = machine()
    model_in(mirror, "model", b"first")
    mirror.publish("model")
    target = tmp_path / "copies" / "one"
    first = fetch(f"{uri}/model", target, if_missing=True)
    assert first is not None and first.files > 0
    inside = (target / "model.safetensors").stat().st_mtime_ns
    assert fetch(f"{uri}/model", target, if_missing=True) is None
    assert (target / "model.safetensors").stat().st_mtime_ns == inside
    other, download = tmp_path / "copies" / "other", ObjectStore.download

    def while_another_is_faster(*values):
        monkeypatch.setattr(ObjectStore, "download", download)
        fetch(f"{uri}/model", other)
        download(*values)

    monkeypatch.setattr(ObjectStore, "download", while_another_is_faster)
    assert fetch(f"{uri}/model", other, if_missing=True) is None
    assert (other / "config.json").exists()
    assert sorted(path.name for path in other.parent.iterdir()) == ["one", "other"], "nothing is left over"


# The store itself


def failing(system, monkeypatch, name, times, error, *, after=False):
    usual, left = getattr(system, name), [times]

    def spoilt(*values, **options):
        if left[0]:
            left[0] -= 1
            if after:
                usual(*values, **options)
            raise error
        return usual(*values, **options)

    monkeypatch.setattr(system, name, spoilt)


def test_what_fails_now_and_then_is_tried_again_later_and_later(uri, monkeypatch):
    waits = []
    store = ObjectStore(uri, tries=4, wait=waits.append)
    failing(store._system, monkeypatch, "pipe_file", 3, OSError("slow down"))
    store.write("a", b"1")
    assert waits == [0.5, 1.0, 2.0]
    assert store.read("a") == b"1"


def test_what_fails_for_good_says_so(uri, monkeypatch):
    store = ObjectStore(uri, tries=2, wait=lambda seconds: None)
    failing(store._system, monkeypatch, "cat_file", 9, ConnectionError("no route"))
    with pytest.raises(StoreError, match=r"cannot read .*/a: ConnectionError: no route; tried 2 times"):
        store.read("a")
    waits = []
    store = ObjectStore(uri, wait=waits.append)
    with pytest.raises(FileNotFoundError):
        store.read("nothing")
    assert waits == []  # that does not change by waiting


def test_a_creation_whose_answer_is_lost_has_happened_all_the_same(uri, monkeypatch):
    store = ObjectStore(uri, wait=lambda seconds: None)
    failing(store._system, monkeypatch, "pipe_file", 1, OSError("timed out"), after=True)
    assert store.create("a", b"mine")
    assert not store.create("a", b"theirs")
    assert store.read("a") == b"mine"


def test_names_and_sizes_of_what_lies_below(uri):
    store = ObjectStore(uri)
    assert store.sizes() == {}
    for name in ("a", "b/c", "b/d/e", "bb/f"):
        store.write(name, name.encode())
    assert store.sizes() == {"a": 1, "b/c": 3, "b/d/e": 5, "bb/f": 4}
    assert store.sizes("b") == {"b/c": 3, "b/d/e": 5}
    store.remove(["a", "nothing"])
    assert "a" not in store.sizes()


def test_a_working_copy_is_one_uris_own():
    environment = {"UNMASK_SCRATCH": "/scratch"}
    first = working_folder("s3://bucket/team/run", environment)
    assert str(first).startswith("/scratch/bucket-team-run-")
    assert first == working_folder("s3://bucket/team/run/", environment)
    assert first != working_folder("gs://bucket/team/run", environment)
    assert str(working_folder("/runs/one", environment)) == "/runs/one"
