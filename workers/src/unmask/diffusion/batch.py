"""Requests decoded side by side: what a batch does, what it tells, and running one to the end.

There are two kinds of batch, by what a model's tokens see: blocks in their order
(:class:`unmask.diffusion.generation.BlockBatch`, and a server's
:class:`unmask.serving.ragged.RaggedBatch`) or the whole canvas, masked positions
included (:class:`unmask.diffusion.full_sequence.CanvasBatch`). All run one forward at a
time and tell what it brought about in the same words, so whoever drives a batch, the
server's engine or :func:`run_to_end`, need not know which it is.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

from unmask.attention import Attends
from unmask.diffusion.decoding import DecodingParams
from unmask.errors import ModelError, UsageError

__all__ = [
    "Batch",
    "Committed",
    "Event",
    "Filled",
    "FinishReason",
    "Finished",
    "ForwardCounts",
    "ForwardLost",
    "Generation",
    "NoRoom",
    "Persisted",
    "Prefilled",
    "Reused",
    "check_attends",
    "check_request",
    "run_to_end",
    "up_to_eos",
]

FinishReason: TypeAlias = Literal["eos", "length"]


class NoRoom(RuntimeError):
    """A request cannot be admitted now: no row is free, or the cache has no room until another one ends."""


class ForwardLost(RuntimeError):
    """A forward could not be completed for a reason outside of the model, such as a lost machine.

    No request is the wiser or the worse for it: what they have committed stands. They cannot stay in the
    batch; release them, and start them again from there, here or elsewhere.
    """


@dataclass(slots=True)
class ForwardCounts:
    """Forwards that one request took part in, by kind, and tokens per forward (TPF) from them.

    Each forward counts once. One that persists a block and denoises the next one is a denoise
    forward: ``persist`` counts those that did nothing else. ``kept`` tokens are those generated
    before the end of text, which does not count itself. The papers' tables are to be compared
    with ``tpf_decode``.
    """

    prefill: int = 0
    denoise: int = 0
    persist: int = 0
    positions: int = 0
    """Token positions that were computed for the request."""

    def tpf(self, kept: int) -> float:
        """Kept tokens per forward of any kind."""
        return kept / max(1, self.prefill + self.denoise + self.persist)

    def tpf_decode(self, kept: int) -> float:
        """Kept tokens per denoise or persist forward."""
        return kept / max(1, self.denoise + self.persist)

    def tpf_denoise(self, kept: int) -> float:
        """Kept tokens per denoise forward."""
        return kept / max(1, self.denoise)


@dataclass(frozen=True, slots=True)
class Reused:
    """Given blocks were in the cache already, for another request began with them; no forward was needed."""

    ticket: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A forward put whole given blocks into the cache: all that are left, or as many as it had room for."""

    ticket: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Filled:
    """A denoise forward filled or edited positions of a block; provisional until the block is committed."""

    ticket: int
    block_index: int
    """Counted from the prompt's start, or from its end where the model attends to the whole canvas."""
    step: int
    """Denoise forward of this block, from 0."""
    positions: tuple[int, ...]
    """Relative to the first generated token."""
    token_ids: tuple[int, ...]
    confidences: tuple[float, ...]
    masks_left: int
    edited: int = 0
    """How many of the positions held another token before."""


@dataclass(frozen=True, slots=True)
class Persisted:
    """A forward on a committed block's final tokens put its keys and values into the cache."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Committed:
    """A block is full and will not change."""

    ticket: int
    block_index: int
    token_ids: tuple[int, ...]
    """Its generated tokens, up to the first end of text and ``max_new_tokens``."""
    forwards: int
    """Denoise forwards that it took."""
    confidences: tuple[float, ...]
    """The probability with which each token was accepted last."""
    usage: ForwardCounts = field(default_factory=ForwardCounts)
    """What the request has taken so far."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The request has ended, and its row is free."""

    ticket: int
    reason: FinishReason
    usage: ForwardCounts
    kept_tokens: int
    """Generated tokens before the end of text."""


Event: TypeAlias = Reused | Prefilled | Filled | Persisted | Committed | Finished


