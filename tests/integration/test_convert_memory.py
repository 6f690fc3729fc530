"""Conversion in little memory: a checkpoint far larger than what the process may have."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from support import counts
from support.checkpoints import LING_MINI, SMALL_LING, ling_tokenizer, write_checkpoint

# The memory that a process takes for itself; pages of files do not count, and conversion maps none.
CHILD = """
import resource, sys
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
from unmask.cli.main import _exit_code
code = _exit_code(sys.argv[2:])
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("peak", int(peak) * 1024)
sys.exit(code)
"""
LIMIT = counts.of(sample=1_000_000_000, full=2_000_000_000)
# A sample of 0.44 GB, or seven of the real mini's layers of experts: 12.7 GB.
SHAPES = LING_MINI | (
    {"num_hidden_layers": 8}
    if counts.FULL
    else {"num_hidden_layers": 3, "hidden_size": 512, "num_experts": 64, "moe_intermediate_size": 256}
)


def peak_of(*arguments, limit=LIMIT):
    """Run the command under the limit; returns the most memory that was in use, of every kind."""
    command = [sys.executable, "-c", CHILD, str(limit), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def opened(folder):
    """Tensor name -> the open file that has it."""
    files = [safe_open(file, "pt") for file in sorted(folder.glob("*.safetensors"))]
    return {name: file for file in files for name in file.keys()}


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_checkpoint_larger_than_memory_converts_exactly(tmp_path, record_measurement):
    source, target = tmp_path / "ling", tmp_path / "llada2"
    try:
        write_checkpoint(source, SHAPES, shards=4, extra=("model.layers.99.eh_proj.weight",))
        ling_tokenizer(source)
        size = sum(file.stat().st_size for file in source.iterdir())
        assert size > counts.of(sample=400_000_000, full=12_000_000_000)
        write_checkpoint(tmp_path / "small", SMALL_LING)
        at_least = peak_of("convert", tmp_path / "small", tmp_path / "small-target")

        shards = ("--max-shard-bytes", size // 3)
        peak = peak_of("convert", source, target, "--to", "LLaDA2MoeModelLM", *shards)
        record_measurement("converted checkpoint, bytes", size)
        record_measurement("most memory while converting it, bytes", peak)
        record_measurement("most memory while converting a tiny one, bytes", at_least)
        assert peak < LIMIT
        assert peak - at_least < 250_000_000

        before, after = opened(source), opened(target)
        assert after.keys() == before.keys() - {"model.layers.99.eh_proj.weight"}
        for name, file in after.items():
            assert torch.equal(file.get_tensor(name), before[name].get_tensor(name)), name
        peak_of("inspect", target)  # which compares the checksums
        assert json.loads((target / "config.json").read_text())["mask_token_id"] == 156895
    finally:
        shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_the_limit_would_stop_a_process_that_loads_the_model(tmp_path):
    """Or the test above would show nothing."""
    content = "bytearray(300_000_000)"
    script = CHILD.replace("code = _exit_code(sys.argv[2:])", f"import torch; code = len({content}) == 0")
    done = subprocess.run([sys.executable, "-c", script, "1000000000"], capture_output=True, timeout=300)
    assert b"MemoryError" in done.stderr


@pytest.mark.slow
def test_the_mean_of_checkpoints_larger_than_memory_is_written(tmp_path, record_measurement):
    try:
        sources = [tmp_path / name for name in ("a", "b", "c")]
        write_checkpoint(sources[0], SHAPES)
        for other in sources[1:]:
            shutil.copytree(sources[0], other, copy_function=os.link)
        size = sum(file.stat().st_size for file in sources[0].iterdir())
        write_checkpoint(tmp_path / "small", SMALL_LING)
        at_least = peak_of("merge", tmp_path / "small", tmp_path / "small", tmp_path / "small-target")
        peak = peak_of("merge", *sources, tmp_path / "mean", limit=2_000_000_000)
        record_measurement("bytes of each of three merged checkpoints", size)
        record_measurement("most memory while merging them, bytes", peak)
        assert peak - at_least < 400_000_000 < 3 * size
        before, after = opened(sources[0]), opened(tmp_path / "mean")
        assert before.keys() == after.keys()
        for name in sorted(before)[:: max(1, len(before) // 50)]:
            assert torch.equal(before[name].get_tensor(name), after[name].get_tensor(name)), name
    finally:
        shutil.rmtree(tmp_path)
