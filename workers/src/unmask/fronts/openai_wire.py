"""The bodies of OpenAI's HTTP interface, read into requests of our wire and written from its events.

Of ``/v1/completions`` and ``/v1/chat/completions`` (https://platform.openai.com/docs/api-reference) a request
may hold what a masked-diffusion model can do; a field that asks for anything else is refused by name, never
passed over, but for values that ask for nothing (``presence_penalty: 0``). How to decode is said under
``diffusion``, with the fields of the wire's ``DiffusionParams``; clients of OpenAI's package send it in
``extra_body``. Two things differ:

* without ``temperature`` the most probable tokens are taken, where OpenAI's default is 1;
* a call of a tool comes back as text, in the form that the model was taught.

An answer's ``usage`` has what OpenAI's has, and under ``unmask`` forwards and tokens per forward. Each choice
of a request with ``trace`` has one, in the form in which our client has it and writes it to files.
"""

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import accumulate
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import grpc
from google.protobuf.json_format import ParseDict, ParseError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from unmask.client.events import trace_of
from unmask.client.options import DECODERS
from unmask.client.usage import total
from unmask.fronts.refusals import Refused, Violation, invalid, quoted
from unmask.v1 import generation_pb2 as pb

__all__ = [
    "Answer",
    "ChatAnswer",
    "ChatRequest",
    "CompletionAnswer",
    "CompletionRequest",
    "error_of",
    "http_status",
    "read_body",
    "usage_of",
]

Json: TypeAlias = dict[str, Any]

MOST_CHOICES = 16
"""Answers to one request."""

_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNIMPLEMENTED: 400,  # what is asked for will not be had by asking again
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.ABORTED: 499,  # clients ask again after 409
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
_KINDS = {
    400: "invalid_request_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}
_REASONS = {
    pb.FINISH_REASON_END_OF_TEXT: "stop",
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
}
_DECODERS = {str(name): number for name, number in DECODERS.items()}
_DIFFUSION_FIELDS = pb.DiffusionParams.DESCRIPTOR.fields_by_name.keys()
_FORWARDS = (
    "forwards_prefill",
    "forwards_denoise",
    "forwards_persist",
    "positions_evaluated",
    "tpf",
    "tpf_decode",
    "tpf_denoise",
)
"""Of the wire's ``Usage``, under ``usage.unmask``."""
_LONGEST_FIELD = 64
_Body = TypeVar("_Body", bound="_Request")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Text(_Strict):
    type: Literal["text"]
    text: str


_Content = str | list[_Text] | None


class _Function(_Strict):
    name: str
    arguments: str


class _ToolCall(_Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: _Function


class _Message(_Strict):
    role: str
    content: _Content = None
    name: str | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None

    def told(self) -> pb.ChatMessage:
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        calls = [
            pb.ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
            for call in self.tool_calls or ()
        ]
        return pb.ChatMessage(
            role=self.role,
            content=content,
            name=self.name,
            tool_calls=calls,
            tool_call_id=self.tool_call_id,
        )


class _StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class _Request(_Strict, ABC):
    """What both endpoints take."""

    model: str
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 32)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 64)] | None = None
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    diffusion: Json | None = None
    cache_salt: str | None = None
    priority: Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)] | None = None
    trace: bool = False
    user: str | None = None
    """Passed over: it changes no answer of OpenAI's either."""
    # What asks for nothing.
    presence_penalty: Literal[0] | Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Literal[0] | Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[Json, Field(max_length=0)] | None = None

    def wanted(self) -> pb.GenerateRequest:
        """The request for one answer, but for its prompt.

        Raises:
            Refused: ``diffusion`` is not what the wire has.
        """
        request = pb.GenerateRequest(model=self.model)
        for name, value in (
            ("max_tokens", self._most_tokens()),
            ("temperature", self.temperature),
            ("top_p", self.top_p),
            ("seed", self.seed),
        ):
            if value is not None:
                setattr(request.sampling, name, value)
        request.sampling.stop.extend([self.stop] if isinstance(self.stop, str) else self.stop or ())
        if self.wants_logprobs:
            request.sampling.logprobs = True
        if self.diffusion is not None:
            request.diffusion.CopyFrom(_diffusion(self.diffusion))
        if self.cache_salt is not None:
            request.cache_salt = self.cache_salt
        if self.priority is not None:
            request.priority = self.priority
        if self.trace:
            request.trace = True
        return request

    @abstractmethod
    def told(self) -> pb.GenerateRequest:
        """The request for one answer, as our wire has it.

        Raises:
            Refused: It cannot be said.
        """

    @property
    @abstractmethod
    def wants_logprobs(self) -> bool:
        """Whether the probability of each token is asked for."""

    def choices(self) -> list[pb.GenerateRequest]:
        """A request for each of the ``n`` answers; they share what is stored of the prompt.

        Raises:
            Refused: They cannot be said, or would all be the same.
        """
        first, count = self.told(), self.n or 1
        if count > 1 and not first.sampling.temperature:
            text = f"got {count}, but at temperature 0 all answers are the same; set a temperature"
            raise invalid([Violation("n", text)])
        made = []
        for number in range(count):
            request = pb.GenerateRequest()
            request.CopyFrom(first)
            if first.sampling.HasField("seed"):
                request.sampling.seed = (first.sampling.seed + number) % (1 << 64)
            made.append(request)
        return made

    def _most_tokens(self) -> int | None:
        return self.max_tokens


