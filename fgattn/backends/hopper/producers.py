"""Producers of the Hopper kernel: bring the listed rows of k and v into rings of shared tiles, in Gluon.

`fetch` has the copy engine (TMA) bring octets that lie in memory as boxes (boxes.octet_boxes); four
warps fetch a quarter of each tile. `gather` copies single rows with cp.async; hopper_lister says which.
The keys that do not fill a step, the last ones, come first.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .boxes import DEEP, OCTET, WIDE
from .lister import SLOTS

PRODUCERS = gl.constexpr(4)  # warps that fetch
HALF = gl.constexpr(64)  # columns of a box: 128 bytes, the widest that the copy engine swizzles
IS_WIDE, IS_DEEP, ROWS = gl.constexpr(WIDE), gl.constexpr(DEEP), gl.constexpr(OCTET)
TYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


@gluon.jit
def gather(
    task, lists, ring, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):
    """Producer: copy the rows of each slot with cp.async; the copies of each thread arrive by themselves."""
    k, v, stride_kl, stride_vl, listed = task
    slots, slot_full, slot_empty = lists
    k_tiles, v_tiles, k_full, k_empty, v_full, v_empty = ring
    # A thread has consecutive rows, which are wide loads; eight threads copy 64 elements of one.
    layout: gl.constexpr = gl.BlockedLayout([BLOCK_N // (4 * WARPS), 8], [4, 8], [WARPS, 1], [1, 0])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    dim = gl.arange(0, D, gl.SliceLayout(0, layout))
    steps = gl.cdiv(listed, BLOCK_N)
    exists = (steps - 1) * BLOCK_N + gl.arange(0, BLOCK_N, rows) < listed
    for i in range(steps):
        stage = i % STAGES
        phase = ((i // STAGES) & 1) ^ 1
        mbarrier.wait(slot_full.index(i % SLOTS), (i // SLOTS) & 1)
        row = slots.index(i % SLOTS).load(rows)
        kept = exists | (i > 0)  # rows that are not copied are zeros
        k_at = k + row.to(gl.int64)[:, None] * stride_kl + dim[None, :]
        mbarrier.wait(k_empty.index(stage), phase)
        async_copy.async_copy_global_to_shared(k_tiles.index(stage), k_at, mask=kept[:, None])
        async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)
        async_copy.mbarrier_arrive(slot_empty.index(i % SLOTS), increment_count=False)
        v_at = v + row.to(gl.int64)[:, None] * stride_vl + dim[None, :]
        mbarrier.wait(v_empty.index(stage), phase)
        async_copy.async_copy_global_to_shared(v_tiles.index(stage), v_at, mask=kept[:, None])
        async_copy.mbarrier_arrive(v_full.index(stage), increment_count=False)
    async_copy.wait_group(0)


@gluon.jit
def _boxes(unit_list, step, PART: gl.constexpr, BLOCK_N: gl.constexpr):
    """The list's boxes of a quarter of a step; -1 beyond its end."""
    MINE: gl.constexpr = BLOCK_N // ROWS // PRODUCERS
    boxes = ()
    for i in gl.static_range(MINE):
        boxes += (gl.load(unit_list + (step * PRODUCERS + PART) * MINE + i),)
    return boxes


@gluon.jit
def _copy(
    kinds, boxes, head, tiles, full, stage, PART: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr,
):
    """Have a quarter of a tile copied, octet by octet, in halves of columns."""
    OCTETS: gl.constexpr = BLOCK_N // ROWS
    MINE: gl.constexpr = OCTETS // PRODUCERS
    flat, wide, deep = kinds
    tiles = tiles._reinterpret(
        tiles.dtype, [tiles.shape[0] * OCTETS * (D // HALF), 1, 1, 2, ROWS // 2, HALF], flat.layout)
    mbarrier.expect(full, MINE * ROWS * D * 2)
    for i in gl.static_range(MINE):
        kind = flat
        if (boxes[i] & 3) == IS_WIDE:
            kind = wide
        if (boxes[i] & 3) == IS_DEEP:
            kind = deep
        token = gl.where(boxes[i] < 0, 1 << 30, boxes[i] >> 2)  # outside: zeros
        for half in gl.static_range(D // HALF):
            at = (stage * (D // HALF) + half) * OCTETS + PART * MINE + i
            tma.async_copy_global_to_shared(kind, [head, token, 0, 0, half * HALF], full, tiles.index(at))


@gluon.jit
def fetch(
    task, ring, PART: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):
    """Producer of a quarter of every tile: the boxes of the next step are looked up a step ahead."""
    k_kinds, v_kinds, head, unit_list, listed = task
    k_tiles, v_tiles, k_full, k_empty, v_full, v_empty = ring
    steps = gl.cdiv(listed, BLOCK_N)
    boxes = _boxes(unit_list, gl.maximum(steps - 1, 0), PART, BLOCK_N)
    for i in range(steps):
        stage = i % STAGES
        phase = ((i // STAGES) & 1) ^ 1
        following = _boxes(unit_list, i, PART, BLOCK_N)
        mbarrier.wait(k_empty.index(stage), phase)
        _copy(k_kinds, boxes, head, k_tiles, k_full.index(stage), stage, PART, BLOCK_N, D)
        mbarrier.wait(v_empty.index(stage), phase)
        _copy(v_kinds, boxes, head, v_tiles, v_full.index(stage), stage, PART, BLOCK_N, D)
        boxes = following


def descriptors(x: torch.Tensor, grid: tuple[int, int, int]) -> list[TensorDescriptor]:
    """Boxes of 2 x 4 tokens by 64 columns of x [H, L, D]: FLAT, WIDE and DEEP (see boxes.octet_boxes).

    Each is a view of x whose tokens overlap: [H, L, 2, 4, D], the third dimension being the next four
    tokens, those below, or those of the next frame.
    """
    (heads, length, dim), stride = x.shape, x.stride(1)
    stride_h = x.stride(0) if heads > 1 else OCTET
    block = [1, 1, 2, OCTET // 2, HALF.value]
    layout = gl.NVMMASharedLayout.get_default_for(block, TYPES[x.dtype])
    return [TensorDescriptor(x, [heads, length, 2, OCTET // 2, dim],
                             [stride_h, stride, step * stride, stride, 1], block, layout)
            for step in (OCTET // 2, max(1, grid[2]), max(1, grid[1] * grid[2]))]
