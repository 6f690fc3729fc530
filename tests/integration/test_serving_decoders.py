"""Each decoder behind a real port: decoded as without one, streamed, counted, left and gone on from."""

import math
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.folders import served_folder
from support.serving import GatedBatch, RunningServer, running_server, wait_until
from unmask.client import (
    BlockCommitted,
    CanvasUpdate,
    Client,
    Decoding,
    Fill,
    Finished,
    InvalidRequest,
    Started,
)
from unmask.diffusion.batch import Generation
from unmask.diffusion.decoding import Credit, DecodingParams, Vicinity
from unmask.diffusion.full_sequence import generate_full_sequence
from unmask.diffusion.generation import generate
from unmask.models.base import LanguageModel
from unmask.models.loading import load
from unmask.models.registry import read_config
from unmask.serving.model import ServedModel
from unmask.telemetry import metrics

PROMPTS = [[5], [7, 8, 9], [20 + number for number in range(16)], [100, 511, 101, 511, 511, 102, 9, 8, 7]]
"""Shorter than a block, whole blocks, and one with the mask token's id in it."""

JOINT_EDIT = {"decoder": "joint-edit", "threshold": 0.02, "edit_threshold": 0.01, "max_post_edit_steps": 4}
HIERARCHICAL = {"decoder": "hierarchical", "threshold": 0.02, "low_threshold": 0.005}
CREDIT = {"decoder": "credit", "threshold": 0.05, "credit_weight": 3.0, "credit_decay": 0.5}
ENTROPY = {"decoder": "entropy-bounded", "entropy_bound": 12.0}
FIXED_STEPS = {"decoder": "fixed-steps", "steps_per_block": 3}
SEMI = {"decoder": "low-confidence", "block_length": 6, "steps_per_block": 2}
WHOLE = {"decoder": "low-confidence", "block_length": 30, "steps_per_block": 7}
SURE = {"decoder": "low-confidence", "block_length": 8, "threshold": 0.02}
NEAR = {"decoder": "low-confidence", "block_length": 6, "steps_per_block": 3, "vicinity": (2, 3)}
EOS, MASK = 510, 511


@dataclass(frozen=True)
class Served:
    """A model behind a port, and beside it for comparison."""

    network: LanguageModel
    model: ServedModel
    server: RunningServer

    def client(self) -> Client:
        return Client(self.server.address, timeout_s=30)


def described(folder: Path, *, rows: int = 4) -> ServedModel:
    return ServedModel.describe(folder, read_config(folder), name="tiny", rows=rows, context_length=128)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("models")
    return {
        "blocks": served_folder(parent / "blocks", threshold=0.05),
        "canvas": served_folder(parent / "canvas", golden="lladamoe_a", threshold=1.0),
    }


