"""What is noted of a step for people: where its time goes, how much is computed, the loss by mask ratio.

No result of training depends on it. Times are those of the first process, in whose log they are; counts are
of all. On a GPU the end of backward is waited for before the reduction begins, which waits for it anyway;
where weights are shared out, most of the reduction is part of backward.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unmask.attention.metadata import CLEAN, PADDING, AttentionMetadata
from unmask.diffusion.layout import ModelInputs
from unmask.diffusion.rows import PackedRows
from unmask.training.distributed import World
from unmask.training.sizing.work import Work

__all__ = ["BUCKETS", "EXPERT_COUNTS_EVERY", "StepWatch", "pairs_of"]

BUCKETS = 5
"""Of mask ratios: above 0 to 0.2, above 0.2 to 0.4, and so on."""

EXPERT_COUNTS_EVERY = 50
"""Steps from one list of all experts' tokens to the next: a large model has thousands of experts."""


class StepWatch:
    """Notes of one step."""

    def __init__(self, device: torch.device) -> None:
        """``device`` is that of the losses."""
        self.seconds: dict[str, float] = defaultdict(float)
        """By phase."""
        self._device, self._began = device, time.monotonic()
        # In rows: sums of losses, numbers of predictions, and in the last supervised, positions, predictions,
        # pairs. One tensor, so that one sum over all processes will do.
        self._sums = torch.zeros(3, BUCKETS, dtype=torch.float64, device=device)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A block whose time counts as ``name``."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        started = time.monotonic()
        if name == "reduce":
            self.seconds["forward_backward"] = started - self._began - self.seconds["data"]
        try:
            yield
        finally:
            self.seconds[name] += time.monotonic() - started

    def batches(self, batches: Iterator[ModelInputs]) -> Iterator[ModelInputs]:
        """``batches``, counted, and timed while they are made."""
        counts = np.zeros(3)
        while True:
            started = time.monotonic()
            inputs = next(batches, None)
            if inputs is not None:
                positions = int((inputs.metadata.document != PADDING).sum())
                counts += (positions, len(inputs.predict), pairs_of(inputs.metadata))
            self.seconds["data"] += time.monotonic() - started
            if inputs is None:
                break
            yield inputs
        self._sums[2, 1:4] += torch.from_numpy(counts).to(self._device)

    def note_rows(self, rows: PackedRows) -> None:
        """Note how many tokens are to be learnt."""
        self._sums[2, 0] += float(rows.supervised.sum())

    def note_losses(self, terms: Tensor, inputs: ModelInputs) -> None:
        """Note the loss of each prediction of ``inputs``, float32 (M,)."""
        if inputs.ratio is None:
            return
        bucket = (inputs.ratio * BUCKETS).ceil().long().clamp(1, BUCKETS) - 1
        self._sums[0].index_add_(0, bucket, terms.detach().double())
        self._sums[1] += torch.bincount(bucket, minlength=BUCKETS)

    def add_up(self, world: World) -> None:
        """Add up over all processes."""
        world.sum(self._sums)

    def work(self, tokens: int) -> Work:
        """What went through the model, of ``tokens`` tokens of documents; after :meth:`add_up`."""
        _, positions, predictions, pairs, _ = self._sums[2].tolist()
        return Work(tokens=tokens, positions=int(positions), predictions=predictions, pairs=int(pairs))

    def summary(
        self,
        *,
        tokens: int,
        seconds: float,
        useful_flops: float,
        peak_flops: float | None,
        expert_tokens: Sequence[Tensor],
        step: int,
    ) -> dict[str, Any]:
        """The notes, as the log has them; after :meth:`add_up`.

        Args:
            tokens: Of the step's documents.
            seconds: That it took.
            useful_flops: That it asked for.
            peak_flops: Of all devices together, if known.
            expert_tokens: For each router, int64 (experts,).
            step: Of the run, from 1; some notes are too long for every line.
        """
        supervised = float(self._sums[2, 0])
        found: dict[str, Any] = {
            "seconds": {name: round(value, 6) for name, value in self.seconds.items()},
            "tokens_per_second": tokens / seconds,
            "supervised_tokens": int(supervised),
            "supervised_tokens_per_second": supervised / seconds,
            "useful_flops": useful_flops,
        }
        if peak_flops is not None:
            found["mfu"] = useful_flops / (seconds * peak_flops)
        losses, counts, _ = self._sums.tolist()
        if any(counts):
            found["predictions_by_ratio"] = [int(count) for count in counts]
            found["loss_by_ratio"] = [
                loss / count if count and np.isfinite(loss) else None
                for loss, count in zip(losses, counts, strict=True)
            ]
        if expert_tokens:
            found["expert_imbalance"] = [
                round(float(tokens.max() / tokens.double().mean().clamp(min=1e-9)), 4)
                for tokens in expert_tokens
            ]
            found["experts_unused"] = sum(int((tokens == 0).sum()) for tokens in expert_tokens)
            if step == 1 or step % EXPERT_COUNTS_EVERY == 0:
                found["expert_tokens"] = [tokens.tolist() for tokens in expert_tokens]
        return found


def pairs_of(metadata: AttentionMetadata) -> int:
    """How many pairs of a query and a key the attention rule allows, padding left out.

    Counted from the numbers of tokens in each block, without the dense mask.
    """
    row = np.broadcast_to(np.arange(metadata.shape[0])[:, None], metadata.shape)
    document, block, view = (
        part.cpu().numpy() for part in (metadata.document, metadata.block, metadata.view)
    )
    real = document != PADDING
    row, document, block, view = row[real], document[real], block[real], view[real]
    if not len(row):
        return 0
    blocks, documents = int(block.max()) + 1, int(document.max()) + 1
    text = (row * documents + document) * blocks
    code, noisy = text + block, view != CLEAN
    clean = np.sort(code[~noisy])
    # A clean token sees the clean blocks up to its own, a noisy one those before its own, and its own copy.
    ends = np.where(noisy, np.searchsorted(clean, code, "left"), np.searchsorted(clean, code, "right"))
    _, own = np.unique(np.stack([code[noisy], view[noisy]]), axis=1, return_counts=True)
    return int((ends - np.searchsorted(clean, text, "left")).sum() + (own.astype(np.int64) ** 2).sum())
