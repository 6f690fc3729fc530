"""What is asked of the server: defaults filled in, and everything wrong refused at once by name."""

from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from support.folders import served_folder
from support.training import write_lines
from unmask.client.options import Message, request_of
from unmask.diffusion.decoding import Credit, DecodingParams, Sampling, Vicinity
from unmask.fronts.generation import check_canvas
from unmask.fronts.refusals import Refused, Violation, invalid
from unmask.models.registry import read_config
from unmask.serving.model import ServedModel
from unmask.serving.requests import read_order
from unmask.training.encoding import encode
from unmask.training.records import Messages, read_records
from unmask.v1 import generation_pb2 as pb

CONTEXT = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    folder = served_folder(tmp_path_factory.mktemp("model") / "tiny")
    return ServedModel.describe(folder, read_config(folder), name=None, rows=4, context_length=CONTEXT)


def test_defaults_are_the_model_s(model: ServedModel) -> None:
    order = read_order(pb.GenerateRequest(text="w5 w6"), model)
    assert order.prompt == [5, 6]
    assert (order.params.block_length, order.params.threshold, order.params.steps) == (8, 0.9, 8)
    assert (order.params.eos_token_id, order.params.mask_token_id) == (510, 511)
    assert order.params.max_new_tokens == CONTEXT - 2
    assert order.request_id


def test_what_is_given_is_taken(model: ServedModel) -> None:
    request = pb.GenerateRequest(
        request_id="mine",
        model="tiny",
        token_ids=pb.TokenIds(ids=[7, 8, 9]),
        sampling=pb.SamplingParams(max_tokens=20, temperature=0, seed=3),
        diffusion=pb.DiffusionParams(decoder=pb.DECODER_THRESHOLD, threshold=1.0, steps_per_block=2),
        committed_token_ids=[1, 2],
    )
    order = read_order(request, model)
    assert (order.request_id, order.prompt, order.committed) == ("mine", [7, 8, 9], (1, 2))
    assert (order.params.max_new_tokens, order.params.threshold, order.params.steps) == (20, 1.0, 2)


def test_each_decoder_becomes_its_parameters(model: ServedModel) -> None:
    def params(**given: object) -> DecodingParams:
        return read_order(pb.GenerateRequest(text="w5", diffusion=pb.DiffusionParams(**given)), model).params

    fixed = params(decoder=pb.DECODER_FIXED_STEPS, steps_per_block=3)
    assert (fixed.steps, fixed.edit_threshold) == (3, None) and fixed.threshold > 1
    edits = params(decoder=pb.DECODER_JOINT_EDIT, edit_threshold=0.0)
    assert (edits.threshold, edits.edit_threshold, edits.max_post_edit_steps) == (0.9, 0.0, 16)
    assert edits.steps is None
    runs = params(decoder=pb.DECODER_HIERARCHICAL)
    assert (runs.threshold, runs.low_threshold, runs.steps) == (0.9, 0.62, None)
    low = params(decoder=pb.DECODER_HIERARCHICAL, threshold=0.5)
    assert low.low_threshold == 0.5, "the default is no more than the threshold"
    credit = params(decoder=pb.DECODER_CREDIT, credit_weight=0.0, steps_per_block=4)
    assert (credit.credit, credit.threshold, credit.steps) == (Credit(weight=0.0), 0.9, 4)
    entropy = params(decoder=pb.DECODER_ENTROPY_BOUNDED, entropy_bound=2.0)
    assert (entropy.entropy_bound, entropy.credit, entropy.low_threshold) == (2.0, None, None)
    assert params(decoder=pb.DECODER_ENTROPY_BOUNDED).entropy_bound == 0.1


