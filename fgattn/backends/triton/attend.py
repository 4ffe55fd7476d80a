"""Attention over the keys that a plan keeps, on any GPU that Triton supports: the portable kernel.

One program computes TILE_QUERIES queries of one head with an online softmax over the keys of the tile's list
(see shared/lists.py). Keys are gathered: `key_rows` turns a position in the order into a row of k and v, or
-1 where there is no key, so that order, ragged ends and invalid keys are one look-up. With invalid keys the
units of a list are single keys, so that only the last unit can be short. Scores stay in registers, and sums
are fp32.

    out = (sum_kept e^(s-m) v + e^(t-m) tail) / (sum_kept e^(s-m) + e^(t-m)),   m = max(s, t)

with scores s, and the tail (what is not kept, estimated; see shared/tail.py) with its log-sum-exp t. The
kernel computes powers of two, with s, t and m in base 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...call import Call, needed
from ...layout import CELL
from ...plan import SparsePlan
from ..base import Tail
from ..shared.launch import COUNTS, batch_and_head, scaled
from ..shared.lists import Lists, execution_rows, scaled_tail
from ..shared.plan_table import generation
from ..shared.prepared import launch_kernel
from .launch_table import launch_for


@triton.jit
def _entries(i, count, units, BLOCK_KEYS: tl.constexpr, UNIT: tl.constexpr):
    """The entry of each key of a step, int32 [BLOCK_KEYS], from the list's i-th unit on; -1 past its end."""
    place = i + tl.arange(0, BLOCK_KEYS) // UNIT
    return tl.load(units + place, mask=place < count, other=-1)


@triton.jit
def _rows(entry, key_rows, BLOCK_KEYS: tl.constexpr, UNIT: tl.constexpr):
    """The row of k and v of each key of a step, int32 [BLOCK_KEYS]; -1 where there is no key."""
    row = entry
    if UNIT > 1:
        place = entry * UNIT + tl.arange(0, BLOCK_KEYS) % UNIT
        row = tl.load(key_rows + place, mask=entry >= 0, other=-1)
    return row


@triton.jit
def _step(row, q, acc, m_i, l_i, k, v, stride_k, stride_v, scale, D: tl.constexpr, IS_MASKED: tl.constexpr):
    """One step of the online softmax.

    row: int32 [BLOCK_KEYS], rows of k and v; IS_MASKED: some are -1. q: [TILE_QUERIES, D]; m_i, l_i: fp32
    [TILE_QUERIES], the largest scaled score so far and the sum of 2^(s - m_i); acc: fp32 [TILE_QUERIES, D],
    the sum of 2^(s - m_i) v. Returns the new acc, m_i and l_i.
    """
    dim = tl.arange(0, D)
    k_at = k + row.to(tl.int64)[:, None] * stride_k + dim[None, :]
    v_at = v + row.to(tl.int64)[:, None] * stride_v + dim[None, :]
    if IS_MASKED:
        k_tile = tl.load(k_at, mask=row[:, None] >= 0, other=0.0)
        v_tile = tl.load(v_at, mask=row[:, None] >= 0, other=0.0)
    else:
        k_tile = tl.load(k_at)
        v_tile = tl.load(v_at)
    s = tl.dot(q, tl.trans(k_tile))  # [TILE_QUERIES, BLOCK_KEYS]
    if IS_MASKED:
        s = tl.where(row[None, :] >= 0, s, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(s, 1) * scale)
    p = tl.math.exp2(s * scale - m_new[:, None])
    alpha = tl.math.exp2(m_i - m_new)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None])
    return acc, m_new, l_i


