"""Forwards as a GPU runs them (kernels, recordings, weights of eight bits), beside those of a CPU."""

from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support.as_on_a_gpu import filled, hidden_states, logits_of_loaded
from support.kernels import interpreted
from support.models import TINY, random_tokens, tiny_model
from unmask.attention import AttentionMetadata, kernels, paged_kernel
from unmask.attention.paged import Span
from unmask.diffusion.batch import Filled
from unmask.diffusion.decoding import DecodingParams
from unmask.models import moe_kernel
from unmask.models.int8 import int8_on
from unmask.models.loading import build, load, save
from unmask.models.moe import Experts
from unmask.models.products import expect
from unmask.models.registry import parse_config
from unmask.models.weight_only_int8 import LEVELS, WeightOnlyLinear, quantised_channels
from unmask.serving.forwards import PlainForwards, RecordedForwards, recorded_sizes
from unmask.serving.ragged import RaggedBatch

BLOCK, PAGES = 4, 12
PROMPTS = [random_tokens(count, seed=count) for count in (9, 3, 14, 6)]
PARAMS = DecodingParams(
    max_new_tokens=10, block_length=BLOCK, threshold=0.3, eos_token_id=62, mask_token_id=63
)
SPANS = [Span((3, 1, 7), 2), Span((5,), 1), Span((0, 2, 4, 6, 8), 1), Span((9, 10), 2)]


def run(batch, prompts):
    """Of each request: what its steps filled, and how surely."""
    found = {batch.admit(prompt, PARAMS): [] for prompt in prompts}
    while batch.active:
        for event in batch.step():
            if isinstance(event, Filled):
                found[event.ticket].append((event.positions, event.token_ids, event.confidences))
    return list(found.values())


def on_a_cpu(model, prompts=PROMPTS):
    """The same of each request alone."""
    return [
        run(RaggedBatch(model, rows=1, capacity=64, block_length=BLOCK), [prompt])[0] for prompt in prompts
    ]


def assert_same(found, expected, within):
    assert [[step[:2] for step in one] for one in found] == [[step[:2] for step in one] for one in expected]
    for one, other in zip(found, expected, strict=True):
        for (*_, ours), (*_, theirs) in zip(one, other, strict=True):
            assert ours == pytest.approx(theirs, abs=within)


@pytest.fixture(scope="module")
def expected():
    return on_a_cpu(tiny_model(dtype=torch.float32))


@pytest.mark.parametrize("recorded", [True, False])
def test_requests_get_the_tokens_that_a_cpu_gives_them(expected, recorded):
    assert_same(interpreted(filled, PROMPTS, PARAMS, recorded=recorded), expected, within=1e-5)


def test_kernels_give_a_request_to_the_bit_what_it_gets_alone_in_a_forward_of_the_same_size(expected):
    """torch's own products are a CPU's here, and have whole tiles of rows: what may differ is ours."""
    together = interpreted(filled, PROMPTS, PARAMS)
    alone = [interpreted(filled, [prompt], PARAMS)[0] for prompt in PROMPTS]
    assert together == alone


