"""Records that the attention kernel hands to its warps: what would else be long lists of arguments.

Inside a kernel a NamedTuple is a tuple whose members have names. Triton 3.6 takes it without private names,
which its aggregates need, and generates the same code as for single arguments. As an argument of a launch it
would cost the host 1.5 us; plain tuples, as the kernel takes for strides, cost nothing.

A record must not hold constexprs: in a tuple that is assigned to a name they become tensors. So they are
passed apart, or read off a shape: a ring says its number of stages, keys of a step and head size.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental.gluon import language as gl


class Ring(NamedTuple):
    """Tiles of k and v in shared memory that producers fill and consumers read, and their barriers.

    Step i uses stage i % STAGES. A *_full barrier counts the producers that have written a stage, an *_empty
    barrier the consumers that have read it.
    """

    k_tiles: gl.shared_memory_descriptor  # [STAGES, BLOCK_KEYS, D]
    v_tiles: gl.shared_memory_descriptor  # [STAGES, BLOCK_KEYS, D]
    k_full: gl.shared_memory_descriptor  # [STAGES, 1], as the others
    k_empty: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    v_empty: gl.shared_memory_descriptor


class Queries(NamedTuple):
    """What consumers work on: the queries of a tile, whose first is at place `begin` of the execution."""

    q: gl.tensor  # of the head, as out
    out: gl.tensor
    query_rows: gl.tensor  # int32 [queries]: row of q and out at each place
    tail_out: gl.tensor  # fp32 [query_cells, D], or None
    tail_lse: gl.tensor  # fp32 [query_cells], base 2, or None
    stride_q: gl.tensor
    stride_out: gl.tensor
    begin: gl.tensor
    queries: gl.tensor
    listed: gl.tensor  # keys that the tile executes
    scale: gl.tensor  # softmax scale times log2(e)
    q_tiles: gl.shared_memory_descriptor  # [CONSUMERS, 64, D]: q, and in the end the output


class Kinds(NamedTuple):
    """Tensor maps of k or v, one for each kind of box (see `producers.descriptors`)."""

    flat: gl.tensor
    wide: gl.tensor
    deep: gl.tensor


class Boxes(NamedTuple):
    """Where `producers.fetch` gets its octets: tensor maps, a head, and the boxes of its list."""

    k: Kinds
    v: Kinds
    head: gl.tensor
    units: gl.tensor  # int32: token * 4 + kind of each box, -1 past the end
    listed: gl.tensor


class Rows(NamedTuple):
    """Where `producers.gather` gets its rows: k and v of the head."""

    k: gl.tensor
    v: gl.tensor
    stride_k: gl.tensor
    stride_v: gl.tensor
    listed: gl.tensor


class Slots(NamedTuple):
    """Rows of k and v of the next steps, in shared memory, which listers write for `producers.gather`."""

    rows: gl.shared_memory_descriptor  # int32 [SLOTS, BLOCK_KEYS]
    full: gl.shared_memory_descriptor  # barriers [SLOTS, 1]: counts the listers
    empty: gl.shared_memory_descriptor  # counts the threads that gather


class Bits(NamedTuple):
    """What listers read: a tile's bits, one for each slice, and which keys exist."""

    bits: gl.tensor  # uint8 [n_bytes]
    valid: gl.tensor  # int32 [keys / 32]: bits of the keys that exist; None: all do
    n_bytes: gl.tensor
    keys: gl.tensor
