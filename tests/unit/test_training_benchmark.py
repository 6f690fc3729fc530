"""The benchmark of a training step: both sides compute the same, and the last line says what was measured.

Here the measurements share this process; by itself the benchmark starts one for each.
"""

import datetime
import json
import sys
from importlib import import_module
from pathlib import Path

import pytest

from support.manifests import TINY_CONFIG

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = TINY_CONFIG | {
    "architectures": ["LLaDA2MoeModelLM"],
    "model_type": "llada2_moe",
    "partial_rotary_factor": 0.5,
    "num_hidden_layers": 3,
}


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    """A function that runs the benchmark on a tiny model with more options, and returns its lines."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = import_module("training")
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(TINY))

    def in_this_process(side, gradient):
        given = [*sys.argv, "--side", side, *(["--gradient", str(gradient)] if gradient else [])]
        with monkeypatch.context() as context:
            context.setattr(sys, "argv", given)
            return module._measure(module._options())

    def run(capsys, *options):
        given = ["training.py", "--config", str(config), "--length=48", "--block=8", "--repeats=2", *options]
        monkeypatch.setattr(sys, "argv", given)
        module.main()
        return capsys.readouterr().out.splitlines()

    monkeypatch.setattr(module, "_in_a_process", in_this_process)
    yield run
    del sys.modules["training"], sys.modules["public_recipe"]


@pytest.mark.parametrize("options", [(), ("--complementary", "--grouped")], ids=["recipe", "stronger recipe"])
def test_the_last_line_is_what_was_measured(benchmark, capsys, options):
    lines = benchmark(capsys, *options)
    last = json.loads(lines[-1])
    assert last["lossDifference"] <= last["lossTolerance"] == 1e-5
    assert last["gradientDifference"] <= last["gradientTolerance"] == 1e-4
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:3] in ("| 1", "| 2")]
    assert [row[1] for row in rows] == ["recipe", "unmask", "unmask", "recipe"]
    for ratio, column in (("stepsPerSecondRatio", 2), ("cpuTimeRatio", 3)):
        each = [float(rows[recipe][column]) / float(rows[own][column]) for recipe, own in ((0, 1), (3, 2))]
        assert last[ratio] == pytest.approx(sum(each) / 2, abs=1e-3)
    assert last["recipe"].keys() == last["unmask"].keys() == {"seconds", "cpuSeconds", "stepMiB", "restMiB"}
    assert (last["model"], last["length"], last["block"], last["repeats"]) == ("tiny", 48, 8, 2)
    assert last["complementary"] is ("--complementary" in options)
    assert last["recipeExperts"] == ("grouped" if "--grouped" in options else "loop")
    assert last["command"].startswith("python benchmarks/training.py --config")
    assert last["machine"].endswith("1 thread")
    datetime.date.fromisoformat(last["date"])


def test_sides_that_differ_are_no_measurement(benchmark, capsys, monkeypatch):
    recipe = import_module("training").loss_of
    monkeypatch.setattr(
        import_module("training"), "loss_of", lambda *given, **options: 1.001 * recipe(*given, **options)
    )
    with pytest.raises(SystemExit, match=r"do not compute the same: the loss differs by 1\.0e-03"):
        benchmark(capsys)
