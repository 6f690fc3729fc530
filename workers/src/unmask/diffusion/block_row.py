"""A request that is decoded block by block: its tokens, its open block, and what a forward does to them.

Nothing here runs a model: whoever does hands in the candidates of a forward and is told what they
changed. So the rules are one and the same without a cache, with one slot per request
(:mod:`~unmask.diffusion.generation`) and in a server's ragged forwards.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from unmask.diffusion.batch import (
    Committed,
    Filled,
    Finished,
    FinishReason,
    ForwardCounts,
    check_request,
    up_to_eos,
)
from unmask.diffusion.credit import Ledger
from unmask.diffusion.decoding import Candidates, DecodingParams, edits, fills
from unmask.diffusion.sampling import candidates
from unmask.errors import UsageError

__all__ = ["BlockRow", "at_places", "check_block_request", "chosen_one_by_one"]


@dataclass(slots=True)
class BlockRow:
    """One request: its tokens so far, and the block in the making."""

    ticket: int
    params: DecodingParams
    tokens: list[int]
    """Prompt and committed tokens."""
    prompt_length: int
    step: int = 0
    block: list[int] = field(default_factory=list)
    masked: list[bool] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    """Of each position's token, when it was accepted last."""
    unsettled: bool = False
    """Whether the last forward changed what an editing forward should look at again."""
    post_edit_steps: int = 0
    closed: bool = False
    """Whether the block has been committed, and only its keys and values are missing."""
    ledger: Ledger | None = None
    """Of the open block, where tokens have credit."""
    usage: ForwardCounts = field(default_factory=ForwardCounts)

    @property
    def length(self) -> int:
        """Positions of a block."""
        return self.params.block_length

    @property
    def end(self) -> int:
        """Position after the last that may be generated."""
        return self.prompt_length + self.params.max_new_tokens

    @property
    def start(self) -> int:
        """First position of the current block."""
        return len(self.tokens) // self.length * self.length

    def open_block(self) -> None:
        """Start the next block: given tokens first, masks behind them."""
        tail = self.tokens[self.start :]
        free = self.length - len(tail)
        self.block = tail + [self.params.mask_token_id] * free
        self.masked = [False] * len(tail) + [True] * free
        self.confidence = [1.0] * self.length
        self.step, self.post_edit_steps, self.unsettled, self.closed = 0, 0, False, False
        self.ledger = Ledger(self.params.credit) if self.params.credit is not None else None

    @property
    def edits(self) -> bool:
        """Whether generated tokens may be replaced while their block is open."""
        return self.params.edit_threshold is not None

    @property
    def looked_at(self) -> list[bool]:
        """Positions of the block whose candidates matter to the next step."""
        return self.generated if self.edits else self.masked

    @property
    def generated(self) -> list[bool]:
        """Positions of the block that are not the prompt's."""
        given = len(self.tokens) - self.start
        return [place >= given for place in range(self.length)]

    def choose(self, scores_PV: Tensor) -> Candidates:
        """Candidates (P,) of the positions looked at, given their scores, as the params want them chosen.

        To be called once for each forward: where tokens have credit, they get it here.
        """
        given = self.start - self.prompt_length
        return candidates(
            scores_PV,
            self.params.sampling,
            positions=[given + place for place, wanted in enumerate(self.looked_at) if wanted],
            step=self.step,
            text=[
                *self.tokens,
                *(t for t, hidden in zip(self.block, self.masked, strict=True) if not hidden),
            ],
            mask_token_id=self.params.mask_token_id,
            ledger=self.ledger,
            entropy=self.params.entropy_bound is not None,
        )

    def denoise(self, candidates: Candidates) -> Filled:
        """Fill and edit by the params' rule, given the block's candidates (B,)."""
        masked = torch.tensor(self.masked)
        filled = fills(candidates, masked, self.params, step=self.step)
        edited = torch.zeros_like(masked)
        if self.params.edit_threshold is not None:
            editable = torch.tensor(self.generated) & ~masked
            edited = edits(
                candidates, torch.tensor(self.block), editable, threshold=self.params.edit_threshold
            )
        chosen = (filled | edited).nonzero()[:, 0]
        places = chosen.tolist()
        for place, token in zip(places, candidates.tokens[chosen].tolist(), strict=True):
            self.block[place], self.masked[place] = token, False
            self.confidence[place] = float(candidates.confidence[place])
        self.post_edit_steps += not bool(masked.any())
        self.unsettled = bool(edited.any()) or (self.edits and bool(masked.any()))
        event = Filled(
            ticket=self.ticket,
            block_index=self.start // self.length,
            step=self.step,
            positions=tuple(self.start + place - self.prompt_length for place in places),
            token_ids=tuple(self.block[place] for place in places),
            confidences=tuple(candidates.confidence[chosen].tolist()),
            masks_left=sum(self.masked),
            edited=int(edited.sum()),
        )
        self.step += 1
        self.usage.denoise += 1
        return event

    @property
    def is_full(self) -> bool:
        """Whether the block is final: nothing masked that matters, and no more edits wanted or allowed."""
        if any(self.masked):
            return self.params.early_exit and not self.edits and self._answer_is_filled()
        return not self.unsettled or self.post_edit_steps >= self.params.max_post_edit_steps

    def _answer_is_filled(self) -> bool:
        """Whether no position of the answer is masked: none before its end of text, or before its last one.

        A filled token never changes where nothing is edited, so neither does the place of the end of text.
        """
        for place in range(len(self.tokens) - self.start, min(self.length, self.end - self.start)):
            if self.masked[place]:
                return False
            if self.block[place] == self.params.eos_token_id:
                return True
        return True

    def close_block(self) -> tuple[Committed, FinishReason | None]:
        """Take the full block over into the tokens; say whether it is the last."""
        block_index, given = self.start // self.length, len(self.tokens) - self.start
        new, ended = up_to_eos(self.block[given:][: self.end - len(self.tokens)], self.params.eos_token_id)
        self.tokens += new
        self.closed = True
        reason: FinishReason | None = "eos" if ended else None
        if not ended and len(self.tokens) >= self.end:
            reason = "length"
        committed = Committed(
            self.ticket,
            block_index,
            tuple(new),
            self.step,
            confidences=tuple(self.confidence[given : given + len(new)]),
            usage=replace(self.usage),
        )
        return committed, reason

    def finished(self, reason: FinishReason) -> Finished:
        """The closing event."""
        generated = len(self.tokens) - self.prompt_length
        return Finished(self.ticket, reason, self.usage, generated - (reason == "eos"))


