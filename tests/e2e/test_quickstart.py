"""The quickstart end to end: data, every stage, serving, answers, and the figures it must reach."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.counts import FULL
from support.quickstart import EXAMPLE

pytestmark = pytest.mark.slow

SIZE = [] if FULL else ["--small"]
STAGES = ["pretrain", "grow", "full", "shrink", "answers"]


def demonstrate(out: Path, *options: str) -> tuple[str, dict[str, Any], Path]:
    """Run the demonstration; returns what it printed, its results and the folder of the run."""
    environment = dict(os.environ)
    if FULL:  # with all cores, as people do; the small one has other tests beside it
        environment.pop("OMP_NUM_THREADS", None)
    ended = subprocess.run(
        [sys.executable, EXAMPLE / "demo.py", "--out", out, *options],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=environment,
    )
    (run,) = out.glob("quickstart-*")
    return ended.stdout, json.loads((run / "results.json").read_text()), run


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], Path]:
    return demonstrate(tmp_path_factory.mktemp("quickstart"), *SIZE)


def test_every_stage_runs_and_the_result_answers_through_the_server(demonstration):
    printed, results, run = demonstration
    assert list(results["stage_seconds"]) == STAGES
    assert results["samples"] >= 1000
    assert results["diffusion"].keys() == {"0.7", "0.9", "0.95"}
    for figures in results["diffusion"].values():
        assert 0 < figures["tpf"] <= figures["tpf_decode"] <= figures["tpf_denoise"]
    assert "diffusion, threshold 0.9" in printed
    assert (run / "stages.png").read_bytes().startswith(b"\x89PNG")


def test_a_lower_threshold_never_takes_more_forwards_on_the_whole(demonstration):
    _, results, _ = demonstration
    figures = [results["diffusion"][threshold]["tpf_denoise"] for threshold in ("0.95", "0.9", "0.7")]
    assert figures == sorted(figures)


def test_both_models_reach_their_bars(demonstration):
    """Those of the full demonstration, or for the small one that it has begun to learn."""
    _, results, _ = demonstration
    autoregressive, diffusion = results["autoregressive"], results["diffusion"]["0.9"]
    if FULL:
        assert autoregressive["exact_match"] >= 0.25
        assert diffusion["exact_match"] >= autoregressive["exact_match"] - 0.05
        assert diffusion["tpf_denoise"] >= 2
    else:
        assert autoregressive["phoneme_error_rate"] < 0.9


def test_the_demonstration_run_again_only_serves_and_measures(demonstration):
    _, results, run = demonstration
    log = (run / "metrics.jsonl").read_bytes()
    _, again, _ = demonstrate(run.parent, *SIZE)
    assert (run / "metrics.jsonl").read_bytes() == log
    assert again["autoregressive"] == results["autoregressive"]
    assert again["diffusion"] == results["diffusion"]