@dataclass(frozen=True, slots=True)
class Generation:
    """What was generated for one prompt."""

    token_ids: list[int]
    """Up to and including the first end of text."""
    reason: FinishReason
    usage: ForwardCounts
    kept_tokens: int


class Batch(Protocol):
    """Requests decoded side by side, each getting what it would get alone. One thread owns a batch."""

    @property
    def rows(self) -> int:
        """Requests that can be active at a time."""

    @property
    def free_rows(self) -> int:
        """Requests that can be admitted now."""

    @property
    def active(self) -> int:
        """Requests admitted and not finished."""

    @property
    def cache_usage(self) -> float:
        """Share of the memory for keys and values that active requests hold, from 0 to 1."""

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
            params: How to decode it.
            committed: Generated tokens of an earlier attempt, to go on from.
            cache_salt: Where requests share what they have in common, only with others of the same salt.

        Raises:
            UsageError: If the request is empty, does not fit, has nothing left to generate, or asks for
                what this batch cannot do.
            NoRoom: If no row is free, or not enough memory for keys and values.
        """

    def release(self, ticket: int) -> None:
        """Drop a request between two steps; its row is free at once. Unknown tickets are ignored."""

    def forget_stored(self) -> None:
        """Never use again what is stored of requests that have ended: the weights are about to be others.

        Raises:
            RuntimeError: If a request is active.
        """

    def step(self) -> list[Event]:
        """Run exactly one forward and return what it brought about.

        Raises:
            RuntimeError: If no request is active.
        """


class _Attending(Protocol):
    @property
    def attends(self) -> Attends: ...


def check_attends(model: _Attending, expected: Attends) -> None:
    """See to it that a model is decoded by what its tokens see.

    Raises:
        ModelError: It is not.
    """
    remedies: dict[Attends, str] = {
        "blocks": "blocks in their order; decode it with unmask.diffusion.generation",
        "canvas": "the whole canvas; decode it with unmask.diffusion.full_sequence",
    }
    if model.attends != expected:
        raise ModelError(f"{type(model).__name__} attends to {remedies[model.attends]}")


def check_idle(batch: Batch) -> None:
    """See to it that no request is active.

    Raises:
        RuntimeError: One is.
    """
    if batch.active:
        raise RuntimeError(f"{batch.active} requests are active")


def check_request(
    prompt: Sequence[int], params: DecodingParams, committed: Sequence[int], *, capacity: int
) -> None:
    """See to it that a request can be begun and brought to its end.

    Raises:
        UsageError: It cannot.
    """
    if not prompt:
        raise UsageError("prompt: got no tokens, expected at least one")
    if len(prompt) + params.max_new_tokens > capacity:
        raise UsageError(
            f"prompt of {len(prompt)} tokens and max_new_tokens {params.max_new_tokens} exceed "
            f"the context of {capacity} tokens; shorten the prompt or ask for fewer"
        )
    if len(committed) >= params.max_new_tokens or params.eos_token_id in committed:
        raise UsageError(
            "committed tokens: the request they belong to has ended; nothing is left to generate"
        )


def up_to_eos(tokens: list[int], eos_token_id: int) -> tuple[list[int], bool]:
    """``tokens`` up to and including the first end of text, and whether there is one."""
    if eos_token_id not in tokens:
        return tokens, False
    return tokens[: tokens.index(eos_token_id) + 1], True


def run_to_end(batch: Batch, prompts: Sequence[Sequence[int]], params: DecodingParams) -> list[Generation]:
    """Decode all ``prompts``, as many at a time as the batch has rows; results in their order."""
    results: list[Generation | None] = [None] * len(prompts)
    index_of: dict[int, int] = {}
    tokens: dict[int, list[int]] = {}
    queue = deque(enumerate(prompts))
    while queue or batch.active:
        while queue and batch.free_rows:
            index, prompt = queue[0]
            try:
                ticket = batch.admit(prompt, params)
            except NoRoom:
                break
            queue.popleft()
            index_of[ticket], tokens[ticket] = index, []
        for event in batch.step():
            if isinstance(event, Committed):
                tokens[event.ticket] += event.token_ids
            elif isinstance(event, Finished):
                done = Generation(tokens[event.ticket], event.reason, event.usage, event.kept_tokens)
                results[index_of[event.ticket]] = done
    return [result for result in results if result is not None]
