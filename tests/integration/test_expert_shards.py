"""A model whose experts are in shards behind ports: the same numbers, and the same tokens whatever fails."""

import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import grpc
import pytest
import torch
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from support import counts
from support.folders import served_folder
from support.serving import running_server, wait_until
from support.shard_processes import ShardProcess, shard_processes
from support.shards import golden_folder, in_process, running_shards
from unmask.attention import AttentionMetadata
from unmask.client import Client, Unavailable
from unmask.diffusion.batch import ForwardLost, Generation, run_to_end
from unmask.diffusion.decoding import DecodingParams
from unmask.diffusion.full_sequence import CanvasBatch
from unmask.diffusion.generation import generate
from unmask.experts.answering import Answering, Seen
from unmask.experts.exchange import Exchange
from unmask.experts.frames import Message, decode_request, encode_reply, header_of
from unmask.experts.holding import Holding
from unmask.experts.shard import Shard, ShardOptions
from unmask.models.base import LanguageModel
from unmask.models.loading import load
from unmask.models.registry import read_config
from unmask.serving.model import ServedModel
from unmask.serving.ragged import RaggedBatch
from unmask.telemetry import metrics
from unmask.v1 import generation_pb2 as pb

pytestmark = pytest.mark.shards

GOLDENS = ["llada2_a", "lladamoe_a"]
PROMPTS = [[5, 6, 7], [20 + number for number in range(11)], [400 - number for number in range(5)]]
STALL_S = 1.5
"""The longest that a lost shard may hold up a forward, but for one in a hundred."""
POINTS = counts.of(sample=6, full=1000)
"""Of all places in a generation, those at which a shard fails; more than there are means all."""
WORDS = [f"w{number}" for number in range(5, 500)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden_folder(tmp_path_factory.mktemp("model") / "llada2_a", "llada2_a")


def logits(network: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        position = torch.arange(ids.shape[1]).expand_as(ids)
        metadata = AttentionMetadata.block_causal(position, torch.zeros_like(ids), block_length=8)
        return network.logits(network.hidden(ids, metadata))


def tokens(network: LanguageModel) -> list[Generation]:
    return generate(network, PROMPTS, decoding(network), rows=len(PROMPTS))


def decoding(network: LanguageModel) -> DecodingParams:
    return DecodingParams(
        max_new_tokens=24,
        block_length=8,
        threshold=0.6,
        eos_token_id=network.config.vocab_size,
        mask_token_id=network.mask_token_id,
    )


def answers(network: LanguageModel) -> list[list[int]]:
    """What a model of either kind writes."""
    if network.attends == "blocks":
        return [one.token_ids for one in tokens(network)]
    batch = CanvasBatch(network, rows=1, capacity=64)
    return [one.token_ids for one in run_to_end(batch, PROMPTS, replace(decoding(network), threshold=1.0))]


@pytest.mark.parametrize("golden", GOLDENS)
@pytest.mark.parametrize(("shards", "replication"), [(1, 1), (2, 1), (4, 2), (8, 3)])
def test_sharded_logits_and_tokens_are_those_of_the_whole_model(
    golden: str, shards: int, replication: int, tmp_path: Path
) -> None:
    folder = golden_folder(tmp_path / golden, golden)
    ids = torch.randint(0, 500, (2, 32), generator=torch.Generator().manual_seed(1))
    whole = load(folder)
    expected = logits(whole, ids)
    with running_shards(folder, shards, replication=replication) as running:
        addresses = [f"127.0.0.1:{shard.port}" for shard in running]
        found = []
        for order in (addresses, addresses[::-1]):
            with in_process(folder, order) as (network, _):
                found.append(logits(network, ids))
                assert answers(network) == answers(whole)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-5)
    assert torch.equal(*found), "who is asked first changes no bit"


# What fails, at every place of a generation


@pytest.fixture(scope="module")
def shards(folder: Path) -> Iterator[list[ShardProcess]]:
    with shard_processes(folder, 2, replication=2) as running:
        yield running


class Places:
    """Counts a network's calls to its shards, and does something at one of them.

    A place is between two steps of a layer: before its rows are sent, or once they are.
    """

    def __init__(self, exchange: Exchange) -> None:
        self.passed = 0
        self.longest_s = 0.0
        self._at: tuple[int, Callable[[], object]] | None = None
        self._send, self._receive = exchange.send, exchange.receive
        exchange.send = self._sending  # type: ignore[method-assign]
        exchange.receive = self._receiving  # type: ignore[method-assign]

    def do(self, place: int, act: Callable[[], object]) -> None:
        """Begin to count anew, and call ``act`` at ``place``."""
        self.passed, self.longest_s, self._at = 0, 0.0, (place, act)

    def _sending(self, *given):
        self._pass()
        began = time.monotonic()
        flight = self._send(*given)
        self.longest_s = max(self.longest_s, time.monotonic() - began)
        return flight

    def _receiving(self, flight):
        self._pass()
        began = time.monotonic()
        sums = self._receive(flight)
        self.longest_s = max(self.longest_s, time.monotonic() - began)
        return sums

    def _pass(self) -> None:
        if self._at is not None and self._at[0] == self.passed:
            self._at[1]()
        self.passed += 1


@contextmanager
def sharded_network(
    folder: Path, shards: Sequence[ShardProcess]
) -> Iterator[tuple[LanguageModel, Exchange, Places]]:
    with in_process(folder, [shard.address for shard in shards]) as (network, exchange):
        yield network, exchange, Places(exchange)


def some_places(count: int) -> list[int]:
    """So many places of a generation as are to be tried, from the first to the last."""
    step = max(1, count // POINTS)
    return list(range(0, count, step))


def ready(exchange: Exchange, count: int) -> Callable[[], bool]:
    return lambda: sum(link.is_ready for link in exchange.links) == count


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["kill", "freeze"])
def test_a_shard_that_fails_at_any_place_changes_no_token(
    folder: Path, shards: list[ShardProcess], fault: str
) -> None:
    with sharded_network(folder, shards) as (network, exchange, places):
        places.do(-1, int)
        expected = tokens(network)
        stalls = []
        for number, place in enumerate(some_places(places.passed)):
            victim = shards[number % len(shards)]
            wait_until(ready(exchange, len(shards)))
            places.do(place, victim.kill if fault == "kill" else victim.freeze)
            assert [found.token_ids for found in tokens(network)] == [one.token_ids for one in expected]
            stalls.append(places.longest_s)
            if fault == "kill":
                victim.start()
            else:
                victim.thaw()
        assert sorted(stalls)[int(0.99 * (len(stalls) - 1))] < STALL_S, sorted(stalls)[-5:]


@pytest.mark.slow
@pytest.mark.own_network
def test_a_shard_that_cannot_be_reached_at_any_place_changes_no_token(folder: Path) -> None:
    with (
        shard_processes(folder, 2, replication=2, own_networks=True) as shards,
        sharded_network(folder, shards) as (network, exchange, places),
    ):
        places.do(-1, int)
        expected = tokens(network)
        stalls = []
        for number, place in enumerate(some_places(places.passed)):
            victim = shards[number % len(shards)]
            wait_until(ready(exchange, len(shards)))
            places.do(place, victim.pull_cable)
            assert [found.token_ids for found in tokens(network)] == [one.token_ids for one in expected]
            stalls.append(places.longest_s)
            victim.plug_in()
        assert sorted(stalls)[int(0.99 * (len(stalls) - 1))] < STALL_S, sorted(stalls)[-5:]


@pytest.mark.slow
def test_damage_at_any_place_changes_no_token(folder: Path) -> None:
    """A shard whose answers are damaged after their checksum was made, as faulty memory would."""
    with (
        running_shards(folder, 2, replication=2, make=Faulty) as shards,
        in_process(folder, [f"127.0.0.1:{shard.port}" for shard in shards]) as (network, exchange),
    ):
        places = Places(exchange)
        places.do(-1, int)
        expected = tokens(network)
        for number, place in enumerate(some_places(places.passed)):
            victim = shards[number % len(shards)]
            assert isinstance(victim, Faulty)
            wait_until(ready(exchange, len(shards)))
            places.do(place, partial(victim.damage, number // len(shards)))
            assert [found.token_ids for found in tokens(network)] == [one.token_ids for one in expected]
        assert sum(shard.damaged for shard in shards if isinstance(shard, Faulty)) > 0


class Faulty(Shard):
    """A shard whose next answer can be damaged."""

    def __init__(self, holding: Holding, options: ShardOptions) -> None:
        self.damaged = 0
        self._way: int | None = None
        super().__init__(holding, options, answering=self._answering_of(self))

    def damage(self, way: int) -> None:
        """Damage the next answer in one of several ways."""
        self._way = way

    @staticmethod
    def _answering_of(shard: "Faulty") -> type[Answering]:
        class FaultyAnswering(Answering):
            def answer(self, message: Message, seen: Seen, into: memoryview | None = None) -> Message:
                return shard._spoiled(bytes(super().answer(message, seen)), bytes(message))

        return FaultyAnswering

    def _spoiled(self, answer: bytes, message: bytes) -> bytes:
        way, self._way = self._way, None
        if way is None:
            return answer
        self.damaged += 1
        rows = decode_request(message).rows
        header = header_of(message)
        spoiled = [
            answer[:-9] + bytes([answer[-9] ^ 64]) + answer[-8:],
            answer[:-8],
            encode_reply(header, torch.full_like(rows, torch.nan)),
            encode_reply(replace(header, sequence=header.sequence + (1 << 40)), rows),
            encode_reply(replace(header, layer=header.layer + 1), rows),
            b"",
        ]
        return spoiled[way % len(spoiled)]


@pytest.mark.slow
def test_without_a_replica_a_lost_shard_ends_the_forward_and_the_next_one_waits_for_it(folder: Path) -> None:
    with (
        shard_processes(folder, 2) as alone,
        in_process(folder, [shard.address for shard in alone], patience_s=0.5) as (network, _),
    ):
        expected = tokens(network)
        alone[1].kill()
        with pytest.raises(ForwardLost, match="of the experts cannot be had|experts cannot be had"):
            tokens(network)
        alone[1].start()
        wait_until(lambda: _succeeds(lambda: tokens(network)))
        assert [one.token_ids for one in tokens(network)] == [one.token_ids for one in expected]


def _succeeds(act: Callable[[], object]) -> bool:
    try:
        act()
    except ForwardLost:
        return False
    return True


# Behind a server


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_folder(tmp_path_factory.mktemp("served") / "tiny", block_length=8, threshold=0.05)


def described(folder: Path, rows: int) -> ServedModel:
    return ServedModel.describe(folder, read_config(folder), name=None, rows=rows, context_length=128)


def batch(network: LanguageModel, rows: int) -> RaggedBatch:
    return RaggedBatch(network, rows=rows, capacity=128, block_length=8)


@pytest.mark.slow
def test_all_shards_are_replaced_under_sixteen_users_and_no_request_fails(served: Path) -> None:
    users, rounds = 16, counts.of(sample=1, full=5)
    with (
        shard_processes(served, 2, replication=2) as shards,
        sharded_network(served, shards) as (network, exchange, _),
        running_server(batch(network, 8), described(served, 8)) as server,
        ThreadPoolExecutor(users) as pool,
    ):
        done = threading.Event()

        def use(user: int) -> list[tuple[str, ...]]:
            answers = []
            with Client(server.address, timeout_s=120) as client:
                while not done.is_set() or not answers:
                    prompt = " ".join(WORDS[user : user + 9])
                    answers.append(client.generate(prompt, max_tokens=40).token_ids)
            return answers

        found = [pool.submit(use, user) for user in range(users)]
        for _ in range(rounds):
            for shard in shards:
                shard.end()
                shard.start()
                wait_until(ready(exchange, len(shards)))
        done.set()
        answers = [one.result(120) for one in found]
    whole = load(served)
    model = described(served, 8)
    for user, several in enumerate(answers):
        prompt = model.tokenizer.encode(" ".join(WORDS[user : user + 9]))
        expected = _alone(whole, model, prompt)
        assert {tuple(one) for one in several} == {tuple(expected)}


def _alone(network: LanguageModel, model: ServedModel, prompt: list[int]) -> list[int]:
    params = model.params(model.default_decoder, pb.DiffusionParams(), max_new_tokens=40)
    return generate(network, [prompt], params, rows=1)[0].token_ids


@pytest.mark.slow
def test_requests_that_lose_their_experts_end_as_unavailable_and_the_server_goes_on(served: Path) -> None:
    with (
        shard_processes(served, 2) as shards,
        in_process(served, [shard.address for shard in shards], patience_s=0.3) as (network, exchange),
        running_server(
            batch(network, 2), described(served, 2), complete=lambda: exchange.placement is not None
        ) as server,
        Client(server.address, timeout_s=30) as client,
        grpc.insecure_channel(server.address) as channel,
    ):

        def health(service: str = "unmask.v1.Generation") -> int:
            asked = HealthStub(channel).Check(HealthCheckRequest(service=service), timeout=30)
            return int(asked.status)

        before = client.generate("w7 w8", max_tokens=24).token_ids
        assert health() == HealthCheckResponse.SERVING
        shards[0].kill()
        with pytest.raises(Unavailable, match="a part of the model cannot be had"):
            client.generate("w7 w8", max_tokens=24)
        wait_until(lambda: health() == HealthCheckResponse.NOT_SERVING)
        assert health("") == HealthCheckResponse.SERVING, "the process lives: to start it again mends nothing"
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(server.health_url, timeout=10)
        shards[0].start()
        wait_until(ready(exchange, 2))
        wait_until(lambda: health() == HealthCheckResponse.SERVING)
        assert client.generate("w7 w8", max_tokens=24).token_ids == before
        assert server.server.recorder.value(metrics.REQUESTS, code="UNAVAILABLE", finish_reason="") == 1
