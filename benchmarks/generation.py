"""Times block generation with and without a cache, alone and in batches: ``make bench``.

The model (``model_s.json``) has random weights. A forward takes as long as a trained one's, and no confidence
reaches the threshold, so each block takes exactly ``STEPS`` denoise forwards: what varies is the machine and
the code, never the text. Prints a table, and writes it beside it: ``generation_<processor>_<date>.md``.
"""

import datetime
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from unmask.diffusion.decoding import DecodingParams
from unmask.diffusion.generation import Generation, generate, generate_uncached
from unmask.models.loading import LanguageModel, build
from unmask.models.registry import parse_config

HERE = Path(__file__).parent
PROMPT, NEW, BLOCK, STEPS = 128, 64, 32, 8
ROWS = (1, 4, 16)
REPEATS = 3


def main() -> None:
    """Measure, print and write."""
    model = build(parse_config(json.loads((HERE / "model_s.json").read_text())))
    processor = _processor()
    page = "\n".join(_page(processor, model))
    name = re.sub(r"\W+", "-", processor).strip("-").lower()
    (HERE / f"generation_{name}_{datetime.date.today()}.md").write_text(page + "\n")
    print(page)


def _page(processor: str, model: LanguageModel) -> Iterator[str]:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    threads = torch.get_num_threads()
    today = datetime.date.today()
    yield "# Block generation\n"
    yield f"{processor}, {os.cpu_count()} cores, {threads} threads; torch {torch.__version__}; {today}."
    yield f"{parameters / 1e6:.0f} M random parameters in float32; prompts of {PROMPT} tokens, {NEW} new,"
    yield f"blocks of {BLOCK} in {STEPS} denoise forwards; the fastest of {REPEATS} runs.\n"
    yield "| way | requests | seconds | tokens / s | ms / forward of a request |\n|---|---|---|---|---|"
    for way, requests, run in _ways(model):
        seconds, generations = _fastest(run)
        tokens = sum(len(generation.token_ids) for generation in generations)
        counts = [generation.usage for generation in generations]
        forwards = sum(count.prefill + count.denoise + count.persist for count in counts) / requests
        cells = (
            way,
            requests,
            f"{seconds:.2f}",
            f"{tokens / seconds:.0f}",
            f"{seconds / forwards * 1e3:.0f}",
        )
        yield f"| {' | '.join(map(str, cells))} |"


def _ways(model: LanguageModel) -> Iterator[tuple[str, int, Callable[[], list[Generation]]]]:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(
        1, model.config.vocab_size // 2, (max(ROWS), PROMPT), generator=generator
    ).tolist()
    unused = model.config.vocab_size - 1
    params = DecodingParams(
        max_new_tokens=NEW,
        block_length=BLOCK,
        steps=STEPS,
        threshold=1.1,
        eos_token_id=-1,
        mask_token_id=unused,
    )
    yield "no cache", 1, lambda: [generate_uncached(model, prompts[0], params)]
    for rows in ROWS:
        yield "cache", rows, lambda rows=rows: generate(model, prompts[:rows], params, rows=rows)


def _fastest(run: Callable[[], list[Generation]]) -> tuple[float, list[Generation]]:
    run()  # the first one pays for warming up
    timings = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        generations = run()
        timings.append(time.perf_counter() - started)
    return min(timings), generations


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(
        r"^model name\s*: (.*)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE
    )
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
