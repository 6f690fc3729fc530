"""Requests made to do harm: what a client that is broken, or wants to break a server, sends.

All begin as good requests whose texts hold :data:`MARKER`, which no answer that refuses one may repeat. Which
fields there are, the descriptors of the wire and the models of the HTTP front say: one that comes is tried.
"""

import json
import random
import struct
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeAlias

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from support.mutations import mutated
from unmask.fronts.openai_wire import ChatRequest, CompletionRequest
from unmask.serving.decoders import DECODERS, Decoder
from unmask.v1 import control_pb2
from unmask.v1 import generation_pb2 as pb

__all__ = ["CONTROL", "MARKER", "body", "control", "fields_of", "head", "message", "stream_message"]

Path: TypeAlias = tuple[FieldDescriptor, ...]
"""Of a value in a message: the fields on the way there, its own the last."""

MARKER = "zqx7 vwk9"
"""Not a name, for there is a space in it: names may be repeated."""
_TEXT = f"{MARKER} w5 w6 {MARKER}"
_BIG = 1 << 17
_FLOATS = [float("nan"), float("inf"), float("-inf"), -0.0, 5e-324, -1.0, 1e308, 1.0000001]
_INTEGERS = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 511, 512, 10**6]
_BORDERS = [*_INTEGERS, -1, 100, 101, -100, -101, -(2**31), 2**32, 2**63 - 1, 2**64 - 1]
_TEXTS = ["", "\0", "\u202e" + MARKER, "\U0010ffff", "\n\n", MARKER * 50, "<mask> <eos>", "{{ 7 * 7 }}"]
_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_ORDINARY: dict[str, float] = {
    "threshold": 0.5,
    "steps_per_block": 2,
    "edit_threshold": 0.6,
    "max_post_edit_steps": 2,
    "low_threshold": 0.2,
    "credit_weight": 1.5,
    "credit_decay": 0.5,
    "credit_exponent": 1.0,
    "entropy_bound": 2.0,
}
"""Values that the parameters of decoders may have."""
_SERVICE = control_pb2.DESCRIPTOR.services_by_name["Control"]
CONTROL: dict[str, Descriptor] = {
    f"/{_SERVICE.full_name}/{method.name}": method.input_type for method in _SERVICE.methods
}
"""The methods of those who run a server, and what each takes."""
_FOLDERS = [
    "other", "tiny", "cut", "empty", "circle", "missing", "other/config.json", "other/.", "tiny/../other",
    "../" * 40 + "etc/passwd", "/proc/self/mem", "/dev/zero", ".", "..", "~", "$HOME", "%2e%2e/other",
    "\\\\host\\a", "other\0", MARKER, f"other/{MARKER}", f"{MARKER}/../other", "a" * 300, "a/" * 3000,
    "\n" + MARKER, "\u202e",
]  # fmt: skip
"""What may be said for a folder of weights; those without a path are some that a test may have made."""


@cache
def fields_of(descriptor: Descriptor) -> list[Path]:
    """The ways to all values that a message can hold, those of messages inside included."""
    paths: list[Path] = []
    for field in descriptor.fields:
        inside = fields_of(field.message_type) if field.message_type else [()]
        paths += [(field, *path) for path in inside]
    return paths


def _values(field: FieldDescriptor) -> Sequence[Any]:
    """What a field can hold, at the borders of its type and of what is meant by it, and beyond these."""
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
            return _FLOATS
        case FieldDescriptor.CPPTYPE_BOOL:
            return [False, True]
        case FieldDescriptor.CPPTYPE_ENUM:
            assert field.enum_type
            return [*field.enum_type.values_by_number, -1, 99, 2**31 - 1]
        case FieldDescriptor.CPPTYPE_STRING:
            return _TEXTS
    least, most = _RANGES[field.cpp_type]
    return [number for number in _BORDERS if least <= number <= most]


def _put(message: Message, path: Path, dice: random.Random) -> None:
    """Give the value at ``path`` something that it can hold."""
    *way, field = path
    for step in way:
        inside = getattr(message, step.name)
        message = inside.add() if step.is_repeated else inside
    value = dice.choice(_values(field))
    if field.is_repeated:
        getattr(message, field.name).extend([value] * dice.choice([1, 1, 17, 70]))
    else:
        setattr(message, field.name, value)


def _any_field(message: Message, dice: random.Random) -> None:
    """Any value that the message can hold, however deep inside."""
    if paths := fields_of(message.DESCRIPTOR):
        _put(message, dice.choice(paths), dice)


