"""Planned arithmetic and memory against what really is computed and held."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from support.manifests import TINY_CONFIG, changed, train_job
from support.models import TINY, TINY_CANVAS, packed_row, random_tokens
from unmask.attention import may_attend
from unmask.diffusion import layout, noise
from unmask.diffusion.schedule import BlockSchedule
from unmask.errors import UsageError
from unmask.models.conversion import converted_config
from unmask.models.inspection import inspect_checkpoint, parameter_counts
from unmask.models.loading import build
from unmask.models.lora import attach
from unmask.models.published import PUBLISHED, published_config
from unmask.models.registry import parse_config
from unmask.models.shape import adapters_of, shape_of
from unmask.training.learner import Learner
from unmask.training.sizing.devices import device_named
from unmask.training.sizing.estimate import (
    Assumptions,
    conversion_bytes,
    estimate,
    plan_of,
    stage_configs,
    stage_memory,
)
from unmask.training.sizing.flops import flops_of
from unmask.training.sizing.memory import activations_of_layer, memory_of, piece, states_of
from unmask.training.sizing.remedies import remedy_for
from unmask.training.sizing.work import Documents, Work, work_of_row
from unmask.training.steps import objective_sum
from unmask_api.train_job import Balance, DiffusionTrainJob, LoRA, Stage
from unmask_operator.launch.admission import admit

LLAMA = {
    "architectures": ["A2DLlamaLMHeadModel"],
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "mask_token_id": 63,
    "eos_token_id": 62,
}
WIDER = TINY | {"num_experts": 16, "hidden_size": 64, "moe_intermediate_size": 32}
MODELS = {"dense": LLAMA, "tied": LLAMA | {"tie_word_embeddings": True}, "experts": WIDER, "all": TINY_CANVAS}
PUBLISHED_FOLDER = Path(__file__).parents[1] / "support" / "published"


def spec_of(**spec):
    return DiffusionTrainJob.from_json(json.dumps(train_job(**spec))).spec


def stage_of(objective, **fields):
    blocks = {"blockSizes": [8]} if objective in ("bdlm", "sft", "dpo") else {}
    values = {"name": "s", "objective": objective, "steps": 4, "length": 64, "rowsPerStep": 2}
    rate = {"learningRate": {"peak": "1e-3"}}
    return Stage.from_json(json.dumps(values | rate | blocks | fields))


def inputs_of(objective, rows, *, seed=1, block_length=8, **config):
    if objective == "ar":
        return layout.causal(rows)
    corruption = noise.corrupt(rows, noise.NoiseConfig(**config), seed=seed, block_length=block_length)
    if objective == "mdlm":
        return layout.full_sequence(rows, corruption, mask_token_id=63)
    return layout.two_copy(rows, corruption, block_length=block_length, mask_token_id=63)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_a_shape_has_the_parameters_of_the_model(config):
    model, shape = build(parse_config(config)), shape_of(parse_config(config))
    sizes = [parameter.numel() for parameter in model.parameters()]
    assert shape.parameters == sum(sizes)
    stacks = [tuple(parameter.shape) for name, parameter in model.named_parameters() if ".experts." in name]
    assert [stack for layer in shape.layers for stack in layer.stacks] == stacks
    named = [(name, parameter) for name, parameter in model.named_parameters()]
    assert sorted((one.rows, one.count, one.expert) for one in shape.stored) == sorted(
        (parameter.shape[0], parameter.numel(), ".experts." in name) for name, parameter in named
    )
    assert shape.routers == sum(router.weight.numel() for router in model.routers())


@pytest.mark.parametrize("objective", ["ar", "mdlm", "bdlm"])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_arithmetic_is_what_torch_counts(config, objective):
    """In float64, where experts are plain products, which torch's counter knows."""
    model = build(parse_config(config), dtype=torch.float64).train()
    inputs = inputs_of(objective, packed_row(random_tokens(64), length=64))
    with FlopCounterMode(display=False) as counter:
        objective_sum(model, inputs).backward()
    counted = {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}
    dense_pairs = inputs.ids.shape[1] ** 2  # the kernel on a CPU computes what the mask forbids, too
    work = Work(tokens=64, positions=inputs.ids.shape[1], predictions=len(inputs.predict), pairs=dense_pairs)
    flops = flops_of(shape_of(model.config), work)
    assert counted.pop("aten.mm") == flops.linear + flops.head
    forward, backward = sorted(counted.values())
    assert forward == flops.attention / 3
    assert backward == 2.5 * forward  # the kernel computes the scores again: twice is what is useful


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("documents", [Documents(tokens=64), Documents(tokens=32, prompt=13)])
@pytest.mark.parametrize("objective", ["ar", "mdlm", "bdlm", "sft"])
def test_positions_and_pairs_are_those_of_the_layout(objective, documents, views):
    if objective == "ar":
        stage = stage_of(objective, supervise="Response")
    else:
        band = {"low": "0", "high": "1", "scope": "Block", "weight": "Elbo", "views": views}
        stage = stage_of(objective, supervise="Response", noise=band)
    count = 64 // documents.tokens
    rows = packed_row(
        *([random_tokens(documents.tokens)] * count), length=64, prompt=[documents.prompt] * count
    )
    inputs = inputs_of(objective, rows, views=views)
    work = work_of_row(stage, documents, block_length=8 if stage.block_sizes else None)
    assert work.positions == inputs.ids.numel()
    assert work.pairs == may_attend(inputs.metadata, inputs.metadata).sum()
    assert work.tokens == 64
    if objective == "ar":
        assert work.predictions == len(inputs.predict)


