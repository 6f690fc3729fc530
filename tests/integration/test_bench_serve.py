"""The load generator: when it sends, and what it says of what came back."""

import asyncio
import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.folders import served_folder
from support.serving import CountingBatch, GatedBatch, RunningServer, running_server, wait_until
from unmask.cli.main import main
from unmask.client import AsyncClient
from unmask.client.load import Ask, Limits, Sample, arrivals, measure, ratios, report
from unmask.models.registry import read_config
from unmask.serving.model import ServedModel


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    folder = served_folder(tmp_path_factory.mktemp("model") / "tiny", block_length=4)
    return ServedModel.describe(folder, read_config(folder), name=None, rows=2, context_length=128)


@pytest.fixture
def server(model: ServedModel) -> Iterator[RunningServer]:
    with running_server(CountingBatch(), model) as running:
        yield running


@pytest.fixture
def ran(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(["bench", "serve", *words])
        told = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, told.out + told.err

    return run


def test_arrivals_are_those_of_a_poisson_process_and_of_the_seed() -> None:
    times = arrivals(20_000, rate=4.0, seed=3)
    gaps = [after - before for before, after in zip([0.0, *times], times, strict=False)]
    assert min(gaps) >= 0
    assert statistics.fmean(gaps) == pytest.approx(1 / 4, rel=0.03)
    # Equal to the mean, as of nothing that is regular.
    assert statistics.stdev(gaps) == pytest.approx(1 / 4, rel=0.03)
    assert times == arrivals(20_000, rate=4.0, seed=3) != arrivals(20_000, rate=4.0, seed=4)


def test_requests_are_sent_when_they_are_due_whatever_has_been_answered(model: ServedModel) -> None:
    """The server answers nothing until all have come: who waits for answers would never send the third."""
    batch = GatedBatch(CountingBatch(rows=1))
    with running_server(batch, model) as server:

        async def load() -> list[Sample]:
            async with AsyncClient(server.address, timeout_s=60) as client:
                measuring = asyncio.create_task(
                    measure(client, [Ask("w5", {"max_tokens": 6})] * 5, rate=200.0)
                )
                await asyncio.to_thread(wait_until, lambda: sum(server.server.engine.load) == 5)
                batch.open()
                return await measuring

        samples = asyncio.run(load())
    assert [sample.error for sample in samples] == [None] * 5
    assert [len(sample.blocks) for sample in samples] == [2] * 5
    assert all(sample.tokens == 6 and sample.tpf == pytest.approx(1) for sample in samples)
    assert all(0 <= sample.sent <= sample.blocks[0] <= sample.ended for sample in samples)


def test_the_command_tells_of_every_request_and_its_last_line_is_json(
    server: RunningServer, tmp_path: Path, ran: Callable[..., tuple[int, str]]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"text": "w5", "max_tokens": 9}, {"token_ids": [5, 6], "max_tokens": 5}]
    prompts.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    limits = ("--first-block-within", "60", "--blocks-within", "60")
    code, output = ran(
        "--server", server.address, "--prompts", str(prompts), "--rate", "100", "--requests", "20", *limits
    )
    assert code == 0, output
    assert "20 of 20 requests answered" in output and "good answers    100.0%" in output
    told = json.loads(output.splitlines()[-1])
    loaded = told["loaded"]
    assert (loaded["requests"], loaded["answered"], loaded["errors"]) == (20, 20, {})
    assert loaded["good"]["share"] == 1
    assert loaded["tpf_decode"] == pytest.approx(1)
    assert told["alone"]["requests"] == 5
    expected = loaded["answer_seconds"]["p95"] / told["alone"]["answer_seconds"]["p50"]
    assert told["ratios"]["answer_p95"] == pytest.approx(expected)


