"""Score and select: the plan's bits straight from the summaries.

A program takes BLOCK_RUNS centroids of one head past a share of the cells: total_kernel for the log-sum-exp,
select_kernel for the comparison. Logits are computed twice and never stored.

    logit = scale (c.m + scale/2 sum_d c_d^2 s2_d),   kept unless logit / scale < limit_c
    limit_c = (lse_c + ln(threshold / L_k) - 0.001) / scale
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.nn.functional import pad

from ...call import Call
from ...layout import CELL, Geometry
from ...plan import KERNEL_ROWS, SparsePlan, pack, row_bytes
from ..base import Planned
from .join import grouped
from .launch import COUNTS, LOG2_E, key_rows, on_device, query_rows, shared_stride
from .plan_table import plan_launch, shares
from .refine import Chosen, refine
from .summarise import summarise
from .words import WORDS, column_order, scores_of, share, tile_words

SLICE_TILES, SLICE_BYTES = 4, 128  # of a program and of its step


@triton.jit
def _centroids(centroid, square, head, run, runs, D: tl.constexpr):
    at = (head * runs + run[:, None]) * D + tl.arange(0, D)[None, :]
    return (tl.load(centroid + at, mask=run[:, None] < runs, other=0.0),
            tl.load(square + at, mask=run[:, None] < runs, other=0.0))


@triton.jit
def _scaled(c, c2, mean, variance, sources, at, j, cells, half, D: tl.constexpr):
    """Logits over scale. sources: None, or what stands in for each cell, as one without keys has no logit."""
    cell = tl.minimum(j + at, cells - 1)  # past the end nothing counts: no mask
    if sources is not None:
        cell = tl.load(sources + cell)
    place = cell[:, None] * D + tl.arange(0, D)[None, :]
    first = tl.dot(c, tl.trans(tl.load(mean + place)))
    return tl.fma(tl.dot(c2, tl.trans(tl.load(variance + place))), half, first)


@triton.jit(do_not_specialize=["stride_weights_b", "stride_sources_b", *COUNTS])
def total_kernel(
    centroid, square, mean, variance, weights, sources, totals, stride_weights_b, stride_sources_b, heads,
    runs, cells, scale, half,
    BLOCK_RUNS: tl.constexpr, BLOCK_CELLS: tl.constexpr, D: tl.constexpr,
):
    """Log-sum-exp, base 2, of a share of the cells for each centroid."""
    head = tl.program_id(2).to(tl.int64)
    run = tl.program_id(0) * BLOCK_RUNS + tl.arange(0, BLOCK_RUNS)
    c, c2 = _centroids(centroid, square, head, run, runs, D)
    mean += head * cells * D
    variance += head * cells * D
    weights += head // heads * stride_weights_b
    if sources is not None:
        sources += head // heads * stride_sources_b
    at = tl.arange(0, BLOCK_CELLS)
    m_i = tl.full([BLOCK_RUNS], -1e30, tl.float32)
    l_i = tl.zeros([BLOCK_RUNS], tl.float32)
    begin, end = share(cells, BLOCK_CELLS)
    for j in range(begin, end, BLOCK_CELLS):
        logits = _scaled(c, c2, mean, variance, sources, at, j, cells, half, D)
        n = tl.load(weights + j + at)
        m_new = tl.minimum(tl.maximum(m_i, tl.max(logits, 1) * scale), 3e38)  # finite: there is no inf - inf
        p = tl.exp2(logits * scale - m_new[:, None])
        l_i = l_i * tl.exp2(m_i - m_new) + tl.sum(p * n[None, :], 1)
        m_i = m_new
    tl.store(totals + (head * tl.num_programs(1) + tl.program_id(1)) * runs + run, m_i + tl.log2(l_i),
             mask=run < runs)


@triton.jit(do_not_specialize=["parts", "row", *COUNTS])
def select_kernel(
    centroid, square, mean, variance, totals, limits, bits, runs, cells, tiles, parts, row, scale, half,
    bound, BLOCK_RUNS: tl.constexpr, BLOCK_CELLS: tl.constexpr, D: tl.constexpr, TILE_RUNS: tl.constexpr,
):
    """Which cells each tile would keep for their score. TILE_RUNS: runs of a tile; parts: of `totals`.

    Bits are written as integers of BLOCK_CELLS / 4, `row` of them for a tile.
    """
    head = tl.program_id(2).to(tl.int64)
    run = tl.program_id(0) * BLOCK_RUNS + tl.arange(0, BLOCK_RUNS)
    c, c2 = _centroids(centroid, square, head, run, runs, D)
    mean += head * cells * D
    variance += head * cells * D
    m_i = tl.full([BLOCK_RUNS], -1e30, tl.float32)
    l_i = tl.zeros([BLOCK_RUNS], tl.float32)
    for i in range(parts):
        total = tl.load(totals + (head * parts + i) * runs + run, mask=run < runs, other=0.0)
        m_new = tl.minimum(tl.maximum(m_i, total), 3e38)
        l_i = l_i * tl.exp2(m_i - m_new) + tl.exp2(total - m_new)
        m_i = m_new
    limit = (m_i + tl.log2(l_i) + bound) / scale
    tl.store(limits + head * runs + run, limit, mask=(run < runs) & (tl.program_id(1) == 0))

    T: tl.constexpr = BLOCK_RUNS // TILE_RUNS  # tiles of this program
    tile = tl.program_id(0) * T + tl.arange(0, T)
    bits += (head * tiles + tile[:, None]) * row + tl.arange(0, 4)[None, :]
    at = column_order(BLOCK_CELLS)
    begin, end = share(cells, BLOCK_CELLS)
    for j in range(begin, end, BLOCK_CELLS):
        logits = _scaled(c, c2, mean, variance, None, at, j, cells, half, D)
        kept = tile_words(~(logits < limit[:, None]), run < runs, T, TILE_RUNS)  # a NaN is kept
        tl.store(bits + j // (BLOCK_CELLS // 4), kept.to(bits.dtype.element_ty), mask=tile[:, None] < tiles)


@triton.jit(do_not_specialize=["stride_widths_b", "stride_exists_b", "cell_bytes", *COUNTS])
def slice_kernel(
    cell_bits, always, exists, bits, widths, scores, stride_widths_b, stride_exists_b, heads, queries, tiles,
    slices, cell_bytes, n_bytes,
    TILE_QUERIES: tl.constexpr, SPAN: tl.constexpr, TILES: tl.constexpr, BYTES: tl.constexpr,
):
    """Slices of SPAN cells: those kept for a cell's score or always, and the scores in them."""
    head = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    widths += head // heads * stride_widths_b
    exists += head // heads * stride_exists_b
    always += tile[:, None] * cell_bytes
    cell_bits += (head * tiles + tile[:, None]) * cell_bytes
    bits += (head * tiles + tile[:, None]) * n_bytes
    keys = tl.zeros([TILES, BYTES], tl.int32)
    for j in range(0, n_bytes, BYTES):
        byte = j + tl.arange(0, BYTES)
        kept = tl.zeros([TILES, BYTES], tl.int32)
        for i in tl.static_range(8):
            source = byte * SPAN + i * SPAN // 8
            inside = (tile[:, None] < tiles) & (source < cell_bytes)[None, :]
            octet = tl.load(cell_bits + source[None, :], mask=inside, other=0)
            octet |= tl.load(always + source[None, :], mask=inside, other=0)
            octet &= tl.load(exists + source, mask=source < cell_bytes, other=0)[None, :]
            part = (octet.to(tl.int32) >> (i * SPAN % 8)) & ((1 << SPAN) - 1)
            kept |= (part > 0).to(tl.int32) << i
            width = tl.load(widths + byte * 8 + i, mask=byte * 8 + i < slices, other=0)
            keys += tl.where(part > 0, width[None, :], 0)
        tl.store(bits + byte[None, :], kept.to(tl.uint8),
                 mask=(tile[:, None] < tiles) & (byte < n_bytes)[None, :])
    tl.store(scores + head * tl.num_programs(0) + tl.program_id(0),
             scores_of(tl.sum(keys, 1), tile, queries, TILE_QUERIES))


