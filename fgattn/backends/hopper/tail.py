"""Tail on Hopper (compute capability 9.0): the portable kernel's formula, in Gluon.

A program takes 192 centroids of one head through all cells, 64 in each of its consumer warpgroups: at 480p
length 12 heads are 132 programs, one for each multiprocessor of an H200. Producer warps have the copy engine
(TMA) bring the means of keys and values of STEP cells into a ring of shared tiles, and put beside them log2
of the number of keys that each executed tile skips in each cell, -inf for none (fp16: weights are off by
0.07 % at most, powers of two not at all). The next step's scores are computed beside a step's exponentials.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...call import Call
from ...layout import CELL
from ..base import Planned, Tail
from ..shared.launch import COUNTS, LOG2_E, shared_stride
from ..shared.summarise import tail_room
from .attend import _own_sums
from .producers import TYPES

CONSUMERS = gl.constexpr(3)
STEP = gl.constexpr(64)  # cells
STAGES = 4
REGISTERS = (144, 144, 80)  # of a thread: second and third consumer, producers; the first has the rest
LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _consume(
    task, ring, WARPGROUP: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, TILE_RUNS: gl.constexpr,
):
    centroid, order, out, lse, begin, runs, cells, scale, c_tiles = task
    begin += 64 * WARPGROUP
    c_tile = c_tiles.index(WARPGROUP)
    m_tiles, v_tiles, weights, full, empty = ring
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    IO: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    T: gl.constexpr = 64 // TILE_RUNS
    place = begin + gl.arange(0, 64, gl.SliceLayout(1, IO))
    run = place
    if order is not None:
        run = gl.load(order + place, mask=place < runs, other=0)
    dim = gl.arange(0, D, gl.SliceLayout(0, IO))
    at = centroid + run.to(gl.int64)[:, None] * D + dim[None, :]
    c_tile.store(gl.load(at, mask=(place < runs)[:, None], other=0.0))
    fence_async_shared()
    zero = gl.full([64, STEP], 0.0, gl.float32, S)
    by_tile = zero.reshape([T, TILE_RUNS, STEP])
    m_i = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, S))  # finite: a step can have no weight
    l_i = gl.full([64, 8], 0.0, gl.float32, SUMS)
    acc = gl.full([64, D], 0.0, gl.float32, ACC)
    steps = gl.cdiv(cells, STEP)
    mbarrier.wait(full.index(0), 0)
    s = warpgroup_mma(c_tile, m_tiles.index(0).permute((1, 0)), zero, use_acc=False)
    for i in range(steps):
        stage = i % STAGES
        weight = weights.index(stage * CONSUMERS + WARPGROUP).load(gl.SliceLayout(1, by_tile.type.layout))
        weight, _ = gl.broadcast(gl.expand_dims(weight, 1), by_tile)
        weight = gl.convert_layout(weight.reshape([64, STEP]), S, assert_trivial=True)
        following = gl.minimum(i + 1, steps - 1)  # the last step's scores come twice: no branch
        mbarrier.wait(full.index(following % STAGES), (following // STAGES) & 1)
        m_tile = m_tiles.index(following % STAGES)
        s_token = warpgroup_mma(c_tile, m_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
        s = s * scale + weight.to(gl.float32)
        m_new = gl.maximum(m_i, gl.max(s, 1))
        w = gl.exp2(s - m_new[:, None])
        alpha = gl.exp2(m_i - m_new)
        l_i = l_i * gl.convert_layout(alpha, gl.SliceLayout(1, SUMS))[:, None] + _own_sums(w, l_i)
        p = gl.convert_layout(w.to(c_tile.dtype), gl.DotOperandLayout(0, ACC, 2))
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, ACC))[:, None]
        m_i = m_new
        acc_token = warpgroup_mma(p, v_tiles.index(stage), acc, is_async=True)
        s, acc = warpgroup_mma_wait(num_outstanding=0, deps=(s_token, acc_token))
        mbarrier.arrive(empty.index(stage), count=1)
    m_row = gl.convert_layout(m_i, gl.SliceLayout(1, ACC))
    l_row = gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, ACC))
    acc = acc * (1.0 / gl.where(l_row == 0.0, 1.0, l_row))[:, None]
    place = begin + gl.arange(0, 64, gl.SliceLayout(1, ACC))
    dim = gl.arange(0, D, gl.SliceLayout(0, ACC))
    gl.store(out + place[:, None] * D + dim[None, :], acc, mask=(place < runs)[:, None])
    gl.store(lse + place, (m_row + gl.log2(l_row)) * LN_2, mask=place < runs)


@gluon.jit
def _log2_of_ones(x):
    """log2 of the number of bits set, -inf for none."""
    return gl.inline_asm_elementwise(
        "{.reg .b32 n; .reg .f32 f; popc.b32 n, $1; cvt.rn.f32.u32 f, n; lg2.approx.ftz.f32 $0, f;}",
        "=f,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _octets(tile_bits, part, n_bytes):
    """The byte of each tile's bits that holds a slice, shifted so that the slice comes first."""
    octet = gl.load(tile_bits + gl.minimum(part // 8, n_bytes - 1)).to(gl.int32)
    return octet >> (part % 8)


@gluon.jit
def _weights(tile_bits, there, first, place, n_bytes, N: gl.constexpr):
    """log2 of the number of keys that each tile skips in each cell, `there` being bits of those that exist.

    Cells are counted by group and place, [tiles, groups, places]; `first`: first cell of each group.
    """
    if N >= 16:  # the slices of a group lie in one byte
        kept = (_octets(tile_bits, first * 16 // N, n_bytes) >> (place * 16 // N)) & 1
        weights = gl.where(kept == 0, _log2_of_ones(there), float("-inf"))
    elif N == 1:  # a cell has two bytes
        executed = _octets(tile_bits, (first + place) * 16, n_bytes)
        executed |= _octets(tile_bits, (first + place) * 16 + 8, n_bytes) << 8
        weights = _log2_of_ones(there & ~executed)
    else:
        octet = _octets(tile_bits, (first + place) * 16 // N, n_bytes)
        parts: gl.constexpr = 16 // N  # bits, which are moved apart, by halves, and repeated
        x = octet & ((1 << parts) - 1)
        x = (x | x << (8 - parts // 2)) & (((1 << parts // 2) - 1) * 0x0101)
        if parts >= 4:
            x = (x | x << (4 - parts // 4)) & (((1 << parts // 4) - 1) * 0x1111)
        if parts == 8:
            x = (x | x << 1) & 0x5555
        weights = _log2_of_ones(there & ~(x * ((1 << N) - 1)))
    return weights


@gluon.jit
def _produce(
    task, ring, D: gl.constexpr, STAGES: gl.constexpr, TILE_RUNS: gl.constexpr, N: gl.constexpr,
):
    mean, value, bits, valid, head, tile, tiles, cells, keys, n_bytes = task
    m_tiles, v_tiles, weights, full, empty = ring
    T: gl.constexpr = 64 // TILE_RUNS
    GROUP: gl.constexpr = T // 2  # cells of a tile that a thread has
    L: gl.constexpr = gl.BlockedLayout([1, 1, GROUP], [T // 4, 128 // T, 1], [4, 1, 1], [2, 1, 0])
    row = gl.arange(0, T, gl.SliceLayout(1, gl.SliceLayout(2, L)))[:, None][:, :, None]
    group = gl.arange(0, STEP // GROUP, gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :][:, :, None]
    place = gl.arange(0, GROUP, gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, :][:, None, :]
    for i in range(gl.cdiv(cells, STEP)):
        stage = i % STAGES
        mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), 2 * STEP * D * 2)  # two tiles of 16-bit elements
        tma.async_copy_global_to_shared(mean, [head, i * STEP, 0], full.index(stage), m_tiles.index(stage))
        tma.async_copy_global_to_shared(value, [head, i * STEP, 0], full.index(stage), v_tiles.index(stage))
        first = i * STEP + group * GROUP
        cell = first + place
        if valid is None:
            there = (1 << gl.minimum(gl.maximum(keys - cell * 16, 0), 16)) - 1
        else:
            there = gl.load(valid + cell, mask=cell < cells, other=0)
        for j in gl.static_range(CONSUMERS):
            tile_bits = bits + gl.minimum(tile + j * T + row, tiles - 1).to(gl.int64) * n_bytes
            weight = _weights(tile_bits, there, first, place, n_bytes, N)
            weights.index(stage * CONSUMERS + j).store(weight.to(gl.float16).reshape([T, STEP]))
        mbarrier.arrive(full.index(stage), count=1)


@gluon.jit(do_not_specialize=[
    "stride_bits_b", "stride_bits_h", "stride_valid_b", "stride_order_b", "stride_order_h", *COUNTS])
def tail_hopper_kernel(
    centroid, mean, value, bits, valid, order, out, lse, stride_bits_b, stride_bits_h, stride_valid_b,
    stride_order_b, stride_order_h, heads, runs, cells, keys, tiles, n_bytes, scale,
    D: gl.constexpr, TILE_RUNS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):
    """Runs in their order of execution (None: as they come).

    `valid`: bits of the keys of each cell that exist, int32 [B or 1, cells]; None: all do.
    """
    head = gl.program_id(1).to(gl.int64)
    b = head // heads
    h = head % heads
    begin = gl.program_id(0) * (64 * CONSUMERS)
    centroid += head * runs * D
    out += head * runs * D
    lse += head * runs
    bits += b * stride_bits_b + h * stride_bits_h
    if valid is not None:
        valid += b * stride_valid_b
    if order is not None:
        order += b * stride_order_b + h * stride_order_h
    dtype: gl.constexpr = centroid.dtype.element_ty
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([STEP, D], dtype)
    w_layout: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    c_tiles = gl.allocate_shared_memory(dtype, [CONSUMERS, 64, D], layout)
    m_tiles = gl.allocate_shared_memory(dtype, [STAGES, STEP, D], layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, STEP, D], layout)
    weights = gl.allocate_shared_memory(gl.float16, [STAGES * CONSUMERS, 64 // TILE_RUNS, STEP], w_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2)  # the copies, the weights
        mbarrier.init(empty.index(i), count=CONSUMERS)
    ring = (m_tiles, v_tiles, weights, full, empty)
    task = (centroid, order, out, lse, begin, runs, cells, scale, c_tiles)
    means = (mean, value, bits, valid, head.to(gl.int32), begin // TILE_RUNS, tiles, cells, keys, n_bytes)
    gl.warp_specialize([
        (_consume, (task, ring, 0, D, STAGES, TILE_RUNS)),
        (_consume, (task, ring, 1, D, STAGES, TILE_RUNS)),
        (_consume, (task, ring, 2, D, STAGES, TILE_RUNS)),
        (_produce, (means, ring, D, STAGES, TILE_RUNS, N)),
    ], [4, 4, 4], REGISTERS)


def tail(call: Call, planned: Planned) -> Tail:
    """The tail of a call under a plan."""
    plan, (made, key_rows, (out, lse)) = planned.plan, tail_room(call, planned)
    (batch, heads, runs, dim), bits, order = out.shape, plan.bits, plan.cell_order
    block, valid = [1, STEP.value, dim], None
    layout = gl.NVMMASharedLayout.get_default_for(block, TYPES[made.mean.dtype])
    described = (TensorDescriptor.from_tensor(x, block, layout) for x in (made.mean, made.value))
    if plan.key_valid is not None:
        places = torch.arange(CELL, dtype=torch.int32, device=out.device)
        valid = ((key_rows >= 0).view(len(key_rows), -1, CELL) << places).sum(2, dtype=torch.int32)
    with torch.cuda.device(out.device):
        tail_hopper_kernel[triton.cdiv(runs, 64 * CONSUMERS.value), batch * heads](
            made.centroid, *described, bits, valid, order, out, lse, shared_stride(bits, 0),
            shared_stride(bits, 1), shared_stride(valid, 0), shared_stride(order, 0), shared_stride(order, 1),
            heads, runs, made.mean.shape[1], plan.keys, bits.shape[2], bits.shape[3],
            plan.softmax_scale(dim) * LOG2_E, D=dim, TILE_RUNS=plan.tile_rows // CELL, N=plan.tile_keys,
            STAGES=STAGES, REGISTERS=REGISTERS, num_warps=4)
    return out, lse
