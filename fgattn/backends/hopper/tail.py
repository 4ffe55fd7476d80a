"""The tail on Hopper (compute capability 9.0): the portable kernel's formula (shared/tail.py), in Gluon.

A program takes 192 centroids of one head through all key cells, 64 in each of its consumer warpgroups: at
480p length 12 heads make 132 programs, one for each multiprocessor of an H200. Producer warps bring the means
of the keys and values of STEP cells into a ring of shared tiles, and with them the weights of the cells
(tail_weights.py). The scores of the next step are computed beside the exponentials of a step.
"""

from __future__ import annotations

import functools
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...call import Call
from ...layout import CELL
from ..base import Planned, Tail
from ..shared.launch import COUNTS, LOG2_E, shared_stride
from ..shared.prepared import launch_kernel, like, template
from ..shared.summarise import tail_room
from .producers import TYPES
from .softmax import own_sums
from .tail_weights import CONSUMERS, STEP, produce

STAGES = 4
REGISTERS = (144, 144, 80)  # of a thread: second and third consumer, producers; the first has the rest
LN_2 = gl.constexpr(0.6931471805599453)


class Ring(NamedTuple):
    """What the producer fills and the consumers read, in shared memory; step i uses stage i % STAGES."""

    m_tiles: gl.shared_memory_descriptor  # [STAGES, STEP, D]: means of keys
    v_tiles: gl.shared_memory_descriptor  # [STAGES, STEP, D]: means of values
    weights: gl.shared_memory_descriptor  # fp16 [STAGES * CONSUMERS, tiles of a consumer, STEP]
    full: gl.shared_memory_descriptor  # barriers [STAGES, 1]: counts the copies and the weights
    empty: gl.shared_memory_descriptor  # counts the consumers


class Centroids(NamedTuple):
    """What consumers work on: the centroids of a program, the first at place `begin` of the execution."""

    centroid: gl.tensor  # [query_cells, D], of the head
    order: gl.tensor  # int32 [query_cells]: query cell at each place, or None
    out: gl.tensor  # fp32 [query_cells, D]
    lse: gl.tensor  # fp32 [query_cells]
    begin: gl.tensor
    query_cells: gl.tensor
    key_cells: gl.tensor
    scale: gl.tensor  # softmax scale times log2(e)
    c_tiles: gl.shared_memory_descriptor  # [CONSUMERS, 64, D]


class Skipped(NamedTuple):
    """What the producer reads."""

    mean: gl.tensor  # tensor map of [B * H, key_cells, D], as value
    value: gl.tensor
    bits: gl.tensor  # uint8 [tiles, n_bytes], of the head
    valid: gl.tensor  # int32 [key_cells]: bits of the keys that exist; None: all do
    head: gl.tensor
    tile: gl.tensor  # the first of the program
    tiles: gl.tensor
    key_cells: gl.tensor
    keys: gl.tensor
    n_bytes: gl.tensor


