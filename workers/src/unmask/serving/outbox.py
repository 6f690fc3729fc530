"""What one request has to say and its client has not read yet.

The model thread puts, the network side takes. The model thread never waits for a client, and a slow client
cannot make the server's memory grow beyond its own answer: what is committed is kept, at most
``max_new_tokens`` tokens, and canvas updates that were not read in time are merged, so that at most one
remains per block. Traces have a limit of their own.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from unmask.diffusion.batch import Committed, Filled, Finished
from unmask.serving.tracing import Traced

__all__ = ["Admitted", "Failed", "Item", "Outbox", "TracedBlock"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """The request has a row in the batch."""

    queue_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The request ends without a result."""

    error: Exception


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedBlock:
    """What forwards did for the request since the last block, up to the one after which the next follows."""

    forwards: tuple[Traced, ...]


Item = Admitted | Filled | TracedBlock | Committed | Finished | Failed


class Outbox:
    """An ordered queue of items in which neighbouring canvas updates of a block melt together.

    Thread-safe. ``notify`` is called after each put, on the putting thread; it must not block.
    """

    def __init__(self, notify: Callable[[], object]) -> None:
        self._notify = notify
        self._items: list[Item] = []
        self._lock = threading.Lock()

    def put(self, item: Item) -> bool:
        """Append ``item``; returns whether it was merged into one that waits."""
        with self._lock:
            last = self._items[-1] if self._items else None
            merged = (
                isinstance(item, Filled) and isinstance(last, Filled) and last.block_index == item.block_index
            )
            if merged:
                assert isinstance(item, Filled) and isinstance(last, Filled)
                self._items[-1] = _merge(last, item)
            else:
                self._items.append(item)
        self._notify()
        return merged

    def take(self) -> list[Item]:
        """Everything that waits, oldest first."""
        with self._lock:
            items, self._items = self._items, []
        return items


def _merge(earlier: Filled, later: Filled) -> Filled:
    """Both updates as one; of a position that was edited in between, what it holds now."""
    held = {
        position: (token, confidence)
        for update in (earlier, later)
        for position, token, confidence in zip(
            update.positions, update.token_ids, update.confidences, strict=True
        )
    }
    return Filled(
        ticket=later.ticket,
        block_index=later.block_index,
        step=later.step,
        positions=tuple(held),
        token_ids=tuple(token for token, _ in held.values()),
        confidences=tuple(confidence for _, confidence in held.values()),
        masks_left=later.masks_left,
        edited=earlier.edited + later.edited,
    )