@pytest.fixture(scope="module")
def networks(folders: dict[str, Path]) -> dict[str, LanguageModel]:
    return {kind: load(folder) for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def served(folders: dict[str, Path], networks: dict[str, LanguageModel]) -> Iterator[dict[str, Served]]:
    models = {kind: described(folder) for kind, folder in folders.items()}
    with (
        running_server(models["blocks"].batch(networks["blocks"]), models["blocks"]) as blocks,
        running_server(models["canvas"].batch(networks["canvas"]), models["canvas"]) as canvas,
    ):
        servers = {"blocks": blocks, "canvas": canvas}
        yield {kind: Served(networks[kind], models[kind], servers[kind]) for kind in models}


def kind_of(options: dict[str, Any]) -> str:
    return "canvas" if options["decoder"] == "low-confidence" else "blocks"


def offline(
    network: LanguageModel, prompt: list[int], options: dict[str, Any], max_tokens: int
) -> Generation:
    """The same request without a server."""
    wish = dict(options)
    ids = {"eos_token_id": EOS, "mask_token_id": MASK, "max_new_tokens": max_tokens}
    wish["steps"] = wish.pop("steps_per_block", None)
    if wish.pop("decoder") == "low-confidence":
        vicinity = wish.pop("vicinity", None)
        params = DecodingParams(
            **ids, **{"threshold": 1.0, **wish}, vicinity=Vicinity(*vicinity) if vicinity else None
        )
        return generate_full_sequence(network, prompt, params)
    given = {name: wish.pop(f"credit_{name}") for name in ("weight", "decay") if f"credit_{name}" in wish}
    credit = Credit(**given) if given else None
    params = DecodingParams(**ids, **{"block_length": 8, "threshold": 2.0, "credit": credit, **wish})
    return generate(network, [prompt], params, rows=1)[0]


ALL = pytest.mark.parametrize(
    "options",
    [FIXED_STEPS, JOINT_EDIT, HIERARCHICAL, CREDIT, ENTROPY, SEMI, WHOLE, SURE, NEAR],
    ids=[
        "fixed steps",
        "joint edit",
        "hierarchical",
        "credit",
        "entropy",
        "blocks of a canvas",
        "one block",
        "threshold",
        "vicinity",
    ],
)


@ALL
def test_what_is_served_is_what_is_decoded_without_a_server(
    served: dict[str, Served], options: dict[str, Any]
) -> None:
    one = served[kind_of(options)]
    with one.client() as client, ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = list(
            pool.map(lambda prompt: client.generate(token_ids=prompt, max_tokens=30, **options), PROMPTS)
        )
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        expected = offline(one.network, prompt, options, 30)
        assert list(answer.token_ids) == expected.token_ids
        usage = answer.usage
        assert usage.forwards_denoise == expected.usage.denoise
        assert usage.forwards_persist == 0, "blocks are stored beside the next one's first step"
        # Whole blocks of a prompt that an earlier request had begun with are not read again.
        shared = expected.usage.positions - usage.positions_evaluated
        assert 0 <= shared <= len(prompt) // 8 * 8 * expected.usage.prefill
        assert usage.forwards_prefill <= expected.usage.prefill


@ALL
def test_updates_add_up_to_what_is_committed(served: dict[str, Served], options: dict[str, Any]) -> None:
    one, held, end, edited = served[kind_of(options)], {}, 0, 0
    before = one.server.server.recorder.value(metrics.TOKENS_EDITED)
    with one.client() as client:
        for event in client.stream(token_ids=PROMPTS[1], canvas=True, max_tokens=30, **options):
            if isinstance(event, CanvasUpdate):
                held |= {fill.position: fill.token_id for fill in event.fills}
                assert max(held) < event.block_end + 8
                end, edited = event.block_end, edited + event.edited
            if isinstance(event, BlockCommitted):
                assert end == event.offset + len(event.token_ids)
                assert [held[event.offset + n] for n in range(len(event.token_ids))] == [*event.token_ids]
    assert end == 30
    assert one.server.server.recorder.value(metrics.TOKENS_EDITED) - before == edited
    assert (edited > 0) == (options is JOINT_EDIT)


@ALL
def test_going_on_from_any_committed_block_gives_the_undisturbed_answer(
    served: dict[str, Served], options: dict[str, Any]
) -> None:
    asked = {"token_ids": PROMPTS[3], "max_tokens": 30, **options}
    with served[kind_of(options)].client() as client:
        blocks = [event for event in client.stream(**asked) if isinstance(event, BlockCommitted)]
        assert sum(len(block.token_ids) for block in blocks) == 30
        for kept in range(1, len(blocks) + 1):
            committed = [token for block in blocks[:kept] for token in block.token_ids]
            again = [
                event
                for event in client.stream(**asked, committed=committed)
                if isinstance(event, BlockCommitted)
            ]
            assert [(b.block_index, b.offset, b.token_ids) for b in again] == [
                (b.block_index, b.offset, b.token_ids) for b in blocks[kept:]
            ]


@ALL
def test_a_trace_replayed_is_the_answer(served: dict[str, Served], options: dict[str, Any]) -> None:
    asked = {"token_ids": PROMPTS[2], "max_tokens": 30, "logprobs": True, **options}
    with served[kind_of(options)].client() as client:
        plain, answer = client.generate(**asked), client.generate(**asked, trace=True)
        *_, finished = client.stream(**asked, trace=True)
    trace, usage = answer.trace, answer.usage
    assert plain.trace is None and trace is not None
    held: dict[int, Fill] = {}
    told: list[Fill] = []
    for forward in trace.forwards:
        assert not held.keys() & {fill.position for fill in forward.filled}
        assert all(held[fill.position].token_id != fill.token_id for fill in forward.edited)
        held |= {fill.position: fill for fill in forward.filled + forward.edited}
        told += [held[len(told) + place] for place in range(forward.committed_tokens or 0)]
    assert tuple(fill.token_id for fill in told) == answer.token_ids == plain.token_ids
    assert [math.log(fill.confidence) for fill in told] == pytest.approx(answer.logprobs, abs=1e-5)
    assert all(fill.text == f"w{fill.token_id}" for fill in told if fill.token_id not in (1, 2, 3, EOS))
    assert any(forward.edited for forward in trace.forwards) == (options is JOINT_EDIT)

    read = sum(forward.prefilled_tokens for forward in trace.forwards)
    assert read + trace.reused_tokens == (16 if kind_of(options) == "blocks" else 0)
    kinds = Counter(
        "denoise" if forward.block_index is not None else "persist" if forward.persisted else "prefill"
        for forward in trace.forwards
    )
    assert kinds["prefill"] == usage.forwards_prefill == sum(f.prefilled_tokens > 0 for f in trace.forwards)
    assert (kinds["denoise"], kinds["persist"]) == (usage.forwards_denoise, usage.forwards_persist)
    ends = [forward.end_seconds for forward in trace.forwards]
    assert ends == sorted(ends) and ends[0] >= trace.started.queue_seconds >= 0
    assert all(0 < forward.seconds <= forward.end_seconds for forward in trace.forwards)
    assert {forward.rows for forward in trace.forwards} == {1}
    assert (trace.forwards_left_out, trace.started.decoding.decoder) == (0, options["decoder"])
    assert isinstance(finished, Finished) and finished.trace is not None
    assert [(f.step, f.filled, f.edited) for f in finished.trace.forwards if f.step is not None] == [
        (f.step, f.filled, f.edited) for f in trace.forwards if f.step is not None
    ]


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_fixed_steps_takes_exactly_so_many_forwards_for_each_block(
    served: dict[str, Served], steps: int
) -> None:
    asked = {"token_ids": PROMPTS[2], "max_tokens": 24, "decoder": "fixed-steps", "steps_per_block": steps}
    with served["blocks"].client() as client:
        events = list(client.stream(**asked))
    assert [event.forwards for event in events if isinstance(event, BlockCommitted)] == [steps] * 3
    finished = events[-1]
    assert isinstance(finished, Finished) and finished.usage.forwards_denoise == 3 * steps


IN_FORCE = [
    ({}, "blocks", Decoding(decoder="threshold", threshold=0.05, steps_per_block=8)),
    ({"decoder": "fixed-steps"}, "blocks", Decoding(decoder="fixed-steps", steps_per_block=8)),
    (
        {"decoder": "joint-edit", "edit_threshold": 0},
        "blocks",
        Decoding(decoder="joint-edit", threshold=0.05, edit_threshold=0, max_post_edit_steps=16),
    ),
    (
        {"decoder": "hierarchical"},
        "blocks",
        Decoding(decoder="hierarchical", threshold=0.05, low_threshold=0.05),
    ),
    (
        {"decoder": "credit", "credit_weight": 0},
        "blocks",
        Decoding(
            decoder="credit",
            threshold=0.05,
            steps_per_block=8,
            credit_weight=0,
            credit_decay=0.8,
            credit_exponent=0.2,
        ),
    ),
    ({"decoder": "entropy-bounded"}, "blocks", Decoding(decoder="entropy-bounded", entropy_bound=0.1)),
    (
        {},
        "canvas",
        Decoding(decoder="low-confidence", threshold=1.0, steps_per_block=8, block_length=8),
    ),
    (
        {"max_tokens": 5, "vicinity": (1, 0)},
        "canvas",
        Decoding(decoder="low-confidence", threshold=1.0, steps_per_block=5, block_length=5, vicinity=(1, 0)),
    ),
]


@pytest.mark.parametrize(("options", "kind", "expected"), IN_FORCE)
def test_a_stream_begins_with_what_is_in_force(
    served: dict[str, Served], options: dict[str, Any], kind: str, expected: Decoding
) -> None:
    with served[kind].client() as client:
        started = next(iter(client.stream("w5", **{"max_tokens": 16, **options})))
    assert isinstance(started, Started)
    assert started.decoding == expected
    assert started.block_length == expected.block_length or 8


def test_a_model_says_which_decoders_it_has(served: dict[str, Served]) -> None:
    with served["canvas"].client() as client:
        info = client.model_info()
    assert (info.architecture, info.decoders) == ("LLaDAMoEModelLM", ("low-confidence",))
    assert info.default_decoding == IN_FORCE[-2][2]


def test_the_model_s_defaults_name_the_decoder(tmp_path: Path, networks: dict[str, LanguageModel]) -> None:
    folder = served_folder(tmp_path / "edits", threshold=0.02, decoder="joint-edit", edit_threshold=0.01)
    model = described(folder)
    with running_server(model.batch(networks["blocks"]), model) as server, Client(server.address) as client:
        assert client.model_info().default_decoding == Decoding(
            decoder="joint-edit", threshold=0.02, edit_threshold=0.01, max_post_edit_steps=16
        )
        answer = client.generate(token_ids=PROMPTS[1], max_tokens=20, max_post_edit_steps=4)
    assert list(answer.token_ids) == offline(networks["blocks"], PROMPTS[1], JOINT_EDIT, 20).token_ids


@pytest.mark.parametrize(
    ("kind", "options", "field", "description"),
    [
        (
            "blocks",
            SEMI,
            "decoder",
            "got DECODER_LOW_CONFIDENCE, allowed are DECODER_THRESHOLD, DECODER_FIXED",
        ),
        ("canvas", CREDIT, "decoder", "got DECODER_CREDIT, allowed are DECODER_LOW_CONFIDENCE for LLaDAMoE"),
        (
            "blocks",
            {"entropy_bound": 1.0},
            "entropy_bound",
            "ask for DECODER_ENTROPY_BOUNDED or leave it out",
        ),
        ("canvas", FIXED_STEPS, "decoder", "allowed are DECODER_LOW_CONFIDENCE for LLaDAMoEModelLM"),
        ("blocks", {"edit_threshold": 0.5}, "edit_threshold", "ask for DECODER_JOINT_EDIT or leave it out"),
        ("canvas", {"block_length": 17}, "block_length", "got 17, must be 1 to 16, max_tokens"),
    ],
)
def test_what_a_model_cannot_do_is_refused_with_what_it_can(
    served: dict[str, Served], kind: str, options: dict[str, Any], field: str, description: str
) -> None:
    with served[kind].client() as client, pytest.raises(InvalidRequest) as refused:
        client.generate("w5", max_tokens=16, **options)
    (violation,) = refused.value.violations
    assert violation.field == f"diffusion.{field}"
    assert description in violation.description


@pytest.mark.parametrize("options", [JOINT_EDIT, SEMI, WHOLE], ids=["joint edit", "semi", "whole"])
def test_a_client_that_goes_away_frees_its_row_within_one_forward(
    folders: dict[str, Path], networks: dict[str, LanguageModel], options: dict[str, Any]
) -> None:
    kind = kind_of(options)
    model = described(folders[kind], rows=1)
    gate = GatedBatch(model.batch(networks[kind]))
    with running_server(gate, model) as server:
        try:
            with Client(server.address, timeout_s=30) as client:
                stream = client.stream("w5 w6", canvas=True, max_tokens=100, **options)
                gate.let(2)
                next(event for event in stream if isinstance(event, CanvasUpdate))
                wait_until(lambda: gate.begun == 3)
                stream.close()  # type: ignore[attr-defined]
            wait_until(lambda: server.server.recorder.value(metrics.CANCELLED, by="client") == 1)
            gate.let(10)
            wait_until(lambda: gate.active == 0)
            assert gate.done == 3
        finally:
            gate.open()


@pytest.mark.parametrize(
    "options", [FIXED_STEPS, JOINT_EDIT, CREDIT, NEAR], ids=["fixed", "joint edit", "credit", "vicinity"]
)
def test_a_stream_goes_on_at_a_server_with_other_defaults(
    folders: dict[str, Path],
    networks: dict[str, LanguageModel],
    served: dict[str, Served],
    tmp_path: Path,
    options: dict[str, Any],
) -> None:
    """The first server's defaults are the options; only it is told nothing."""
    kind = kind_of(options)
    wish = {name: value for name, value in options.items() if name != "vicinity"}
    golden = {"blocks": "llada2_a", "canvas": "lladamoe_a"}[kind]
    model = described(served_folder(tmp_path / "first", golden=golden, **{"threshold": 1.0, **wish}), rows=1)
    gate = GatedBatch(model.batch(networks[kind]))
    other = {"vicinity": options["vicinity"]} if "vicinity" in options else {}
    recorder = served[kind].server.server.recorder
    events, before = [], recorder.value(metrics.QUEUE_SECONDS)
    with (
        running_server(gate, model) as first,
        Client([first.address, served[kind].server.address], timeout_s=30) as client,
    ):
        stopping = threading.Thread(target=first.stop, args=(0,))
        gate.let(30)
        for event in client.stream(token_ids=PROMPTS[3], max_tokens=80, **other):
            events.append(event)
            if isinstance(event, BlockCommitted) and not stopping.ident:
                stopping.start()
        gate.open()
        stopping.join(30)
    tokens = [token for event in events if isinstance(event, BlockCommitted) for token in event.token_ids]
    assert tokens == offline(networks[kind], PROMPTS[3], options, 80).token_ids
    finished = events[-1]
    assert recorder.value(metrics.QUEUE_SECONDS) == before + 1
    eos = model.defaults.eos_token_id
    assert isinstance(finished, Finished)
    assert finished.usage.completion_tokens == (tokens.index(eos) if eos in tokens else len(tokens))


def test_forwards_on_a_canvas_are_all_denoise(
    folders: dict[str, Path], networks: dict[str, LanguageModel]
) -> None:
    model = described(folders["canvas"])
    with running_server(model.batch(networks["canvas"]), model) as server, Client(server.address) as client:
        usage = client.generate("w5 w6", max_tokens=20).usage
        value = server.server.recorder.value
        assert value(metrics.FORWARDS, kind="denoise") == usage.forwards_denoise == 20
        assert sum(value(metrics.FORWARDS, kind=kind) for kind in ("prefill", "persist", "mixed")) == 0
        assert usage.tpf == usage.tpf_decode == usage.tpf_denoise == 1
