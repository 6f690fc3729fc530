"""The mean of checkpoints: equal to the slow obvious one, and refused where it has no meaning."""

import json
from contextlib import ExitStack, nullcontext

import pytest
import torch
from safetensors.torch import load_file

from support.folders import word_tokenizer
from support.models import tiny_model
from unmask.cli.main import main
from unmask.errors import ModelError, UsageError
from unmask.models import loading
from unmask.models.checkpoint_files import Checkpoint
from unmask.models.merging import merge
from unmask.training.boxes import Box
from unmask.training.checkpoints import CheckpointStore
from unmask.training.manifest import TrainingState
from unmask.training.merging import best_of, losses_of, open_checkpoint

pytestmark = pytest.mark.training


def saved(folder, *, seed, dtype=torch.float32, **changes):
    loading.save(tiny_model(dtype=dtype, seed=seed, **changes), folder)
    return folder


def mean_of(sources, target, **options):
    with ExitStack() as stack:
        opened = [stack.enter_context(Checkpoint(source)) for source in sources]
        merge(opened, target, companions={}, **options)


def merged(sources, target, **options):
    mean_of(sources, target, **options)
    return load_file(target / "model.safetensors")


def unmask(*arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_mean_is_the_slow_obvious_one_for_every_tensor(tmp_path, dtype, count):
    sources = [saved(tmp_path / f"{seed}", seed=seed, dtype=dtype) for seed in range(count)]
    means = merged(sources, tmp_path / "mean")
    files = [load_file(source / "model.safetensors") for source in sources]
    assert means.keys() == files[0].keys()
    for name, mean in means.items():
        obvious = sum(file[name].double() for file in files) / count
        assert mean.dtype == files[0][name].dtype
        assert torch.equal(mean, obvious.float().to(mean.dtype)), name
    assert any("experts.0" in name for name in means)
    bias = next(name for name in means if name.endswith("expert_bias"))
    assert not torch.equal(means[bias], files[0][bias])


def test_the_mean_of_copies_is_the_copy(tmp_path):
    source = saved(tmp_path / "one", seed=3)
    means = merged([source] * 7, tmp_path / "mean")
    own = load_file(source / "model.safetensors")
    assert all(torch.equal(means[name], own[name]) for name in own)


def test_what_is_written_loads_with_its_checksums_and_in_shards(tmp_path):
    sources = [saved(tmp_path / f"{seed}", seed=seed) for seed in range(2)]
    whole = merged(sources, tmp_path / "whole")
    mean_of(sources, tmp_path / "cut", max_shard_bytes=20_000)
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1
    for target in ("whole", "cut"):
        state = loading.load(tmp_path / target).state_dict()
        assert torch.equal(state["embedding.weight"], whole["model.word_embeddings.weight"])


def test_sources_of_two_dtypes_give_float32_and_routers_keep_theirs(tmp_path):
    wide, narrow = saved(tmp_path / "wide", seed=0), saved(tmp_path / "narrow", seed=1, dtype=torch.bfloat16)
    means = merged([wide, narrow], tmp_path / "mean")
    assert {mean.dtype for mean in means.values()} == {torch.float32}
    narrowed = merged([wide, wide], tmp_path / "narrowed", dtype=torch.bfloat16)
    routers = {name for name, mean in narrowed.items() if mean.dtype == torch.float32}
    assert routers == {name for name in narrowed if ".gate." in name}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3"),
        ({"rope_theta": 7.0}, "rope_theta is 7.0"),
        ({"architectures": ["BailingMoeV2ForCausalLM"]}, "architectures is"),
    ],
)
def test_another_model_is_refused_and_nothing_is_written(tmp_path, changes, says):
    sources = [saved(tmp_path / "a", seed=0), saved(tmp_path / "b", seed=1, **changes)]
    with pytest.raises(UsageError, match=f"b: {says}.*that of .*a is.*only checkpoints of one model"):
        merged(sources, tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_a_pickled_or_damaged_source_is_refused(tmp_path):
    good, bad = saved(tmp_path / "good", seed=0), saved(tmp_path / "bad", seed=1)
    file = bad / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ModelError, match="corrupted"):
        merged([good, bad], tmp_path / "mean")
    file.rename(bad / "pytorch_model.bin")
    (bad / "checksums.json").unlink()
    with pytest.raises(ModelError, match="pickled weights are never read"):
        merged([good, bad], tmp_path / "mean")


