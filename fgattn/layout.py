"""Where tokens stand: the video grid, sinks, and the order in which tiles and cells are counted."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch

from .cache import ByteCache, built_for_all, bytes_of, makes_real_tensors
from .errors import InvalidArgument
from .tensors import any_of, check_tensor

CELL = 16  # tokens in a query cell and in a key cell
MOST_TOKENS = 2**31 - 1  # of a sequence: kernels count in int32
CACHE_BYTES = 96 << 20  # of all index tensors that are kept
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """The tokens of one sequence: `front` sinks, a video of (T, H, W) tokens, `back` sinks.

    Sinks (text, reference, audio) are always attended, and attend, exactly.

    Attributes:
        grid: (T, H, W) of the video tokens, stored frame by frame, row by row.
        front, back: number of sink tokens before and after the video.
        query_start: token at which the queries start; None if queries are no tokens of this
            sequence (cross-attention).
        key_valid: None or bool [B, L_k]; False removes a key everywhere (padding).
        absent: sink tokens that are padding in all of the batch: as if they were not there, but for their
            place in memory. They are neither keys nor queries; their outputs are zeros.
    """

    grid: tuple[int, int, int]
    front: int = 0
    back: int = 0
    query_start: int | None = 0
    key_valid: torch.Tensor | None = None
    absent: tuple[int, ...] = ()

    def __post_init__(self):
        grid, absent = _numbers(self.grid), _numbers(self.absent)
        places = _numbers((self.front, self.back, 0 if self.query_start is None else self.query_start))
        if grid is None or len(grid) != 3 or places is None or not _may_be(*grid, *places):
            raise InvalidArgument(
                "layout",
                (self.grid, self.front, self.back, self.query_start),
                "whole numbers of at least 0: grid (T, H, W), front, back, query_start",
                "Give the grid after patching.",
            )
        object.__setattr__(self, "grid", grid)
        if not _may_be(self.length):
            raise InvalidArgument(
                "layout.length", self.length, f"at most {MOST_TOKENS} tokens", "Give the grid after patching."
            )
        end = self.length - self.back
        if absent is None or not all(0 <= t < self.front or end <= t < self.length for t in absent):
            raise InvalidArgument(
                "layout.absent",
                self.absent,
                "a tuple of numbers of sink tokens",
                "Use key_valid for padding inside the video.",
            )
        object.__setattr__(self, "absent", absent)
        if self.key_valid is not None:
            check_tensor("layout.key_valid", self.key_valid, "None is: all keys exist.")

    @classmethod
    def flat(cls, length: int, query_start: int | None = 0) -> TokenLayout:
        """A sequence without a known grid: its order is left as it is."""
        return cls((1, 1, length), query_start=query_start)

    @property
    def length(self) -> int:
        t, h, w = self.grid
        return self.front + t * h * w + self.back


@dataclass(frozen=True, eq=False)
class Geometry:
    """Index tensors of a layout, on one device. "Position" counts in the order, "token" in memory.

    | attribute | shape, dtype | meaning |
    |---|---|---|
    | query_tokens | [L_q] int64 | token of each query position, counted from the first query |
    | key_tokens | [L_k] int64 | token of each key position |
    | own_cell | [L_q] int64 | key cell that holds the query's own key; -1 if it has none |
    | sink_query | [L_q] bool | the query is a sink |
    | sink_cell | [key cells] bool | the cell holds a sink |
    | host_tokens | [L_k] int64, NumPy | `key_tokens` on the host |
    | grid | (T, H, W) | of the video |
    | rows | (int, int) | of q and k in memory: L_q and L_k, and the absent tokens |
    """

    query_tokens: torch.Tensor
    key_tokens: torch.Tensor
    own_cell: torch.Tensor
    sink_query: torch.Tensor
    sink_cell: torch.Tensor
    host_tokens: np.ndarray
    grid: tuple[int, int, int]
    rows: tuple[int, int]
    _tables: dict[Hashable, Any] = field(default_factory=dict, init=False)  # of this geometry alone

    def table(self, name: Hashable, build: Callable[[], T]) -> T:
        """Something that follows from this geometry alone, built once under this name.

        It is a tensor, a tuple of tensors or None, and lives as long as the geometry does.
        """
        if name not in self._tables:
            if not makes_real_tensors():
                return build()
            self._tables[name] = built_for_all(build)
            GEOMETRIES.trim()
        return self._tables[name]

    @property
    def nbytes(self) -> int:
        """Bytes of the index tensors and of all tables."""
        own = (self.query_tokens, self.key_tokens, self.own_cell, self.sink_query, self.sink_cell)
        return bytes_of(own) + bytes_of(tuple(self._tables.values()))

    def always_kept(self, tile_queries: int) -> torch.Tensor:
        """Bool [tiles, key cells]: the cells that a tile keeps whatever their score."""
        queries, cells = len(self.query_tokens), len(self.sink_cell)
        tile = torch.arange(queries, device=self.own_cell.device) // tile_queries
        tiles = -(-queries // tile_queries)
        kept = torch.zeros(tiles, cells + 1, dtype=torch.bool, device=tile.device)
        kept[tile, self.own_cell] = True  # -1 lands in the last column, which is spare
        has_sink = any_of(self.sink_query, tile_queries)
        kept[:, :cells] |= self.sink_cell | has_sink[:, None]
        return kept[:, :cells]


GEOMETRIES: ByteCache[Geometry] = ByteCache(CACHE_BYTES)


def geometry(layout: TokenLayout, order: str, queries: int, device: torch.device) -> Geometry:
    """The index tensors for `queries` queries on this layout; calls on equal layouts share them.

    Raises:
        InvalidArgument: the queries do not lie inside the sequence.
    """
    start = layout.query_start
    if start is not None and start + queries > layout.length:
        raise InvalidArgument(
            "layout.query_start",
            start,
            f"at most L_k - L_q = {layout.length - queries}",
            "Use None for queries that are not tokens of the key sequence.",
        )
    key = layout.grid, layout.front, layout.back, layout.absent, start, order, queries, str(device)
    return GEOMETRIES.get(key, lambda: _build(layout, order, queries, device))


def release() -> None:
    """Drop all index tensors that are kept for later calls; the next call of a layout makes them again."""
    GEOMETRIES.clear()


def token_order(layout: TokenLayout, order: str) -> np.ndarray:
    """Token at each position, int64: the video in `order`, then the sinks that are there.

    "cells": stable sort by brick (t//4, h//4, w//8), cell (t%4//2, h%4//2, w%8//4) and place in the
    cell (t%2, h%2, w%4); where the grid is divisible, a cell is 2x2x4 tokens.
    "hilbert": by the index on the 3-D Hilbert curve of the smallest cube of side 2^b that holds the
    grid; where 2^i divides the grid, 8^i neighbours are a cube of side 2^i.
    """
    front, back = layout.front, layout.back
    t, h, w = (a.ravel() for a in np.indices(layout.grid))
    video = np.arange(t.size)
    if order == "cells":
        keys = (t // 4, h // 4, w // 8, t % 4 // 2, h % 4 // 2, w % 8 // 4, t % 2, h % 2, w % 4)
        video = np.lexsort(keys[::-1])
    elif order == "hilbert":
        video = np.argsort(hilbert_index((w, h, t)), kind="stable")
    sinks = np.r_[0:front, front + t.size : front + t.size + back]
    return np.concatenate((video + front, sinks[~np.isin(sinks, layout.absent)])).astype(np.int64)


def hilbert_index(axes: tuple[np.ndarray, ...]) -> np.ndarray:
    """Index of points on the Hilbert curve of the smallest cube 0..2^b-1 that holds them, int64.

    J. Skilling, Programming the Hilbert curve (2004): turn and mirror each level as the levels above it ask,
    then Gray-code; bits of the axes interleave, those of the first axis leading.
    """
    x = [np.array(axis, dtype=np.int64) for axis in axes]
    bits = max((int(axis.max(initial=0)) for axis in x), default=0).bit_length()
    for bit in reversed(range(1, bits)):
        below = (1 << bit) - 1
        for axis in x:
            is_set = axis >> bit & 1
            swapped = (x[0] ^ axis) & below & (is_set - 1)
            x[0] ^= swapped | (below & -is_set)
            if axis is not x[0]:
                axis ^= swapped
    for before, axis in pairwise(x):
        axis ^= before
    flip = np.zeros_like(x[0])
    for bit in range(1, bits):
        flip ^= ((1 << bit) - 1) & -(x[-1] >> bit & 1)
    index = np.zeros_like(x[0])
    for bit in reversed(range(bits)):
        for axis in x:
            index = index << 1 | (axis ^ flip) >> bit & 1
    return index


def _may_be(*numbers: int) -> bool:
    """Whether these are numbers or places of tokens."""
    return min(numbers) >= 0 and max(numbers) <= MOST_TOKENS


def _numbers(values: object) -> tuple[int, ...] | None:
    """A tuple or list of whole numbers as a tuple, None for anything else; True is no number."""
    if isinstance(values, (tuple, list)) and all(type(n) is int for n in values):
        return tuple(values)
    return None


def _build(layout: TokenLayout, order: str, queries: int, device: torch.device) -> Geometry:
    grid, start = layout.grid, layout.query_start
    tokens = token_order(layout, order)
    length, video = len(tokens), grid[0] * grid[1] * grid[2]
    is_sink = np.arange(length) >= video  # by position
    cell = np.arange(length) // CELL
    sink_cell = np.zeros(-(-length // CELL), bool)
    sink_cell[cell[is_sink]] = True
    if start is None:
        query_tokens, own_cell = np.arange(queries), np.full(queries, -1)
        sink_query = np.zeros(queries, bool)
    else:
        mine = (tokens >= start) & (tokens < start + queries)
        query_tokens, own_cell, sink_query = tokens[mine] - start, cell[mine], is_sink[mine]

    def on_device(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return Geometry(
        query_tokens=on_device(query_tokens),
        key_tokens=on_device(tokens),
        own_cell=on_device(own_cell),
        sink_query=on_device(sink_query),
        sink_cell=on_device(sink_cell),
        host_tokens=tokens,
        grid=grid,
        rows=(queries, layout.length),
    )