@pytest.mark.parametrize("documents", [Documents(tokens=32), Documents(tokens=16, prompt=9), None])
def test_a_pair_of_answers_costs_what_both_cost(documents):
    pair = work_of_row(stage_of("dpo"), documents, block_length=8)
    rows = packed_row(
        *[random_tokens(width) for width in [(documents or Documents(tokens=32)).tokens] * 2]
        * (2 if documents and documents.tokens == 16 else 1),
        length=64,
        prompt=[documents.prompt if documents else 0] * (4 if documents and documents.tokens == 16 else 2),
    )
    inputs = inputs_of("dpo", rows)
    assert (pair.positions, pair.tokens) == (inputs.ids.numel(), 64)
    assert pair.pairs == may_attend(inputs.metadata, inputs.metadata).sum()
    with pytest.raises(UsageError, match="holds 64 and both answers of a pair"):
        work_of_row(stage_of("dpo"), Documents(tokens=40), block_length=8)


@pytest.mark.parametrize("config", [LLAMA, WIDER], ids=["dense", "experts"])
def test_adapters_cost_two_passes_over_the_rest_and_three_over_themselves(config):
    """As torch counts it; the first layer's input has no gradient, which is what the plan has too much."""
    model = build(parse_config(config), dtype=torch.float64)
    lora = LoRA(rank=4)
    attach(model, rank=4, alpha=8.0, targets=lora.targets, seed=0).train()
    shape = shape_of(model.config)
    inputs = inputs_of("bdlm", packed_row(random_tokens(64), length=64))
    with FlopCounterMode(display=False) as counter:
        objective_sum(model, inputs).backward()
    counted = {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}
    work = Work(tokens=64, positions=inputs.ids.shape[1], predictions=len(inputs.predict), pairs=1)
    planned = flops_of(shape, work, adapters=adapters_of(shape, lora)[0])
    first = 2 * work.positions * (shape.layers[0].attention - shape.heads * shape.head_dim * shape.hidden)
    products = counted["aten.mm"]
    assert planned.linear + planned.head - 2 * first <= products <= planned.linear + planned.head
    alone = flops_of(shape, work)
    assert products < 0.9 * (alone.linear + alone.head)


def test_a_job_with_adapters_is_planned_with_less_memory():
    plain = spec_of()
    adapted = plain.model_copy(update={"lora": LoRA(rank=2)})
    shape = shape_of(parse_config(WIDER))
    memory = [stage_memory(spec.stages[3], shape, spec, None)[0] for spec in (plain, adapted)]
    assert memory[1].states < 0.4 * memory[0].states
    count, tensors = adapters_of(shape, LoRA(rank=2))
    assert memory[1].optimizer == 8 * count + 4 * tensors
    assert memory[1].weights == 4 * (shape.parameters + count)


