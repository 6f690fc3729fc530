"""From one placement to another while a model decodes: nothing fails, and nothing is half done."""

import threading
from pathlib import Path

import pytest
import torch

from support.shards import golden_folder, in_process, running_shards
from unmask.cli.main import main
from unmask.diffusion.decoding import DecodingParams
from unmask.diffusion.generation import generate
from unmask.errors import UsageError
from unmask.experts.moving import describe, move, plan_move
from unmask.models.loading import load
from unmask.models.moe import mixtures_of
from unmask.v1 import experts_pb2 as pb

pytestmark = pytest.mark.shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden_folder(tmp_path_factory.mktemp("model") / "llada2_a", "llada2_a")


def test_a_model_decodes_on_while_its_experts_are_cut_anew(folder: Path) -> None:
    with running_shards(folder, 2, replication=1) as shards:
        addresses = [f"127.0.0.1:{shard.port}" for shard in shards]
        with in_process(folder, addresses) as (network, exchange):
            params = DecodingParams(
                max_new_tokens=16, block_length=8, threshold=0.6, eos_token_id=512, mask_token_id=511
            )
            expected = generate(load(folder), [[5, 6, 7]], params, rows=1)[0].token_ids
            done = threading.Event()
            found: list[list[int]] = []

            def decode() -> None:
                while not done.is_set():
                    found.append(generate(network, [[5, 6, 7]], params, rows=1)[0].token_ids)

            decoding = threading.Thread(target=decode)
            decoding.start()
            try:
                planned = plan_move(describe(addresses), replication=2)
                move(addresses, planned, notice_s=3)
                assert exchange.placement == (2, (0, 8, 16))
                again = plan_move(describe(addresses), replication=1, balanced=True)
                move(addresses, again, notice_s=3)
            finally:
                done.set()
                decoding.join(60)
            assert exchange.placement == (3, again.bounds)
            assert found and all(tokens == expected for tokens in found)
        assert [[one.epoch for one in shard.placements] for shard in describe(addresses)] == [[3], [3]]


def test_shards_count_the_experts_that_frames_use(folder: Path) -> None:
    with running_shards(folder, 1) as (shard,):
        address = f"127.0.0.1:{shard.port}"
        with in_process(folder, [address]) as (network, exchange), torch.inference_mode():
            rows = torch.randn(5, network.config.hidden_size)
            expected = torch.zeros(16, dtype=torch.int64)
            for layer, mixture in mixtures_of(network).items():
                routing = mixture.router(rows)
                exchange.receive(exchange.send(layer, rows, routing))
                expected[routing.experts.unique()] += 1
        assert list(describe([address])[0].activations) == expected.tolist()


def test_what_cannot_be_loaded_leaves_all_as_it_was(folder: Path) -> None:
    with running_shards(folder, 2) as shards:
        addresses = [f"127.0.0.1:{shard.port}" for shard in shards]
        before = describe(addresses)
        planned = plan_move(before, replication=2)
        path = folder / "config.json"
        content = path.read_text()
        try:
            path.write_text("{}")
            with pytest.raises(UsageError, match=r"shard 127.0.0.1:\d+: FAILED_PRECONDITION"):
                move(addresses, planned, notice_s=0)
        finally:
            path.write_text(content)
        assert describe(addresses) == before
        shards[1].stop(0)
        with pytest.raises(UsageError, match=f"shard {addresses[1]}: UNAVAILABLE"):
            describe(addresses)


def of_a_shard(**changes: object) -> pb.DescribeResponse:
    shape = pb.ExpertShape(hidden_size=4, expert_width=2, num_experts=6, layers=[1])
    held = [pb.HeldPlacement(epoch=4, bounds=[0, 3, 6], parts=[0])]
    given = {
        "revision": "a",
        "shape": shape,
        "placements": held,
        "activations": [9, 1, 1, 1, 1, 1],
        **changes,
    }
    return pb.DescribeResponse(**given)  # type: ignore[arg-type]


def test_the_next_placement_follows_from_what_shards_say() -> None:
    even = plan_move([of_a_shard(), of_a_shard()], replication=2)
    assert (even.epoch, even.bounds, even.old) == (5, (0, 3, 6), (4,))
    assert even.parts == (frozenset({0, 1}), frozenset({0, 1}))
    balanced = plan_move([of_a_shard(), of_a_shard()], replication=1, balanced=True)
    assert balanced.bounds == (0, 1, 6)
    with pytest.raises(UsageError, match="2 different weights"):
        plan_move([of_a_shard(), of_a_shard(revision="b")], replication=1)


def test_the_commands_say_what_they_see_and_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running_shards(folder, 2) as shards:
        addresses = [f"127.0.0.1:{shard.port}" for shard in shards]
        with pytest.raises(SystemExit) as ended:
            main(["experts", "describe", *addresses])
        assert ended.value.code == 0
        assert "epoch 1: of 2 parts, holds 1 (8-15)" in capsys.readouterr().out
        with pytest.raises(SystemExit) as ended:
            main(["experts", "move", *addresses, "--groups=4", "--replication=2", "--dry-run"])
        assert ended.value.code == 0
        assert f"{addresses[0]}: experts 0-7, 8-15" in capsys.readouterr().out
        assert [[one.epoch for one in shard.placements] for shard in describe(addresses)] == [[1], [1]]
