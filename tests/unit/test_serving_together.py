"""Many users of one engine: whatever the others do and whenever they come, each gets what it gets alone.

A user asks for anything that the wire can say: lengths, decoders, drawn tokens, stops, probabilities. What is
told of its request in company is compared with what is told of it alone, event by event, and its tokens and
text with those of a plain decoder of one request at a time, cut at the stop by looking at every prefix.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st

from support import counts
from support.folders import add_tokenizer
from support.models import random_tokens, tiny_canvas_model, tiny_model
from support.serving import CountingBatch, wait_until
from unmask.attention import Attends
from unmask.diffusion.batch import Batch, Committed, Event, Finished
from unmask.diffusion.full_sequence import CanvasBatch, generate_full_sequence
from unmask.diffusion.generation import generate
from unmask.models.base import LanguageModel
from unmask.models.loading import save
from unmask.models.registry import read_config
from unmask.serving.decoders import DECODERS
from unmask.serving.engine import Engine, Request
from unmask.serving.model import ServedModel
from unmask.serving.narration import Narration
from unmask.serving.outbox import Item, Outbox
from unmask.serving.ragged import RaggedBatch
from unmask.serving.requests import read_order
from unmask.telemetry import Recorder, metrics
from unmask.v1 import generation_pb2 as pb

pytestmark = pytest.mark.serving

BLOCK, CAPACITY = 4, 64
REQUESTS = counts.of(sample=12, full=200, variable="UNMASK_REQUESTS")
VALUES: dict[str, list[float]] = {
    "threshold": [0.05, 0.3, 1.0],
    "steps_per_block": [1, 2, 3],
    "edit_threshold": [0.1, 0.6],
    "max_post_edit_steps": [2],
    "block_length": [2, 3],
}
"""Of a decoder's parameters; what is not here keeps its default."""
STOPS = ["w3", "4 w", "w1", "7", "w20 w", "9 w1"]


@dataclass(frozen=True, slots=True)
class User:
    """One request: what it asks for, when it comes, and after how many forwards it goes away, if it does."""

    own: int
    """Tokens of the prompt behind those that it shares with others."""
    shared: int = 0
    seed: int = 1
    """Of its own tokens, and of what it draws."""
    new: int = 1
    decoder: int = 0
    """Which of the model's, counted around."""
    parameters: tuple[tuple[str, float], ...] = ()
    """Those of them that the decoder has."""
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token: int | None = None
    logprobs: bool = False
    arrives: int = 0
    leaves: int | None = None
    salt: str = ""

    @property
    def prompt(self) -> tuple[int, ...]:
        return (*random_tokens(self.shared), *random_tokens(self.own, seed=self.seed))

    def asked(self, attends: Attends) -> pb.GenerateRequest:
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=self.prompt))
        sampling, diffusion = request.sampling, request.diffusion
        usable = [decoder for decoder in DECODERS if decoder.attends == attends]
        decoder = usable[self.decoder % len(usable)]
        diffusion.decoder, sampling.max_tokens = decoder.wire, self.new
        for name, value in self.parameters:
            if name in decoder.parameters:
                whole = name not in ("threshold", "edit_threshold")
                setattr(diffusion, name, min(int(value), self.new) if whole else value)
        if (
            attends == "canvas"
            and "block_length" in decoder.parameters
            and diffusion.HasField("block_length")
        ):
            diffusion.steps_per_block = min(diffusion.steps_per_block or 1, diffusion.block_length)
        if decoder.wire != pb.DECODER_JOINT_EDIT:
            sampling.temperature, sampling.seed, sampling.top_p = self.temperature, self.seed, self.top_p
        if self.top_k is not None:
            sampling.top_k = self.top_k
        sampling.repetition_penalty = self.penalty
        sampling.stop.extend(self.stop)
        if self.stop_token is not None:
            sampling.stop_token_ids.append(self.stop_token)
        sampling.logprobs = self.logprobs
        return request


def _parameters(chosen: dict[str, float]) -> tuple[tuple[str, float], ...]:
    return tuple(sorted(chosen.items()))