def test_a_checkpoint_of_a_run_in_parts_is_read_like_a_folder(tmp_path, monkeypatch):
    model = tiny_model(dtype=torch.float32, seed=5)
    path = stored_in_parts(model, tmp_path / "checkpoints")
    monkeypatch.setattr("unmask.training.merging.PIECE_BYTES", 256)
    with open_checkpoint(path) as source:
        merge([source, source], tmp_path / "mean", companions={})
        longest = max(source.tensors.values(), key=lambda tensor: tensor.nbytes)
        assert len(list(source.pieces(longest.name))) > 10
    state = loading.load(tmp_path / "mean").state_dict()
    assert all(torch.equal(state[name], own) for name, own in model.state_dict().items())


def stored_in_parts(model, folder):
    """A checkpoint whose tensors are cut in two along the first dimension."""
    store = CheckpointStore(folder, keep_last=9)
    state = TrainingState(stage=0, stage_step=7, cursor=0, stage_seconds=0.0)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}

    class World:
        """One process that writes both halves."""

        rank, leads = 0, True

        def together(self):
            return nullcontext()

        def all_bytes(self, own):
            return [own]

    def halves():
        for name, tensor in tensors.items():
            yield name, Box(tensor, tuple(tensor.shape), (0,) * tensor.ndim)

    return store.save_shares(
        World(), step=7, state=state, job={}, config=model.config.to_json_dict(), boxes=halves()
    ).path


def test_the_best_steps_are_those_of_least_loss_and_the_later_of_two_alike():
    losses = {3: 2.0, 6: 1.0, 9: 1.5, 12: 1.0, 15: 3.0}
    assert best_of(losses, 1) == [12]
    assert best_of(losses, 2) == [6, 12]
    assert best_of(losses, 3) == [6, 9, 12]
    lines = [
        {"kind": "eval", "step": 3, "stage": "a", "loss": 1.0},
        {"kind": "eval", "step": 6, "stage": "a", "loss": float("nan")},
        {"kind": "step", "step": 6, "stage": "a", "loss": 0.5},
        {"kind": "eval", "step": 7, "stage": "a", "loss": None},
        {"kind": "eval", "step": 9, "stage": "b", "loss": 0.1},
    ]
    assert losses_of(lines, "a") == {3: 1.0}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["target"], "give either checkpoints"),
        (["a", "target", "--run", "run"], "--run and --best go together"),
        (["a", "target", "--run", "run", "--best", "2"], "give either checkpoints"),
        (["target", "--best", "2"], "--run and --best go together"),
        (["target", "--run", "run", "--best", "2"], "cannot be read (No such file or directory)"),
        (["a", "a"], "exists already"),
        (["a", "nowhere", "target"], "nowhere"),
        (["a", "b", "target"], "tokenizer.json is not that of"),
        (["a", "step-00000001", "target"], "step-00000001: damaged"),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path, monkeypatch, capsys, arguments, says):
    for seed, name in enumerate("ab"):
        saved(tmp_path / name, seed=seed)
        word_tokenizer(40 + seed, eos=38, mask=39).save(str(tmp_path / name / "tokenizer.json"))
        (tmp_path / name / "checksums.json").unlink()
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "manifest.json").write_text(json.dumps({}))
    monkeypatch.chdir(tmp_path)
    assert unmask("merge", *arguments) != 0
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "target").exists()


def test_the_command_writes_the_mean_with_the_tokenizer(tmp_path, capsys):
    sources = [saved(tmp_path / name, seed=seed) for seed, name in enumerate("abc")]
    word_tokenizer(64, eos=62, mask=63).save(str(sources[1] / "tokenizer.json"))
    (sources[1] / "checksums.json").unlink()
    assert unmask("merge", *sources, tmp_path / "mean") == 0
    assert "the mean of 3 x LLaDA2MoeModelLM" in capsys.readouterr().out
    again = merged(sources, tmp_path / "again")
    means = load_file(tmp_path / "mean" / "model.safetensors")
    assert all(torch.equal(means[name], mean) for name, mean in again.items())
    assert (tmp_path / "mean" / "tokenizer.json").is_file()
