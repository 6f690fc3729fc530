"""From packed rows to what a model is run on: token ids, who is who, and what is predicted where.

Three objectives, one result. The full-sequence and block objectives are same-position
predictions on masked tokens; the autoregressive one predicts each next token.

The block objective runs the model on ``[x_t ; x_0]`` (LLaDA2.0, arXiv 2512.15745,
equation 3): noisy copies of the row, one per view, and one clean copy that all of them
share. Tokens whose result nobody reads are left out, which changes no result:

* the last block of each document in the clean copy, which no noisy block may see;
* in the noisy copies, blocks without a supervised token, such as those of a prompt.

Where several turns of a document are learnt, each has noisy copies of its own, which end where
the turn does: what a turn is predicted from is what there is when it is written, its own
block and clean text before it, and never a later turn that happens to share its last block.
Behind its end that block is filled with the end of text, as behind the last turn. So a
conversation is trained as if each turn were the end of a document of its own, but the
clean copy is there once.

By default the token at a masked place is predicted at that place. Shifted, it is predicted
from the place before it, as an autoregressive model does: inside a block from the noisy
copy, at a block's first token from the clean copy, where the token before is known.

Shape letters: V views, B rows, L tokens of a packed row, S tokens of a model row, M
predictions.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unmask.attention import CLEAN, PADDING, AttentionMetadata
from unmask.diffusion.disturbance import Disturbance
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
    disturbance: Disturbance | None = None
    """What is added to the embeddings of masked tokens; None: nothing."""
    ratio: Tensor | None = None
    """float32 (M,): the probability with which each target was to be masked; None: without noise."""
    answer: Tensor | None = None
    """int64 (M,): which answer each prediction belongs to, where preferences are learnt."""
    answers: int = 0
    """How many there are: two for each pair."""

    def to(self, device: torch.device | str) -> Self:
        """The same on ``device``."""
        moved = {
            name: getattr(self, name).to(device)
            for name in ("ids", "metadata", "predict", "targets", "weights")
        }
        if self.answer is not None:
            moved["answer"] = self.answer.to(device)
        if self.ratio is not None:
            moved["ratio"] = self.ratio.to(device)
        if self.disturbance is not None:
            moved["disturbance"] = self.disturbance.to(device)
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
    """Places that predict something."""
    target: NDArray[np.int64]
    """What they should predict."""
    weight: NDArray[np.float32]
    ratio: NDArray[np.float32]
    """The probability with which each was to be masked; 0 in the clean copy."""
    lots: NDArray[np.int64]
    """What the disturbance of each embedding is drawn from; 0 where there is none."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """What is learnt together of each document: everything, or one turn; arrays of shape (B, L)."""

    ids: NDArray[np.int64]
    """The text that is known when this is over: the rows', up to the turn's end."""
    maskable: NDArray[np.bool_]
    kept: NDArray[np.bool_]
    """Tokens of the noisy copies."""


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
    rows: PackedRows,
    corruption: Corruption,
    *,
    mask_token_id: int,
    flat: bool = False,
    shifted: bool = False,
) -> ModelInputs:
    """Full-sequence diffusion (equation 2): every token of a noisy copy sees all of its document's copy.

    Of several turns each has a copy that ends where it does.
    """
    block = np.zeros(rows.shape, np.int64)
    answers = list(_turns(rows)) or [_Answer(rows.ids, rows.supervised, rows.document >= 0)]
    copies = _noisy_copies(rows, corruption, answers, block, mask_token_id, flat)
    normaliser = _normaliser(copies, answers, corruption, flat)
    return _assemble(rows, _shifted(rows, copies) if shifted else copies, corruption, normaliser=normaliser)


def two_copy(
    rows: PackedRows,
    corruption: Corruption,
    *,
    block_length: int,
    mask_token_id: int,
    flat: bool = False,
    global_grid: bool = False,
    leave_out_unread: bool = True,
    shifted: bool = False,
    eos_token_id: int | None = None,
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
        shifted: Predict each token from the place before it.
        eos_token_id: What fills a block behind the end of a turn; needed where ``rows`` have turns.
    """
    place = np.broadcast_to(np.arange(rows.shape[1]), rows.shape) if global_grid else rows.position
    block = place // block_length
    real = rows.document >= 0
    clean_kept = real & ~_in_last_block(rows, block) if leave_out_unread else real
    if rows.turn is None:
        noisy_kept = real & _any_in_block(rows, block, rows.supervised) if leave_out_unread else real
        answers = [_Answer(rows.ids, rows.supervised, noisy_kept)]
    else:
        assert eos_token_id is not None, "rows have turns"
        answers = [
            _filled(rows, block, turn, eos_token_id, leave_out_unread=leave_out_unread)
            for turn in _turns(rows)
        ]
    noisy = _noisy_copies(rows, corruption, answers, block, mask_token_id, flat)
    nothing = np.zeros(rows.shape, np.int64)
    clean = _Copy(
        rows.ids,
        block,
        CLEAN,
        clean_kept,
        nothing.astype(np.bool_),
        rows.ids,
        nothing.astype(np.float32),
        nothing.astype(np.float32),
        nothing,
    )
    copies = [*noisy, clean]
    normaliser = _normaliser(noisy, answers, corruption, flat)
    return _assemble(rows, _shifted(rows, copies) if shifted else copies, corruption, normaliser=normaliser)


