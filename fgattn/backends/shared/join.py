"""Group: pairs small query tiles whose lists are alike, by the rule of `fgattn.grouping`.

pair_kernel: one program takes a window of tiles of one head. Lists are compared as a product of their bits
(a and b differ in n_a + n_b - 2 a.b slices), then the closest pair that is left is taken, over and over.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...joining import FARTHEST, WINDOW
from ...layout import CELL
from ...plan import KERNEL_ROWS
from .launch import COUNTS, shared_stride

BLOCK_BYTES, WARPS = 16, 2


@triton.jit(do_not_specialize=["stride_order", "stride_widths_b", *COUNTS])
def pair_kernel(
    bits, order, widths, pair_bits, pair_order, executed, stride_order, stride_widths_b, heads, queries, runs,
    tiles, slices, n_bytes, WINDOW: tl.constexpr, TILE_RUNS: tl.constexpr, FARTHEST: tl.constexpr,
    BLOCK_BYTES: tl.constexpr, COUNT: tl.constexpr,
):
    """TILE_RUNS: runs of 16 queries in a tile. `executed`: scores in the program's pairs, if COUNT."""
    window = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    bits += head * tiles * n_bytes
    place = tl.arange(0, WINDOW)
    first = window * WINDOW
    tile = first + place
    common = tl.zeros([WINDOW, WINDOW], tl.float32)
    for j in range(0, n_bytes, BLOCK_BYTES):
        part = j * 8 + tl.arange(0, BLOCK_BYTES * 8)
        octet = tl.load(bits + tile[:, None].to(tl.int64) * n_bytes + (part // 8)[None, :],
                        mask=(tile < tiles)[:, None] & (part // 8 < n_bytes)[None, :], other=0).to(tl.int32)
        kept = ((octet >> (part % 8)[None, :]) & 1).to(tl.float16)
        common = tl.dot(kept, tl.trans(kept), common)
    diagonal = tl.where(place[:, None] == place[None, :], common, 0.0)
    apart = tl.sum(diagonal, 1)[:, None] + tl.sum(diagonal, 0)[None, :] - 2 * common
    key = tl.minimum(apart, FARTHEST).to(tl.int32) * WINDOW + place[:, None]
    key = key * WINDOW + place[None, :]
    whole = queries // (TILE_RUNS * 16) // 2 * 2  # tiles that may be paired at will
    none: tl.constexpr = 2147483647
    key = tl.where((place[:, None] < place[None, :]) & (tile < whole)[None, :], key, none)
    pair = tl.arange(0, WINDOW // 2)
    one, two = 2 * pair, 2 * pair + 1
    for i in range(tl.minimum(tl.maximum(whole - first, 0), WINDOW) // 2):
        best = tl.min(tl.min(key, 1), 0)
        a, b = best // WINDOW % WINDOW, best % WINDOW
        one, two = tl.where(pair == i, a, one), tl.where(pair == i, b, two)
        taken = (place == a) | (place == b)
        key = tl.where(taken[:, None] | taken[None, :], none, key)
    one, two = one + first, two + first
    pair += first // 2

    order += head * stride_order
    pair_order += head * runs
    for i in tl.static_range(2 * TILE_RUNS):
        source = (one if i < TILE_RUNS else two) * TILE_RUNS + i % TILE_RUNS
        target = pair * (2 * TILE_RUNS) + i
        run = tl.load(order + source, mask=target < runs, other=0)
        tl.store(pair_order + target, run, mask=target < runs)
    pairs = tl.cdiv(tiles, 2)
    pair_bits += head * pairs * n_bytes
    widths += head // heads * stride_widths_b
    listed = tl.zeros([WINDOW // 2], tl.int32)
    for j in range(0, n_bytes, BLOCK_BYTES):
        byte = j + tl.arange(0, BLOCK_BYTES)
        inside = (byte < n_bytes)[None, :]
        octet = tl.load(bits + one[:, None].to(tl.int64) * n_bytes + byte[None, :],
                        mask=(one < tiles)[:, None] & inside, other=0)
        octet |= tl.load(bits + two[:, None].to(tl.int64) * n_bytes + byte[None, :],
                         mask=(two < tiles)[:, None] & inside, other=0)
        tl.store(pair_bits + pair[:, None].to(tl.int64) * n_bytes + byte[None, :], octet,
                 mask=(pair < pairs)[:, None] & inside)
        if COUNT:
            for i in tl.static_range(8):
                width = tl.load(widths + byte * 8 + i, mask=byte * 8 + i < slices, other=0)
                listed += tl.sum(((octet.to(tl.int32) >> i) & 1) * width[None, :], 1)
    if COUNT:
        rows = tl.minimum(tl.maximum(queries - pair * (TILE_RUNS * 32), 0), TILE_RUNS * 32)
        tl.store(executed + head * tl.num_programs(0) + window, tl.sum(listed.to(tl.int64) * rows, 0))


def grouped(bits: torch.Tensor, widths: torch.Tensor, tile_queries: int, queries: int):
    """Pair tiles until a group has KERNEL_ROWS queries; inside the tensors' device context.

    Args:
        bits: [B, H, tiles, bytes] uint8, the tiles' lists. widths: int32 [B or 1, slices], keys of each.

    Returns:
        The groups' bits, their scores [B, H, n] int64 in parts, and the run order of a plan.
    """
    (batch, heads, tiles, n_bytes), device = bits.shape, bits.device
    rows, runs, stride = tile_queries, triton.cdiv(queries, CELL), 0
    order = torch.arange(runs, dtype=torch.int32, device=device)
    while rows < KERNEL_ROWS:
        windows, pairs = triton.cdiv(tiles, WINDOW), triton.cdiv(tiles, 2)
        pair_bits = torch.empty(batch, heads, pairs, n_bytes, dtype=torch.uint8, device=device)
        pair_order = torch.empty(batch, heads, runs, dtype=torch.int32, device=device)
        executed = torch.empty(batch, heads, windows, dtype=torch.int64, device=device)
        pair_kernel[(windows, batch * heads)](
            bits, order, widths, pair_bits, pair_order, executed, stride,
            shared_stride(widths), heads, queries, runs, tiles, widths.shape[1], n_bytes,
            WINDOW=WINDOW, TILE_RUNS=rows // CELL, FARTHEST=FARTHEST, BLOCK_BYTES=BLOCK_BYTES,
            COUNT=2 * rows == KERNEL_ROWS, num_warps=WARPS)
        bits, order, stride, tiles, rows = pair_bits, pair_order, runs, pairs, 2 * rows
    return bits, executed, order