users = st.builds(
    User,
    own=st.integers(1, 20),
    shared=st.sampled_from([0, 3, 8, 21]),
    seed=st.integers(1, 5),
    new=st.integers(1, 20),
    decoder=st.integers(0, 5),
    parameters=st.fixed_dictionaries(
        {}, optional={name: st.sampled_from(values) for name, values in VALUES.items()}
    ).map(_parameters),
    temperature=st.sampled_from([0.0, 0.0, 0.7, 2.0]),
    top_p=st.sampled_from([1.0, 0.8]),
    top_k=st.sampled_from([None, 3]),
    penalty=st.sampled_from([1.0, 1.3]),
    stop=st.lists(st.sampled_from(STOPS), max_size=2).map(tuple),
    stop_token=st.sampled_from([None, None, 7]),
    logprobs=st.booleans(),
    arrives=st.integers(0, 40),
    leaves=st.one_of(st.none(), st.none(), st.integers(0, 12)),
    salt=st.sampled_from(["", "", "other"]),
)


@st.composite
def crowds(draw: st.DrawFn, most: int) -> list[User]:
    """Up to ``most`` users; few are simpler than many."""
    return [draw(users) for _ in range(draw(st.integers(1, most)))]


def random_user(dice: random.Random) -> User:
    names = dice.sample(sorted(VALUES), dice.randint(0, 3))
    return User(
        own=dice.randint(1, 20),
        shared=dice.choice([0, 3, 8, 21]),
        seed=dice.randint(1, 5),
        new=dice.randint(1, 20),
        decoder=dice.randrange(6),
        parameters=_parameters({name: dice.choice(VALUES[name]) for name in names}),
        temperature=dice.choice([0.0, 0.0, 0.7, 2.0]),
        top_p=dice.choice([1.0, 0.8]),
        top_k=dice.choice([None, 3]),
        penalty=dice.choice([1.0, 1.3]),
        stop=tuple(dice.sample(STOPS, dice.choice([0, 0, 1, 2]))),
        stop_token=dice.choice([None, None, 7]),
        logprobs=dice.random() < 0.5,
        arrives=dice.randint(0, 300),
        leaves=dice.choice([None, None, dice.randint(0, 12)]),
        salt=dice.choice(["", "", "other"]),
    )


@dataclass
class Told:
    """What a user has been told."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    finished: pb.Finished | None = None

    def hear(self, event: pb.GenerateStreamResponse) -> None:
        if event.HasField("block_committed"):
            assert event.block_committed.offset == len(self.tokens)
            self.tokens += event.block_committed.token_ids
            self.text += event.block_committed.text_delta
            self.logprobs += event.block_committed.logprobs
        if event.HasField("finished"):
            self.finished = event.finished
            self.text += event.finished.text_delta

    @property
    def whole(self) -> tuple[object, ...]:
        """All that must not depend on others; how many forwards read the prompt may, for they share them."""
        end = self.finished
        assert end is not None
        why = (end.reason, end.WhichOneof("stopped_by"), end.stop, end.stop_token_id)
        cost = (end.usage.completion_tokens, end.usage.forwards_denoise, end.usage.forwards_persist)
        return self.tokens, self.text, self.logprobs, why, cost


class Call:
    """A request as a server's call drives it, by hand."""

    def __init__(self, user: User, model: ServedModel) -> None:
        order = read_order(user.asked(model.attends), model)
        self.narration, self.told = Narration(order, model), Told()
        self.request = Request(
            prompt=order.prompt, params=order.params, cache_salt=user.salt, outbox=Outbox(lambda: None)
        )

    def listen(self, turned: Engine) -> bool:
        """Hear what there is to be heard; whether it was the last."""
        for item in self.request.outbox.take():
            self.told.hear(self.narration.tell(item))
            if self.narration.stopped:
                turned.conclude(self.request, self.narration.usage, kept=self.narration.kept)
                self.told.hear(self.narration.stop())
                return True
        return self.told.finished is not None


