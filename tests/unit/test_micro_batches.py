"""A forward in parts that take turns: the same bits, and one part goes on while another waits for experts."""

from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.models import random_tokens, tiny_model
from support.shards import ScriptedLink, golden_folder, holding_of, network_without_experts, sharded
from unmask.attention.paged import Span
from unmask.diffusion.batch import ForwardLost, run_to_end
from unmask.diffusion.decoding import DecodingParams
from unmask.experts.exchange import Exchange, Flight
from unmask.experts.links import Inbox
from unmask.experts.mixture import shard_experts
from unmask.experts.placement import HeldParts, even_bounds
from unmask.models.base import LanguageModel
from unmask.models.loading import load
from unmask.models.moe import Routing
from unmask.models.paged import PagedCache
from unmask.models.row_tiles import TILE_ROWS
from unmask.serving.ragged import RaggedBatch

BLOCK, PAGES = 8, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden_folder(tmp_path_factory.mktemp("model") / "llada2_a", "llada2_a")


@st.composite
def sequences(draw: st.DrawFn) -> list[Span]:
    """Spans with pages of their own."""
    free, drawn = list(draw(st.permutations(range(PAGES)))), []
    while free and len(drawn) < draw(st.integers(1, 5)):
        count = draw(st.integers(1, min(5, len(free))))
        pages, free = free[:count], free[count:]
        drawn.append(Span(tuple(pages), draw(st.integers(1, count))))
    return drawn


@settings(deadline=None)
@given(spans=sequences(), count=st.integers(1, 5), block_length=st.sampled_from([1, 2, 4, 6, 8, 32]))
def test_parts_are_all_of_the_forward_in_its_order_and_in_whole_tiles(
    spans: list[Span], count: int, block_length: int
) -> None:
    cache = PagedCache(tiny_model().config, pages=PAGES, block_length=block_length)
    length = cache.lay_out(spans).shape[1]
    parts = cache.divided(count)
    assert 1 <= len(parts) <= count
    assert [part.where.start for part in parts] == [0, *(part.where.stop for part in parts[:-1])]
    assert parts[-1].where.stop == length
    written = [page for span in spans for page in span.written]
    assert [int(page) for part in parts for page in part.blocks.written] == written
    for part in parts[:-1]:
        positions = part.where.stop - part.where.start
        assert positions % TILE_ROWS == 0
        assert positions % block_length == 0
        # As even as tiles and blocks allow.
        assert abs(positions - length / count) <= max(TILE_ROWS, block_length) * TILE_ROWS
    if block_length == 8 and len(written) >= count:
        assert len(parts) == count


@settings(max_examples=25, deadline=None)
@given(spans=sequences(), count=st.integers(2, 4))
def test_a_forward_in_parts_is_the_same_to_the_bit(spans: list[Span], count: int) -> None:
    """Also where a cut goes through a sequence: its later blocks see what earlier ones have written."""
    model = tiny_model(dtype=torch.float32).eval()
    found = []
    for parts in (1, count):
        model.micro_batches = parts
        caches = [model.new_paged_cache(pages=PAGES, block_length=BLOCK) for _ in range(2)]
        with torch.inference_mode():
            generator = torch.Generator().manual_seed(4)
            for cache in caches:
                for pages in (cache._keys, cache._values):
                    pages.copy_(torch.randn(pages.shape, generator=generator.manual_seed(4)))
            metadata = caches[0].lay_out(spans)
            ids = torch.tensor([random_tokens(metadata.shape[1])])
            hidden = model.hidden(ids, metadata, cache=caches[0])
            caches[1].lay_out(spans)
            model.store(ids, metadata, cache=caches[1])
        stored = [(cache._keys, cache._values) for cache in caches]
        for one, other in zip(*stored, strict=True):
            assert torch.equal(one, other)
        found.append((hidden, *stored[0]))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


# With experts elsewhere


def links(
    folder: Path, *scripts: tuple[str, ...], replication: int = 2
) -> Callable[[Inbox], list[ScriptedLink]]:
    def made(inbox: Inbox) -> list[ScriptedLink]:
        told = [*scripts, (), ()][:2]
        held = [holding_of(folder, number, shards=2, replication=replication) for number in range(2)]
        return [
            ScriptedLink(f"shard-{number}:1", one, inbox, script)
            for number, (one, script) in enumerate(zip(held, told, strict=True))
        ]

    return made


def written(network: LanguageModel) -> list[list[int]]:
    """What four requests get together, one of which has much to read."""
    batch = RaggedBatch(network, rows=4, capacity=64, block_length=BLOCK)
    params = DecodingParams(
        max_new_tokens=16,
        block_length=BLOCK,
        threshold=0.6,
        eos_token_id=network.config.vocab_size,
        mask_token_id=network.mask_token_id,
    )
    prompts = [random_tokens(length, seed=length) for length in (3, 40, 17, 8)]
    return [one.token_ids for one in run_to_end(batch, prompts, params)]


