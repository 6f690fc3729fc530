"""Which replica a call goes to: decisions alone.

Calls whose prompts begin with the same whole blocks go to the same replica, which has them in its cache, as
long as it does not have much more to do than the others; all other calls go where least is to be done.

A prompt's replica is the one with the highest hash of both (rendezvous hashing): it does not depend on who
asks, and where a replica goes or comes only the prompts move that were or will be its own.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import Literal

from unmask.v1 import generation_pb2 as pb

__all__ = ["Candidate", "Choice", "choose", "eligible", "estimated_load", "prefix_of"]

_BYTES_A_TOKEN = 4
"""Of text, roughly: there is no tokenizer here. What counts is that the same beginnings are cut alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A replica as far as routing is concerned."""

    name: str
    load: int
    """Calls that run or wait there."""
    last: int = 0
    """Which of all calls it was given last: among equals, whose was the longest ago is next."""
    serving: bool = True
    """Whether it says that it takes new calls."""
    banned: bool = False
    """Whether it has failed of late."""
    revision: str | None = None
    """Of its weights, if it says so."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Where a call goes, and why."""

    name: str
    by: Literal["prefix", "load"]


def prefix_of(request: pb.GenerateRequest, *, block_length: int, blocks: int) -> bytes | None:
    """What stands for the first whole blocks of a prompt, at most ``blocks`` of them.

    Caches share nothing between requests of different salts, so these have nothing in common here, either.

    Returns:
        None where there is not one whole block: such a prompt finds nothing in any cache.
    """
    kind = request.WhichOneof("prompt")
    if kind == "token_ids":
        ids = request.token_ids.ids
        count = min(blocks, len(ids) // block_length)
        told = b"".join(token.to_bytes(4, "little") for token in islice(ids, count * block_length))
    else:
        unit = block_length * _BYTES_A_TOKEN
        parts = _words(request.chat) if kind == "chat" else iter([request.text])
        text = _beginning(parts, blocks * unit)
        count = len(text) // unit
        told = text[: count * unit]
    if not count:
        return None
    salted = request.cache_salt.encode()
    return blake2b(b"%d:%b%b:%b" % (len(salted), salted, str(kind).encode(), told), digest_size=16).digest()


def estimated_load(*, own: int, reported: int, own_then: int) -> int:
    """Calls that a replica has: those of this gateway, and those of others.

    Args:
        own: Calls that this gateway has there now.
        reported: What the replica said that it had, these included.
        own_then: Calls that this gateway had there when that was asked.
    """
    return own + max(0, reported - own_then)


def eligible(
    candidates: Iterable[Candidate], *, tried: Collection[str], revision: str | None
) -> list[Candidate]:
    """Those that a call may go to.

    Where only banned ones are left it is these: better one that has failed than none.

    Args:
        candidates: All there are.
        tried: Names of those that it has been to.
        revision: Of the weights that its answer has begun with; None if it has not begun.
    """
    able = [
        candidate
        for candidate in candidates
        if candidate.serving
        and candidate.name not in tried
        and (revision is None or candidate.revision == revision)
    ]
    return [candidate for candidate in able if not candidate.banned] or able


def choose(candidates: Sequence[Candidate], *, prefix: bytes | None, bound: float) -> Choice | None:
    """The replica for a call.

    Args:
        candidates: Those that it may go to.
        prefix: What its prompt begins with, if replicas may have that.
        bound: How many times the mean load a replica may have, this call included, and be chosen for the
            prefix; at least 1.

    Returns:
        None if there are no candidates.
    """
    if not candidates:
        return None
    if prefix is not None:
        home = max(candidates, key=lambda candidate: _weight(prefix, candidate.name))
        calls = 1 + sum(candidate.load for candidate in candidates)
        if home.load + 1 <= math.ceil(bound * calls / len(candidates)):
            return Choice(home.name, "prefix")
    least = min(candidates, key=lambda candidate: (candidate.load, candidate.last, candidate.name))
    return Choice(least.name, "load")


def _weight(prefix: bytes, name: str) -> tuple[bytes, str]:
    return blake2b(name.encode(), key=prefix, digest_size=16).digest(), name


def _words(chat: pb.Chat) -> Iterator[str]:
    """A conversation from its beginning; templates write tools in front."""
    yield from chat.tools
    for message in chat.messages:
        yield f"\0{message.role}\0{message.content}\0"
        for call in message.tool_calls:
            yield f"{call.name}\0{call.arguments}\0"


def _beginning(parts: Iterable[str], size: int) -> bytes:
    """The first ``size`` bytes, of which a megabyte that follows need not be encoded."""
    told = b""
    for part in parts:
        told += part[: size - len(told)].encode()
        if len(told) >= size:
            break
    return told[:size]
