"""Decoding for models that attend to the whole canvas: LLaDA's low-confidence rule.

LLaDA and LLaDA-MoE (arXiv 2502.09992 and 2509.24389) see the prompt and all positions to
be generated at once, masked ones too. With one block of all new tokens every position
competes (full-sequence decoding); with smaller blocks, counted from the end of the
prompt, they are filled from left to right while all of the canvas stays visible
(semi-autoregressive). Which positions are filled is the rule of
:mod:`~unmask.diffusion.decoding`; a threshold of 1 or more leaves LLaDA's even quotas.

Attention is not causal, so no prefix has final keys and values, and a cache is an
approximation: with a :class:`~unmask.diffusion.decoding.Vicinity`, each block begins with
a forward over the whole canvas, and its other forwards recompute only the block and its
neighbourhood, keeping the keys and values of the rest (as Fast-dLLM, arXiv 2505.22618,
and dInfer, arXiv 2510.08666, do). It is exact when the neighbourhood is everything.

What comes after a block depends on nothing but the tokens before it and the length of
the canvas: a request that goes on from whole blocks of an earlier attempt with the same
``max_new_tokens`` ends as that one would have.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor

from unmask.attention import Attends, AttentionMetadata
from unmask.diffusion.batch import (
    Committed,
    Event,
    Filled,
    Finished,
    FinishReason,
    ForwardCounts,
    Generation,
    NoRoom,
    check_attends,
    check_idle,
    check_request,
    run_to_end,
    up_to_eos,
)
from unmask.diffusion.decoding import Candidates, DecodingParams, accept, quota
from unmask.diffusion.sampling import candidates
from unmask.errors import UsageError

__all__ = ["CanvasBatch", "CanvasModel", "generate_full_sequence"]


class CanvasModel(Protocol):
    """The part of :class:`unmask.models.base.LanguageModel` that this decoding needs."""

    def hidden(self, ids: Tensor, metadata: AttentionMetadata, *, cache: Any = None) -> Tensor:
        """Final hidden states, (1, S) ids to (1, S, D)."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary scores in float32, (..., D) to (..., V)."""

    def new_canvas_cache(self, length: int) -> Any:
        """A cache of ``length`` positions that any forward may overwrite a window of."""

    @property
    def attends(self) -> Attends:
        """What its tokens see; "canvas" is what this module decodes."""

    @property
    def device(self) -> torch.device:
        """Where inputs must be."""


@dataclass(slots=True)
class _Canvas:
    """One request: the prompt, all positions to be generated, and the block in the making."""

    ticket: int
    params: DecodingParams
    prompt_length: int
    ids: list[int]
    masked: list[bool]
    final: int
    """Positions before it will not change."""
    cache: Any
    """None without a vicinity."""
    confidence: dict[int, float] = field(default_factory=dict)
    """Of the token at each position that was filled."""
    step: int = 0
    usage: ForwardCounts = field(default_factory=ForwardCounts)

    @property
    def block_index(self) -> int:
        return (self.final - self.prompt_length) // self.params.block_length

    @property
    def start(self) -> int:
        """First position of the current block."""
        return self.prompt_length + self.block_index * self.params.block_length

    @property
    def stop(self) -> int:
        """Position after its last."""
        return min(self.start + self.params.block_length, len(self.ids))

    @property
    def places(self) -> list[int]:
        """Masked positions of the current block, at least one."""
        return [place for place in range(self.start, self.stop) if self.masked[place]]

    @property
    def window(self) -> tuple[int, int]:
        """First position to be computed by the next forward, and the one after the last."""
        vicinity = self.params.vicinity
        if vicinity is None or self.step == 0:
            return 0, len(self.ids)
        return max(0, self.start - vicinity.before), min(len(self.ids), self.stop + vicinity.after)

    def choose(self, scores_PV: Tensor) -> Candidates:
        """Candidates (P,) of ``places``, given their scores, as the params want them chosen."""
        return candidates(
            scores_PV,
            self.params.sampling,
            positions=[place - self.prompt_length for place in self.places],
            step=self.step,
            text=[token for token, hidden in zip(self.ids, self.masked, strict=True) if not hidden],
            mask_token_id=self.params.mask_token_id,
        )

    def fill(self, candidates: Candidates) -> Filled:
        """Fill by the params' rule, given the candidates of ``places``."""
        places = self.places
        chosen = accept(
            candidates.confidence,
            torch.ones(len(places), dtype=torch.bool),
            threshold=self.params.threshold,
            at_least=quota(self.params, self.step),
        ).nonzero()[:, 0]
        filled = [places[number] for number in chosen.tolist()]
        tokens = candidates.tokens[chosen].tolist()
        for place, token in zip(filled, tokens, strict=True):
            self.ids[place], self.masked[place] = token, False
        self.confidence |= zip(filled, candidates.confidence[chosen].tolist(), strict=True)
        event = Filled(
            ticket=self.ticket,
            block_index=self.block_index,
            step=self.step,
            positions=tuple(place - self.prompt_length for place in filled),
            token_ids=tuple(tokens),
            confidences=tuple(candidates.confidence[chosen].tolist()),
            masks_left=len(places) - len(filled),
        )
        self.step += 1
        self.usage.denoise += 1
        return event

    @property
    def is_full(self) -> bool:
        """Whether nothing of the answer is masked in the block: nothing of it, or before its end of text."""
        places = range(self.final, self.stop)
        masked = next((place for place in places if self.masked[place]), None)
        if masked is None:
            return True
        return self.params.early_exit and self.params.eos_token_id in self.ids[self.final : masked]

    def close_block(self) -> tuple[Committed, FinishReason | None]:
        """Declare the full block final; say whether it is the last."""
        block_index, stop = self.block_index, self.stop
        new, ended = up_to_eos(self.ids[self.final : stop], self.params.eos_token_id)
        committed = Committed(
            self.ticket,
            block_index,
            tuple(new),
            self.step,
            confidences=tuple(self.confidence[self.final + place] for place in range(len(new))),
            usage=replace(self.usage),
        )
        self.final += len(new)
        self.step = 0
        if ended:
            return committed, "eos"
        return committed, "length" if stop == len(self.ids) else None

    def finished(self, reason: FinishReason) -> Finished:
        """The closing event."""
        generated = self.final - self.prompt_length
        return Finished(self.ticket, reason, self.usage, generated - (reason == "eos"))


