"""Which replica a call goes to, and whether it goes on: decisions beside their slow, obvious references."""

import asyncio
import hashlib
import math
import random
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support import counts
from unmask.client.continuation import OtherWeights
from unmask.client.errors import (
    Aborted,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    NotAllowed,
    Overloaded,
    RequestError,
    ServerFailed,
    Unavailable,
    UnsupportedRequest,
)
from unmask.errors import UsageError
from unmask.gateway.addresses import Target, look_up
from unmask.gateway.relay import Attempts
from unmask.gateway.routing import Candidate, choose, eligible, estimated_load, prefix_of
from unmask.v1 import generation_pb2 as pb

NAMES = [f"10.0.0.{number}:50051" for number in range(1, 9)]
LOADS = st.integers(0, 40)
BOUNDS = st.sampled_from([1.0, 1.1, 1.25, 1.5, 2.0, 8.0])
PREFIXES = st.binary(min_size=16, max_size=16)


@st.composite
def fleets(draw: st.DrawFn, least: int = 0) -> list[Candidate]:
    names = draw(st.lists(st.sampled_from(NAMES), min_size=least, unique=True))
    return [
        Candidate(
            name=name,
            load=draw(LOADS),
            last=draw(LOADS),
            serving=draw(st.booleans()),
            banned=draw(st.booleans()),
            revision=draw(st.sampled_from([None, "a", "b"])),
        )
        for name in names
    ]


# Which replica


def home_of(prefix: bytes, names: Sequence[str]) -> str:
    """The name that comes last when all are sorted by their hash with the prefix."""
    return sorted(
        names, key=lambda name: hashlib.blake2b(name.encode(), key=prefix, digest_size=16).hexdigest()
    )[-1]


@given(fleets(), st.one_of(st.none(), PREFIXES), BOUNDS)
def test_a_choice_is_what_the_rule_says(fleet: list[Candidate], prefix: bytes | None, bound: float) -> None:
    choice = choose(fleet, prefix=prefix, bound=bound)
    if not fleet:
        assert choice is None
        return
    assert choice is not None
    loads = {candidate.name: candidate.load for candidate in fleet}
    if prefix is not None:
        home = home_of(prefix, list(loads))
        mean = Fraction(sum(loads.values()) + 1, len(loads))
        if loads[home] + 1 <= math.ceil(Fraction(bound) * mean):
            assert (choice.name, choice.by) == (home, "prefix")
            return
    assert choice.by == "load"
    least = [candidate for candidate in fleet if candidate.load == min(loads.values())]
    longest_ago = [each for each in least if each.last == min(candidate.last for candidate in least)]
    assert choice.name == min(candidate.name for candidate in longest_ago)


@given(PREFIXES, st.lists(st.sampled_from(NAMES), min_size=2, unique=True))
def test_only_prompts_of_the_replica_that_goes_or_comes_move(prefix: bytes, names: list[str]) -> None:
    def chosen(names: Sequence[str]) -> str:
        choice = choose([Candidate(name=name, load=0) for name in names], prefix=prefix, bound=1e9)
        assert choice is not None and choice.by == "prefix"
        return choice.name

    before, gone = chosen(names), names[0]
    after = chosen(names[1:])
    assert after == before or before == gone
    assert chosen(names[::-1]) == before


def test_prompts_are_spread_evenly() -> None:
    dice, fleet = random.Random(3), [Candidate(name=name, load=0) for name in NAMES[:4]]
    found = Counter(
        choice.name
        for _ in range(4000)
        if (choice := choose(fleet, prefix=dice.randbytes(16), bound=1e9)) is not None
    )
    assert set(found) == set(NAMES[:4]) and min(found.values()) > 850, found


