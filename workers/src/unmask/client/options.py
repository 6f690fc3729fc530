"""What a caller asks for, as a request of the wire."""

from collections.abc import Sequence
from typing import TypedDict, Unpack

from unmask.errors import UsageError
from unmask.v1 import generation_pb2 as pb

__all__ = ["GenerateOptions", "Message", "request_of"]

_DECODERS = {"threshold": pb.DECODER_THRESHOLD}


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


class GenerateOptions(TypedDict, total=False):
    """What ``generate`` and ``stream`` take beside the prompt; what is left out is up to the server.

    Attributes:
        messages: A conversation, instead of a prompt.
        token_ids: Token ids, instead of a prompt.
        max_tokens: Most tokens to generate.
        decoder: Rule for filling masked positions: "threshold".
        threshold: Probability above which a token is accepted, in (0, 1].
        steps_per_block: Most denoising forwards to spend on one block.
        committed: Token ids of blocks that a former call committed for this prompt; the answer goes on
            after them.
        request_id: A name for this call; it must not be the name of a call that is running.
        model: The model to use.
        timeout_s: Time for the call, instead of the client's.
    """

    messages: Sequence[Message]
    token_ids: Sequence[int]
    max_tokens: int
    decoder: str
    threshold: float
    steps_per_block: int
    committed: Sequence[int]
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
    except (ValueError, TypeError) as error:
        raise UsageError(f"the request cannot hold a value: {error}") from error
    return request


def _set_prompt(request: pb.GenerateRequest, prompt: str | None, options: GenerateOptions) -> None:
    given = ["prompt"] if prompt is not None else []
    given += [name for name in ("messages", "token_ids") if name in options]
    if len(given) != 1:
        raise UsageError(f"got {' and '.join(given) or 'no prompt'}, give one of prompt, messages, token_ids")
    if prompt is not None:
        request.text = prompt
    elif "token_ids" in options:
        request.token_ids.ids.extend(options["token_ids"])
        request.token_ids.SetInParent()
    else:
        turns = [pb.ChatMessage(role=turn["role"], content=turn["content"]) for turn in options["messages"]]
        request.chat.CopyFrom(pb.Chat(messages=turns))


def _set_params(request: pb.GenerateRequest, options: GenerateOptions) -> None:
    if "max_tokens" in options:
        request.sampling.max_tokens = options["max_tokens"]
    if "decoder" in options:
        request.diffusion.decoder = _decoder(options["decoder"])
    if "threshold" in options:
        request.diffusion.threshold = options["threshold"]
    if "steps_per_block" in options:
        request.diffusion.steps_per_block = options["steps_per_block"]
    if "request_id" in options:
        request.request_id = options["request_id"]
    if "model" in options:
        request.model = options["model"]
    request.committed_token_ids.extend(options.get("committed", ()))


def _decoder(name: str) -> pb.Decoder:
    if name not in _DECODERS:
        raise UsageError(f"decoder: got {name!r}, allowed are {', '.join(_DECODERS)}")
    return _DECODERS[name]
