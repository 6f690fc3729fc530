"""Who takes part in the next forward, and with how many blocks: a decision alone.

A forward has room for so many blocks. The rule:

1. Requests that decode come first, those that have waited longest before the others. While some request is
   being read, a quarter of the room is kept for it.
2. What is left goes to requests that are being read, the first that came first, as many blocks as fit. But
   beside requests that decode, reading gets at most as many blocks as they have, or an eighth of the room if
   that is more.

So reading goes on in every forward, and so does decoding: with enough room every request takes part in each,
otherwise they take turns. A long prompt makes the forwards of those who decode longer by a bounded amount,
however long it is. And what a request gets depends on the others, but never what it does with it: to read a
prompt in more or fewer parts, or to wait, changes no token.
"""

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["SMALLEST_ROOM", "Wish", "share_forward"]

SMALLEST_ROOM = 4
"""Blocks: one for reading, two for a request that stores a block and begins the next, and one to spare."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What one request would do in the next forward."""

    ticket: int
    """Smaller for a request that came earlier."""
    blocks: int
    """Blocks that it has to read, of which any number will do; or those that it needs to decode."""
    reads: bool
    """Whether it reads, or decodes."""
    last_part: int = 0
    """Number of the last forward that it took part in."""


def share_forward(wishes: Iterable[Wish], *, room: int) -> dict[int, int]:
    """Blocks of each ticket in the next forward; tickets that must wait are left out.

    Args:
        wishes: Of all active requests, each with one block or more; decoding needs one or two.
        room: Blocks in one forward, at least :data:`SMALLEST_ROOM`.
    """
    assert room >= SMALLEST_ROOM
    wishes = list(wishes)
    reading = sorted((wish for wish in wishes if wish.reads), key=lambda wish: wish.ticket)
    decoding = sorted(
        (wish for wish in wishes if not wish.reads), key=lambda wish: (wish.last_part, wish.ticket)
    )
    kept = min(room // 4, sum(wish.blocks for wish in reading))
    shares = _in_turn(decoding, room - kept, whole=True)
    used = sum(shares.values())
    left = min(room - used, max(used, room // 8)) if used else room
    return shares | _in_turn(reading, left, whole=False)


def _in_turn(wishes: list[Wish], room: int, *, whole: bool) -> dict[int, int]:
    """Grant wishes in their order while there is room; those that want all or nothing may be passed over."""
    shares: dict[int, int] = {}
    for wish in wishes:
        share = min(wish.blocks, room)
        if share and (share == wish.blocks or not whole):
            shares[wish.ticket] = share
            room -= share
    return shares