@pytest.mark.parametrize("spans", [SPANS, SPANS[:1], SPANS[1:2]], ids=["6 blocks", "2 blocks", "1 block"])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_forward_leaves_and_gives_what_a_cpu_s_does(spans, recorded):
    ids = random_tokens(BLOCK * sum(span.asking for span in spans), seed=5)
    got = interpreted(hidden_states, ids, spans, block_length=BLOCK, pages=PAGES, recorded=recorded)
    model = tiny_model(dtype=torch.float32)
    cache = model.new_paged_cache(pages=PAGES, block_length=BLOCK)
    with torch.inference_mode():
        hidden = PlainForwards(model, cache).hidden(ids, spans)
    pages = [cache._keys[:, :, :PAGES], cache._values[:, :, :PAGES]]
    for ours, theirs in zip(got, [hidden[: len(ids)], *pages, *pages], strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    assert torch.equal(got[1], got[3]) and torch.equal(got[2], got[4]), "storing alone stores the same"


def test_what_is_recorded_is_enough_for_any_forward_and_wastes_little():
    for most in range(1, 200):
        sizes = recorded_sizes(most)
        assert sizes[-1] == most
        for blocks in range(1, most + 1):
            size = min(size for size in sizes if size >= blocks)
            assert size - blocks <= size / 3
        assert len(sizes) < 20


def test_every_forward_is_recorded_at_the_start_and_none_later():
    """Recorded here by noting it: a recording that came late would make a request wait for it."""
    model, noted = tiny_model(dtype=torch.float32), []

    def record(compute):
        noted.append(compute)
        return lambda: torch.zeros(1, 99, TINY["hidden_size"])

    cache = model.new_paged_cache(pages=PAGES, block_length=BLOCK)
    made = RecordedForwards(model, cache, most_blocks=6, most_pages=5, record=record)
    at_first = len(noted)
    for spans in (SPANS, SPANS[:2], SPANS[3:]):
        made.hidden([1] * BLOCK * sum(span.asking for span in spans), spans)
    assert at_first == len(noted) == 2 * len(recorded_sizes(6))


class _Launches:
    """In the place of a kernel: what it is launched with does nothing."""

    def __getitem__(self, grid):
        return lambda *given, **named: None


class _AllOn(TorchDispatchMode):
    """Fails where an operation takes or makes a tensor of another device, unless that is where it waits."""

    def __init__(self, device):
        super().__init__()
        self.device, self.operations = device, 0

    def __torch_dispatch__(self, function, types, given=(), named=None):
        made = function(*given, **(named or {}))
        tensors = [one for one in tree_leaves((given, named, made)) if isinstance(one, torch.Tensor)]
        assert {one.device.type for one in tensors} <= {self.device}, function
        self.operations += 1
        return made


@contextmanager
def a_model_of_no_numbers(monkeypatch, *, quantised=False):
    """On a CUDA device that nobody needs to have: tensors have shapes and devices there, and no numbers."""
    monkeypatch.setattr(kernels, "run_on", lambda device: True)
    for module, names in (
        (paged_kernel, ("_attend_to_a_chunk", "_add_up_chunks")),
        (moe_kernel, ("_gated", "_weighted", "_scaled_product")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, _Launches())
    with FakeTensorMode(), torch.inference_mode():
        model = build(parse_config(TINY), device="meta").eval()
        if quantised:
            expect(model, int8_on("cuda"))
        for module in model.modules():
            for kept in (module._parameters, module._buffers):
                for name, tensor in kept.items():
                    if tensor is not None:
                        kept[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
        yield model


@pytest.mark.parametrize("quantised", [False, True])
def test_what_is_recorded_is_all_on_the_gpu_and_waits_for_nothing(monkeypatch, quantised):
    """A recording fails that copies from the host, or whose shapes depend on what a tensor holds."""
    operations = []

    def record(compute):
        with _AllOn("cuda") as watched:
            compute()
        operations.append(watched.operations)
        return compute

    with a_model_of_no_numbers(monkeypatch, quantised=quantised) as model:
        cache = model.new_paged_cache(pages=PAGES, block_length=BLOCK)
        made = RecordedForwards(model, cache, most_blocks=6, most_pages=5, record=record)
        assert min(operations) > 50
        assert made.hidden([1] * 6 * BLOCK, SPANS).device.type == "cuda"


def test_a_forward_that_is_not_recorded_has_all_its_tensors_on_the_gpu(monkeypatch):
    with a_model_of_no_numbers(monkeypatch) as model:
        cache = model.new_paged_cache(pages=PAGES, block_length=BLOCK)
        made = PlainForwards(model, cache)
        made.store([1] * 6 * BLOCK, SPANS)
        assert made.hidden([1] * 6 * BLOCK, SPANS).device.type == "cuda"


# Weights of eight bits


def rounded(model):
    """The float model whose weights are what those of eight bits stand for."""
    with torch.no_grad():
        for module in model.modules():
            weights = []
            if isinstance(module, Experts):
                weights = [*module.gate_up_proj, *module.down_proj]
            elif isinstance(module, torch.nn.Linear):
                weights = [module.weight]
            for weight in weights:
                levels, scale = quantised_channels(weight, levels=LEVELS)
                weight.copy_(levels * scale.unsqueeze(1))
    return model


def test_requests_get_the_tokens_of_the_weights_that_eight_bits_stand_for():
    expected = on_a_cpu(rounded(tiny_model(dtype=torch.float32)))
    assert_same(interpreted(filled, PROMPTS, PARAMS, quantised=True), expected, within=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_can_be_rounded_while_it_is_read(tmp_path, tied):
    dense = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2,
        "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 64, "initializer_range": 0.3, "tie_word_embeddings": tied,
        "eos_token_id": 62, "rope_theta": 10_000.0,
    }  # fmt: skip
    save(build(parse_config(dense if tied else TINY)), tmp_path / "model")
    ids = random_tokens(20)
    got = interpreted(logits_of_loaded, tmp_path / "model", ids)
    model = load(tmp_path / "model")
    embedding = model.embedding.weight.detach().clone()
    rounded(model)
    with torch.inference_mode():
        hidden = model.hidden(torch.tensor([ids]), AttentionMetadata.single_row(20, block_length=4))
        if tied:
            levels, scale = quantised_channels(embedding, levels=LEVELS)
            expected = hidden[0] @ (levels * scale.unsqueeze(1)).T
        else:
            expected = model.logits(hidden)[0]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_weights_come_in_parts_and_are_complete_with_the_last():
    made = WeightOnlyLinear(8, 6, device=torch.device("cpu"))
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    for rows in (slice(4, 6), slice(0, 4)):
        assert not made.is_complete
        made.put("weight", (rows,), weight[rows])
    assert made.is_complete
    assert (made.levels * made.scale.unsqueeze(1) - weight).abs().max() <= made.scale.max() / 2
    assert made.levels.abs().amax(1).tolist() == [LEVELS] * 6
    made.clear()
    assert not made.is_complete


# On a GPU


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("recorded", [True, False])
def test_a_gpu_gives_the_tokens_of_a_cpu(expected, recorded):
    model = tiny_model(dtype=torch.float32).to("cuda")
    batch = RaggedBatch(model, rows=4, capacity=64, block_length=BLOCK, recorded=recorded)
    assert_same(run(batch, PROMPTS), expected, within=1e-4)


@pytest.mark.gpu
@pytest.mark.slow
def test_a_gpu_gives_the_tokens_of_weights_of_eight_bits(tmp_path):
    save(tiny_model(dtype=torch.float32), tmp_path / "model")
    model = load(tmp_path / "model", device="cuda", quantization="int8")
    batch = RaggedBatch(model, rows=4, capacity=64, block_length=BLOCK, recorded=True)
    assert_same(run(batch, PROMPTS), on_a_cpu(rounded(load(tmp_path / "model"))), within=1e-4)
