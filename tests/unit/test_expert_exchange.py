"""A layer's rows to shards and back: the same bits whatever shards do on the way, or a lost forward."""

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support import counts
from support.shards import FAULTS, ScriptedLink, golden_folder, holding_of, network_without_experts, sharded
from unmask.diffusion.batch import ForwardLost
from unmask.experts.exchange import Exchange
from unmask.experts.frames import Header
from unmask.experts.links import Inbox
from unmask.experts.placement import HeldParts
from unmask.experts.proving import Known, Proofs, difference
from unmask.models.loading import load
from unmask.models.moe import Routing, mixtures_of
from unmask.telemetry import metrics

SHARDS = 2
LAYER = 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden_folder(tmp_path_factory.mktemp("model") / "llada2_a", "llada2_a")


@pytest.fixture(scope="module")
def holdings(folder: Path):
    return [holding_of(folder, number, shards=SHARDS, replication=2) for number in range(SHARDS)]


@pytest.fixture(scope="module")
def rows(folder: Path) -> tuple[torch.Tensor, Routing]:
    model = load(folder)
    hidden = torch.randn(21, model.config.hidden_size, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        return hidden, mixtures_of(model)[LAYER].router(hidden)


def through(exchange: Exchange, rows: tuple[torch.Tensor, Routing]) -> torch.Tensor:
    with torch.inference_mode():
        return exchange.receive(exchange.send(LAYER, *rows))


@pytest.fixture(scope="module")
def quiet(folder: Path, holdings, rows) -> torch.Tensor:
    """What comes back where nothing fails."""
    with sharded(network_without_experts(folder), scripted(holdings)) as exchange:
        return through(exchange, rows)


def scripted(holdings, *scripts: Sequence[str]):
    """A link to each shard that follows its script."""

    def links(inbox: Inbox) -> list[ScriptedLink]:
        told = [*scripts, *[()] * (len(holdings) - len(scripts))]
        return [
            ScriptedLink(f"shard-{number}:1", holding, inbox, script)
            for number, (holding, script) in enumerate(zip(holdings, told, strict=True))
        ]

    return links


def test_the_sums_are_those_of_the_whole_model(folder: Path, rows, quiet: torch.Tensor) -> None:
    with torch.inference_mode():
        expected = mixtures_of(load(folder))[LAYER].experts(*rows)
    torch.testing.assert_close(quiet, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_one_fault_changes_no_bit(folder: Path, holdings, rows, quiet, fault: str, shard: int) -> None:
    scripts = [(fault,) if number == shard else () for number in range(SHARDS)]
    with sharded(network_without_experts(folder), scripted(holdings, *scripts)) as exchange:
        assert torch.equal(through(exchange, rows), quiet)
        assert torch.equal(through(exchange, rows), quiet), "nor does what comes late in the next forward"


@settings(max_examples=counts.of(sample=40, full=1000), deadline=None)
@given(st.lists(st.sampled_from((*FAULTS, "ok")), max_size=8))
def test_no_sequence_of_faults_of_one_shard_changes_a_bit(folder, holdings, rows, quiet, script) -> None:
    with sharded(network_without_experts(folder), scripted(holdings, script)) as exchange:
        for _ in range(4):
            assert torch.equal(through(exchange, rows), quiet)


@settings(max_examples=counts.of(sample=20, full=500), deadline=None)
@given(*[st.lists(st.sampled_from((*FAULTS, "ok")), max_size=4)] * 2)
def test_where_both_fail_the_forward_is_right_or_lost(folder, holdings, rows, quiet, one, other) -> None:
    links = scripted(holdings, one, other)
    with sharded(network_without_experts(folder), links, hedge_s=0.01, patience_s=0.2) as exchange:
        right = 0
        for _ in range(8):
            try:
                assert torch.equal(through(exchange, rows), quiet)
            except ForwardLost:
                continue
            right += 1
        assert right, "each shard fails four times at most"


def test_a_shard_that_comes_back_is_asked_what_is_known_before_it_is_used(
    folder: Path, holdings, rows, quiet: torch.Tensor
) -> None:
    made: list[ScriptedLink] = []

    def links(inbox: Inbox) -> list[ScriptedLink]:
        made.extend(scripted(holdings, ("ok", "drop", "wrong", "wrong"))(inbox))
        return made

    with sharded(network_without_experts(folder), links) as exchange:
        for _ in range(4):
            assert torch.equal(through(exchange, rows), quiet), "sums of a shard that has not proved itself"
        assert exchange.recorder.value(metrics.EXPERT_FRAMES, why="proof") == 3, "wrong, wrong, and right"
        used, end = made[0].frames, time.monotonic() + 30
        while made[0].frames == used:  # once it is passed over no more for having been lost
            assert time.monotonic() < end, "it is not used again"
            assert torch.equal(through(exchange, rows), quiet)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_difference_and_other_weights_are(dtype: torch.dtype) -> None:
    sums = torch.randn(8, 32, generator=torch.Generator().manual_seed(3)).to(dtype)
    header = Header(epoch=1, part=0, layer=1, sequence=1, tokens=8, hidden_size=32, dtype=dtype)
    known = Known(header, b"", sums)
    assert not difference(known, sums)
    last_bit = torch.finfo(dtype).eps * sums
    assert not difference(known, sums + last_bit)
    assert "sums differ by" in difference(known, sums + 0.1)
    assert "sums differ by" in difference(known, sums.roll(1, dims=0))


def test_the_shortest_frame_of_each_part_is_kept_and_only_of_the_latest_placement() -> None:
    proofs = Proofs()

    def keep(epoch: int, part: int, tokens: int) -> None:
        header = Header(epoch=epoch, part=part, layer=1, sequence=1, tokens=tokens)
        proofs.keep(header, bytes([epoch, part, tokens]), torch.zeros(tokens, 2))

    def asked(epoch: int, *parts: int) -> bytes | None:
        known = proofs.for_holder({epoch: HeldParts((0, 1, 2), frozenset(parts))})
        return None if known is None else known.frame

    assert asked(1, 0) is None
    for tokens in (5, 3, 4):
        keep(1, 0, tokens)
    assert asked(1, 0, 1) == bytes([1, 0, 3])
    assert asked(1, 1) is None
    keep(2, 1, 4)
    assert asked(1, 0) is None
    assert asked(2, 0, 1) == bytes([2, 1, 4])


def test_without_a_replica_the_forward_is_lost_in_time_and_the_next_one_may_not_be(
    folder: Path, rows
) -> None:
    alone = [holding_of(folder, number, shards=SHARDS) for number in range(SHARDS)]
    network = network_without_experts(folder)
    with sharded(network, scripted(alone, ("silence",)), patience_s=0.3) as exchange:
        began = time.monotonic()
        with pytest.raises(ForwardLost, match="part 0 of the experts cannot be had: no answer"):
            through(exchange, rows)
        assert time.monotonic() - began < 5
        through(exchange, rows)


def test_frames_are_cut_to_what_shards_take(folder: Path, holdings) -> None:
    """More rows than a frame may have."""
    network = network_without_experts(folder)
    hidden = torch.randn(3 * ScriptedLink.max_tokens + 5, network.config.hidden_size)
    with torch.inference_mode():
        whole = mixtures_of(load(folder))[LAYER]
        routing = whole.router(hidden)
        expected = whole.experts(hidden, routing)
    made: list[ScriptedLink] = []

    def links(inbox: Inbox) -> list[ScriptedLink]:
        made.extend(scripted(holdings)(inbox))
        return made

    with sharded(network, links) as exchange:
        torch.testing.assert_close(through(exchange, (hidden, routing)), expected, rtol=0, atol=1e-6)
    assert sum(link.frames for link in made) > SHARDS


def test_bfloat16_rows_are_close(folder: Path, holdings, rows, quiet: torch.Tensor) -> None:
    network = network_without_experts(folder)
    with sharded(network, scripted(holdings), rows_as=torch.bfloat16) as exchange:
        found = through(exchange, rows)
    assert found.dtype == torch.float32 and not torch.equal(found, quiet)
    torch.testing.assert_close(found, quiet, rtol=0.05, atol=0.05 * float(quiet.abs().max()))


def test_what_happens_is_counted(folder: Path, holdings, rows) -> None:
    script = ("silence", "drop")
    with sharded(network_without_experts(folder), scripted(holdings, script)) as exchange:
        for _ in range(3):
            through(exchange, rows)
        value = exchange.recorder.value
        assert value(metrics.EXPERT_FRAMES, why="first") == 3 * SHARDS
        assert value(metrics.EXPERT_FRAMES, why="hedge") >= 1
        assert value(metrics.EXPERT_ROWS, kind="tokens") == 3 * 21
        assert value(metrics.EXPERT_ROWS, kind="copies") >= 3 * 21
        assert (
            value(metrics.EXPERT_BYTES, direction="sent")
            > value(metrics.EXPERT_BYTES, direction="received") / 2
        )
        assert value(metrics.EXPERT_EPOCH) == 1
        assert value(metrics.EXPERTS_ACTIVATED) == 3