@pytest.fixture(scope="module")
def canvas(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    folder = served_folder(
        tmp_path_factory.mktemp("model") / "tiny", golden="lladamoe_a", block_length=32, steps_per_block=4
    )
    return ServedModel.describe(folder, read_config(folder), name=None, rows=4, context_length=CONTEXT)


def test_a_block_of_a_canvas_is_at_most_what_is_generated(canvas: ServedModel) -> None:
    def params(max_tokens: int, **given: object) -> DecodingParams:
        request = pb.GenerateRequest(
            text="w5",
            sampling=pb.SamplingParams(max_tokens=max_tokens),
            diffusion=pb.DiffusionParams(**given),
        )
        return read_order(request, canvas).params

    assert [params(tokens).block_length for tokens in (40, 32, 20, 3)] == [32, 32, 20, 3]
    assert [params(tokens).steps for tokens in (40, 3)] == [4, 3]
    assert params(40, block_length=40, steps_per_block=40).block_length == 40
    assert params(40).vicinity is None
    assert params(40, vicinity=pb.Vicinity()).vicinity == Vicinity(16, 16)
    assert params(40, vicinity=pb.Vicinity(before=0)).vicinity == Vicinity(0, 16)
    with pytest.raises(Refused, match="block_length: got 0, must be 1 to 40, max_tokens"):
        params(40, block_length=0)
    with pytest.raises(Refused, match="steps_per_block: got 9, must be 1 to 8, the block length"):
        params(40, block_length=8, steps_per_block=9)
    with pytest.raises(Refused, match="edit_threshold: DECODER_LOW_CONFIDENCE has no such parameter; leave"):
        params(40, edit_threshold=0.5)


def test_a_conversation_is_written_out_by_the_template(model: ServedModel) -> None:
    chat = pb.Chat(
        messages=[pb.ChatMessage(role="system", content="w9"), pb.ChatMessage(role="user", content="w8")]
    )
    assert read_order(pb.GenerateRequest(chat=chat), model).prompt == [1, 9, 2, 8, 3]


def test_calls_of_tools_are_written_out_as_they_are_in_training(tmp_path: Path) -> None:
    folder = served_folder(tmp_path / "tiny")
    template = (
        "{% for t in tools or [] %}{{ t.name }} {% endfor %}"
        "{% for m in messages %}{{ m.role }} {{ m.content }} "
        "{% for c in m.tool_calls or [] %}{{ c.function.name }} {{ c.function.arguments.x }} {% endfor %}"
        "{{ m.tool_call_id }} {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    model = ServedModel.describe(folder, read_config(folder), name=None, rows=1, context_length=CONTEXT)
    call = {"id": "w30", "function": {"name": "w20", "arguments": '{"x": "w21"}'}}
    messages: list[Message] = [
        {"role": "user", "content": "w9"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "w22", "tool_call_id": "w30"},
    ]
    tools = [{"name": "w20"}]
    asked = read_order(request_of(None, messages=messages, tools=tools), model).prompt
    assert asked == [20, 2, 9, 3, 20, 21, 0, 22, 30, 3]

    answered = {"messages": [*messages, {"role": "assistant", "content": "w5"}], "tools": tools}
    write_lines(tmp_path / "chats.jsonl", [answered])
    (record,) = read_records(tmp_path / "chats.jsonl", "messages")
    assert isinstance(record, Messages)
    learnt = encode(record, model.tokenizer, eos_token_id=510)
    assert learnt.ids == [*asked, 5, 510] and learnt.prompt_length == len(asked)


@pytest.mark.parametrize(
    ("chat", "description"),
    [
        (
            pb.Chat(messages=[pb.ChatMessage(role="assistant", tool_calls=[pb.ToolCall(arguments="{}")])]),
            "messages[0].tool_calls[0].name: is empty; name the function",
        ),
        (
            pb.Chat(messages=[pb.ChatMessage(tool_calls=[pb.ToolCall(name="f", arguments="[1]")])]),
            "messages[0].tool_calls[0].arguments: must be a JSON object",
        ),
        (
            pb.Chat(messages=[pb.ChatMessage(tool_calls=[pb.ToolCall(name="f", arguments="[" * 99_999)])]),
            "messages[0].tool_calls[0].arguments: must be a JSON object",
        ),
        (
            pb.Chat(messages=[pb.ChatMessage(role="user")], tools=["{}", "{"]),
            "tools[1]: must be a JSON object",
        ),
    ],
)
def test_calls_and_tools_that_are_no_objects_are_named(
    model: ServedModel, chat: pb.Chat, description: str
) -> None:
    with pytest.raises(Refused) as refused:
        read_order(pb.GenerateRequest(chat=chat), model)
    assert description in str(refused.value)


def test_a_prompt_and_its_generation_may_fill_the_context(model: ServedModel) -> None:
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[5] * 60), sampling=pb.SamplingParams(max_tokens=4)
    )
    assert read_order(request, model).params.max_new_tokens == 4


def text() -> pb.GenerateRequest:
    return pb.GenerateRequest(text="w5")


