"""Training shared out over ranks computes what one process computes, and its checkpoints fit all."""

import itertools
import random
import shutil

import pytest
import torch

from support import counts
from support.models import TINY
from support.ranks import inputs_noted, train_to_the_end
from support.sharding import (
    ARRANGEMENTS,
    block_job,
    export_sizes,
    first_gradient,
    kill_at_a_random_moment,
    save_twice,
    stop_after,
)
from support.training import metrics, training_job
from unmask.models.loading import build, load
from unmask.models.registry import parse_config
from unmask.training.checkpoints import CheckpointStore

pytestmark = pytest.mark.training

SLOW = pytest.mark.slow
FIRST = ("full x2", "experts 2 x2")
# Of four ranks every run tries the one that has all kinds of parallelism, and the full run the others, too.
NAMES = [
    name if name in FIRST else pytest.param(name, marks=SLOW)
    for name in ARRANGEMENTS
    if counts.FULL or name in (*FIRST, next(iter(ARRANGEMENTS)), "hybrid, experts 2 x4")
]
# Changes of the arrangement that the full run alone tries; one that holds parts of them is in every run.
MORE_CHANGES = [
    ("replicated x2", "hybrid, experts 2 x4", "replicated x2"),
    ("replicated x2", "one", "replicated x4"),
    ("full x2", "one", "full x4"),
    ("experts 4 x4", "one", "experts 2 x4"),
]
SHARED_OUT = [name for name in NAMES if name != NAMES[0]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def one_process(folder):
    """The gradient of the first step, the log of ten steps, and the run folder, of one process."""
    job = block_job(folder, "one", {}, steady=True)
    gradient = first_gradient(block_job(folder, "one-gradient", {}), ranks=1)
    train_to_the_end(job)
    return gradient, metrics(folder / "one")


def losses(lines):
    return [line["loss"] for line in lines if line["kind"] == "step"]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_one_process_expert_by_expert(folder, one_process, name, record_measurement):
    ranks, parallelism = ARRANGEMENTS[name]
    (expected, reference), _ = one_process
    found, figures = first_gradient(block_job(folder, f"gradient {name}", parallelism), ranks=ranks)
    assert figures["loss"] == pytest.approx(reference["loss"], abs=5e-7)
    exact = float(sum(tensor.double().square().sum() for tensor in expected.values())) ** 0.5
    assert figures["norm"] == pytest.approx(exact, rel=5e-6)
    assert figures["tokens"] == reference["tokens"]
    worst = 0.0
    for key, theirs in expected.items():
        experts = zip(theirs, found[key], strict=True) if ".experts." in key else [(theirs, found[key])]
        for one, other in experts:
            worst = max(worst, float((one - other).abs().max()))
            assert torch.allclose(one, other, rtol=0, atol=1e-6), key
    assert max(float(theirs.abs().max()) for theirs in expected.values()) > 1e-2, (
        "there is something to compare"
    )
    record_measurement(f"largest difference of a gradient from one process's, {name}", worst)
    if parallelism.get("shard"):
        whole = sum(theirs.numel() for theirs in expected.values())
        assert max(figures["held"]) < 1.1 * whole * parallelism.get("replicas", 1) / ranks


@pytest.mark.parametrize("name", SHARED_OUT)
def test_ten_steps_have_the_losses_of_one_process(folder, one_process, name, record_measurement):
    ranks, parallelism = ARRANGEMENTS[name]
    train_to_the_end(block_job(folder, name, parallelism, steady=True), ranks=ranks)
    pairs = list(zip(losses(one_process[1]), losses(metrics(folder / name)), strict=True))
    assert len(pairs) == 10
    worst = max(abs(one - other) for one, other in pairs)
    record_measurement(f"largest difference of a loss from one process's in ten steps, {name}", worst)
    assert worst <= 5e-7
    assert len({one for one, _ in pairs}) == 10, "the weights change"


@pytest.mark.parametrize(
    "name",
    [
        "replicated x2",
        "experts 2 x2",
        *(pytest.param(name, marks=SLOW) for name in ("full x2", "experts 4 x4") if counts.FULL),
    ],
)
def test_computing_layers_again_changes_no_bit(folder, name):
    ranks, parallelism = ARRANGEMENTS[name]
    for run, extra in (("kept", {}), ("again", {"activationCheckpointing": "Full"})):
        train_to_the_end(block_job(folder, f"{name} {run}", parallelism | extra, steps=5), ranks=ranks)
    assert metrics(folder / f"{name} kept") == metrics(folder / f"{name} again")
    one, other = (load(folder / f"{name} {run}" / "model").state_dict() for run in ("kept", "again"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def whole_checkpoint(run):
    """The newest checkpoint's model as one process would read it, and the checkpoint."""
    checkpoint = CheckpointStore(run / "checkpoints", keep_last=1).newest()
    model = build(parse_config(checkpoint.manifest.config))
    targets = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, entry in checkpoint.manifest.tensors.items():
        if name not in targets:
            targets[name] = torch.full(entry.shape, torch.nan)
    checkpoint.read_into(targets)
    return targets, checkpoint


def assert_same_gradient(one, other):
    for key, theirs in one[0].items():
        assert torch.allclose(theirs, other[0][key], rtol=0, atol=1e-6), key
    assert one[1]["loss"] == pytest.approx(other[1]["loss"], abs=5e-7)


def test_a_model_that_is_loaded_is_the_same_shared_out(folder):
    config = TINY | {"initializer_range": 0.2}
    source = folder / "source"
    train_to_the_end(block_job(folder, "source", {}, steps=1, **{"model.init.config": config}))
    model = {"init": {"uri": str(source / "model")}}
    one, other = (
        first_gradient(block_job(folder, f"loaded {ranks}", parallelism, model=model), ranks=ranks)
        for ranks, parallelism in ((1, {}), ARRANGEMENTS["experts 2 x2"])
    )
    assert_same_gradient(one, other)
    assert one[1]["loss"] != first_gradient(block_job(folder, "not loaded", {}), ranks=1)[1]["loss"]


def test_a_dense_model_whose_output_layer_is_its_embedding_is_the_same_shared_out(folder):
    config = {key: value for key, value in TINY.items() if "expert" not in key and "group" not in key} | {
        "architectures": ["SDARForCausalLM"],
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }
    one, other = (
        first_gradient(
            block_job(folder, f"tied {ranks}", parallelism, **{"model.init.config": config}), ranks=ranks
        )
        for ranks, parallelism in ((1, {}), ARRANGEMENTS["full x2"])
    )
    assert "head.weight" not in one[0]
    assert_same_gradient(one, other)


def test_a_model_is_written_one_published_tensor_at_a_time(folder):
    ranks, parallelism = ARRANGEMENTS["experts 2 x2"]
    sizes = export_sizes(block_job(folder, "exported", parallelism), ranks=ranks)
    assert sizes["summed"] == sizes["slots"]
    written = load(folder / "exported" / "model")
    whole = build(parse_config(TINY), seed=7)
    for key, tensor in whole.state_dict().items():
        assert torch.equal(written.state_dict()[key], tensor), key


@pytest.mark.parametrize("name", SHARED_OUT)
def test_every_rank_writes_its_part_and_the_model_written_is_the_checkpoint_bit_for_bit(folder, name):
    ranks, parallelism = ARRANGEMENTS[name]
    train_to_the_end(block_job(folder, f"saved {name}", parallelism, steps=2), ranks=ranks)
    targets, checkpoint = whole_checkpoint(folder / f"saved {name}")
    model = load(folder / f"saved {name}" / "model")
    for key, tensor in model.state_dict().items():
        assert torch.equal(targets[f"model.{key}"].view(torch.int32), tensor.view(torch.int32)), key
    assert not any(tensor.isnan().any() for tensor in targets.values())
    writers = {name.split("-shard-")[0] for name in checkpoint.manifest.files}
    replicas = parallelism.get("replicas", 1)
    assert len(writers) == ranks // replicas
    experts = [
        entry
        for key, entry in checkpoint.manifest.tensors.items()
        if key.endswith("experts.gate_up_proj.exp_avg")
    ]
    assert len(experts) == TINY["num_hidden_layers"] - 1
    for entry in experts:
        held = [range(part.offsets[0], part.offsets[0] + part.shape[0]) for part in entry.parts]
        assert set(itertools.chain(*held)) == set(range(TINY["num_experts"]))
        assert len(entry.parts) == ranks // replicas


WITH_ONE: dict[str, tuple[int, dict[str, object]]] = {
    "one": (1, {}),
    "replicated x4": (4, {}),
    **ARRANGEMENTS,
}
AFTER_A_CHANGE = 10
"""Steps after a change of ranks in which losses are held to those of a run without one."""


@pytest.mark.parametrize(
    "names",
    [
        ("full x2", "one", "experts 2 x2", "one"),
        *(pytest.param(names, marks=SLOW) for names in MORE_CHANGES if counts.FULL),
    ],
    ids=", ".join,
)
@pytest.mark.timeout(300)
def test_a_run_goes_on_with_other_ranks_and_another_arrangement(folder, names, record_measurement):
    """With the same documents under the same noise, bit for bit, and losses that differ by 1e-6 at most."""
    steps = 12 * len(names)
    whole = folder / f"undisturbed-{steps}"
    if not whole.exists():
        job = block_job(folder, whole.name, {}, steps=steps, steady=True)
        train_to_the_end(job, note_inputs=True)
    name = f"resized {', '.join(names)}"
    changes = []
    for number, arrangement in enumerate(names, start=1):
        ranks, parallelism = WITH_ONE[arrangement]
        job = block_job(folder, name, parallelism, steps=steps, steady=True)
        if number < len(names):
            changes.append(stop_after(job, 12 * number - 1, ranks=ranks, note_inputs=True))
        else:
            train_to_the_end(job, ranks=ranks, note_inputs=True)
    inputs = inputs_noted(folder / name, ranks=4)
    assert inputs == inputs_noted(whole, ranks=1)
    assert len(set(inputs)) == len(inputs) == 4 * steps, "a line for each row of each step"
    undisturbed, resized = metrics(whole), metrics(folder / name)
    differences = {}
    for theirs, ours in zip(undisturbed, resized, strict=True):
        assert (theirs["kind"], theirs["step"], theirs.get("tokens")) == (
            ours["kind"],
            ours["step"],
            ours.get("tokens"),
        )
        if theirs["kind"] == "step":
            differences[theirs["step"]] = abs(theirs["loss"] - ours["loss"])
    after = [differences[change + step] for change in changes for step in range(1, AFTER_A_CHANGE + 1)]
    assert len(after) == AFTER_A_CHANGE * (len(names) - 1)
    record_measurement(
        f"largest difference of a loss in ten steps after a change of ranks, {name}", max(after)
    )
    assert max(after) <= 1e-6
    assert max(differences.values()) <= 1e-6


@pytest.mark.parametrize(
    "name", ["hybrid, experts 2 x4", *(one for one in ("full x2", "experts 2 x2") if counts.FULL)]
)
@pytest.mark.timeout(240)
@pytest.mark.slow
def test_all_objectives_and_a_conversion_stopped_and_started_again_bit_for_bit(folder, name):
    ranks, parallelism = ARRANGEMENTS[name]

    def job(run, parallelism):
        values = {
            "spec.checkpoint.uri": str(folder / run),
            "spec.parallelism": {"microBatchRows": 1} | parallelism,
        }
        return training_job(folder, values)

    if not (folder / "all").exists():
        train_to_the_end(job("all", {}))
    whole, stopped = f"all {name}", f"all stopped {name}"
    train_to_the_end(job(whole, parallelism), ranks=ranks)
    stop_after(job(stopped, parallelism), 8, ranks=ranks)
    train_to_the_end(job(stopped, parallelism), ranks=ranks)
    assert metrics(folder / stopped) == metrics(folder / whole)
    for model in ("model", "exports/blocks"):
        one, other = (folder / run / model / "model.safetensors" for run in (stopped, whole))
        assert one.read_bytes() == other.read_bytes()
    for theirs, ours in zip(metrics(folder / "all"), metrics(folder / whole), strict=True):
        assert theirs["kind"] == ours["kind"]
        if "loss" in theirs:
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)


@pytest.mark.parametrize("name", ["experts 2 x2", "full x2"])
@pytest.mark.slow
@pytest.mark.timeout(600 if not counts.FULL else 3600)
def test_a_run_killed_at_random_moments_computes_what_an_undisturbed_run_does(
    folder, name, record_measurement
):
    ranks, parallelism = ARRANGEMENTS[name]
    wanted = counts.of(sample=2, full=60)

    def job(run):
        checkpoint = {"uri": str(folder / run), "everySteps": 1, "keepLast": 2}
        return block_job(folder, run, parallelism, steps=20, checkpoint=checkpoint)

    train_to_the_end(job(f"quiet {name}"), ranks=ranks)
    chance, kills = random.Random(ranks), 0
    while kills < wanted:
        shutil.rmtree(folder / f"killed {name}", ignore_errors=True)
        while kills < wanted:
            if not kill_at_a_random_moment(job(f"killed {name}"), chance, ranks=ranks):
                break
            kills += 1
        else:
            train_to_the_end(job(f"killed {name}"), ranks=ranks)
        assert metrics(folder / f"killed {name}") == metrics(folder / f"quiet {name}")
        one, other = (folder / f"{run} {name}" / "model" / "model.safetensors" for run in ("quiet", "killed"))
        assert one.read_bytes() == other.read_bytes()
    record_measurement(f"kills of a run shared out, {name}", kills)


def test_a_checkpoint_that_one_rank_cannot_write_fails_in_all_and_the_one_before_stands(folder):
    said = save_twice(folder / "room", ranks=2)
    assert [one[0] for one in said] == ["saved", "saved"]
    assert said[0][1] == said[1][1]
    assert "no space left on device" in said[0][1]
    assert [path.name for path in (folder / "room" / "checkpoints").iterdir()] == ["step-00000001"]
    rows = torch.empty(4, 3)
    CheckpointStore(folder / "room" / "checkpoints", keep_last=2).newest().read_into({"rows": rows})
    assert rows[:, 0].tolist() == [1, 1, 2, 2]


def test_in_bf16_routers_stay_in_float32_and_losses_are_those_of_replicated_bf16(folder):
    runs = {"plain": (1, {}), "shared": ARRANGEMENTS["experts 2 x2"]}
    for run, (ranks, parallelism) in runs.items():
        job = block_job(folder, f"bf16 {run}", parallelism, steps=4, precision="bf16")
        train_to_the_end(job, ranks=ranks)
    plain, shared = (losses(metrics(folder / f"bf16 {run}")) for run in runs)
    assert shared == pytest.approx(plain, rel=5e-3)
    assert {str(tensor.dtype) for tensor in load(folder / "bf16 shared" / "model").parameters()} == {
        "torch.float32"
    }