def chosen_one_by_one(
    rows: Sequence[BlockRow], hidden_PD: Tensor, logits: Callable[[Tensor], Tensor]
) -> Candidates:
    """Candidates (P,) of all positions that ``rows`` look at, one row's scores at a time.

    Args:
        rows: Some of which may want other than the most probable tokens.
        hidden_PD: Final hidden states of those positions, row by row.
        logits: The output layer, (P, D) to (P, V).
    """
    counts = [sum(row.looked_at) for row in rows]
    parts = [
        row.choose(logits(part)) for row, part in zip(rows, hidden_PD.split(counts), strict=True) if len(part)
    ]
    nothing = [torch.zeros_like(part.confidence) for part in parts]
    return Candidates(
        torch.cat([part.tokens for part in parts]),
        torch.cat([part.confidence for part in parts]),
        torch.cat(
            [
                none if part.entropy is None else part.entropy
                for part, none in zip(parts, nothing, strict=True)
            ]
        ),
    )


def at_places(best: Candidates, wanted_RB: Tensor) -> list[Candidates]:
    """Candidates (B,) of each row, on the host, given those of the positions ``wanted_RB``; 0 elsewhere."""
    tokens = torch.zeros(wanted_RB.shape, dtype=torch.int64)
    confidence, entropy = torch.zeros(wanted_RB.shape), torch.zeros(wanted_RB.shape)
    tokens[wanted_RB], confidence[wanted_RB] = best.tokens.cpu(), best.confidence.cpu()
    if best.entropy is not None:
        entropy[wanted_RB] = best.entropy.cpu()
    return [Candidates(*row) for row in zip(tokens, confidence, entropy, strict=True)]


def check_block_request(
    prompt: Sequence[int],
    params: DecodingParams,
    committed: Sequence[int],
    *,
    block_length: int,
    capacity: int,
) -> None:
    """See to it that a batch of such blocks can begin a request and bring it to its end.

    Raises:
        UsageError: It cannot.
    """
    if params.block_length != block_length:
        raise UsageError(f"block_length: got {params.block_length}, this batch decodes {block_length}")
    if params.vicinity is not None:
        raise UsageError("vicinity: the cache of a model that attends to blocks is exact; leave it out")
    check_request(prompt, params, committed, capacity=capacity)
