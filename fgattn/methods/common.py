"""What selection methods share: what they see, means of rows, the best share of the slices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from ..layout import CELL, Geometry, TokenLayout

STEP_ELEMENTS = 4 << 20  # size of the largest temporary while some tiles are judged


@dataclass(frozen=True, eq=False)
class Heads:
    """What a selection method sees: some heads of one batch row of a call.

    | attribute | shape | meaning |
    |---|---|---|
    | q, k | [G, L_q, D], [G, L_k, D] | rows in the order, neither empty |
    | valid | None or bool [L_k] | keys that exist, in the order |
    | geometry, layout | | places of queries and keys |
    | tile_queries, tile_keys | | M and N |
    | parameter | | the method's strength |
    | scale | | softmax scale |
    """

    q: torch.Tensor
    k: torch.Tensor
    valid: torch.Tensor | None
    geometry: Geometry
    layout: TokenLayout
    tile_queries: int
    tile_keys: int
    parameter: float
    scale: float

    @property
    def tiles(self) -> int:
        return -(-self.q.shape[1] // self.tile_queries)

    @property
    def slices(self) -> int:
        return -(-self.k.shape[1] // self.tile_keys)

    def judge(self, elements: int, keep: Callable[[slice], torch.Tensor]) -> torch.Tensor:
        """Kept slices [G, tiles, slices] of keep(some tiles), which needs `elements` per tile and head."""
        kept = torch.empty(len(self.q), self.tiles, self.slices, dtype=torch.bool, device=self.q.device)
        for tile in steps(self.tiles, len(self.q) * elements):
            kept[:, tile] = keep(tile)
        return kept

    def keys_in(self, width: int) -> torch.Tensor:
        """Valid keys among each `width` neighbours, int64 [ceil(L / width)]."""
        return counts(self.k.shape[1], width, self.valid, self.k.device)

    def candidates(self) -> torch.Tensor:
        """Bool [slices]: slices with valid keys and without sinks, which are kept anyway."""
        return (self.keys_in(self.tile_keys) > 0) & ~self.in_slices(self.geometry.sink_cell)

    def in_slices(self, cells: torch.Tensor) -> torch.Tensor:
        """[..., cells] -> [..., slices]: slices that have to do with one of these cells."""
        if self.tile_keys < CELL:
            return cells.repeat_interleave(CELL // self.tile_keys, -1)[..., : self.slices]
        return folded(cells, self.tile_keys // CELL).any(-1)


@dataclass(frozen=True)
class Method:
    """A selection rule.

    Attributes:
        parameter: what its strength is, with the unit's name.
        default, most: of the parameter; it is greater than 0.
        select: Heads -> bool [G or 1, tiles, slices]; sinks and own cells are added to it.
    """

    parameter: str
    default: float
    most: float
    select: Callable[[Heads], torch.Tensor]


def means(x: torch.Tensor, width: int, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Means of the valid rows among each `width` neighbours, [G, ceil(L / width), D], 0 for none.

    In fp32, or in float64 for float64.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = x.to(wide) if valid is None else x.to(wide).masked_fill(~valid[:, None], 0.0)
    rows = pad(rows, (0, 0, 0, -x.shape[1] % width)).unflatten(1, (-1, width)).sum(2)
    return rows / counts(x.shape[1], width, valid, x.device).clamp(min=1)[:, None]


def counts(length: int, width: int, valid: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Valid rows among each `width` neighbours, int64 [ceil(L / width)]."""
    exists = torch.ones(length, dtype=torch.bool, device=device) if valid is None else valid
    return folded(exists, width).sum(1)


def folded(x: torch.Tensor, width: int) -> torch.Tensor:
    """[..., n] -> [..., ceil(n / width), width], zeros or False at the end."""
    return pad(x, (0, -x.shape[-1] % width)).unflatten(-1, (-1, width))


def keep_top(scores: torch.Tensor, candidates: torch.Tensor, share: float) -> torch.Tensor:
    """The best floor(share * candidates) slices of each tile, at least one; between equals the first.

    Args:
        scores: [G, T, slices]; what is no number is kept, too.
        candidates: bool [slices].
    """
    number = (candidates.sum().double() * share).floor().clamp(min=1)
    unknown = scores.isnan()
    ranked = scores.masked_fill(unknown, torch.inf).masked_fill(~candidates, -torch.inf)
    place = ranked.argsort(dim=2, descending=True, stable=True)
    first = (torch.arange(scores.shape[2], device=scores.device) < number).expand_as(place)
    return (torch.zeros_like(unknown).scatter_(2, place, first) | unknown) & candidates


def steps(tiles: int, elements: int) -> Iterator[slice]:
    """Ranges of as many tiles as fit at `elements` each."""
    step = max(1, STEP_ELEMENTS // max(1, elements))
    for first in range(0, tiles, step):
        yield slice(first, min(first + step, tiles))
