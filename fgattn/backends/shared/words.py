"""Words: comparisons of columns as bits of integers.

What joins runs of queries to tiles, and keys to slices, works on words: at a thirtieth of the cost.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

WORDS = {32: torch.uint8, 64: torch.int16, 128: torch.int32}  # by columns of a step: a fourth of them in each


@triton.jit
def share(length, BLOCK: tl.constexpr):
    """Where this program's share of the columns begins and ends; the second axis of programs shares them."""
    span = tl.cdiv(tl.cdiv(length, BLOCK), tl.num_programs(1)) * BLOCK
    begin = tl.minimum(tl.program_id(1) * span, length)
    return begin, tl.minimum(begin + span, length)


@triton.jit
def column_order(BLOCK: tl.constexpr):
    """What the columns of a product shall be, so that a thread holds all bits of its words.

    Of each eight columns two belong to one thread of four, in the layout that the matrix units write.
    """
    column = tl.arange(0, BLOCK)
    return column % 8 // 2 * (BLOCK // 4) + column // 8 * 2 + column % 2


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def joined(words, T: tl.constexpr, NUMBER: tl.constexpr):
    """[T * NUMBER, W] -> [T, W]: bits that one of NUMBER neighbours has."""
    return tl.reduce(tl.reshape(words, (T, NUMBER, words.shape[1])), 1, _or)


@triton.jit
def tile_words(flags, exists, T: tl.constexpr, TILE_RUNS: tl.constexpr):
    """Bool [runs, BLOCK] in `column_order` -> int32 [T, 4]: BLOCK / 4 bits each, set by a run of the tile."""
    RUNS: tl.constexpr = flags.shape[0]
    EIGHTS: tl.constexpr = flags.shape[1] // 8
    place = (2 * tl.arange(0, EIGHTS))[None, :, None, None] + tl.arange(0, 2)[None, None, None, :]
    bits = tl.where(tl.reshape(flags, (RUNS, EIGHTS, 4, 2)), 1 << place, 0)
    words = tl.where(exists[:, None], tl.sum(tl.sum(bits, 3), 1), 0)
    return joined(words, T, TILE_RUNS)


@triton.jit
def scores_of(keys, tile, queries, ROWS: tl.constexpr):
    """Scores in tiles of ROWS queries that keep so many keys, the last tile being short."""
    rows = tl.minimum(tl.maximum(queries - tile * ROWS, 0), ROWS)
    return tl.sum(keys.to(tl.int64) * rows, 0).to(tl.float64)


@triton.jit
def keys_of_cells(pair):
    """The lowest two bits, each for the 16 keys of its cell."""
    return (pair & 1) * 0xFFFF | -((pair >> 1) & 1) << 16


@triton.jit
def number_of_ones(x):
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def whole_slices(x, N: tl.constexpr):
    """All bits of each group of N, where one is set."""
    x = x.to(tl.uint32, bitcast=True)
    if N >= 2:
        x |= ((x & 0x55555555) << 1) | ((x >> 1) & 0x55555555)
    if N >= 4:
        x |= ((x & 0x33333333) << 2) | ((x >> 2) & 0x33333333)
    if N >= 8:
        x |= ((x & 0x0F0F0F0F) << 4) | ((x >> 4) & 0x0F0F0F0F)
    return x.to(tl.int32, bitcast=True)


@triton.jit
def every(x, N: tl.constexpr):
    """Every N-th bit, next to each other at the low end."""
    x = x.to(tl.uint32, bitcast=True)
    if N == 2:
        x &= 0x55555555
        x = (x | (x >> 1)) & 0x33333333
        x = (x | (x >> 2)) & 0x0F0F0F0F
        x = (x | (x >> 4)) & 0x00FF00FF
        x = (x | (x >> 8)) & 0x0000FFFF
    if N == 4:
        x &= 0x11111111
        x = (x | (x >> 3)) & 0x03030303
        x = (x | (x >> 6)) & 0x000F000F
        x = (x | (x >> 12)) & 0x000000FF
    if N == 8:
        x &= 0x01010101
        x = (x | (x >> 7)) & 0x00030003
        x = (x | (x >> 14)) & 0x0000000F
    return x.to(tl.int32, bitcast=True)