class CompletionRequest(_Request):
    """``POST /v1/completions``."""

    prompt: str | list[Annotated[int, Field(ge=0, lt=1 << 32)]] | Annotated[list[str], Field(max_length=1)]
    """A text, token ids, or a list of one text."""
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: Literal[0] | None = None
    """0 for those of the tokens that were taken; those of others are not kept."""
    suffix: None = None

    @property
    def wants_logprobs(self) -> bool:
        """Whether the probability of each token is asked for."""
        return self.logprobs is not None

    def told(self) -> pb.GenerateRequest:
        """The request for one answer, as our wire has it.

        Raises:
            Refused: It cannot be said.
        """
        request = self.wanted()
        parts: list[Any] = [self.prompt] if isinstance(self.prompt, str) else [*self.prompt]
        if parts and isinstance(parts[0], str):
            request.text = parts[0]
        else:
            request.token_ids.ids.extend(parts)
        return request


class ChatRequest(_Request):
    """``POST /v1/chat/completions``."""

    messages: list[_Message]
    tools: list[Json] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=1 << 32)] | None = None
    logprobs: bool | None = None
    top_logprobs: Literal[0] | None = None
    response_format: "_PlainText | None" = None
    store: Literal[False] | None = None
    metadata: Json | None = None

    @property
    def wants_logprobs(self) -> bool:
        """Whether the probability of each token is asked for."""
        return bool(self.logprobs)

    def told(self) -> pb.GenerateRequest:
        """The request for one answer, as our wire has it.

        Raises:
            Refused: It cannot be said.
        """
        request = self.wanted()
        request.chat.messages.extend(message.told() for message in self.messages)
        if self.tool_choice != "none":
            request.chat.tools.extend(json.dumps(tool) for tool in self.tools or ())
        return request

    def _most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class _PlainText(_Strict):
    type: Literal["text"]