IS_INTERPRETED = not isinstance(total_kernel, triton.JITFunction)


class KeyTables(NamedTuple):
    """What planning looks up by position of keys; B is 1 if all are valid."""

    rows: torch.Tensor  # int32 [B, cells * 16]: row of k, -1 for none
    counts: torch.Tensor  # int32 [B, cells]: valid keys
    weights: torch.Tensor  # fp32 [B, row_bytes(cells) * 8]: the same, nearly 0 past the end
    sources: torch.Tensor | None  # int32 [B, cells]: the cell itself, or one with keys; None if all have keys
    cells: torch.Tensor  # uint8 [B, row_bytes(cells)]: bits of the cells with keys
    keys: torch.Tensor  # uint8 [B, row_bytes(L_k)]: bits of the keys


def key_tables(geo: Geometry, valid: torch.Tensor | None) -> KeyTables:
    """valid: None or bool [B, L_k], in the order."""
    rows = key_rows(geo, valid)
    exists = rows >= 0
    counts = exists.view(len(rows), -1, CELL).sum(2, dtype=torch.int32)
    # What does not count stands for a cell that does: too little to show, but inf * 0 would be no number.
    weights = pad(counts.float(), (0, -counts.shape[1] % 128)).clamp(min=1e-30)
    sources, has_keys = None, counts > 0
    if valid is not None:
        itself = torch.arange(counts.shape[1], dtype=torch.int32, device=rows.device)
        sources = torch.where(has_keys, itself, has_keys.int().argmax(1, keepdim=True).int())
    return KeyTables(rows, counts, weights, sources, pack(has_keys),
                     pack(rows[:, : len(geo.key_tokens)] >= 0))


def plan_bits(call: Call) -> Planned:
    """The plan of a call, and the Summaries that its tail needs; none under a negative scale."""
    (q, k, v), geo, settings, scale = call.tensors, call.geometry, call.settings, call.scale
    v = v if settings.tail else None
    is_negative = scale < 0  # limits are divided by it
    if is_negative:
        q, scale = -q, -scale
    m, n = settings.tile_queries, settings.tile_keys
    table = (geo.table("key tables", lambda: key_tables(geo, None)) if call.key_valid is None
             else key_tables(geo, call.key_valid))
    always, order = geo.table(("always kept, bits", m), lambda: pack(geo.always_kept(m))), None
    with on_device(q):
        summaries, limits, cells = _score(dataclasses.replace(call, q=q, k=k, v=v, scale=scale), table)
        bits, widths, requested = _slices(cells, always, table, call)
        executed = requested
        if m < KERNEL_ROWS:
            bits, executed, order = grouped(bits, widths, m, call.queries)
        if n < CELL:
            bits, requested, executed = refine(
                call, Chosen(summaries.centroid, limits, cells, always, order), table)
        requested = requested.sum(2)
        executed = executed.sum(2) if m < KERNEL_ROWS else requested
    plan = SparsePlan(
        bits, requested, executed, order, geometry=geo, key_valid=call.key_valid,
        tile_rows=max(m, KERNEL_ROWS), tile_keys=n, tail=settings.tail, scale=call.scale)
    return Planned(plan, None if is_negative else summaries)


def _score(call: Call, table: KeyTables):
    """Summaries, limits of the centroids fp32 [B * H, runs], and bits [B, H, tiles, bytes] of cells above."""
    (batch, heads, _, dim), device, scale = call.q.shape, call.device, call.scale
    tiles = triton.cdiv(call.queries, call.settings.tile_queries)
    summaries = summarise(call.q, call.k, call.v, query_rows(call.geometry), table.rows, second=True)
    centroid, square, mean, variance, _ = summaries
    (groups, runs, _), cells = centroid.shape, mean.shape[1]
    launch = plan_launch(device)
    blocks = triton.cdiv(runs, launch.runs)
    parts = shares(blocks * groups, triton.cdiv(cells, launch.cells), device)
    totals = torch.empty(groups, parts, runs, dtype=torch.float32, device=device)
    limits = torch.empty(groups, runs, dtype=torch.float32, device=device)
    bits = torch.empty(batch, heads, tiles, row_bytes(cells), dtype=torch.uint8, device=device)
    words = bits.view(WORDS[launch.cells])
    common = {"BLOCK_RUNS": launch.runs, "BLOCK_CELLS": launch.cells, "D": dim, "num_warps": launch.warps,
              "num_stages": launch.stages}
    total_kernel[blocks, parts, groups](
        centroid, square, mean, variance, table.weights, table.sources, totals, shared_stride(table.weights),
        shared_stride(table.sources), heads, runs, cells, scale * LOG2_E,
        scale / 2, **common)
    select_kernel[blocks, parts, groups](
        centroid, square, mean, variance, totals, limits, words, runs, cells, tiles, parts, words.shape[3],
        scale * LOG2_E, scale / 2, call.settings.log_bound(call.keys) * LOG2_E,
        TILE_RUNS=call.settings.tile_queries // CELL, **common)
    return summaries._replace(square=None, variance=None), limits, bits


def _slices(cells: torch.Tensor, always: torch.Tensor, table: KeyTables, call: Call):
    """Bits of slices of whole cells, the keys in each int32 [B or 1, slices], and scores [B, H, programs].

    `cells`, the bits of cells kept for their score, become those of kept cells where slices are no larger.
    """
    (batch, heads, tiles, cell_bytes), counts, bits = cells.shape, table.counts, cells
    settings = call.settings
    span = max(1, settings.tile_keys // CELL)
    if span > 1:
        counts = pad(counts, (0, -counts.shape[1] % span)).unflatten(1, (-1, span)).sum(2, dtype=torch.int32)
        bits = cells.new_empty(batch, heads, tiles, row_bytes(counts.shape[1]))
    programs = triton.cdiv(tiles, SLICE_TILES)
    scores = torch.empty(batch, heads, programs, dtype=torch.float64, device=cells.device)
    slice_kernel[programs, batch * heads](
        cells, always, table.cells, bits, counts, scores, shared_stride(counts), shared_stride(table.cells),
        heads, call.queries, tiles, counts.shape[1], cell_bytes, bits.shape[3],
        TILE_QUERIES=settings.tile_queries, SPAN=span, TILES=SLICE_TILES, BYTES=SLICE_BYTES, num_warps=1)
    return bits, counts, scores