@gluon.jit
def _consume(task, ring, WARPGROUP: gl.constexpr, TILE_CELLS: gl.constexpr):
    """The tail of the WARPGROUP-th 64 query cells of a program, with an online softmax over all key cells."""
    STAGES: gl.constexpr = ring.m_tiles.shape[0]
    D: gl.constexpr = ring.m_tiles.shape[2]
    query_cells, full, v_tiles = task.query_cells, ring.full, ring.v_tiles
    begin = task.begin + 64 * WARPGROUP
    c_tile = task.c_tiles.index(WARPGROUP)
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    IO: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    T: gl.constexpr = 64 // TILE_CELLS
    place = begin + gl.arange(0, 64, gl.SliceLayout(1, IO))
    query_cell = place
    if task.order is not None:
        query_cell = gl.load(task.order + place, mask=place < query_cells, other=0)
    dim = gl.arange(0, D, gl.SliceLayout(0, IO))
    at = task.centroid + query_cell.to(gl.int64)[:, None] * D + dim[None, :]
    c_tile.store(gl.load(at, mask=(place < query_cells)[:, None], other=0.0))
    fence_async_shared()
    zero = gl.full([64, STEP], 0.0, gl.float32, S)
    by_tile = zero.reshape([T, TILE_CELLS, STEP])
    m_i = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, S))  # finite: a step can have no weight
    l_i = gl.full([64, 8], 0.0, gl.float32, SUMS)
    acc = gl.full([64, D], 0.0, gl.float32, ACC)
    steps = gl.cdiv(task.key_cells, STEP)
    mbarrier.wait(full.index(0), 0)
    s = warpgroup_mma(c_tile, ring.m_tiles.index(0).permute((1, 0)), zero, use_acc=False)
    for i in range(steps):
        stage = i % STAGES
        weight = ring.weights.index(stage * CONSUMERS + WARPGROUP)
        weight = weight.load(gl.SliceLayout(1, by_tile.type.layout))
        weight, _ = gl.broadcast(gl.expand_dims(weight, 1), by_tile)
        weight = gl.convert_layout(weight.reshape([64, STEP]), S, assert_trivial=True)
        s = s * task.scale + weight.to(gl.float32)
        following = gl.minimum(i + 1, steps - 1)  # the last step's scores come twice: no branch
        mbarrier.wait(full.index(following % STAGES), (following // STAGES) & 1)
        m_tile = ring.m_tiles.index(following % STAGES)
        s_token = warpgroup_mma(c_tile, m_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
        m_new = gl.maximum(m_i, gl.max(s, 1))
        w = gl.exp2(s - m_new[:, None])
        alpha = gl.exp2(m_i - m_new)
        l_i = l_i * gl.convert_layout(alpha, gl.SliceLayout(1, SUMS))[:, None] + own_sums(w, l_i)
        p = gl.convert_layout(w.to(c_tile.dtype), gl.DotOperandLayout(0, ACC, 2))
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, ACC))[:, None]
        m_i = m_new
        acc_token = warpgroup_mma(p, v_tiles.index(stage), acc, is_async=True)
        s, acc = warpgroup_mma_wait(num_outstanding=0, deps=(s_token, acc_token))
        mbarrier.arrive(ring.empty.index(stage), count=1)
    m_row = gl.convert_layout(m_i, gl.SliceLayout(1, ACC))
    l_row = gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, ACC))
    acc = acc * (1.0 / gl.where(l_row == 0.0, 1.0, l_row))[:, None]
    place = begin + gl.arange(0, 64, gl.SliceLayout(1, ACC))
    dim = gl.arange(0, D, gl.SliceLayout(0, ACC))
    gl.store(task.out + place[:, None] * D + dim[None, :], acc, mask=(place < query_cells)[:, None])
    gl.store(task.lse + place, (m_row + gl.log2(l_row)) * LN_2, mask=place < query_cells)


