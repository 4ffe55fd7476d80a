"""Lists of the keys that each tile executes: a kernel makes them from a plan's bits, for attention to read.

A list counts in units, which are 1 to 16 consecutive positions of keys in the order (see Lists). It ends with
16 times -1, so that its readers may look ahead.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ...layout import CELL
from ...plan import SparsePlan
from .launch import COUNTS, LOG2_E, batch_and_head, key_rows, shared_stride
from .prepared import launch_kernel

LIST_BYTES = 208 << 20  # scratch for lists; heads that do not fit at once run in several launches
LIST_BLOCK, LIST_SPAN = 256, 4096  # units: of a step, of a program


@triton.jit
def _ones_up_to(octet):
    """For a byte, the number of bits set up to and with bit i, as four bits from bit 4 * i on; uint32."""
    x = octet.to(tl.uint32)
    x = (x | (x << 12)) & 0x000F000F
    x = (x | (x << 6)) & 0x03030303
    x = (x | (x << 3)) & 0x11111111  # bit i is now bit 4 * i
    x += x << 4
    x += x << 8
    return x + (x << 16)


@triton.jit(do_not_specialize=["stride_bits_b", "stride_bits_h", *COUNTS])
def list_kernel(
    bits,
    entries,
    lists,
    listed,
    stride_bits_b,
    stride_bits_h,
    stride_entries_b,
    stride_list,
    heads,
    first_head,
    tiles,
    slices,
    units,
    keys,
    span,
    n_bytes,
    SLICE_UNITS: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_ENTRIES: tl.constexpr,
    CHECKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Lists the units of UNIT keys whose slice (unit // SLICE_UNITS) has its bit set, in order, for one tile.

    A unit is listed as its entry, or as its number without entries; if CHECKED, those with an entry below 0
    are left out. One program lists what is kept of `span` units, and counts the bits before to know where.

    Launched by `Lists.launches`. Grid: (tiles, heads of the launch, spans); head `first_head` of all B * H
    comes first.

    Reads
        bits: uint8 [B or 1, H or 1, tiles, n_bytes], a bit for each slice.
        entries: int32 [B or 1, units], if HAS_ENTRIES.
    Writes
        lists: int32 [heads of the launch, tiles, stride_list].
        listed: int32 [heads of the launch, tiles], number of keys in each list.
    """
    tile = tl.program_id(0)
    row = tl.program_id(1)
    b, h = batch_and_head(first_head + row, heads)
    source = bits + b * stride_bits_b + h * stride_bits_h
    source += tile.to(tl.int64) * n_bytes
    out = lists + (row.to(tl.int64) * tiles + tile) * stride_list
    begin = tl.program_id(2) * span  # a multiple of 8 * SLICE_UNITS
    end = tl.minimum(begin + span, units)
    behind = begin // (8 * SLICE_UNITS)
    ones = tl.zeros([BLOCK // 8], tl.int32)
    for start in range(0, behind, BLOCK // 8):
        byte = start + tl.arange(0, BLOCK // 8)
        ones += (_ones_up_to(tl.load(source + byte, mask=byte < behind, other=0)) >> 28).to(tl.int32)
    count = tl.sum(ones, 0) * SLICE_UNITS
    STEP: tl.constexpr = 1 if CHECKED else min(SLICE_UNITS, 8)  # units of one bit
    i = tl.arange(0, 8)[:, None]  # [8, BLOCK // 8]: neighbouring lanes store to neighbouring places
    eight = begin // 8 + tl.arange(0, BLOCK // 8)  # units whose bits lie in one byte
    ahead = tl.load(source + eight // SLICE_UNITS, mask=eight * 8 < end, other=0)
    for _ in range(begin, end, BLOCK):
        octet = ahead.to(tl.int32) >> (eight * 8 // SLICE_UNITS % 8)
        unit = eight[None, :] * 8 + i
        eight += BLOCK // 8
        ahead = tl.load(source + eight // SLICE_UNITS, mask=eight * 8 < end, other=0)
        kept = (octet[None, :] >> (i // SLICE_UNITS)) & 1
        entry = unit
        if HAS_ENTRIES:
            wanted = (kept > 0) & (unit < end)
            entry = tl.load(entries + b * stride_entries_b + unit, mask=wanted, other=-1)
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
            count -= last * (tl.minimum(slices * SLICE_UNITS, tl.cdiv(units, 8) * 8) - units)
            n_keys = count * UNIT - last * (units * UNIT - keys)
        tl.store(out + count + tl.arange(0, 16), tl.full([16], -1, tl.int32))
        tl.store(listed + row * tiles + tile, n_keys)


class Lists:
    """The unit lists of a plan's tiles, made for the heads of one launch after the other.

    Units are 8 keys, listed as their entry in `octets`, if that is given; else cells, listed by number, where
    slices are whole cells and all keys exist; else single keys, listed as their row of k and v.
    """

    def __init__(self, plan: SparsePlan, batch: int, heads: int, octets: torch.Tensor | None = None):
        bits = self.bits = plan.bits
        self.batch, self.heads, self.tiles, self.keys = batch, heads, bits.shape[2], plan.keys
        self.key_rows = key_rows(plan.geometry, plan.key_valid)
        self.stride_rows = shared_stride(self.key_rows)
        if octets is not None:
            self.unit, self.entries = 8, octets
        else:
            self.unit = CELL if plan.tile_keys >= CELL and plan.key_valid is None else 1
            self.entries = self.key_rows if self.unit == 1 else None
        self.units, self.slice_units = -(-plan.keys // self.unit), plan.tile_keys // self.unit
        self.slices, self.is_checked = -(-plan.keys // plan.tile_keys), plan.key_valid is not None
        # Where its bit alone says whether a unit is listed, several programs share a list.
        self.span = self.units if self.is_checked else LIST_SPAN
        self.stride = -(-self.units // 16) * 16 + 16  # lists start aligned: wide loads
        fitting = max(1, LIST_BYTES // (4 * self.tiles * self.stride))
        most = -(-heads // -(-heads // fitting))  # heads of a launch, about as many in each
        self.lists = torch.empty(most, self.tiles, self.stride, dtype=torch.int32, device=bits.device)
        self.listed = torch.empty(most, self.tiles, dtype=torch.int32, device=bits.device)

    def launches(self) -> Iterator[tuple[int, int, int]]:
        """(batch row, first head, number of heads) of each launch, once its lists were made.

        Lists of the launch before are overwritten.
        """
        bits, most = self.bits, len(self.lists)
        strides = shared_stride(bits, 0), shared_stride(bits, 1)
        for b, first in itertools.product(range(self.batch), range(0, self.heads, most)):
            launch_heads = min(most, self.heads - first)
            launch_kernel(
                list_kernel,
                (self.tiles, launch_heads, -(-self.units // self.span)),
                bits,
                self.entries,
                self.lists,
                self.listed,
                *strides,
                self.stride_rows,
                self.stride,
                self.heads,
                b * self.heads + first,
                self.tiles,
                self.slices,
                self.units,
                self.keys,
                self.span,
                bits.shape[3],
                SLICE_UNITS=self.slice_units,
                UNIT=self.unit,
                HAS_ENTRIES=self.entries is not None,
                CHECKED=self.is_checked,
                BLOCK=LIST_BLOCK,
                num_warps=1,
            )
            yield b, first, launch_heads


def execution_rows(plan: SparsePlan, batch: int, heads: int) -> tuple[torch.Tensor, int]:
    """Rows of the queries in the order of execution, and the distance of one head's to the next's."""
    tokens = plan.query_tokens
    if plan.cell_order is None:
        return tokens, 0  # one order for all heads
    return tokens.expand(batch, heads, -1).contiguous(), plan.queries


def scaled_tail(tail):
    """Output and log-sum-exp of a tail, the latter in base 2; twice None without a tail."""
    return (None, None) if tail is None else (tail[0], tail[1] * LOG2_E)