def serve(crowd: Sequence[User], batch: Batch, model: ServedModel) -> tuple[list[Told], Recorder]:
    """Turn an engine by hand until all have come and gone; what each was told."""
    recorder = Recorder()
    turned = Engine(batch, recorder, max_queue_requests=10_000)
    calls = [Call(user, model) for user in crowd]
    left, turn = set(range(len(crowd))), 0
    while left:
        for number in sorted(left):
            if crowd[number].arrives == turn:
                turned.submit(calls[number].request)
        turned.turn()
        for number in sorted(left):
            leaves = crowd[number].leaves
            if calls[number].listen(turned):
                left.discard(number)
            elif leaves is not None and turn == crowd[number].arrives + leaves:
                turned.cancel(calls[number].request)
                left.discard(number)
        turn += 1
        assert turn < 20_000
    turned.turn()
    assert (batch.active, batch.cache_usage) == (0, 0)
    return [call.told for call in calls], recorder


class House:
    """A tiny model, ready to serve, and the answers that its users get alone."""

    def __init__(self, folder: Path, network: LanguageModel) -> None:
        save(network, folder)
        add_tokenizer(folder)
        (folder / "generation_config.json").write_text(f'{{"block_length": {BLOCK}}}')
        self.network = network
        self.model = ServedModel.describe(
            folder, read_config(folder), name="tiny", rows=5, context_length=CAPACITY
        )
        self._alone: dict[User, Told] = {}

    def batch(self, *, rows: int = 5, pages: int = 40, room: int = 8) -> Batch:
        if self.model.attends == "canvas":
            return CanvasBatch(self.network, rows=rows, capacity=CAPACITY)
        return RaggedBatch(
            self.network,
            rows=rows,
            capacity=CAPACITY,
            block_length=BLOCK,
            cache_bytes=pages * self.network.page_bytes(block_length=BLOCK),
            max_positions=room * BLOCK,
        )

    def alone(self, user: User) -> Told:
        """What a user is told by a server of its own, which the plain decoder confirms."""
        if user not in self._alone:
            whole = User(
                **{name: getattr(user, name) for name in User.__slots__} | {"arrives": 0, "leaves": None}
            )
            (told,), _ = serve([whole], self.batch(), self.model)
            order = read_order(whole.asked(self.model.attends), self.model)
            if self.model.attends == "canvas":
                plain = generate_full_sequence(self.network, order.prompt, order.params)
            else:
                (plain,) = generate(self.network, [order.prompt], order.params)
            assert (told.tokens, told.text) == cut(plain.token_ids, user, self.model.tokenizer.decode)
            self._alone[user] = told
        return self._alone[user]

    def check(self, crowd: Sequence[User], told: Sequence[Told]) -> None:
        for user, got in zip(crowd, told, strict=True):
            expected = self.alone(user)
            if got.finished is not None:
                assert got.whole == expected.whole
            else:
                assert user.leaves is not None
                assert got.tokens == expected.tokens[: len(got.tokens)]
                assert expected.text.startswith(got.text)


def cut(tokens: Sequence[int], user: User, decode: Callable[[Sequence[int]], str]) -> tuple[list[int], str]:
    """The reference of stops: the shortest prefix that holds one, and its text before the first."""
    for length, token in enumerate(tokens, start=1):
        if token == user.stop_token:
            return list(tokens[:length]), decode(tokens[: length - 1])
        text = decode(tokens[:length])
        places = [text.find(stop) for stop in user.stop if stop in text]
        if places:
            return list(tokens[:length]), text[: min(places)]
    return list(tokens), decode(tokens)


@pytest.fixture(scope="module", params=["blocks", "canvas"])
def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> House:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    made = tiny_model if request.param == "blocks" else tiny_canvas_model
    return House(folder, made(dtype=torch.float32))


@pytest.mark.timeout(1800)
@settings(
    max_examples=counts.of(sample=5, full=30),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example],
)
@given(crowd=crowds(REQUESTS), rows=st.integers(1, 5), pages=st.integers(16, 40), room=st.integers(4, 12))
def test_each_gets_what_it_gets_alone(
    house: House, crowd: list[User], rows: int, pages: int, room: int
) -> None:
    told, _ = serve(crowd, house.batch(rows=rows, pages=pages, room=room), house.model)
    house.check(crowd, told)


