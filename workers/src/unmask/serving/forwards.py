"""Forwards over pages: run operation by operation, or recorded and replayed.

A step of few blocks is hundreds of kernels of microseconds, and to launch them one by one takes a GPU's host
longer than they run. A CUDA graph is launched once for all. What was recorded has its shapes, so forwards are
recorded for some numbers of blocks, and filled up to the next of them with blocks of nobody; and it reads
what it is told of its blocks where that lay (:class:`~unmask.models.paged.BlockTensors`). Shape letters: S
positions of a forward, D hidden size.
"""

from collections.abc import Callable, Sequence
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from unmask.attention import AttentionMetadata
from unmask.attention.paged import Span
from unmask.models.base import LanguageModel
from unmask.models.paged import BlockTensors, PagedCache
from unmask.models.row_tiles import missing_rows

__all__ = ["Forwards", "PlainForwards", "Recorder", "RecordedForwards", "cuda_graphs", "recorded_sizes"]

Recorder: TypeAlias = Callable[[Callable[[], Tensor | None]], Callable[[], Tensor | None]]
"""Takes a computation, and returns what does it again, on the same memory."""
_Kind: TypeAlias = Literal["hidden", "store"]


class Forwards(Protocol):
    """What runs forwards; in each, the tokens ``ids`` are those of the asking blocks of ``spans``."""

    def hidden(self, ids: Sequence[int], spans: Sequence[Span]) -> Tensor:
        """Final hidden states of S positions or more, (.., D); good until the next forward."""

    def store(self, ids: Sequence[int], spans: Sequence[Span]) -> None:
        """Put keys and values into their pages, and compute nothing else."""


class PlainForwards:
    """Operation by operation."""

    def __init__(self, model: LanguageModel, cache: PagedCache) -> None:
        """Of ``model``, over the pages of ``cache``."""
        self._model, self._cache = model, cache

    def hidden(self, ids: Sequence[int], spans: Sequence[Span]) -> Tensor:
        """See :meth:`Forwards.hidden`."""
        ids_1S, metadata = self._laid_out(ids, spans)
        return self._model.hidden(ids_1S, metadata, cache=self._cache)[0]

    def store(self, ids: Sequence[int], spans: Sequence[Span]) -> None:
        """See :meth:`Forwards.store`."""
        ids_1S, metadata = self._laid_out(ids, spans)
        self._model.store(ids_1S, metadata, cache=self._cache)

    def _laid_out(self, ids: Sequence[int], spans: Sequence[Span]) -> tuple[Tensor, AttentionMetadata]:
        blocks = len(ids) // self._cache.block_length
        while missing_rows(blocks * self._cache.block_length):  # so that products are of whole tiles
            blocks += 1
        ids, spans = filled_up(ids, spans, blocks, self._cache)
        metadata = self._cache.lay_out(spans)
        return torch.tensor([ids], device=self._model.device), metadata


class RecordedForwards:
    """Replayed, on a GPU. Recorded when this is made, so that no request waits for it."""

    def __init__(
        self,
        model: LanguageModel,
        cache: PagedCache,
        *,
        most_blocks: int,
        most_pages: int,
        record: Recorder | None = None,
    ) -> None:
        """Record forwards of up to ``most_blocks`` blocks.

        Args:
            model: Of which no part is computed elsewhere. Its weights may change, but not where they are.
            cache: Its pages.
            most_blocks: In one forward.
            most_pages: That one block sees.
            record: How; by default as CUDA graphs.
        """
        self._model, self._cache = model, cache
        record = record or cuda_graphs(model.device)
        self._told: dict[int, BlockTensors] = {}
        self._replays: dict[tuple[_Kind, int], Callable[[], Tensor | None]] = {}
        # The largest first: what it needs of memory does for the others.
        for size in sorted(recorded_sizes(most_blocks), reverse=True):
            told = BlockTensors.empty(
                size, block_length=cache.block_length, wide=most_pages, device=model.device
            )
            told.numbers.copy_(self._numbers([], [], size, most_pages))
            self._told[size] = told
            for kind in ("hidden", "store"):
                self._replays[kind, size] = record(self._computation(kind, told))

    def hidden(self, ids: Sequence[int], spans: Sequence[Span]) -> Tensor:
        """See :meth:`Forwards.hidden`."""
        hidden_1SD = self._replay("hidden", ids, spans)
        assert hidden_1SD is not None
        return hidden_1SD[0]

    def store(self, ids: Sequence[int], spans: Sequence[Span]) -> None:
        """See :meth:`Forwards.store`."""
        self._replay("store", ids, spans)

    def _replay(self, kind: _Kind, ids: Sequence[int], spans: Sequence[Span]) -> Tensor | None:
        blocks = len(ids) // self._cache.block_length
        size = min(size for size in self._told if size >= blocks)
        told = self._told[size]
        told.numbers.copy_(self._numbers(ids, spans, size, told.table.shape[1]))
        return self._replays[kind, size]()

    def _numbers(self, ids: Sequence[int], spans: Sequence[Span], size: int, wide: int) -> Tensor:
        ids, spans = filled_up(ids, spans, size, self._cache)
        return BlockTensors.of(ids, spans, block_length=self._cache.block_length, wide=wide).numbers

    def _computation(self, kind: _Kind, told: BlockTensors) -> Callable[[], Tensor | None]:
        def compute() -> Tensor | None:
            metadata = self._cache.read_from(told)
            if kind == "hidden":
                return self._model.hidden(told.ids, metadata, cache=self._cache)
            self._model.store(told.ids, metadata, cache=self._cache)
            return None

        return compute


def filled_up(
    ids: Sequence[int], spans: Sequence[Span], blocks: int, cache: PagedCache
) -> tuple[list[int], list[Span]]:
    """The same, and blocks of nobody up to ``blocks``."""
    missing = blocks * cache.block_length - len(ids)
    nobodys = [Span((cache.nobodys,), asking=1)] * (missing // cache.block_length)
    return [*ids, *[0] * missing], [*spans, *nobodys]


def recorded_sizes(most: int) -> list[int]:
    """Numbers of blocks that forwards are recorded for, the largest ``most``: a third is nobody's at most."""
    sizes = {most} | {size for size in (1, 2, 3) if size < most}
    power = 4
    while power < most:
        sizes |= {size for size in (power, power + power // 2) if size < most}
        power *= 2
    return sorted(sizes)


def cuda_graphs(device: torch.device) -> Recorder:
    """What records CUDA graphs, which share their memory: only the last replay's result is good."""
    pool = torch.cuda.graph_pool_handle()

    def record(compute: Callable[[], Tensor | None]) -> Callable[[], Tensor | None]:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # kernels are compiled, and libraries take their memory
            compute()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            result = compute()

        def replay() -> Tensor | None:
            graph.replay()
            return result

        return replay

    return record