def _turns(rows: PackedRows) -> Iterator[_Answer]:
    """Each document's first turn, its second, ...: kept is what stands before the turn's end."""
    if rows.turn is None:
        return
    column = np.broadcast_to(np.arange(rows.shape[1]), rows.shape)
    whole = _block_keys(rows, np.zeros(rows.shape, np.int64))
    for number in range(int(rows.turn.max(initial=-1)) + 1):
        own = rows.turn == number
        ends = np.zeros(int(whole.max()) + 1, np.int64)
        np.maximum.at(ends, whole[own], column[own] + 1)
        yield _Answer(rows.ids, own, (rows.document >= 0) & (column < ends[whole]))


def _filled(
    rows: PackedRows, block: NDArray[np.int64], turn: _Answer, eos_token_id: int, *, leave_out_unread: bool
) -> _Answer:
    """A turn with the rest of its last block: the end of text, learnt like the turn itself."""
    blocks = _any_in_block(rows, block, turn.maskable)
    behind = blocks & ~turn.kept
    return _Answer(
        np.where(behind, eos_token_id, rows.ids),
        turn.maskable | behind,
        blocks if leave_out_unread else blocks | turn.kept,
    )


def _noisy_copies(
    rows: PackedRows,
    corruption: Corruption,
    answers: list[_Answer],
    block: NDArray[np.int64],
    mask_token_id: int,
    flat: bool,
) -> list[_Copy]:
    copies = []
    for view, (masked, ratio) in enumerate(zip(corruption.masked, corruption.ratio, strict=True)):
        weight = np.ones_like(ratio) if flat else 1 / ratio
        for number, answer in enumerate(answers):
            hidden = masked
            if rows.turn is not None:
                assert corruption.struck is not None, "drawn by lot"
                hidden = corruption.struck[view] & answer.maskable
            ids = np.where(hidden, mask_token_id, answer.ids)
            lots = np.zeros(rows.shape, np.int64)
            if corruption.lots is not None:
                lots = np.where(hidden, corruption.lots[view], 0)
            which = view * len(answers) + number + 1
            copies.append(_Copy(ids, block, which, answer.kept, hidden, answer.ids, weight, ratio, lots))
    return copies


def _normaliser(noisy: list[_Copy], answers: list[_Answer], corruption: Corruption, flat: bool) -> float:
    """Masked tokens for the flat weight; for 1/t, the tokens that may be masked, of all views."""
    if flat:
        return float(sum(copy.predicted.sum() for copy in noisy))
    return float(sum(answer.maskable.sum() for answer in answers) * len(corruption.masked))


def _shifted(rows: PackedRows, copies: list[_Copy]) -> list[_Copy]:
    """The same, each token predicted from the place before: where that is in an earlier block, the clean one.

    A token at the clean place is predicted from the same logits whichever views masked it, so its weights
    add up, and its ratio is that of the last of them. The first token of a document has no place before it,
    and is not to be masked.
    """
    goes_on = np.zeros(rows.shape, np.bool_)
    goes_on[:, :-1] = (rows.document[:, 1:] == rows.document[:, :-1]) & (rows.document[:, :-1] >= 0)
    block = copies[0].block
    inside = goes_on.copy()
    inside[:, :-1] &= block[:, 1:] == block[:, :-1]
    across = goes_on & ~inside

    shifted, from_clean = [], np.zeros(rows.shape, np.float32)
    clean_ratio = np.zeros(rows.shape, np.float32)
    for copy in copies:
        predicted, weight = _before(copy.predicted), _before(copy.weight)
        ratio = _before(copy.ratio)
        target = np.where(goes_on, _before(copy.target), copy.target)
        if copy.view == CLEAN:
            shifted.append(
                replace(copy, predicted=from_clean > 0, target=target, weight=from_clean, ratio=clean_ratio)
            )
        else:
            from_clean += np.where(across & predicted, weight, 0)
            clean_ratio = np.where(across & predicted, ratio, clean_ratio)
            shifted.append(
                replace(copy, predicted=inside & predicted, target=target, weight=weight, ratio=ratio)
            )
    return shifted


def _before(values: NDArray[Any]) -> NDArray[Any]:
    """For each place, the value of the next one."""
    return np.roll(values, -1, axis=1)


def _assemble(
    rows: PackedRows, copies: list[_Copy], corruption: Corruption, *, normaliser: float
) -> ModelInputs:
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
        targets=tensor([copy.target for copy in copies]).flatten()[torch.from_numpy(predict)],
        weights=torch.from_numpy(
            gathered([copy.weight for copy in copies]).ravel()[predict].astype(np.float32)
        ),
        normaliser=normaliser,
        ratio=torch.from_numpy(gathered([copy.ratio for copy in copies]).ravel()[predict].astype(np.float32)),
        disturbance=None
        if corruption.lots is None
        else Disturbance(tensor([copy.lots for copy in copies]), corruption.disturbance),
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