@given(
    st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=counts.of(sample=80, full=400)),
    st.integers(1, 6),
    BOUNDS,
)
def test_no_replica_has_more_than_its_bound_of_the_mean(
    calls: list[tuple[int, bool]], replicas: int, bound: float
) -> None:
    """However many calls begin alike. None ends here, which is when loads are highest."""
    loads, last = Counter[str](), Counter[str]()
    for number, (beginning, whole) in enumerate(calls, start=1):
        fleet = [Candidate(name=name, load=loads[name], last=last[name]) for name in NAMES[:replicas]]
        prefix = hashlib.sha256(bytes([beginning])).digest()[:16] if whole else None
        choice = choose(fleet, prefix=prefix, bound=bound)
        assert choice is not None
        loads[choice.name] += 1
        last[choice.name] = number
        assert max(loads.values()) <= math.ceil(Fraction(bound) * Fraction(number, replicas))


def test_among_equals_it_goes_round() -> None:
    """One that comes later is next, and then one of all."""
    last, found = Counter[str](), []
    for number in range(1, 10):
        names = NAMES[: 2 if number < 5 else 3]
        fleet = [Candidate(name=name, load=2, last=last[name]) for name in names]
        choice = choose(fleet, prefix=None, bound=1)
        assert choice is not None
        last[choice.name] = number
        found.append(NAMES.index(choice.name))
    assert found == [0, 1, 0, 1, 2, 0, 1, 2, 0]


@given(fleets(), st.sets(st.sampled_from(NAMES)), st.sampled_from([None, "a"]))
def test_a_call_goes_only_where_it_may(fleet: list[Candidate], tried: set[str], revision: str | None) -> None:
    able = []
    for candidate in fleet:
        if not candidate.serving or candidate.name in tried:
            continue
        if revision is not None and candidate.revision != revision:
            continue
        able.append(candidate)
    sound = [candidate for candidate in able if not candidate.banned]
    assert eligible(fleet, tried=tried, revision=revision) == (sound if sound else able)


@given(own=LOADS, others=LOADS, begun=LOADS, ended=LOADS)
def test_load_is_that_of_this_gateway_and_of_others(own: int, others: int, begun: int, ended: int) -> None:
    """What began or ended here since the replica was asked is known at once."""
    now = max(0, own + begun - ended)
    assert estimated_load(own=now, reported=own + others, own_then=own) == now + others
    assert estimated_load(own=now, reported=0, own_then=own) == now


# What prompts begin with

BLOCK = 4
UNIT = 4 * BLOCK


def asked(prompt: str | Sequence[int], salt: str | None = None) -> pb.GenerateRequest:
    request = pb.GenerateRequest()
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
    if salt is not None:
        request.cache_salt = salt
    return request


def key(request: pb.GenerateRequest, blocks: int = 3) -> bytes | None:
    return prefix_of(request, block_length=BLOCK, blocks=blocks)


