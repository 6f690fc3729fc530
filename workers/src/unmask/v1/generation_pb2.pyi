from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Decoder(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DECODER_UNSPECIFIED: _ClassVar[Decoder]
    DECODER_THRESHOLD: _ClassVar[Decoder]
    DECODER_FIXED_STEPS: _ClassVar[Decoder]
    DECODER_JOINT_EDIT: _ClassVar[Decoder]
    DECODER_LOW_CONFIDENCE: _ClassVar[Decoder]
    DECODER_HIERARCHICAL: _ClassVar[Decoder]
    DECODER_CREDIT: _ClassVar[Decoder]
    DECODER_ENTROPY_BOUNDED: _ClassVar[Decoder]

class CanvasMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CANVAS_MODE_UNSPECIFIED: _ClassVar[CanvasMode]
    CANVAS_MODE_NONE: _ClassVar[CanvasMode]
    CANVAS_MODE_DIFF: _ClassVar[CanvasMode]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_END_OF_TEXT: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
DECODER_UNSPECIFIED: Decoder
DECODER_THRESHOLD: Decoder
DECODER_FIXED_STEPS: Decoder
DECODER_JOINT_EDIT: Decoder
DECODER_LOW_CONFIDENCE: Decoder
DECODER_HIERARCHICAL: Decoder
DECODER_CREDIT: Decoder
DECODER_ENTROPY_BOUNDED: Decoder
CANVAS_MODE_UNSPECIFIED: CanvasMode
CANVAS_MODE_NONE: CanvasMode
CANVAS_MODE_DIFF: CanvasMode
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_END_OF_TEXT: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_STOP: FinishReason

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "model", "text", "token_ids", "chat", "sampling", "diffusion", "committed_token_ids", "cache_salt", "priority", "trace")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    DIFFUSION_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    text: str
    token_ids: TokenIds
    chat: Chat
    sampling: SamplingParams
    diffusion: DiffusionParams
    committed_token_ids: _containers.RepeatedScalarFieldContainer[int]
    cache_salt: str
    priority: int
    trace: bool
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., chat: _Optional[_Union[Chat, _Mapping]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., diffusion: _Optional[_Union[DiffusionParams, _Mapping]] = ..., committed_token_ids: _Optional[_Iterable[int]] = ..., cache_salt: _Optional[str] = ..., priority: _Optional[int] = ..., trace: _Optional[bool] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Chat(_message.Message):
    __slots__ = ("messages", "tools")
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    TOOLS_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    tools: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ..., tools: _Optional[_Iterable[str]] = ...) -> None: ...