class CanvasBatch:
    """Requests that take turns, each getting what it would get alone.

    One :meth:`step` is one forward over the canvas of one request, or over the vicinity of its block.
    Not thread-safe: one thread owns a batch.
    """

    def __init__(self, model: CanvasModel, *, rows: int, capacity: int) -> None:
        """Room for ``rows`` requests of at most ``capacity`` tokens each, prompt included.

        Raises:
            ModelError: The model attends to blocks in their order.
        """
        check_attends(model, "canvas")
        self.rows, self.capacity = rows, capacity
        self._model = model
        self._running: deque[_Canvas] = deque()
        self._tickets = count()

    @property
    def active(self) -> int:
        """Requests admitted and not finished."""
        return len(self._running)

    @property
    def free_rows(self) -> int:
        """Requests that can be admitted now."""
        return self.rows - self.active

    @property
    def cache_usage(self) -> float:
        """Share of the rows that are in use."""
        return self.active / self.rows

    def admit(
        self,
        prompt: Sequence[int],
        params: DecodingParams,
        committed: Sequence[int] = (),
        *,
        cache_salt: str = "",
    ) -> int:
        """Take a request up; no forward is run. Returns its ticket.

        Args:
            prompt: Token ids; none of them counts as masked, whatever its value.
            params: ``block_length`` and ``steps`` may differ from request to request; threshold and quota
                fill, nothing is edited.
            committed: Generated tokens of an earlier attempt, to go on from.
            cache_salt: Without effect: nothing is shared.

        Raises:
            UsageError: If the request is empty, does not fit, wants another rule, or has nothing left to
                generate.
            NoRoom: If no row is free.
        """
        if params.edit_threshold is not None:
            raise UsageError("edit_threshold: only models that attend to blocks edit; leave it out")
        for name in ("low_threshold", "credit", "entropy_bound"):
            if getattr(params, name) is not None:
                raise UsageError(f"{name}: only models that attend to blocks are filled so; leave it out")
        check_request(prompt, params, committed, capacity=self.capacity)
        if self.free_rows == 0:
            raise NoRoom(f"all {self.rows} rows are taken")
        given = [*prompt, *committed]
        masks = len(prompt) + params.max_new_tokens - len(given)
        canvas = _Canvas(
            ticket=next(self._tickets),
            params=params,
            prompt_length=len(prompt),
            ids=given + [params.mask_token_id] * masks,
            masked=[False] * len(given) + [True] * masks,
            final=len(given),
            cache=self._model.new_canvas_cache(len(given) + masks) if params.vicinity else None,
        )
        self._running.append(canvas)
        return canvas.ticket

    def release(self, ticket: int) -> None:
        """Drop a request between two steps; its row is free at once. Unknown tickets are ignored."""
        self._running = deque(canvas for canvas in self._running if canvas.ticket != ticket)

    def forget_stored(self) -> None:
        """Nothing is kept of requests that have ended.

        Raises:
            RuntimeError: If a request is active.
        """
        check_idle(self)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Run exactly one forward, for the request whose turn it is, and return what it brought about.

        Raises:
            RuntimeError: If no request is active.
        """
        if not self._running:
            raise RuntimeError("step() without an active request")
        canvas = self._running[0]
        filled = canvas.fill(self._candidates(canvas))
        events: list[Event] = [filled]
        if canvas.is_full:
            committed, reason = canvas.close_block()
            events.append(committed)
            if reason is not None:
                self._running.popleft()
                return [*events, canvas.finished(reason)]
        self._running.rotate(-1)
        return events

    def _candidates(self, canvas: _Canvas) -> Candidates:
        """Token and confidence of each masked position of the block, on the host."""
        first, last = canvas.window
        device = self._model.device
        position = torch.arange(first, last, device=device).unsqueeze(0)
        metadata = AttentionMetadata.bidirectional(position, torch.zeros_like(position))
        ids = torch.tensor([canvas.ids[first:last]], device=device)
        cache = None if canvas.cache is None else canvas.cache.select(first)
        hidden = self._model.hidden(ids, metadata, cache=cache)[0]
        canvas.usage.positions += last - first
        wanted = torch.tensor(canvas.places, device=device) - first
        best = canvas.choose(self._model.logits(hidden[wanted]))
        return Candidates(best.tokens.cpu(), best.confidence.cpu())


def generate_full_sequence(model: CanvasModel, prompt: Sequence[int], params: DecodingParams) -> Generation:
    """Generate ``params.max_new_tokens`` positions block by block; stop with the block of an end of text.

    Args:
        model: A model that attends to the whole sequence.
        prompt: Token ids; none of them counts as masked, whatever its value.
        params: ``steps`` is per block.

    Raises:
        UsageError: The prompt is empty, or edits are asked for.
        ModelError: The model attends to blocks in their order.
    """
    batch = CanvasBatch(model, rows=1, capacity=len(prompt) + params.max_new_tokens)
    return run_to_end(batch, [prompt], params)[0]
