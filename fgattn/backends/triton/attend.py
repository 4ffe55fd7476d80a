"""Attend: online softmax over gathered keys, on any GPU that Triton supports.

One program computes BLOCK_M query rows of one head. Keys come from a list of units (UNIT
consecutive positions in the order); `key_rows` turns a position into a row of k and v, or -1 where
there is no key, so that order, ragged ends and invalid keys are one lookup (with invalid keys, units
are single keys, and only the last unit can be short). Scores stay in
registers, accumulation is fp32. The list is made from the plan's bits by the first kernel.

    out = (sum_kept e^(s-m) v + e^(t-m) tail) / (sum_kept e^(s-m) + e^(t-m)),   m = max(s, t)
with scores s and the tail's log-sum-exp t, all in base 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...call import Call
from ...layout import CELL
from ...plan import SparsePlan
from ..base import Tail
from ..shared.launch import COUNTS, LOG2_E, on_device
from ..shared.lists import Lists, execution_rows, scaled_tail
from ..shared.plan_table import capability
from .launch_table import launch_for


@triton.jit
def _step(
    i, count, q, acc, m_i, l_i, k_base, v_base, stride_k, stride_v, units, key_rows, scale,
    BLOCK_N: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, IS_MASKED: tl.constexpr,
):
    lane = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, D)
    place = i + lane // UNIT
    if IS_MASKED:
        entry = tl.load(units + place, mask=place < count, other=-1)
    else:
        entry = tl.load(units + place)
    row = entry
    if UNIT > 1 and IS_MASKED:
        row = tl.load(key_rows + entry * UNIT + lane % UNIT, mask=entry >= 0, other=-1)
    elif UNIT > 1:
        row = tl.load(key_rows + entry * UNIT + lane % UNIT)
    k_at = k_base + row.to(tl.int64)[:, None] * stride_k + dim[None, :]
    v_at = v_base + row.to(tl.int64)[:, None] * stride_v + dim[None, :]
    if IS_MASKED:
        k = tl.load(k_at, mask=row[:, None] >= 0, other=0.0)
        v = tl.load(v_at, mask=row[:, None] >= 0, other=0.0)
    else:
        k = tl.load(k_at)
        v = tl.load(v_at)
    s = tl.dot(q, tl.trans(k)) * scale  # [BLOCK_M, BLOCK_N]
    if IS_MASKED:
        s = tl.where(row[None, :] >= 0, s, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(s, 1))
    p = tl.math.exp2(s - m_new[:, None])
    alpha = tl.math.exp2(m_i - m_new)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
    return acc, m_new, l_i


@triton.jit(do_not_specialize=["stride_queries", *COUNTS])
def attend_kernel(
    q, k, v, out, lists, listed, query_rows, key_rows, tail_out, tail_lse,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_ob, stride_oh, stride_ol, stride_queries, stride_rows_b, stride_list, heads, first, queries, tiles,
    runs, scale, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr,
    D: tl.constexpr, HAS_TAIL: tl.constexpr,
):
    tile = tl.program_id(0)
    row = tl.program_id(1)
    head = (first + row).to(tl.int64)
    b, h = head // heads, head % heads
    position = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, D)
    exists = position < queries
    token = tl.load(query_rows + head * stride_queries + position, mask=exists, other=0).to(tl.int64)
    q_tile = tl.load(q + b * stride_qb + h * stride_qh + token[:, None] * stride_ql + dim[None, :],
                     mask=exists[:, None], other=0.0)
    k_base = k + b * stride_kb + h * stride_kh
    v_base = v + b * stride_vb + h * stride_vh
    key_rows += b * stride_rows_b
    at = row.to(tl.int64) * tiles + tile
    count = tl.cdiv(tl.load(listed + at), UNIT)
    unit_list = lists + at * stride_list

    m_i = tl.full([BLOCK_M], -1e30, tl.float32)  # finite: an empty list must not give inf - inf
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    # The last step may be short and may hold the short last unit of the sequence: masked apart.
    full = tl.maximum(count - 1, 0) // (BLOCK_N // UNIT) * (BLOCK_N // UNIT)
    for i in range(0, full, BLOCK_N // UNIT):
        acc, m_i, l_i = _step(i, count, q_tile, acc, m_i, l_i, k_base, v_base, stride_kl, stride_vl,
                              unit_list, key_rows, scale, BLOCK_N, UNIT, D, False)
    if count > 0:
        acc, m_i, l_i = _step(full, count, q_tile, acc, m_i, l_i, k_base, v_base, stride_kl, stride_vl,
                              unit_list, key_rows, scale, BLOCK_N, UNIT, D, True)
    if HAS_TAIL:
        run = head * runs + position // 16
        tail_l = tl.load(tail_lse + run, mask=exists, other=float("-inf"))
        m_new = tl.maximum(m_i, tail_l)
        alpha, beta = tl.math.exp2(m_i - m_new), tl.math.exp2(tail_l - m_new)
        pooled = tl.load(tail_out + run[:, None] * D + dim[None, :], mask=exists[:, None], other=0.0)
        acc = acc * alpha[:, None] + pooled * beta[:, None]
        l_i = l_i * alpha + beta
    acc = acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]  # nothing kept and no tail: zeros
    tl.store(out + b * stride_ob + h * stride_oh + token[:, None] * stride_ol + dim[None, :],
             acc.to(out.dtype.element_ty), mask=exists[:, None])


def attend(call: Call, plan: SparsePlan, tail: Tail | None, out: torch.Tensor) -> None:
    """Write softmax over the plan's keys, and the tail if there is one, to out."""
    q, k, v = call.tensors
    (batch, heads, _, dim), queries, tiles = q.shape, plan.queries, plan.bits.shape[2]
    tail_out, tail_lse = scaled_tail(tail)
    launch = launch_for(capability(q.device), dim, plan.tile_rows)
    with on_device(q):
        lists, (tokens, stride_queries) = Lists(plan, batch, heads), execution_rows(plan, batch, heads)
        for b, first, group in lists.groups():
            attend_kernel[tiles, group](
                q, k, v, out, lists.lists, lists.listed, tokens, lists.key_rows, tail_out, tail_lse,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
                stride_queries, lists.stride_rows, lists.stride, heads, b * heads + first, queries,
                tiles, -(-queries // CELL), plan.softmax_scale(dim) * LOG2_E,
                BLOCK_M=plan.tile_rows, BLOCK_N=launch.block_keys, UNIT=lists.unit, D=dim,
                HAS_TAIL=tail is not None, num_warps=launch.warps, num_stages=launch.stages)