def test_what_is_refused_is_counted_and_no_good_answer(
    model: ServedModel, tmp_path: Path, ran: Callable[..., tuple[int, str]]
) -> None:
    (tmp_path / "prompts.txt").write_text("w5\n")
    batch = CountingBatch(fails_at=8)
    with running_server(batch, model) as server:
        code, output = ran(
            "--server", server.address, "--prompts", str(tmp_path / "prompts.txt"), "--rate", "1000",
            "--requests", "10", "--max-tokens", "4", "--alone", "1", "--json",
            "--first-block-within", "60", "--blocks-within", "60",
        )  # fmt: skip
    assert code == 0, output
    loaded = json.loads(output)["loaded"]
    assert loaded["answered"] + sum(loaded["errors"].values()) == 10
    assert set(loaded["errors"]) <= {"INTERNAL", "UNAVAILABLE"} and loaded["errors"]
    assert loaded["good"]["share"] == loaded["answered"] / 10 < 1


@given(
    times=st.lists(st.lists(st.floats(0, 9), max_size=4), min_size=1, max_size=20),
    limits=st.builds(Limits, st.floats(0, 20), st.floats(0, 9)),
)
def test_a_report_agrees_with_counting_by_hand(times: list[list[float]], limits: Limits) -> None:
    samples = []
    for gaps in times:
        blocks = [sum(gaps[: n + 1]) for n in range(len(gaps))]
        samples.append(Sample(blocks=blocks, ended=blocks[-1] if blocks else 0.0, tokens=len(blocks)))
    samples.append(Sample(error="UNAVAILABLE"))
    told = report(samples, seconds=10.0, limits=limits)
    good = 0
    for sample in samples[:-1]:
        slow = [
            b - a
            for a, b in zip(sample.blocks, sample.blocks[1:], strict=False)
            if b - a > limits.between_blocks
        ]
        good += bool(sample.blocks) and sample.blocks[0] <= limits.first_block and not slow
    assert told["good"]["share"] == good / len(samples)
    assert told["errors"] == {"UNAVAILABLE": 1} and told["answered"] == len(times)
    firsts = sorted(sample.blocks[0] for sample in samples if sample.blocks)
    if firsts:
        found = told["first_block_seconds"]
        assert found["p50"] <= found["p95"] <= found["p99"] <= firsts[-1]
        assert sum(first <= found["p95"] for first in firsts) >= math.floor(0.95 * len(firsts))
    assert told["tokens_per_second"] == sum(sample.tokens for sample in samples[:-1]) / 10


def test_ratios_are_over_the_usual_wait_alone() -> None:
    alone = report([Sample(blocks=[1.0, 3.0], ended=4.0)], seconds=4.0)
    loaded = report([Sample(blocks=[2.0, 5.0], ended=6.0), Sample(blocks=[4.0], ended=8.0)], seconds=9.0)
    assert ratios(loaded, alone) == {
        "first_block_p50": 4.0, "first_block_p95": 4.0, "between_blocks_p50": 1.5, "between_blocks_p95": 1.5,
        "answer_p50": 2.0, "answer_p95": 2.0,
    }  # fmt: skip
    assert ratios(loaded, report([], seconds=0.0)) == {}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", "\n\n", "holds no prompt"),
        ("a.jsonl", "{", "line 1: not valid JSON"),
        ("a.jsonl", '{"text": "w5"}\n[1]', "line 2: got list"),
        ("a.jsonl", '{"text": "w5", "tmperature": 1}', "tmperature: is not known"),
        ("a.jsonl", '{"text": "w5", "token_ids": [1]}', "give one of"),
        ("a.jsonl", '{"text": "w5", "decoder": "magic"}', "allowed are threshold"),
    ],
)
def test_prompts_that_cannot_be_used_are_named(
    tmp_path: Path, ran: Callable[..., tuple[int, str]], name: str, content: str, says: str
) -> None:
    (tmp_path / name).write_text(content)
    code, output = ran("--prompts", str(tmp_path / name), "--rate", "1")
    assert code == 65 and says in output


def test_a_server_that_is_not_there_is_an_error_and_no_measurement(
    tmp_path: Path, ran: Callable[..., tuple[int, str]]
) -> None:
    (tmp_path / "a.txt").write_text("w5\n")
    code, output = ran("--prompts", str(tmp_path / "a.txt"), "--rate", "1", "--server", "127.0.0.1:9")
    assert code == 1 and "is `unmask serve` running there?" in output
