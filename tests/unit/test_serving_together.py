"""Many users of one engine: whatever the others do and whenever they come, each gets what it gets alone."""

import random
from dataclasses import dataclass
from functools import cache

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support import counts
from support.models import TINY, random_tokens, tiny_model
from support.serving import wait_until
from unmask.diffusion.batch import Committed, Finished, Generation
from unmask.diffusion.decoding import DecodingParams
from unmask.diffusion.generation import generate
from unmask.models.base import LanguageModel
from unmask.serving.engine import Engine, Request
from unmask.serving.outbox import Item, Outbox
from unmask.serving.ragged import RaggedBatch
from unmask.telemetry import Recorder, metrics

BLOCK, CAPACITY = 4, 64


@dataclass(frozen=True, slots=True)
class User:
    """One request: what it asks for, when it comes, and after how many forwards it goes away, if it does."""

    shared: int
    """First tokens of the prompt that all users have in common."""
    own: int
    seed: int
    new: int
    threshold: float
    steps: int | None
    edit_threshold: float | None
    arrives: int
    leaves: int | None
    salt: str

    @property
    def prompt(self) -> tuple[int, ...]:
        return (*random_tokens(self.shared), *random_tokens(self.own, seed=self.seed))

    @property
    def params(self) -> DecodingParams:
        return DecodingParams(
            max_new_tokens=self.new,
            block_length=BLOCK,
            threshold=self.threshold,
            steps=self.steps,
            edit_threshold=self.edit_threshold,
            max_post_edit_steps=2,
            eos_token_id=TINY["eos_token_id"],
            mask_token_id=TINY["mask_token_id"],
        )

    def request(self) -> Request:
        return Request(
            prompt=self.prompt, params=self.params, cache_salt=self.salt, outbox=Outbox(lambda: None)
        )


users = st.builds(
    User,
    shared=st.sampled_from([0, 3, 8, 21]),
    own=st.integers(1, 20),
    seed=st.integers(1, 5),
    new=st.integers(1, 20),
    threshold=st.sampled_from([0.05, 0.3, 2.0]),
    steps=st.sampled_from([None, 1, 2]),
    edit_threshold=st.sampled_from([None, None, 0.1]),
    arrives=st.integers(0, 25),
    leaves=st.one_of(st.none(), st.none(), st.integers(0, 12)),
    salt=st.sampled_from(["", "", "other"]),
)


def random_user(dice: random.Random) -> User:
    return User(
        shared=dice.choice([0, 3, 8, 21]),
        own=dice.randint(1, 20),
        seed=dice.randint(1, 5),
        new=dice.randint(1, 20),
        threshold=dice.choice([0.05, 0.3, 2.0]),
        steps=dice.choice([None, 1, 2]),
        edit_threshold=dice.choice([None, None, 0.1]),
        arrives=dice.randint(0, 300),
        leaves=dice.choice([None, None, dice.randint(0, 12)]),
        salt=dice.choice(["", "", "other"]),
    )


@cache
def model() -> LanguageModel:
    return tiny_model(dtype=torch.float32)


@cache
def alone(prompt: tuple[int, ...], params: DecodingParams) -> Generation:
    return generate(model(), [prompt], params)[0]


def engine(*, rows: int = 5, pages: int = 40, room: int = 8) -> tuple[Engine, RaggedBatch, Recorder]:
    batch = RaggedBatch(
        model(),
        rows=rows,
        capacity=CAPACITY,
        block_length=BLOCK,
        cache_bytes=pages * model().page_bytes(block_length=BLOCK),
        max_positions=room * BLOCK,
    )
    recorder = Recorder()
    return Engine(batch, recorder, max_queue_requests=10_000), batch, recorder


