"""Consumers of the Hopper attention kernel: each warpgroup runs the online softmax on 64 queries, in Gluon.

Products are WGMMA from the buffers of a ring (see records.py) that producers fill. A tile's keys are taken
in steps; the step that is not full comes first and is the only one masked. While the weights of one step
multiply v, the scores of the next one are computed.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .producers import ROWS
from .softmax import own_sums


@gluon.jit
def _exists(place, listed, GATHERS: gl.constexpr):
    """Which places of the last step hold a key; a short octet is at the end of its box."""
    if GATHERS:
        return place < listed
    missing = -listed & (ROWS - 1)
    end = listed + missing
    return (place < end - ROWS) | (place >= end - ROWS + missing) & (place < end)


@gluon.jit
def _step(i, m_i, l_i, acc, p, q_tile, zero, scale, ring, GATHERS: gl.constexpr):
    """Scores of step i > 0, while the weights p of the step before multiply v.

    m_i: fp32 [64], largest scaled score so far; l_i: fp32 [64, 8], sums of the weights 2^(s - m_i) in parts;
    acc: fp32 [64, D], the weighted sum of v up to the step before the last. Returns the new m_i, l_i, acc, p.
    """
    STAGES: gl.constexpr = ring.k_tiles.shape[0]
    before = i - 1
    mbarrier.wait(ring.v_full.index(before % STAGES), (before // STAGES) & 1)
    mbarrier.wait(ring.k_full.index(i % STAGES), (i // STAGES) & 1)
    if GATHERS:  # cp.async and WGMMA see shared memory through different proxies
        fence_async_shared()
    s_token = warpgroup_mma(
        q_tile, ring.k_tiles.index(i % STAGES).permute((1, 0)), zero, use_acc=False, is_async=True
    )
    acc_token = warpgroup_mma(p, ring.v_tiles.index(before % STAGES), acc, is_async=True)
    s = warpgroup_mma_wait(num_outstanding=1, deps=(s_token,))
    mbarrier.arrive(ring.k_empty.index(i % STAGES), count=1)
    m_new = gl.maximum(m_i, gl.max(s, 1) * scale)
    w = gl.exp2(s * scale - m_new[:, None])
    alpha = gl.exp2(m_i - m_new)
    l_i = l_i * gl.convert_layout(alpha, gl.SliceLayout(1, l_i.type.layout))[:, None] + own_sums(w, l_i)
    p_next = gl.convert_layout(w.to(p.dtype), p.type.layout)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc_token,))
    mbarrier.arrive(ring.v_empty.index(before % STAGES), count=1)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
    return m_new, l_i, acc, p_next


@gluon.jit
def consume(task, ring, WARPGROUP: gl.constexpr, HAS_TAIL: gl.constexpr, GATHERS: gl.constexpr):
    """Attention of the WARPGROUP-th 64 queries of a tile, over the keys that come through the ring.

    task: records.Queries; ring: records.Ring; HAS_TAIL: the tail is added; GATHERS: `producers.gather` fills
    the ring, not `fetch`.
    """
    STAGES: gl.constexpr = ring.k_tiles.shape[0]
    BLOCK_KEYS: gl.constexpr = ring.k_tiles.shape[1]
    D: gl.constexpr = ring.k_tiles.shape[2]
    queries, listed, scale = task.queries, task.listed, task.scale
    begin = task.begin + 64 * WARPGROUP
    q_tile = task.q_tiles.index(WARPGROUP)
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_KEYS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    IO: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    position = begin + gl.arange(0, 64, gl.SliceLayout(1, IO))
    dim = gl.arange(0, D, gl.SliceLayout(0, IO))
    has_query = position < queries
    token = gl.load(task.query_rows + position, mask=has_query, other=0).to(gl.int64)
    q_at = task.q + token[:, None] * task.stride_q + dim[None, :]
    q_tile.store(gl.load(q_at, mask=has_query[:, None], other=0.0))
    zero = gl.full([64, BLOCK_KEYS], 0.0, gl.float32, S)
    m_i = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, S))  # finite: a list can be empty
    l_i = gl.full([64, 8], 0.0, gl.float32, SUMS)
    acc = gl.full([64, D], 0.0, gl.float32, ACC)
    steps = gl.cdiv(listed, BLOCK_KEYS)
    if steps > 0:
        mbarrier.wait(ring.k_full.index(0), 0)
        fence_async_shared()
        s = warpgroup_mma(q_tile, ring.k_tiles.index(0).permute((1, 0)), zero, use_acc=False)
        mbarrier.arrive(ring.k_empty.index(0), count=1)
        column = gl.arange(0, BLOCK_KEYS, gl.SliceLayout(0, S))
        exists = _exists((steps - 1) * BLOCK_KEYS + column, listed, GATHERS)
        s = gl.where(exists[None, :], s, float("-inf"))
        m_i = gl.maximum(m_i, gl.max(s, 1) * scale)
        w = gl.exp2(s * scale - m_i[:, None])
        l_i = own_sums(w, l_i)
        p = gl.convert_layout(w.to(q_tile.dtype), gl.DotOperandLayout(0, ACC, 2))
        for i in range(1, steps):
            m_i, l_i, acc, p = _step(i, m_i, l_i, acc, p, q_tile, zero, scale, ring, GATHERS)
        last = steps - 1
        mbarrier.wait(ring.v_full.index(last % STAGES), (last // STAGES) & 1)
        fence_async_shared()
        acc = warpgroup_mma(p, ring.v_tiles.index(last % STAGES), acc)
    m_row = gl.convert_layout(m_i, gl.SliceLayout(1, ACC))
    l_row = gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, ACC))
    if HAS_TAIL:  # the rows of a query cell share it
        place = begin + gl.arange(0, 64, gl.SliceLayout(1, ACC))
        tail_l = gl.load(task.tail_lse + place // 16, mask=place < queries, other=float("-inf"))
        m_new = gl.maximum(m_row, tail_l)
        alpha, beta = gl.exp2(m_row - m_new), gl.exp2(tail_l - m_new)
        by_cell = acc.reshape([4, 16, D])
        CELLS: gl.constexpr = gl.SliceLayout(1, by_cell.type.layout)
        query_cell = begin // 16 + gl.arange(0, 4, gl.SliceLayout(1, CELLS))
        column = gl.arange(0, D, gl.SliceLayout(0, CELLS))
        tail = gl.load(
            task.tail_out + query_cell[:, None] * D + column[None, :],
            mask=(query_cell * 16 < queries)[:, None],
            other=0.0,
        )
        tail, _ = gl.broadcast(gl.expand_dims(tail, 1), by_cell)
        tail = gl.convert_layout(tail.reshape([64, D]), ACC, assert_trivial=True)
        acc = acc * alpha[:, None] + tail * beta[:, None]
        l_row = l_row * alpha + beta
    acc = acc / gl.where(l_row == 0.0, 1.0, l_row)[:, None]  # nothing kept and no tail: zeros
    q_tile.store(acc.to(q_tile.dtype))  # by way of shared memory, so that rows are stored whole
    gl.store(
        task.out + token[:, None] * task.stride_out + dim[None, :],
        q_tile.load(IO).to(task.out.dtype.element_ty),
        mask=has_query[:, None],
    )
