"""Listers of the Hopper attention kernel: warps that turn a tile's bits into rows of k and v, in Gluon.

A lister reads the bits of a window of 1024 keys at a time, 32 in each of its lanes. A sum over the lanes
finds the lane that has the n-th kept key, a count of the bits in it finds the key.

The rows of a step are written to a slot of shared memory. There are SLOTS of them, so that listers work
ahead of the warps that copy the rows. Several listers share the work: each finds its own part of every slot.

Of the steps in which a tile's keys are taken, the one that is not full comes first. So the number of keys
that a tile keeps must be known before the attention kernel starts: `count_kernel` counts them.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ...plan import SparsePlan
from ..shared.launch import COUNTS, shared_stride
from ..shared.prepared import launch_kernel
from .records import Bits
from .versions import barrier

WINDOW = gl.constexpr(1024)  # keys
LANES = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))
SLOTS = gl.constexpr(4)  # steps
BIT_STRIDES = ["stride_bits_b", "stride_bits_h", "stride_valid"]  # not to compile variants for


@gluon.jit
def _ones(x):
    """Number of bits set, int32."""
    return gl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _apart(x, HALF: gl.constexpr, SLICE_KEYS: gl.constexpr):
    """Moves the upper half of each stretch of 2 * HALF bits up, towards one bit for every SLICE_KEYS places.

    From bit i of a stretch to bit i + HALF * (SLICE_KEYS - 1). HALF is a power of two, or 0: nothing to do.
    """
    if HALF > 0:
        ONES: gl.constexpr = ((1 << 32) - 1) // ((1 << HALF * SLICE_KEYS) - 1) * ((1 << HALF) - 1)
        x = (x | (x << (HALF * (SLICE_KEYS - 1)))) & ONES
    return x


@gluon.jit
def _load(source, word, SLICE_KEYS: gl.constexpr):
    """The bytes that hold the bits of the keys 32 * word to 32 * word + 31; not yet waited for.

    source: records.Bits; word: int32 [n]; SLICE_KEYS: keys of a slice. Returns one to four uint8 [n].
    """
    first = word // max(1, SLICE_KEYS // 32) * max(1, 32 // SLICE_KEYS) // 8
    loaded = ()
    for i in gl.static_range(max(1, 32 // SLICE_KEYS // 8)):
        loaded += (gl.load(source.bits + first + i, mask=first + i < source.n_bytes, other=0),)
    return loaded


@gluon.jit
def _kept(source, loaded, word, SLICE_KEYS: gl.constexpr):
    """Which of the keys 32 * word to 32 * word + 31 are kept, as bits of uint32, from what _load loaded."""
    EACH: gl.constexpr = max(1, 32 // SLICE_KEYS)  # slices of a word
    kept = loaded[0].to(gl.uint32)
    for i in gl.static_range(1, EACH // 8):
        kept |= loaded[i].to(gl.uint32) << (8 * i)
    if EACH < 8:
        first = word // max(1, SLICE_KEYS // 32) * EACH
        kept = (kept >> (first % 8).to(gl.uint32)) & ((1 << EACH) - 1)
    if SLICE_KEYS > 1:  # bit s moves to bit s * SLICE_KEYS, and is repeated
        kept = _apart(_apart(kept, EACH // 2, SLICE_KEYS), EACH // 4, SLICE_KEYS)
        kept = _apart(_apart(kept, EACH // 8, SLICE_KEYS), EACH // 16, SLICE_KEYS)
        kept *= (1 << min(SLICE_KEYS, 32)) - 1
    rest = gl.minimum(gl.maximum(source.keys - word * 32, 0), 32)
    exists = ((1 << rest.to(gl.uint64)) - 1).to(gl.uint32)
    if source.valid is not None:
        exists = gl.load(source.valid + word, mask=rest > 0, other=0).to(gl.uint32)
    return kept & exists


@gluon.jit
def _find(kept, up_to, rank):
    """The key of a window that has `rank` kept ones before it, int32 like rank; by bisection.

    kept: uint32 [32], bits of the window's keys; up_to: int32 [32], kept keys up to the end of each lane.
    """
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
    key_rows, listed, source, slots, PART: gl.constexpr, PARTS: gl.constexpr, SLICE_KEYS: gl.constexpr
):
    """Lister of the PART-th of PARTS parts of every step: writes rows of k and v to the slots.

    key_rows: int32 [keys], row at each position; listed: kept keys; source: records.Bits; slots:
    records.Slots; SLICE_KEYS: keys of a slice.
    """
    BLOCK_KEYS: gl.constexpr = slots.rows.shape[1]
    MINE: gl.constexpr = BLOCK_KEYS // PARTS
    keys = source.keys
    word = gl.arange(0, 32, LANES)
    place = gl.arange(0, MINE, LANES)
    steps = gl.cdiv(listed, BLOCK_KEYS)
    first = listed - (steps - 1) * BLOCK_KEYS  # keys of the first step
    kept = gl.full([32], 0, gl.uint32, LANES)
    up_to = kept.to(gl.int32)
    loaded = _load(source, word, SLICE_KEYS)
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
                kept = _kept(source, loaded, window * 32 + word, SLICE_KEYS)
                loaded = _load(source, (window + 1) * 32 + word, SLICE_KEYS)
                up_to = gl.associative_scan(_ones(kept), 0, _add) + total
                total = gl.max(up_to, 0)
            if total > found:
                key = gl.where(place >= found, window * WINDOW + _find(kept, up_to, place), key)
                found = total
        row = gl.load(key_rows + key, mask=key < keys, other=0)
        passed = gl.where(i == 0, first, BLOCK_KEYS)
        up_to -= passed
        total -= passed
        mbarrier.wait(slots.empty.index(slot), ((i // SLOTS) & 1) ^ 1)
        slots.rows.index(slot).slice(PART * MINE, MINE).store(row)
        barrier()
        mbarrier.arrive(slots.full.index(slot), count=1)


@gluon.jit(do_not_specialize=[*BIT_STRIDES, *COUNTS])
def count_kernel(
    bits,
    valid,
    listed,
    stride_bits_b,
    stride_bits_h,
    stride_valid,
    heads,
    tiles,
    keys,
    n_bytes,
    SLICE_KEYS: gl.constexpr,
):
    """Number of keys that each tile keeps.

    Launched by `Counts`, before the attention kernel that lists them. Grid: (tiles, B * H).

    Reads
        bits: uint8 [B or 1, H or 1, tiles, n_bytes], a bit for each slice of SLICE_KEYS keys.
        valid: None or int32 [B or 1, keys / 32], bits of the keys that exist.
    Writes
        listed: int32 [B * H, tiles].
    """
    BITS: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    tile = gl.program_id(0)
    head = gl.program_id(1)
    b = (head // heads).to(gl.int64)
    h = (head % heads).to(gl.int64)
    head = head.to(gl.int64)
    bits += b * stride_bits_b + h * stride_bits_h + tile.to(gl.int64) * n_bytes
    if valid is not None:
        valid += b * stride_valid
    source = Bits(bits, valid, n_bytes, keys)
    ones = gl.full([1024], 0, gl.int32, BITS)
    for begin in range(0, gl.cdiv(keys, 32), 1024):
        word = begin + gl.arange(0, 1024, BITS)
        ones += _ones(_kept(source, _load(source, word, SLICE_KEYS), word, SLICE_KEYS))
    gl.store(listed + head * tiles + tile, gl.sum(ones, 0))


class Counts:
    """What listers need of a plan: bits, bits of the keys that exist, strides of both, keys of each tile."""

    def __init__(self, plan: SparsePlan, batch: int, heads: int):
        bits = self.bits = plan.bits
        (*_, tiles, n_bytes), device = bits.shape, bits.device
        self.valid = None
        if plan.key_valid is not None:
            words = torch.nn.functional.pad(plan.key_valid, (0, -plan.keys % 32)).unflatten(1, (-1, 32))
            self.valid = (words << torch.arange(32, device=device)).sum(2).to(torch.int32)
        self.strides = shared_stride(bits, 0), shared_stride(bits, 1), shared_stride(self.valid)
        self.listed = torch.empty(batch * heads, tiles, dtype=torch.int32, device=device)
        launch_kernel(
            count_kernel,
            (tiles, batch * heads),
            bits,
            self.valid,
            self.listed,
            *self.strides,
            heads,
            tiles,
            plan.keys,
            n_bytes,
            SLICE_KEYS=plan.tile_keys,
            num_warps=4,
        )