def read_body(kind: type[_Body], body: bytes) -> _Body:
    """Read a request.

    Raises:
        Refused: INVALID_ARGUMENT with every wrong field.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        found: dict[str, list[str]] = {}
        for flaw in error.errors(include_url=False, include_input=False, include_context=False):
            # The first part of a place is a field; what follows may name an alternative of its type.
            field = _field(flaw["loc"][0]) if flaw["loc"] else "body"
            text = flaw["msg"]
            if flaw["type"] == "extra_forbidden" and len(flaw["loc"]) == 1:
                text = "is not known, or not possible here; leave it out"
            told = found.setdefault(field, [])
            if text not in told:
                told.append(text)
        # A field with several types has a complaint for each of them.
        raise invalid(
            [Violation(field, ", or ".join(texts[-3:])) for field, texts in found.items()]
        ) from None


def _field(name: str | int) -> str:
    """A field by its name, which may be whatever the client has made up."""
    told = str(name)
    return told if told.isidentifier() and told.isascii() and len(told) <= _LONGEST_FIELD else quoted(told)


def _diffusion(given: Json) -> pb.DiffusionParams:
    """``DiffusionParams`` from JSON with its field names; decoders have the names that clients give them."""
    named = dict(given)
    if (decoder := named.get("decoder")) is not None:
        if not isinstance(decoder, str) or decoder not in _DECODERS:
            got = f"got {quoted(decoder)}" if isinstance(decoder, str) else "is no text"
            raise invalid([Violation("diffusion.decoder", f"{got}; allowed are {', '.join(_DECODERS)}")])
        named["decoder"] = _DECODERS[decoder]
    params, wrong = pb.DiffusionParams(), []
    for name, value in named.items():
        if name not in _DIFFUSION_FIELDS:
            wrong.append(Violation("diffusion", f"{quoted(name)} is not known; leave it out"))
            continue
        try:
            ParseDict({name: value}, params)
        except (ParseError, OverflowError):  # whose text quotes the value
            wrong.append(Violation(f"diffusion.{name}", "is not of its type; see DiffusionParams"))
    if wrong:
        raise invalid(wrong)
    return params


class Answer(ABC):
    """The answers to one request, whole or in pieces, in the words of one endpoint.

    Args:
        model: Its name.
        created: Time in seconds since 1970.
        logprobs: Whether the probabilities of tokens are told.
    """

    object: str
    piece: str
    prefix: str

    def __init__(self, model: str, *, created: int, logprobs: bool = False) -> None:
        self._model, self._created, self._logprobs = model, created, logprobs
        self._id = ""
        self._lengths: Counter[int] = Counter()
        """Of the token texts that have been told of each answer."""

    def whole(self, responses: Sequence[pb.GenerateResponse]) -> Json:
        """The answers at once."""
        self._id = responses[0].request_id
        choices = [
            self.choice(response.text)
            | {
                "index": index,
                "logprobs": self._told(index, response.token_texts, response.logprobs),
                "finish_reason": _REASONS[response.finish_reason],
            }
            | _traced(response)
            for index, response in enumerate(responses)
        ]
        usage = usage_of([response.usage for response in responses])
        return self._framed(self.object, choices) | {"usage": usage}

    def pieces(self, event: pb.GenerateStreamResponse, *, index: int = 0) -> list[Json]:
        """What an event adds to an answer, as the chunks of a stream."""
        match event.WhichOneof("event"):
            case "started":
                self._id = self._id or event.started.request_id
                return self.opening(index)
            case "block_committed":
                block = event.block_committed
                logprobs = self._told(index, block.token_texts, block.logprobs)
                if not block.text_delta and logprobs is None:
                    return []
                return [self._chunk(index, block.text_delta, logprobs=logprobs)]
            case "finished":
                finished = event.finished
                last = self._chunk(index, finished.text_delta, _REASONS[finished.reason])
                last["choices"][0] |= _traced(finished)
                return [last]
        return []

    def last(self, usages: Sequence[pb.Usage]) -> Json:
        """The chunk that holds the usage of all answers."""
        return self._framed(self.piece, []) | {"usage": usage_of(usages)}

    def opening(self, index: int) -> list[Json]:
        """Chunks before the first text."""
        return []

    @abstractmethod
    def choice(self, text: str) -> Json:
        """A whole text."""

    @abstractmethod
    def delta(self, text: str) -> Json:
        """A piece of text."""

    @abstractmethod
    def logprobs(self, tokens: Sequence[str], logprobs: Sequence[float], *, start: int) -> Json:
        """The probabilities of tokens, given by their texts, which begin at the character ``start``."""

    def _told(self, index: int, tokens: Sequence[str], logprobs: Sequence[float]) -> Json | None:
        if not self._logprobs:
            return None
        start = self._lengths[index]
        self._lengths[index] += sum(map(len, tokens))
        return self.logprobs(tokens, logprobs, start=start)

    def _chunk(
        self, index: int, text: str, reason: str | None = None, *, logprobs: Json | None = None
    ) -> Json:
        choice = self.delta(text) | {"index": index, "logprobs": logprobs, "finish_reason": reason}
        return self._framed(self.piece, [choice])

    def _framed(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": f"{self.prefix}-{self._id}",
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }


class CompletionAnswer(Answer):
    """Of ``/v1/completions``."""

    object = piece = "text_completion"
    prefix = "cmpl"

    def choice(self, text: str) -> Json:
        """A whole text."""
        return {"text": text}

    def delta(self, text: str) -> Json:
        """A piece of text."""
        return {"text": text}

    def logprobs(self, tokens: Sequence[str], logprobs: Sequence[float], *, start: int) -> Json:
        """The probabilities of tokens, given by their texts, which begin at the character ``start``."""
        ends = list(accumulate(map(len, tokens), initial=start))
        return {
            "tokens": list(tokens),
            "token_logprobs": list(logprobs),
            "top_logprobs": None,
            "text_offset": ends[:-1],
        }


class ChatAnswer(Answer):
    """Of ``/v1/chat/completions``."""

    object = "chat.completion"
    piece = "chat.completion.chunk"
    prefix = "chatcmpl"

    def opening(self, index: int) -> list[Json]:
        """The role, before there is a text."""
        choice = {"delta": {"role": "assistant", "content": ""}, "index": index, "logprobs": None}
        return [self._framed(self.piece, [choice | {"finish_reason": None}])]

    def choice(self, text: str) -> Json:
        """A whole text."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str) -> Json:
        """A piece of text."""
        return {"delta": {"content": text} if text else {}}

    def logprobs(self, tokens: Sequence[str], logprobs: Sequence[float], *, start: int) -> Json:
        """The probabilities of tokens, given by their texts."""
        content = [
            {"token": token, "logprob": logprob, "bytes": list(token.encode()), "top_logprobs": []}
            for token, logprob in zip(tokens, logprobs, strict=True)
        ]
        return {"content": content, "refusal": None}


def _traced(ended: pb.GenerateResponse | pb.Finished) -> Json:
    """The story of an answer that has ended, if it was asked for."""
    return {"trace": asdict(trace_of(ended.trace))} if ended.HasField("trace") else {}


def http_status(code: grpc.StatusCode) -> int:
    """The HTTP status that says the same."""
    return _STATUS.get(code, 500)


def error_of(refused: Refused) -> Json:
    """The body of an answer that is an error."""
    status = http_status(refused.code)
    first = refused.violations[0].field if refused.violations else None
    return {
        "error": {
            "message": refused.message,
            "type": _KINDS.get(status, "server_error"),
            "param": first,
            "code": refused.code.name.lower(),
        }
    }


def usage_of(usages: Sequence[pb.Usage]) -> Json:
    """What the answers to one request took together; the prompt counts once, as OpenAI counts it."""
    whole = total(usages)
    return {
        "prompt_tokens": whole.prompt_tokens,
        "completion_tokens": whole.completion_tokens,
        "total_tokens": whole.prompt_tokens + whole.completion_tokens,
        "unmask": {name: getattr(whole, name) for name in _FORWARDS},
    }
