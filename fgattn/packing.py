"""Packing: the slices that tiles of M queries keep become the bits of a plan; small tiles are joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from .call import Call
from .joining import joined_order
from .layout import CELL, Geometry
from .plan import KERNEL_ROWS, SparsePlan, pack, valid_counts
from .tensors import CHUNK_ELEMENTS, any_of, head_chunks, ordered

# Rows of some heads in the order, q [G, L_q, D] and k [G, L_k, D], and their valid keys [L_k] or None, to
# kept slices [G, tiles, slices] and what tiles are joined by: the same, or key cells where N < 16.
Select = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]


class Packed(NamedTuple):
    """A part of a plan, of some heads of one batch row; shapes as in SparsePlan, with G heads in front."""

    bits: torch.Tensor
    requested: torch.Tensor
    executed: torch.Tensor
    cell_order: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class Packing:
    """What slices are packed for; attributes as in SparsePlan, but M for the rows of an executed tile."""

    tile_queries: int
    tile_keys: int
    geometry: Geometry
    key_valid: torch.Tensor | None
    tail: bool
    scale: float | None

    @property
    def queries(self) -> int:
        return len(self.geometry.query_tokens)

    @property
    def keys(self) -> int:
        return len(self.geometry.key_tokens)

    def row_valid(self, batch: int) -> torch.Tensor | None:
        """Valid keys of a batch row, bool [L_k], None if all are."""
        return None if self.key_valid is None else self.key_valid[batch]

    def packed(self, kept: torch.Tensor, alike: torch.Tensor, batch: int) -> Packed:
        """Some heads of a batch row.

        Args:
            kept: bool [G, tiles, slices].
            alike: what tiles are joined by, bool [G, tiles, slices or key cells].
        """
        m = self.tile_queries
        weight = valid_counts(self.keys, self.tile_keys, self.row_valid(batch), kept.device).float()
        requested = _pairs(kept, m, self.queries, weight)
        order = None
        if m < KERNEL_ROWS:
            order = joined_order(alike, m, self.queries)
            tile = order[:, :: m // CELL, None].long() // (m // CELL)
            kept = kept.gather(1, tile.expand_as(kept))
            kept = any_of(kept.transpose(1, 2), KERNEL_ROWS // m).transpose(1, 2)
        executed = _pairs(kept, max(m, KERNEL_ROWS), self.queries, weight)
        return Packed(pack(kept), requested, executed, order)

    def plan(self, parts: Sequence[Packed], batch: int, heads: int) -> SparsePlan:
        """The plan of all parts, which are in order of batch row and head; none where there is no head."""
        if not parts:  # of one head, which is cut off below: the plan has its shapes
            tiles, slices = -(-self.queries // self.tile_queries), -(-self.keys // self.tile_keys)
            kept = torch.zeros(1, tiles, slices, dtype=torch.bool, device=self.geometry.key_tokens.device)
            parts = [replace(self, key_valid=None).packed(kept, kept, 0)]

        def whole(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
            return torch.cat(tensors)[: batch * heads].unflatten(0, (batch, heads))

        bits, requested, executed, orders = zip(*parts, strict=True)
        return SparsePlan(
            whole(bits),
            whole(requested),
            whole(executed),
            None if orders[0] is None else whole(orders),
            geometry=self.geometry,
            key_valid=self.key_valid,
            tile_rows=max(self.tile_queries, KERNEL_ROWS),
            tile_keys=self.tile_keys,
            tail=self.tail,
            scale=self.scale,
        )


def packing_of(call: Call) -> Packing:
    """What slices are packed for in a call."""
    s = call.settings
    return Packing(s.tile_queries, s.tile_keys, call.geometry, call.key_valid, s.tail, call.scale)


def plan_selected(call: Call, select: Select) -> SparsePlan:
    """The plan of what `select` keeps, asked for a few heads at a time."""
    packing = packing_of(call)
    (batch, heads, _, dim), device = call.q.shape, call.device
    queries, keys, n = packing.queries, packing.keys, packing.tile_keys
    tiles, slices = -(-queries // packing.tile_queries), -(-keys // n)
    cell_pairs = tiles * (packing.tile_queries // CELL) * (keys // CELL + 1)
    elements = max(queries * dim, keys * dim, cell_pairs, tiles * keys // n)
    parts = []
    for b, part in head_chunks(batch, heads, elements):
        if queries and keys:
            q, k = (
                ordered(call.q, b, part, call.geometry.query_tokens),
                ordered(call.k, b, part, call.geometry.key_tokens),
            )
            kept, alike = select(q, k, packing.row_valid(b))
        else:
            kept = alike = torch.zeros(part.stop - part.start, tiles, slices, dtype=torch.bool, device=device)
        parts.append(packing.packed(kept, alike, b))
    return packing.plan(parts, batch, heads)


def _pairs(kept: torch.Tensor, rows: int, queries: int, weight: torch.Tensor) -> torch.Tensor:
    """Number of query-key pairs in the kept slices of each head, [G] float64.

    Args:
        kept: bool [G, tiles, slices], tiles of `rows` queries, the last one short.
        weight: keys of each slice, fp32.
    """
    tile = torch.arange(kept.shape[1], device=kept.device)
    rows_of = (queries - tile * rows).clamp(max=rows).double()
    step = max(1, CHUNK_ELEMENTS // max(1, kept.shape[2]))
    keys = [torch.cat([t.float() @ weight for t in head.split(step)]) for head in kept]
    return torch.stack(keys).double() @ rows_of
