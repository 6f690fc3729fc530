"""What a shard takes: the memory of its experts, and a constant."""

from pathlib import Path

import pytest

from support.models import TINY
from support.shard_processes import ShardProcess
from support.shards import holding_of
from unmask.models.loading import build, save
from unmask.models.registry import parse_config

pytestmark = pytest.mark.shards

LARGE = TINY | {
    "hidden_size": 512,
    "num_hidden_layers": 3,
    "num_experts": 64,
    "moe_intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "n_group": 8,
    "topk_group": 4,
}
"""200 MB of experts, and little else."""


def resident(process: ShardProcess) -> tuple[int, int]:
    """Bytes that a process has in memory, and the most that it ever had."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    now, most = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, most


@pytest.mark.slow
def test_a_shards_memory_is_its_experts_and_a_constant(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save(build(parse_config(LARGE)), folder)
    held, found = [], []
    for shards in (1, 2, 4, 8):
        process = ShardProcess(folder, 0, shards=shards, replication=1)
        process.start()
        try:
            found.append(resident(process))
        finally:
            process.close()
        held.append(holding_of(folder, 0, shards=shards).nbytes)
    assert [held[0] // nbytes for nbytes in held] == [1, 2, 4, 8] and held[0] > 190e6
    constants = [now - nbytes for nbytes, (now, _) in zip(held, found, strict=True)]
    assert max(constants) - min(constants) < 0.1 * held[0], constants
    beyond = [most - now for now, most in found]
    assert max(beyond) < 0.2 * held[0], "weights are read a piece at a time"
