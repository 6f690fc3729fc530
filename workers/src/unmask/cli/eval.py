"""``unmask eval DIR``: what a model is worth."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from unmask.cli.local_path import LocalPath
from unmask.errors import UsageError

if TYPE_CHECKING:
    from unmask.evaluation.subject import Subject
    from unmask.training.corpus import Source

__all__ = ["command", "tables"]


def _numbers(context: click.Context, option: click.Parameter, value: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in value.split(",")) if value else ()
    except ValueError:
        raise click.BadParameter(f"got {value!r}; write numbers with commas, such as 0.5,0.9") from None


@click.command("eval", short_help="Measure a model: perplexity, tasks, quality against speed.")
@click.argument("folder", type=LocalPath(), metavar="DIR")
@click.option(
    "--elbo",
    "likelihood_of",
    type=LocalPath(),
    metavar="FILE",
    help="Measure perplexity on it.",
)
@click.option(
    "--curve",
    "curve_of",
    type=LocalPath(),
    metavar="FILE",
    help="Answer its prompts at several speeds.",
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="NAME",
    help="humaneval or reasoning-gym/PUZZLE; may be repeated.",
)
@click.option("--harness", metavar="TASKS", help="Tasks of lm-evaluation-harness, with commas.")
@click.option(
    "--format",
    "data_format",
    type=click.Choice(["text", "messages", "completion"]),
    help="Of FILE.  [default: text for --elbo, completion for --curve]",
)
@click.option(
    "--bound",
    type=click.Choice(["block", "full"]),
    help="By blocks, or over whole documents at once.  [default: what the model's tokens see]",
)
@click.option("--block-length", type=click.IntRange(1), help="Tokens of a block.  [default: the model's]")
@click.option(
    "--draws", type=click.IntRange(2), default=32, show_default=True, help="Sets of masks to average over."
)
@click.option(
    "--masks",
    type=click.Choice(["training", "counted"]),
    default="training",
    show_default=True,
    help="Draw them as training does, or by number, which has the same mean and a smaller error.",
)
@click.option("--length", type=click.IntRange(2), help="Most tokens of a document.  [default: the context]")
@click.option(
    "--overlong",
    type=click.Choice(["Error", "Skip", "Split"]),
    default="Error",
    show_default=True,
    help="What to do with longer ones.",
)
@click.option("--responses", is_flag=True, help="Take prompts as given, and measure answers alone.")
@click.option(
    "--thresholds",
    default="0.5,0.7,0.8,0.9,0.95,0.99",
    show_default=True,
    callback=_numbers,
    help="Confidences of --curve.",
)
@click.option("--steps", default="", callback=_numbers, help="Also so many steps per block, for --curve.")
@click.option(
    "--samples", type=click.IntRange(1), default=64, show_default=True, help="Prompts, the first ones."
)
@click.option(
    "--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="Longest answer, in tokens."
)
@click.option(
    "--threshold",
    type=click.FloatRange(0, min_open=True),
    help="Confidence for --task and --harness.  [default: the model's]",
)
@click.option(
    "--chat/--raw",
    default=None,
    help="A task's question is a user's turn, or text to continue.  [default: a turn if the model has a chat "
    "template; for --harness raw]",
)
@click.option("--allow-code-execution", is_flag=True, help="Let humaneval run what the model writes.")
@click.option(
    "--include-path",
    type=LocalPath(),
    metavar="DIR",
    help="Where --harness finds tasks of your own.",
)
@click.option("--limit", type=click.IntRange(1), help="Most documents of each of its tasks.")
@click.option("--fewshot", type=click.IntRange(0), help="Examples in its prompts.  [default: the task's]")
@click.option("--picture", type=LocalPath(), help="Draw the curve there, as a PNG.")
@click.option(
    "--seed", type=click.IntRange(0, 2**53 - 1), default=0, show_default=True, help="Of all chance."
)
@click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    folder: Path,
    likelihood_of: Path | None,
    curve_of: Path | None,
    tasks: tuple[str, ...],
    harness: str | None,
    device: str,
    seed: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure the model in DIR (docs/how-to/evaluate-a-model.md).

    Give one or more of --elbo, --curve, --task and --harness. Results go to stdout as tables, or with --json
    as one object. A diffusion model's perplexity is a bound, with the standard error of its Monte Carlo; an
    autoregressive model's is exact.
    """
    from unmask.evaluation.subject import Subject

    if not (likelihood_of or curve_of or tasks or harness):
        raise UsageError("nothing to measure: give --elbo FILE, --curve FILE, --task NAME or --harness TASKS")
    subject = Subject.load(folder, device=device)
    results: dict[str, Any] = {"model": subject.name, "architecture": subject.model.config.architecture}
    if likelihood_of:
        results["perplexity"] = _perplexity(subject, likelihood_of, seed=seed, **options)
    if curve_of:
        results["curve"] = _curve(subject, curve_of, **options)
    if tasks:
        results["tasks"] = _tasks(subject, tasks, seed=seed, **options)
    if harness:
        results["harness"] = _harness(subject, harness.split(","), seed=seed, **options)
    if as_json:
        click.echo(json.dumps(results, indent=2))
    else:
        click.echo("\n\n".join("\n".join(lines) for lines in tables(results)))


