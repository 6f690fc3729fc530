"""The client's own decisions: requests, events, errors, continuations and the canvas."""

import subprocess
import sys

import grpc
import pytest

from unmask.client import (
    BlockCommitted,
    Cancelled,
    Canvas,
    CanvasUpdate,
    DeadlineExceeded,
    Decoding,
    Fill,
    InvalidRequest,
    Overloaded,
    RequestError,
    ServerFailed,
    Started,
    Unavailable,
    UnsupportedRequest,
)
from unmask.client.channels import addresses
from unmask.client.continuation import Continuation, OtherWeights
from unmask.client.errors import error_of
from unmask.client.events import event_of
from unmask.client.options import DECODERS, GenerateOptions, request_of
from unmask.client.usage import total
from unmask.diffusion.batch import ForwardCounts
from unmask.errors import UsageError
from unmask.fronts.refusals import Refused, Violation
from unmask.v1 import generation_pb2 as pb

# Requests


def test_only_what_is_given_is_set() -> None:
    assert request_of("w5") == pb.GenerateRequest(text="w5")


def test_every_option_reaches_its_field() -> None:
    request = request_of(
        None,
        token_ids=[1, 2],
        max_tokens=9,
        decoder="threshold",
        threshold=0.5,
        steps_per_block=3,
        edit_threshold=0.0,
        max_post_edit_steps=2,
        low_threshold=0.25,
        credit_weight=0.5,
        credit_decay=0.0,
        credit_exponent=1.0,
        entropy_bound=1.5,
        block_length=16,
        vicinity=(4, 0),
        trace=True,
        committed=[7],
        request_id="r",
        model="m",
        timeout_s=1,
    )
    assert request == pb.GenerateRequest(
        request_id="r",
        model="m",
        token_ids=pb.TokenIds(ids=[1, 2]),
        sampling=pb.SamplingParams(max_tokens=9),
        diffusion=pb.DiffusionParams(
            decoder=pb.DECODER_THRESHOLD,
            threshold=0.5,
            steps_per_block=3,
            edit_threshold=0.0,
            max_post_edit_steps=2,
            low_threshold=0.25,
            credit_weight=0.5,
            credit_decay=0.0,
            credit_exponent=1.0,
            entropy_bound=1.5,
            block_length=16,
            vicinity=pb.Vicinity(before=4, after=0),
        ),
        committed_token_ids=[7],
        trace=True,
    )


def test_a_conversation_is_a_prompt() -> None:
    request = request_of(None, messages=[{"role": "user", "content": "hi"}])
    assert request.chat.messages[0] == pb.ChatMessage(role="user", content="hi")