def _good(dice: random.Random) -> pb.GenerateRequest:
    request = pb.GenerateRequest()
    match dice.randrange(4):
        case 0 | 1:
            request.text = _TEXT
        case 2:
            request.token_ids.ids.extend([5, 6, 7])
        case 3:
            request.chat.messages.add(role="user", content=_TEXT)
            calls = request.chat.messages.add(role="assistant").tool_calls
            calls.add(id="c1", name="look", arguments=json.dumps({"word": MARKER}))
            request.chat.messages.add(role="tool", content=_TEXT, tool_call_id="c1", name="look")
            request.chat.tools.append(json.dumps({"name": "look", "description": MARKER}))
    if dice.random() < 0.5:
        request.sampling.max_tokens = dice.randint(1, 12)
    if dice.random() < 0.3:
        request.sampling.temperature, request.sampling.seed = 0.7, dice.getrandbits(64)
        request.sampling.top_p, request.sampling.top_k = 0.9, 5
    if dice.random() < 0.3:
        request.sampling.stop.extend(["w9", MARKER])
        request.sampling.stop_token_ids.append(9)
    if dice.random() < 0.15:
        request.diffusion.threshold, request.diffusion.steps_per_block = 0.5, 2
    elif dice.random() < 0.2:
        _choose(dice.choice(DECODERS), request.diffusion, dice)
    if dice.random() < 0.1:
        request.priority, request.cache_salt, request.trace = dice.randint(-100, 100), MARKER, True
    if dice.random() < 0.2:
        request.committed_token_ids.extend([7, 8])
    if dice.random() < 0.2:
        request.request_id = "r1"
    return request


def _choose(decoder: Decoder, diffusion: pb.DiffusionParams, dice: random.Random) -> None:
    """A decoder, and some of its parameters."""
    diffusion.decoder = decoder.wire
    for name in decoder.parameters:
        if name in _ORDINARY and dice.random() < 0.5:
            setattr(diffusion, name, _ORDINARY[name])


def _varint(value: int) -> bytes:
    """``value`` as it stands in a message; a negative one as 64 bits, a larger one in as many as it takes."""
    value = value if value >= 0 else value + (1 << 64)
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def _field(number: int, wire_type: int, content: bytes) -> bytes:
    return _varint(number << 3 | wire_type) + content


def _sized(number: int, content: bytes) -> bytes:
    return _field(number, 2, _varint(len(content)) + content)


def _damaged(good: Message, dice: random.Random) -> bytes:
    """Bytes of a good request, changed a few times."""
    content = good.SerializeToString() or b"\n"
    for _ in range(dice.choice([1, 1, 2, 5])):
        content = mutated(content, dice) or b"\n"
    return content


def _noise(dice: random.Random) -> bytes:
    return dice.randbytes(dice.choice([0, 1, 2, 7, 30, 200]))


def _strange_field(good: Message, dice: random.Random) -> bytes:
    """A good request, and behind it a field whose type, length or value it cannot have."""
    fields = good.DESCRIPTOR.fields
    number = dice.choice([*(field.number for field in fields), 18999, (1 << 29) - 1, 0])
    holding = [field for field in fields if field.message_type]
    strange = dice.choice(
        [
            lambda: _field(number, dice.randrange(8), dice.randbytes(9)),
            lambda: _field(number, 0, _varint(dice.choice([-1, 2**63, 2**64, 2**80, *_INTEGERS]))),
            lambda: _field(number, 0, b"\xff" * dice.choice([9, 10, 11, 40])),
            lambda: _field(number, 2, _varint(dice.choice([2**31, 2**40, 2**64 - 1]))),
            lambda: _sized(number, dice.choice([b"\xff\xfe", b"\xc0\x80", b"\xed\xa0\x80", b"\xf8" * 9])),
            lambda: _sized(number, MARKER.encode() * dice.choice([1, 100])),
            lambda: _nested(number, dice.choice([3, 99, 101, 2000])),
            lambda: _field(number, 3, b"") * dice.choice([1, 50, 5000]),
            lambda: _sized(number, b"".join(_varint(dice.choice([-1, 512, *_INTEGERS])) for _ in range(5))),
            *[lambda: _strange_inside(dice.choice(holding), dice)] * (4 if holding else 0),
        ]
    )()
    return good.SerializeToString() + strange


