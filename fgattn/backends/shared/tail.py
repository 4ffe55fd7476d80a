"""The tail: an estimate of what each tile skips, from the means of cells, on any GPU that Triton supports.

It is a partial softmax for each query cell, which attention adds to that over the executed keys. With the
centroid c of a query cell, and the means m_j of the keys and v_j of the values of key cell j:

    out_c = sum_j n_j e^(scale c.m_j - lse_c) v_j,   n_j: keys of cell j that c's tile does not execute
    lse_c = ln(sum_j n_j e^(scale c.m_j))
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...call import Call
from ...layout import CELL
from ..base import Planned, Tail
from .launch import COUNTS, batch_and_head, shared_stride
from .prepared import launch_kernel
from .summarise import tail_room

# Larger steps spill before sm_90, and are slower on it.
BLOCK_QUERY_CELLS, BLOCK_KEY_CELLS, WARPS, STAGES = 64, 32, 4, 2


@triton.jit(do_not_specialize=["stride_bits_b", "stride_bits_h", "stride_widths_b", *COUNTS])
def tail_kernel(
    centroid,
    mean,
    value,
    bits,
    widths,
    order,
    out,
    lse,
    stride_bits_b,
    stride_bits_h,
    stride_widths_b,
    stride_order_b,
    stride_order_h,
    heads,
    query_cells,
    key_cells,
    tiles,
    slices,
    n_bytes,
    scale,
    BLOCK_QUERY_CELLS: tl.constexpr,
    BLOCK_KEY_CELLS: tl.constexpr,
    D: tl.constexpr,
    TILE_CELLS: tl.constexpr,
    CELL_SLICES: tl.constexpr,
    SLICE_CELLS: tl.constexpr,
):
    """The tail of a block of query cells of one head, with an online softmax over all key cells.

    Launched by `tail`. Grid: (blocks of BLOCK_QUERY_CELLS, B * H).

    Reads
        centroid, mean, value: of Summaries, 16 bits or fp32.
        bits: uint8 [B or 1, H or 1, tiles, n_bytes], executed slices. A slice has SLICE_CELLS cells (1 below
            16 keys), a cell CELL_SLICES slices (1 above 16 keys).
        widths: uint8 [B or 1, key_cells * CELL_SLICES], keys of each slice or, above 16 keys, cell.
        order: None or int32 [B or 1, H or 1, query_cells], the query cell at each place of execution.
    Writes
        out: fp32 [B * H, query_cells, D]; lse: fp32 [B * H, query_cells], -inf where nothing is skipped; by
        place of execution.
    """
    b, h = batch_and_head(tl.program_id(1), heads)
    head = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK_QUERY_CELLS + tl.arange(0, BLOCK_QUERY_CELLS)
    query_cell = place
    if order is not None:
        order += b * stride_order_b + h * stride_order_h
        query_cell = tl.load(order + place, mask=place < query_cells, other=0)
    dim = tl.arange(0, D)
    c = tl.load(
        centroid + (head * query_cells + query_cell[:, None]) * D + dim[None, :],
        mask=place[:, None] < query_cells,
        other=0.0,
    )
    bits += b * stride_bits_b + h * stride_bits_h
    widths += b * stride_widths_b
    T: tl.constexpr = BLOCK_QUERY_CELLS // TILE_CELLS
    tile = tl.program_id(0) * T + tl.arange(0, T)
    bits_of = bits + tile[:, None].to(tl.int64) * n_bytes
    m_i = tl.full([BLOCK_QUERY_CELLS], -1e30, tl.float32)
    l_i = tl.zeros([BLOCK_QUERY_CELLS], tl.float32)
    acc = tl.zeros([BLOCK_QUERY_CELLS, D], tl.float32)
    for j in range(0, key_cells, BLOCK_KEY_CELLS):
        key_cell = j + tl.arange(0, BLOCK_KEY_CELLS)
        skipped = tl.zeros([T, BLOCK_KEY_CELLS], tl.int32)
        for i in tl.static_range(CELL_SLICES):
            part = (key_cell // SLICE_CELLS) * CELL_SLICES + i
            there = (key_cell < key_cells) & (part < slices)
            # above 16 keys a slice holds SLICE_CELLS cells: its width here is that of the cell
            width = tl.load(widths + key_cell * CELL_SLICES + i, mask=there, other=0).to(tl.int32)
            octet = tl.load(
                bits_of + (part // 8)[None, :], mask=(tile < tiles)[:, None] & there[None, :], other=0
            )
            skipped += (1 - ((octet.to(tl.int32) >> (part % 8)[None, :]) & 1)) * width[None, :]
        weight = tl.log(skipped.to(tl.float32))[:, None, :]  # -inf where everything is executed
        weight = tl.broadcast_to(weight, (T, TILE_CELLS, BLOCK_KEY_CELLS))
        weight = tl.reshape(weight, (BLOCK_QUERY_CELLS, BLOCK_KEY_CELLS))
        at = (head * key_cells + key_cell[:, None]) * D + dim[None, :]
        m = tl.load(mean + at, mask=key_cell[:, None] < key_cells, other=0.0)
        v = tl.load(value + at, mask=key_cell[:, None] < key_cells, other=0.0)
        logits = scale * tl.dot(c, tl.trans(m)) + weight
        m_new = tl.maximum(m_i, tl.max(logits, 1))
        p = tl.exp(logits - m_new[:, None])
        alpha = tl.exp(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
        m_i = m_new
    acc = acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]
    tl.store(
        out + (head * query_cells + place[:, None]) * D + dim[None, :], acc, mask=place[:, None] < query_cells
    )
    tl.store(lse + head * query_cells + place, m_i + tl.log(l_i), mask=place < query_cells)


def tail(call: Call, planned: Planned) -> Tail:
    """The tail of a call under a plan, by the portable kernel."""
    plan, (means, rows, (out, lse)) = planned.plan, tail_room(call, planned)
    (batch, heads, query_cells, dim), bits, order = out.shape, plan.bits, plan.cell_order
    width, key_cells = min(plan.tile_keys, CELL), means.mean.shape[1]
    widths = (rows >= 0).view(len(rows), -1, width).sum(2, dtype=torch.uint8)
    launch_kernel(
        tail_kernel,
        (-(-query_cells // BLOCK_QUERY_CELLS), batch * heads),
        means.centroid,
        means.mean,
        means.value,
        bits,
        widths,
        order,
        out,
        lse,
        shared_stride(bits, 0),
        shared_stride(bits, 1),
        shared_stride(widths, 0),
        shared_stride(order, 0),
        shared_stride(order, 1),
        heads,
        query_cells,
        key_cells,
        bits.shape[2],
        -(-plan.keys // plan.tile_keys),
        bits.shape[3],
        plan.softmax_scale(dim),
        BLOCK_QUERY_CELLS=BLOCK_QUERY_CELLS,
        BLOCK_KEY_CELLS=BLOCK_KEY_CELLS,
        D=dim,
        TILE_CELLS=plan.tile_rows // CELL,
        CELL_SLICES=CELL // width,
        SLICE_CELLS=max(1, plan.tile_keys // CELL),
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return out, lse
