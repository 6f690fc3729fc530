from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("name", "revision", "shape", "placements", "draining", "weight_bytes", "max_tokens", "activations")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    PLACEMENTS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    name: str
    revision: str
    shape: ExpertShape
    placements: _containers.RepeatedCompositeFieldContainer[HeldPlacement]
    draining: bool
    weight_bytes: int
    max_tokens: int
    activations: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., revision: _Optional[str] = ..., shape: _Optional[_Union[ExpertShape, _Mapping]] = ..., placements: _Optional[_Iterable[_Union[HeldPlacement, _Mapping]]] = ..., draining: _Optional[bool] = ..., weight_bytes: _Optional[int] = ..., max_tokens: _Optional[int] = ..., activations: _Optional[_Iterable[int]] = ...) -> None: ...

class ExpertShape(_message.Message):
    __slots__ = ("hidden_size", "expert_width", "num_experts", "layers")
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    EXPERT_WIDTH_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    hidden_size: int
    expert_width: int
    num_experts: int
    layers: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, hidden_size: _Optional[int] = ..., expert_width: _Optional[int] = ..., num_experts: _Optional[int] = ..., layers: _Optional[_Iterable[int]] = ...) -> None: ...

class HeldPlacement(_message.Message):
    __slots__ = ("epoch", "bounds", "parts")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BOUNDS_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    bounds: _containers.RepeatedScalarFieldContainer[int]
    parts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, epoch: _Optional[int] = ..., bounds: _Optional[_Iterable[int]] = ..., parts: _Optional[_Iterable[int]] = ...) -> None: ...

class LoadRequest(_message.Message):
    __slots__ = ("placement",)
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    placement: HeldPlacement
    def __init__(self, placement: _Optional[_Union[HeldPlacement, _Mapping]] = ...) -> None: ...

class LoadResponse(_message.Message):
    __slots__ = ("description",)
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    description: DescribeResponse
    def __init__(self, description: _Optional[_Union[DescribeResponse, _Mapping]] = ...) -> None: ...

class UnloadRequest(_message.Message):
    __slots__ = ("epochs",)
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    epochs: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, epochs: _Optional[_Iterable[int]] = ...) -> None: ...

class UnloadResponse(_message.Message):
    __slots__ = ("description",)
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    description: DescribeResponse
    def __init__(self, description: _Optional[_Union[DescribeResponse, _Mapping]] = ...) -> None: ...

class ShardFrame(_message.Message):
    __slots__ = ("raw", "offer", "accepted")
    RAW_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    raw: bytes
    offer: SessionOffer
    accepted: DescribeResponse
    def __init__(self, raw: _Optional[bytes] = ..., offer: _Optional[_Union[SessionOffer, _Mapping]] = ..., accepted: _Optional[_Union[DescribeResponse, _Mapping]] = ...) -> None: ...

class SessionOffer(_message.Message):
    __slots__ = ("engine", "revision", "shape")
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    engine: str
    revision: str
    shape: ExpertShape
    def __init__(self, engine: _Optional[str] = ..., revision: _Optional[str] = ..., shape: _Optional[_Union[ExpertShape, _Mapping]] = ...) -> None: ...

class ProbeRequest(_message.Message):
    __slots__ = ("payload", "answer_bytes")
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    ANSWER_BYTES_FIELD_NUMBER: _ClassVar[int]
    payload: bytes
    answer_bytes: int
    def __init__(self, payload: _Optional[bytes] = ..., answer_bytes: _Optional[int] = ...) -> None: ...

class ProbeResponse(_message.Message):
    __slots__ = ("payload",)
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    payload: bytes
    def __init__(self, payload: _Optional[bytes] = ...) -> None: ...
