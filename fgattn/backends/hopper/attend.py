"""Attention on Hopper (compute capability 9.0): the portable kernel's formula (triton/attend.py), in Gluon.

Other versions of Triton than those that are tested are tried, and judged by the self-test.

A program computes CONSUMERS * 64 queries of one head. Keys are taken in steps of BLOCK_KEYS; the step that is
not full comes first. Producer warps bring the listed rows of k and v into a ring, buffers in shared memory
that are used in turn (producers.py), and each consumer warpgroup of 64 queries reads them (consumer.py).

Where a slice has at least 8 keys and all octets of keys lie in memory as boxes, TMA fetches octets, by lists
that are made as for the portable kernel (shared/lists.py). Else rows are gathered one by one, as warps of the
same program list them (lister.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ...call import Call, needed
from ...layout import CELL
from ...plan import SparsePlan
from ..base import Tail
from ..shared.launch import COUNTS, key_rows, scaled
from ..shared.lists import Lists, execution_rows, scaled_tail
from ..shared.prepared import launch_kernel
from .boxes import boxes_for
from .consumer import consume
from .lister import BIT_STRIDES, SLOTS, Counts, enlist
from .producers import PRODUCERS, descriptors, fetch, gather
from .records import Bits, Boxes, Kinds, Queries, Ring, Rows, Slots


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
BOX_REGISTERS = (232, 40)  # of a thread: second consumer, producers


# Strides of q, k, v and out are tuples: of the batch row, the head and the token. Those that Triton shall not
# compile variants for are single numbers, as it heeds do_not_specialize for these only.
@gluon.jit(do_not_specialize=["stride_queries", *BIT_STRIDES, *COUNTS])
def hopper_kernel(
    q,
    k,
    v,
    k_flat,
    k_wide,
    k_deep,
    v_flat,
    v_wide,
    v_deep,
    out,
    lists,
    bits,
    valid,
    listed,
    query_rows,
    key_rows,
    tail_out,
    tail_lse,
    stride_q,
    stride_k,
    stride_v,
    stride_out,
    stride_queries,
    stride_list,
    stride_bits_b,
    stride_bits_h,
    stride_valid,
    heads,
    first_head,
    queries,
    keys,
    tiles,
    query_cells,
    n_bytes,
    scale,
    CONSUMERS: gl.constexpr,
    BLOCK_KEYS: gl.constexpr,
    SLICE_KEYS: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    GATHERERS: gl.constexpr,
    REGISTERS: gl.constexpr,
    HAS_TAIL: gl.constexpr,
    GATHERS: gl.constexpr,
):
    """Attention of one tile of CONSUMERS * 64 queries over the keys that the plan keeps.

    Launched by `attend`, with the four warps of the first consumer; the other warps are started here.
    Grid: (tiles, heads of the launch); head `first_head` of all B * H comes first.

    Reads
        q: [B, H, L_q, D]; k, v: [B, H, L_k, D]; 16 bits, the channels of a row next to each other. Fetching
            reads k and v through the tensor maps of one batch row instead.
        listed: int32 [heads of the launch, tiles], keys of each list.
        query_rows: int32 [B * H or 1, queries], row of q and out at each place of execution.
        tail_out: fp32 [B * H, query_cells, D]; tail_lse: fp32 [B * H, query_cells], base 2; if HAS_TAIL.
        scale: the softmax scale times log2(e), above 0.
        lists: int32 [heads of the launch, tiles, stride_list], boxes; to fetch.
        bits: uint8 [B or 1, H or 1, tiles, n_bytes], a bit for each slice of SLICE_KEYS keys; to gather.
        valid: None or int32 [B or 1, keys / 32], bits of the keys that exist; to gather.
        key_rows: int32 [keys], row of k and v at each position of the order; to gather.
    Writes
        out: [B, H, L_q, D].
    """
    tile = gl.program_id(0)
    listed_at = gl.program_id(1).to(gl.int64) * tiles + tile
    head = first_head + gl.program_id(1)
    b = (head // heads).to(gl.int64)  # dividing 64 bits would be a call
    h = (head % heads).to(gl.int64)
    head = head.to(gl.int64)
    q += b * stride_q[0] + h * stride_q[1]
    k += b * stride_k[0] + h * stride_k[1]
    v += b * stride_v[0] + h * stride_v[1]
    out += b * stride_out[0] + h * stride_out[1]
    query_rows += head * stride_queries
    if HAS_TAIL:
        tail_out += head * query_cells * D
        tail_lse += head * query_cells
    n_listed = gl.load(listed + listed_at)

    dtype: gl.constexpr = q.dtype.element_ty
    kv_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_KEYS, D], dtype)
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_KEYS, D], kv_layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_KEYS, D], kv_layout)
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
    ring = Ring(k_tiles, v_tiles, k_full, k_empty, v_full, v_empty)
    task = Queries(
        q,
        out,
        query_rows,
        tail_out,
        tail_lse,
        stride_q[2],
        stride_out[2],
        tile * (64 * CONSUMERS),
        queries,
        n_listed,
        scale,
        q_tiles,
    )
    if GATHERS:
        slot_rows = gl.allocate_shared_memory(
            gl.int32, [SLOTS, BLOCK_KEYS], gl.SwizzledSharedLayout(1, 1, 1, [0])
        )
        slot_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
        slot_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(SLOTS):
            mbarrier.init(slot_full.index(i), count=2 * CONSUMERS)
            mbarrier.init(slot_empty.index(i), count=32 * GATHERERS)
        slots = Slots(slot_rows, slot_full, slot_empty)
        rows = Rows(k, v, stride_k[2], stride_v[2], n_listed)
        bits += b * stride_bits_b + h * stride_bits_h + tile.to(gl.int64) * n_bytes
        if valid is not None:
            valid += b * stride_valid
        source = Bits(bits, valid, n_bytes, keys)
    else:
        boxes = Boxes(
            Kinds(k_flat, k_wide, k_deep),
            Kinds(v_flat, v_wide, v_deep),
            h.to(gl.int32),
            lists + listed_at * stride_list,
            n_listed,
        )
    if GATHERS and CONSUMERS == 1:
        gl.warp_specialize(
            [
                (consume, (task, ring, 0, HAS_TAIL, True)),
                (gather, (rows, slots, ring, GATHERERS)),
                (enlist, (key_rows, n_listed, source, slots, 0, 2, SLICE_KEYS)),
                (enlist, (key_rows, n_listed, source, slots, 1, 2, SLICE_KEYS)),
            ],
            [GATHERERS, 1, 1],
            [REGISTERS[1], REGISTERS[2], REGISTERS[2]],
        )
    elif GATHERS:
        gl.warp_specialize(
            [
                (consume, (task, ring, 0, HAS_TAIL, True)),
                (consume, (task, ring, 1, HAS_TAIL, True)),
                (gather, (rows, slots, ring, GATHERERS)),
                (enlist, (key_rows, n_listed, source, slots, 0, 4, SLICE_KEYS)),
                (enlist, (key_rows, n_listed, source, slots, 1, 4, SLICE_KEYS)),
                (enlist, (key_rows, n_listed, source, slots, 2, 4, SLICE_KEYS)),
                (enlist, (key_rows, n_listed, source, slots, 3, 4, SLICE_KEYS)),
            ],
            [4, GATHERERS, 1, 1, 1, 1],
            [REGISTERS[0], REGISTERS[1], REGISTERS[2], REGISTERS[2], REGISTERS[2], REGISTERS[2]],
        )
    elif CONSUMERS == 1:
        gl.warp_specialize(
            [
                (consume, (task, ring, 0, HAS_TAIL, False)),
                (fetch, (boxes, ring, 0)),
                (fetch, (boxes, ring, 1)),
                (fetch, (boxes, ring, 2)),
                (fetch, (boxes, ring, 3)),
            ],
            [1, 1, 1, 1],
            [REGISTERS[1], REGISTERS[1], REGISTERS[1], REGISTERS[1]],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (task, ring, 0, HAS_TAIL, False)),
                (consume, (task, ring, 1, HAS_TAIL, False)),
                (fetch, (boxes, ring, 0)),
                (fetch, (boxes, ring, 1)),
                (fetch, (boxes, ring, 2)),
                (fetch, (boxes, ring, 3)),
            ],
            [4, 1, 1, 1, 1],
            [REGISTERS[0], REGISTERS[1], REGISTERS[1], REGISTERS[1], REGISTERS[1]],
        )


def attend(call: Call, plan: SparsePlan, tail: Tail | None, out: torch.Tensor) -> None:
    """Write softmax over the plan's keys, and the tail if there is one, to out."""
    q, k, v = map(needed, call.tensors)
    (batch, heads, _, dim), (*_, tiles, n_bytes), queries = q.shape, plan.bits.shape, plan.queries
    q, scale = scaled(q, plan.softmax_scale(dim))
    tail_out, tail_lse = scaled_tail(tail)
    tokens, stride_queries = execution_rows(plan, batch, heads)
    launch = TABLE[dim, plan.tile_rows]
    boxes = boxes_for(call)
    if boxes is None:
        counts, rows = Counts(plan, batch, heads), key_rows(plan.geometry)
        bits, bit_strides, registers = (counts.bits, counts.valid), counts.strides, launch.registers
        launches = [((None,) * 6, None, counts.listed, 0, 0, batch * heads)]
    else:
        rows, bits, bit_strides, registers = None, (None, None), (0, 0, 0), BOX_REGISTERS
        launches = _boxed(k, v, plan, boxes)
    for described, lists, listed, stride_list, first, launch_heads in launches:
        launch_kernel(
            hopper_kernel,
            (tiles, launch_heads),
            q,
            k,
            v,
            *described,
            out,
            lists,
            *bits,
            listed,
            tokens,
            rows,
            tail_out,
            tail_lse,
            q.stride()[:3],
            k.stride()[:3],
            v.stride()[:3],
            out.stride()[:3],
            stride_queries,
            stride_list,
            *bit_strides,
            heads,
            first,
            queries,
            plan.keys,
            tiles,
            -(-queries // CELL),
            n_bytes,
            scale,
            CONSUMERS=plan.tile_rows // 64,
            BLOCK_KEYS=launch.block_keys,
            SLICE_KEYS=plan.tile_keys if boxes is None else None,
            D=dim,
            STAGES=launch.stages,
            GATHERERS=launch.gatherers,
            REGISTERS=registers,
            HAS_TAIL=tail is not None,
            GATHERS=boxes is None,
            num_warps=4,
            maxnreg=launch.max_registers,
        )


def _boxed(k, v, plan: SparsePlan, boxes: torch.Tensor):
    """Of each launch: descriptors, lists of boxes, their lengths and stride, first head, number of heads."""
    batch, heads = k.shape[:2]
    lists, grid = Lists(plan, batch, heads, boxes), plan.geometry.grid
    for b, first, launch_heads in lists.launches():
        described = (*descriptors(k[b], grid), *descriptors(v[b], grid))
        yield described, lists.lists, lists.listed, lists.stride, b * heads + first, launch_heads