def test_calls_of_tools_travel_as_json() -> None:
    calls = [
        {"name": "f", "arguments": {"x": "\N{EURO SIGN}"}},
        {"id": "i", "function": {"name": "g", "arguments": "{}"}},
    ]
    request = request_of(
        None,
        messages=[
            {"role": "assistant", "tool_calls": calls},
            {"role": "tool", "content": "3", "tool_call_id": "i", "name": "g"},
        ],
        tools=[{"name": "f"}],
    )
    assert request.chat == pb.Chat(
        messages=[
            pb.ChatMessage(
                role="assistant",
                content="",
                tool_calls=[
                    pb.ToolCall(name="f", arguments='{"x": "\N{EURO SIGN}"}'),
                    pb.ToolCall(id="i", name="g", arguments="{}"),
                ],
            ),
            pb.ChatMessage(role="tool", content="3", tool_call_id="i", name="g"),
        ],
        tools=['{"name": "f"}'],
    )


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (None, {}, "got no prompt, give one of"),
        ("a", {"token_ids": [1]}, "got prompt and token_ids, give one of"),
        ("a", {"tools": [{}]}, "tools: only a conversation has them"),
        (
            None,
            {"messages": [{"role": "a", "tool_calls": [{"name": "f"}]}]},
            "cannot hold a value: 'arguments'",
        ),
        ("a", {"decoder": "magic"}, "decoder: got 'magic', allowed are threshold"),
        ("a", {"max_tokens": -1}, "the request cannot hold a value"),
        (None, {"token_ids": [-1]}, "the request cannot hold a value"),
        ("a\ud800", {}, "the request cannot hold a value"),
    ],
)
def test_options_that_cannot_be_are_refused_before_the_wire(
    prompt: str | None, options: GenerateOptions, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        request_of(prompt, **options)


def test_an_empty_list_of_token_ids_is_the_servers_to_refuse() -> None:
    assert request_of(None, token_ids=[]).WhichOneof("prompt") == "token_ids"


def test_addresses() -> None:
    assert addresses("a:1") == ("a:1",)
    assert addresses(["a:1", "b:2"]) == ("a:1", "b:2")
    with pytest.raises(UsageError, match="expected HOST:PORT"):
        addresses([])


# Errors


class Failure(grpc.RpcError, grpc.Call):  # type: ignore[misc]
    """A call that a server refused."""

    def __init__(self, refused: Refused) -> None:
        self._status = refused.status()

    def code(self) -> grpc.StatusCode:
        return self._status.code

    def details(self) -> str:
        return self._status.details

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return self._status.trailing_metadata

    def initial_metadata(self) -> tuple[()]:
        return ()

    def is_active(self) -> bool:
        return False

    def time_remaining(self) -> None:
        return None

    def cancel(self) -> bool:
        return False

    def add_callback(self, callback: object) -> bool:
        return False


KINDS = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: InvalidRequest,
    grpc.StatusCode.ALREADY_EXISTS: InvalidRequest,
    grpc.StatusCode.UNIMPLEMENTED: UnsupportedRequest,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Unavailable,
    grpc.StatusCode.INTERNAL: ServerFailed,
    grpc.StatusCode.UNKNOWN: ServerFailed,
    grpc.StatusCode.DATA_LOSS: ServerFailed,
}


@pytest.mark.parametrize("code", KINDS, ids=lambda code: code.name)
def test_a_status_code_has_its_error(code: grpc.StatusCode) -> None:
    error = error_of(Failure(Refused(code, "because")), "host:1")
    assert type(error) is KINDS[code]
    assert error.code == code.name
    assert str(error).startswith("host:1: because")
    assert error.retryable == isinstance(error, Unavailable | Overloaded)


@pytest.mark.parametrize("details", ["Locally cancelled by application!", "Channel closed!"])
def test_a_call_that_this_side_gave_up_is_not_to_be_tried_elsewhere(details: str) -> None:
    error = error_of(Failure(Refused(grpc.StatusCode.CANCELLED, details)), "host:1")
    assert isinstance(error, Cancelled) and not error.retryable


def test_details_of_a_status_reach_the_error() -> None:
    violations = [Violation("a.b", "must be c"), Violation("d", "is missing")]
    refused = Refused(grpc.StatusCode.INVALID_ARGUMENT, "no", violations=violations, retry_after_s=1.5)
    error = error_of(Failure(refused), "host:1")
    assert [(v.field, v.description) for v in error.violations] == [("a.b", "must be c"), ("d", "is missing")]
    assert error.retry_after_s == 1.5


def test_details_that_contradict_the_status_are_left_aside() -> None:
    failure = Failure(Refused(grpc.StatusCode.INVALID_ARGUMENT, "no", violations=[Violation("a", "b")]))
    failure.details = lambda: "rewritten on the way"  # type: ignore[method-assign]
    error = error_of(failure, "host:1")
    assert isinstance(error, InvalidRequest) and error.violations == ()
    assert "rewritten" in str(error)


@pytest.mark.parametrize(
    ("kind", "exit_code"), [(InvalidRequest, 64), (UnsupportedRequest, 64), (Unavailable, 1), (Overloaded, 1)]
)
def test_errors_end_a_command_as_the_table_says(kind: type[RequestError], exit_code: int) -> None:
    assert kind.exit_code == exit_code


# Streams


def started(max_tokens: int = 20) -> pb.GenerateStreamResponse:
    return pb.GenerateStreamResponse(
        started=pb.Started(
            prompt_tokens=3,
            block_length=8,
            sampling=pb.SamplingParams(max_tokens=max_tokens),
            diffusion=pb.DiffusionParams(
                decoder=pb.DECODER_LOW_CONFIDENCE,
                threshold=0.7,
                steps_per_block=4,
                block_length=8,
                vicinity=pb.Vicinity(before=2, after=3),
            ),
        )
    )