def serve(crowd: list[User], turned: Engine) -> list[tuple[list[int], Finished | None]]:
    """Turn an engine by hand until all have come and gone; what each got."""
    requests = [user.request() for user in crowd]
    got: list[tuple[list[int], Finished | None]] = [([], None) for _ in crowd]
    left = set(range(len(crowd)))
    turn = 0
    while left:
        for number in sorted(left):
            if crowd[number].arrives == turn:
                turned.submit(requests[number])
        turned.turn()
        for number in sorted(left):
            tokens, end = got[number]
            for item in requests[number].outbox.take():
                if isinstance(item, Committed):
                    tokens += item.token_ids
                elif isinstance(item, Finished):
                    end = item
            got[number] = (tokens, end)
            leaves = crowd[number].leaves
            if end is None and leaves is not None and turn == crowd[number].arrives + leaves:
                turned.cancel(requests[number])
                left.discard(number)
            if end is not None:
                left.discard(number)
        turn += 1
        assert turn < 10_000
    turned.turn()
    return got


def check(crowd: list[User], got: list[tuple[list[int], Finished | None]]) -> None:
    for user, (tokens, end) in zip(crowd, got, strict=True):
        expected = alone(user.prompt, user.params)
        if end is None:
            assert user.leaves is not None
            assert tokens == expected.token_ids[: len(tokens)]
        else:
            assert tokens == expected.token_ids
            assert (end.reason, end.kept_tokens) == (expected.reason, expected.kept_tokens)
            assert end.usage.denoise == expected.usage.denoise


@settings(max_examples=counts.of(sample=12, full=300), deadline=None)
@given(st.lists(users, min_size=1, max_size=12), st.integers(1, 5), st.integers(16, 40), st.integers(4, 12))
def test_each_gets_what_it_gets_alone(crowd: list[User], rows: int, pages: int, room: int) -> None:
    turned, batch, _ = engine(rows=rows, pages=pages, room=room)
    check(crowd, serve(crowd, turned))
    assert (batch.active, batch.cache_usage) == (0, 0)


def test_hundreds_of_users_who_come_and_go_each_get_what_they_get_alone() -> None:
    dice = random.Random(7)
    crowd = [random_user(dice) for _ in range(counts.of(sample=60, full=200))]
    turned, batch, recorder = engine()
    got = serve(crowd, turned)
    check(crowd, got)
    assert (batch.active, batch.cache_usage) == (0, 0)
    assert recorder.value(metrics.PREFIX_HIT_TOKENS) > 0
    assert any(end is None for _, end in got) and any(end is not None for _, end in got)


class Caller:
    """A request, and what has been heard of it."""

    def __init__(self, user: User) -> None:
        self.items: list[Item] = []
        self.heard = 0
        self.request = Request(prompt=user.prompt, params=user.params, canvas=True, outbox=Outbox(self._hear))

    def _hear(self) -> None:
        self.heard += 1

    def ended(self) -> bool:
        self.items += self.request.outbox.take()
        return any(isinstance(item, Finished) for item in self.items)

    def tokens(self) -> list[int]:
        return [token for item in self.items if isinstance(item, Committed) for token in item.token_ids]


def test_aborts_at_any_moment_leave_no_page_and_no_row() -> None:
    """A thread submits and cancels while the model thread runs: after so many words from the first."""
    dice = random.Random(3)
    running, batch, _ = engine(rows=3, pages=40)
    running.start()
    aborted = 0
    try:
        while aborted < counts.of(sample=100, full=1000):
            callers = [Caller(random_user(dice)) for _ in range(dice.randint(1, 4))]
            for caller in callers:
                running.submit(caller.request)
            words = dice.randint(0, 12)
            wait_until(lambda first=callers[0], words=words: first.heard >= words or first.ended())
            for caller in callers:
                aborted += not caller.ended()
                running.cancel(caller.request)
        wait_until(lambda: batch.active == 0 and batch.cache_usage == 0)
        user = random_user(dice)
        last = Caller(user)
        running.submit(last.request)
        wait_until(last.ended)
        assert last.tokens() == alone(user.prompt, user.params).token_ids
    finally:
        running.stop()
