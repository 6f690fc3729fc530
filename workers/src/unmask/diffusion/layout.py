"""From packed rows to what a model is run on: token ids, who is who, and what is predicted where.

Three objectives, one result. The full-sequence and block objectives are same-position
predictions on masked tokens; the autoregressive one predicts each next token.

The block objective runs the model on ``[x_t ; x_0]`` (LLaDA2.0, arXiv 2512.15745,
equation 3): noisy copies of the row, one per view, and one clean copy that all of them
share. Tokens whose result nobody reads are left out, which changes no result:

* the last block of each document in the clean copy, which no noisy block may see;
* in the noisy copies, blocks without a supervised token, such as those of a prompt.

Shape letters: V views, B rows, L tokens of a packed row, S tokens of a model row, M
predictions.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unmask.attention import CLEAN, PADDING, AttentionMetadata
from unmask.diffusion.noise import Corruption
from unmask.diffusion.rows import PackedRows

__all__ = ["ModelInputs", "causal", "full_sequence", "two_copy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInputs:
    """One forward and its loss."""

    ids: Tensor
    """int64 (B, S)."""
    metadata: AttentionMetadata
    predict: Tensor
    """int64 (M,): indices into the B x S hidden states, flattened, that predict something."""
    targets: Tensor
    """int64 (M,): what they should predict."""
    weights: Tensor
    """float32 (M,): how much each counts."""
    normaliser: float
    """What the weighted sum is to be divided by; it adds up over micro-batches and ranks."""

    def to(self, device: torch.device | str) -> Self:
        """The same on ``device``."""
        moved = {
            name: getattr(self, name).to(device)
            for name in ("ids", "metadata", "predict", "targets", "weights")
        }
        return replace(self, **moved)


@dataclass(frozen=True, slots=True)
class _Copy:
    """One copy of the packed rows as it goes into the model; arrays of shape (B, L)."""

    ids: NDArray[np.int64]
    block: NDArray[np.int64]
    view: int
    kept: NDArray[np.bool_]
    """Tokens that enter the model at all."""
    predicted: NDArray[np.bool_]
    weight: NDArray[np.float32]


def causal(rows: PackedRows) -> ModelInputs:
    """Next-token prediction inside each document; the loss is the mean over supervised tokens."""
    continues = np.zeros(rows.shape, np.bool_)
    continues[:, :-1] = (rows.document[:, 1:] == rows.document[:, :-1]) & rows.supervised[:, 1:]
    continues &= rows.document >= 0
    predict = np.flatnonzero(continues)
    metadata = AttentionMetadata.causal(torch.from_numpy(rows.position), torch.from_numpy(rows.document))
    return ModelInputs(
        ids=torch.from_numpy(rows.ids),
        metadata=metadata,
        predict=torch.from_numpy(predict),
        targets=torch.from_numpy(rows.ids.ravel()[predict + 1]),
        weights=torch.ones(len(predict)),
        normaliser=float(len(predict)),
    )


def full_sequence(
    rows: PackedRows, corruption: Corruption, *, mask_token_id: int, flat: bool = False
) -> ModelInputs:
    """Full-sequence diffusion (equation 2): every token of a noisy copy sees all of its document's copy."""
    block = np.zeros(rows.shape, np.int64)
    copies = _noisy_copies(rows, corruption, block, rows.document >= 0, mask_token_id, flat)
    return _assemble(rows, copies, normaliser=_normaliser(rows, corruption, flat))


def two_copy(
    rows: PackedRows,
    corruption: Corruption,
    *,
    block_length: int,
    mask_token_id: int,
    flat: bool = False,
    global_grid: bool = False,
    leave_out_unread: bool = True,
) -> ModelInputs:
    """Block diffusion (equation 1) on the noisy copies and one clean copy.

    Args:
        rows: Packed documents.
        corruption: Their masks.
        block_length: Tokens per block.
        mask_token_id: What stands at masked positions.
        flat: Weight 1 instead of 1/t.
        global_grid: Whether blocks are counted from the row's start, as in the papers, where a
            block that crosses into the next document is cut there; by default from each
            document's start, so that a document is trained alike wherever it is packed.
        leave_out_unread: Leave out the tokens whose result nobody reads (see the module).
    """
    place = np.broadcast_to(np.arange(rows.shape[1]), rows.shape) if global_grid else rows.position
    block = place // block_length
    real = rows.document >= 0
    noisy_kept, clean_kept = real, real
    if leave_out_unread:
        noisy_kept = real & _any_in_block(rows, block, rows.supervised)
        clean_kept = real & ~_in_last_block(rows, block)
    noisy = _noisy_copies(rows, corruption, block, noisy_kept, mask_token_id, flat)
    nothing = np.zeros(rows.shape, np.bool_)
    clean = _Copy(rows.ids, block, CLEAN, clean_kept, nothing, nothing.astype(np.float32))
    return _assemble(rows, [*noisy, clean], normaliser=_normaliser(rows, corruption, flat))


