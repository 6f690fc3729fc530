"""The whole way on one machine: a dictionary, an autoregressive model, a diffusion model, a server, a client.

Makes the data, trains by the manifest (``unmask run``), serves the result (``unmask serve``) and asks it
for words it has never seen, through the Python client. What it prints at the end is also in ``results.json``
and ``stages.png``, in the folder of the run. Started again after an interruption it goes on from the
last checkpoint; started again after its end it only serves and measures.

    python examples/quickstart/demo.py [--small] [--out FOLDER]
"""

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from picture import draw
from prepare import prepare
from rich.console import Console
from rich.table import Table

from unmask.client import CanvasUpdate, Client, Generation
from unmask.training.evaluation import edit_distance

HERE = Path(__file__).parent
UNMASK = [sys.executable, "-m", "unmask.cli.main"]
THRESHOLDS = (0.7, 0.9, 0.95)
HEADLINE = 0.9
"""The threshold at which the diffusion model is compared with the autoregressive one."""
SAMPLES = 1000
SHOWN = 8
ROWS = 32
"""Requests that share a forward pass of the server."""
MAX_TOKENS = 32
END = "."
"""What stands for the end of text on the canvas."""

console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)


@dataclass(frozen=True)
class Word:
    """A held-out word, and every way to say it that counts as right."""

    spelling: str
    said: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How well a model says the held-out words."""

    exact_match: float
    phoneme_error_rate: float


@dataclass(frozen=True, kw_only=True)
class Decoding(Quality):
    """The same at one confidence threshold, and tokens per forward pass over all forwards and some."""

    tpf: float
    tpf_decode: float
    tpf_denoise: float


def main() -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="all stages in about a minute, learning little")
    parser.add_argument("--out", type=Path, help="folder for data and runs [default: in the user's cache]")
    options = parser.parse_args()
    manifest = HERE / ("quickstart-small.yaml" if options.small else "quickstart.yaml")
    out = options.out or default_folder()
    # A run goes on from its checkpoints, and a changed manifest is another run.
    run = out / f"{manifest.stem}-{hashlib.sha256(manifest.read_bytes()).hexdigest()[:8]}"
    started = time.monotonic()

    console.print(f"data and results: {out}")
    prepare(out / "data")
    command = ["run", "-f", manifest, "--volume", f"data={out / 'data'}", "--volume", f"run={run}"]
    ended = subprocess.run([*UNMASK, *command], check=False)
    if ended.returncode:
        sys.exit(ended.returncode)

    words = held_out(out / "data")
    autoregressive = measure_autoregressive(run / "exports" / "pretrain", words)
    with serving(run / "model", log=run / "serve.log") as address, Client(address) as client:
        show_canvas(client, words[0])
        show_words(client, words[1:SHOWN])
        diffusion = {threshold: measure_served(client, words, threshold) for threshold in THRESHOLDS}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    results = {
        "samples": len(words),
        "autoregressive": asdict(autoregressive),
        "diffusion": {str(threshold): asdict(figures) for threshold, figures in diffusion.items()},
        "stage_seconds": {one["stage"]: one["seconds"] for one in records if one["kind"] == "stage"},
        "seconds": time.monotonic() - started,
    }
    (run / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    draw(records, run / "stages.png")
    report(results)
    console.print(f"figures: {run / 'results.json'}\npicture: {run / 'stages.png'}")
    console.print(f"serve it yourself: unmask serve {run / 'model'}    ask: unmask generate --canvas hello")


def default_folder() -> Path:
    """A folder of the user's cache."""
    cache = os.environ.get("UNMASK_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "unmask" / "quickstart"


def held_out(data: Path) -> list[Word]:
    """The first words of the validation file, which are in no particular order."""
    lines = (data / "validation.jsonl").read_text(encoding="utf-8").splitlines()[:SAMPLES]
    records = [json.loads(line) for line in lines]
    return [Word(one["prompt"], tuple(tuple(way.split()) for way in one["completions"])) for one in records]


def measure_autoregressive(folder: Path, words: Sequence[Word]) -> Quality:
    """Let the model in ``folder`` say ``words``, one token after the other."""
    from unmask.models.loading import load
    from unmask.models.tokenizer import Tokenizer
    from unmask.training.greedy import generate_greedily

    model, tokenizer = load(folder), Tokenizer.load(folder)
    turns = [[{"role": "user", "content": word.spelling}] for word in words]
    prompts = [tokenizer.encode(tokenizer.render_chat(turn, add_generation_prompt=True)) for turn in turns]
    answers: list[Sequence[str]] = []
    for first in range(0, len(prompts), ROWS):
        said = generate_greedily(
            model,
            prompts[first : first + ROWS],
            max_new_tokens=MAX_TOKENS,
            eos_token_id=model.config.eos_token_id,
        )
        answers += [tokenizer.decode(one.token_ids).split() for one in said]
    return quality(words, answers)


def quality(words: Sequence[Word], answers: Sequence[Sequence[str]]) -> Quality:
    """Compare each answer with the nearest of its word's pronunciations."""
    nearest = [
        min((edit_distance(answer, way), len(way)) for way in word.said)  # type: ignore[arg-type]
        for word, answer in zip(words, answers, strict=True)
    ]
    return Quality(
        exact_match=sum(edits == 0 for edits, _ in nearest) / len(words),
        phoneme_error_rate=sum(edits for edits, _ in nearest) / sum(length for _, length in nearest),
    )


@contextmanager
def serving(folder: Path, *, log: Path) -> Iterator[str]:
    """Serve the model in ``folder`` on free ports of this machine; yields the address."""
    options = ["--port=0", "--metrics-port=0", f"--rows={ROWS}"]
    with log.open("w", encoding="utf-8") as errors:
        server = subprocess.Popen(
            [*UNMASK, "serve", str(folder), *options], stdout=subprocess.PIPE, stderr=errors, text=True
        )
    with server:
        assert server.stdout is not None
        try:
            ready = re.search(r" on (\S+:\d+), metrics on ", line := server.stdout.readline())
            if ready is None:
                sys.exit(f"error: the server did not start: {line.strip()} (log: {log})")
            console.print(line.strip())
            yield ready[1]
        finally:
            server.send_signal(signal.SIGTERM)


def ask(client: Client, word: Word, threshold: float) -> Generation:
    """Ask for one word's pronunciation."""
    turn = {"role": "user", "content": word.spelling}
    return client.generate(messages=[turn], threshold=threshold, max_tokens=MAX_TOKENS)  # type: ignore[list-item]


def show_canvas(client: Client, word: Word) -> None:
    """Print how the phonemes of ``word`` appear, most certain first."""
    filled: dict[int, str] = {}
    console.print(f"\n[bold]{word.spelling}[/bold], forward by forward")
    turn = {"role": "user", "content": word.spelling}
    for event in client.stream(messages=[turn], threshold=HEADLINE, max_tokens=MAX_TOKENS, canvas=True):  # type: ignore[list-item]
        if isinstance(event, CanvasUpdate):
            filled |= {fill.position: fill.text.strip() or END for fill in event.fills}
            shown = [filled.get(place, "_") for place in range(max(filled) + 1)]
            while shown[-2:] == [END, END]:  # a block is filled to its end; one mark is enough
                shown.pop()
            console.print("  " + " ".join(f"{text:3}" for text in shown))


def show_words(client: Client, words: Sequence[Word]) -> None:
    """Print some answers beside what the dictionary says."""
    table = Table("word", "model", "dictionary", "forwards", box=None)
    for word in words:
        answer = ask(client, word, HEADLINE)
        right = tuple(answer.text.split()) in word.said
        said = " | ".join(" ".join(way) for way in word.said)
        colour = "green" if right else "red"
        table.add_row(word.spelling, f"[{colour}]{answer.text}[/]", said, str(answer.usage.forwards_denoise))
    console.print(table)


def measure_served(client: Client, words: Sequence[Word], threshold: float) -> Decoding:
    """Let the server say ``words``, many at a time."""
    with ThreadPoolExecutor(2 * ROWS) as pool:
        answers = list(pool.map(lambda word: ask(client, word, threshold), words))
    found = quality(words, [answer.text.split() for answer in answers])
    usages = [answer.usage for answer in answers]
    kept = sum(usage.completion_tokens for usage in usages)
    prefill, denoise, persist = (
        sum(getattr(usage, f"forwards_{kind}") for usage in usages)
        for kind in ("prefill", "denoise", "persist")
    )
    return Decoding(
        exact_match=found.exact_match,
        phoneme_error_rate=found.phoneme_error_rate,
        tpf=kept / (prefill + denoise + persist),
        tpf_decode=kept / (denoise + persist),
        tpf_denoise=kept / denoise,
    )


def report(results: dict[str, Any]) -> None:
    """Print the tables."""
    quality_table = Table("model", "exact match", "phoneme errors", "TPF", "TPF decode", "TPF denoise")
    first = results["autoregressive"]
    quality_table.add_row("autoregressive", *_percent(first), "", "", "1")
    for threshold, figures in results["diffusion"].items():
        tpf = (f"{figures[name]:.2f}" for name in ("tpf", "tpf_decode", "tpf_denoise"))
        quality_table.add_row(f"diffusion, threshold {threshold}", *_percent(figures), *tpf)
    console.print(f"\n{results['samples']} held-out words")
    console.print(quality_table)
    times = Table("stage", "seconds")
    for stage, seconds in results["stage_seconds"].items():
        times.add_row(stage, f"{seconds:.0f}")
    times.add_row("everything", f"{results['seconds']:.0f}")
    console.print(times)


def _percent(figures: dict[str, float]) -> tuple[str, str]:
    return f"{figures['exact_match']:.1%}", f"{figures['phoneme_error_rate']:.1%}"


if __name__ == "__main__":
    main()
