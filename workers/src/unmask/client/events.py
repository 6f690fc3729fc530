"""What a server tells, as plain values. The meaning and unit of each field stand in ``generation.proto``."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from unmask.client.options import DECODERS, DecoderName
from unmask.v1 import generation_pb2 as pb

__all__ = [
    "BlockCommitted",
    "CanvasUpdate",
    "Decoding",
    "Event",
    "Fill",
    "Finished",
    "Generation",
    "ModelInfo",
    "Started",
    "Trace",
    "TracedForward",
    "Usage",
    "event_of",
    "generation_of",
    "model_info_of",
    "trace_of",
]

FinishReason: TypeAlias = Literal["end_of_text", "length", "stop", "unknown"]

_REASONS: dict[int, FinishReason] = {
    pb.FINISH_REASON_END_OF_TEXT: "end_of_text",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_STOP: "stop",
}
_NO_NUMBERS = ("decoder", "vicinity")
_DECODER_NAMES: dict[int, DecoderName] = {number: name for name, number in DECODERS.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a request cost; the three TPF differ in the forwards they count."""

    prompt_tokens: int
    completion_tokens: int
    """Generated and kept: the end of text is not counted."""
    forwards_prefill: int
    forwards_denoise: int
    forwards_persist: int
    positions_evaluated: int
    tpf: float
    """Over all forwards."""
    tpf_decode: float
    """Over denoise and persist forwards."""
    tpf_denoise: float
    """Over denoise forwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """A decoder and its parameters; None is what it does not have."""

    decoder: DecoderName | Literal["unknown"]
    threshold: float | None = None
    steps_per_block: int | None = None
    edit_threshold: float | None = None
    max_post_edit_steps: int | None = None
    low_threshold: float | None = None
    credit_weight: float | None = None
    credit_decay: float | None = None
    credit_exponent: float | None = None
    entropy_bound: float | None = None
    block_length: int | None = None
    """Where requests may choose it."""
    vicinity: tuple[int, int] | None = None
    """Where the cache is approximate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The request left the queue; these parameters are in force."""

    request_id: str
    model: str
    prompt_tokens: int
    queue_seconds: float
    block_length: int
    max_tokens: int
    decoding: Decoding
    seed: int | None = None
    """What draws depend on, given or made up; None where nothing is drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fill:
    """One position that was filled or edited; provisional."""

    position: int
    """From the first generated token."""
    token_id: int
    confidence: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CanvasUpdate:
    """Positions that were filled or edited since the last update; of one that came before, this one holds."""

    block_index: int
    step: int
    fills: tuple[Fill, ...]
    masks_left: int
    edited: int
    """Tokens that were replaced by others."""
    block_end: int
    """Position after the block's last, from the first generated token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCommitted:
    """The tokens of one block, final."""

    block_index: int
    offset: int
    token_ids: tuple[int, ...]
    text: str
    """What they add to the text."""
    forwards: int
    logprobs: tuple[float, ...] = ()
    """If asked for, one for each token: of the probability with which it was accepted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedForward:
    """What one forward did for the request."""

    end_seconds: float
    """From the request's arrival in the engine to the forward's end."""
    seconds: float
    rows: int
    """Requests that it worked for."""
    prefilled_tokens: int
    """Tokens of the prompt and of committed ones that it read."""
    persisted: bool
    """Whether it stored a committed block."""
    block_index: int | None
    """The block that it took a denoising step of, if it did."""
    step: int | None
    """Which one of the block's, from 1."""
    filled: tuple[Fill, ...]
    edited: tuple[Fill, ...]
    """What replaced another token."""
    masks_left: int | None
    committed_tokens: int | None
    """Tokens that were added to the answer, ones behind a stop included, if the block was committed then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """The whole story of a request."""

    started: Started
    reused_tokens: int
    """Tokens that were in the cache already."""
    forwards: tuple[TracedForward, ...]
    forwards_left_out: int
    """The last ones, where the trace would have become too long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The generation is complete."""

    reason: FinishReason
    text: str
    """The rest of the text; usually empty."""
    usage: Usage
    stop: str | int | None = None
    """What ended it, if a stop did: a text or a token."""
    trace: Trace | None = None
    """If asked for."""


Event: TypeAlias = Started | CanvasUpdate | BlockCommitted | Finished


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A whole generation."""

    request_id: str
    token_ids: tuple[int, ...]
    """The end of text, if there is one, is the last."""
    text: str
    finish_reason: FinishReason
    usage: Usage
    stop: str | int | None = None
    """What ended it, if a stop did: a text or a token."""
    logprobs: tuple[float, ...] = ()
    """If asked for, one for each token: of the probability with which it was accepted."""
    trace: Trace | None = None
    """If asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """The served model and its limits."""

    name: str
    architecture: str
    vocab_size: int
    context_length: int
    block_length: int
    has_chat_template: bool
    eos_token_id: int | None
    mask_token_id: int
    max_running_requests: int
    default_max_tokens: int
    decoders: tuple[DecoderName, ...]
    default_decoding: Decoding
    revision: str | None
    """SHA-256 over the weight files; None if they came without checksums."""


def event_of(message: pb.GenerateStreamResponse) -> Event | None:
    """The event in ``message``; None if it is of a kind that this client does not know."""
    match message.WhichOneof("event"):
        case "started":
            return _started(message.started)
        case "canvas_update":
            return _canvas_update(message.canvas_update)
        case "block_committed":
            return _block_committed(message.block_committed)
        case "finished":
            return _finished(message.finished)
        case _:
            return None


def generation_of(message: pb.GenerateResponse) -> Generation:
    """A unary call's answer."""
    return Generation(
        request_id=message.request_id,
        token_ids=tuple(message.token_ids),
        text=message.text,
        finish_reason=_REASONS.get(message.finish_reason, "unknown"),
        usage=_usage(message.usage),
        stop=_stop(message),
        logprobs=tuple(message.logprobs),
        trace=trace_of(message.trace) if message.HasField("trace") else None,
    )


