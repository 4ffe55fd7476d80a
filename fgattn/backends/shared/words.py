"""Work on bits in integers ("words"): one word holds what one tile decides about up to 32 columns.

The selection kernels compare a matrix of logits, one row for each query cell and one column for each key
cell or key, with a limit for each row. What follows (the union over the query cells of a tile, whole slices,
counts) works on the comparisons as bits of words, at a thirtieth of what it would cost on the matrix.

These helpers are inlined into the kernels of select.py and refine.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# The type of the words that a step of so many columns writes: four words, each with a fourth of the bits.
WORDS = {32: torch.uint8, 64: torch.int16, 128: torch.int32}


@triton.jit
def share(length, BLOCK: tl.constexpr):
    """(begin, end) of this program's share of `length` columns, in whole blocks but for the last one.

    The columns are split among the programs along the grid's second axis.
    """
    each = tl.cdiv(tl.cdiv(length, BLOCK), tl.num_programs(1)) * BLOCK
    begin = tl.minimum(tl.program_id(1) * each, length)
    return begin, tl.minimum(begin + each, length)


@triton.jit
def column_order(BLOCK: tl.constexpr):
    """The column to put at each place of a product, int32 [BLOCK], for `tile_words`.

    In the layout that the matrix units write, two of each eight neighbouring places belong to one thread of
    four. In this order these are the bits of one word, so that a thread holds all bits of its words.
    """
    column = tl.arange(0, BLOCK)
    return column % 8 // 2 * (BLOCK // 4) + column // 8 * 2 + column % 2


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def union(words, T: tl.constexpr, NUMBER: tl.constexpr):
    """Union of each NUMBER neighbours: int32 [T * NUMBER, W] -> [T, W]."""
    return tl.reduce(tl.reshape(words, (T, NUMBER, words.shape[1])), 1, _or)


@triton.jit
def tile_words(flags, exists, T: tl.constexpr, TILE_CELLS: tl.constexpr):
    """What T tiles decide, int32 [T, 4]: column w * BLOCK / 4 + j is bit j of word w, set by any query cell.

    flags: bool [T * TILE_CELLS, BLOCK], columns in `column_order`; exists: bool [T * TILE_CELLS], query cells
    that are not past the end.
    """
    ROWS: tl.constexpr = flags.shape[0]
    EIGHTS: tl.constexpr = flags.shape[1] // 8
    place = (2 * tl.arange(0, EIGHTS))[None, :, None, None] + tl.arange(0, 2)[None, None, None, :]
    bits = tl.where(tl.reshape(flags, (ROWS, EIGHTS, 4, 2)), 1 << place, 0)
    words = tl.where(exists[:, None], tl.sum(tl.sum(bits, 3), 1), 0)
    return union(words, T, TILE_CELLS)


@triton.jit
def pairs_of(keys, tile, queries, TILE_QUERIES: tl.constexpr):
    """Number of pairs (one query with one key) in a program's tiles, float64.

    keys: int32 [T], keys of each tile; tile: int32 [T], which tiles; the last tile of all may be short.
    """
    rows = tl.minimum(tl.maximum(queries - tile * TILE_QUERIES, 0), TILE_QUERIES)
    return tl.sum(keys.to(tl.int64) * rows, 0).to(tl.float64)


@triton.jit
def keys_of_cells(cells):
    """The lowest two bits, one for each key cell of a word, repeated for the cell's 16 keys."""
    return (cells & 1) * 0xFFFF | -((cells >> 1) & 1) << 16


@triton.jit
def number_of_ones(x):
    """Number of bits set in each word, int32."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def whole_slices(x, N: tl.constexpr):
    """Each N neighbouring bits, N up to 8, are all set where one of them is."""
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
    """Every N-th bit, N up to 8, moved next to each other at the low end: 32 / N bits are left."""
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