def _strange_inside(outer: FieldDescriptor, dice: random.Random) -> bytes:
    """A message inside, of which one field has any type and value."""
    assert outer.message_type
    number = dice.choice(outer.message_type.fields).number
    inside = dice.choice(
        [
            lambda: _field(number, 1, struct.pack("<d", dice.choice(_FLOATS))),
            lambda: _field(number, 0, _varint(dice.choice([-1, 3, 4, 99, 2**31, 2**40]))),
            lambda: _sized(number, _varint(dice.choice(_INTEGERS)) * dice.choice([1, 70])),
            lambda: _sized(number, dice.choice([b"\xff\xfe", MARKER.encode()])),
        ]
    )()
    return _sized(outer.number, inside)


def _nested(number: int, depth: int) -> bytes:
    content = b""
    for _ in range(depth):
        content = _sized(number, content)
    return content


def _any_sampling(request: pb.GenerateRequest, dice: random.Random) -> None:
    _put(request.sampling, dice.choice(fields_of(pb.SamplingParams.DESCRIPTOR)), dice)


def _any_diffusion(request: pb.GenerateRequest, dice: random.Random) -> None:
    _put(request.diffusion, dice.choice(fields_of(pb.DiffusionParams.DESCRIPTOR)), dice)


def _any_parameter(request: pb.GenerateRequest, dice: random.Random) -> None:
    """One that the decoder has, so that it is refused for its value if it is."""
    decoder = dice.choice(DECODERS)
    request.diffusion.Clear()
    request.diffusion.decoder = decoder.wire
    paths = [path for path in fields_of(pb.DiffusionParams.DESCRIPTOR) if path[0].name in decoder.parameters]
    _put(request.diffusion, dice.choice(paths), dice)


def _any_tools(request: pb.GenerateRequest, dice: random.Random) -> None:
    text = dice.choice(
        ["", "{", "[]", "null", "NaN", '{"a": "\\ud800"}', f'"{MARKER}"', "[" * 3000, "9" * 5000]
    )
    if dice.random() < 0.5:
        request.chat.tools.append(text)
    else:
        request.chat.messages.add(role="assistant").tool_calls.add(name="f", arguments=text)


def _any_text(request: pb.GenerateRequest, dice: random.Random) -> None:
    text = dice.choice(_TEXTS)
    name = dice.choice(["text", "model", "request_id", "role", "stop"])
    if name == "role":
        request.chat.messages.add(role=text, content=text)
    elif name == "stop":
        request.sampling.stop.extend([text] * dice.choice([1, 17]))
    else:
        setattr(request, name, text)


def _any_length(request: pb.GenerateRequest, dice: random.Random) -> None:
    request.sampling.max_tokens = dice.choice(_INTEGERS)
    if dice.random() < 0.3:
        request.committed_token_ids.extend([dice.choice([5, 510, 511, 512])] * dice.choice([1, 64, 5000]))
    if dice.random() < 0.3:
        request.sampling.stop_token_ids.extend([dice.choice(_INTEGERS)] * dice.choice([1, 65]))


