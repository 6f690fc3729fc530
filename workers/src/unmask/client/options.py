"""What a caller asks for, as a request of the wire."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, TypeAlias, TypedDict, Unpack, cast

from unmask.errors import UsageError
from unmask.v1 import generation_pb2 as pb

__all__ = ["DECODERS", "DecoderName", "GenerateOptions", "Message", "request_of"]

DecoderName: TypeAlias = Literal[
    "threshold",
    "fixed-steps",
    "joint-edit",
    "hierarchical",
    "credit",
    "entropy-bounded",
    "low-confidence",
]

DECODERS: dict[DecoderName, pb.Decoder] = {
    "threshold": pb.DECODER_THRESHOLD,
    "fixed-steps": pb.DECODER_FIXED_STEPS,
    "joint-edit": pb.DECODER_JOINT_EDIT,
    "hierarchical": pb.DECODER_HIERARCHICAL,
    "credit": pb.DECODER_CREDIT,
    "entropy-bounded": pb.DECODER_ENTROPY_BOUNDED,
    "low-confidence": pb.DECODER_LOW_CONFIDENCE,
}
"""Which of them a server has depends on its model; see :class:`~unmask.client.events.ModelInfo`."""


class Message(TypedDict):
    """One turn of a conversation.

    Attributes:
        role: Who speaks.
        content: What is said; what a tool returned. None in a turn that only calls tools.
        tool_calls: What an earlier turn of the assistant called:
            ``{"id": ..., "function": {"name": ..., "arguments": ...}}``, the arguments an object or its JSON.
        tool_call_id: In a turn of a tool, the call that it answers.
        name: In a turn of a tool, the function that was called.
    """

    role: str
    content: NotRequired[str | None]
    tool_calls: NotRequired[Sequence[Mapping[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


class GenerateOptions(TypedDict, total=False):
    """What ``generate`` and ``stream`` take beside the prompt; what is left out is up to the server.

    Attributes:
        messages: A conversation, instead of a prompt.
        tools: Functions that the model may call in the conversation, as JSON schemas.
        token_ids: Token ids, instead of a prompt.
        max_tokens: Most tokens to generate.
        decoder: Rule for filling masked positions. Each has parameters of its own among those that follow;
            others are refused.
        threshold: Probability above which a token is accepted, in (0, 1].
        steps_per_block: Most denoising forwards until nothing of a block is masked.
        edit_threshold: Probability above which a generated token is replaced by a better one, in [0, 1].
        max_post_edit_steps: Most forwards that only edit, per block.
        low_threshold: Probability above which the most probable token of a run of masked positions is
            accepted, up to the threshold.
        credit_weight: How much a token gains by having been the most probable one at earlier forwards.
        credit_decay: What is left of a credit after each forward, in [0, 1].
        credit_exponent: The power of its probability that the most probable token gets as credit.
        entropy_bound: Most nats that the entropies of positions accepted at once may add up to, the largest
            one not counted.
        block_length: Positions in one block, up to ``max_tokens``.
        vicinity: Positions (before, behind) a block that are recomputed with it, which is faster and
            approximate; left out, all are.
        temperature: What logits are divided by before a token is drawn; 0 takes the most probable one.
        seed: What draws depend on, beside the position.
        top_p: Draw from the fewest most probable tokens that together have this probability, in (0, 1].
        top_k: Draw from so many most probable tokens.
        repetition_penalty: Above 1, what has been said becomes less probable.
        stop: Texts that end the generation; the answer ends before the first one found.
        stop_token_ids: Tokens that end the generation.
        logprobs: Whether to say with which probability each token was accepted.
        trace: Whether to tell at the end what each forward did.
        committed: Token ids of blocks that a former call committed for this prompt; the answer goes on
            after them.
        cache_salt: Share stored blocks with calls of the same salt only.
        priority: Among waiting calls, those of a higher number are taken up first; from -100 to 100.
        request_id: A name for this call; it must not be the name of a call that is running.
        model: The model to use.
        timeout_s: Time for the call, instead of the client's.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]]
    token_ids: Sequence[int]
    max_tokens: int
    decoder: DecoderName
    threshold: float
    steps_per_block: int
    edit_threshold: float
    max_post_edit_steps: int
    low_threshold: float
    credit_weight: float
    credit_decay: float
    credit_exponent: float
    entropy_bound: float
    block_length: int
    vicinity: tuple[int, int]
    temperature: float
    seed: int
    top_p: float
    top_k: int
    repetition_penalty: float
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    logprobs: bool
    trace: bool
    committed: Sequence[int]
    cache_salt: str
    priority: int
    request_id: str
    model: str
    timeout_s: float


