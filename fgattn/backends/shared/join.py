"""Joins small query tiles whose lists are alike two by two, by the rule of `fgattn.joining`.

A joined tile is executed at once; its list is the union of its tiles' lists. The distance of two tiles is the
number of slices that only one of them keeps. With the lists as vectors a and b of zeros and ones it is
n_a + n_b - 2 a.b, where n counts the ones, so that one product of matrices gives all distances of a window.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...joining import FARTHEST, WINDOW
from ...layout import CELL
from ...plan import KERNEL_ROWS
from .launch import COUNTS, batch_and_head, shared_stride
from .prepared import launch_kernel

BLOCK_BYTES, WARPS = 8, 2


@triton.jit(do_not_specialize=["stride_order", "stride_widths_b", *COUNTS])
def join_kernel(
    bits,
    order,
    widths,
    joined_bits,
    joined_order,
    executed_pairs,
    stride_order,
    stride_widths_b,
    heads,
    queries,
    query_cells,
    tiles,
    slices,
    n_bytes,
    WINDOW: tl.constexpr,
    TILE_CELLS: tl.constexpr,
    FARTHEST: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Joins the WINDOW tiles of a window two by two: the closest two that are left, over and over.

    Launched by `joined_on_device`, once for each doubling. Grid: (windows, B * H).

    Reads
        bits: uint8 [B * H, tiles, n_bytes], the tiles' lists.
        order: int32 [B * H or 1, query_cells], the query cells of the tiles, TILE_CELLS each.
        widths: int32 [B or 1, slices], keys of each slice; if COUNT.
    Writes
        joined_bits: uint8 [B * H, ceil(tiles / 2), n_bytes].
        joined_order: int32 [B * H, query_cells], those of the joined tiles, 2 * TILE_CELLS each.
        executed_pairs: int64 [B * H, windows], pairs of a query and a key in the joined tiles; if COUNT.
    """
    window = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    bits += head * tiles * n_bytes
    place = tl.arange(0, WINDOW)
    first = window * WINDOW
    tile = first + place
    common = tl.zeros([WINDOW, WINDOW], tl.float32)
    for j in range(0, n_bytes, BLOCK_BYTES):
        part = j * 8 + tl.arange(0, BLOCK_BYTES * 8)
        octet = tl.load(
            bits + tile[:, None].to(tl.int64) * n_bytes + (part // 8)[None, :],
            mask=(tile < tiles)[:, None] & (part // 8 < n_bytes)[None, :],
            other=0,
        ).to(tl.int32)
        kept = ((octet >> (part % 8)[None, :]) & 1).to(tl.float16)
        common = tl.dot(kept, tl.trans(kept), common)
    diagonal = tl.where(place[:, None] == place[None, :], common, 0.0)
    apart = tl.sum(diagonal, 1)[:, None] + tl.sum(diagonal, 0)[None, :] - 2 * common
    # Distance and both places in one integer: the smallest is the closest two, between equals the first.
    key = tl.minimum(apart, FARTHEST).to(tl.int32) * WINDOW + place[:, None]
    key = key * WINDOW + place[None, :]
    whole = queries // (TILE_CELLS * 16) // 2 * 2  # tiles that may be joined at will
    none: tl.constexpr = 2147483647
    key = tl.where((place[:, None] < place[None, :]) & (tile < whole)[None, :], key, none)
    joined = tl.arange(0, WINDOW // 2)
    one, two = 2 * joined, 2 * joined + 1
    for i in range(tl.minimum(tl.maximum(whole - first, 0), WINDOW) // 2):
        best = tl.min(tl.min(key, 1), 0)
        a, b = best // WINDOW % WINDOW, best % WINDOW
        one, two = tl.where(joined == i, a, one), tl.where(joined == i, b, two)
        taken = (place == a) | (place == b)
        key = tl.where(taken[:, None] | taken[None, :], none, key)
    one, two = one + first, two + first
    joined += first // 2

    order += head * stride_order
    joined_order += head * query_cells
    for i in tl.static_range(2 * TILE_CELLS):
        source = (one if i < TILE_CELLS else two) * TILE_CELLS + i % TILE_CELLS
        target = joined * (2 * TILE_CELLS) + i
        query_cell = tl.load(order + source, mask=target < query_cells, other=0)
        tl.store(joined_order + target, query_cell, mask=target < query_cells)
    joined_tiles = tl.cdiv(tiles, 2)
    joined_bits += head * joined_tiles * n_bytes
    b, _ = batch_and_head(tl.program_id(1), heads)
    widths += b * stride_widths_b
    keys = tl.zeros([WINDOW // 2], tl.int32)
    for j in range(0, n_bytes, BLOCK_BYTES):
        byte = j + tl.arange(0, BLOCK_BYTES)
        inside = (byte < n_bytes)[None, :]
        octet = tl.load(
            bits + one[:, None].to(tl.int64) * n_bytes + byte[None, :],
            mask=(one < tiles)[:, None] & inside,
            other=0,
        )
        octet |= tl.load(
            bits + two[:, None].to(tl.int64) * n_bytes + byte[None, :],
            mask=(two < tiles)[:, None] & inside,
            other=0,
        )
        tl.store(
            joined_bits + joined[:, None].to(tl.int64) * n_bytes + byte[None, :],
            octet,
            mask=(joined < joined_tiles)[:, None] & inside,
        )
        if COUNT:
            for i in tl.static_range(8):
                width = tl.load(widths + byte * 8 + i, mask=byte * 8 + i < slices, other=0)
                keys += tl.sum(((octet.to(tl.int32) >> i) & 1) * width[None, :], 1)
    if COUNT:
        rows = tl.minimum(tl.maximum(queries - joined * (TILE_CELLS * 32), 0), TILE_CELLS * 32)
        tl.store(executed_pairs + head * tl.num_programs(0) + window, tl.sum(keys.to(tl.int64) * rows, 0))


def joined_on_device(bits: torch.Tensor, widths: torch.Tensor, tile_queries: int, queries: int):
    """Join tiles until they have KERNEL_ROWS queries; inside the tensors' device context.

    Args:
        bits: [B, H, tiles, bytes] uint8, the tiles' lists. widths: int32 [B or 1, slices], keys of each.

    Returns:
        The joined tiles' bits, their pairs int64 [B, H, n] in parts, and a plan's order of query cells.
    """
    (batch, heads, tiles, n_bytes), device = bits.shape, bits.device
    rows, query_cells, stride = tile_queries, -(-queries // CELL), 0
    order = torch.arange(query_cells, dtype=torch.int32, device=device)
    while rows < KERNEL_ROWS:
        windows, joined_tiles = -(-tiles // WINDOW), -(-tiles // 2)
        joined_bits = torch.empty(batch, heads, joined_tiles, n_bytes, dtype=torch.uint8, device=device)
        joined_order = torch.empty(batch, heads, query_cells, dtype=torch.int32, device=device)
        executed_pairs = torch.empty(batch, heads, windows, dtype=torch.int64, device=device)
        launch_kernel(
            join_kernel,
            (windows, batch * heads),
            bits,
            order,
            widths,
            joined_bits,
            joined_order,
            executed_pairs,
            stride,
            shared_stride(widths),
            heads,
            queries,
            query_cells,
            tiles,
            widths.shape[1],
            n_bytes,
            WINDOW=WINDOW,
            TILE_CELLS=rows // CELL,
            FARTHEST=FARTHEST,
            BLOCK_BYTES=BLOCK_BYTES,
            COUNT=2 * rows == KERNEL_ROWS,
            num_warps=WARPS,
        )
        bits, order, stride, tiles, rows = joined_bits, joined_order, query_cells, joined_tiles, 2 * rows
    return bits, executed_pairs, order
