"""Adapters: what they compute, what has a gradient, what is saved, and what is written in the end."""

import pytest
import torch
from safetensors.torch import load_file

from support.models import packed_row, random_tokens, tiny_model
from support.training import training_job
from unmask.diffusion import layout
from unmask.diffusion.noise import NoiseConfig, corrupt
from unmask.errors import ModelError, UsageError
from unmask.models import loading
from unmask.models.loading import build, weights_digest
from unmask.models.lora import adapted_layers, attach, held
from unmask.models.shape import adapters_of, shape_of
from unmask.training.adapters import AdaptedWeights
from unmask.training.arrangement import first_weights
from unmask.training.checkpoints import CheckpointStore
from unmask.training.distributed import World
from unmask.training.learner import Learner
from unmask.training.manifest import TrainingState
from unmask.training.merging import RunCheckpoint
from unmask.training.sizing.memory import states_of
from unmask.training.steps import gradient_step, objective_sum
from unmask_api.train_job import LoRA

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
BOTH = LoRA(rank=4, alpha="8")
KINDS = [("attention",), ("feedForward",), ("attention", "feedForward")]


def inputs():
    rows = packed_row(random_tokens(20), random_tokens(12, seed=1), length=32)
    corruption = corrupt(rows, NoiseConfig(low=0.3, high=0.8), seed=1, block_length=4)
    return layout.two_copy(rows, corruption, block_length=4, mask_token_id=63)


def adapted(*, dtype=torch.float64, targets=("attention", "feedForward"), learnt=True):
    """A tiny model with adapters that have learnt something."""
    model = attach(tiny_model(dtype=dtype), rank=4, alpha=8.0, targets=targets, seed=3)
    if learnt:
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for layer in adapted_layers(model).values():
                layer.up.copy_(torch.empty(layer.up.shape).normal_(std=0.1, generator=generator))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_adapters_change_nothing_and_are_float32(dtype):
    plain, model = tiny_model(dtype=dtype), adapted(dtype=dtype, learnt=False)
    assert torch.equal(objective_sum(plain, inputs()), objective_sum(model, inputs()))
    for name, parameter in model.named_parameters():
        frozen = not name.endswith((".down", ".up"))
        assert parameter.requires_grad != frozen
        assert frozen or parameter.dtype == torch.float32
    assert {name: value.dtype for name, value in plain.named_parameters()}.items() <= {
        name: value.dtype for name, value in model.named_parameters()
    }.items()


