"""The launches behind the `plan` of Triton backends, one after the other.

Summaries first, then the two passes over the key cells (select.py), lists of slices, joined tiles (join.py)
where they are small, and the pass over keys (refine.py) where slices are finer than a cell.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from ...call import Call, needed
from ...layout import CELL
from ...plan import KERNEL_ROWS, SparsePlan, pack, row_bytes
from ..base import Planned
from .join import joined_on_device
from .key_tables import KeyTables, key_tables
from .launch import LOG2_E, query_rows, shared_stride
from .plan_table import plan_launch, shares
from .prepared import launch_kernel
from .refine import Chosen, refine
from .select import SLICE_BYTES, SLICE_TILES, select_kernel, slice_kernel, total_kernel
from .summarise import Summaries, summarise
from .words import WORDS


def plan_bits(call: Call) -> Planned:
    """The plan of a call, and the Summaries that its tail needs; none under a negative scale."""
    (q, k, v), geo, settings, scale = call.tensors, call.geometry, call.settings, call.scale
    v = v if settings.tail else None
    is_negative = scale < 0  # limits are divided by it
    if is_negative:
        q = -q
    m, n = settings.tile_queries, settings.tile_keys
    table = key_tables(geo, call.key_valid)
    always, order = geo.table(("always kept, bits", m), lambda: pack(geo.always_kept(m))), None
    summaries = summarise(q, k, v, query_rows(geo), table.rows, second=True)
    limits, cells = _select_cells(call, summaries, abs(scale), table)
    summaries = summaries._replace(square=None, variance=None)
    bits, widths, requested = _slices(cells, always, table, call)
    executed = requested
    if m < KERNEL_ROWS:
        bits, executed, order = joined_on_device(bits, widths, m, call.queries)
    if n < CELL:
        chosen = Chosen(needed(summaries.centroid), limits, cells, always, order)
        bits, requested, executed = refine(call, chosen, table)
    requested = requested.sum(2)
    executed = executed.sum(2) if m < KERNEL_ROWS else requested
    plan = SparsePlan(
        bits,
        requested,
        executed,
        order,
        geometry=geo,
        key_valid=call.key_valid,
        tile_rows=max(m, KERNEL_ROWS),
        tile_keys=n,
        tail=settings.tail,
        scale=call.scale,
    )
    return Planned(plan, None if is_negative else summaries)


def _select_cells(
    call: Call, summaries: Summaries, scale: float, table: KeyTables
) -> tuple[torch.Tensor, torch.Tensor]:
    """Limits fp32 [B * H, query_cells], and bits [B, H, tiles, bytes] of the cells above."""
    (batch, heads, _, dim), device = call.q.shape, call.device
    tiles = -(-call.queries // call.settings.tile_queries)
    centroid, mean = needed(summaries.centroid), needed(summaries.mean)
    (all_heads, query_cells, _), key_cells = centroid.shape, mean.shape[1]
    launch = plan_launch(device)
    blocks = -(-query_cells // launch.query_cells)
    parts = shares(blocks * all_heads, -(-key_cells // launch.key_cells), device)
    totals = torch.empty(all_heads, parts, query_cells, dtype=torch.float32, device=device)
    limits = torch.empty(all_heads, query_cells, dtype=torch.float32, device=device)
    bits = torch.empty(batch, heads, tiles, row_bytes(key_cells), dtype=torch.uint8, device=device)
    words = bits.view(WORDS[launch.key_cells])
    common = {
        "BLOCK_QUERY_CELLS": launch.query_cells,
        "BLOCK_KEY_CELLS": launch.key_cells,
        "D": dim,
        "num_warps": launch.warps,
        "num_stages": launch.stages,
    }
    launch_kernel(
        total_kernel,
        (blocks, parts, all_heads),
        centroid,
        summaries.square,
        mean,
        summaries.variance,
        table.weights,
        table.sources,
        totals,
        shared_stride(table.weights),
        shared_stride(table.sources),
        heads,
        query_cells,
        key_cells,
        scale * LOG2_E,
        scale / 2,
        **common,
    )
    launch_kernel(
        select_kernel,
        (blocks, parts, all_heads),
        centroid,
        summaries.square,
        mean,
        summaries.variance,
        totals,
        limits,
        words,
        query_cells,
        key_cells,
        tiles,
        parts,
        words.shape[3],
        scale * LOG2_E,
        scale / 2,
        call.settings.log_bound(call.keys) * LOG2_E,
        TILE_CELLS=call.settings.tile_queries // CELL,
        **common,
    )
    return limits, bits


def _slices(cells: torch.Tensor, always: torch.Tensor, table: KeyTables, call: Call):
    """Bits of slices of whole cells, the keys in each int32 [B or 1, slices], and pairs [B, H, programs].

    `cells`, the bits of cells kept for their score, become those of kept cells where slices are no larger.
    """
    (batch, heads, tiles, cell_bytes), counts, bits = cells.shape, table.counts, cells
    settings = call.settings
    span = max(1, settings.tile_keys // CELL)
    if span > 1:
        counts = pad(counts, (0, -counts.shape[1] % span)).unflatten(1, (-1, span)).sum(2, dtype=torch.int32)
        bits = cells.new_empty(batch, heads, tiles, row_bytes(counts.shape[1]))
    programs = -(-tiles // SLICE_TILES)
    pairs = torch.empty(batch, heads, programs, dtype=torch.float64, device=cells.device)
    launch_kernel(
        slice_kernel,
        (programs, batch * heads),
        cells,
        always,
        table.cells,
        bits,
        counts,
        pairs,
        shared_stride(counts),
        shared_stride(table.cells),
        heads,
        call.queries,
        tiles,
        counts.shape[1],
        cell_bytes,
        bits.shape[3],
        TILE_QUERIES=settings.tile_queries,
        SLICE_CELLS=span,
        TILES=SLICE_TILES,
        BYTES=SLICE_BYTES,
        num_warps=1,
    )
    return bits, counts, pairs