def _noisy_copies(
    rows: PackedRows,
    corruption: Corruption,
    block: NDArray[np.int64],
    kept: NDArray[np.bool_],
    mask_token_id: int,
    flat: bool,
) -> list[_Copy]:
    copies = []
    for view, (masked, ratio) in enumerate(zip(corruption.masked, corruption.ratio, strict=True), start=1):
        ids = np.where(masked, mask_token_id, rows.ids)
        weight = np.ones_like(ratio) if flat else 1 / ratio
        copies.append(_Copy(ids, block, view, kept, masked, weight))
    return copies


def _normaliser(rows: PackedRows, corruption: Corruption, flat: bool) -> float:
    """Masked tokens for the flat weight; for 1/t, the supervised tokens of all views."""
    if flat:
        return float(corruption.masked.sum())
    return float(rows.supervised.sum() * len(corruption.masked))


def _assemble(rows: PackedRows, copies: list[_Copy], *, normaliser: float) -> ModelInputs:
    """Lay the kept tokens of all copies side by side and close the gaps; short rows end in padding."""
    kept = np.concatenate([copy.kept for copy in copies], axis=1)
    order = np.argsort(~kept, axis=1, kind="stable")[:, : max(1, int(kept.sum(1).max()))]
    real = np.take_along_axis(kept, order, 1)

    def gathered(parts: list[NDArray[Any]], filler: int = 0) -> NDArray[Any]:
        return np.where(real, np.take_along_axis(np.concatenate(parts, axis=1), order, 1), filler)

    def tensor(parts: list[NDArray[Any]], filler: int = 0) -> Tensor:
        return torch.from_numpy(gathered(parts, filler).astype(np.int64, copy=False))

    metadata = AttentionMetadata(
        position=tensor([rows.position for _ in copies]),
        document=tensor([rows.document for _ in copies], PADDING),
        block=tensor([copy.block for copy in copies]),
        view=tensor([np.full(rows.shape, copy.view) for copy in copies]),
    )
    predict = np.flatnonzero(gathered([copy.predicted for copy in copies]))
    return ModelInputs(
        ids=tensor([copy.ids for copy in copies]),
        metadata=metadata,
        predict=torch.from_numpy(predict),
        targets=tensor([rows.ids for _ in copies]).flatten()[torch.from_numpy(predict)],
        weights=torch.from_numpy(
            gathered([copy.weight for copy in copies]).ravel()[predict].astype(np.float32)
        ),
        normaliser=normaliser,
    )


def _block_keys(rows: PackedRows, block: NDArray[np.int64]) -> NDArray[np.int64]:
    """A number per token, equal just for tokens of one block of one document of one row."""
    row = np.arange(rows.shape[0])[:, None]
    width = int(block.max(initial=0)) + 1
    documents = int(rows.document.max(initial=0)) + 2
    return (row * documents + rows.document + 1) * width + block


def _any_in_block(rows: PackedRows, block: NDArray[np.int64], flag: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """For each token, whether ``flag`` holds for any token of its block."""
    keys = _block_keys(rows, block)
    counts = np.bincount(keys.ravel(), weights=flag.ravel(), minlength=int(keys.max()) + 1)
    found: NDArray[np.bool_] = counts[keys] > 0
    return found


def _in_last_block(rows: PackedRows, block: NDArray[np.int64]) -> NDArray[np.bool_]:
    """For each token, whether its block is the last of its document."""
    documents = _block_keys(rows, np.zeros_like(block))
    last = np.zeros(int(documents.max()) + 1, np.int64)
    np.maximum.at(last, documents.ravel(), block.ravel())
    found: NDArray[np.bool_] = block == last[documents]
    return found