WRONG: dict[str, tuple[Callable[[pb.GenerateRequest], object], str, str]] = {
    "no prompt": (lambda r: r.ClearField("text"), "prompt", "set one of text, token_ids, chat"),
    "empty text": (lambda r: r.MergeFrom(pb.GenerateRequest(text="")), "text", "holds no tokens"),
    "no token ids": (lambda r: r.token_ids.SetInParent(), "token_ids", "holds no tokens"),
    "token id out of vocabulary": (
        lambda r: r.token_ids.ids.extend([1, 512]),
        "token_ids.ids[1]",
        "got 512, ids run from 0 to 511",
    ),
    "no messages": (lambda r: r.chat.SetInParent(), "chat", "send at least one turn"),
    "prompt too long": (
        lambda r: r.token_ids.ids.extend([5] * 64),
        "prompt",
        "has 64 tokens; the context holds 64",
    ),
    "no tokens to generate": (
        lambda r: setattr(r.sampling, "max_tokens", 0),
        "sampling.max_tokens",
        "must be 1 to 63",
    ),
    "prompt and max_tokens too long": (
        lambda r: setattr(r.sampling, "max_tokens", 64),
        "sampling.max_tokens",
        "got 64, must be 1 to 63",
    ),
    "unknown decoder": (
        lambda r: setattr(r.diffusion, "decoder", 77),
        "diffusion.decoder",
        "got 77, allowed are DECODER_THRESHOLD",
    ),
    "threshold zero": (
        lambda r: setattr(r.diffusion, "threshold", 0),
        "diffusion.threshold",
        "must be above 0",
    ),
    "threshold above one": (
        lambda r: setattr(r.diffusion, "threshold", 1.01),
        "diffusion.threshold",
        "at most 1",
    ),
    "threshold not a number": (
        lambda r: setattr(r.diffusion, "threshold", float("nan")),
        "diffusion.threshold",
        "got nan",
    ),
    "no steps": (
        lambda r: setattr(r.diffusion, "steps_per_block", 0),
        "diffusion.steps_per_block",
        "must be 1 to 8",
    ),
    "too many steps": (
        lambda r: setattr(r.diffusion, "steps_per_block", 9),
        "diffusion.steps_per_block",
        "got 9",
    ),
    "foreign to the default decoder": (
        lambda r: setattr(r.diffusion, "edit_threshold", 0.5),
        "diffusion.edit_threshold",
        "DECODER_THRESHOLD has no such parameter; ask for DECODER_JOINT_EDIT or leave it out",
    ),
    "foreign to the decoder asked for": (
        lambda r: r.diffusion.MergeFrom(
            pb.DiffusionParams(decoder=pb.DECODER_FIXED_STEPS, threshold=0.5, steps_per_block=2)
        ),
        "diffusion.threshold",
        "DECODER_FIXED_STEPS has no such parameter; ask for DECODER_THRESHOLD, DECODER_JOINT_EDIT, "
        "DECODER_HIERARCHICAL, DECODER_CREDIT or leave it out",
    ),
    "foreign to all decoders of the model": (
        lambda r: r.diffusion.vicinity.SetInParent(),
        "diffusion.vicinity",
        "DECODER_THRESHOLD has no such parameter; leave it out",
    ),
    "a decoder for other models": (
        lambda r: r.diffusion.MergeFrom(
            pb.DiffusionParams(decoder=pb.DECODER_LOW_CONFIDENCE, block_length=4)
        ),
        "diffusion.decoder",
        "got DECODER_LOW_CONFIDENCE, allowed are DECODER_THRESHOLD, DECODER_FIXED_STEPS, DECODER_JOINT_EDIT, "
        "DECODER_HIERARCHICAL, DECODER_CREDIT, DECODER_ENTROPY_BOUNDED for LLaDA2MoeModelLM",
    ),
    "edit threshold above one": (
        lambda r: r.diffusion.MergeFrom(
            pb.DiffusionParams(decoder=pb.DECODER_JOINT_EDIT, edit_threshold=1.5)
        ),
        "diffusion.edit_threshold",
        "got 1.5, must be 0 to 1",
    ),
    "too many editing steps": (
        lambda r: r.diffusion.MergeFrom(
            pb.DiffusionParams(decoder=pb.DECODER_JOINT_EDIT, max_post_edit_steps=1025)
        ),
        "diffusion.max_post_edit_steps",
        "got 1025, must be at most 1024",
    ),
    "low threshold above the one in force": (
        lambda r: r.diffusion.MergeFrom(
            pb.DiffusionParams(decoder=pb.DECODER_HIERARCHICAL, low_threshold=0.95)
        ),
        "diffusion.low_threshold",
        "got 0.95, must be above 0 and at most 0.9, the threshold",
    ),
    "low threshold of nothing": (
        lambda r: r.diffusion.MergeFrom(
            pb.DiffusionParams(decoder=pb.DECODER_HIERARCHICAL, low_threshold=0.0)
        ),
        "diffusion.low_threshold",
        "got 0.0, must be above 0",
    ),
    "credit without a bound": (
        lambda r: r.diffusion.MergeFrom(
            pb.DiffusionParams(decoder=pb.DECODER_CREDIT, credit_weight=float("inf"))
        ),
        "diffusion.credit_weight",
        "got inf, must be 0 to 10",
    ),
    "credit that grows": (
        lambda r: r.diffusion.MergeFrom(pb.DiffusionParams(decoder=pb.DECODER_CREDIT, credit_decay=1.01)),
        "diffusion.credit_decay",
        "got 1.01, must be 0 to 1",
    ),
    "an exponent that is no number": (
        lambda r: r.diffusion.MergeFrom(
            pb.DiffusionParams(decoder=pb.DECODER_CREDIT, credit_exponent=float("nan"))
        ),
        "diffusion.credit_exponent",
        "got nan, must be 0 to 10",
    ),
    "entropy below nothing": (
        lambda r: r.diffusion.MergeFrom(
            pb.DiffusionParams(decoder=pb.DECODER_ENTROPY_BOUNDED, entropy_bound=-0.1)
        ),
        "diffusion.entropy_bound",
        "got -0.1, must be 0 to 1000",
    ),
    "a quota for a decoder without one": (
        lambda r: r.diffusion.MergeFrom(
            pb.DiffusionParams(decoder=pb.DECODER_ENTROPY_BOUNDED, steps_per_block=2)
        ),
        "diffusion.steps_per_block",
        "DECODER_ENTROPY_BOUNDED has no such parameter; ask for DECODER_THRESHOLD, DECODER_FIXED_STEPS, "
        "DECODER_CREDIT or leave it out",
    ),
    "committed id out of vocabulary": (
        lambda r: r.committed_token_ids.append(600),
        "committed_token_ids[0]",
        "got 600",
    ),
    "more committed than max_tokens": (
        lambda r: (setattr(r.sampling, "max_tokens", 1), r.committed_token_ids.extend([1, 2])),
        "committed_token_ids",
        "got 2 ids, more than 1 max_tokens",
    ),
    "empty name": (lambda r: setattr(r, "request_id", ""), "request_id", "1 to 128 bytes"),
    "long name": (lambda r: setattr(r, "request_id", "\N{EURO SIGN}" * 43), "request_id", "1 to 128 bytes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_field_is_refused_by_name(case: str, model: ServedModel) -> None:
    spoil, field, description = WRONG[case]
    request = text()
    spoil(request)
    with pytest.raises(Refused) as refused:
        read_order(request, model)
    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in refused.value.violations] == [field]
    assert description in refused.value.violations[0].description
    assert "\n" not in str(refused.value)


def test_all_wrong_fields_are_named_at_once_in_the_status_details(model: ServedModel) -> None:
    request = text()
    request.diffusion.threshold = 2
    request.diffusion.steps_per_block = 0
    request.sampling.max_tokens = 1000
    with pytest.raises(Refused) as refused:
        read_order(request, model)
    packed = dict(refused.value.status().trailing_metadata)["grpc-status-details-bin"]
    status, bad_request = status_pb2.Status.FromString(packed), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(bad_request)
    fields = {violation.field for violation in bad_request.field_violations}
    assert fields == {"diffusion.threshold", "diffusion.steps_per_block", "sampling.max_tokens"}


def test_sampling_is_read_and_a_seed_made_up_where_none_is_given(model: ServedModel) -> None:
    request = text()
    request.sampling.MergeFrom(
        pb.SamplingParams(temperature=0.7, top_p=0.9, top_k=5, repetition_penalty=1.2, seed=2**64 - 1)
    )
    expected = Sampling(temperature=0.7, top_p=0.9, top_k=5, repetition_penalty=1.2, seed=2**64 - 1)
    assert read_order(request, model).params.sampling == expected
    request.sampling.ClearField("seed")
    seeds = {read_order(request, model).params.sampling.seed for _ in range(4)}
    assert len(seeds) == 4
    assert read_order(text(), model).params.sampling.is_plain


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("temperature", -0.5, "0 to 100"),
        ("temperature", float("nan"), "0 to 100"),
        ("temperature", 1e9, "0 to 100"),
        ("top_p", 0, "above 0 and at most 1"),
        ("top_p", 1.5, "above 0 and at most 1"),
        ("top_k", 0, "at least 1"),
        ("repetition_penalty", 0, "above 0 and at most 100"),
    ],
)
def test_sampling_out_of_range_is_refused(model: ServedModel, field: str, value: float, allowed: str) -> None:
    request = text()
    setattr(request.sampling, field, value)
    with pytest.raises(Refused, match=f"sampling.{field}: got .*, must be {allowed}"):
        read_order(request, model)


