"""Planning of expert shards: what tokens hit, what a forward takes, and where constants come from."""

import json
import random
from fractions import Fraction
from itertools import combinations, pairwise, product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unmask.errors import UsageError
from unmask.experts.frames import Header, encode_reply, encode_request
from unmask.experts.placement import even_bounds
from unmask.experts.planning.choices import (
    Choice,
    chance_imbalance,
    copies_per_token,
    experts_hit,
    part_hit,
)
from unmask.experts.planning.constants import (
    Constants,
    Machine,
    Network,
    Transport,
    assumed,
    read_constants,
    with_network,
)
from unmask.experts.planning.forward import (
    PARTS,
    Forward,
    answer_bytes,
    calibrated,
    frame_bytes,
    predicted_ratio,
    sharded,
    unsharded,
)
from unmask.experts.planning.setting import Setting, Work
from unmask.models.moe import Router
from unmask.models.published import published_config
from unmask.models.registry import read_config
from unmask.models.shape import shape_of

ROOT = Path(__file__).parents[2]
MINI = Choice(num_experts=256, chosen=8, groups=8, chosen_groups=4)
SHARDS = [1, 2, 4, 8, 16, 32, 64]


# What tokens hit.


def every_choice(choice: Choice) -> list[frozenset[int]]:
    """All that a token may choose, one as likely as the next."""
    size = choice.num_experts // choice.groups
    return [
        frozenset(chosen)
        for groups in combinations(range(choice.groups), choice.chosen_groups)
        for chosen in combinations(
            [expert for expert in range(choice.num_experts) if expert // size in groups], choice.chosen
        )
    ]


@st.composite
def choices(draw: st.DrawFn) -> Choice:
    groups = draw(st.integers(1, 4))
    size = draw(st.integers(1, 8 // groups))
    chosen_groups = draw(st.integers(1, groups))
    chosen = draw(st.integers(1, chosen_groups * size))
    return Choice(num_experts=groups * size, chosen=chosen, groups=groups, chosen_groups=chosen_groups)


@given(choices(), st.data())
def test_how_likely_a_part_is_hit_is_what_counting_all_choices_says(choice: Choice, data) -> None:
    first = data.draw(st.integers(0, choice.num_experts - 1))
    stop = data.draw(st.integers(first + 1, choice.num_experts))
    every = every_choice(choice)
    hits = sum(1 for chosen in every if chosen & set(range(first, stop)))
    assert part_hit(choice, first, stop) == pytest.approx(hits / len(every), abs=1e-12)


@given(choices())
def test_how_many_experts_are_hit_is_what_counting_all_choices_of_two_tokens_says(choice: Choice) -> None:
    every = every_choice(choice)
    one_of_each = Fraction(sum(len(a | b) for a, b in product(every, every)), len(every) ** 2)
    assert experts_hit(choice, 2) == pytest.approx(float(one_of_each))
    assert experts_hit(choice, 1) == pytest.approx(choice.chosen)


@pytest.mark.parametrize(
    ("shards", "grouped", "ungrouped"),
    [(1, 1.00, 1.00), (2, 1.93, 1.99), (4, 2.93, 3.61), (8, 3.63, 5.29)],
)
def test_copies_of_a_token_are_those_of_a_simulation_of_mini(shards, grouped, ungrouped) -> None:
    bounds = even_bounds(256, shards, groups=8)
    assert copies_per_token(MINI, bounds) == pytest.approx(grouped, abs=0.006)
    assert copies_per_token(Choice(num_experts=256, chosen=8), bounds) == pytest.approx(ungrouped, abs=0.006)


@pytest.mark.parametrize(("shards", "copies"), [(2, 1.97), (4, 3.13), (8, 3.97), (16, 5.72)])
def test_the_routers_own_rule_sends_random_scores_to_a_tenth_more_at_most(shards, copies) -> None:
    router = Router(1, 256, choose=8, score="sigmoid", normalise=True, groups=8, keep_groups=4)
    scores = torch.randn(2048, 256, generator=torch.Generator().manual_seed(0)).sigmoid()
    part = router._choose(scores) // (256 // shards)
    found = torch.nn.functional.one_hot(part, shards).amax(1).sum(1).float().mean().item()
    assert found == pytest.approx(copies, abs=0.04)
    expected = copies_per_token(MINI, even_bounds(256, shards, groups=8))
    assert expected < found < 1.1 * expected


def test_experts_hit_are_those_of_a_simulation_of_mini() -> None:
    assert experts_hit(MINI, 256) == pytest.approx(255.9, abs=0.05)
    assert experts_hit(MINI, 32) == pytest.approx(163, abs=0.5)


@pytest.mark.parametrize(("shards", "tokens"), [(1, 9), (2, 64), (8, 256), (8, 32)])
def test_the_fullest_part_is_as_full_as_in_draws(shards: int, tokens: int) -> None:
    bounds, draws, dice = even_bounds(256, shards, groups=8), 60, random.Random(0)
    seen = 0.0
    for _ in range(draws):
        rows = [0] * shards
        for _ in range(tokens):
            groups = dice.sample(range(8), 4)
            offered = [group * 32 + one for group in groups for one in range(32)]
            chosen = dice.sample(offered, 8)
            for part, (first, stop) in enumerate(pairwise(bounds)):
                rows[part] += any(first <= expert < stop for expert in chosen)
        seen += max(rows) * shards / sum(rows)
    expected = chance_imbalance(part_hit(MINI, bounds[0], bounds[1]), shards, tokens)
    assert expected == pytest.approx(seen / draws, abs=0.04)


def test_no_part_has_more_rows_than_there_are_tokens() -> None:
    assert chance_imbalance(0.5, 64, 1) == 2.0


# What is sent.


@given(st.integers(1, 9), st.integers(1, 8), st.integers(1, 20), st.sampled_from(["float32", "bfloat16"]))
def test_bytes_of_frames_are_those_of_frames(tokens: int, chosen: int, hidden: int, rows_as) -> None:
    rows = torch.zeros(tokens, hidden, dtype=getattr(torch, rows_as))
    header = Header(epoch=1, part=0, layer=0, sequence=1, tokens=tokens)
    slots, weights = torch.zeros(tokens, chosen, dtype=torch.int16), torch.zeros(tokens, chosen)
    frame = len(encode_request(header, slots, weights, rows))
    answer = len(encode_reply(header, rows))
    assert 0 <= frame - frame_bytes(tokens, choices=chosen, hidden=hidden, rows_as=rows_as) < 3 * 8
    assert 0 <= answer - answer_bytes(tokens, hidden=hidden, rows_as=rows_as) < 8


# What a forward takes.

H200 = Machine(
    memory_bytes_per_second=4.8e12, flops_per_second=1e15, expert_flops_per_second=1e15, constant_bytes=1e9
)
FREE = Transport(frame_seconds=0, frame_seconds_per_byte=0)
SHAPES = {
    name: shape_of(published_config(name)) for name in ("llada2-mini", "llada2-flash", "llada-moe-7b-a1b")
}


def setting(
    model: str = "llada2-mini", *, micro_batches: int = 1, work: Work | None = None, **given
) -> Setting:
    constants = Constants(**({"engine": H200, "shard": H200, "transports": {"grpc": FREE}} | given))
    return Setting(shape=SHAPES[model], work=work or Work(), constants=constants, micro_batches=micro_batches)


def seconds_of(forward: Forward, name: str) -> float:
    (found,) = (part.seconds for part in forward.parts if part.name == name)
    return found


@pytest.mark.parametrize(("batch", "milliseconds"), [(1, 4.1), (8, 6.4)])
def test_experts_of_mini_take_as_long_as_reading_those_that_are_hit(batch: int, milliseconds: float) -> None:
    forward = unsharded(setting(work=Work(batch=batch)))
    assert seconds_of(forward, "experts") * 1e3 == pytest.approx(milliseconds, abs=0.05)
    assert forward.bound == "experts (memory)"


@pytest.mark.parametrize(
    ("shards", "mebibytes", "milliseconds"), [(1, 38, 3.6), (2, 73, 7.0), (4, 111, 10.6), (8, 138, 13.1)]
)
def test_bytes_and_network_of_mini_are_those_of_the_rows_and_a_hundredth(
    shards: int, mebibytes: float, milliseconds: float
) -> None:
    network = Network(bytes_per_second=11e9, round_trip_seconds=0)
    forward = sharded(setting(network=network), shards)
    # Beside rows there are experts and their weights, 48 bytes for 8,192 of rows, and headers.
    assert (forward.sent_bytes + forward.received_bytes) / 2**20 == pytest.approx(mebibytes * 1.006, rel=0.01)
    assert seconds_of(forward, "network") * 1e3 == pytest.approx(milliseconds * 1.006, rel=0.01)
    assert forward.sent_bytes > forward.received_bytes


def test_one_shard_without_a_way_to_it_is_the_model_without_shards() -> None:
    plain = setting("llada-moe-7b-a1b")  # no shared experts
    assert sharded(plain, 1).seconds == pytest.approx(unsharded(plain).seconds)
    assert predicted_ratio(plain, 1) == pytest.approx(1)
    with_shared = setting()
    one, none = sharded(with_shared, 1), unsharded(with_shared)
    assert [part.seconds for part in one.parts] == pytest.approx([part.seconds for part in none.parts])
    shared = 19 * 2 * 256 * 3 * 2048 * 512 / 1e15  # with 256 rows, arithmetic bounds what all share
    assert one.hidden_seconds == pytest.approx(shared) == none.seconds - one.seconds
    apart = setting(overlap=False)
    assert sharded(apart, 1).seconds == pytest.approx(unsharded(apart).seconds)


@pytest.mark.parametrize("model", SHAPES)
def test_parts_add_up_and_more_shards_compute_and_hold_less_each(model: str) -> None:
    known = assumed(device="h200-141g", memory_bytes_per_second=4.8e12, flops_per_second=9.89e14)
    served = Setting(shape=SHAPES[model], work=Work(), constants=known.constants)
    forwards = [sharded(served, shards) for shards in SHARDS]
    for forward in [unsharded(served), *forwards]:
        assert [part.name for part in forward.parts] == list(PARTS)
        assert forward.seconds > 0 and forward.hidden_seconds >= 0
        total = sum(part.seconds for part in forward.parts)
        assert forward.seconds + forward.hidden_seconds == pytest.approx(total)
        assert forward.batch_tokens_per_second == pytest.approx(8 * 2.5 / forward.seconds)
    for fewer, more in pairwise(forwards):
        assert more.shard_bytes < fewer.shard_bytes and more.engine_bytes == fewer.engine_bytes
        assert seconds_of(more, "experts") < seconds_of(fewer, "experts")
        assert more.copies_per_token > fewer.copies_per_token
        assert more.sent_bytes > fewer.sent_bytes and more.frame_bytes < fewer.frame_bytes


def test_memory_of_flash_is_its_parameters_once_and_the_routed_ones_in_shards() -> None:
    served = setting("llada2-flash")
    assert served.parameters == 102_889_705_216
    routed = 31 * 256 * 3 * 4096 * 1024
    assert served.expert_parameters == routed
    constant = int(H200.constant_bytes)
    cache = 8 * (1024 + 32) * 32 * 2 * 4 * 128 * 2
    routers = 31 * 256 * (4096 + 1)
    others = 102_889_705_216 - routed - routers
    assert served.engine_bytes() == 2 * others + 4 * routers + cache + constant
    for shards in SHARDS:
        bounds = even_bounds(256, shards, groups=8)
        once = [2 * routed // 256 * (stop - first) for first, stop in pairwise(bounds)]
        assert sum(once) == 2 * routed
        assert served.shard_bytes(shards) == max(once) + constant
        assert served.engine_bytes() - constant + sum(once) == served.unsharded_bytes() - constant
    assert served.shard_bytes(8, replication=2) == 2 * routed // 8 * 2 + constant
    assert served.shard_bytes(3) == 2 * routed // 8 * 3 + constant  # of 8 groups, 2, 3 and 3


def test_frames_cost_what_the_line_through_their_sizes_says() -> None:
    transport = Transport(frame_seconds=1e-4, frame_seconds_per_byte=1e-9, engine_share=0.25)
    served = setting(transports={"grpc": transport})
    one, four = sharded(served, 1), sharded(served, 4)
    moved = (one.sent_bytes + one.received_bytes) / 19
    assert seconds_of(one, "frames") == pytest.approx(19 * (1e-4 + 1e-9 * moved))
    # Of four, the engine has its quarter of each, and the others theirs at a time: here the fullest part's.
    fullest = (four.frame_bytes + four.answer_bytes - 128) * four.imbalance + 128
    engine = 0.25 * (4 * 1e-4 + 1e-9 * (four.sent_bytes + four.received_bytes) / 19)
    assert seconds_of(four, "frames") == pytest.approx(19 * (engine + 0.75 * (1e-4 + 1e-9 * fullest)))


def test_copies_between_device_and_host_are_of_the_rows() -> None:
    machine = H200.model_copy(update={"host_copy_seconds_per_byte": 1e-10})
    one = sharded(setting(engine=machine), 1)
    assert seconds_of(one, "copies") == pytest.approx(19 * 256 * 2048 * (2 + 2) * 1e-10)
    both = sharded(setting(engine=machine, shard=machine), 1)
    assert seconds_of(both, "copies") == pytest.approx(
        19 * 1e-10 * (256 * 2048 * 4 + (both.frame_bytes + both.answer_bytes))
    )


def test_few_tokens_leave_parts_without_frames() -> None:
    few = sharded(setting(work=Work(batch=1, block_length=1)), 64)
    frames = few.received_bytes / few.answer_bytes / 19
    assert frames == pytest.approx(few.copies_per_token) and 7 < frames < 8


def test_a_measured_imbalance_goes_before_chance_and_one_shard_has_none() -> None:
    assert sharded(setting(), 8).imbalance == pytest.approx(1.10, abs=0.01)
    uneven = setting(imbalance=1.5)
    assert sharded(uneven, 8).imbalance == 1.5
    assert sharded(uneven, 1).imbalance == 1.0
    slow = H200.model_copy(update={"expert_flops_per_second": 1e12})
    even = setting(shard=slow, imbalance=1.0)
    uneven = setting(shard=slow, imbalance=1.5)
    took = [seconds_of(sharded(one, 8), "experts") for one in (even, uneven)]
    assert took[1] / took[0] == pytest.approx(1.5)


def test_shards_that_share_processors_take_turns() -> None:
    all_at_once, two_at_once = setting(), setting(shards_at_once=2)
    assert sharded(two_at_once, 2).seconds == pytest.approx(sharded(all_at_once, 2).seconds)
    took = [seconds_of(sharded(one, 8), "experts") for one in (all_at_once, two_at_once)]
    assert took[1] == pytest.approx(4 * took[0])


def test_two_micro_batches_take_as_long_as_whatever_is_busiest() -> None:
    slow = Network(bytes_per_second=1e9, round_trip_seconds=0)
    one, two = (sharded(setting(network=slow, micro_batches=count), 4) for count in (1, 2))
    assert one.bound == "network (bytes)" and two.bound == "network: network (bytes)"
    # Nothing but the network is left, and the engine's dense layer and output.
    wire = seconds_of(two, "network")
    assert two.seconds == pytest.approx(wire, rel=0.1) and two.seconds > wire
    assert one.seconds > two.seconds
    # The experts of both halves are read, where there was one reading of all before.
    ratio = seconds_of(two, "experts") / seconds_of(one, "experts")
    assert ratio == pytest.approx(2 * experts_hit(MINI, 128) / experts_hit(MINI, 256), rel=0.02)


def test_where_reading_weights_is_all_two_micro_batches_gain_nothing() -> None:
    one, two = (sharded(setting(micro_batches=count), 1) for count in (1, 2))
    assert two.bound == "shards: experts (memory)"
    assert two.seconds > 1.8 * one.seconds
    same = [setting(overlap=False, micro_batches=count) for count in (1, 2)]
    for served in same:
        assert sharded(served, 2).hidden_seconds == pytest.approx(0)


def test_model_m_on_two_processors_is_predicted_from_constants_of_one_machine() -> None:
    """By hand: experts take as long on both, so what is added is the frames."""
    engine = Machine(memory_bytes_per_second=27e9, flops_per_second=2.4e11, expert_flops_per_second=2e11)
    shard = Machine(memory_bytes_per_second=14e9, flops_per_second=1.2e11, expert_flops_per_second=1e11)
    constants = Constants(
        engine=engine,
        shard=shard,
        transports={"grpc": Transport(frame_seconds=2e-4, frame_seconds_per_byte=6e-10)},
        imbalance=1.0,
        shards_at_once=2,
        overlap=False,
    )
    served = Setting(
        shape=shape_of(read_config(ROOT / "benchmarks", "model_m.json")),
        work=Work(batch=8, block_length=32, context=128),
        constants=constants,
        weights_as="float32",
        rows_as="float32",
    )
    none, two = unsharded(served), sharded(served, 2)
    experts = 11 * 2 * 256 * 8 * 3 * 1024 * 256 / 2e11
    assert seconds_of(none, "experts") == pytest.approx(experts)
    assert seconds_of(two, "experts") == pytest.approx(experts)  # each half at half the rate
    copies = copies_per_token(Choice(num_experts=64, chosen=8, groups=8, chosen_groups=4), (0, 32, 64))
    every = 4 * 64 + 256 * copies * (2 * 4096 + 48)
    fullest = 2 * 64 + 256 * copies / 2 * (2 * 4096 + 48)
    frames = 11 * (0.5 * (2 * 2e-4 + 6e-10 * every) + 0.5 * (2e-4 + 6e-10 * fullest))
    assert two.seconds - none.seconds == pytest.approx(frames)
    assert predicted_ratio(served, 2) == pytest.approx(1 + frames / none.seconds)


def test_a_measured_forward_without_shards_says_what_layers_take_beside_products() -> None:
    before = setting(unsharded=H200.model_copy(update={"layer_seconds": 1e-6}))
    after = calibrated(before, 20e-3)
    assert unsharded(after).seconds == pytest.approx(20e-3)
    more = 20e-3 - unsharded(before).seconds
    assert sharded(after, 4).seconds == pytest.approx(sharded(before, 4).seconds + more)
    assert calibrated(before, 1e-9) == before


def test_the_output_layer_is_computed_where_positions_are_masked() -> None:
    served = setting(work=Work(batch=16, block_length=32, tpf=8))
    masked = [32, 24, 16, 8]
    assert served.work.masked_share == pytest.approx(sum(masked) / len(masked) / 32)
    assert Work(block_length=4, tpf=9).masked_share == 1.0
    every = setting(work=Work(batch=16, block_length=32, tpf=8, masked=1.0))
    ratio = seconds_of(unsharded(served), "output") / seconds_of(unsharded(every), "output")
    assert ratio == pytest.approx(20 / 32)  # so many rows are bound by arithmetic


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: sharded(setting(), 0), "shards: got 0, must be 1 to 64"),
        (lambda: sharded(setting(), 65), "shards: got 65, must be 1 to 64"),
        (lambda: sharded(setting(), 4, replication=5), "replication: got 5, must be 1 to 4"),
        (lambda: setting(work=Work(batch=1), micro_batches=2), "micro-batches: got 2 of a batch of 1"),
        (lambda: setting(transports={"shm": FREE}), "transport: got 'grpc', there are constants of shm"),
    ],
)
def test_what_cannot_be_planned_is_refused(make, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make()


# Where constants come from.

ASSUMED = assumed(device="h200-141g", memory_bytes_per_second=4.8e12, flops_per_second=9.89e14)


def sources(known) -> dict[str, str]:
    return {name: source for name, _, source in known.each(transport="grpc")}


def test_without_measurements_all_is_assumed() -> None:
    told = sources(ASSUMED)
    assert told and all(source.startswith("assumed") for source in told.values())
    assert "transports.shm.frame_seconds" not in told and "transports.grpc.frame_seconds" in told
    assert ASSUMED.constants.engine.memory_bytes_per_second == pytest.approx(0.8 * 4.8e12)


def test_a_file_goes_before_what_is_assumed_and_nothing_else_changes(tmp_path: Path) -> None:
    path = tmp_path / "constants.json"
    data = {
        "measured": "make bench-shards",
        "engine": {"flops_per_second": 1e11},
        "unsharded": {"flops_per_second": 2e11},
        "transports": {
            "grpc": {"frame_seconds": 3e-4},
            "tin": {"frame_seconds": 1, "frame_seconds_per_byte": 1},
        },
        "network": None,
        "imbalance": 1.2,
    }
    path.write_text(json.dumps(data))
    known = read_constants(path, ASSUMED)
    constants = known.constants
    assert constants.engine == ASSUMED.constants.engine.model_copy(update={"flops_per_second": 1e11})
    assert constants.unsharded == constants.engine.model_copy(update={"flops_per_second": 2e11})
    assert constants.shard == ASSUMED.constants.shard
    assert constants.transports["grpc"].frame_seconds == 3e-4
    assert constants.transports["grpc"].frame_seconds_per_byte == 0.6e-9
    assert constants.transports["tin"].engine_share == 0.5
    assert constants.network is None and constants.imbalance == 1.2
    told = sources(known)
    measured = {name for name, source in told.items() if source == "measured: make bench-shards"}
    assert measured == {
        "engine.flops_per_second",
        "unsharded.flops_per_second",
        "transports.grpc.frame_seconds",
        "network",
        "imbalance",
    }
    assert told["unsharded.layer_seconds"] == "as the engine's"
    assert told["shard.expert_flops_per_second"].startswith("assumed")


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    constants = ASSUMED.constants.model_copy(update={"measured": "here", "unsharded": H200, "imbalance": 1.1})
    path = tmp_path / "constants.json"
    path.write_text(constants.model_dump_json())
    assert read_constants(path, ASSUMED).constants == constants


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "got a JSON list, expected an object"),
        ("{}", "measured: missing; say what measured the constants"),
        ('{"measured": "x", "wire": 1}', "wire: extra inputs are not permitted"),
        ('{"measured": "x", "engine": {"flops": 1}}', "engine.flops: extra inputs are not permitted"),
        ('{"measured": "x", "engine": 3, "unsharded": {}}', "engine: input should be"),
        ('{"measured": "x", "engine": {"flops_per_second": 0}}', "engine.flops_per_second: input should be"),
        (
            '{"measured": "x", "engine": {"flops_per_second": NaN}}',
            "engine.flops_per_second: input should be",
        ),
        ('{"measured": "x", "imbalance": 0.5}', "imbalance: input should be"),
        ('{"measured": "x", "network": {"round_trip_seconds": -1}}', "network.round_trip_seconds: "),
        (
            '{"measured": "x", "transports": {"a": {"frame_seconds": 1}}}',
            "frame_seconds_per_byte: field required",
        ),
    ],
)
def test_a_file_that_holds_no_constants_is_refused_in_one_line(
    tmp_path: Path, content: str, says: str
) -> None:
    path = tmp_path / "constants.json"
    path.write_text(content)
    with pytest.raises(UsageError) as refused:
        read_constants(path, ASSUMED)
    assert str(refused.value).startswith(f"--constants: {path}: ") and says in str(refused.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_constants(tmp_path / "none.json", ASSUMED)


def test_the_network_can_be_told() -> None:
    faster = with_network(ASSUMED, transport="grpc", gigabits=400, round_trip_us=25).constants.network
    assert faster == Network(bytes_per_second=44e9, round_trip_seconds=25e-6)
    assert with_network(ASSUMED, transport="grpc", gigabits=0).constants.network is None
    assert with_network(ASSUMED, transport="shm").constants.network is None
    assert with_network(ASSUMED, transport="grpc") == ASSUMED
    with pytest.raises(UsageError, match="there is no network"):
        with_network(ASSUMED, transport="grpc", gigabits=0, round_trip_us=1)
    with pytest.raises(UsageError, match="shm is for one machine"):
        with_network(ASSUMED, transport="shm", gigabits=1)