class ChatMessage(_message.Message):
    __slots__ = ("role", "content", "tool_calls", "tool_call_id", "name")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    TOOL_CALLS_FIELD_NUMBER: _ClassVar[int]
    TOOL_CALL_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    tool_calls: _containers.RepeatedCompositeFieldContainer[ToolCall]
    tool_call_id: str
    name: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ..., tool_calls: _Optional[_Iterable[_Union[ToolCall, _Mapping]]] = ..., tool_call_id: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class ToolCall(_message.Message):
    __slots__ = ("id", "name", "arguments")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    id: str
    name: str
    arguments: str
    def __init__(self, id: _Optional[str] = ..., name: _Optional[str] = ..., arguments: _Optional[str] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("max_tokens", "temperature", "seed", "top_p", "top_k", "repetition_penalty", "stop", "stop_token_ids", "logprobs")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    seed: int
    top_p: float
    top_k: int
    repetition_penalty: float
    stop: _containers.RepeatedScalarFieldContainer[str]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: bool
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., seed: _Optional[int] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., repetition_penalty: _Optional[float] = ..., stop: _Optional[_Iterable[str]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[bool] = ...) -> None: ...

class DiffusionParams(_message.Message):
    __slots__ = ("decoder", "threshold", "steps_per_block", "edit_threshold", "max_post_edit_steps", "block_length", "vicinity", "low_threshold", "credit_weight", "credit_decay", "credit_exponent", "entropy_bound")
    DECODER_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    STEPS_PER_BLOCK_FIELD_NUMBER: _ClassVar[int]
    EDIT_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    MAX_POST_EDIT_STEPS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_LENGTH_FIELD_NUMBER: _ClassVar[int]
    VICINITY_FIELD_NUMBER: _ClassVar[int]
    LOW_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    CREDIT_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    CREDIT_DECAY_FIELD_NUMBER: _ClassVar[int]
    CREDIT_EXPONENT_FIELD_NUMBER: _ClassVar[int]
    ENTROPY_BOUND_FIELD_NUMBER: _ClassVar[int]
    decoder: Decoder
    threshold: float
    steps_per_block: int
    edit_threshold: float
    max_post_edit_steps: int
    block_length: int
    vicinity: Vicinity
    low_threshold: float
    credit_weight: float
    credit_decay: float
    credit_exponent: float
    entropy_bound: float
    def __init__(self, decoder: _Optional[_Union[Decoder, str]] = ..., threshold: _Optional[float] = ..., steps_per_block: _Optional[int] = ..., edit_threshold: _Optional[float] = ..., max_post_edit_steps: _Optional[int] = ..., block_length: _Optional[int] = ..., vicinity: _Optional[_Union[Vicinity, _Mapping]] = ..., low_threshold: _Optional[float] = ..., credit_weight: _Optional[float] = ..., credit_decay: _Optional[float] = ..., credit_exponent: _Optional[float] = ..., entropy_bound: _Optional[float] = ...) -> None: ...

class Vicinity(_message.Message):
    __slots__ = ("before", "after")
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    before: int
    after: int
    def __init__(self, before: _Optional[int] = ..., after: _Optional[int] = ...) -> None: ...

class GenerateStreamRequest(_message.Message):
    __slots__ = ("request", "options")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    request: GenerateRequest
    options: StreamOptions
    def __init__(self, request: _Optional[_Union[GenerateRequest, _Mapping]] = ..., options: _Optional[_Union[StreamOptions, _Mapping]] = ...) -> None: ...

class StreamOptions(_message.Message):
    __slots__ = ("canvas",)
    CANVAS_FIELD_NUMBER: _ClassVar[int]
    canvas: CanvasMode
    def __init__(self, canvas: _Optional[_Union[CanvasMode, str]] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("request_id", "token_ids", "text", "finish_reason", "usage", "logprobs", "stop", "stop_token_id", "token_texts", "trace")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_TEXTS_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    finish_reason: FinishReason
    usage: Usage
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    stop: str
    stop_token_id: int
    token_texts: _containers.RepeatedScalarFieldContainer[str]
    trace: Trace
    def __init__(self, request_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., logprobs: _Optional[_Iterable[float]] = ..., stop: _Optional[str] = ..., stop_token_id: _Optional[int] = ..., token_texts: _Optional[_Iterable[str]] = ..., trace: _Optional[_Union[Trace, _Mapping]] = ...) -> None: ...

class GenerateStreamResponse(_message.Message):
    __slots__ = ("started", "canvas_update", "block_committed", "finished")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    CANVAS_UPDATE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_COMMITTED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    started: Started
    canvas_update: CanvasUpdate
    block_committed: BlockCommitted
    finished: Finished
    def __init__(self, started: _Optional[_Union[Started, _Mapping]] = ..., canvas_update: _Optional[_Union[CanvasUpdate, _Mapping]] = ..., block_committed: _Optional[_Union[BlockCommitted, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ...) -> None: ...

class Started(_message.Message):
    __slots__ = ("request_id", "model", "prompt_tokens", "queue_seconds", "block_length", "sampling", "diffusion", "revision")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_LENGTH_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    DIFFUSION_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    prompt_tokens: int
    queue_seconds: float
    block_length: int
    sampling: SamplingParams
    diffusion: DiffusionParams
    revision: str
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., queue_seconds: _Optional[float] = ..., block_length: _Optional[int] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., diffusion: _Optional[_Union[DiffusionParams, _Mapping]] = ..., revision: _Optional[str] = ...) -> None: ...

class CanvasUpdate(_message.Message):
    __slots__ = ("block_index", "step", "positions", "token_ids", "confidences", "texts", "masks_left", "edited", "block_end")
    BLOCK_INDEX_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCES_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    MASKS_LEFT_FIELD_NUMBER: _ClassVar[int]
    EDITED_FIELD_NUMBER: _ClassVar[int]
    BLOCK_END_FIELD_NUMBER: _ClassVar[int]
    block_index: int
    step: int
    positions: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    confidences: _containers.RepeatedScalarFieldContainer[float]
    texts: _containers.RepeatedScalarFieldContainer[str]
    masks_left: int
    edited: int
    block_end: int
    def __init__(self, block_index: _Optional[int] = ..., step: _Optional[int] = ..., positions: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., confidences: _Optional[_Iterable[float]] = ..., texts: _Optional[_Iterable[str]] = ..., masks_left: _Optional[int] = ..., edited: _Optional[int] = ..., block_end: _Optional[int] = ...) -> None: ...

class BlockCommitted(_message.Message):
    __slots__ = ("block_index", "offset", "token_ids", "text_delta", "forwards", "logprobs", "token_texts", "usage")
    BLOCK_INDEX_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_DELTA_FIELD_NUMBER: _ClassVar[int]
    FORWARDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_TEXTS_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    block_index: int
    offset: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    text_delta: str
    forwards: int
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    token_texts: _containers.RepeatedScalarFieldContainer[str]
    usage: Usage
    def __init__(self, block_index: _Optional[int] = ..., offset: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., text_delta: _Optional[str] = ..., forwards: _Optional[int] = ..., logprobs: _Optional[_Iterable[float]] = ..., token_texts: _Optional[_Iterable[str]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("reason", "text_delta", "usage", "stop", "stop_token_id", "trace")
    REASON_FIELD_NUMBER: _ClassVar[int]
    TEXT_DELTA_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    reason: FinishReason
    text_delta: str
    usage: Usage
    stop: str
    stop_token_id: int
    trace: Trace
    def __init__(self, reason: _Optional[_Union[FinishReason, str]] = ..., text_delta: _Optional[str] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., stop: _Optional[str] = ..., stop_token_id: _Optional[int] = ..., trace: _Optional[_Union[Trace, _Mapping]] = ...) -> None: ...

class Trace(_message.Message):
    __slots__ = ("started", "reused_tokens", "forwards", "forwards_left_out")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    REUSED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FORWARDS_FIELD_NUMBER: _ClassVar[int]
    FORWARDS_LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    started: Started
    reused_tokens: int
    forwards: _containers.RepeatedCompositeFieldContainer[TracedForward]
    forwards_left_out: int
    def __init__(self, started: _Optional[_Union[Started, _Mapping]] = ..., reused_tokens: _Optional[int] = ..., forwards: _Optional[_Iterable[_Union[TracedForward, _Mapping]]] = ..., forwards_left_out: _Optional[int] = ...) -> None: ...

class TracedForward(_message.Message):
    __slots__ = ("end_seconds", "seconds", "rows", "prefilled_tokens", "persisted", "block_index", "step", "positions", "token_ids", "confidences", "texts", "edited", "masks_left", "committed_tokens")
    END_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    PREFILLED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PERSISTED_FIELD_NUMBER: _ClassVar[int]
    BLOCK_INDEX_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCES_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    EDITED_FIELD_NUMBER: _ClassVar[int]
    MASKS_LEFT_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    end_seconds: float
    seconds: float
    rows: int
    prefilled_tokens: int
    persisted: bool
    block_index: int
    step: int
    positions: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    confidences: _containers.RepeatedScalarFieldContainer[float]
    texts: _containers.RepeatedScalarFieldContainer[str]
    edited: _containers.RepeatedScalarFieldContainer[int]
    masks_left: int
    committed_tokens: int
    def __init__(self, end_seconds: _Optional[float] = ..., seconds: _Optional[float] = ..., rows: _Optional[int] = ..., prefilled_tokens: _Optional[int] = ..., persisted: _Optional[bool] = ..., block_index: _Optional[int] = ..., step: _Optional[int] = ..., positions: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., confidences: _Optional[_Iterable[float]] = ..., texts: _Optional[_Iterable[str]] = ..., edited: _Optional[_Iterable[int]] = ..., masks_left: _Optional[int] = ..., committed_tokens: _Optional[int] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "completion_tokens", "forwards_prefill", "forwards_denoise", "forwards_persist", "positions_evaluated", "tpf", "tpf_decode", "tpf_denoise")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FORWARDS_PREFILL_FIELD_NUMBER: _ClassVar[int]
    FORWARDS_DENOISE_FIELD_NUMBER: _ClassVar[int]
    FORWARDS_PERSIST_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_EVALUATED_FIELD_NUMBER: _ClassVar[int]
    TPF_FIELD_NUMBER: _ClassVar[int]
    TPF_DECODE_FIELD_NUMBER: _ClassVar[int]
    TPF_DENOISE_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    completion_tokens: int
    forwards_prefill: int
    forwards_denoise: int
    forwards_persist: int
    positions_evaluated: int
    tpf: float
    tpf_decode: float
    tpf_denoise: float
    def __init__(self, prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., forwards_prefill: _Optional[int] = ..., forwards_denoise: _Optional[int] = ..., forwards_persist: _Optional[int] = ..., positions_evaluated: _Optional[int] = ..., tpf: _Optional[float] = ..., tpf_decode: _Optional[float] = ..., tpf_denoise: _Optional[float] = ...) -> None: ...

class GetModelInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModelInfoResponse(_message.Message):
    __slots__ = ("name", "architecture", "vocab_size", "context_length", "block_length", "has_chat_template", "eos_token_id", "mask_token_id", "max_running_requests", "default_max_tokens", "decoders", "default_diffusion", "revision")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    BLOCK_LENGTH_FIELD_NUMBER: _ClassVar[int]
    HAS_CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    MASK_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DECODERS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_DIFFUSION_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    name: str
    architecture: str
    vocab_size: int
    context_length: int
    block_length: int
    has_chat_template: bool
    eos_token_id: int
    mask_token_id: int
    max_running_requests: int
    default_max_tokens: int
    decoders: _containers.RepeatedScalarFieldContainer[Decoder]
    default_diffusion: DiffusionParams
    revision: str
    def __init__(self, name: _Optional[str] = ..., architecture: _Optional[str] = ..., vocab_size: _Optional[int] = ..., context_length: _Optional[int] = ..., block_length: _Optional[int] = ..., has_chat_template: _Optional[bool] = ..., eos_token_id: _Optional[int] = ..., mask_token_id: _Optional[int] = ..., max_running_requests: _Optional[int] = ..., default_max_tokens: _Optional[int] = ..., decoders: _Optional[_Iterable[_Union[Decoder, str]]] = ..., default_diffusion: _Optional[_Union[DiffusionParams, _Mapping]] = ..., revision: _Optional[str] = ...) -> None: ...

class GetLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetLoadResponse(_message.Message):
    __slots__ = ("running", "waiting")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ...) -> None: ...