def test_drawn_tokens_are_not_edited(model: ServedModel) -> None:
    request = text()
    request.sampling.temperature = 0.7
    request.diffusion.decoder = pb.DECODER_JOINT_EDIT
    with pytest.raises(Refused, match="leave it at 0 or take another decoder") as refused:
        read_order(request, model)
    assert refused.value.code is grpc.StatusCode.UNIMPLEMENTED


def test_stops_are_few_and_short(model: ServedModel) -> None:
    request = text()
    request.sampling.stop.extend(["END", "\n\n"])
    request.sampling.stop_token_ids.append(7)
    order = read_order(request, model)
    assert (order.stop, order.stop_token_ids) == (("END", "\n\n"), (7,))
    request.sampling.stop.extend(["", "x" * 257, *["y"] * 20])
    request.sampling.stop_token_ids.extend([10**6, *[1] * 80])
    with pytest.raises(Refused) as refused:
        read_order(request, model)
    assert {violation.field for violation in refused.value.violations} == {
        "sampling.stop",
        "sampling.stop[2]",
        "sampling.stop[3]",
        "sampling.stop_token_ids",
        "sampling.stop_token_ids[1]",
    }


def test_another_model_is_not_found(model: ServedModel) -> None:
    request = text()
    request.model = "large"
    with pytest.raises(Refused, match="served here is 'tiny'") as refused:
        read_order(request, model)
    assert refused.value.code is grpc.StatusCode.NOT_FOUND


