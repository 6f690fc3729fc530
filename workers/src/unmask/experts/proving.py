"""Whether a shard that comes back computes what it should: it is asked what is known already.

For each part, a frame is kept with the sums that came for it. A shard that begins a session is sent such a
frame of a part that it holds, and passed over until its sums are there and are those that are known: its
memory, its build or its processor may be another one's since. Weights are compared when a session begins.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.experts.frames import Frame, Header
from unmask.experts.placement import HeldParts

__all__ = ["Known", "Proofs", "difference"]

_SAME = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest difference of sums, over the largest of them, that another processor's rounding explains."""


@dataclass(frozen=True, slots=True)
class Known:
    """A frame, and its answer."""

    header: Header
    frame: bytes
    rows: Tensor
    """(T, D): the sums."""


class Proofs:
    """Frames with known answers, one for each part of the placement that was seen last."""

    def __init__(self) -> None:
        self._epoch = -1
        self._known: dict[int, Known] = {}

    def keep(self, header: Header, frame: Frame | bytes, rows_TD: Tensor) -> None:
        """Note a good answer, if none of as few rows is kept for its part."""
        if header.epoch != self._epoch:
            self._epoch = header.epoch
            self._known.clear()
        kept = self._known.get(header.part)
        if kept is None or header.tokens < kept.header.tokens:
            # Copies, since the rows of both may lie in memory that is used again.
            self._known[header.part] = Known(header, bytes(frame), rows_TD.clone())

    def for_holder(self, held: Mapping[int, HeldParts]) -> Known | None:
        """What to ask a shard that holds these; None if nothing is known of them."""
        placement = held.get(self._epoch)
        parts = () if placement is None else sorted(placement.parts & self._known.keys())
        return self._known[parts[0]] if parts else None


def difference(known: Known, rows_TD: Tensor) -> str:
    """How an answer differs from the known one, beyond what rounding explains; empty if it does not."""
    expected, got = known.rows.float(), rows_TD.float()
    largest = float(expected.abs().max())
    off = float((expected - got).abs().max())
    allowed = _SAME[known.rows.dtype]
    if off <= allowed * largest:
        return ""
    return f"sums differ by {off:.3g}, the largest is {largest:.3g} (at most {allowed:g} of it is rounding)"
