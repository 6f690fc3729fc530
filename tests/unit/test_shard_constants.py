"""What is measured of a machine for planning shards: rates, and the line through frames of two sizes."""

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch

from support.models import TINY
from unmask.experts.planning.constants import Constants, Transport, assumed, read_constants
from unmask.experts.planning.forward import predicted_ratio
from unmask.experts.planning.setting import Setting, Work
from unmask.models.registry import parse_config
from unmask.models.shape import shape_of

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHAPE = shape_of(parse_config(TINY))


@pytest.fixture
def measuring(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = import_module("shard_constants")
    monkeypatch.setattr(module, "_LARGE", 64)
    return module


def test_a_line_goes_through_both_sizes_of_frames(measuring):
    sizes = {8: 128 + 8 * (2 * 4 * 64 + 6 * 2), 256: 128 + 256 * (2 * 4 * 64 + 6 * 2)}
    seconds = {rows: 2e-4 + 5e-10 * size for rows, size in sizes.items()}
    found = measuring.fitted(seconds, choices=2, hidden=64)
    assert found.frame_seconds == pytest.approx(2e-4)
    assert found.frame_seconds_per_byte == pytest.approx(5e-10)
    noise = measuring.fitted({8: 2e-4, 256: 1e-4}, choices=2, hidden=64)
    assert (noise.frame_seconds, noise.frame_seconds_per_byte) == (pytest.approx(2e-4), 0.0)


def test_each_size_is_asked_for_as_often_as_told(measuring):
    asked = []
    measuring.transport(asked.append, choices=1, hidden=1, repeats=3)
    assert sorted(set(asked)) == sorted(measuring.FRAMES)
    assert all(asked.count(rows) >= 3 for rows in measuring.FRAMES)


def test_a_machine_is_measured_and_planned_with(measuring, tmp_path):
    before = torch.get_num_threads()
    whole = measuring.machine(SHAPE, threads=1, tokens=16, repeats=1)
    half = measuring.machine(SHAPE, threads=1, tokens=16, part=0.5, repeats=1)
    assert torch.get_num_threads() == before
    constants = Constants(
        measured="here",
        engine=whole,
        shard=half,
        transports={"grpc": Transport(frame_seconds=1e-4, frame_seconds_per_byte=1e-9)},
        overlap=False,
    )
    setting = Setting(shape=SHAPE, work=Work(), constants=constants, weights_as="float32", rows_as="float32")
    assert predicted_ratio(setting, 2) > 0
    # What was not measured is not written, and so is not called measured when it is read.
    path = tmp_path / "constants.json"
    path.write_text(constants.model_dump_json(exclude_unset=True))
    assert set(json.loads(path.read_text())["engine"]) == {
        "memory_bytes_per_second",
        "flops_per_second",
        "expert_flops_per_second",
        "expert_layer_seconds",
        "host_copy_seconds_per_byte",
    }
    known = read_constants(path, assumed(device="a", memory_bytes_per_second=1, flops_per_second=1))
    sources = {name: source for name, _, source in known.each(transport="grpc")}
    assert sources["engine.flops_per_second"] == sources["overlap"] == "measured: here"
    assert sources["engine.constant_bytes"].startswith("assumed")
    assert sources["transports.grpc.engine_share"].startswith("assumed")