def _large(request: pb.GenerateRequest, dice: random.Random) -> None:
    if dice.random() < 0.005:
        setattr(request, dice.choice(["text", "model", "request_id"]), MARKER * (_BIG // len(MARKER)))


_STRANGE: list[Callable[[Any, random.Random], None]] = [
    _any_field,
    _any_field,
    _any_sampling,
    _any_diffusion,
    _any_parameter,
    _any_tools,
    _any_text,
    _any_length,
    _large,
]


def _spoilt(
    good: Message, dice: random.Random, strange: Sequence[Callable[[Any, random.Random], None]]
) -> bytes:
    """The bytes of a message, or of what is to pass for one.

    Args:
        good: What could be meant.
        dice: Says what becomes of it.
        strange: Changes after which it can be read, and cannot be meant.
    """
    if dice.random() < 0.1:
        return _noise(dice)
    match dice.randrange(4):
        case 0:
            return _damaged(good, dice)
        case 1:
            return _strange_field(good, dice)
    for _ in range(dice.choice([1, 1, 3])):
        dice.choice(strange)(good, dice)
    return good.SerializeToString()


def message(dice: random.Random) -> bytes:
    """The bytes of a ``GenerateRequest``, or of what is to pass for one."""
    return _spoilt(_good(dice), dice, _STRANGE)


def stream_message(dice: random.Random) -> bytes:
    """The same for ``GenerateStreamRequest``."""
    canvas = _sized(2, _field(1, 0, _varint(dice.choice([0, 1, 2, 2, 3, -1, 2**40]))))
    return _sized(1, message(dice)) + (canvas if dice.random() < 0.5 else b"")


# To those who run the server


def _any_folder(request: Any, dice: random.Random) -> None:
    if isinstance(request, control_pb2.UpdateWeightsRequest):
        request.folder = dice.choice(_FOLDERS)


def _too_many_names(request: Any, dice: random.Random) -> None:
    if isinstance(request, control_pb2.AbortRequest) and dice.random() < 0.1:
        request.request_ids.extend(["r"] * 20_000)


def control(method: str, dice: random.Random) -> bytes:
    """The bytes of a request for one of the methods of :data:`CONTROL`."""
    request = GetMessageClass(CONTROL[method])()
    if isinstance(request, control_pb2.AbortRequest):
        if dice.random() < 0.5:
            request.all = True
        else:
            request.request_ids.extend(["r1", MARKER])
    if isinstance(request, control_pb2.UpdateWeightsRequest):
        request.folder = "other"
    return _spoilt(request, dice, [_any_field, _any_folder, _any_folder, _too_many_names])


# Over HTTP

_DIFFUSION = [*pb.DiffusionParams.DESCRIPTOR.fields_by_name]
_BODY = [*dict.fromkeys((*CompletionRequest.model_fields, *ChatRequest.model_fields))]
"""All fields of both endpoints."""


def _good_body(dice: random.Random) -> dict[str, Any]:
    asked: dict[str, Any] = {
        "model": "tiny",
        "max_tokens": dice.randint(1, 12),
        "stream": dice.random() < 0.3,
    }
    if dice.random() < 0.5:
        asked["prompt"] = _TEXT
    else:
        call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
        asked["messages"] = [
            {"role": "user", "content": _TEXT},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": [{"type": "text", "text": MARKER}], "tool_call_id": "c1"},
        ]
        asked["tools"] = [{"type": "function", "function": {"name": "look", "description": MARKER}}]
    if dice.random() < 0.5:
        asked |= {"temperature": 0.7, "top_p": 0.9, "seed": 3, "stop": ["w9", MARKER]}
    if dice.random() < 0.3:
        asked["diffusion"] = {"decoder": "threshold", "threshold": 0.5, "steps_per_block": 2}
    elif dice.random() < 0.3:
        decoder = dice.choice(DECODERS)
        values = {name: value for name, value in _ORDINARY.items() if name in decoder.parameters}
        asked["diffusion"] = {"decoder": decoder.name, **values}
    if dice.random() < 0.2:
        asked |= {"priority": dice.randint(-100, 100), "cache_salt": MARKER, "trace": True}
    return asked


def _strange_json(dice: random.Random) -> str:
    return dice.choice(
        [
            "NaN",
            "-Infinity",
            "1e999",
            "-1",
            "18446744073709551616",
            "9" * 400,
            "1.5",
            '""',
            '"\\ud800"',
            '"\\u0000"',
            f'"{MARKER}"',
            f'["{MARKER}"]',
            f'{{"{MARKER}": 1}}',
            "null",
            "true",
            "[]",
            "{}",
            "[" * 300 + "]" * 300,
            "[" * 50_000,
            '{"a":' * 400 + "1" + "}" * 400,
        ]
    )


def body(dice: random.Random) -> tuple[str, bytes]:
    """A path, and the body of a request there."""
    asked = _good_body(dice)
    path = "/v1/completions" if "prompt" in asked else "/v1/chat/completions"
    if dice.random() < 0.1:
        path = "/v1/chat/completions" if "prompt" in asked else "/v1/completions"
    kind = dice.randrange(5)
    if kind == 0:
        return path, _noise(dice)
    if kind in (1, 2):
        inside = "diffusion" in asked and dice.random() < 0.4
        place, names = (asked["diffusion"], _DIFFUSION) if inside else (asked, _BODY)
        name = dice.choice([*place, *place, *names, MARKER, "a" * 300])
        place[name] = "@@"
        return path, json.dumps(asked).replace('"@@"', _strange_json(dice)).encode()
    content = json.dumps(asked).encode()
    for _ in range(dice.choice([1, 1, 2, 5])):
        content = mutated(content, dice) or b"{"
    return path, content


def head(dice: random.Random) -> bytes:
    """A whole HTTP request whose lines, headers or lengths are not in order."""
    content = json.dumps({"model": "tiny", "prompt": "w5", "max_tokens": 1}).encode()
    lines = [
        b"POST /v1/completions HTTP/1.1",
        b"Host: a",
        b"Content-Type: application/json",
        b"Authorization: Bearer " + MARKER.encode(),
        b"Content-Length: %d" % len(content),
    ]
    whole = b"\r\n".join([*lines, b"", content])
    return mutated(whole, dice) if dice.random() < 0.7 else _noise(dice) + b"\r\n\r\n"