@pytest.mark.timeout(1800)
def test_hundreds_of_users_who_come_and_go_each_get_what_they_get_alone(
    house: House, record_measurement: Callable[[str, float | str], None]
) -> None:
    dice = random.Random(7)
    crowd = [random_user(dice) for _ in range(max(REQUESTS, 40))]
    told, recorder = serve(crowd, house.batch(), house.model)
    house.check(crowd, told)
    if house.model.attends == "blocks":
        assert recorder.value(metrics.PREFIX_HIT_TOKENS) > 0
    ends = Counter(
        "left" if one.finished is None else pb.FinishReason.Name(one.finished.reason) for one in told
    )
    record_measurement("ends", str(dict(ends)))
    assert {"left", "FINISH_REASON_LENGTH", "FINISH_REASON_STOP"} <= ends.keys(), ends


class Overheard(CountingBatch):
    """One that is wrong on purpose: a request skips a number when an older one beside it has two blocks."""

    def step(self) -> list[Event]:
        oldest, *others = self._rows.values()
        if others and oldest.total == 2 * self.block_length:
            others[0].next_token += 1
        return super().step()


@pytest.mark.timeout(1800)
def test_a_crowd_that_is_not_served_well_shrinks_to_the_two_that_disturb_each_other(house: House) -> None:
    def disturbed(crowd: list[User]) -> bool:
        told, _ = serve(crowd, Overheard(rows=5, block_length=BLOCK), house.model)
        alone = [
            serve([user], CountingBatch(rows=5, block_length=BLOCK), house.model)[0][0] for user in crowd
        ]
        return any(
            got.finished is not None and own.finished is not None and got.whole != own.whole
            for got, own in zip(told, alone, strict=True)
        )

    few = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    crowd = find(crowds(6), disturbed, settings=few, random=random.Random(1))
    assert len(crowd) == 2, crowd
    assert max(user.new for user in crowd) == 2 * BLOCK + 1, crowd
    assert all((user.stop, user.parameters, user.temperature) == ((), (), 0.0) for user in crowd), crowd


class Caller:
    """A request, and what has been heard of it."""

    def __init__(self, user: User, model: ServedModel) -> None:
        order = read_order(user.asked(model.attends), model)
        self.items: list[Item] = []
        self.heard = 0
        self.request = Request(
            prompt=order.prompt, params=order.params, canvas=True, outbox=Outbox(self._hear)
        )

    def _hear(self) -> None:
        self.heard += 1

    def ended(self) -> bool:
        self.items += self.request.outbox.take()
        return any(isinstance(item, Finished) for item in self.items)

    def tokens(self) -> list[int]:
        return [token for item in self.items if isinstance(item, Committed) for token in item.token_ids]


@pytest.mark.timeout(1800)
def test_aborts_at_any_moment_leave_no_page_and_no_row(house: House) -> None:
    """A thread submits and cancels while the model thread runs: after so many words from the first."""
    dice = random.Random(3)
    batch = house.batch(rows=3)
    running = Engine(batch, Recorder(), max_queue_requests=10_000)
    running.start()
    aborted = 0
    try:
        while aborted < counts.of(sample=60, full=1000, variable="UNMASK_ABORTS"):
            callers = [Caller(random_user(dice), house.model) for _ in range(dice.randint(1, 4))]
            for caller in callers:
                running.submit(caller.request)
            words = dice.randint(0, 12)
            wait_until(lambda first=callers[0], words=words: first.heard >= words or first.ended())
            for caller in callers:
                aborted += not caller.ended()
                running.cancel(caller.request)
        wait_until(lambda: batch.active == 0 and batch.cache_usage == 0)
        user = User(own=5, new=9)
        last = Caller(user, house.model)
        running.submit(last.request)
        wait_until(last.ended)
        assert last.tokens() == house.alone(user).tokens
    finally:
        running.stop()
