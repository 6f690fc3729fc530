"""Measure a run of the SmolLM2 example, and write what the tutorial shows: tables, samples and the curve.

Three models are compared on what none of them has learnt from: the autoregressive original, the same
weights as an untrained diffusion model, and what the run has made of them (its final model, else what a
finished stage has exported).

    python examples/smollm2/report.py DATA RUN [--rows 24] [--samples 12]

writes ``report.md``, ``report.json`` and ``curve.png`` into RUN.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import measure
from picture import draw

from unmask.models.base import LanguageModel
from unmask.models.conversion import to_diffusion
from unmask.models.loading import load
from unmask.models.tokenizer import Tokenizer

TEXTS = ("bible", "foldoc")
BLOCK_LENGTHS = (1, 4, 8, 32)
THRESHOLDS = (0.3, 0.5, 0.7, 0.9, 1.0)
SHOWN_THRESHOLD = 0.9
OWN_QUESTIONS = ("What is the capital of France?", "Hello, who are you?")

Json = dict[str, Any]


def main() -> None:
    """Measure, and write the three files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder that prepare.py has written")
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument(
        "--rows", type=int, default=16, help="rows of 256 tokens to take cross-entropies over"
    )
    parser.add_argument("--samples", type=int, default=12, help="held-out questions of each kind to answer")
    options = parser.parse_args()
    results = measured(options.data, options.run, rows=options.rows, samples=options.samples)
    (options.run / "report.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    (options.run / "report.md").write_text(markdown(results), encoding="utf-8")
    draw(_lines(options.run / "metrics.jsonl"), options.run / "curve.png")
    print(markdown(results))


def measured(data: Path, run: Path, *, rows: int, samples: int) -> Json:
    """All figures, as JSON."""
    tokenizer = Tokenizer.load(data / "model")
    original = load(data / "model").eval()
    models: dict[str, LanguageModel] = {}
    for name, folder in trained(run):
        models[name] = load(folder).eval()
    if not models:
        sys.exit(f"{run}: no stage has exported a model yet")
    last = list(models.values())[-1]
    models = {"converted, untrained": _untrained(original, last), **models}
    corpora = {
        text: measure.held_out_text(
            data / f"{text}-held-out.jsonl", tokenizer, eos_token_id=original.config.eos_token_id
        )
        for text in TEXTS
    }
    questions = asked(data, samples)
    prompts = [_prompt(tokenizer, one) for one in questions]
    vocabulary = _vocabulary(data)

    def judged(answers: Sequence[Any], about: Sequence[Sequence[int]]) -> Json:
        found = measure.judge(about, answers, original=original, tokenizer=tokenizer, vocabulary=vocabulary)
        return asdict(found)

    shown = [*OWN_QUESTIONS, *questions[:3], *questions[samples : samples + 3]]
    return {
        "steps": stage_times(_lines(run / "metrics.jsonl")),
        "cross_entropy": {
            text: {
                "autoregressive": measure.cross_entropy(original, corpus, rows=rows),
                **{
                    name: {
                        str(size): measure.cross_entropy(model, corpus, rows=rows, block_length=size)
                        for size in BLOCK_LENGTHS
                    }
                    for name, model in models.items()
                },
            }
            for text, corpus in corpora.items()
        },
        "answers": {
            "autoregressive original": judged(measure.answer_greedily(original, prompts), prompts),
            **{
                f"diffusion, threshold {threshold}": judged(
                    measure.answer(last, prompts, block_length=4, threshold=threshold), prompts
                )
                for threshold in THRESHOLDS
            },
        },
        "samples": _samples(tokenizer, shown, original, models),
    }


def trained(run: Path) -> Iterator[tuple[str, Path]]:
    """The models that the run has written, by the stage whose work they are, in order."""
    for folder in sorted(run.glob("exports/*")):
        yield f"after {folder.name}", folder
    if (run / "model").exists():
        yield "final", run / "model"


def stage_times(records: Sequence[Mapping[str, Any]]) -> list[Json]:
    """Steps and seconds of training of each stage; evaluation and checkpoints are not among the seconds."""
    stages: dict[str, Json] = {}
    for one in records:
        if one["kind"] == "step":
            stage = stages.setdefault(
                one["stage"], {"stage": one["stage"], "steps": 0, "seconds": 0.0, "tokens": 0}
            )
            stage["steps"] += 1
            stage["seconds"] += one["seconds"]
            stage["tokens"] += one["tokens"]
        elif one["kind"] == "eval":
            stages[one["stage"]]["held_out"] = one["loss"]
    return list(stages.values())


def asked(data: Path, samples: int) -> list[str]:
    """The first ``samples`` held-out questions of each kind."""
    return [
        turns[0]["content"]
        for name in ("definitions", "dialogues")
        for turns in [one["messages"] for one in _lines(data / f"{name}-held-out.jsonl")][:samples]
    ]


def markdown(results: Json) -> str:
    """The tables and samples of the tutorial."""
    parts = [
        _table(
            ("stage", "steps", "tokens", "seconds of steps", "held-out loss at its end"),
            [
                (one["stage"], one["steps"], one["tokens"], f"{one['seconds']:.0f}", f"{one['held_out']:.2f}")
                for one in results["steps"]
                if "held_out" in one
            ],
        ),
        _table(
            ("held-out text, model", *(f"B={size}" for size in BLOCK_LENGTHS)),
            [
                (f"{text}, {name}", *([f"{values:.2f}"] if isinstance(values, float) else _row(values)))
                for text, models in results["cross_entropy"].items()
                for name, values in models.items()
            ],
        ),
        _table(
            ("", "TPF", "TPF denoise", "NLL", "known words", "distinct pairs", "tokens"),
            [
                (
                    name,
                    f"{one['tpf']:.2f}",
                    f"{one['tpf_denoise']:.2f}",
                    f"{one['nll']:.2f}",
                    f"{one['known_words']:.0%}",
                    f"{one['distinct_pairs']:.0%}",
                    f"{one['tokens']:.0f}",
                )
                for name, one in results["answers"].items()
            ],
        ),
        *(
            f"**{question}**\n\n"
            + "\n".join(f"* {name}: {_quoted(text)}" for name, text in said.items())
            + "\n"
            for question, said in results["samples"].items()
        ),
    ]
    return "\n".join(parts)


def _samples(
    tokenizer: Tokenizer,
    questions: Sequence[str],
    original: LanguageModel,
    models: Mapping[str, LanguageModel],
) -> Json:
    prompts = [_prompt(tokenizer, one) for one in questions]
    said = {"autoregressive original": measure.answer_greedily(original, prompts)}
    for name, model in models.items():
        said[name] = measure.answer(model, prompts, block_length=4, threshold=SHOWN_THRESHOLD)
    return {
        question: {name: tokenizer.decode(answers[place].token_ids) for name, answers in said.items()}
        for place, question in enumerate(questions)
    }


def _untrained(original: LanguageModel, trained: LanguageModel) -> LanguageModel:
    return to_diffusion(original, trained.config.architectures[0], mask_token_id=trained.config.mask_token_id)


def _prompt(tokenizer: Tokenizer, question: str) -> list[int]:
    turn = [{"role": "user", "content": question}]
    return tokenizer.encode(tokenizer.render_chat(turn, add_generation_prompt=True))


def _vocabulary(data: Path) -> frozenset[str]:
    """The words of the training data."""
    text = (path.read_text(encoding="utf-8") for path in data.glob("*-train.jsonl"))
    return frozenset(word for part in text for word in measure.words(part))


def _lines(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    padded = [[*row, *[""] * (len(head) - len(row))] for row in rows]
    lines = [head, ["---"] * len(head), *padded]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def _row(values: Mapping[str, float]) -> list[str]:
    return [f"{value:.2f}" for value in values.values()]


def _quoted(text: str) -> str:
    return " ".join(text.replace("`", "'").split()) or "(nothing)"


if __name__ == "__main__":
    main()