@pytest.mark.parametrize("micro_batches", [2, 3])
def test_tokens_are_the_same_and_parts_take_turns(
    folder: Path, micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    story: list[tuple[str, int, int]] = []
    send, receive = Exchange.send, Exchange.receive

    def sent(exchange: Exchange, layer: int, hidden: torch.Tensor, routing: Routing, part: int = 0) -> Flight:
        story.append(("send", layer, part))
        return send(exchange, layer, hidden, routing, part)

    def received(exchange: Exchange, flight: Flight) -> torch.Tensor:
        header = flight.pieces[0].header
        story.append(("receive", header.layer, header.micro_batch))
        return receive(exchange, flight)

    found = []
    for count in (1, micro_batches):
        network = network_without_experts(folder)
        with sharded(network, links(folder)) as exchange:
            shard_experts(network, exchange, micro_batches=count)
            found.append(written(network))
            if count == 1:
                monkeypatch.setattr(Exchange, "send", sent)
                monkeypatch.setattr(Exchange, "receive", received)
    assert found[0] == found[1]

    first = max(
        place for place, (act, layer, part) in enumerate(story) if (layer, part) == (1, 1) and act == "send"
    )
    assert story[first - 1] == ("send", 1, 0), "two parts are on their way at once"
    forward = story[first - 1 :]
    layers = sorted({layer for _, layer, _ in forward})
    for layer, after in zip(layers, layers[1:], strict=False):
        own = forward.index(("receive", layer, 0))
        assert forward.index(("send", layer, 1)) < own, "the second is sent before the first is waited for"
        assert forward.index(("send", after, 0)) < forward.index(("receive", layer, 1)), (
            "and so on in each layer"
        )


@pytest.mark.parametrize("fault", ["silence", "drop", "refuse", "flip", "nan"])
def test_a_fault_changes_no_token(folder: Path, fault: str) -> None:
    expected = written(load(folder))
    for nth in range(4):
        network = network_without_experts(folder)
        with sharded(network, links(folder, ("ok",) * nth + (fault,))) as exchange:
            shard_experts(network, exchange, micro_batches=2)
            assert written(network) == expected


def test_a_lost_forward_leaves_nothing_on_its_way(folder: Path) -> None:
    network = network_without_experts(folder)
    batch = RaggedBatch(network, rows=2, capacity=32, block_length=BLOCK)
    silent = links(folder, ("ok",) * 3 + ("silence",) * 100, replication=1)
    with sharded(network, silent, patience_s=0.2) as exchange:
        shard_experts(network, exchange, micro_batches=2)
        for seed in range(2):
            params = DecodingParams(
                max_new_tokens=8, block_length=BLOCK, eos_token_id=-1, mask_token_id=network.mask_token_id
            )
            batch.admit(random_tokens(20, seed=seed), params)
        with pytest.raises(ForwardLost):
            for _ in range(20):
                batch.step()
        assert (exchange._flying, exchange._open) == (0, {})


class _Moving(ScriptedLink):
    """Lets the first placement go, and has another one, as soon as a frame has come."""

    @property
    def held(self) -> dict[int, HeldParts]:  # type: ignore[override]
        bounds = even_bounds(self._holding.shape.num_experts, 1)
        found = {1: HeldParts(bounds, frozenset([0]))}
        if self.frames:
            found[2] = HeldParts((0, 1, bounds[-1]), frozenset([0, 1]))
        return found


def test_a_forward_goes_by_one_placement(folder: Path) -> None:
    inbox: Inbox = SimpleQueue()
    holding = holding_of(folder, 0, shards=1)
    holding.load(2, (0, 1, holding.shape.num_experts), [0, 1])
    exchange = Exchange([_Moving("moving:1", holding, inbox)], inbox)
    try:
        rows = torch.randn(8, holding.shape.hidden_size)
        routing = Routing(torch.zeros(8, 2, dtype=torch.int64), torch.ones(8, 2))
        layers = holding.shape.layers

        def epochs(flights: list[Flight]) -> set[int]:
            for flight in flights:
                exchange.receive(flight)
            return {piece.header.epoch for flight in flights for piece in flight.pieces}

        with torch.inference_mode():
            assert epochs([exchange.send(layers[0], rows, routing, part) for part in range(2)]) == {1}
            assert epochs([exchange.send(layers[1], rows, routing, part) for part in range(2)]) == {1}
            assert epochs([exchange.send(layers[0], rows, routing, part) for part in range(2)]) == {2}
    finally:
        exchange.close()


def test_a_model_that_cannot_be_divided_is_refused(folder: Path) -> None:
    class Other(torch.nn.Module):
        pass

    with (
        sharded(network_without_experts(folder), links(folder)) as exchange,
        pytest.raises(ValueError, match="a Other cannot be divided"),
    ):
        shard_experts(Other(), exchange, micro_batches=2)  # type: ignore[arg-type]
