"""Tail: the pooled estimate of what each tile skips, as a partial softmax per run of 16 queries.

One program takes BLOCK_RUNS centroids of one head through all cells with an online softmax:

    out_c = sum_j n_j e^(scale c.m_j - lse_c) v_j,   n_j: keys of cell j that c's tile does not execute
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...call import Call
from ...layout import CELL
from ..base import Planned, Tail
from ..shared.launch import COUNTS, on_device, shared_stride
from ..shared.summarise import tail_room

BLOCK_RUNS, BLOCK_CELLS, WARPS, STAGES = 64, 32, 4, 2  # larger steps spill before sm_90, and are slower on it


@triton.jit(do_not_specialize=["stride_bits_b", "stride_bits_h", "stride_widths_b", *COUNTS])
def tail_kernel(
    centroid, mean, value, bits, widths, order, out, lse, stride_bits_b, stride_bits_h, stride_widths_b,
    stride_order_b, stride_order_h, heads, runs, cells, tiles, slices, n_bytes, scale,
    BLOCK_RUNS: tl.constexpr, BLOCK_CELLS: tl.constexpr, D: tl.constexpr, TILE_RUNS: tl.constexpr,
    PARTS: tl.constexpr, SPAN: tl.constexpr,
):
    """Runs in their order of execution (None: as they come).

    PARTS: slices of a cell (1 above 16 keys); SPAN: cells of a slice (1 below).
    """
    head = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK_RUNS + tl.arange(0, BLOCK_RUNS)
    run = place
    if order is not None:
        order += head // heads * stride_order_b + head % heads * stride_order_h
        run = tl.load(order + place, mask=place < runs, other=0)
    dim = tl.arange(0, D)
    c = tl.load(centroid + (head * runs + run[:, None]) * D + dim[None, :],
                mask=place[:, None] < runs, other=0.0)
    bits += head // heads * stride_bits_b + head % heads * stride_bits_h
    widths += head // heads * stride_widths_b
    T: tl.constexpr = BLOCK_RUNS // TILE_RUNS
    tile = tl.program_id(0) * T + tl.arange(0, T)
    bits_of = bits + tile[:, None].to(tl.int64) * n_bytes
    m_i = tl.full([BLOCK_RUNS], -1e30, tl.float32)
    l_i = tl.zeros([BLOCK_RUNS], tl.float32)
    acc = tl.zeros([BLOCK_RUNS, D], tl.float32)
    for j in range(0, cells, BLOCK_CELLS):
        cell = j + tl.arange(0, BLOCK_CELLS)
        skipped = tl.zeros([T, BLOCK_CELLS], tl.int32)
        for i in tl.static_range(PARTS):
            part = (cell // SPAN) * PARTS + i
            there = (cell < cells) & (part < slices)
            # above 16 keys a slice holds SPAN cells: its width here is that of the cell
            width = tl.load(widths + cell * PARTS + i, mask=there, other=0).to(tl.int32)
            octet = tl.load(bits_of + (part // 8)[None, :], mask=(tile < tiles)[:, None] & there[None, :],
                            other=0)
            skipped += (1 - ((octet.to(tl.int32) >> (part % 8)[None, :]) & 1)) * width[None, :]
        weight = tl.log(skipped.to(tl.float32))[:, None, :]  # -inf where everything is executed
        weight = tl.reshape(tl.broadcast_to(weight, (T, TILE_RUNS, BLOCK_CELLS)), (BLOCK_RUNS, BLOCK_CELLS))
        at = (head * cells + cell[:, None]) * D + dim[None, :]
        m = tl.load(mean + at, mask=cell[:, None] < cells, other=0.0)
        v = tl.load(value + at, mask=cell[:, None] < cells, other=0.0)
        logits = scale * tl.dot(c, tl.trans(m)) + weight
        m_new = tl.maximum(m_i, tl.max(logits, 1))
        p = tl.exp(logits - m_new[:, None])
        alpha = tl.exp(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
        m_i = m_new
    acc = acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]
    tl.store(out + (head * runs + place[:, None]) * D + dim[None, :], acc, mask=place[:, None] < runs)
    tl.store(lse + head * runs + place, m_i + tl.log(l_i), mask=place < runs)  # nothing skipped: -inf


def tail(call: Call, planned: Planned) -> Tail:
    """The tail of a call under a plan, by the portable kernel."""
    plan, (made, rows, (out, lse)) = planned.plan, tail_room(call, planned)
    (batch, heads, runs, dim), bits, order = out.shape, plan.bits, plan.cell_order
    width, cells = min(plan.tile_keys, CELL), made.mean.shape[1]
    widths = (rows >= 0).view(len(rows), -1, width).sum(2, dtype=torch.uint8)
    with on_device(out):
        tail_kernel[(triton.cdiv(runs, BLOCK_RUNS), batch * heads)](
            made.centroid, made.mean, made.value, bits, widths, order, out, lse,
            shared_stride(bits, 0), shared_stride(bits, 1), shared_stride(widths, 0), shared_stride(order, 0),
            shared_stride(order, 1), heads, runs, cells, bits.shape[2],
            triton.cdiv(plan.keys, plan.tile_keys), bits.shape[3], plan.softmax_scale(dim),
            BLOCK_RUNS=BLOCK_RUNS, BLOCK_CELLS=BLOCK_CELLS, D=dim, TILE_RUNS=plan.tile_rows // CELL,
            PARTS=CELL // width, SPAN=max(1, plan.tile_keys // CELL), num_warps=WARPS, num_stages=STAGES)
    return out, lse