def test_a_refusal_repeats_names_and_nothing_else(model: ServedModel) -> None:
    request = text()
    for name, told in (("org/large-1.0", "'org/large-1.0'"), ("my secret\n" * 9, "a text of 90 characters")):
        request.model = name
        with pytest.raises(Refused) as refused:
            read_order(request, model)
        assert str(refused.value) == f"model: got {told}, served here is 'tiny'"


def test_a_refusal_tells_of_so_many_fields_as_fit_a_status() -> None:
    refused = invalid([Violation(f"field{number}", "is wrong") for number in range(1000)])
    assert len(refused.violations) == 20
    assert str(refused).endswith("field19: is wrong; and 980 more")


def test_fields_with_much_to_say_leave_room_for_fewer() -> None:
    refused = invalid([Violation(f"sampling.stop[{n}]", "must have 1 to 256 bytes, " * 4) for n in range(30)])
    assert len(refused.violations) == 6
    assert str(refused).endswith("; and 24 more")
    metadata = dict(refused.status().trailing_metadata or ())
    assert len(str(refused)) + len(metadata["grpc-status-details-bin"]) < 3000
    assert len(invalid([Violation("stop", "x" * 5000)]).violations) == 1, "one is always told"


def test_chat_without_a_template_is_refused(tmp_path: Path) -> None:
    folder = served_folder(tmp_path / "tiny", chat=False)
    model = ServedModel.describe(folder, read_config(folder), name="m", rows=1, context_length=None)
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="w5")])
    with pytest.raises(Refused, match="no chat template"):
        read_order(pb.GenerateRequest(chat=chat), model)


def test_canvas_modes() -> None:
    assert not check_canvas(pb.StreamOptions())
    assert not check_canvas(pb.StreamOptions(canvas=pb.CANVAS_MODE_NONE))
    assert check_canvas(pb.StreamOptions(canvas=pb.CANVAS_MODE_DIFF))
    with pytest.raises(Refused, match=r"options\.canvas: got 9"):
        check_canvas(pb.StreamOptions(canvas=9))  # type: ignore[arg-type]
