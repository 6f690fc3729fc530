"""The benchmark of decoding: all sides generate the same, and the last line says what was measured."""

import json
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

from support.models import TINY, random_tokens, tiny_model
from unmask.diffusion.batch import run_to_end
from unmask.diffusion.decoding import DecodingParams
from unmask.serving.ragged import RaggedBatch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BLOCK, COUNT, NEW = 8, 2, 24
PEERS = """
def peers(model):
    def counts(prompt, new, block, count):
        assert (len(prompt), block, count) == (32, 32, 4)
        return [index % model.config.vocab_size for index in range(new)]
    return {"counts": counts}

def readers(model):
    return {"counts": len}
"""


@pytest.fixture
def decode(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("decode")


@pytest.fixture
def plain(decode):
    return import_module("plain_decoding")


def of_ours(model, prompt):
    params = DecodingParams(
        max_new_tokens=NEW,
        block_length=BLOCK,
        steps=BLOCK // COUNT,
        threshold=1.1,
        eos_token_id=-1,
        mask_token_id=TINY["mask_token_id"],
    )
    batch = RaggedBatch(model, rows=1, capacity=len(prompt) + NEW, block_length=BLOCK)
    return run_to_end(batch, [prompt], params)[0].token_ids


@pytest.mark.parametrize("grouped", [True, False])
def test_the_plain_way_generates_what_we_do(plain, grouped):
    model = tiny_model(dtype=torch.float32)
    prompt = random_tokens(16)
    blocks = plain.plain_steps(
        plain.PlainModel(model, grouped=grouped), torch.tensor(prompt), new=NEW, block=BLOCK, count=COUNT
    )
    assert torch.cat(list(blocks)).tolist() == of_ours(model, prompt)


def test_so_does_the_published_way(plain):
    model = tiny_model(dtype=torch.float32)
    published = plain.PlainModel(model, grouped=False)
    prompt = random_tokens(16)
    text = torch.tensor(prompt)
    for _ in range(NEW // BLOCK):
        text = torch.cat([text, torch.full((BLOCK,), published.mask_token_id)])
        for _ in range(BLOCK // COUNT):
            plain.published_step(published, text, block=BLOCK, count=COUNT)
    assert text[16:].tolist() == of_ours(model, prompt)


def test_every_part_is_measured_and_the_last_line_says_so(decode, monkeypatch, capsys, tmp_path):
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(TINY | {"model_type": "llada2_moe"}))
    peers = tmp_path / "peers.py"
    peers.write_text(PEERS)
    given = ["decode.py", "--medium", str(config), "--small", str(config), "--repeats=1", "--rows=2"]
    monkeypatch.setattr(sys, "argv", [*given, "--prompt=32", "--new=64", "--long-prompt=64"])
    monkeypatch.setattr(decode, "_bytes_per_second", lambda: 1e9)
    monkeypatch.setenv("UNMASK_PEERS", str(peers))
    threads = torch.get_num_threads()
    try:
        decode.main()
    finally:
        torch.set_num_threads(threads)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(found) == list(decode.PARTS)
    others = ("published", "plain", "counts")
    expected = {f"{ours} against {other}" for ours in ("float32", "int8") for other in others}
    assert set(found["p1"]) == set(found["p2"]) == set(found["p3"]) == set(found["p4"]) == expected
    named = [item for part in ("p1", "p2", "p3", "p4", "p5") for item in found[part].items()]
    ratios = [ratio for name, ratio in named if not name.endswith("counts")]  # which takes no time at all
    assert len(ratios) == 4 + 4 + 4 + 4 + 4 and min(ratios) > 0
    assert all(0 < share < 1 for share in found["p7"].values())
    spent = found["parts"]["float32, 1"]
    assert {"attention", "router", "experts", "dense feed-forward", "output layer", "choice", "host"} < set(
        spent
    )


def test_memory_is_read_at_some_speed(decode, monkeypatch):
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda _: ones(1 << 20))
    assert decode._bytes_per_second() > 1e6


def test_a_stopwatch_counts_inner_calls_once(decode):
    watch = decode.Stopwatch()

    def spend(seconds):
        until = time.thread_time() + seconds
        while time.thread_time() < until:
            pass

    inner = watch.timed("inner", lambda: spend(0.05))
    outer = watch.timed("outer", lambda: (inner(), spend(0.01), inner()))
    outer()
    assert watch.seconds["inner"] >= 0.1
    assert 0.01 <= watch.seconds["outer"] < 0.1
