"""What a training step reaches on one GPU: ``python benchmarks/training_slice.py`` (a minute or two).

Two things, each with its own line of JSON, and both of them in the last:

* ``agreement``: grouped experts against a loop on this GPU, in float32, forward and backward; and a step's
  loss and gradient against those of the CPU.
* ``slice``: a training step of the first layers of LLaDA2.0-mini as ``unmask train`` takes it, in operations
  that the mathematics asks for, as a share of the GPU's dense peak.

Attention alone is measured by ``attention.py``. Times are medians of several steps. Weights and tokens are
random, so that tokens spread over experts about evenly; a trained router may spread them less evenly.
"""

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unmask.diffusion import layout, noise
from unmask.diffusion.noise import NoiseConfig
from unmask.diffusion.rows import PackedRows
from unmask.models.loading import build
from unmask.models.moe import Experts, Routing, experts_one_by_one
from unmask.models.published import PUBLISHED
from unmask.models.registry import parse_config
from unmask.models.shape import shape_of
from unmask.training.distributed import World
from unmask.training.learner import Learner
from unmask.training.observation import StepWatch
from unmask.training.sizing.flops import flops_of
from unmask.training.steps import Totals, gradient_step, micro_batches
from unmask_api.train_job import Balance, Optimizer, TrainSpec

Json = dict[str, Any]
BLOCK = 32
SMALL: Json = {
    "architectures": ["LLaDA2MoeModelLM"],
    "vocab_size": 1024,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "max_position_embeddings": 4096,
    "mask_token_id": 1023,
    "eos_token_id": 1022,
    "pad_token_id": 1022,
}
"""Of a model for comparing a step on the GPU with one on the CPU."""


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["agreement", "slice"], action="append")
    parser.add_argument("--layers", type=int, default=4, help="of the slice")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row of the slice")
    parser.add_argument("--rows", type=int, default=8, help="rows of a step of the slice")
    parser.add_argument("--micro-batch", type=int, default=4, help="rows of a micro-batch of the slice")
    parser.add_argument("--steps", type=int, default=5, help="of the slice, after two that are not counted")
    parser.add_argument("--peak", type=float, default=989e12, help="the GPU's dense peak in bfloat16")
    parser.add_argument(
        "--deterministic", action="store_true", help="as `unmask train`: operations that repeat to the bit"
    )
    parser.add_argument(
        "--profile", action="store_true", help="print what one more step spends the GPU's time on"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA device here; run it where there is one")
    torch.use_deterministic_algorithms(options.deterministic)
    chosen = options.only or ["agreement", "slice"]
    last: Json = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "deterministic": options.deterministic,
        "date": str(datetime.date.today()),
    }
    parts: dict[str, Callable[[], Json]] = {
        "agreement": agreement,
        "slice": lambda: training_slice(options),
    }
    for name in chosen:
        started = time.monotonic()
        torch._dynamo.reset()  # so that shapes of one part do not make those of the other dynamic
        last[name] = parts[name]()
        print(json.dumps({name: last[name], "wallSeconds": round(time.monotonic() - started, 1)}), flush=True)
    print(json.dumps(last))
    if wrong := [name for name, part in last.items() if isinstance(part, dict) and _is_wrong(part)]:
        sys.exit(f"differs by more than is allowed: {', '.join(wrong)}")


def _is_wrong(part: Json) -> bool:
    pairs = (("experts", "expertsTolerance"), ("step", "stepTolerance"))
    return any(np.max(part[name]) > part[limit] for name, limit in pairs if name in part)


