"""What each part of the training is worth: the quickstart without it, over several seeds.

For each seed one autoregressive model is trained; every variant goes on from its weights, changes one thing
of ``examples/quickstart/quickstart.yaml``, and is measured on the same held-out words. A variant that shares
its conversion with another shares the run. What is done is kept in the user's cache, so an interrupted
comparison goes on where it was.

    python benchmarks/ablations.py [--seeds N] [--divide N] [--words N] [--small] [--out FOLDER]
        [--report docs/reports/ablations]
"""

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "examples" / "quickstart"
UNMASK = [sys.executable, "-m", "unmask.cli.main"]
THRESHOLDS = (0.7, 0.9, 0.95)
MERGED = 4
"""Checkpoints whose mean is taken."""

Manifest = dict[str, Any]
Change = Callable[[Manifest], None]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to train: a conversion to a diffusion model, and the fine-tuning of what came out."""

    name: str
    meaning: str
    conversion: str = "warm"
    answers: str = "confidence"
    merged: bool = False


def as_it_is(_: Manifest) -> None:
    """Change nothing."""


def no_warm_up(job: Manifest) -> None:
    """Go to full sequences at once, for as many steps in all."""
    grow, full, _ = job["spec"]["stages"]
    full |= {"steps": grow["steps"] + full["steps"], "convertTo": grow["convertTo"]}
    full["learningRate"] = grow["learningRate"]
    del job["spec"]["stages"][0]


def no_document_mask(job: Manifest) -> None:
    """Let the documents of a row see each other."""
    for stage in job["spec"]["stages"]:
        stage["documentMask"] = False


def mask_noise(job: Manifest) -> None:
    """Disturb the embeddings of masked tokens in the first steps of the conversion."""
    grow = job["spec"]["stages"][0]
    grow["embeddingNoise"] = {"std": "0.05", "steps": min(50, grow["steps"])}


def no_confidence(job: Manifest) -> None:
    """Leave out the confidence loss."""
    job["spec"]["stages"][0]["confidenceWeight"] = "0"


def complementary(job: Manifest) -> None:
    """Two views of half as many rows, each masking what the other shows: half the words for the time."""
    stage = job["spec"]["stages"][0]
    stage["rowsPerStep"] //= 2
    stage["noise"] |= {"views": 2, "complementary": True}


CONVERSIONS: Mapping[str, Change] = {
    "warm": as_it_is,
    "abrupt": no_warm_up,
    "joined": no_document_mask,
    "disturbed": mask_noise,
}
ANSWERS: Mapping[str, Change] = {
    "confidence": as_it_is,
    "plain": no_confidence,
    "complementary": complementary,
}
VARIANTS = (
    Variant(name="all", meaning="as in the quickstart, for fewer steps after the autoregressive stage"),
    Variant(
        name="no warm-up", meaning="full sequences from the first diffusion step on", conversion="abrupt"
    ),
    Variant(
        name="no document mask", meaning="packed words see each other until `answers`", conversion="joined"
    ),
    Variant(
        name="mask noise",
        meaning="noise of 0.05 on the embeddings of masks, in the first 50 steps",
        conversion="disturbed",
    ),
    Variant(name="no confidence loss", meaning='`confidenceWeight: "0"`', answers="plain"),
    Variant(name="complementary masks", meaning="two views of half the rows", answers="complementary"),
    Variant(name="merge", meaning=f"mean of the last {MERGED} checkpoints", merged=True),
)


def main() -> None:
    """Train what is missing, measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="few steps, learning little, to test this file")
    parser.add_argument("--out", type=Path, help="folder for data and runs [default: in the user's cache]")
    parser.add_argument("--report", type=Path, help="write PATH.md and PATH.json")
    parser.add_argument(
        "--divide", type=int, default=2, help="divide the steps after the autoregressive stage [default: 2]"
    )
    parser.add_argument("--words", type=int, default=1000, help="held-out words to answer [default: 1000]")
    parser.add_argument("--variants", help="names with commas [default: all]")
    options = parser.parse_args()
    chosen = [one for one in VARIANTS if options.variants is None or one.name in options.variants.split(",")]
    kind = "small" if options.small else f"{options.divide}-{options.words}"
    rig = Rig(
        options.out or cache() / f"ablations-{kind}",
        small=options.small,
        divide=1 if options.small else options.divide,
        words=32 if options.small else options.words,
    )
    rig.prepare_data()
    started = time.monotonic()
    results: dict[str, list[dict[str, Any]]] = {one.name: [] for one in chosen}
    for seed in range(options.seeds):
        for variant in chosen:
            results[variant.name].append(rig.measure(variant, seed))
    report = {
        "command": "python benchmarks/ablations.py " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "seeds": options.seeds,
        "words": rig.samples,
        "divide": rig.divide,
        "results": results,
    }
    table = as_table(chosen, results)
    print(table)
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)
    if options.report:
        options.report.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        options.report.with_suffix(".md").write_text(as_page(report, table), encoding="utf-8")
    print(json.dumps({name: summary(rows) for name, rows in results.items()}))


