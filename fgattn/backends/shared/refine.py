"""Refine: slices of fewer than 16 keys, chosen key by key inside the kept cells.

A program takes BLOCK_RUNS centroids of one head past a share of the keys. A slice of a kept cell is kept
unless c.k < limit_c for all its keys and all the tile's centroids, with the limits of select_kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...call import Call
from ...layout import CELL
from ...plan import KERNEL_ROWS, row_bytes
from .launch import COUNTS, shared_stride
from .plan_table import plan_launch, shares
from .words import (
    WORDS,
    column_order,
    every,
    joined,
    keys_of_cells,
    number_of_ones,
    scores_of,
    share,
    tile_words,
    whole_slices,
)

SLICE_TILES, SLICE_WORDS = 4, 256  # of a program and of its step


@triton.jit(do_not_specialize=["row", *COUNTS])
def refine_kernel(
    centroid, k, rows, limits, order, bits, stride_kb, stride_kh, stride_kl, stride_rows_b, row, heads, runs,
    keys, tiles, BLOCK_RUNS: tl.constexpr, BLOCK_KEYS: tl.constexpr, D: tl.constexpr, TILE_RUNS: tl.constexpr,
):
    """Which keys each tile would keep for their score; runs and tiles in the order of execution.

    Bits are written as integers of BLOCK_KEYS / 4, `row` of them for a tile.
    """
    head = tl.program_id(2).to(tl.int64)
    place = tl.program_id(0) * BLOCK_RUNS + tl.arange(0, BLOCK_RUNS)
    run = place
    if order is not None:
        run = tl.load(order + head * runs + place, mask=place < runs, other=0)
    dim = tl.arange(0, D)
    c = tl.load(centroid + (head * runs + run[:, None]) * D + dim[None, :],
                mask=place[:, None] < runs, other=0.0)
    limit = tl.load(limits + head * runs + run, mask=place < runs, other=0.0)
    k += head // heads * stride_kb + head % heads * stride_kh
    rows += head // heads * stride_rows_b
    T: tl.constexpr = BLOCK_RUNS // TILE_RUNS
    tile = tl.program_id(0) * T + tl.arange(0, T)
    bits += (head * tiles + tile[:, None]) * row + tl.arange(0, 4)[None, :]
    at = column_order(BLOCK_KEYS)
    begin, end = share(keys, BLOCK_KEYS)
    for j in range(begin, end, BLOCK_KEYS):
        token = tl.load(rows + j + at, mask=j + at < keys, other=0)
        token = tl.maximum(token, 0).to(tl.int64)  # keys that do not exist are left out later
        scores = tl.dot(c, tl.trans(tl.load(k + token[:, None] * stride_kl + dim[None, :])))
        kept = tile_words(~(scores < limit[:, None]), place < runs, T, TILE_RUNS)
        tl.store(bits + j // (BLOCK_KEYS // 4), kept.to(bits.dtype.element_ty), mask=tile[:, None] < tiles)


@triton.jit(do_not_specialize=["stride_exists_b", "row", "cell_bytes", *COUNTS])
def key_slice_kernel(
    words, order, always, cell_bits, exists, bits, asked, done, stride_exists_b, heads, queries, runs, tiles,
    row, cell_bytes, n_bytes, TILE_RUNS: tl.constexpr, JOINED: tl.constexpr, N: tl.constexpr,
    TILES: tl.constexpr, WORDS: tl.constexpr,
):
    """Slices of N keys inside kept cells: those kept for a key's score or always, and the scores in them.

    words: 32 keys each, of the tiles in the order of execution; JOINED of them are executed together.
    """
    head = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * TILES + tl.arange(0, TILES)
    tile = place
    if order is not None:
        tile = tl.load(order + head * runs + place * TILE_RUNS, mask=place < tiles, other=0) // TILE_RUNS
    E: tl.constexpr = TILES // JOINED
    number = tl.program_id(0) * E + tl.arange(0, E)
    total = tl.cdiv(tiles, JOINED)
    exists += head // heads * stride_exists_b
    words += (head * tiles + place[:, None]) * row
    always += tile[:, None] * cell_bytes
    cell_bits += (head * tiles + tile[:, None]) * cell_bytes
    bits += (head * total + number[:, None]) * n_bytes
    alone = tl.zeros([TILES, WORDS], tl.int32)
    together = tl.zeros([E, WORDS], tl.int32)
    for j in range(0, row, WORDS):
        word = j + tl.arange(0, WORDS)
        inside = (place[:, None] < tiles) & (word < row)[None, :]
        pair = 2 * (word % 4)[None, :]  # the cells of a word, in their byte
        kept = tl.load(words + word[None, :], mask=inside, other=0)
        forced = tl.load(always + (word // 4)[None, :], mask=inside, other=0).to(tl.int32)
        in_kept = tl.load(cell_bits + (word // 4)[None, :], mask=inside, other=0).to(tl.int32)
        there = tl.load(exists + word, mask=word < row, other=0)[None, :]
        kept = (kept | keys_of_cells(forced >> pair)) & keys_of_cells(in_kept >> pair)
        kept = whole_slices(kept & there, N)
        alone += number_of_ones(kept & there)
        kept = joined(kept, E, JOINED)
        together += number_of_ones(kept & there)
        kept = every(kept, N)
        if N == 8:  # the bits of two words fill a byte
            kept = tl.sum(tl.reshape(kept, (E, WORDS // 2, 2)) << (4 * tl.arange(0, 2))[None, None, :], 2)
        WIDE: tl.constexpr = kept.shape[1]
        at = j * WIDE // WORDS + tl.arange(0, WIDE)
        tl.store(bits + at[None, :], kept.to(bits.dtype.element_ty),
                 mask=(number[:, None] < total) & (at < n_bytes)[None, :])
    at = head * tl.num_programs(0) + tl.program_id(0)
    tl.store(asked + at, scores_of(tl.sum(alone, 1), place, queries, TILE_RUNS * 16))
    tl.store(done + at, scores_of(tl.sum(together, 1), number, queries, JOINED * TILE_RUNS * 16))


class Chosen(NamedTuple):
    """What the pass over cells has found, for the pass over keys.

    | field | shape | meaning |
    |---|---|---|
    | centroid | [B * H, query cells, D] | mean of a query cell |
    | limits | [B * H, query cells] fp32 | smallest score that is kept, over the scale |
    | cells | [B, H, tiles, bytes] uint8 | bits of the kept key cells |
    | always | [tiles, bytes] uint8 | bits of the key cells that are kept whatever their score |
    | order | None or [B, H, query cells] int32 | order of execution |
    """

    centroid: torch.Tensor
    limits: torch.Tensor
    cells: torch.Tensor
    always: torch.Tensor
    order: torch.Tensor | None


def refine(call: Call, chosen: Chosen, table):
    """Bits of slices of N < 16 keys, and pairs asked for and executed, both [B, H, programs] in parts.

    Args:
        table: KeyTables of the call.
    """
    (centroid, limits, cells, always, order), k = chosen, call.tensors[1]
    m, n, queries, keys = call.settings.tile_queries, call.settings.tile_keys, call.queries, call.keys
    (batch, heads, _, dim), (groups, runs, _), device = k.shape, centroid.shape, k.device
    tiles, launch, together = cells.shape[2], plan_launch(device), max(1, KERNEL_ROWS // m)
    words = torch.empty(batch, heads, tiles, row_bytes(keys), dtype=torch.uint8, device=device)
    out = words.view(WORDS[launch.keys])
    blocks = triton.cdiv(runs, launch.runs)
    refine_kernel[blocks, shares(blocks * groups, triton.cdiv(keys, launch.keys), device), groups](
        centroid, k, table.rows, limits, order, out, *k.stride()[:3], shared_stride(table.rows), out.shape[3],
        heads, runs, keys, tiles, BLOCK_RUNS=launch.runs, BLOCK_KEYS=launch.keys, D=dim, TILE_RUNS=m // CELL,
        num_warps=launch.key_warps, num_stages=launch.key_stages)
    bits = words
    if n > 1 or together > 1:
        bits = words.new_empty(batch, heads, triton.cdiv(tiles, together), row_bytes(triton.cdiv(keys, n)))
    out = bits.view({1: torch.int32, 2: torch.int16}.get(n, torch.uint8))
    programs = triton.cdiv(tiles, SLICE_TILES)
    asked, done = (torch.empty(batch, heads, programs, dtype=torch.float64, device=device) for _ in range(2))
    key_slice_kernel[programs, groups](
        words.view(torch.int32), order, always, cells, table.keys.view(torch.int32), out, asked, done,
        shared_stride(table.keys) // 4, heads, queries, runs, tiles, words.shape[3] // 4, cells.shape[3],
        out.shape[3], TILE_RUNS=m // CELL, JOINED=together, N=n, TILES=SLICE_TILES, WORDS=SLICE_WORDS,
        num_warps=4)
    return bits, asked, done
