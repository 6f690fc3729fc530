"""The benchmark of a server: what its users wait for does not depend on how fast the machine is."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from support.models import TINY
from support.serving import CountingBatch
from unmask.client.load import arrivals
from unmask.diffusion.decoding import DecodingParams

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def serving(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("serving")


class Timed(CountingBatch):
    """Each forward takes a time that grows with its rows, on a clock of its own."""

    def __init__(self, *, rows=8, speed=1.0):
        super().__init__(rows=rows)
        self.speed, self.seconds = speed, 0.0

    def step(self):
        self.seconds += (2 + self.active) / self.speed
        return super().step()


def admit(batch, ask, user):
    params = DecodingParams(max_new_tokens=ask.new, block_length=4, eos_token_id=-1, mask_token_id=1)
    return batch.admit([5] * ask.prompt, params)


def waited(serving, asks, times, way, **machine):
    batch = Timed(**machine)
    return serving.latencies(batch, asks, times, way=way, admit=admit, now=lambda: batch.seconds)


@pytest.mark.parametrize("share", [0.3, 0.8, 2.0])
def test_a_machine_of_another_speed_has_the_same_ratios(serving, share):
    asks, found = serving._asks(32), []
    for speed in (0.1, 30.0):
        rate = len(asks) / max(waited(serving, asks, [0.0] * len(asks), "continuous", speed=speed))
        times = arrivals(len(asks), rate=share * rate, seed=5)
        found.append(
            [serving._percentile(waited(serving, asks, times, way, speed=speed), 95) for way in serving.WAYS]
        )
    slow, fast = found
    assert slow == pytest.approx([300 * one for one in fast])
    continuous, static, padded = fast
    assert continuous < static < padded


def test_who_waits_for_whom(serving):
    """Three rows, forwards of 2 seconds and one for each row; the fourth comes while the others run."""
    asks = [serving.Ask(1, 2), serving.Ask(1, 4), serving.Ask(1, 1), serving.Ask(1, 3)]
    times = [0.0, 0.0, 0.0, 6.0]
    # 5 with three rows, then 4 with two as long as there are two, the fourth in a row that has come free.
    assert waited(serving, asks, times, "continuous", rows=3) == [9.0, 17.0, 5.0, 14.0]
    # 5 with three, 4 with two, and twice 3 with one; then the fourth alone.
    assert waited(serving, asks, times, "static", rows=3) == [15.0, 15.0, 15.0, 15.0 + 9.0 - 6.0]
    # Four forwards of three rows, for the longest asks for four.
    assert waited(serving, asks, times, "padded", rows=3) == [20.0, 20.0, 20.0, 20.0 + 9.0 - 6.0]


def test_nobody_s_time_runs_before_the_request_comes(serving):
    asks = [serving.Ask(1, 1), serving.Ask(1, 2)]
    for way in serving.WAYS:
        assert waited(serving, asks, [100.0, 200.0], way) == pytest.approx([3.0, 6.0])


def test_every_part_is_measured_and_the_last_line_says_so(serving, monkeypatch, capsys, tmp_path):
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(TINY | {"max_position_embeddings": 2048}))
    monkeypatch.setattr(sys, "argv", ["serving.py", "--config", str(config), "--each=1", "--share=0.5"])
    monkeypatch.setattr(serving, "SHAPES", {"2 rows, mixed": [32, 64]})
    monkeypatch.setattr(
        serving, "_asks", lambda count: [serving.Ask(32 * (1 + n % 2), 32) for n in range(count)]
    )
    monkeypatch.setattr(serving, "GAPS", 4)
    monkeypatch.setattr(serving, "USERS", 4)
    threads = torch.get_num_threads()
    try:
        serving.main()
    finally:
        torch.set_num_threads(threads)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(found) == [
        "step_of_slots", "users_ask_at", "p95_latency_over", "inter_block_p95_with_long_prompts",
    ]  # fmt: skip
    assert found["users_ask_at"] == 0.5 and list(found["step_of_slots"]) == ["2 rows, mixed"]
    assert found["p95_latency_over"].keys() == {"static", "padded"}
    assert found["inter_block_p95_with_long_prompts"].keys() == {"2 rows", "8 rows"}
    assert all(ratio > 0 for part in found.values() if isinstance(part, dict) for ratio in part.values())