def test_a_reference_runs_forward_and_holds_its_weights():
    config = parse_config(WIDER)
    shape = shape_of(config)
    work = work_of_row(stage_of("dpo"), None, block_length=8)
    alone, compared = flops_of(shape, work), flops_of(shape, work, reference=True)
    assert compared.useful == pytest.approx(alone.useful * 4 / 3)
    settings = {"positions": 1, "predictions": 1}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = build(config, dtype=dtype)
        held = memory_of(shape, precision=precision, reference=True, **settings)
        without = memory_of(shape, precision=precision, **settings)
        assert held.total - without.total == sum(one.nbytes for one in model.parameters())


@pytest.mark.parametrize(
    "band", [("0", "1", False), ("0.3", "0.8", False), ("0", "0.002", False), ("0.45", "0.95", True)]
)
def test_predictions_are_the_mean_of_what_is_masked(band):
    low, high, complementary = band
    views = 2 if complementary else 1
    values = {"low": low, "high": high, "scope": "Document", "weight": "Elbo", "views": views}
    stage = stage_of("mdlm", noise=values | {"complementary": complementary})
    expected = work_of_row(stage, None, block_length=None).predictions
    config = {"low": float(low), "high": float(high), "scope": "document", "views": views}
    counts = [
        noise.corrupt(
            packed_row([1] * 64, length=64, first_ordinal=ordinal),
            noise.NoiseConfig(**config, complementary=complementary),
            seed=3,
            block_length=64,
        ).masked.sum()
        for ordinal in range(2000)
    ]
    error = np.std(counts) / len(counts) ** 0.5
    assert abs(np.mean(counts) - expected) <= 4 * error


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_weights_gradients_and_optimiser_take_the_bytes_that_are_planned(config, precision):
    model = build(parse_config(config))
    learner = Learner(model, spec_of(precision=precision))
    weights = list(model.parameters())
    copy = list(learner.weights.computing.parameters()) if precision == "bf16" else []
    if copy:
        inputs = inputs_of("mdlm", packed_row(random_tokens(64), length=64))
        objective_sum(learner.weights.computing, inputs).backward()
    moments = [tensor for name, tensor in learner.tensors() if name.startswith("optimizer.")]
    real = (
        held(weights + copy),
        held([learner.weights.gradient, *(parameter.grad for parameter in copy)]),
        held(moments),
    )
    assert real == states_of(shape_of(model.config), precision)
    buffers = [*model.buffers(), *(learner.weights.computing.buffers() if copy else [])]
    planned = memory_of(shape_of(model.config), precision=precision, positions=1, predictions=1).buffers
    transient = max(parameter.nbytes for parameter in weights) if precision == "fp32" else 0
    assert held(buffers) == planned - transient


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_conversion_holds_two_optimisers_and_one_set_of_weights(precision):
    spec = spec_of(precision=precision)
    first = Learner(build(parse_config(TINY_CONFIG)), spec)
    second = first.recast(converted_config(first.model.config, "LLaDA2MoeModelLM"))
    tensors = [tensor for learner in (first, second) for tensor in parts(learner)]
    assert held(tensors) == conversion_bytes(shape_of(first.model.config), spec)


def parts(learner):
    """Everything that a learner holds, but for buffers."""
    moments = [tensor for name, tensor in learner.tensors() if name.startswith("optimizer.")]
    models = [learner.model, learner.weights.computing]
    return [*moments, learner.weights.gradient, *(p for model in models for p in model.parameters())]