def whole_blocks(prompt: str | Sequence[int], blocks: int) -> bytes | tuple[int, ...]:
    """The reference: all of the prompt, cut."""
    told: bytes | tuple[int, ...] = prompt.encode() if isinstance(prompt, str) else tuple(prompt)
    size = UNIT if isinstance(prompt, str) else BLOCK
    return told[: min(blocks, len(told) // size) * size]


PROMPTS = st.one_of(
    st.text(alphabet="ab\N{EURO SIGN}", max_size=70),
    st.lists(st.integers(0, 2), max_size=20),
)


@given(PROMPTS, PROMPTS, st.integers(1, 4))
def test_prompts_have_one_key_where_their_first_whole_blocks_are_the_same(
    one: str | list[int], other: str | list[int], blocks: int
) -> None:
    beginning, another = whole_blocks(one, blocks), whole_blocks(other, blocks)
    if not beginning:
        assert key(asked(one), blocks) is None
    elif another:
        same = type(one) is type(other) and beginning == another
        assert (key(asked(one), blocks) == key(asked(other), blocks)) == same


@given(st.lists(st.integers(0, 9), min_size=12, max_size=40), st.lists(st.integers(0, 9)))
def test_what_follows_the_first_blocks_does_not_matter(first: list[int], more: list[int]) -> None:
    assert key(asked(first)) == key(asked(first[:12] + more)) is not None


def test_salts_part_prompts_as_caches_do() -> None:
    prompt = list(range(12))
    keys = {key(asked(prompt, salt)) for salt in (None, "a", "b", "a:")}
    assert len(keys) == 4
    assert key(asked(prompt, "")) == key(asked(prompt))


def test_a_conversation_keeps_its_replica_as_it_grows() -> None:
    first = pb.GenerateRequest()
    first.chat.messages.add(role="system", content="You are a helpful assistant. " * 3)
    first.chat.messages.add(role="user", content="hello")
    later = pb.GenerateRequest()
    later.CopyFrom(first)
    later.chat.messages.add(role="assistant", content="hi")
    later.chat.messages.add(role="user", content="how are you?")
    assert key(first) == key(later) is not None
    other = pb.GenerateRequest()
    other.CopyFrom(first)
    other.chat.messages[0].content = "You are a pirate. " * 5
    assert key(other) not in (None, key(first))
    with_tools = pb.GenerateRequest()
    with_tools.CopyFrom(first)
    with_tools.chat.tools.append('{"name": "look"}')
    assert key(with_tools) not in (None, key(first))


def test_no_prompt_has_no_beginning() -> None:
    assert key(pb.GenerateRequest()) is None
    assert key(asked("w5")) is None
    assert key(asked(list(range(40))), blocks=0) is None


# Whether to go on

FAILURES: list[type[RequestError]] = [
    Aborted,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    NotAllowed,
    OtherWeights,
    Overloaded,
    ServerFailed,
    Unavailable,
    UnsupportedRequest,
]
ELSEWHERE = {OtherWeights, Overloaded, Unavailable}


def failure(kind: type[RequestError], code: str = "") -> RequestError:
    return kind("because", code=code)


@pytest.mark.parametrize("kind", FAILURES, ids=lambda kind: kind.__name__)
def test_what_is_wrong_everywhere_is_not_asked_elsewhere(kind: type[RequestError]) -> None:
    verdict = Attempts(most=3).failed("a", failure(kind))
    assert verdict == ("elsewhere" if kind in {*ELSEWHERE, ServerFailed} else "give up")


@given(st.lists(st.sampled_from(["lost", "defect", "full", "block"]), max_size=30), st.integers(1, 4))
def test_a_call_is_given_to_few_replicas_in_turn_without_progress(what: list[str], most: int) -> None:
    """Reference: the whole story since the last block, counted anew each time."""
    attempts, since = Attempts(most=most), list[str]()
    kinds = {"lost": Unavailable, "defect": ServerFailed, "full": Overloaded}
    for number, event in enumerate(what):
        if event == "block":
            attempts.progressed()
            since = []
            assert attempts.tried == set()
            continue
        since.append(event)
        verdict = attempts.failed(f"r{number}", failure(kinds[event]))
        assert f"r{number}" in attempts.tried
        lost = since.count("lost") + since.count("defect")
        if event == "full":
            assert verdict == "elsewhere"
        elif event == "defect":
            assert (verdict == "elsewhere") == (lost < most and since.count("defect") == 1)
        else:
            assert (verdict == "elsewhere") == (lost < most)
        if verdict == "give up":
            return


def test_a_name_that_is_in_use_where_the_call_was_before_is_waited_for() -> None:
    taken = failure(InvalidRequest, "ALREADY_EXISTS")
    assert Attempts(most=3).failed("a", taken) == "give up"
    attempts = Attempts(most=3)
    attempts.failed("a", failure(Unavailable))
    assert attempts.failed("a", taken) == "elsewhere"
    assert attempts.failed("a", taken) == "give up"


# Where replicas are


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("engine:50051", Target("engine", 50051, False)),
        ("dns:engine.serving.svc:50051", Target("engine.serving.svc", 50051, True)),
        ("[::1]:1", Target("::1", 1, False)),
    ],
)
def test_targets(text: str, target: Target) -> None:
    assert Target.reading(text) == target
    assert str(target) == text


@pytest.mark.parametrize(
    "text", ["", "engine", "engine:", ":1", "a:0", "a:65536", "http://a:1", "a b:1", "a:1:2"]
)
def test_what_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected HOST:PORT or dns:HOST:PORT"):
        Target.reading(text)


def test_a_name_has_addresses() -> None:
    assert "127.0.0.1:50051" in asyncio.run(look_up(Target("localhost", 50051, True)))
