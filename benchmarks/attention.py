"""Times block-sparse attention on a GPU, per useful operation, beside causal flash attention.

A useful operation is one on a pair of tokens that may see each other. Both sides have the shape of
LLaDA2.0-mini's attention in bfloat16: flex attention on ``[x_t ; x_0]`` with blocks of 32 under the tiles of
:mod:`unmask.attention.flex`, and torch's flash attention under the plain causal mask, which is as good as a
kernel gets. Forward and backward together. Prints a table; the last line is one JSON object.
"""

import datetime
import json
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from unmask.attention import AttentionMetadata, may_attend
from unmask.attention.flex import compiled_flex_attention, plan_flex

HEADS, KV_HEADS, SIZE = 16, 4, 128
BLOCK = 32
LENGTHS = (2048, 4096, 8192)
"""Tokens of a document; flex attention sees twice as many."""
WARM_UP, REPEATS = 5, 20
PER_PAIR = 2 * 2 * SIZE * HEADS
"""Operations of the forward for each pair: products with the key and with the value, each an addition too."""
BACKWARD = 2.5
"""Operations of the backward for each of the forward."""


def main() -> None:
    """Measure and print."""
    print(f"{torch.cuda.get_device_name()}; torch {torch.__version__}; {datetime.date.today()}\n")
    print("| document | way | pairs | ms forward | ms forward and backward | useful TFLOP/s |")
    print("|---|---|---|---|---|---|")
    found = {}
    for length in LENGTHS:
        sides = {"block diffusion, flex": _flex(length), "causal, flash": _flash(length)}
        rates = [_row(length, name, pairs, run) for name, (pairs, run) in sides.items()]
        found[str(length)] = round(rates[0] / rates[1], 3)
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "useful_rate_of_flash": found}))


def _row(length: int, name: str, pairs: int, run: Callable[[bool], object]) -> float:
    """Print one line of the table; returns useful operations in a second, forward and backward."""
    forward, both = _seconds(lambda: run(False)), _seconds(lambda: run(True))
    rate = pairs * PER_PAIR * (1 + BACKWARD) / both
    print(f"| {length} | {name} | {pairs} | {forward * 1e3:.2f} | {both * 1e3:.2f} | {rate / 1e12:.0f} |")
    return rate


def _seconds(run: Callable[[], object]) -> float:
    """The median of several runs, by the GPU's clock."""
    for _ in range(WARM_UP):
        run()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[REPEATS // 2]


def _flex(length: int) -> tuple[int, Callable[[bool], object]]:
    """Pairs that may see each other, and a function that runs the attention, backward too if asked."""
    clean = AttentionMetadata.single_row(length, block_length=BLOCK)
    columns = (clean.position, clean.document, clean.block)
    twice = [torch.cat((column, column), 1) for column in columns]
    view = torch.cat((torch.ones_like(clean.view), clean.view), 1)
    tokens = AttentionMetadata(*twice, view).to("cuda")
    pairs = int(may_attend(tokens, tokens).sum())
    plan = plan_flex(tokens, tokens, compute=compiled_flex_attention())
    return pairs, _runner(2 * length, plan.attend)


def _flash(length: int) -> tuple[int, Callable[[bool], object]]:
    """The same for causal attention on one copy."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    return length * (length + 1) // 2, _runner(length, attend)


def _runner(length: int, attend: Callable[..., Tensor]) -> Callable[[bool], object]:
    inputs = [
        torch.randn(1, heads, length, SIZE, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    probe = torch.randn_like(inputs[0])

    def run(backward: bool) -> object:
        if not backward:
            with torch.no_grad():
                return attend(*inputs)
        return torch.autograd.grad(attend(*inputs), inputs, probe)

    return run


if __name__ == "__main__":
    main()
