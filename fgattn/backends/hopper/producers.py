"""Producers of the Hopper attention kernel: warps that bring rows of k and v into a ring, in Gluon.

There are two ways. `fetch` has TMA copy octets, 8 keys that lie in memory as a box (boxes.py): each of
four warps fetches a quarter of each buffer. `gather` copies single rows with cp.async, those that
listers found (lister.py).

Of the steps in which a tile's keys are taken, the one that is not full comes first; `fetch` takes it from the
end of its list.
"""

from __future__ import annotations

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..shared.prepared import like, template
from .boxes import DEEP, OCTET, WIDE
from .lister import SLOTS
from .versions import as_boxes, copy_box, copy_rows

PRODUCERS = gl.constexpr(4)  # warps that fetch
HALF = gl.constexpr(64)  # columns of a box: 128 bytes, the widest that TMA swizzles
IS_WIDE, IS_DEEP, ROWS = gl.constexpr(WIDE), gl.constexpr(DEEP), gl.constexpr(OCTET)
TYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


@gluon.jit
def gather(task, slots, ring, WARPS: gl.constexpr):
    """Producer: copies the rows of each slot with cp.async; the copies of each thread arrive by themselves.

    task: records.Rows; slots: records.Slots; ring: records.Ring; WARPS: of this producer.
    """
    STAGES: gl.constexpr = ring.k_tiles.shape[0]
    BLOCK_KEYS: gl.constexpr = ring.k_tiles.shape[1]
    D: gl.constexpr = ring.k_tiles.shape[2]
    listed = task.listed
    # A thread has consecutive rows, which are wide loads; eight threads copy 64 elements of one.
    layout: gl.constexpr = gl.BlockedLayout([BLOCK_KEYS // (4 * WARPS), 8], [4, 8], [WARPS, 1], [1, 0])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    dim = gl.arange(0, D, gl.SliceLayout(0, layout))
    steps = gl.cdiv(listed, BLOCK_KEYS)
    first = listed - (steps - 1) * BLOCK_KEYS  # keys of the first step
    place = gl.arange(0, BLOCK_KEYS, rows)
    for i in range(steps):
        stage = i % STAGES
        phase = ((i // STAGES) & 1) ^ 1
        mbarrier.wait(slots.full.index(i % SLOTS), (i // SLOTS) & 1)
        row = slots.rows.index(i % SLOTS).load(rows)
        kept = place < gl.where(i == 0, first, BLOCK_KEYS)  # rows that are not copied are zeros
        k_at = task.k + row.to(gl.int64)[:, None] * task.stride_k + dim[None, :]
        mbarrier.wait(ring.k_empty.index(stage), phase)
        copy_rows(ring.k_tiles.index(stage), k_at, mask=kept[:, None])
        async_copy.mbarrier_arrive(ring.k_full.index(stage), increment_count=False)
        async_copy.mbarrier_arrive(slots.empty.index(i % SLOTS), increment_count=False)
        v_at = task.v + row.to(gl.int64)[:, None] * task.stride_v + dim[None, :]
        mbarrier.wait(ring.v_empty.index(stage), phase)
        copy_rows(ring.v_tiles.index(stage), v_at, mask=kept[:, None])
        async_copy.mbarrier_arrive(ring.v_full.index(stage), increment_count=False)
    async_copy.wait_group(0)


@gluon.jit
def _boxes(unit_list, step, PART: gl.constexpr, BLOCK_KEYS: gl.constexpr):
    """The list's boxes of the PART-th quarter of a step, a tuple of int32; -1 beyond its end."""
    MINE: gl.constexpr = BLOCK_KEYS // ROWS // PRODUCERS
    boxes = ()
    for i in gl.static_range(MINE):
        boxes += (gl.load(unit_list + (step * PRODUCERS + PART) * MINE + i),)
    return boxes


@gluon.jit
def _copy(
    kinds, boxes, head, tiles, full, stage, PART: gl.constexpr, BLOCK_KEYS: gl.constexpr, D: gl.constexpr
):
    """Has TMA copy a quarter of a tile, octet by octet, in halves of 64 columns.

    kinds: records.Kinds; boxes: from _boxes; tiles: of a ring; full: the barrier of their stage.
    """
    OCTETS: gl.constexpr = BLOCK_KEYS // ROWS
    MINE: gl.constexpr = OCTETS // PRODUCERS
    tiles = as_boxes(tiles, [tiles.shape[0] * OCTETS * (D // HALF), 1, 1, 2, ROWS // 2, HALF], kinds.flat)
    mbarrier.expect(full, MINE * ROWS * D * 2)
    for i in gl.static_range(MINE):
        kind = kinds.flat
        if (boxes[i] & 3) == IS_WIDE:
            kind = kinds.wide
        if (boxes[i] & 3) == IS_DEEP:
            kind = kinds.deep
        token = gl.where(boxes[i] < 0, 1 << 30, boxes[i] >> 2)  # outside: zeros
        for half in gl.static_range(D // HALF):
            at = (stage * (D // HALF) + half) * OCTETS + PART * MINE + i
            copy_box(kind, [head, token, 0, 0, half * HALF], full, tiles.index(at))


@gluon.jit
def fetch(task, ring, PART: gl.constexpr):
    """Producer of the PART-th quarter of every tile: the boxes of a step are looked up a step ahead.

    task: records.Boxes; ring: records.Ring.
    """
    STAGES: gl.constexpr = ring.k_tiles.shape[0]
    BLOCK_KEYS: gl.constexpr = ring.k_tiles.shape[1]
    D: gl.constexpr = ring.k_tiles.shape[2]
    steps = gl.cdiv(task.listed, BLOCK_KEYS)
    boxes = _boxes(task.units, gl.maximum(steps - 1, 0), PART, BLOCK_KEYS)
    for i in range(steps):
        stage = i % STAGES
        phase = ((i // STAGES) & 1) ^ 1
        following = _boxes(task.units, i, PART, BLOCK_KEYS)
        mbarrier.wait(ring.k_empty.index(stage), phase)
        _copy(task.k, boxes, task.head, ring.k_tiles, ring.k_full.index(stage), stage, PART, BLOCK_KEYS, D)
        mbarrier.wait(ring.v_empty.index(stage), phase)
        _copy(task.v, boxes, task.head, ring.v_tiles, ring.v_full.index(stage), stage, PART, BLOCK_KEYS, D)
        boxes = following


def descriptors(x: torch.Tensor, grid: tuple[int, int, int]) -> list[TensorDescriptor]:
    """Boxes of 2 x 4 tokens by 64 columns of x [H, L, D]: FLAT, WIDE and DEEP (see boxes.py).

    Each is a view of x whose tokens overlap: [H, L, 2, 4, D], the third dimension being the next four
    tokens, those below, or those of the next frame.
    """
    return [like(one, x) for one in _templates(x.shape, x.stride(), x.dtype, grid)]


@functools.lru_cache(maxsize=32)
def _templates(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, grid: tuple[int, int, int]
) -> list[TensorDescriptor]:
    (heads, length, dim), (stride_h, stride, _) = shape, strides
    if heads == 1:
        stride_h = OCTET
    block = [1, 1, 2, OCTET // 2, HALF.value]
    layout = gl.NVMMASharedLayout.get_default_for(block, TYPES[dtype])
    return [
        template(
            TensorDescriptor(
                torch.empty(0, dtype=dtype),
                [heads, length, 2, OCTET // 2, dim],
                [stride_h, stride, step * stride, stride, 1],
                block,
                layout,
            )
        )
        for step in (OCTET // 2, max(1, grid[2]), max(1, grid[1] * grid[2]))
    ]
