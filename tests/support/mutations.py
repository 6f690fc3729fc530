"""Damage to files: what storage, networks, editors and attackers do to bytes."""

import random

__all__ = ["mutated"]


def mutated(content: bytes, rng: random.Random) -> bytes:
    """``content`` with one change, drawn with ``rng``; it always differs."""
    while True:
        changed = rng.choice(_CHANGES)(bytearray(content), rng)
        if changed != content:
            return bytes(changed)


def _place(content: bytearray, rng: random.Random) -> int:
    """Anywhere, but half of the time near the start, where headers are."""
    return rng.randrange(min(len(content), 512) if rng.random() < 0.5 else len(content))


def _flip_a_bit(content: bytearray, rng: random.Random) -> bytearray:
    content[_place(content, rng)] ^= 1 << rng.randrange(8)
    return content


def _set_a_byte(content: bytearray, rng: random.Random) -> bytearray:
    content[_place(content, rng)] = rng.choice(b'\x00\xff\x7f\x80 "{}[],:019-.eE/\\' + rng.randbytes(4))
    return content


def _cut_off(content: bytearray, rng: random.Random) -> bytearray:
    return content[: _place(content, rng)]


def _drop(content: bytearray, rng: random.Random) -> bytearray:
    start = _place(content, rng)
    del content[start : start + rng.choice([1, 2, 8, 64])]
    return content


def _insert(content: bytearray, rng: random.Random) -> bytearray:
    start = _place(content, rng)
    content[start:start] = rng.randbytes(rng.choice([1, 2, 8, 64]))
    return content


def _repeat(content: bytearray, rng: random.Random) -> bytearray:
    start = _place(content, rng)
    part = content[start : start + rng.choice([1, 4, 16, 256])]
    content[start:start] = part
    return content


def _erase(content: bytearray, rng: random.Random) -> bytearray:
    start = _place(content, rng)
    stop = min(len(content), start + rng.choice([8, 64, 512]))
    content[start:stop] = bytes(stop - start)
    return content


def _enlarge_a_number(content: bytearray, rng: random.Random) -> bytearray:
    digits = [place for place, byte in enumerate(content[:4096]) if byte in b"123456789"]
    if digits:
        place = rng.choice(digits)
        content[place:place] = b"9" * rng.choice([1, 3, 12, 40])
    return content


_CHANGES = [
    _flip_a_bit,
    _set_a_byte,
    _cut_off,
    _drop,
    _insert,
    _repeat,
    _erase,
    _enlarge_a_number,
]
