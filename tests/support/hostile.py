"""Requests made to do harm: what a client that is broken, or wants to break a server, sends.

All begin as good requests whose texts hold :data:`MARKER`, which no answer that refuses one may repeat.
"""

import json
import random
import struct
from collections.abc import Callable
from typing import Any

from support.mutations import mutated
from unmask.v1 import generation_pb2 as pb

__all__ = ["MARKER", "body", "head", "message", "stream_message"]

MARKER = "zqx7 vwk9"
"""Not a name, for there is a space in it: names may be repeated."""
_TEXT = f"{MARKER} w5 w6 {MARKER}"
_BIG = 1 << 17
_FLOATS = [float("nan"), float("inf"), float("-inf"), -0.0, 5e-324, -1.0, 1e308, 1.0000001]
_INTEGERS = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 511, 512, 10**6]
_DIFFUSION = [
    "decoder",
    "threshold",
    "steps_per_block",
    "edit_threshold",
    "max_post_edit_steps",
    "block_length",
]


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
    if dice.random() < 0.3:
        request.diffusion.threshold, request.diffusion.steps_per_block = 0.5, 2
    if dice.random() < 0.2:
        request.committed_token_ids.extend([7, 8])
    if dice.random() < 0.2:
        request.request_id = "r1"
    return request


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


def _damaged(dice: random.Random) -> bytes:
    """Bytes of a good request, changed a few times."""
    content = _good(dice).SerializeToString() or b"\n"
    for _ in range(dice.choice([1, 1, 2, 5])):
        content = mutated(content, dice) or b"\n"
    return content


def _noise(dice: random.Random) -> bytes:
    return dice.randbytes(dice.choice([0, 1, 2, 7, 30, 200]))


def _strange_field(dice: random.Random) -> bytes:
    """A good request, and behind it a field whose type, length or value it cannot have."""
    number = dice.choice([1, 2, 3, 4, 5, 6, 7, 8, 9, 18999, (1 << 29) - 1, 0])
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
            lambda: _sized(6, _field(dice.choice([2, 4, 6]), 1, struct.pack("<d", dice.choice(_FLOATS)))),
            lambda: _sized(7, _field(dice.choice([2, 4]), 1, struct.pack("<d", dice.choice(_FLOATS)))),
            lambda: _sized(7, _field(1, 0, _varint(dice.choice([-1, 3, 4, 99, 2**31, 2**40])))),
            lambda: _sized(8, b"".join(_varint(dice.choice([-1, 512, *_INTEGERS])) for _ in range(5))),
            lambda: _sized(4, _sized(1, _varint(dice.choice(_INTEGERS)) * dice.choice([1, 70]))),
        ]
    )()
    return _good(dice).SerializeToString() + strange


def _nested(number: int, depth: int) -> bytes:
    content = b""
    for _ in range(depth):
        content = _sized(number, content)
    return content


def _strange_values(dice: random.Random) -> bytes:
    """A request that can be read, and whose values cannot be meant."""
    request = _good(dice)
    for _ in range(dice.choice([1, 1, 3])):
        dice.choice(_STRANGE)(request, dice)
    return request.SerializeToString()


def _any_sampling(request: pb.GenerateRequest, dice: random.Random) -> None:
    name = dice.choice(["temperature", "top_p", "repetition_penalty"])
    setattr(request.sampling, name, dice.choice(_FLOATS))


def _any_diffusion(request: pb.GenerateRequest, dice: random.Random) -> None:
    name = dice.choice(_DIFFUSION)
    values = _FLOATS if "threshold" in name else [0, 1, 2, 2**31 - 1]
    setattr(request.diffusion, name, dice.choice(values))


def _any_vicinity(request: pb.GenerateRequest, dice: random.Random) -> None:
    request.diffusion.decoder = pb.DECODER_LOW_CONFIDENCE
    request.diffusion.vicinity.before = dice.choice(_INTEGERS)


def _any_tools(request: pb.GenerateRequest, dice: random.Random) -> None:
    text = dice.choice(
        ["", "{", "[]", "null", "NaN", '{"a": "\\ud800"}', f'"{MARKER}"', "[" * 3000, "9" * 5000]
    )
    if dice.random() < 0.5:
        request.chat.tools.append(text)
    else:
        request.chat.messages.add(role="assistant").tool_calls.add(name="f", arguments=text)


def _any_text(request: pb.GenerateRequest, dice: random.Random) -> None:
    texts = ["", "\0", "\u202e" + MARKER, "\U0010ffff", "\n\n", MARKER * 50, "<mask> <eos>", "{{ 7 * 7 }}"]
    text = dice.choice(texts)
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


_STRANGE: list[Callable[[pb.GenerateRequest, random.Random], None]] = [
    _any_sampling,
    _any_diffusion,
    _any_vicinity,
    _any_tools,
    _any_text,
    _any_length,
    _large,
]


def message(dice: random.Random) -> bytes:
    """The bytes of a ``GenerateRequest``, or of what is to pass for one."""
    kinds = [_damaged, _strange_field, _strange_values, _strange_values]
    return (_noise if dice.random() < 0.1 else dice.choice(kinds))(dice)


def stream_message(dice: random.Random) -> bytes:
    """The same for ``GenerateStreamRequest``."""
    canvas = _sized(2, _field(1, 0, _varint(dice.choice([0, 1, 2, 2, 3, -1, 2**40]))))
    return _sized(1, message(dice)) + (canvas if dice.random() < 0.5 else b"")


# Over HTTP


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
    if dice.random() < 0.5:
        asked["diffusion"] = {"decoder": "threshold", "threshold": 0.5, "steps_per_block": 2}
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
        place = asked["diffusion"] if "diffusion" in asked and dice.random() < 0.4 else asked
        strange = ["n", "logit_bias", "user", "echo", MARKER, "a" * 300]
        name = dice.choice([*place, *place, *_DIFFUSION, *strange])
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