def rows_of(count: int, length: int, vocabulary: int) -> PackedRows:
    """Rows of one document of random tokens each."""
    shape = (count, length)
    return PackedRows(
        ids=np.random.default_rng(0).integers(2, vocabulary // 2, shape),
        document=np.zeros(shape, np.int64),
        position=np.tile(np.arange(length), (count, 1)),
        supervised=np.ones(shape, np.bool_),
        ordinal=np.repeat(np.arange(count)[:, None], length, axis=1),
    )


def inputs_of(rows: PackedRows, mask_token_id: int) -> layout.ModelInputs:
    """Both copies of ``rows``, with a ratio of masks per block."""
    corruption = noise.corrupt(rows, NoiseConfig(), seed=1, block_length=BLOCK)
    return layout.two_copy(rows, corruption, block_length=BLOCK, mask_token_id=mask_token_id)


# Agreement


def agreement() -> Json:
    """The largest differences, each over the largest value of the reference."""
    torch.backends.cuda.matmul.allow_tf32 = False
    return {
        "experts": _experts_differ(),
        "expertsTolerance": 1e-4,
        **_step_differs(),
    }


def _apart(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    return max(
        float((one.double() - other.double()).abs().max() / other.double().abs().max())
        for one, other in zip(ours, theirs, strict=True)
    )


def _experts_differ() -> float:
    """Two of eight experts get no token."""
    torch.manual_seed(0)
    experts = Experts(8, 128, 64).cuda()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    hidden = torch.randn(300, 128, device="cuda", requires_grad=True)
    chosen = torch.stack([torch.randperm(6)[:2] for _ in range(300)]).cuda()
    weights = torch.rand(300, 2, device="cuda").requires_grad_()
    routing = Routing(chosen, weights)
    inputs = [hidden, weights, *experts.parameters()]
    upstream = torch.randn(300, 128, device="cuda")
    found = []
    for out in (experts(hidden, routing), experts_one_by_one(experts, hidden, routing)):
        found.append([out.detach(), *torch.autograd.grad(out, inputs, upstream)])
    assert all(float(gradient[6:].abs().max()) == 0 for gradient in found[0][3:]), "experts without tokens"
    return _apart(*found)


def _step_differs() -> Json:
    """A step's loss and gradient on the GPU against the CPU's; and in bfloat16, as it comes."""
    loss, gradient = _step("cpu", "fp32")

    def apart(precision: str) -> list[float]:
        other_loss, other = _step("cuda", precision)
        return [abs(other_loss / loss - 1), float((other - gradient).norm() / gradient.norm())]

    return {"step": apart("fp32"), "stepTolerance": 1e-3, "stepInBf16": apart("bf16")}


def _step(device: str, precision: str) -> tuple[float, Tensor]:
    """The loss of a step of the small model, and its gradient."""
    learner = Learner(build(parse_config(SMALL), seed=3).to(device), _spec(precision))
    world = World(rank=0, size=1, device=torch.device(device))
    rows = rows_of(2, 512, SMALL["vocab_size"])
    batches = (inputs_of(batch, SMALL["mask_token_id"]) for batch in micro_batches(rows, 1))
    totals = gradient_step(learner.weights, batches, world, stop=False)
    return totals.loss, learner.weights.gradient.cpu() / totals.normaliser


def _spec(precision: str) -> TrainSpec:
    return TrainSpec.model_construct(precision=precision, optimizer=Optimizer(), balance=Balance())


# A slice of the model


def training_slice(options: argparse.Namespace) -> Json:
    """Steps of the first layers of LLaDA2.0-mini in bfloat16, with float32 weights, gradients and AdamW."""
    config = parse_config(dict(PUBLISHED["llada2-mini"]) | {"num_hidden_layers": options.layers})
    device = torch.device("cuda")
    model = build(config, device="meta").to_empty(device=device)
    with torch.no_grad():
        torch.manual_seed(0)
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.normal_(std=0.02) if tensor.ndim > 1 else tensor.fill_(1.0)
            else:
                tensor.zero_()
        for router in model.routers():
            if router.expert_bias is not None:
                router.expert_bias.zero_()
    learner = Learner(model, _spec("bf16"))
    world = World(rank=0, size=1, device=device)
    rows = rows_of(options.rows, options.length, config.vocab_size)
    assert config.mask_token_id is not None, "a diffusion model"
    mask = config.mask_token_id
    shape, taken = shape_of(config), []
    torch.cuda.reset_peak_memory_stats()

    def step() -> Totals:
        torch.cuda.synchronize()
        started = time.perf_counter()
        watch = StepWatch(device)
        watch.note_rows(rows)
        batches = (inputs_of(batch, mask) for batch in micro_batches(rows, options.micro_batch))
        totals = gradient_step(learner.weights, watch.batches(batches), world, stop=False, watch=watch)
        torch.cuda.synchronize()
        learnt = time.perf_counter()
        learner.gradient_norm(totals)
        learner.step(totals, 1e-4)
        torch.cuda.synchronize()
        ended = time.perf_counter()
        useful = flops_of(shape, watch.work(rows.ids.size)).useful
        taken.append((ended - started, learnt - started, watch.seconds["data"], useful))
        return totals

    for _ in range(options.steps + 2):
        totals = step()
    counted = taken[2:]
    seconds, learning, data = (statistics.median(one[place] for one in counted) for place in range(3))
    useful = counted[-1][3]
    tokens = rows.ids.size
    if options.profile:
        with torch.profiler.profile() as profile:
            step()
        print(profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=40), flush=True)
    return {
        "layers": options.layers,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "rows": options.rows,
        "microBatchRows": options.micro_batch,
        "length": options.length,
        "block": BLOCK,
        "secondsPerStep": round(seconds, 4),
        "ofItForwardBackward": round(learning, 4),
        "ofItData": round(data, 4),
        "usefulFlops": useful,
        "usefulMfu": round(useful / seconds / options.peak, 4),
        "usefulMfuOfForwardBackward": round(useful / learning / options.peak, 4),
        "cleanTokensPerSecond": round(tokens / seconds),
        "peakGiB": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "loss": round(totals.loss, 4),
        "busiestExpertOverMean": round(
            max(float(count.max() / count.double().mean()) for count in totals.expert_tokens), 3
        ),
        "peakFlops": options.peak,
    }


if __name__ == "__main__":
    main()
