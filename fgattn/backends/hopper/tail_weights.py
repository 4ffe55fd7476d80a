"""Producer of the Hopper tail: means of cells, and weights from the plan's bits, in Gluon.

The weight of a key cell, for a tile, is log2 of the number of its keys that the tile skips, -inf for none. As
fp16 it is off by 0.07 % at most, and not at all for powers of two.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .versions import copy_box

CONSUMERS = gl.constexpr(3)
STEP = gl.constexpr(64)  # key cells


@gluon.jit
def _log2_of_ones(x):
    """log2 of the number of bits set, fp32; -inf for none."""
    return gl.inline_asm_elementwise(
        "{.reg .b32 n; .reg .f32 f; popc.b32 n, $1; cvt.rn.f32.u32 f, n; lg2.approx.ftz.f32 $0, f;}",
        "=f,r",
        [x],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _bytes(tile_bits, at, n_bytes):
    """The bytes at `at` of a tile's bits, int32; 0 beyond their end."""
    return gl.load(tile_bits + at, mask=at < n_bytes, other=0).to(gl.int32)


@gluon.jit
def _weights(tile_bits, there, first, place, n_bytes, N: gl.constexpr):
    """Weights of a step's key cells for some tiles, fp32 [tiles, strips, places]. N: keys of a slice.

    Cells are counted in strips of neighbours, the cells that one thread has. tile_bits: pointers to the bits
    of each tile, [tiles, 1, 1]; first: the first cell of each strip, [1, strips, 1]; place: a cell's place in
    its strip, [1, 1, places]; there: bits of the keys of each cell that exist, [1, strips, places].
    """
    if N >= 16:  # the slices of a strip lie in one byte
        EACH: gl.constexpr = N // 16  # cells of a slice
        kept = (_bytes(tile_bits, first // (8 * EACH), n_bytes) >> ((first // EACH) % 8 + place // EACH)) & 1
        weights = gl.where(kept == 0, _log2_of_ones(there), float("-inf"))
    elif N == 1:  # a cell has two bytes
        executed = _bytes(tile_bits, (first + place) * 2, n_bytes)
        executed |= _bytes(tile_bits, (first + place) * 2 + 1, n_bytes) << 8
        weights = _log2_of_ones(there & ~executed)
    else:
        parts: gl.constexpr = 16 // N  # bits, which are moved apart, by halves, and repeated
        octet = _bytes(tile_bits, (first + place) // (8 // parts), n_bytes)
        x = (octet >> (first + place) % (8 // parts) * parts) & ((1 << parts) - 1)
        x = (x | x << (8 - parts // 2)) & (((1 << parts // 2) - 1) * 0x0101)
        if parts >= 4:
            x = (x | x << (4 - parts // 4)) & (((1 << parts // 4) - 1) * 0x1111)
        if parts == 8:
            x = (x | x << 1) & 0x5555
        weights = _log2_of_ones(there & ~(x * ((1 << N) - 1)))
    return weights


@gluon.jit
def produce(task, ring, TILE_CELLS: gl.constexpr, SLICE_KEYS: gl.constexpr):
    """Producer: has TMA copy the means of each step's key cells to the ring, and adds their weights.

    task: tail.Skipped; ring: tail.Ring.
    """
    STAGES: gl.constexpr = ring.m_tiles.shape[0]
    D: gl.constexpr = ring.m_tiles.shape[2]
    full, key_cells, n_bytes = ring.full, task.key_cells, task.n_bytes
    T: gl.constexpr = 64 // TILE_CELLS  # tiles of a consumer
    STRIP: gl.constexpr = T // 2  # key cells of a tile that a thread has
    L: gl.constexpr = gl.BlockedLayout([1, 1, STRIP], [T // 4, 128 // T, 1], [4, 1, 1], [2, 1, 0])
    row = gl.arange(0, T, gl.SliceLayout(1, gl.SliceLayout(2, L)))[:, None][:, :, None]
    strip = gl.arange(0, STEP // STRIP, gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :][:, :, None]
    place = gl.arange(0, STRIP, gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, :][:, None, :]
    for i in range(gl.cdiv(key_cells, STEP)):
        stage = i % STAGES
        mbarrier.wait(ring.empty.index(stage), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), 2 * STEP * D * 2)  # two tiles of 16-bit elements
        at = [task.head, i * STEP, 0]
        copy_box(task.mean, at, full.index(stage), ring.m_tiles.index(stage))
        copy_box(task.value, at, full.index(stage), ring.v_tiles.index(stage))
        first = i * STEP + strip * STRIP
        key_cell = first + place
        if task.valid is None:
            there = (1 << gl.minimum(gl.maximum(task.keys - key_cell * 16, 0), 16)) - 1
        else:
            there = gl.load(task.valid + key_cell, mask=key_cell < key_cells, other=0)
        for j in gl.static_range(CONSUMERS):
            tile = gl.minimum(task.tile + j * T + row, task.tiles - 1)
            tile_bits = task.bits + tile.to(gl.int64) * n_bytes
            weight = _weights(tile_bits, there, first, place, n_bytes, SLICE_KEYS)
            ring.weights.index(stage * CONSUMERS + j).store(weight.to(gl.float16).reshape([T, STEP]))
        mbarrier.arrive(full.index(stage), count=1)