class Rig:
    """Runs and measures, in one folder."""

    def __init__(self, folder: Path, *, small: bool, divide: int, words: int) -> None:
        self.folder, self.divide, self.samples = folder, divide, words
        manifest = QUICKSTART / ("quickstart-small.yaml" if small else "quickstart.yaml")
        self.base: Manifest = yaml.safe_load(manifest.read_text(encoding="utf-8"))
        self.words = folder / "held-out.jsonl"
        folder.mkdir(parents=True, exist_ok=True)

    def prepare_data(self) -> None:
        """Make the words and the tokenizer."""
        run([sys.executable, str(QUICKSTART / "prepare.py"), str(self.folder / "data")])
        lines = (self.folder / "data" / "validation.jsonl").read_text(encoding="utf-8").splitlines()
        self.words.write_text("\n".join(lines[: self.samples]) + "\n", encoding="utf-8")

    def measure(self, variant: Variant, seed: int) -> dict[str, Any]:
        """Figures of ``variant``, trained now unless it was before."""
        pretrained = self.train(f"seed{seed}-pretrain", self.part(seed, 0, 1))
        converted = self.converted(variant.conversion, seed, pretrained)
        run_folder = self.answered(variant, seed, converted)
        model = self.merged(run_folder) if variant.merged else run_folder / "model"
        done = run_folder / ("merged.json" if variant.merged else "measured.json")
        if not done.exists():
            figures = self.figures(model)
            done.write_text(json.dumps(figures), encoding="utf-8")
        found: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        found["largest_grad_norm"] = largest_norm(converted)
        print(f"seed {seed}, {variant.name}: {json.dumps(found)}", file=sys.stderr, flush=True)
        return found

    def converted(self, name: str, seed: int, pretrained: Path) -> Path:
        """The run that makes a diffusion model of the autoregressive one."""
        job = self.part(seed, 1, 4, init=pretrained)
        CONVERSIONS[name](job)
        return self.train(f"seed{seed}-{name}", job)

    def answered(self, variant: Variant, seed: int, converted: Path) -> Path:
        """The run that fine-tunes it."""
        job = self.part(seed, 4, 5, init=converted)
        ANSWERS[variant.answers](job)
        return self.train(f"seed{seed}-{variant.conversion}-{variant.answers}", job)

    def part(self, seed: int, first: int, end: int, *, init: Path | None = None) -> Manifest:
        """A job of some of the quickstart's stages, shortened if it goes on from the run ``init``."""
        job = copy.deepcopy(self.base)
        spec = job["spec"]
        spec["stages"] = spec["stages"][first:end]
        spec["data"]["seed"] = seed
        spec["parallelism"] = {"processesPerNode": 1, "microBatchRows": 32}
        spec["checkpoint"] = {"uri": "pvc://run", "everySteps": 50, "keepLast": MERGED}
        spec["evaluation"] = {"everySteps": 10_000, "batches": 4}
        for stage in spec["stages"]:
            if init is not None:
                stage["steps"] //= self.divide
                rate = stage["learningRate"]
                rate |= {key: value // self.divide for key, value in rate.items() if key.endswith("Steps")}
            stage["export"] = False
        if init is not None:
            spec["model"] = {"init": {"uri": "pvc://init/model"}}
            job["metadata"]["annotations"] = {"init": init.name}
        return job

    def train(self, name: str, job: Manifest) -> Path:
        """Run ``job`` unless it is done; the folder of the run."""
        folder = self.folder / name
        job["metadata"]["name"] = name
        init = job["metadata"].pop("annotations", {}).get("init")
        if (folder / "model" / "config.json").exists():
            return folder
        folder.mkdir(exist_ok=True)
        manifest = folder / "job.yaml"
        manifest.write_text(json.dumps(job, indent=1), encoding="utf-8")  # which is YAML
        volumes = {"data": self.folder / "data", "run": folder} | (
            {"init": self.folder / init} if init else {}
        )
        given = [part for key, path in volumes.items() for part in ("--volume", f"{key}={path}")]
        run([*UNMASK, "run", "-f", str(manifest), *given], log=folder / "run.log")
        return folder

    def merged(self, run_folder: Path) -> Path:
        """The mean of the last checkpoints of a run, as a model."""
        merged = run_folder / "merged"
        if not (merged / "config.json").exists():
            checkpoints = sorted((run_folder / "checkpoints").glob("step-*"))[-MERGED:]
            companions = f"--companions={run_folder / 'model'}"
            run([*UNMASK, "merge", companions, *map(str, checkpoints), str(merged)])
        return merged

    def figures(self, model: Path) -> dict[str, Any]:
        """How ``model`` answers held-out words at several thresholds, and how likely it finds the answers."""
        options = [
            "--elbo",
            str(self.words),
            "--curve",
            str(self.words),
            "--format=completion",
            "--responses",
        ]
        amount = [f"--samples={self.samples}", "--max-tokens=24", "--draws=8", "--json"]
        at = f"--thresholds={','.join(map(str, THRESHOLDS))}"
        measured: dict[str, Any] = json.loads(run([*UNMASK, "eval", str(model), *options, *amount, at]))
        return measured


def largest_norm(run_folder: Path) -> float:
    """The largest norm of the gradient, before it was clipped, in the first steps of a run."""
    lines = (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [one for one in map(json.loads, lines) if one["kind"] == "step"]
    return max(float(one["grad_norm"]) for one in steps[:50])


def cache() -> Path:
    """A folder of the user's cache."""
    root = os.environ.get("UNMASK_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "unmask"


def run(command: Sequence[str], log: Path | None = None) -> str:
    """Run ``command`` on one thread; what it printed.

    Raises:
        SystemExit: It failed.
    """
    ended = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    if log is not None:
        log.write_text(ended.stdout + ended.stderr, encoding="utf-8")
    if ended.returncode:
        sys.exit(f"{' '.join(command)}\nended with {ended.returncode}:\n{ended.stderr[-2000:]}")
    return ended.stdout


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Each figure of a variant, seed by seed."""
    curve = {point["threshold"]: [row["curve"][place] for row in rows] for place, point in _places(rows)}
    found = {
        "largest gradient norm": [row["largest_grad_norm"] for row in rows],
        "nats": [row["perplexity"]["nll_per_token"] for row in rows],
    }
    for threshold, points in curve.items():
        found[f"exact match at {threshold}"] = [point["exact_match"] for point in points]
        found[f"TPF at {threshold}"] = [point["tpf"] for point in points]
    return found


def _places(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, Mapping[str, Any]]]:
    return list(enumerate(rows[0]["curve"]))


def as_table(variants: Sequence[Variant], results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Means; over several seeds, standard deviations, and how many rose and fell against the first row."""
    figures = {one.name: summary(results[one.name]) for one in variants}
    columns = list(figures[variants[0].name])
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    base = figures[variants[0].name]
    for one in variants:
        cells = []
        for column in columns:
            values = figures[one.name][column]
            cell = f"{statistics.mean(values):.3f}"
            if len(values) > 1:
                cell += f" +- {statistics.stdev(values):.3f}"
            if len(values) > 1 and one is not variants[0]:
                pairs = list(zip(values, base[column], strict=True))
                rose, fell = sum(new > old for new, old in pairs), sum(new < old for new, old in pairs)
                cell += f" ({rose} up, {fell} down)"
            cells.append(cell)
        lines.append(f"| {one.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def as_page(report: Mapping[str, Any], table: str) -> str:
    """The report for people."""
    meanings = "\n".join(
        f"* *{one.name}*: {one.meaning}." for one in VARIANTS if one.name in report["results"]
    )
    return f"""# What each part of the training is worth

`{report["command"].strip()}` on {report["machine"]}, {report["date"]}: {report["seeds"]} seed(s),
{report["words"]} held-out words, 1/{report["divide"]} of the quickstart's steps after its autoregressive
stage. Mean +- standard deviation over the seeds; in brackets how many seeds rose and fell against the first
row, which starts from the same autoregressive weights. *largest gradient norm*: of the first 50 steps of the
conversion, before clipping. *nats*: the bound on an answer's negative log-likelihood per phoneme.

{table}
{meanings}
"""


if __name__ == "__main__":
    main()