def request_of(prompt: str | None, **options: Unpack[GenerateOptions]) -> pb.GenerateRequest:
    """The request for these options.

    Raises:
        UsageError: Not exactly one prompt, an unknown decoder, or a number that the field cannot hold.
    """
    request = pb.GenerateRequest()
    try:
        _set_prompt(request, prompt, options)
        _set_params(request, options)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"the request cannot hold a value: {error}") from error
    return request


def _set_prompt(request: pb.GenerateRequest, prompt: str | None, options: GenerateOptions) -> None:
    given = ["prompt"] if prompt is not None else []
    given += [name for name in ("messages", "token_ids") if name in options]
    if len(given) != 1:
        raise UsageError(f"got {' and '.join(given) or 'no prompt'}, give one of prompt, messages, token_ids")
    if "tools" in options and "messages" not in options:
        raise UsageError("tools: only a conversation has them; give messages")
    if prompt is not None:
        request.text = prompt
    elif "token_ids" in options:
        request.token_ids.ids.extend(options["token_ids"])
        request.token_ids.SetInParent()
    else:
        turns = [_turn(message) for message in options["messages"]]
        tools = [json.dumps(tool, ensure_ascii=False) for tool in options.get("tools", ())]
        request.chat.CopyFrom(pb.Chat(messages=turns, tools=tools))


def _turn(message: Message) -> pb.ChatMessage:
    made = pb.ChatMessage(role=message["role"], content=message.get("content") or "")
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        arguments = function["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        made.tool_calls.add(id=call.get("id"), name=function["name"], arguments=text)
    if message.get("tool_call_id"):
        made.tool_call_id = message["tool_call_id"]
    if message.get("name"):
        made.name = message["name"]
    return made


def _set_params(request: pb.GenerateRequest, options: GenerateOptions) -> None:
    _set_sampling(request.sampling, options)
    _set_diffusion(request.diffusion, options)
    given = cast("Mapping[str, Any]", options)
    for name in ("request_id", "model", "cache_salt", "priority", "trace"):
        if name in given:
            setattr(request, name, given[name])
    request.committed_token_ids.extend(options.get("committed", ()))


_SAMPLING = (
    "max_tokens",
    "temperature",
    "seed",
    "top_p",
    "top_k",
    "repetition_penalty",
    "logprobs",
)
_DIFFUSION = (
    "threshold",
    "steps_per_block",
    "edit_threshold",
    "max_post_edit_steps",
    "low_threshold",
    "credit_weight",
    "credit_decay",
    "credit_exponent",
    "entropy_bound",
    "block_length",
)


def _set_sampling(sampling: pb.SamplingParams, options: GenerateOptions) -> None:
    given = cast("Mapping[str, Any]", options)
    for name in _SAMPLING:
        if name in given:
            setattr(sampling, name, given[name])
    for name in ("stop", "stop_token_ids"):
        if name in given:
            getattr(sampling, name).extend(given[name])


def _set_diffusion(diffusion: pb.DiffusionParams, options: GenerateOptions) -> None:
    given = cast("Mapping[str, Any]", options)
    if "decoder" in options:
        diffusion.decoder = _decoder(options["decoder"])
    for name in _DIFFUSION:
        if name in given:
            setattr(diffusion, name, given[name])
    if "vicinity" in options:
        diffusion.vicinity.before, diffusion.vicinity.after = options["vicinity"]


def _decoder(name: DecoderName) -> pb.Decoder:
    if name not in DECODERS:
        raise UsageError(f"decoder: got {name!r}, allowed are {', '.join(DECODERS)}")
    return DECODERS[name]
