"""What a request asks for, checked against the model before it may wait for anything.

All wrong fields are reported at once, each with what is allowed. Nothing is accepted that could fail in the
middle of a generation.
"""

import secrets
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import grpc

from unmask.diffusion.decoding import DecodingParams, Sampling
from unmask.errors import ModelError, UsageError
from unmask.fronts.refusals import Refused, Violation, invalid, quoted
from unmask.models.conversation import Turn, tool, tool_call, turn
from unmask.serving.decoders import DECODERS, Decoder, listed
from unmask.serving.model import (
    DEFAULT_MAX_TOKENS,
    MAX_CREDIT,
    MAX_ENTROPY,
    MAX_POST_EDIT_STEPS,
    ServedModel,
)
from unmask.v1 import generation_pb2 as pb

__all__ = ["Order", "read_order"]

MAX_REQUEST_ID_BYTES = 128
MAX_CACHE_SALT_BYTES = 128
HIGHEST_PRIORITY = 100
MAX_STOPS = 16
MAX_STOP_BYTES = 256
MAX_STOP_TOKENS = 64
MAX_TEMPERATURE = 100.0
MAX_REPETITION_PENALTY = 100.0
_Made = TypeVar("_Made")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A request that can be carried out."""

    request_id: str
    prompt: Sequence[int]
    committed: Sequence[int]
    decoder: Decoder
    params: DecodingParams
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    logprobs: bool = False
    cache_salt: str = ""
    priority: int = 0
    trace: bool = False


def read_order(request: pb.GenerateRequest, model: ServedModel) -> Order:
    """Check a request and fill in its defaults.

    Raises:
        Refused: INVALID_ARGUMENT with every wrong field, NOT_FOUND or UNIMPLEMENTED.
    """
    if request.HasField("model") and request.model != model.name:
        message = f"model: got {quoted(request.model)}, served here is {model.name!r}"
        raise Refused(grpc.StatusCode.NOT_FOUND, message)
    reader = _Reader(model)
    prompt = reader.prompt(request)
    max_tokens = reader.max_tokens(request.sampling, len(prompt))
    committed = reader.committed(request.committed_token_ids, max_tokens)
    decoder = reader.decoder(request.diffusion, max_tokens or model.context_length)
    request_id = reader.request_id(request)
    sampling = reader.sampling(request.sampling)
    reader.check_stops(request.sampling)
    reader.check_place(request)
    if reader.violations:
        raise invalid(reader.violations)
    if sampling.temperature and decoder.wire == pb.DECODER_JOINT_EDIT:
        message = (
            "sampling.temperature: DECODER_JOINT_EDIT replaces tokens by more probable ones, which drawn "
            "ones would seldom withstand; leave it at 0 or take another decoder"
        )
        raise Refused(grpc.StatusCode.UNIMPLEMENTED, message)
    params = model.params(decoder, request.diffusion, max_new_tokens=max_tokens)
    return Order(
        request_id=request_id,
        prompt=prompt,
        committed=committed,
        decoder=decoder,
        params=replace(params, sampling=sampling),
        stop=tuple(request.sampling.stop),
        stop_token_ids=tuple(request.sampling.stop_token_ids),
        logprobs=request.sampling.logprobs,
        cache_salt=request.cache_salt,
        priority=request.priority,
        trace=request.trace,
    )


class _Reader:
    """Reads a request field by field; what is wrong gathers in ``violations``."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self.violations: list[Violation] = []

    def prompt(self, request: pb.GenerateRequest) -> list[int]:
        """The prompt's token ids, at least one."""
        kind = request.WhichOneof("prompt")
        if kind is None:
            self._wrong("prompt", "nothing is set; set one of text, token_ids, chat")
            return []
        try:
            ids = self._encode(kind, request)
        except (UsageError, ModelError) as error:
            self._wrong(kind, str(error))
            return []
        if not ids:
            self._wrong(kind, "holds no tokens; send at least one")
        return ids

    def max_tokens(self, sampling: pb.SamplingParams, prompt_tokens: int) -> int:
        """The given limit, or the default as far as there is room; it fits the context."""
        context = self._model.context_length
        room = context - prompt_tokens
        if room < 1:
            self._wrong(
                "prompt",
                f"has {prompt_tokens} tokens; the context holds {context}, one to be generated included",
            )
            return 0
        if not sampling.HasField("max_tokens"):
            return min(DEFAULT_MAX_TOKENS, room)
        if not 1 <= sampling.max_tokens <= room:
            self._wrong(
                "sampling.max_tokens",
                f"got {sampling.max_tokens}, must be 1 to {room}: the context holds {context} tokens, "
                f"{prompt_tokens} of them the prompt's",
            )
        return sampling.max_tokens

    def sampling(self, given: pb.SamplingParams) -> Sampling:
        """How tokens are chosen; a seed is made up if none is given."""
        checks = {
            "temperature": (0 <= given.temperature <= MAX_TEMPERATURE, f"0 to {MAX_TEMPERATURE:g}"),
            "top_p": (0 < given.top_p <= 1, "above 0 and at most 1"),
            "top_k": (1 <= given.top_k, "at least 1"),
            "repetition_penalty": (
                0 < given.repetition_penalty <= MAX_REPETITION_PENALTY,
                f"above 0 and at most {MAX_REPETITION_PENALTY:g}",
            ),
        }
        wrong = {name for name, (fits, _) in checks.items() if given.HasField(name) and not fits}
        for name in sorted(wrong):
            self._wrong(f"sampling.{name}", f"got {getattr(given, name):g}, must be {checks[name][1]}")
        if wrong:
            return Sampling()
        seed = secrets.randbits(63) if given.temperature else 0
        return Sampling(
            temperature=given.temperature,
            top_p=given.top_p if given.HasField("top_p") else 1.0,
            top_k=given.top_k if given.HasField("top_k") else None,
            repetition_penalty=given.repetition_penalty if given.HasField("repetition_penalty") else 1.0,
            seed=given.seed if given.HasField("seed") else seed,
        )

    def check_stops(self, given: pb.SamplingParams) -> None:
        """Few and short: each is looked for at every token."""
        if len(given.stop) > MAX_STOPS:
            self._wrong("sampling.stop", f"got {len(given.stop)}, at most {MAX_STOPS} are allowed")
        for place, text in enumerate(given.stop[:MAX_STOPS]):
            if not 0 < len(text.encode()) <= MAX_STOP_BYTES:
                self._wrong(f"sampling.stop[{place}]", f"must have 1 to {MAX_STOP_BYTES} bytes")
        if len(given.stop_token_ids) > MAX_STOP_TOKENS:
            self._wrong(
                "sampling.stop_token_ids",
                f"got {len(given.stop_token_ids)}, at most {MAX_STOP_TOKENS} are allowed",
            )
        self._check_ids("sampling.stop_token_ids", given.stop_token_ids[:MAX_STOP_TOKENS])

    def check_place(self, request: pb.GenerateRequest) -> None:
        """Its place in the queue, and who may share its blocks."""
        if not -HIGHEST_PRIORITY <= request.priority <= HIGHEST_PRIORITY:
            allowed = f"-{HIGHEST_PRIORITY} to {HIGHEST_PRIORITY}"
            self._wrong("priority", f"got {request.priority}, must be {allowed}")
        if len(request.cache_salt.encode()) > MAX_CACHE_SALT_BYTES:
            self._wrong("cache_salt", f"may have at most {MAX_CACHE_SALT_BYTES} bytes; send a hash of it")

    def committed(self, ids: Sequence[int], max_tokens: int) -> tuple[int, ...]:
        """Token ids to go on from."""
        self._check_ids("committed_token_ids", ids)
        if len(ids) > max_tokens:
            self._wrong(
                "committed_token_ids",
                f"got {len(ids)} ids, more than {max_tokens} max_tokens; send the former call's max_tokens",
            )
        return tuple(ids)

    def decoder(self, diffusion: pb.DiffusionParams, max_tokens: int) -> Decoder:
        """The given decoder or the model's; the parameters are its own."""
        usable = {decoder.wire: decoder for decoder in self._model.decoders}
        usable[pb.DECODER_UNSPECIFIED] = self._model.default_decoder
        decoder = usable.get(diffusion.decoder)
        if decoder is not None:
            self._check_parameters(diffusion, decoder, max_tokens)
            return decoder
        got = next((known for known in DECODERS if known.wire == diffusion.decoder), diffusion.decoder)
        allowed = f"{listed(self._model.decoders)} for {self._model.architecture}"
        self._wrong("diffusion.decoder", f"got {got}, allowed are {allowed}")
        return self._model.default_decoder

    def request_id(self, request: pb.GenerateRequest) -> str:
        """The given name or a new one."""
        if not request.HasField("request_id"):
            return uuid.uuid4().hex
        if not 0 < len(request.request_id.encode()) <= MAX_REQUEST_ID_BYTES:
            self._wrong("request_id", f"must have 1 to {MAX_REQUEST_ID_BYTES} bytes, or be unset")
        return request.request_id

    def _encode(self, kind: str, request: pb.GenerateRequest) -> list[int]:
        tokenizer = self._model.tokenizer
        if kind == "token_ids":
            ids = list(request.token_ids.ids)
            self._check_ids("token_ids.ids", ids)
            return ids
        if kind == "text":
            return tokenizer.encode(request.text)
        if not request.chat.messages:
            raise UsageError("has no messages; send at least one turn")
        turns = [_turn(message, f"messages[{n}]") for n, message in enumerate(request.chat.messages)]
        tools = [_object(tool, text, f"tools[{n}]") for n, text in enumerate(request.chat.tools)]
        return tokenizer.encode(tokenizer.render_chat(turns, add_generation_prompt=True, tools=tools))

    def _check_parameters(self, diffusion: pb.DiffusionParams, decoder: Decoder, max_tokens: int) -> None:
        """Each one given is one that the decoder has, with a value that it takes."""
        given = {field.name for field, _ in diffusion.ListFields()} - {"decoder"}
        foreign = given - set(decoder.parameters)
        for name in sorted(foreign):
            others = [other for other in self._model.decoders if name in other.parameters]
            remedy = f"ask for {listed(others)} or leave it out" if others else "leave it out"
            self._wrong(f"diffusion.{name}", f"{decoder} has no such parameter; {remedy}")
        steps = self._model.block_length(decoder, diffusion, max_new_tokens=max_tokens)
        most_edits = MAX_POST_EDIT_STEPS
        threshold = diffusion.threshold if diffusion.HasField("threshold") else self._model.defaults.threshold
        checks = {
            "threshold": (0 < diffusion.threshold <= 1, "above 0 and at most 1"),
            "steps_per_block": (1 <= diffusion.steps_per_block <= steps, f"1 to {steps}, the block length"),
            "edit_threshold": (0 <= diffusion.edit_threshold <= 1, "0 to 1"),
            "max_post_edit_steps": (diffusion.max_post_edit_steps <= most_edits, f"at most {most_edits}"),
            "block_length": (1 <= diffusion.block_length <= max_tokens, f"1 to {max_tokens}, max_tokens"),
            "low_threshold": (
                0 < diffusion.low_threshold <= threshold,
                f"above 0 and at most {threshold:g}, the threshold",
            ),
            "credit_weight": (0 <= diffusion.credit_weight <= MAX_CREDIT, f"0 to {MAX_CREDIT:g}"),
            "credit_decay": (0 <= diffusion.credit_decay <= 1, "0 to 1"),
            "credit_exponent": (0 <= diffusion.credit_exponent <= MAX_CREDIT, f"0 to {MAX_CREDIT:g}"),
            "entropy_bound": (0 <= diffusion.entropy_bound <= MAX_ENTROPY, f"0 to {MAX_ENTROPY:g}"),
        }
        for name, (fits, allowed) in checks.items():
            if name in given - foreign and not fits:
                self._wrong(f"diffusion.{name}", f"got {getattr(diffusion, name)}, must be {allowed}")

    def _check_ids(self, field: str, ids: Sequence[int]) -> None:
        for place, token_id in enumerate(ids):
            if token_id >= self._model.vocab_size:
                self._wrong(
                    f"{field}[{place}]", f"got {token_id}, ids run from 0 to {self._model.vocab_size - 1}"
                )
                return

    def _wrong(self, field: str, description: str) -> None:
        self.violations.append(Violation(field, description))


def _turn(message: pb.ChatMessage, place: str) -> Turn:
    calls = []
    for number, call in enumerate(message.tool_calls):
        at = f"{place}.tool_calls[{number}]"
        if not call.name:
            raise UsageError(f"{at}.name: is empty; name the function")
        made = _object(partial(tool_call, call.name, call_id=call.id), call.arguments, f"{at}.arguments")
        calls.append(made)
    return turn(
        message.role,
        message.content,
        tool_calls=calls,
        tool_call_id=message.tool_call_id,
        name=message.name,
    )


def _object(make: Callable[[str], _Made], text: str, place: str) -> _Made:
    """What ``make`` makes of the JSON object in ``text``."""
    try:
        return make(text)
    except ValueError as error:
        raise UsageError(f"{place}: must be a JSON object: {error}") from error
