"""Listers of the Hopper kernel: warps that turn the plan's bits into rows of k and v, in Gluon.

A lane holds the bits of 32 keys, a warp those of a window of 1024; sums of ones up to each lane say in
which lane, and at which bit of it, the n-th kept key is. The rows of a step go to a slot of shared memory,
SLOTS steps ahead of the warps that copy them; each lister finds its part of every slot. The first step is
the one that is not full. How many keys a tile keeps must be known before: `count_kernel`.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ...plan import SparsePlan
from ..shared.launch import COUNTS, shared_stride

WINDOW = gl.constexpr(1024)  # keys
LANES = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))
SLOTS = gl.constexpr(4)
STRIDES = ["stride_bits_b", "stride_bits_h", "stride_valid"]


@gluon.jit
def _ones(x):
    """Number of bits set, int32."""
    return gl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _apart(x, HALF: gl.constexpr, SPLIT: gl.constexpr):
    """Moves the upper halves of runs of 2 * HALF bits up, to where they stand in the end."""
    if HALF > 0:
        ONES: gl.constexpr = ((1 << 32) - 1) // ((1 << HALF * SPLIT) - 1) * ((1 << HALF) - 1)
        x = (x | (x << (HALF * (SPLIT - 1)))) & ONES
    return x


@gluon.jit
def _load(source, word, SPLIT: gl.constexpr):
    """The bytes that hold the bits of keys 32 * word, ...; not yet waited for. SPLIT: keys of a slice."""
    bits, _, n_bytes, _ = source
    first = word // max(1, SPLIT // 32) * max(1, 32 // SPLIT) // 8
    loaded = ()
    for i in gl.static_range(max(1, 32 // SPLIT // 8)):
        loaded += (gl.load(bits + first + i, mask=first + i < n_bytes, other=0),)
    return loaded


@gluon.jit
def _kept(source, loaded, word, SPLIT: gl.constexpr):
    """Which of the keys 32 * word, ... are kept, as bits, uint32."""
    _, valid, _, keys = source
    EACH: gl.constexpr = max(1, 32 // SPLIT)  # slices of a word
    kept = loaded[0].to(gl.uint32)
    for i in gl.static_range(1, EACH // 8):
        kept |= loaded[i].to(gl.uint32) << (8 * i)
    if EACH < 8:
        first = word // max(1, SPLIT // 32) * EACH
        kept = (kept >> (first % 8).to(gl.uint32)) & ((1 << EACH) - 1)
    if SPLIT > 1:  # bit s moves to bit s * SPLIT, and is repeated
        kept = _apart(_apart(kept, EACH // 2, SPLIT), EACH // 4, SPLIT)
        kept = _apart(_apart(kept, EACH // 8, SPLIT), EACH // 16, SPLIT) * ((1 << min(SPLIT, 32)) - 1)
    rest = gl.minimum(gl.maximum(keys - word * 32, 0), 32)
    exists = ((1 << rest.to(gl.uint64)) - 1).to(gl.uint32)
    if valid is not None:
        exists = gl.load(valid + word, mask=rest > 0, other=0).to(gl.uint32)
    return kept & exists


@gluon.jit
def _find(kept, up_to, rank):
    """In a window: the key that has `rank` kept ones before it. up_to: kept keys up to the end of a lane."""
    lane = rank * 0
    for i in gl.static_range(5):
        is_after = gl.gather(up_to, lane + ((16 >> i) - 1), 0) <= rank
        lane = gl.where(is_after, lane + (16 >> i), lane)
    rank -= gl.gather(up_to - _ones(kept), lane, 0)
    kept = gl.gather(kept, lane, 0)
    key = lane * 32
    for i in gl.static_range(5):
        below = _ones(kept & ((1 << (16 >> i)) - 1))
        is_above = below <= rank
        rank = gl.where(is_above, rank - below, rank)
        kept = gl.where(is_above, kept >> (16 >> i), kept)
        key = gl.where(is_above, key + (16 >> i), key)
    return key


@gluon.jit
def enlist(
    task, source, lists, PART: gl.constexpr, PARTS: gl.constexpr, BLOCK_N: gl.constexpr, SPLIT: gl.constexpr,
):
    """Lister of a part of every step: rows of k and v."""
    key_rows, listed = task
    slots, slot_full, slot_empty = lists
    keys = source[3]
    MINE: gl.constexpr = BLOCK_N // PARTS
    word = gl.arange(0, 32, LANES)
    place = gl.arange(0, MINE, LANES)
    steps = gl.cdiv(listed, BLOCK_N)
    first = listed - (steps - 1) * BLOCK_N  # keys of the first step
    kept = gl.full([32], 0, gl.uint32, LANES)
    up_to = kept.to(gl.int32)
    loaded = _load(source, word, SPLIT)
    window = listed * 0 - 1
    total = window * 0 - PART * MINE  # kept keys up to the window's end, from the first one looked for
    for i in range(steps):
        slot = i % SLOTS
        number = gl.where(i == 0, gl.minimum(first - PART * MINE, MINE), MINE)
        key = place * 0
        found = window * 0
        while (found < number) & (window * WINDOW < keys):
            if total <= found:
                window += 1
                kept = _kept(source, loaded, window * 32 + word, SPLIT)
                loaded = _load(source, (window + 1) * 32 + word, SPLIT)
                up_to = gl.associative_scan(_ones(kept), 0, _add) + total
                total = gl.max(up_to, 0)
            if total > found:
                key = gl.where(place >= found, window * WINDOW + _find(kept, up_to, place), key)
                found = total
        row = gl.load(key_rows + key, mask=key < keys, other=0)
        passed = gl.where(i == 0, first, BLOCK_N)
        up_to -= passed
        total -= passed
        mbarrier.wait(slot_empty.index(slot), ((i // SLOTS) & 1) ^ 1)
        slots.index(slot).slice(PART * MINE, MINE).store(row)
        gl.thread_barrier()
        mbarrier.arrive(slot_full.index(slot), count=1)


@gluon.jit(do_not_specialize=[*STRIDES, *COUNTS])
def count_kernel(
    bits, valid, listed, stride_bits_b, stride_bits_h, stride_valid, heads, tiles, keys, n_bytes,
    SPLIT: gl.constexpr,
):
    """Number of keys that a tile keeps."""
    BITS: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    tile = gl.program_id(0)
    head = gl.program_id(1).to(gl.int64)
    bits += (head // heads) * stride_bits_b + (head % heads) * stride_bits_h + tile.to(gl.int64) * n_bytes
    if valid is not None:
        valid += (head // heads) * stride_valid
    source = (bits, valid, n_bytes, keys)
    ones = gl.full([1024], 0, gl.int32, BITS)
    for begin in range(0, gl.cdiv(keys, 32), 1024):
        word = begin + gl.arange(0, 1024, BITS)
        ones += _ones(_kept(source, _load(source, word, SPLIT), word, SPLIT))
    gl.store(listed + head * tiles + tile, gl.sum(ones, 0))


class Counts:
    """What listers need: a plan's bits and their strides, bits of the keys that exist, keys of each tile."""

    def __init__(self, plan: SparsePlan, batch: int, heads: int):
        bits = self.bits = plan.bits
        (*_, tiles, n_bytes), device = bits.shape, bits.device
        self.valid = None
        if plan.key_valid is not None:
            words = torch.nn.functional.pad(plan.key_valid, (0, -plan.keys % 32)).unflatten(1, (-1, 32))
            self.valid = (words << torch.arange(32, device=device)).sum(2).to(torch.int32)
        self.strides = shared_stride(bits, 0), shared_stride(bits, 1), shared_stride(self.valid)
        self.listed = torch.empty(batch * heads, tiles, dtype=torch.int32, device=device)
        count_kernel[tiles, batch * heads](
            bits, self.valid, self.listed, *self.strides, heads, tiles, plan.keys, n_bytes,
            SPLIT=plan.tile_keys, num_warps=4)