# Strides are single numbers here: the oldest Triton that runs this kernel takes no tuples.
@triton.jit(do_not_specialize=["stride_queries", *COUNTS])
def attend_kernel(
    q,
    k,
    v,
    out,
    lists,
    listed,
    query_rows,
    key_rows,
    tail_out,
    tail_lse,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_vb,
    stride_vh,
    stride_vl,
    stride_ob,
    stride_oh,
    stride_ol,
    stride_queries,
    stride_rows_b,
    stride_list,
    heads,
    first_head,
    queries,
    tiles,
    query_cells,
    scale,
    TILE_QUERIES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    UNIT: tl.constexpr,
    AHEAD: tl.constexpr,
    D: tl.constexpr,
    HAS_TAIL: tl.constexpr,
):
    """Attention of one of the PARTS of a tile over the tile's list, by the formula above.

    Launched by `attend`. Grid: (tiles * PARTS, heads of the launch); head `first_head` of all B * H comes
    first. TILE_QUERIES: of a part.

    Reads
        q: [B, H, L_q, D]; k, v: [B, H, L_k, D], the channels of a row next to each other.
        lists: int32 [heads of the launch, tiles, stride_list], units of UNIT keys; listed: int32 [heads of
            the launch, tiles], their keys.
        query_rows: int32 [B * H or 1, queries], row of q and out at each place of execution.
        key_rows: int32 [B or 1, L_k and more], row of k and v at each position; not read if UNIT is 1.
        tail_out: fp32 [B * H, query_cells, D]; tail_lse: fp32 [B * H, query_cells], base 2; if HAS_TAIL.
        scale: the softmax scale times log2(e), above 0.
    Writes
        out: [B, H, L_q, D].
    """
    part = tl.program_id(0)
    own = tl.program_id(1)  # of the heads of the launch
    head = (first_head + own).to(tl.int64)
    b, h = batch_and_head(first_head + own, heads)
    position = part * TILE_QUERIES + tl.arange(0, TILE_QUERIES)
    dim = tl.arange(0, D)
    exists = position < queries
    token = tl.load(query_rows + head * stride_queries + position, mask=exists, other=0).to(tl.int64)
    q_tile = tl.load(
        q + b * stride_qb + h * stride_qh + token[:, None] * stride_ql + dim[None, :],
        mask=exists[:, None],
        other=0.0,
    )
    k_base = k + b * stride_kb + h * stride_kh
    v_base = v + b * stride_vb + h * stride_vh
    key_rows += b * stride_rows_b
    at = own.to(tl.int64) * tiles + part // PARTS
    count = tl.cdiv(tl.load(listed + at), UNIT)
    unit_list = lists + at * stride_list

    m_i = tl.full([TILE_QUERIES], -1e30, tl.float32)  # finite: an empty list must not give inf - inf
    l_i = tl.zeros([TILE_QUERIES], tl.float32)
    acc = tl.zeros([TILE_QUERIES, D], tl.float32)
    # The last step may be short and may hold the short last unit of the sequence: masked apart.
    EACH: tl.constexpr = BLOCK_KEYS // UNIT
    full = tl.maximum(count - 1, 0) // EACH * EACH
    # Ahead: rows are looked up a step before they are needed, and entries two. Looked up in time for loads
    # that are under way they go through shared memory, at a barrier each, but are not waited for.
    if AHEAD:
        row = _rows(_entries(0, count, unit_list, BLOCK_KEYS, UNIT), key_rows, BLOCK_KEYS, UNIT)
        entry = _entries(EACH, count, unit_list, BLOCK_KEYS, UNIT)
    for i in range(0, full, EACH):
        if not AHEAD:
            entry = tl.load(unit_list + i + tl.arange(0, BLOCK_KEYS) // UNIT)
            row = _rows(entry, key_rows, BLOCK_KEYS, UNIT)
        acc, m_i, l_i = _step(
            row, q_tile, acc, m_i, l_i, k_base, v_base, stride_kl, stride_vl, scale, D, False
        )
        if AHEAD:
            row = _rows(entry, key_rows, BLOCK_KEYS, UNIT)
            entry = _entries(i + 2 * EACH, count, unit_list, BLOCK_KEYS, UNIT)
    if count > 0:
        row = _rows(_entries(full, count, unit_list, BLOCK_KEYS, UNIT), key_rows, BLOCK_KEYS, UNIT)
        acc, m_i, l_i = _step(
            row, q_tile, acc, m_i, l_i, k_base, v_base, stride_kl, stride_vl, scale, D, True
        )
    if HAS_TAIL:  # the queries of a cell share it
        query_cell = head * query_cells + position // 16
        tail_l = tl.load(tail_lse + query_cell, mask=exists, other=float("-inf"))
        m_new = tl.maximum(m_i, tail_l)
        alpha, beta = tl.math.exp2(m_i - m_new), tl.math.exp2(tail_l - m_new)
        tail = tl.load(tail_out + query_cell[:, None] * D + dim[None, :], mask=exists[:, None], other=0.0)
        acc = acc * alpha[:, None] + tail * beta[:, None]
        l_i = l_i * alpha + beta
    acc = acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]  # nothing kept and no tail: zeros
    tl.store(
        out + b * stride_ob + h * stride_oh + token[:, None] * stride_ol + dim[None, :],
        acc.to(out.dtype.element_ty),
        mask=exists[:, None],
    )


def attend(call: Call, plan: SparsePlan, tail: Tail | None, out: torch.Tensor) -> None:
    """Write softmax over the plan's keys, and the tail if there is one, to out."""
    q, k, v = map(needed, call.tensors)
    (batch, heads, _, dim), queries, tiles = q.shape, plan.queries, plan.bits.shape[2]
    q, scale = scaled(q, plan.softmax_scale(dim))
    tail_out, tail_lse = scaled_tail(tail)
    lists, (tokens, stride_queries) = Lists(plan, batch, heads), execution_rows(plan, batch, heads)
    row = launch_for(generation(q.device), dim, plan.tile_rows)
    launch = row.keys if lists.unit == 1 else row.cells
    for b, first, launch_heads in lists.launches():
        launch_kernel(
            attend_kernel,
            (tiles * row.parts, launch_heads),
            q,
            k,
            v,
            out,
            lists.lists,
            lists.listed,
            tokens,
            lists.key_rows,
            tail_out,
            tail_lse,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *out.stride()[:3],
            stride_queries,
            lists.stride_rows,
            lists.stride,
            heads,
            b * heads + first,
            queries,
            tiles,
            -(-queries // CELL),
            scale,
            TILE_QUERIES=plan.tile_rows // row.parts,
            PARTS=row.parts,
            BLOCK_KEYS=launch.block_keys,
            UNIT=lists.unit,
            AHEAD=launch.ahead,
            D=dim,
            HAS_TAIL=tail is not None,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )
