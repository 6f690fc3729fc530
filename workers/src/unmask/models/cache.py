"""A key/value cache with a fixed slot per row.

Every forward writes its keys and values behind the row's committed tokens, and the next
forward of the row overwrites them unless :meth:`RowCache.commit` has said that they
stand. So a denoising step leaves nothing behind, and committing a block costs one
forward on its final tokens (keys and values computed while masks are present must never
be kept). Shape letters: R rows, G key/value heads, K keys, D head size.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from unmask.attention import CLEAN, PADDING, AttentionMetadata, AttentionPlan, plan
from unmask.models.config import ModelConfig

__all__ = ["CanvasCache", "RowCache"]


@dataclass(slots=True)
class _Window:
    """The rows that the current forward works on, and how many keys it sees."""

    rows: slice
    starts: Tensor
    """(R,) int64: committed tokens of each row, where this forward's tokens are written."""
    keys: int


@dataclass(slots=True)
class RowCache:
    """Keys and values of ``rows`` sequences of at most ``capacity`` tokens.

    Row r's committed tokens are those at positions 0 to ``lengths[r]`` - 1. One forward
    works on a contiguous range of rows, chosen by :meth:`select`.
    """

    config: ModelConfig
    rows: int
    capacity: int
    block_length: int
    """Block size of the committed tokens: position p belongs to block p // block_length."""
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    lengths: Tensor = field(init=False)
    _keys: Tensor = field(init=False)
    _values: Tensor = field(init=False)
    _window: _Window | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Allocate; memory is 2 x layers x rows x heads x capacity x head size elements."""
        c = self.config
        shape = (c.num_hidden_layers, self.rows, c.num_key_value_heads, self.capacity, c.head_dim)
        self._keys = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self._values = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self.lengths = torch.zeros(self.rows, dtype=torch.int64, device=self.device)

    def select(self, first: int, count: int) -> "RowCache":
        """Let the next forward work on rows ``first`` to ``first + count - 1``; returns this cache."""
        rows = slice(first, first + count)
        self._window = _Window(rows=rows, starts=self.lengths[rows].clone(), keys=0)
        return self

    def plan(self, queries: AttentionMetadata) -> AttentionPlan:
        """How the forward's queries attend to the committed tokens and to each other."""
        return plan(queries, self._keys_seen(queries))

    def _keys_seen(self, queries: AttentionMetadata) -> AttentionMetadata:
        """Metadata of the keys: (R, K), K = the longest row's committed tokens plus the queries."""
        window = self._expect_window()
        ends = window.starts + queries.shape[1]
        window.keys = int(ends.max())
        if window.keys > self.capacity:
            raise ValueError(f"{window.keys} tokens do not fit a cache row of {self.capacity}")
        position = torch.arange(window.keys, device=self.device).expand(len(ends), -1)
        written = position < ends[:, None]
        document = torch.where(written, queries.document[:, :1], PADDING)
        block = position.div(self.block_length, rounding_mode="floor")
        return AttentionMetadata(position, document, block, torch.full_like(position, CLEAN))

    def extend(self, layer: int, key_RGSD: Tensor, value_RGSD: Tensor) -> tuple[Tensor, Tensor]:
        """Write the forward's keys and values behind the committed ones; return all of both as views."""
        window = self._expect_window()
        length = key_RGSD.shape[2]
        keys, values = self._keys[layer, window.rows], self._values[layer, window.rows]
        for row, start in enumerate(window.starts.tolist()):
            keys[row, :, start : start + length] = key_RGSD[row]
            values[row, :, start : start + length] = value_RGSD[row]
        return keys[:, :, : window.keys], values[:, :, : window.keys]

    def commit(self, row: int, tokens: int) -> None:
        """Keep the first ``tokens`` tokens that the last forward wrote behind ``row``'s committed ones."""
        self.lengths[row] += tokens

    def clear(self, row: int) -> None:
        """Forget ``row``'s tokens."""
        self.lengths[row] = 0

    def move(self, source: int, target: int) -> None:
        """Copy row ``source`` over row ``target``, so that the rows in use stay contiguous."""
        length = int(self.lengths[source])
        self._keys[:, target, :, :length] = self._keys[:, source, :, :length]
        self._values[:, target, :, :length] = self._values[:, source, :, :length]
        self.lengths[target] = length

    def _expect_window(self) -> _Window:
        if self._window is None:
            raise RuntimeError("select() the rows before a forward")
        return self._window


@dataclass(slots=True)
class CanvasCache:
    """Keys and values of one sequence that is attended to as a whole, of which forwards overwrite windows.

    For models without a causal order of blocks: what lies outside the window is as old as
    the last forward that covered it. The first forward must cover everything.
    """

    config: ModelConfig
    length: int
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    _keys: Tensor = field(init=False)
    _values: Tensor = field(init=False)
    _first: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        """Allocate 2 x layers x heads x length x head size elements."""
        c = self.config
        shape = (c.num_hidden_layers, 1, c.num_key_value_heads, self.length, c.head_dim)
        self._keys = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self._values = torch.zeros(shape, dtype=self.dtype, device=self.device)

    def select(self, first: int) -> "CanvasCache":
        """Let the next forward work on the window that begins at position ``first``; returns this cache."""
        self._first = first
        return self

    def plan(self, queries: AttentionMetadata) -> AttentionPlan:
        """How the forward's queries attend to every position."""
        position = torch.arange(self.length, device=self.device).unsqueeze(0)
        return plan(queries, AttentionMetadata.bidirectional(position, torch.zeros_like(position)))

    def extend(self, layer: int, key_1GSD: Tensor, value_1GSD: Tensor) -> tuple[Tensor, Tensor]:
        """Write the window's keys and values and return all of both as views."""
        window = slice(self._first, self._first + key_1GSD.shape[2])
        self._keys[layer, :, :, window] = key_1GSD
        self._values[layer, :, :, window] = value_1GSD
        return self._keys[layer], self._values[layer]
