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

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ...layout import CELL, OCTET
from ...plan import SparsePlan
from ..shared import compile_log  # noqa: F401
from ..shared.launch_table import capability, launch_for
from ..shared.summarise import COUNTS, LOG2_E, on_device, position_rows, shared_stride

HEAD_DIMS = (64, 128)
LIST_BYTES = 208 << 20  # scratch for lists; more heads than fit run in several launches
LIST_BLOCK, LIST_SPAN = 256, 4096  # units: of a step, of a program


@triton.jit
def _ones_up_to(octet):
    """For a byte, the number of bits set up to and with bit i as the i-th group of four bits, uint32."""
    x = octet.to(tl.uint32)
    x = (x | (x << 12)) & 0x000F000F
    x = (x | (x << 6)) & 0x03030303
    x = (x | (x << 3)) & 0x11111111  # bit i is now bit 4 * i
    x += x << 4
    x += x << 8
    return x + (x << 16)


@triton.jit(do_not_specialize=["stride_bits_b", "stride_bits_h", *COUNTS])
def list_kernel(
    bits, entries, lists, listed, stride_bits_b, stride_bits_h, stride_entries_b, stride_list, heads, first,
    tiles, slices, units, keys, span, n_bytes,
    SPLIT: tl.constexpr, UNIT: tl.constexpr, HAS_ENTRIES: tl.constexpr, CHECKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """List the units whose slice (unit // SPLIT) has its bit set, for one tile, in the order.

    A unit is listed as its entry, or as itself without entries; if CHECKED, those with an entry below 0
    are left out. One program writes `span` units; it counts the bits before them to know where. `listed`
    is the number of keys; the list ends with 16 times -1.
    """
    tile = tl.program_id(0)
    row = tl.program_id(1)
    head = (first + row).to(tl.int64)
    source = bits + (head // heads) * stride_bits_b + (head % heads) * stride_bits_h
    source += tile.to(tl.int64) * n_bytes
    out = lists + (row.to(tl.int64) * tiles + tile) * stride_list
    begin = tl.program_id(2) * span  # a multiple of 8 * SPLIT
    end = tl.minimum(begin + span, units)
    behind = begin // (8 * SPLIT)
    ones = tl.zeros([BLOCK // 8], tl.int32)
    for start in range(0, behind, BLOCK // 8):
        byte = start + tl.arange(0, BLOCK // 8)
        ones += (_ones_up_to(tl.load(source + byte, mask=byte < behind, other=0)) >> 28).to(tl.int32)
    count = tl.sum(ones, 0) * SPLIT
    STEP: tl.constexpr = 1 if CHECKED else min(SPLIT, 8)  # units of one bit
    i = tl.arange(0, 8)[:, None]  # [8, BLOCK // 8]: neighbouring lanes store to neighbouring places
    eight = begin // 8 + tl.arange(0, BLOCK // 8)  # units whose bits lie in one byte
    ahead = tl.load(source + eight // SPLIT, mask=eight * 8 < end, other=0)
    for _ in range(begin, end, BLOCK):
        octet = ahead.to(tl.int32) >> (eight * 8 // SPLIT % 8)
        unit = eight[None, :] * 8 + i
        eight += BLOCK // 8
        ahead = tl.load(source + eight // SPLIT, mask=eight * 8 < end, other=0)
        kept = (octet[None, :] >> (i // SPLIT)) & 1
        entry = unit
        if HAS_ENTRIES:
            wanted = (kept > 0) & (unit < end)
            entry = tl.load(entries + (head // heads) * stride_entries_b + unit, mask=wanted, other=-1)
        if CHECKED:
            kept &= (entry >= 0).to(tl.int32)
            octet = tl.sum(kept << i, 0)
        octet &= (1 << (8 // STEP)) - 1
        ones_up_to = _ones_up_to(octet)
        number = (ones_up_to >> 28).to(tl.int32) * STEP
        before = ((ones_up_to << 4)[None, :] >> (4 * (i // STEP)).to(tl.uint32)).to(tl.int32) & 15
        place = (count + tl.cumsum(number, 0) - number)[None, :] + before * STEP + i % STEP
        tl.store(out + place, entry, mask=(kept > 0) & (unit < end))
        count += tl.sum(number, 0)
    if end == units:
        n_keys = count * UNIT
        if not CHECKED:  # the last slice was counted as if it filled its byte
            last = (tl.load(source + (slices - 1) // 8).to(tl.int32) >> ((slices - 1) % 8)) & 1
            count -= last * (tl.minimum(slices * SPLIT, tl.cdiv(units, 8) * 8) - units)
            n_keys = count * UNIT - last * (units * UNIT - keys)
        tl.store(out + count + tl.arange(0, 16), tl.full([16], -1, tl.int32))
        tl.store(listed + row * tiles + tile, n_keys)


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


IS_INTERPRETED = not isinstance(attend_kernel, triton.JITFunction)


def attend_triton(q, k, v, plan: SparsePlan, tail, out: torch.Tensor) -> None:
    """Write softmax over the plan's keys (and `tail` = (out, lse) of tail_triton, or None) to out."""
    (batch, heads, _, dim), queries, tiles = q.shape, plan.queries, plan.bits.shape[2]
    tail_out, tail_lse = scaled_tail(tail)
    launch = launch_for(capability(q.device), dim, plan.tile_rows)
    with on_device(q):
        lists, (tokens, stride_queries) = Lists(plan, batch, heads), query_rows(plan, batch, heads)
        for b, first, group in lists.groups():
            attend_kernel[tiles, group](
                q, k, v, out, lists.lists, lists.listed, tokens, lists.key_rows, tail_out, tail_lse,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
                stride_queries, lists.stride_rows, lists.stride, heads, b * heads + first, queries,
                tiles, -(-queries // CELL), plan.softmax_scale(dim) * LOG2_E,
                BLOCK_M=plan.tile_rows, BLOCK_N=launch.block_keys, UNIT=lists.unit, D=dim,
                HAS_TAIL=tail is not None, num_warps=launch.warps, num_stages=launch.stages)


class Lists:
    """The unit lists of a plan's tiles, made for one group of heads after the other.

    Units are octets, listed as their box (see order.octet_boxes), if boxes are given; else up to 16 keys,
    listed as their place in the order; else single keys, listed as their row of k and v.
    """

    def __init__(self, plan: SparsePlan, batch: int, heads: int, boxes: torch.Tensor | None = None):
        bits = self.bits = plan.bits
        self.batch, self.heads, self.tiles, self.keys = batch, heads, bits.shape[2], plan.keys
        self.key_rows = position_rows(plan.geometry.key_tokens, plan.key_valid)
        self.stride_rows = shared_stride(self.key_rows)
        if boxes is not None:
            self.unit, self.entries = OCTET, boxes
        else:
            self.unit = 1 if plan.key_valid is not None else min(plan.tile_keys, CELL)
            self.entries = self.key_rows if self.unit == 1 else None
        self.units, self.split = -(-plan.keys // self.unit), plan.tile_keys // self.unit
        self.slices, self.is_checked = -(-plan.keys // plan.tile_keys), plan.key_valid is not None
        # Where its bit alone says whether a unit is listed, several programs share a list.
        self.span = self.units if self.is_checked else LIST_SPAN
        self.stride = -(-self.units // 16) * 16 + 16  # lists start aligned: wide loads
        fitting = max(1, LIST_BYTES // (4 * self.tiles * self.stride))
        group = -(-heads // -(-heads // fitting))  # even groups
        self.lists = torch.empty(group, self.tiles, self.stride, dtype=torch.int32, device=bits.device)
        self.listed = torch.empty(group, self.tiles, dtype=torch.int32, device=bits.device)

    def groups(self) -> Iterator[tuple[int, int, int]]:
        """(batch row, first head, number of heads) whose lists were just made."""
        bits, group = self.bits, len(self.lists)
        strides = shared_stride(bits, 0), shared_stride(bits, 1)
        for b, first in itertools.product(range(self.batch), range(0, self.heads, group)):
            number = min(group, self.heads - first)
            list_kernel[self.tiles, number, triton.cdiv(self.units, self.span)](
                bits, self.entries, self.lists, self.listed, *strides, self.stride_rows, self.stride,
                self.heads, b * self.heads + first, self.tiles, self.slices, self.units, self.keys, self.span,
                bits.shape[3], SPLIT=self.split, UNIT=self.unit, HAS_ENTRIES=self.entries is not None,
                CHECKED=self.is_checked, BLOCK=LIST_BLOCK, num_warps=1)
            yield b, first, number


def query_rows(plan: SparsePlan, batch: int, heads: int) -> tuple[torch.Tensor, int]:
    """Rows of the queries in the order of execution, and the distance of one head's to the next's."""
    tokens = plan.query_tokens
    if plan.run_order is None:
        return tokens, 0  # one order for all heads
    return tokens.expand(batch, heads, -1).contiguous(), plan.queries


def scaled_tail(tail):
    """Output and log-sum-exp of a tail, the latter in base 2; twice None without a tail."""
    return (None, None) if tail is None else (tail[0], tail[1] * LOG2_E)