def committed(*token_ids: int, offset: int = 0) -> pb.GenerateStreamResponse:
    return pb.GenerateStreamResponse(
        block_committed=pb.BlockCommitted(offset=offset, token_ids=token_ids, text_delta=f"{len(token_ids)};")
    )


def test_what_is_left_is_asked_for_with_what_was_in_force() -> None:
    generation = Continuation(pb.GenerateRequest(text="w5"), canvas=True)
    assert generation.request().request == pb.GenerateRequest(text="w5")
    for message in (started(), committed(11, 12), committed(13, offset=2)):
        assert generation.take(message) is not None
    request = generation.request()
    assert list(request.request.committed_token_ids) == [11, 12, 13]
    assert request.request.sampling.max_tokens == 20
    assert request.request.diffusion == started().started.diffusion
    assert request.options.canvas == pb.CANVAS_MODE_DIFF
    assert generation.take(started()) is None


def test_a_continuation_leaves_the_callers_request_alone() -> None:
    request = pb.GenerateRequest(text="w5")
    generation = Continuation(request, canvas=False)
    generation.take(started())
    generation.take(committed(11))
    assert request == pb.GenerateRequest(text="w5")


def counted(kept: int, denoise: int, prefill: int = 0) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=3,
        completion_tokens=kept,
        forwards_prefill=prefill,
        forwards_denoise=denoise,
        forwards_persist=0,
        positions_evaluated=10 * (denoise + prefill),
        tpf=kept / (denoise + prefill),
        tpf_decode=kept / denoise,
        tpf_denoise=kept / denoise,
    )


def finished(usage: pb.Usage) -> pb.GenerateStreamResponse:
    return pb.GenerateStreamResponse(finished=pb.Finished(usage=usage))


def test_usage_is_that_of_all_servers_as_far_as_blocks_were_committed() -> None:
    generation = Continuation(pb.GenerateRequest(text="w5"), canvas=False)
    for number, message in enumerate((committed(1, 2), committed(3, 4, offset=2))):
        message.block_committed.usage.CopyFrom(counted(2 * number + 2, 3 * number + 3, prefill=1))
        if not number:
            generation.take(started())
        generation.take(message)
    generation.take(started())  # elsewhere: what the first one took since its last block is not known
    third = committed(5, 6, offset=4)
    third.block_committed.usage.CopyFrom(counted(2, 5, prefill=2))
    heard = generation.hear(third)
    assert heard is not None and heard.block_committed.usage == counted(6, 11, prefill=3)
    generation.take(started())  # a third one, which is lost before it commits anything
    generation.take(started())
    last = generation.hear(finished(counted(1, 4, prefill=3)))
    assert last is not None and last.finished.usage == counted(7, 15, prefill=6)


def test_usage_of_one_server_alone_is_passed_on_as_it_is() -> None:
    generation = Continuation(pb.GenerateRequest(text="w5"), canvas=False)
    generation.take(started())
    told = finished(pb.Usage(completion_tokens=3, tpf=0.123))
    heard = generation.hear(told)
    assert heard is not None and heard.finished.usage == pb.Usage(completion_tokens=3, tpf=0.123)


def test_what_several_calls_took_is_counted_as_the_forwards_of_one() -> None:
    parts = [counted(6, 11, prefill=3), counted(0, 2, prefill=1), counted(5, 9, prefill=2)]
    together = ForwardCounts(prefill=6, denoise=22, positions=280)
    assert total(parts) == pb.Usage(
        prompt_tokens=3,
        completion_tokens=11,
        forwards_prefill=6,
        forwards_denoise=22,
        forwards_persist=0,
        positions_evaluated=280,
        tpf=together.tpf(11),
        tpf_decode=together.tpf_decode(11),
        tpf_denoise=together.tpf_denoise(11),
    )


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_a_gap_between_blocks_is_not_passed_over(offset: int) -> None:
    generation = Continuation(pb.GenerateRequest(text="w5"), canvas=False)
    generation.take(started())
    generation.take(committed(11, 12))
    with pytest.raises(ServerFailed, match=f"begins at token {offset}, 2 came before"):
        generation.take(committed(13, offset=offset))


@pytest.mark.parametrize("later", ["b" * 64, None])
def test_an_answer_is_of_one_revision(later: str | None) -> None:
    generation = Continuation(pb.GenerateRequest(text="w5"), canvas=False)
    first, second = started(), started()
    first.started.revision = "a" * 64
    if later is not None:
        second.started.revision = later
    generation.take(first)
    generation.take(committed(11))
    with pytest.raises(OtherWeights, match="begun with the weights aaaa"):
        generation.take(second)
    assert generation.revision == "a" * 64 and generation.committed == 1
    assert generation.take(first) is None


def test_a_stream_that_ends_early_is_not_taken_for_a_whole() -> None:
    generation = Continuation(pb.GenerateRequest(text="w5"), canvas=False)
    generation.take(started())
    with pytest.raises(ServerFailed, match="ended before the generation was finished"):
        generation.check_finished("host:1")
    generation.take(pb.GenerateStreamResponse(finished=pb.Finished()))
    generation.check_finished("host:1")


def test_an_event_from_the_future_is_passed_over() -> None:
    assert event_of(pb.GenerateStreamResponse()) is None


# The canvas


def shown(canvas: Canvas) -> str:
    return canvas.text + "|" + "".join(cell.text or "_" for cell in canvas.cells)


def test_the_canvas_shows_what_is_final_provisional_and_masked() -> None:
    canvas = Canvas()
    events = [
        event_of(started(max_tokens=9)),
        CanvasUpdate(
            block_index=0,
            step=1,
            fills=(Fill(position=1, token_id=0, confidence=1, text="b"),),
            masks_left=4,
            edited=0,
            block_end=5,
        ),
        CanvasUpdate(
            block_index=0,
            step=2,
            fills=(Fill(position=4, token_id=0, confidence=1, text="e"),),
            masks_left=3,
            edited=0,
            block_end=5,
        ),
        BlockCommitted(block_index=0, offset=0, token_ids=(0,) * 5, text="abcde", forwards=3),
        CanvasUpdate(
            block_index=1,
            step=1,
            fills=(Fill(position=6, token_id=0, confidence=1, text="g"),),
            masks_left=7,
            edited=0,
            block_end=9,
        ),
    ]
    pictures = []
    for event in events:
        assert event is not None
        canvas.take(event)
        pictures.append(shown(canvas))
    assert pictures == ["|", "|_b___", "|_b__e", "abcde|", "abcde|_g__"]


def test_the_canvas_shows_the_latest_token_of_a_position() -> None:
    canvas = Canvas()
    for step, text in enumerate("ax", start=1):
        fill = Fill(position=0, token_id=0, confidence=1, text=text)
        canvas.take(
            CanvasUpdate(block_index=0, step=step, fills=(fill,), masks_left=1, edited=step - 1, block_end=2)
        )
    assert shown(canvas) == "|x_"


def test_the_client_needs_no_torch() -> None:
    program = "import sys, unmask.client; sys.exit('torch' in sys.modules or 'unmask.serving' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_started_is_typed() -> None:
    event = event_of(started())
    assert isinstance(event, Started)
    assert event.max_tokens == 20
    assert event.decoding == Decoding(
        decoder="low-confidence", threshold=0.7, steps_per_block=4, block_length=8, vicinity=(2, 3)
    )


def test_a_decoder_from_the_future_is_unknown() -> None:
    message = pb.GenerateStreamResponse(started=pb.Started(diffusion=pb.DiffusionParams(decoder=99)))  # type: ignore[arg-type]
    event = event_of(message)
    assert isinstance(event, Started)
    assert event.decoding == Decoding(decoder="unknown")


def test_every_decoder_of_the_wire_has_its_name() -> None:
    names = {name.removeprefix("DECODER_").lower().replace("_", "-"): n for name, n in pb.Decoder.items()}
    del names["unspecified"]
    assert names == DECODERS
