"""Selects which key cells each tile keeps: the plan's bits straight from the summaries.

A program takes BLOCK_QUERY_CELLS centroids of one head past a share of the key cells: total_kernel for the
log-sum-exp, select_kernel for the comparison. Logits are computed twice and never stored. With the centroid c
of a query cell, the mean m and the variances s2 of a key cell, and its number of keys n:

    logit = scale (c.m + scale/2 sum_d c_d^2 s2_d),   kept unless logit / scale < limit_c
    limit_c = (lse_c + ln(threshold / L_k) - 0.001) / scale,   lse_c = ln(sum_cells n e^logit)

slice_kernel then makes lists of slices of 16 keys and more; refine.py those of fewer.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import COUNTS, batch_and_head
from .words import column_order, pairs_of, share, tile_words

SLICE_TILES, SLICE_BYTES = 4, 128  # of a program and of its step


@triton.jit
def _centroids(centroid, square, head, query_cell, query_cells, D: tl.constexpr):
    """Centroids of a head and their squares, each [BLOCK_QUERY_CELLS, D]; zeros past the end."""
    at = (head * query_cells + query_cell[:, None]) * D + tl.arange(0, D)[None, :]
    return (
        tl.load(centroid + at, mask=query_cell[:, None] < query_cells, other=0.0),
        tl.load(square + at, mask=query_cell[:, None] < query_cells, other=0.0),
    )


@triton.jit
def _scaled(c, c2, mean, variance, sources, at, j, key_cells, half, D: tl.constexpr):
    """Logits over scale, fp32 [BLOCK_QUERY_CELLS, BLOCK_KEY_CELLS], of the key cells j + at; half: scale / 2.

    sources: None, or int32 [key_cells], what stands in for each cell, as one without keys has no logit.
    """
    key_cell = tl.minimum(j + at, key_cells - 1)  # past the end nothing counts: no mask
    if sources is not None:
        key_cell = tl.load(sources + key_cell)
    place = key_cell[:, None] * D + tl.arange(0, D)[None, :]
    first = tl.dot(c, tl.trans(tl.load(mean + place)))
    return tl.fma(tl.dot(c2, tl.trans(tl.load(variance + place))), half, first)


@triton.jit(do_not_specialize=["stride_weights_b", "stride_sources_b", *COUNTS])
def total_kernel(
    centroid,
    square,
    mean,
    variance,
    weights,
    sources,
    totals,
    stride_weights_b,
    stride_sources_b,
    heads,
    query_cells,
    key_cells,
    scale,
    half,
    BLOCK_QUERY_CELLS: tl.constexpr,
    BLOCK_KEY_CELLS: tl.constexpr,
    D: tl.constexpr,
):
    """Log-sum-exp of a share of the key cells for each centroid: log2(sum n 2^(scale * scaled logit)).

    Launched by `plan_bits`. Grid: (blocks of BLOCK_QUERY_CELLS, shares of the key cells, B * H).

    Reads
        centroid, square, mean, variance: of Summaries, 16 bits or fp32.
        weights: fp32 [B or 1, key_cells and more], n; sources: None or int32 [B or 1, key_cells].
        scale, half: the softmax scale times log2(e), and half the softmax scale.
    Writes
        totals: fp32 [B * H, shares, query_cells].
    """
    head = tl.program_id(2).to(tl.int64)
    query_cell = tl.program_id(0) * BLOCK_QUERY_CELLS + tl.arange(0, BLOCK_QUERY_CELLS)
    c, c2 = _centroids(centroid, square, head, query_cell, query_cells, D)
    mean += head * key_cells * D
    variance += head * key_cells * D
    b, _ = batch_and_head(tl.program_id(2), heads)
    weights += b * stride_weights_b
    if sources is not None:
        sources += b * stride_sources_b
    at = tl.arange(0, BLOCK_KEY_CELLS)
    m_i = tl.full([BLOCK_QUERY_CELLS], -1e30, tl.float32)
    l_i = tl.zeros([BLOCK_QUERY_CELLS], tl.float32)
    begin, end = share(key_cells, BLOCK_KEY_CELLS)
    for j in range(begin, end, BLOCK_KEY_CELLS):
        logits = _scaled(c, c2, mean, variance, sources, at, j, key_cells, half, D)
        n = tl.load(weights + j + at)
        m_new = tl.minimum(tl.maximum(m_i, tl.max(logits, 1) * scale), 3e38)  # finite: there is no inf - inf
        p = tl.exp2(logits * scale - m_new[:, None])
        l_i = l_i * tl.exp2(m_i - m_new) + tl.sum(p * n[None, :], 1)
        m_i = m_new
    tl.store(
        totals + (head * tl.num_programs(1) + tl.program_id(1)) * query_cells + query_cell,
        m_i + tl.log2(l_i),
        mask=query_cell < query_cells,
    )


@triton.jit(do_not_specialize=["parts", "row_words", *COUNTS])
def select_kernel(
    centroid,
    square,
    mean,
    variance,
    totals,
    limits,
    bits,
    query_cells,
    key_cells,
    tiles,
    parts,
    row_words,
    scale,
    half,
    bound,
    BLOCK_QUERY_CELLS: tl.constexpr,
    BLOCK_KEY_CELLS: tl.constexpr,
    D: tl.constexpr,
    TILE_CELLS: tl.constexpr,
):
    """Which key cells each tile of TILE_CELLS query cells would keep for their score.

    Launched by `plan_bits` after total_kernel. Grid: (blocks of BLOCK_QUERY_CELLS, shares of the key cells,
    B * H).

    Reads
        what total_kernel reads and writes, `parts` being the shares; bound: log2(threshold / L_k) less
        0.001 log2(e).
    Writes
        limits: fp32 [B * H, query_cells], limit_c.
        bits: [B * H, tiles, row_words], integers of BLOCK_KEY_CELLS / 4 bits, one bit for each key cell.
    """
    head = tl.program_id(2).to(tl.int64)
    query_cell = tl.program_id(0) * BLOCK_QUERY_CELLS + tl.arange(0, BLOCK_QUERY_CELLS)
    c, c2 = _centroids(centroid, square, head, query_cell, query_cells, D)
    mean += head * key_cells * D
    variance += head * key_cells * D
    m_i = tl.full([BLOCK_QUERY_CELLS], -1e30, tl.float32)
    l_i = tl.zeros([BLOCK_QUERY_CELLS], tl.float32)
    for i in range(parts):
        total = tl.load(
            totals + (head * parts + i) * query_cells + query_cell, mask=query_cell < query_cells, other=0.0
        )
        m_new = tl.minimum(tl.maximum(m_i, total), 3e38)
        l_i = l_i * tl.exp2(m_i - m_new) + tl.exp2(total - m_new)
        m_i = m_new
    limit = (m_i + tl.log2(l_i) + bound) / scale
    if tl.program_id(1) == 0:  # all shares of the keys have the same limits
        tl.store(limits + head * query_cells + query_cell, limit, mask=query_cell < query_cells)

    T: tl.constexpr = BLOCK_QUERY_CELLS // TILE_CELLS  # tiles of this program
    tile = tl.program_id(0) * T + tl.arange(0, T)
    bits += (head * tiles + tile[:, None]) * row_words + tl.arange(0, 4)[None, :]
    at = column_order(BLOCK_KEY_CELLS)
    begin, end = share(key_cells, BLOCK_KEY_CELLS)
    for j in range(begin, end, BLOCK_KEY_CELLS):
        logits = _scaled(c, c2, mean, variance, None, at, j, key_cells, half, D)
        kept = ~(logits < limit[:, None])  # a NaN is kept
        kept = tile_words(kept, query_cell < query_cells, T, TILE_CELLS)
        tl.store(
            bits + j // (BLOCK_KEY_CELLS // 4), kept.to(bits.dtype.element_ty), mask=tile[:, None] < tiles
        )


@triton.jit(do_not_specialize=["stride_widths_b", "stride_exists_b", "cell_bytes", *COUNTS])
def slice_kernel(
    cell_bits,
    always,
    exists,
    bits,
    widths,
    requested_pairs,
    stride_widths_b,
    stride_exists_b,
    heads,
    queries,
    tiles,
    slices,
    cell_bytes,
    n_bytes,
    TILE_QUERIES: tl.constexpr,
    SLICE_CELLS: tl.constexpr,
    TILES: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Slices of SLICE_CELLS key cells that are kept for a cell's score or always.

    Launched by `plan_bits` after select_kernel. Grid: (programs of TILES tiles, B * H).

    Reads
        cell_bits: uint8 [B * H, tiles, cell_bytes], what select_kernel wrote.
        always: uint8 [tiles, cell_bytes], bits of the cells that a tile keeps whatever their score.
        exists: uint8 [B or 1, cell_bytes], bits of the cells that have keys.
        widths: int32 [B or 1, slices], keys of each slice.
    Writes
        bits: uint8 [B * H, tiles, n_bytes], the lists; may be cell_bits.
        requested_pairs: fp64 [B * H, programs], pairs of a query and a key in the listed slices.
    """
    head = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    b, _ = batch_and_head(tl.program_id(1), heads)
    widths += b * stride_widths_b
    exists += b * stride_exists_b
    always += tile[:, None] * cell_bytes
    cell_bits += (head * tiles + tile[:, None]) * cell_bytes
    bits += (head * tiles + tile[:, None]) * n_bytes
    keys = tl.zeros([TILES, BYTES], tl.int32)
    for j in range(0, n_bytes, BYTES):
        byte = j + tl.arange(0, BYTES)
        kept = tl.zeros([TILES, BYTES], tl.int32)
        for i in tl.static_range(8):
            source = byte * SLICE_CELLS + i * SLICE_CELLS // 8
            inside = (tile[:, None] < tiles) & (source < cell_bytes)[None, :]
            octet = tl.load(cell_bits + source[None, :], mask=inside, other=0)
            octet |= tl.load(always + source[None, :], mask=inside, other=0)
            octet &= tl.load(exists + source, mask=source < cell_bytes, other=0)[None, :]
            part = (octet.to(tl.int32) >> (i * SLICE_CELLS % 8)) & ((1 << SLICE_CELLS) - 1)
            kept |= (part > 0).to(tl.int32) << i
            width = tl.load(widths + byte * 8 + i, mask=byte * 8 + i < slices, other=0)
            keys += tl.where(part > 0, width[None, :], 0)
        tl.store(
            bits + byte[None, :], kept.to(tl.uint8), mask=(tile[:, None] < tiles) & (byte < n_bytes)[None, :]
        )
    tl.store(
        requested_pairs + head * tl.num_programs(0) + tl.program_id(0),
        pairs_of(tl.sum(keys, 1), tile, queries, TILE_QUERIES),
    )