@pytest.mark.parametrize("targets", KINDS)
def test_gradients_are_those_of_the_merged_matrices_times_the_other_factor(targets):
    model = adapted(targets=targets)
    objective_sum(model, inputs()).backward()
    merged = tiny_model()
    layers = adapted_layers(model)
    state = {f"{name}.weight": layer.merged() for name, layer in layers.items()}
    merged.load_state_dict(state, strict=False)
    loss = objective_sum(merged, inputs())
    loss.backward()
    torch.testing.assert_close(objective_sum(model, inputs()), loss, rtol=1e-12, atol=1e-12)
    whole = dict(merged.named_parameters())
    for name, layer in layers.items():
        slow = whole[f"{name}.weight"].grad
        torch.testing.assert_close(layer.up.grad, 2.0 * slow @ layer.down.T, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(layer.down.grad, 2.0 * layer.up.T @ slow, rtol=1e-9, atol=1e-12)
        assert layer.weight.grad is None
    kinds = {name.rsplit(".", 1)[0].split(".", 2)[2] for name in layers}
    assert any("attention" in kind for kind in kinds) == ("attention" in targets)
    assert any("feed_forward" in kind for kind in kinds) == ("feedForward" in targets)
    assert not any(name.endswith((".experts", ".router")) for name in layers)


def learner_of(model, tmp_path, *, precision="fp32"):
    job = training_job(tmp_path, {"spec.precision": precision})
    return Learner(AdaptedWeights(model, BOTH, seed=3), job.spec)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_adapters_move_are_saved_and_come_back(tmp_path, dtype):
    learner = learner_of(tiny_model(dtype=dtype), tmp_path)
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    for _ in range(3):
        totals = gradient_step(learner.weights, iter([inputs()]), ALONE, stop=False)
        assert learner.gradient_norm(totals) > 0
        learner.step(totals, 1e-2, freeze_router_bias=True)
    for name, value in learner.model.state_dict().items():
        assert torch.equal(value, before[name]) != name.endswith((".down", ".up")), name
    saved = dict(learner.tensors())
    small = [name for name in saved if name.startswith("model.")]
    assert small
    assert all(name.endswith((".down", ".up")) for name in small)
    path = save(learner, tmp_path / "checkpoints")
    other = learner_of(tiny_model(dtype=dtype), tmp_path)
    other.restore(path)
    for name, value in other.tensors():
        assert torch.equal(value, saved[name]), name
    assert torch.equal(objective_sum(other.model, inputs()), objective_sum(learner.model, inputs()))
    with pytest.raises(UsageError, match="holds adapters alone"):
        RunCheckpoint(path)


def save(learner, folder):
    state = TrainingState.model_validate(
        {"stage": 0, "stage_step": 3, "cursor": 0, "stage_seconds": 0.0}, strict=False
    )
    return CheckpointStore(folder, keep_last=1).save(
        step=3, state=state, job={}, config=learner.config(), tensors=learner.tensors()
    )


def test_the_state_is_as_large_as_is_planned(tmp_path):
    for dtype, precision in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        learner = learner_of(tiny_model(dtype=dtype), tmp_path)
        shape = shape_of(learner.model.config)
        gradient_step(learner.weights, iter([inputs()]), ALONE, stop=False)
        parameters = sum(value.nbytes for value in learner.model.parameters())
        optimiser = sum(tensor.nbytes for name, tensor in learner.tensors() if name.startswith("optimizer."))
        held_bytes = (parameters, learner.weights.gradient.nbytes, optimiser)
        assert held_bytes == states_of(shape, precision, None, BOTH)
        assert adapters_of(shape, BOTH)[0] == learner.weights.gradient.numel()
        assert all(value.grad is None for value in learner.model.parameters() if not value.requires_grad)


def test_exports_have_the_adapters_merged_in(tmp_path):
    weights = AdaptedWeights(adapted(dtype=torch.float32), BOTH, seed=3)
    learnt = adapted(dtype=torch.float32)
    for name, layer in adapted_layers(weights.model).items():
        with torch.no_grad():
            layer.up.copy_(adapted_layers(learnt)[name].up)
            layer.down.copy_(adapted_layers(learnt)[name].down)
    weights.export(tmp_path / "model", companions={"note.txt": b"hello"})
    plain = loading.load(tmp_path / "model")
    assert not adapted_layers(plain)
    torch.testing.assert_close(
        objective_sum(plain, inputs()), objective_sum(weights.model, inputs()), rtol=1e-5, atol=1e-4
    )
    base = tiny_model(dtype=torch.float32)
    assert (tmp_path / "model" / "note.txt").read_bytes() == b"hello"
    ours = load_file(tmp_path / "model" / "model.safetensors")
    loading.save(base, tmp_path / "base")
    theirs = load_file(tmp_path / "base" / "model.safetensors")
    changed = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert changed == {name for name in ours if any(part in name for part in CHANGED)}


CHANGED = (
    "attention.query_key_value",
    "attention.dense",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
) + ("shared_experts",)


def test_a_reference_is_the_model_with_the_adapters_of_then(tmp_path):
    weights = AdaptedWeights(tiny_model(dtype=torch.float32), BOTH, seed=3)
    at_first = objective_sum(weights.model, inputs())
    weights.keep_reference(tmp_path / "reference")
    with torch.no_grad():
        for layer in adapted_layers(weights.model).values():
            layer.up += 0.1
    kept = weights.read_reference(tmp_path / "reference")
    assert objective_sum(weights.model, inputs()) != at_first
    with weights.as_of(kept) as frozen:
        assert not frozen.training
        assert torch.equal(objective_sum(frozen, inputs()), at_first)
    assert weights.model.training
    assert objective_sum(weights.model, inputs()) != at_first
    file = tmp_path / "reference" / "adapters.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ModelError, match="corrupted"):
        weights.read_reference(tmp_path / "reference")
    with pytest.raises(ModelError, match="no such reference"):
        weights.read_reference(tmp_path)


def test_held_adapters_are_let_go_of_when_something_fails():
    model = adapted()
    values = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    with pytest.raises(ZeroDivisionError), held(model, values):
        raise ZeroDivisionError
    assert all(layer.held is None for layer in adapted_layers(model).values())


def test_the_base_keeps_the_number_format_of_its_files(tmp_path):
    base = tmp_path / "base"
    loading.save(tiny_model(dtype=torch.bfloat16), base)
    changes = {"spec.model.init": {"uri": str(base)}, "spec.lora": {"rank": 2}}
    job = training_job(tmp_path, changes)
    with pytest.raises(UsageError, match=r"precision: got fp32, but .*base is in bfloat16.*convert"):
        first_weights(job.spec, tiny_model().config, ALONE)
    job = training_job(tmp_path, changes | {"spec.precision": "bf16"})
    weights = first_weights(job.spec, tiny_model().config, ALONE)
    assert weights.model.embedding.weight.dtype == torch.bfloat16
    assert {value.dtype for value in weights.named.values()} == {torch.float32}


def test_a_base_is_told_from_another_with_and_without_checksums(tmp_path):
    for seed, name in enumerate("ab"):
        loading.save(tiny_model(dtype=torch.float32, seed=seed), tmp_path / name)
    first, second = (weights_digest(tmp_path / name) for name in "ab")
    assert first != second
    (tmp_path / "a" / "checksums.json").unlink()
    assert weights_digest(tmp_path / "a") == first


def test_a_model_without_storage_can_have_adapters():
    model = attach(
        build(tiny_model().config, device="meta"), rank=2, alpha=1.0, targets=("attention",), seed=0
    )
    assert all(layer.down.is_meta for layer in adapted_layers(model).values())