def held(tensors):
    """Bytes of the distinct storages behind ``tensors``."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_activations_are_what_autograd_keeps_within_two_per_cent(config, precision):
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model = build(parse_config(config), dtype=dtype).train()
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = []
    inputs = inputs_of("mdlm", packed_row(random_tokens(128), length=128))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model.hidden(inputs.ids, inputs.metadata)
    real = held([tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in own])
    shape = shape_of(model.config)
    layers = sum(activations_of_layer(shape, layer, precision) for layer in shape.layers)
    once = (
        shape.hidden * dtype.itemsize + 4 * model.rotary.dim + 8
    )  # final norm; cosines and sines; positions
    planned = 128 * (layers + once)
    assert abs(real - planned) <= 0.02 * real


@given(st.lists(st.integers(1, 8), min_size=1, max_size=5, unique=True), st.integers(5, 40))
def test_block_sizes_last_as_long_as_the_schedule_says(sizes, steps):
    schedule = BlockSchedule(sizes, steps)
    one_by_one = [schedule.size_at(step) for step in range(steps)]
    assert [size for size, count in schedule.lasting() for _ in range(count)] == one_by_one


@pytest.mark.parametrize(("name", "file"), [("llada2-mini", "llada2_mini"), ("llada2-flash", "llada2_flash")])
def test_published_shapes_are_those_of_the_published_files(name, file):
    content = json.loads((PUBLISHED_FOLDER / f"{file}.json").read_text())
    assert {key: content[key] for key in PUBLISHED[name]} == dict(PUBLISHED[name])
    found = inspect_checkpoint(PUBLISHED_FOLDER / f"{file}.json")
    assert parameter_counts(published_config(name)) == (found.parameters, found.active_parameters)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llada2-mini", 16_255_643_392),
        ("ling-mini", 16_255_643_392),
        ("llada2-flash", 102_889_705_216),
        ("ling-flash", 102_889_705_216),
        ("llada-moe-7b-a1b", 7_356_880_896),
        ("smollm2-135m", 134_515_008),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("olmoe-1b-7b", 6_919_161_856),
    ],
)
def test_published_models_have_their_size(name, parameters):
    config = published_config(name)
    biases = sum(layer.num_experts for layer in shape_of(config).layers if layer.biased)
    assert shape_of(config).parameters + biases == parameter_counts(config)[0] == parameters


ASSUMED = Assumptions(mfu=0.5, reserve_gib=0.0)


def test_a_stage_of_several_block_sizes_is_the_sum_of_its_steps():
    spec = spec_of()
    configs = stage_configs(spec.model_copy(update={"stages": spec.stages[1:2]}), diffusion())
    job = spec.model_copy(update={"stages": spec.stages[1:2]})
    (found,) = estimate(job, configs, device_named("h100-80g"), ASSUMED).stages
    stage, schedule = job.stages[0], BlockSchedule((1, 4), 8)
    shape = shape_of(configs[0])
    by_hand = 0.0
    for step in range(stage.steps):
        row = work_of_row(stage, None, block_length=schedule.size_at(step))
        by_hand += flops_of(shape, row.times(stage.rows_per_step)).useful
    assert found.flops.useful == pytest.approx(by_hand, rel=1e-12)
    assert found.tokens == stage.steps * stage.rows_per_step * stage.length
    assert found.hours == pytest.approx(by_hand / (67e12 * 0.5) / 3600)


def diffusion():
    return parse_config(TINY_CONFIG | {"architectures": ["LLaDA2MoeModelLM"]})


def test_a_micro_batch_is_halved_until_the_job_fits():
    stages = [
        {"name": "s", "objective": "mdlm", "steps": 4, "length": 64, "rowsPerStep": 64}
        | {"learningRate": {"peak": "1e-3"}}
    ]
    spec = spec_of(stages=stages, parallelism={"microBatchRows": 64}, evaluation=None)
    configs = stage_configs(spec, diffusion())

    def peak(rows):
        changed_rows = spec.parallelism.model_copy(update={"micro_batch_rows": rows})
        job = spec.model_copy(update={"parallelism": changed_rows})
        return estimate(job, configs, device_named(None), ASSUMED).stages[0].peak_bytes

    peaks = [peak(2**power) for power in range(7)]
    assert all(smaller < larger for smaller, larger in pairwise(peaks))
    device = device_named(None, memory_gib=(peaks[3] + 1) / 2**30)
    assert estimate(spec, configs, device, ASSUMED).too_large
    remedy = remedy_for(spec, configs, device, ASSUMED)
    assert remedy.changes == (("microBatchRows", 64, 8),)
    assert str(remedy).startswith("parallelism.microBatchRows: 8 (was 64) would take 0.0 GiB of each of 1")
    assert remedy_for(spec, configs, device_named(None, memory_gib=1e-6), ASSUMED) is None


MINI = published_config("llada2-mini")
FLASH = published_config("llada2-flash")


def large_job(**parallelism):
    stages = [
        {"name": "s", "objective": "bdlm", "blockSizes": [32], "steps": 10, "length": 4096}
        | {"rowsPerStep": 512, "learningRate": {"peak": "1e-4"}}
    ]
    return spec_of(stages=stages, parallelism=parallelism, evaluation=None, precision="bf16")


@pytest.mark.parametrize(("processes", "expert_parallel"), [(8, 1), (8, 4), (64, 8), (24, 1)])
def test_the_pieces_of_a_model_make_up_the_model(processes, expert_parallel):
    job = large_job(processesPerNode=processes, shard="Full", expertParallel=expert_parallel)
    shape = shape_of(MINI)
    plan = plan_of(job.parallelism, [shape])
    held_by_each = sum(piece(one, plan) for one in shape.stored)
    rounded = sum(one.count // one.rows for one in shape.stored) * processes  # at most a row of each
    assert shape.parameters <= held_by_each * processes < shape.parameters + rounded
    if 256 % processes == 0:
        assert held_by_each * processes == shape.parameters


def test_replicas_hold_more_each_and_one_process_holds_all():
    shape = shape_of(MINI)
    full = plan_of(large_job(processesPerNode=16, shard="Full").parallelism, [shape])
    hybrid = plan_of(large_job(processesPerNode=16, shard="Hybrid", replicas=4).parallelism, [shape])
    states = [sum(states_of(shape, "bf16", plan)) for plan in (full, hybrid)]
    assert states[1] == pytest.approx(4 * states[0], rel=1e-3)
    assert plan_of(large_job(shard="Full").parallelism, [shape]) is None


def test_spread_experts_are_gathered_by_no_one_else():
    shape = shape_of(FLASH)

    def gathered(**parallelism):
        job = large_job(processesPerNode=64, shard="Full", **parallelism)
        plan = plan_of(job.parallelism, [shape])
        return memory_of(shape, precision="bf16", positions=1, predictions=1, plan=plan).gathered

    layer = max(layer.experts for layer in shape.layers)
    saved = gathered() - gathered(expertParallel=8)
    assert saved == layer * 7 // 8 * (2 * 2 + 2 + 4)


def test_recomputing_keeps_the_inputs_of_layers_and_runs_them_twice():
    shape = shape_of(MINI)
    settings = {"precision": "bf16", "positions": 8192, "predictions": 2048}
    kept, again = memory_of(shape, **settings), memory_of(shape, **settings, recompute=True)
    assert again.activations < 0.2 * kept.activations
    assert again.states == kept.states
    work = Work(tokens=4096, positions=8192, predictions=2048, pairs=4096**2)
    flops = flops_of(shape, work, recompute=True)
    assert flops.recomputed == (flops.linear + flops.attention) / 3
    assert flops.computed == flops.useful + flops.recomputed


@pytest.mark.parametrize(
    ("config", "gpu", "nodes"),
    [(MINI, "a100-40g", 1), (MINI, "h200-141g", 4), (FLASH, "h100-80g", 4), (FLASH, "h200-141g", 1)],
    ids=["mini-1", "mini-4", "flash-4", "flash-1"],
)
def test_a_remedy_fits_keeps_the_rules_and_no_smaller_change_does(config, gpu, nodes):
    spec, device = large_job(nodes=nodes, processesPerNode=8, microBatchRows=4), device_named(gpu)
    assumed = Assumptions(mfu=0.4, reserve_gib=4.0)
    assert estimate(spec, [config], device, assumed).too_large
    remedy = remedy_for(spec, [config], device, assumed)
    assert not remedy.estimate.too_large
    new = {field: value for field, _, value in remedy.changes}
    manifest = json.loads(json.dumps(spec.to_json_dict()))
    manifest["parallelism"] |= {field: value for field, value in new.items() if value is not None}
    job = train_job(**manifest)
    changed_spec = admit(json.dumps(job)).spec
    assert estimate(changed_spec, [config], device, assumed) == remedy.estimate
    for field in new:  # any of the changes taken back, the job does not fit or breaks a rule
        less = manifest["parallelism"] | {field: spec.to_json_dict()["parallelism"].get(field)}
        try:
            without = admit(json.dumps(train_job(**(manifest | {"parallelism": less})))).spec
            assert estimate(without, [config], device, assumed).too_large
        except UsageError:
            continue


@pytest.mark.parametrize(
    ("config", "number", "says"),
    [
        (MINI, 3, "expertParallel: got 3, which does not divide the 256 experts"),
        (parse_config(LLAMA), 2, "expertParallel: got 2, but the model has no experts; leave it at 1"),
    ],
)
def test_experts_that_cannot_be_shared_out_are_refused(config, number, says):
    job = large_job(processesPerNode=6, shard="Full", expertParallel=number)
    with pytest.raises(UsageError, match=says):
        estimate(job, [config], device_named(None), ASSUMED)


@pytest.mark.parametrize(
    ("documents", "says"),
    [
        (Documents(tokens=65), "rows of stage s hold 64; give a shorter length"),
        (Documents(tokens=8, prompt=8), "at least one token must be left to learn from"),
    ],
)
def test_documents_that_no_row_can_hold_are_refused(documents, says):
    with pytest.raises(UsageError, match=says):
        work_of_row(stage_of("sft"), documents, block_length=8)


def test_a_gpu_of_ones_own_needs_no_name():
    own = device_named(None, memory_gib=24, peak_tflops=100)
    assert (own.name, own.memory_gib, own.peak("bf16"), own.peak("fp32")) == ("custom", 24, 1e14, 1e14)
    assert device_named("a100-40g", memory_gib=39).memory_gib == 39
    with pytest.raises(UsageError, match="--gpu: got 'tpu', known are a100-40g"):
        device_named("tpu")


def test_a_stage_that_the_model_cannot_do_is_refused_before_anything_is_counted():
    job = changed(train_job(), {"spec.stages[1].convertTo": "LLaDA2MoeModelLM"}, drop=("spec.stages[0]",))
    spec = DiffusionTrainJob.from_json(json.dumps(job)).spec
    assert [config.architecture for config in stage_configs(spec, parse_config(TINY_CONFIG))] == [
        "LLaDA2MoeModelLM"
    ] * 3
    with pytest.raises(UsageError, match=r"spec.stages\[0\].objective: got mdlm, but Bailing"):
        stage_configs(spec_of(stages=job["spec"]["stages"][1:]), parse_config(TINY_CONFIG))


@pytest.mark.parametrize(
    ("micro_batch", "twice"), [(512, 0), (64, 0), (16, 3 / 4), (24, 3 / 4), (1, 63 / 64)]
)
def test_balance_losses_run_all_micro_batches_of_a_process_but_one_forward_twice(micro_batch, twice):
    plain = large_job(processesPerNode=8, microBatchRows=micro_batch)  # 64 rows each
    losses = Balance(load_balance_weight="0.01")
    pair = [
        estimate(spec, [MINI], device_named(None), ASSUMED).stages[0].flops
        for spec in (plain, plain.model_copy(update={"balance": losses}))
    ]
    assert pair[0].recomputed == 0
    assert pair[1].recomputed == pytest.approx(twice * (pair[0].linear + pair[0].attention) / 3)
    assert pair[1].useful == pair[0].useful


def test_a_stage_that_changes_the_context_holds_two_optimisers_for_a_moment():
    stage = {"name": "s", "objective": "mdlm", "steps": 4, "length": 64, "rowsPerStep": 2}
    stage |= {"learningRate": {"peak": "1e-3"}}
    spec = spec_of(stages=[stage, stage | {"name": "t", "ropeTheta": "5e4", "contextLength": 512}])
    configs = stage_configs(spec, parse_config(TINY_CANVAS))
    assert [config.max_position_embeddings for config in configs] == [256, 512]
    first, second = estimate(spec, configs, device_named(None), ASSUMED).stages
    assert (first.conversion_bytes, second.conversion_bytes) == (
        0,
        conversion_bytes(shape_of(configs[1]), spec),
    )
