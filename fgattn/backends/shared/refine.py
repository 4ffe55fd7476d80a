"""Refines lists to slices of fewer than 16 keys, chosen key by key inside the kept key cells.

A slice of a kept cell is kept unless c.k < limit_c for all its keys k and all the tile's centroids c (means
of query cells), with the limits of select_kernel. refine_kernel decides for every key, as a bit; from these
bits key_slice_kernel makes the lists of the executed tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...call import Call
from ...layout import CELL
from ...plan import KERNEL_ROWS, row_bytes
from .launch import COUNTS, batch_and_head, shared_stride
from .plan_table import plan_launch, shares
from .prepared import launch_kernel
from .words import (
    WORDS,
    column_order,
    every,
    keys_of_cells,
    number_of_ones,
    pairs_of,
    share,
    tile_words,
    union,
    whole_slices,
)

SLICE_TILES, SLICE_WORDS = 4, 256  # of a program and of its step


@triton.jit(do_not_specialize=["row_words", *COUNTS])
def refine_kernel(
    centroid,
    k,
    rows,
    limits,
    order,
    bits,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_rows_b,
    row_words,
    heads,
    query_cells,
    keys,
    tiles,
    BLOCK_QUERY_CELLS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    D: tl.constexpr,
    TILE_CELLS: tl.constexpr,
):
    """Which keys each tile would keep for their score; query cells and tiles in the order of execution.

    Launched by `refine`. Grid: (blocks of BLOCK_QUERY_CELLS, shares of the keys, B * H).

    Reads
        centroid: [B * H, query_cells, D]; limits: fp32 [B * H, query_cells]; k: [B, H, L, D].
        rows: int32 [B or 1, key_cells * 16], row of k at each position, -1 for none.
        order: None or int32 [B * H, query_cells], the query cell at each place of execution.
    Writes
        bits: [B * H, tiles, row_words], integers of BLOCK_KEYS / 4 bits, one bit for each key.
    """
    b, h = batch_and_head(tl.program_id(2), heads)
    head = tl.program_id(2).to(tl.int64)
    place = tl.program_id(0) * BLOCK_QUERY_CELLS + tl.arange(0, BLOCK_QUERY_CELLS)
    query_cell = place
    if order is not None:
        query_cell = tl.load(order + head * query_cells + place, mask=place < query_cells, other=0)
    dim = tl.arange(0, D)
    c = tl.load(
        centroid + (head * query_cells + query_cell[:, None]) * D + dim[None, :],
        mask=place[:, None] < query_cells,
        other=0.0,
    )
    limit = tl.load(limits + head * query_cells + query_cell, mask=place < query_cells, other=0.0)
    k += b * stride_kb + h * stride_kh
    rows += b * stride_rows_b
    T: tl.constexpr = BLOCK_QUERY_CELLS // TILE_CELLS  # tiles of this program
    tile = tl.program_id(0) * T + tl.arange(0, T)
    bits += (head * tiles + tile[:, None]) * row_words + tl.arange(0, 4)[None, :]
    at = column_order(BLOCK_KEYS)
    begin, end = share(keys, BLOCK_KEYS)
    for j in range(begin, end, BLOCK_KEYS):
        token = tl.load(rows + j + at, mask=j + at < keys, other=0)
        token = tl.maximum(token, 0).to(tl.int64)  # keys that do not exist are left out later
        scores = tl.dot(c, tl.trans(tl.load(k + token[:, None] * stride_kl + dim[None, :])))
        kept = tile_words(~(scores < limit[:, None]), place < query_cells, T, TILE_CELLS)
        tl.store(bits + j // (BLOCK_KEYS // 4), kept.to(bits.dtype.element_ty), mask=tile[:, None] < tiles)


@triton.jit(do_not_specialize=["stride_exists_b", "row_words", "cell_bytes", *COUNTS])
def key_slice_kernel(
    words,
    order,
    always,
    cell_bits,
    exists,
    bits,
    requested_pairs,
    executed_pairs,
    stride_exists_b,
    heads,
    queries,
    query_cells,
    tiles,
    row_words,
    cell_bytes,
    n_bytes,
    TILE_CELLS: tl.constexpr,
    JOINED: tl.constexpr,
    SLICE_KEYS: tl.constexpr,
    TILES: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Slices of SLICE_KEYS < 16 keys inside kept cells that are kept for a key's score or always.

    Launched by `refine`. Grid: (programs of TILES tiles, B * H). JOINED tiles are executed together, as one
    whose list is the union of theirs.

    Reads
        words: int32 [B * H, tiles, row_words], what refine_kernel wrote, 32 keys each.
        order: as for refine_kernel, by whose first query cell a tile is known.
        always: uint8 [tiles, cell_bytes], bits of the cells that a tile keeps whatever their score.
        cell_bits: uint8 [B * H, tiles, cell_bytes], bits of kept cells.
        exists: int32 [B or 1, row_words], bits of the keys that exist.
    Writes
        bits: uint8, int16 or int32 [B * H, tiles / JOINED, n_bytes of these], the lists.
        requested_pairs, executed_pairs: fp64 [B * H, programs], pairs of a query and a key in the slices of
            the tiles alone, and in those of the tiles that are executed.
    """
    b, _ = batch_and_head(tl.program_id(1), heads)
    head = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * TILES + tl.arange(0, TILES)
    tile = place
    if order is not None:
        tile = (
            tl.load(order + head * query_cells + place * TILE_CELLS, mask=place < tiles, other=0)
            // TILE_CELLS
        )
    E: tl.constexpr = TILES // JOINED  # executed tiles of this program
    executed = tl.program_id(0) * E + tl.arange(0, E)
    executed_tiles = tl.cdiv(tiles, JOINED)
    exists += b * stride_exists_b
    words += (head * tiles + place[:, None]) * row_words
    always += tile[:, None] * cell_bytes
    cell_bits += (head * tiles + tile[:, None]) * cell_bytes
    bits += (head * executed_tiles + executed[:, None]) * n_bytes
    alone = tl.zeros([TILES, WORDS], tl.int32)
    together = tl.zeros([E, WORDS], tl.int32)
    for j in range(0, row_words, WORDS):
        word = j + tl.arange(0, WORDS)
        inside = (place[:, None] < tiles) & (word < row_words)[None, :]
        shift = 2 * (word % 4)[None, :]  # a byte of cell bits serves four words: two cells each
        kept = tl.load(words + word[None, :], mask=inside, other=0)
        forced = tl.load(always + (word // 4)[None, :], mask=inside, other=0).to(tl.int32)
        in_kept = tl.load(cell_bits + (word // 4)[None, :], mask=inside, other=0).to(tl.int32)
        there = tl.load(exists + word, mask=word < row_words, other=0)[None, :]
        kept = (kept | keys_of_cells(forced >> shift)) & keys_of_cells(in_kept >> shift)
        kept = whole_slices(kept & there, SLICE_KEYS)
        alone += number_of_ones(kept & there)
        kept = union(kept, E, JOINED)
        together += number_of_ones(kept & there)
        kept = every(kept, SLICE_KEYS)
        if SLICE_KEYS == 8:  # the bits of two words fill a byte
            kept = tl.sum(tl.reshape(kept, (E, WORDS // 2, 2)) << (4 * tl.arange(0, 2))[None, None, :], 2)
        WIDE: tl.constexpr = kept.shape[1]
        at = j * WIDE // WORDS + tl.arange(0, WIDE)
        tl.store(
            bits + at[None, :],
            kept.to(bits.dtype.element_ty),
            mask=(executed[:, None] < executed_tiles) & (at < n_bytes)[None, :],
        )
    at = head * tl.num_programs(0) + tl.program_id(0)
    tl.store(requested_pairs + at, pairs_of(tl.sum(alone, 1), place, queries, TILE_CELLS * 16))
    tl.store(executed_pairs + at, pairs_of(tl.sum(together, 1), executed, queries, JOINED * TILE_CELLS * 16))


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
    (batch, heads, _, dim), (all_heads, query_cells, _), device = k.shape, centroid.shape, k.device
    tiles, launch, together = cells.shape[2], plan_launch(device), max(1, KERNEL_ROWS // m)
    words = torch.empty(batch, heads, tiles, row_bytes(keys), dtype=torch.uint8, device=device)
    out = words.view(WORDS[launch.keys])
    blocks = -(-query_cells // launch.query_cells)
    launch_kernel(
        refine_kernel,
        (blocks, shares(blocks * all_heads, -(-keys // launch.keys), device), all_heads),
        centroid,
        k,
        table.rows,
        limits,
        order,
        out,
        *k.stride()[:3],
        shared_stride(table.rows),
        out.shape[3],
        heads,
        query_cells,
        keys,
        tiles,
        BLOCK_QUERY_CELLS=launch.query_cells,
        BLOCK_KEYS=launch.keys,
        D=dim,
        TILE_CELLS=m // CELL,
        num_warps=launch.key_warps,
        num_stages=launch.key_stages,
    )
    bits = words
    if n > 1 or together > 1:
        bits = words.new_empty(batch, heads, -(-tiles // together), row_bytes(-(-keys // n)))
    out = bits.view({1: torch.int32, 2: torch.int16}.get(n, torch.uint8))
    programs = -(-tiles // SLICE_TILES)
    requested_pairs, executed_pairs = (
        torch.empty(batch, heads, programs, dtype=torch.float64, device=device) for _ in range(2)
    )
    launch_kernel(
        key_slice_kernel,
        (programs, all_heads),
        words.view(torch.int32),
        order,
        always,
        cells,
        table.keys.view(torch.int32),
        out,
        requested_pairs,
        executed_pairs,
        shared_stride(table.keys) // 4,
        heads,
        queries,
        query_cells,
        tiles,
        words.shape[3] // 4,
        cells.shape[3],
        out.shape[3],
        TILE_CELLS=m // CELL,
        JOINED=together,
        SLICE_KEYS=n,
        TILES=SLICE_TILES,
        WORDS=SLICE_WORDS,
        num_warps=4,
    )
    return bits, requested_pairs, executed_pairs
