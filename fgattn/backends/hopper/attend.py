"""Attend on Hopper (compute capability 9.0): the portable kernel's formula, in Gluon.

Tested with Triton 3.6; other versions are tried and judged by the self-test.

A program computes CONSUMERS * 64 query rows of one head. Producer warps bring the listed rows of k and v
into two rings of shared tiles; each consumer warpgroup runs the online softmax on 64 rows, with WGMMA
from shared memory. Barriers of a ring: *_full counts the producers, *_empty the consumers.

Where N is at least 8 and all octets of keys lie in memory as boxes, the copy engine fetches octets, by the
portable kernel's lists; else rows are gathered (see hopper_producers), listed by warps of the same program
(hopper_lister). The step that is not full comes first and is the only one masked. While the weights of one
step multiply v, the scores of the next one are computed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ...call import Call
from ...layout import CELL
from ...plan import SparsePlan
from ..base import Tail
from ..shared.launch import COUNTS, LOG2_E, key_rows
from ..shared.lists import Lists, execution_rows, scaled_tail
from .boxes import boxes_for
from .lister import SLOTS, STRIDES, Counts, enlist
from .producers import PRODUCERS, ROWS, descriptors, fetch, gather


class Launch(NamedTuple):
    block_keys: int  # keys per step
    stages: int  # of either ring
    gatherers: int  # warps; two listers come with each consumer
    # of a thread: second consumer, gatherers, listers; the first consumer has the rest
    registers: tuple[int, int, int]
    max_registers: int | None  # a thread's share of the program at its start; 128 lets two programs run


# Keys: (head size, tile rows). Measured on one H200, see benchmarks/NOTES.md.
TABLE: dict[tuple[int, int], Launch] = {
    (64, 64): Launch(128, 2, 2, (0, 96, 96), 128),
    (64, 128): Launch(128, 4, 4, (200, 56, 48), None),
    (128, 64): Launch(64, 2, 2, (0, 56, 56), 128),
    (128, 128): Launch(128, 2, 8, (192, 32, 32), None),
}
BOX_REGISTERS = (232, 40)


@gluon.jit
def _exists(place, listed, GATHERS: gl.constexpr):
    """Which places of the last step hold a key; a short octet is at the end of its box."""
    if GATHERS:
        return place < listed
    missing = -listed & (ROWS - 1)
    end = listed + missing
    return (place < end - ROWS) | (place >= end - ROWS + missing) & (place < end)


@gluon.jit
def _own_sums(w, like):
    """Sums of what each thread holds of a row, in the layout of `like` [64, 8]: no exchange."""
    sums = gl.sum(w.reshape([64, w.shape[1] // 8, 8]), 1)
    return gl.convert_layout(sums, like.type.layout, assert_trivial=True)


@gluon.jit
def _step(i, m_i, l_i, acc, p, q_tile, zero, scale, ring, STAGES: gl.constexpr, GATHERS: gl.constexpr):
    """Scores of step i > 0, while the weights p of the step before multiply v."""
    k_tiles, v_tiles, k_full, k_empty, v_full, v_empty = ring
    before = i - 1
    mbarrier.wait(v_full.index(before % STAGES), (before // STAGES) & 1)
    mbarrier.wait(k_full.index(i % STAGES), (i // STAGES) & 1)
    if GATHERS:  # cp.async and WGMMA see shared memory through different proxies
        fence_async_shared()
    s_token = warpgroup_mma(q_tile, k_tiles.index(i % STAGES).permute((1, 0)), zero, use_acc=False,
                            is_async=True)
    acc_token = warpgroup_mma(p, v_tiles.index(before % STAGES), acc, is_async=True)
    s = warpgroup_mma_wait(num_outstanding=1, deps=(s_token,))
    mbarrier.arrive(k_empty.index(i % STAGES), count=1)
    m_new = gl.maximum(m_i, gl.max(s, 1) * scale)
    w = gl.exp2(s * scale - m_new[:, None])
    alpha = gl.exp2(m_i - m_new)
    l_i = l_i * gl.convert_layout(alpha, gl.SliceLayout(1, l_i.type.layout))[:, None] + _own_sums(w, l_i)
    p_next = gl.convert_layout(w.to(p.dtype), p.type.layout)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc_token,))
    mbarrier.arrive(v_empty.index(before % STAGES), count=1)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
    return m_new, l_i, acc, p_next


@gluon.jit
def _consume(
    task, ring, WARPGROUP: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    HAS_TAIL: gl.constexpr, GATHERS: gl.constexpr,
):
    q, out, query_rows, tail, stride_ql, stride_ol, begin, queries, listed, scale, q_tiles = task
    tail_out, tail_lse = tail
    begin += 64 * WARPGROUP
    q_tile = q_tiles.index(WARPGROUP)
    k_tiles, v_tiles, k_full, k_empty, v_full, _ = ring
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    IO: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    position = begin + gl.arange(0, 64, gl.SliceLayout(1, IO))
    dim = gl.arange(0, D, gl.SliceLayout(0, IO))
    has_query = position < queries
    token = gl.load(query_rows + position, mask=has_query, other=0).to(gl.int64)
    q_at = q + token[:, None] * stride_ql + dim[None, :]
    q_tile.store(gl.load(q_at, mask=has_query[:, None], other=0.0))
    zero = gl.full([64, BLOCK_N], 0.0, gl.float32, S)
    m_i = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, S))  # finite: a list can be empty
    l_i = gl.full([64, 8], 0.0, gl.float32, SUMS)
    acc = gl.full([64, D], 0.0, gl.float32, ACC)
    steps = gl.cdiv(listed, BLOCK_N)
    if steps > 0:
        mbarrier.wait(k_full.index(0), 0)
        fence_async_shared()
        s = warpgroup_mma(q_tile, k_tiles.index(0).permute((1, 0)), zero, use_acc=False)
        mbarrier.arrive(k_empty.index(0), count=1)
        column = gl.arange(0, BLOCK_N, gl.SliceLayout(0, S))
        exists = _exists((steps - 1) * BLOCK_N + column, listed, GATHERS)
        s = gl.where(exists[None, :], s, float("-inf"))
        m_i = gl.maximum(m_i, gl.max(s, 1) * scale)
        w = gl.exp2(s * scale - m_i[:, None])
        l_i = _own_sums(w, l_i)
        p = gl.convert_layout(w.to(q_tile.dtype), gl.DotOperandLayout(0, ACC, 2))
        for i in range(1, steps):
            m_i, l_i, acc, p = _step(i, m_i, l_i, acc, p, q_tile, zero, scale, ring, STAGES, GATHERS)
        last = steps - 1
        mbarrier.wait(v_full.index(last % STAGES), (last // STAGES) & 1)
        fence_async_shared()
        acc = warpgroup_mma(p, v_tiles.index(last % STAGES), acc)
    m_row = gl.convert_layout(m_i, gl.SliceLayout(1, ACC))
    l_row = gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, ACC))
    if HAS_TAIL:  # the rows of a run share it
        place = begin + gl.arange(0, 64, gl.SliceLayout(1, ACC))
        tail_l = gl.load(tail_lse + place // 16, mask=place < queries, other=float("-inf"))
        m_new = gl.maximum(m_row, tail_l)
        alpha, beta = gl.exp2(m_row - m_new), gl.exp2(tail_l - m_new)
        by_run = acc.reshape([4, 16, D])
        RUNS: gl.constexpr = gl.SliceLayout(1, by_run.type.layout)
        run = begin // 16 + gl.arange(0, 4, gl.SliceLayout(1, RUNS))
        column = gl.arange(0, D, gl.SliceLayout(0, RUNS))
        pooled = gl.load(tail_out + run[:, None] * D + column[None, :], mask=(run * 16 < queries)[:, None],
                         other=0.0)
        pooled, _ = gl.broadcast(gl.expand_dims(pooled, 1), by_run)
        pooled = gl.convert_layout(pooled.reshape([64, D]), ACC, assert_trivial=True)
        acc = acc * alpha[:, None] + pooled * beta[:, None]
        l_row = l_row * alpha + beta
    acc = acc / gl.where(l_row == 0.0, 1.0, l_row)[:, None]  # nothing kept and no tail: zeros
    q_tile.store(acc.to(q_tile.dtype))  # by way of shared memory, so that rows are stored whole
    gl.store(out + token[:, None] * stride_ol + dim[None, :], q_tile.load(IO).to(out.dtype.element_ty),
             mask=has_query[:, None])


@gluon.jit(do_not_specialize=["stride_queries", *STRIDES, *COUNTS])
def hopper_kernel(
    q, k, v, k_flat, k_wide, k_deep, v_flat, v_wide, v_deep, out, lists, bits, valid, listed, query_rows,
    key_rows, tail_out, tail_lse, stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl,
    stride_vb, stride_vh, stride_vl, stride_ob, stride_oh, stride_ol, stride_queries, stride_list,
    stride_bits_b, stride_bits_h, stride_valid, heads, first, queries, keys, tiles, runs, n_bytes, scale,
    CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, SPLIT: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, GATHERERS: gl.constexpr, REGISTERS: gl.constexpr, HAS_TAIL: gl.constexpr,
    GATHERS: gl.constexpr,
):
    tile = gl.program_id(0)
    listed_at = gl.program_id(1).to(gl.int64) * tiles + tile
    head = (first + gl.program_id(1)).to(gl.int64)
    b = head // heads
    h = head % heads
    q += b * stride_qb + h * stride_qh
    k += b * stride_kb + h * stride_kh
    v += b * stride_vb + h * stride_vh
    out += b * stride_ob + h * stride_oh
    query_rows += head * stride_queries
    if HAS_TAIL:
        tail_out += head * runs * D
        tail_lse += head * runs
    n_listed = gl.load(listed + listed_at)

    dtype: gl.constexpr = q.dtype.element_ty
    kv_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, D], dtype)
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], kv_layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], kv_layout)
    q_tiles = gl.allocate_shared_memory(dtype, [CONSUMERS, 64, D], q_layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=32 * GATHERERS if GATHERS else PRODUCERS)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_full.index(i), count=32 * GATHERERS if GATHERS else PRODUCERS)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    ring = (k_tiles, v_tiles, k_full, k_empty, v_full, v_empty)
    task = (q, out, query_rows, (tail_out, tail_lse), stride_ql, stride_ol, tile * (64 * CONSUMERS), queries,
            n_listed, scale, q_tiles)
    # Constexprs go straight into the arguments: a constexpr in an assigned tuple becomes a tensor.
    if GATHERS:
        slots = gl.allocate_shared_memory(gl.int32, [SLOTS, BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        slot_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
        slot_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(SLOTS):
            mbarrier.init(slot_full.index(i), count=2 * CONSUMERS)
            mbarrier.init(slot_empty.index(i), count=32 * GATHERERS)
        slots = (slots, slot_full, slot_empty)
        rows = (k, v, stride_kl, stride_vl, n_listed)
        bits += b * stride_bits_b + h * stride_bits_h + tile.to(gl.int64) * n_bytes
        if valid is not None:
            valid += b * stride_valid
        source = (bits, valid, n_bytes, keys)
        which = (key_rows, n_listed)
    else:
        boxes = ((k_flat, k_wide, k_deep), (v_flat, v_wide, v_deep), h.to(gl.int32),
                 lists + listed_at * stride_list, n_listed)
    if GATHERS and CONSUMERS == 1:
        gl.warp_specialize([
            (_consume, (task, ring, 0, BLOCK_N, D, STAGES, HAS_TAIL, True)),
            (gather, (rows, slots, ring, BLOCK_N, D, STAGES, GATHERERS)),
            (enlist, (which, source, slots, 0, 2, BLOCK_N, SPLIT)),
            (enlist, (which, source, slots, 1, 2, BLOCK_N, SPLIT)),
        ], [GATHERERS, 1, 1], [REGISTERS[1], REGISTERS[2], REGISTERS[2]])
    elif GATHERS:
        gl.warp_specialize([
            (_consume, (task, ring, 0, BLOCK_N, D, STAGES, HAS_TAIL, True)),
            (_consume, (task, ring, 1, BLOCK_N, D, STAGES, HAS_TAIL, True)),
            (gather, (rows, slots, ring, BLOCK_N, D, STAGES, GATHERERS)),
            (enlist, (which, source, slots, 0, 4, BLOCK_N, SPLIT)),
            (enlist, (which, source, slots, 1, 4, BLOCK_N, SPLIT)),
            (enlist, (which, source, slots, 2, 4, BLOCK_N, SPLIT)),
            (enlist, (which, source, slots, 3, 4, BLOCK_N, SPLIT)),
        ], [4, GATHERERS, 1, 1, 1, 1],
            [REGISTERS[0], REGISTERS[1], REGISTERS[2], REGISTERS[2], REGISTERS[2], REGISTERS[2]])
    elif CONSUMERS == 1:
        gl.warp_specialize([
            (_consume, (task, ring, 0, BLOCK_N, D, STAGES, HAS_TAIL, False)),
            (fetch, (boxes, ring, 0, BLOCK_N, D, STAGES)),
            (fetch, (boxes, ring, 1, BLOCK_N, D, STAGES)),
            (fetch, (boxes, ring, 2, BLOCK_N, D, STAGES)),
            (fetch, (boxes, ring, 3, BLOCK_N, D, STAGES)),
        ], [1, 1, 1, 1], [REGISTERS[1], REGISTERS[1], REGISTERS[1], REGISTERS[1]])
    else:
        gl.warp_specialize([
            (_consume, (task, ring, 0, BLOCK_N, D, STAGES, HAS_TAIL, False)),
            (_consume, (task, ring, 1, BLOCK_N, D, STAGES, HAS_TAIL, False)),
            (fetch, (boxes, ring, 0, BLOCK_N, D, STAGES)),
            (fetch, (boxes, ring, 1, BLOCK_N, D, STAGES)),
            (fetch, (boxes, ring, 2, BLOCK_N, D, STAGES)),
            (fetch, (boxes, ring, 3, BLOCK_N, D, STAGES)),
        ], [4, 1, 1, 1, 1], [REGISTERS[0], REGISTERS[1], REGISTERS[1], REGISTERS[1], REGISTERS[1]])


def attend(call: Call, plan: SparsePlan, tail: Tail | None, out: torch.Tensor) -> None:
    """Write softmax over the plan's keys, and the tail if there is one, to out."""
    q, k, v = call.tensors
    (batch, heads, _, dim), (*_, tiles, n_bytes), queries = q.shape, plan.bits.shape, plan.queries
    scale = plan.softmax_scale(dim) * LOG2_E
    if scale < 0:  # the kernel scales the largest score, not every score
        q, scale = -q, -scale
    tail_out, tail_lse = scaled_tail(tail)
    tokens, stride_queries = execution_rows(plan, batch, heads)
    launch = TABLE[dim, plan.tile_rows]
    boxes = boxes_for(call)
    with torch.cuda.device(q.device):
        if boxes is None:
            counts, rows = Counts(plan, batch, heads), key_rows(plan.geometry)
            bits, strides, registers = (counts.bits, counts.valid), counts.strides, launch.registers
            launches = [((None,) * 6, None, counts.listed, 0, 0, batch * heads)]
        else:
            rows, bits, strides, registers = None, (None, None), (0, 0, 0), BOX_REGISTERS
            launches = _boxed(k, v, plan, boxes)
        for described, lists, listed, stride_list, first, group in launches:
            hopper_kernel[tiles, group](
                q, k, v, *described, out, lists, *bits, listed, tokens, rows, tail_out, tail_lse,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], stride_queries,
                stride_list, *strides, heads, first, queries, plan.keys, tiles, -(-queries // CELL), n_bytes,
                scale, CONSUMERS=plan.tile_rows // 64, BLOCK_N=launch.block_keys,
                SPLIT=plan.tile_keys if boxes is None else None, D=dim, STAGES=launch.stages,
                GATHERERS=launch.gatherers, REGISTERS=registers, HAS_TAIL=tail is not None,
                GATHERS=boxes is None, num_warps=4, maxnreg=launch.max_registers)


def _boxed(k, v, plan: SparsePlan, boxes: torch.Tensor):
    """Of each launch: descriptors, lists of boxes, their lengths and stride, first head, number of heads."""
    lists, grid = Lists(plan, *k.shape[:2], boxes), plan.geometry.grid
    for b, first, group in lists.groups():
        described = (*descriptors(k[b], grid), *descriptors(v[b], grid))
        yield described, lists.lists, lists.listed, lists.stride, b * k.shape[1] + first, group
