"""The benchmark of decoding on a GPU, tried on a CPU: what it counts, and that its last line says so."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from support.models import TINY, tiny_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("gpu_decoding")


def test_a_step_reads_the_experts_that_were_chosen_and_everything_else(benchmark):
    model = tiny_model(dtype=torch.float32)
    experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    rest = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) - experts
    rest -= model.embedding.weight.nbytes
    keys_and_values = 3 * 2 * 2 * 2 * 8 * 4 * 96  # rows x layers x both x heads x size x bytes x tokens
    for hit in (8, 2.5):
        got = benchmark._bytes_of_a_step(model, rows=3, prompt=64, experts=hit)
        assert got == pytest.approx(rest + experts * hit / 8 + keys_and_values)


def test_the_last_line_has_each_number_of_rows(benchmark, monkeypatch, capsys, tmp_path):
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(TINY | {"model_type": "llada2_moe"}))
    given = ["gpu_decoding.py", "--config", str(config), "--device=cpu", "--rows", "1", "3", "--prompt=32"]
    monkeypatch.setattr(sys, "argv", given)
    monkeypatch.setattr(benchmark, "_bytes_per_second", lambda device: 1e9)
    benchmark.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found) == {"device", "read_gb_per_s", "launched one by one"}, "a CPU records nothing"
    measured = found["launched one by one"]
    assert set(measured) == {"1", "3"}
    assert all(1 <= one["experts_per_layer"] <= 8 and one["over_the_floor"] > 0 for one in measured.values())