def model_info_of(message: pb.GetModelInfoResponse) -> ModelInfo:
    """What is served."""
    return ModelInfo(
        name=message.name,
        architecture=message.architecture,
        vocab_size=message.vocab_size,
        context_length=message.context_length,
        block_length=message.block_length,
        has_chat_template=message.has_chat_template,
        eos_token_id=message.eos_token_id if message.HasField("eos_token_id") else None,
        mask_token_id=message.mask_token_id,
        max_running_requests=message.max_running_requests,
        default_max_tokens=message.default_max_tokens,
        decoders=tuple(_DECODER_NAMES[number] for number in message.decoders if number in _DECODER_NAMES),
        default_decoding=_decoding(message.default_diffusion),
        revision=message.revision if message.HasField("revision") else None,
    )


def trace_of(message: pb.Trace) -> Trace:
    """A request's whole story."""
    return Trace(
        started=_started(message.started),
        reused_tokens=message.reused_tokens,
        forwards=tuple(map(_traced_forward, message.forwards)),
        forwards_left_out=message.forwards_left_out,
    )


def _started(message: pb.Started) -> Started:
    return Started(
        request_id=message.request_id,
        model=message.model,
        prompt_tokens=message.prompt_tokens,
        queue_seconds=message.queue_seconds,
        block_length=message.block_length,
        max_tokens=message.sampling.max_tokens,
        decoding=_decoding(message.diffusion),
        seed=message.sampling.seed if message.sampling.HasField("seed") else None,
    )


def _decoding(message: pb.DiffusionParams) -> Decoding:
    given = {field.name: value for field, value in message.ListFields() if field.name not in _NO_NUMBERS}
    vicinity = message.vicinity
    return Decoding(
        decoder=_DECODER_NAMES.get(message.decoder, "unknown"),
        vicinity=(vicinity.before, vicinity.after) if message.HasField("vicinity") else None,
        **{name: value for name, value in given.items() if name in Decoding.__dataclass_fields__},
    )


def _canvas_update(message: pb.CanvasUpdate) -> CanvasUpdate:
    return CanvasUpdate(
        block_index=message.block_index,
        step=message.step,
        fills=_fills(message),
        masks_left=message.masks_left,
        edited=message.edited,
        block_end=message.block_end,
    )


def _block_committed(message: pb.BlockCommitted) -> BlockCommitted:
    return BlockCommitted(
        block_index=message.block_index,
        offset=message.offset,
        token_ids=tuple(message.token_ids),
        text=message.text_delta,
        forwards=message.forwards,
        logprobs=tuple(message.logprobs),
    )


def _finished(message: pb.Finished) -> Finished:
    return Finished(
        reason=_REASONS.get(message.reason, "unknown"),
        text=message.text_delta,
        usage=_usage(message.usage),
        stop=_stop(message),
        trace=trace_of(message.trace) if message.HasField("trace") else None,
    )


def _traced_forward(message: pb.TracedForward) -> TracedForward:
    edited = frozenset(message.edited)
    fills = _fills(message)
    return TracedForward(
        end_seconds=message.end_seconds,
        seconds=message.seconds,
        rows=message.rows,
        prefilled_tokens=message.prefilled_tokens,
        persisted=message.persisted,
        block_index=message.block_index if message.HasField("block_index") else None,
        step=message.step if message.HasField("step") else None,
        filled=tuple(fill for fill in fills if fill.position not in edited),
        edited=tuple(fill for fill in fills if fill.position in edited),
        masks_left=message.masks_left if message.HasField("masks_left") else None,
        committed_tokens=message.committed_tokens if message.HasField("committed_tokens") else None,
    )


def _fills(message: pb.CanvasUpdate | pb.TracedForward) -> tuple[Fill, ...]:
    fills = zip(message.positions, message.token_ids, message.confidences, message.texts, strict=True)
    return tuple(
        Fill(position=position, token_id=token_id, confidence=confidence, text=text)
        for position, token_id, confidence, text in fills
    )


def _stop(message: pb.Finished | pb.GenerateResponse) -> str | int | None:
    match message.WhichOneof("stopped_by"):
        case "stop":
            return message.stop
        case "stop_token_id":
            return message.stop_token_id
    return None


def _usage(message: pb.Usage) -> Usage:
    return Usage(
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        forwards_prefill=message.forwards_prefill,
        forwards_denoise=message.forwards_denoise,
        forwards_persist=message.forwards_persist,
        positions_evaluated=message.positions_evaluated,
        tpf=message.tpf,
        tpf_decode=message.tpf_decode,
        tpf_denoise=message.tpf_denoise,
    )