def _perplexity(
    subject: "Subject",
    path: Path,
    *,
    data_format: Literal["text", "messages", "completion"] | None,
    seed: int,
    bound: Literal["block", "full"] | None,
    block_length: int | None,
    draws: int,
    masks: Literal["training", "counted"],
    length: int | None,
    overlong: Literal["Error", "Skip", "Split"],
    responses: bool,
    **_: Any,
) -> dict[str, Any]:
    from unmask.evaluation.perplexity import perplexity

    return perplexity(
        subject,
        [_source(path, data_format or "text")],
        bound=bound,
        block_length=block_length,
        draws=draws,
        masks=masks,
        seed=seed,
        length=length,
        overlong=overlong,
        responses_only=responses,
    ).to_json_dict()


def _curve(
    subject: "Subject",
    path: Path,
    *,
    data_format: Literal["text", "messages", "completion"] | None,
    thresholds: Sequence[float],
    steps: Sequence[float],
    samples: int,
    max_tokens: int,
    block_length: int | None,
    picture: Path | None,
    **_: Any,
) -> list[dict[str, Any]]:
    from unmask.evaluation.curve import curve, draw
    from unmask.training.corpus import Library

    library = Library(subject.tokenizer, eos_token_id=subject.model.config.eos_token_id)
    points = curve(
        subject,
        library.questions([_source(path, data_format or "completion")], count=samples),
        thresholds=thresholds,
        steps=[int(count) for count in steps],
        max_new_tokens=max_tokens,
        block_length=block_length,
    )
    if picture:
        draw(points, picture, title=subject.name)
    return [point.to_json_dict() for point in points]


def _tasks(
    subject: "Subject",
    names: Sequence[str],
    *,
    seed: int,
    samples: int,
    max_tokens: int,
    threshold: float | None,
    block_length: int | None,
    chat: bool | None,
    allow_code_execution: bool,
    **_: Any,
) -> list[dict[str, Any]]:
    from unmask.evaluation.tasks import measure, task_named

    params = subject.params(max_new_tokens=max_tokens, threshold=threshold, block_length=block_length)
    # All are made before the first is asked: a mistyped name should not cost an evaluation.
    tasks = [
        task_named(name, samples=samples, seed=seed, allow_code_execution=allow_code_execution)
        for name in names
    ]
    return [measure(subject, task, params, chat=chat).to_json_dict() for task in tasks]


def _harness(
    subject: "Subject",
    names: Sequence[str],
    *,
    seed: int,
    draws: int,
    max_tokens: int,
    threshold: float | None,
    block_length: int | None,
    chat: bool | None,
    include_path: Path | None,
    limit: int | None,
    fewshot: int | None,
    **_: Any,
) -> dict[str, Any]:
    from unmask.evaluation.harness import HarnessOptions, run_harness

    options = HarnessOptions(
        draws=draws, seed=seed, max_new_tokens=max_tokens, threshold=threshold, block_length=block_length
    )
    return run_harness(
        subject,
        names,
        options,
        include_path=include_path,
        limit=limit,
        fewshot=fewshot,
        chat=bool(chat),
    )


def _source(path: Path, data_format: Literal["text", "messages", "completion"]) -> "Source":
    from unmask.training.corpus import Source

    return Source(path, data_format)


def tables(results: Mapping[str, Any]) -> Iterator[list[str]]:
    """The results for people: one table each."""
    if found := results.get("perplexity"):
        kind = {
            "exact": "perplexity",
            "block": f"perplexity, at most (blocks of {found['block_length']})",
            "full": "perplexity, at most (whole documents)",
        }[found["bound"]]
        yield [
            f"{kind:<44} {found['perplexity']:.4f} +- {found['perplexity_standard_error']:.4f}",
            f"{'nats per token':<44} {found['nll_per_token']:.5f} +- {found['nll_standard_error']:.5f}",
            f"{'bits per token':<44} {found['bits_per_token']:.5f}",
            f"{'over':<44} {found['tokens']:,} tokens of {found['documents']:,} documents, "
            f"{found['skipped']} too long; {found['draws']} draws ({found['masks']}), seed {found['seed']}",
        ]
    if points := results.get("curve"):
        yield _table(
            ("threshold", "steps", "exact", "error", "tpf", "decode", "denoise", "tokens/s"),
            (
                (
                    "-" if point["steps"] else f"{point['threshold']:g}",
                    str(point["steps"] or "-"),
                    f"{point['exact_match']:.3f}",
                    f"{point['token_error_rate']:.3f}",
                    f"{point['tpf']:.2f}",
                    f"{point['tpf_decode']:.2f}",
                    f"{point['tpf_denoise']:.2f}",
                    f"{point['tokens_per_second']:.1f}",
                )
                for point in points
            ),
        )

    if tasks := results.get("tasks"):
        yield _table(
            ("task", "samples", "score", "+-", "right", "tokens/forward"),
            (
                (
                    task["task"],
                    str(task["samples"]),
                    f"{task['score']:.3f}",
                    f"{task['standard_error']:.3f}",
                    f"{task['right']:.3f}",
                    f"{task['tokens_per_forward']:.2f}",
                )
                for task in tasks
            ),
        )
    if harness := results.get("harness"):
        yield _table(
            ("task", "metric", "value"),
            (
                (task, metric, f"{value:.4f}" if isinstance(value, float) else str(value))
                for task, measured in harness["results"].items()
                for metric, value in measured.items()
                if metric not in _SETTINGS
            ),
        )


_SETTINGS = ("alias", "name", "sample_len", "sample_count")
"""What the harness puts beside the metrics of a task."""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns, right-aligned."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