@gluon.jit(
    do_not_specialize=[
        "stride_bits_b",
        "stride_bits_h",
        "stride_valid",
        "stride_order_b",
        "stride_order_h",
        *COUNTS,
    ]
)
def tail_hopper_kernel(
    centroid,
    mean,
    value,
    bits,
    valid,
    order,
    out,
    lse,
    stride_bits_b,
    stride_bits_h,
    stride_valid,
    stride_order_b,
    stride_order_h,
    heads,
    query_cells,
    key_cells,
    keys,
    tiles,
    n_bytes,
    scale,
    D: gl.constexpr,
    TILE_CELLS: gl.constexpr,
    SLICE_KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """The tail of CONSUMERS * 64 query cells of one head, for executed tiles of TILE_CELLS query cells.

    Launched by `tail`, with the four warps of the first consumer; the other warps are started here.
    Grid: (blocks of CONSUMERS * 64 query cells, B * H).

    Reads
        centroid: of Summaries, 16 bits; mean, value: tensor maps of theirs.
        bits: uint8 [B or 1, H or 1, tiles, n_bytes], executed slices of SLICE_KEYS keys.
        valid: None or int32 [B or 1, key_cells], bits of the keys of each cell that exist.
        order: None or int32 [B or 1, H or 1, query_cells], the query cell at each place of execution.
        scale: the softmax scale times log2(e).
    Writes
        out: fp32 [B * H, query_cells, D]; lse: fp32 [B * H, query_cells], -inf where nothing is skipped; by
        place of execution.
    """
    head = gl.program_id(1)
    b = (head // heads).to(gl.int64)
    h = (head % heads).to(gl.int64)
    head = head.to(gl.int64)
    begin = gl.program_id(0) * (64 * CONSUMERS)
    centroid += head * query_cells * D
    out += head * query_cells * D
    lse += head * query_cells
    bits += b * stride_bits_b + h * stride_bits_h
    if valid is not None:
        valid += b * stride_valid
    if order is not None:
        order += b * stride_order_b + h * stride_order_h
    dtype: gl.constexpr = centroid.dtype.element_ty
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([STEP, D], dtype)
    w_layout: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    c_tiles = gl.allocate_shared_memory(dtype, [CONSUMERS, 64, D], layout)
    m_tiles = gl.allocate_shared_memory(dtype, [STAGES, STEP, D], layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, STEP, D], layout)
    weights = gl.allocate_shared_memory(gl.float16, [STAGES * CONSUMERS, 64 // TILE_CELLS, STEP], w_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2)  # the copies, the weights
        mbarrier.init(empty.index(i), count=CONSUMERS)
    ring = Ring(m_tiles, v_tiles, weights, full, empty)
    task = Centroids(centroid, order, out, lse, begin, query_cells, key_cells, scale, c_tiles)
    skipped = Skipped(
        mean, value, bits, valid, head.to(gl.int32), begin // TILE_CELLS, tiles, key_cells, keys, n_bytes
    )
    gl.warp_specialize(
        [
            (_consume, (task, ring, 0, TILE_CELLS)),
            (_consume, (task, ring, 1, TILE_CELLS)),
            (_consume, (task, ring, 2, TILE_CELLS)),
            (produce, (skipped, ring, TILE_CELLS, SLICE_KEYS)),
        ],
        [4, 4, 4],
        REGISTERS,
    )


@functools.lru_cache(maxsize=32)
def _template(shape: tuple[int, ...], dtype: torch.dtype) -> TensorDescriptor:
    """Of means [B * H, key cells, D]: STEP cells of a head at a time."""
    (_, key_cells, dim), block = shape, [1, STEP.value, shape[2]]
    layout = gl.NVMMASharedLayout.get_default_for(block, TYPES[dtype])
    return template(
        TensorDescriptor(torch.empty(0, dtype=dtype), [*shape], [key_cells * dim, dim, 1], block, layout)
    )


def tail(call: Call, planned: Planned) -> Tail:
    """The tail of a call under a plan."""
    plan, (means, key_rows, (out, lse)) = planned.plan, tail_room(call, planned)
    (batch, heads, query_cells, dim), bits, order = out.shape, plan.bits, plan.cell_order
    described, valid = (like(_template(x.shape, x.dtype), x) for x in (means.mean, means.value)), None
    if plan.key_valid is not None:
        places = torch.arange(CELL, dtype=torch.int32, device=out.device)
        valid = ((key_rows >= 0).view(len(key_rows), -1, CELL) << places).sum(2, dtype=torch.int32)
    launch_kernel(
        tail_hopper_kernel,
        (-(-query_cells // (64 * CONSUMERS.value)), batch * heads),
        means.centroid,
        *described,
        bits,
        valid,
        order,
        out,
        lse,
        shared_stride(bits, 0),
        shared_stride(bits, 1),
        shared_stride(valid),
        shared_stride(order, 0),
        shared_stride(order, 1),
        heads,
        query_cells,
        means.mean.shape[1],
        plan.keys,
        bits.shape[2],
        bits.shape[3],
        plan.softmax_scale(dim) * LOG2_E,
        D=dim,
        TILE_CELLS=plan.tile_rows // CELL,
        SLICE_KEYS=plan.tile_keys,
        STAGES=STAGES,
        REGISTERS=REGISTERS,
        num_warps=4,
    )
    return out, lse
