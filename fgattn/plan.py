"""SparsePlan: which slices of keys each kernel tile of queries executes, packed as bits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad

from . import methods
from .backends import runtime
from .backends.pytorch.select import merge_runs, select
from .errors import InvalidArgument, Unsupported
from .joining import KERNEL_ROWS, group
from .layout import CELL, OCTET, Geometry, TokenLayout, geometry
from .settings import Settings
from .tensors import CHUNK_ELEMENTS, check_tensors, head_chunks, ordered

CALL_BYTES = 250 * 10**6  # that a call with single keys shall need beside its tensors


@dataclass(frozen=True, eq=False)
class SparsePlan:
    """The kept keys of one attention call; immutable, reusable for tensors of the same shape.

    | attribute | shape, dtype | meaning |
    |---|---|---|
    | bits | [B, H, tiles, row_bytes(slices)] uint8 | bit s%8 of byte s//8: slice s is executed |
    | requested | [B, H] float64 | scores asked for by the mask tiles |
    | executed | [B, H] float64 | scores computed: tiles that run together attend the union |
    | run_order | None or [B, H, runs] int32 | run of 16 queries at each place of execution; None: in order |
    | geometry | | order of queries and keys |
    | key_valid | None or [B, L_k] bool | keys that exist, in the order |
    | tile_rows | int | queries of an executed tile: max(M, 64) |
    | tile_keys | int | N |
    | tail | bool | add the pooled estimate of what is skipped |
    | scale | float or None | softmax scale; None is D**-0.5 |

    B and H are 1 where a plan from a mask serves every batch row or head.
    """

    bits: torch.Tensor
    requested: torch.Tensor
    executed: torch.Tensor
    run_order: torch.Tensor | None
    geometry: Geometry
    key_valid: torch.Tensor | None
    tile_rows: int
    tile_keys: int
    tail: bool
    scale: float | None

    @property
    def queries(self) -> int:
        return len(self.geometry.query_tokens)

    @property
    def keys(self) -> int:
        return len(self.geometry.key_tokens)

    @property
    def gathers(self) -> bool:
        """Keys are brought row by row: slices are finer than octets, or octets are no boxes."""
        return self.tile_keys < OCTET or self.key_valid is not None or self.geometry.boxes is None

    @property
    def density(self) -> torch.Tensor:
        """Requested share of all scores, 0-d float64 on the plan's device."""
        return self._share(self.requested)

    @property
    def executed_density(self) -> torch.Tensor:
        """Computed share of all scores, 0-d float64 on the plan's device."""
        return self._share(self.executed)

    def _share(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.sum() / max(1, scores.numel() * self.queries * self.keys)

    @property
    def query_tokens(self) -> torch.Tensor:
        """Token of each query in the order of execution, int32 [B, H, L_q]."""
        tokens = self.geometry.query_tokens.to(torch.int32)
        if self.run_order is None:
            return tokens[None, None]
        places = torch.arange(CELL, dtype=torch.int32, device=tokens.device)
        return tokens[(self.run_order[..., None] * CELL + places).flatten(2)[..., : self.queries]]

    def valid_keys(self, batch: int) -> torch.Tensor | None:
        """None or bool [L_k], in the order."""
        if self.key_valid is None:
            return None
        return self.key_valid[batch if len(self.key_valid) > 1 else 0]

    def kept_slices(self, batch: int, heads: slice) -> torch.Tensor:
        """Executed slices of some heads, bool [G, tiles, slices]; G is 1 if heads share them."""
        bits = of_heads(self.bits, batch, heads)
        places = torch.arange(8, device=bits.device, dtype=torch.uint8)
        kept = (bits[..., None] >> places & 1).bool().flatten(-2)
        return kept[..., : -(-self.keys // self.tile_keys)]

    def kept_keys(self, batch: int, heads: slice) -> torch.Tensor:
        """Executed valid keys of some heads, bool [G, tiles, L_k]."""
        keys = self.kept_slices(batch, heads).repeat_interleave(self.tile_keys, -1)[..., : self.keys]
        valid = self.valid_keys(batch)
        return keys if valid is None else keys & valid

    def executed_keys(self, batch: int, heads: slice) -> torch.Tensor:
        """Number of valid keys that each tile executes in each cell, uint8 [G, tiles, cells]."""
        kept, valid = self.kept_slices(batch, heads), self.valid_keys(batch)
        if self.tile_keys <= CELL:
            counts = kept * _valid_counts(self.keys, self.tile_keys, valid, kept.device)
            per_cell = CELL // self.tile_keys
            return pad(counts, (0, -counts.shape[2] % per_cell)).unflatten(2, (-1, per_cell)).sum(
                3, dtype=torch.uint8)
        counts = _valid_counts(self.keys, CELL, valid, kept.device)
        return kept.repeat_interleave(self.tile_keys // CELL, 2)[..., : len(counts)] * counts

    def softmax_scale(self, dim: int) -> float:
        return dim**-0.5 if self.scale is None else self.scale


def of_heads(x: torch.Tensor, batch: int, heads: slice) -> torch.Tensor:
    """[B or 1, H or 1, ...] -> [G or 1, ...]."""
    x = x[batch if len(x) > 1 else 0]
    return x[heads] if len(x) > 1 else x


def build_plan(
    q: torch.Tensor, k: torch.Tensor, settings: Settings, layout: TokenLayout,
    *, scale: float | None = None, impl: str | None = None,
) -> SparsePlan:
    """Select what to compute of softmax(scale * q k^T) v.

    Args:
        q: [B, H, L_q, D]; k: [B, H, L_k, D]; fp16, bf16, fp32 (bf16 is computed on a GPU) or float64.
        settings: method and its strength, tile sizes, tail, order.
        layout: of the keys; `layout.length` must be L_k.
        scale: softmax scale, D**-0.5 if None.
        impl: "torch" or "triton" (on a GPU); None takes the faster one that runs. Their plans differ at
            most where a score is within 1e-4 of the threshold. Methods other than "threshold" are torch
            code on every device.

    Raises:
        InvalidArgument: shapes, layout and settings that do not fit together.
        Unsupported: tensors that no implementation takes (grouped heads, strides), a method that the
            asked implementation lacks.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 4 * 8 * 8, 64).unbind()
        >>> layout = TokenLayout((4, 8, 8))
        >>> plan = build_plan(q, k, Settings(threshold=0.0), layout)
        >>> dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        >>> torch.allclose(attend(q, k, v, plan), dense, atol=1e-5)
        True
    """
    return plan_call(q, k, None, settings, layout, scale=scale, impl=impl)[0]


def plan_call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, settings: Settings, layout: TokenLayout,
    *, scale: float | None = None, impl: str | None = None,
):
    """build_plan, and the Summaries of q, k and v that the kernels made for it, for `attend`; or None.

    v may be None: its means are then made by `attend`.
    """
    check_tensors(q, k, k if v is None else v)
    (batch, heads, queries, dim), keys = q.shape, k.shape[2]
    m, n = settings.tile_queries, settings.tile_keys
    valid = _ordered_valid(layout, batch, keys, settings.order, q.device)
    geo = geometry(layout, settings.order, queries, q.device)
    queries, keys = len(geo.query_tokens), len(geo.key_tokens)
    scale = dim**-0.5 if scale is None else scale
    by_threshold = settings.method == "threshold"
    if impl not in (None, "torch", "triton"):
        raise InvalidArgument("impl", impl, "torch, triton", "None chooses the faster one that runs.")
    if impl is None:
        impl = "torch" if not by_threshold or runtime.triton_reason(q) else "triton"
    if impl != "torch" and not by_threshold:
        raise Unsupported("impl", impl, f"torch for method {settings.method}", "None chooses it.")
    if impl == "triton" and (reason := runtime.unavailable(q)):
        raise Unsupported("impl", impl, "torch here", f"The kernels cannot run: {reason}.")
    if impl == "triton" and queries and keys:
        from .backends.shared.select import plan_bits

        *made, summaries = plan_bits(q, k, v if settings.tail else None, geo, valid, settings, scale)
        return SparsePlan(*made, geo, valid, max(m, KERNEL_ROWS), n, settings.tail, scale), summaries
    tiles, slices = -(-queries // m), -(-keys // n)
    elements = max(queries * dim, keys * dim, tiles * (m // CELL) * (keys // CELL + 1), tiles * keys // n)
    parts = []
    for b, part in head_chunks(batch, heads, elements):
        row_valid = None if valid is None else valid[b]
        if queries and keys:
            rows = ordered(q, b, part, geo.query_tokens), ordered(k, b, part, geo.key_tokens)
            if by_threshold:
                kept = select(*rows, row_valid, geo, settings, scale)
            else:
                kept = methods.select(*rows, row_valid, geo, layout, settings, scale)
        else:
            empty = torch.zeros(part.stop - part.start, tiles, slices, dtype=torch.bool, device=q.device)
            kept = empty, empty
        parts.append(_pack(*kept, m, n, queries, keys, row_valid))
    return _plan(parts, (batch, heads), m, n, geo, valid, settings.tail, scale), None


def parts_for(q: torch.Tensor, keys: int, settings: Settings) -> int:
    """Parts that heads are taken in, so that a call on a GPU needs CALL_BYTES beside q, k, v and the output.

    Bits of whole cells are small enough for one part. Kernels that need lists have room for them besides.
    """
    if not q.is_cuda or settings.tile_keys >= CELL:
        return 1
    return max(1, min(q.shape[1], -(-call_bytes(q.shape, keys, settings) // CALL_BYTES)))


def call_bytes(shape: torch.Size, keys: int, settings: Settings) -> int:
    """Most that the kernels of planning and tail hold at a time: summaries, bits, pooled outputs.

    Args:
        shape: of q, [B, H, L_q, D].
    """
    batch, heads, queries, dim = shape
    m, n = settings.tile_queries, settings.tile_keys
    runs, cells = -(-queries // CELL), -(-keys // CELL)
    bits = -(-queries // max(m, KERNEL_ROWS)) * row_bytes(-(-keys // n))
    words = 0 if n >= CELL or (n == 1 and m >= KERNEL_ROWS) else -(-queries // m) * row_bytes(keys)
    summaries = (runs + 2 * cells) * dim * 2
    return batch * heads * (summaries + max((runs + cells) * dim * 2, words + bits, bits + runs * dim * 4))


def plan_from_mask(
    mask: torch.Tensor, tile_queries: int, tile_keys: int, *,
    query_length: int | None = None, key_length: int | None = None,
    layout: TokenLayout | None = None, order: str = "raster", tail: bool = False,
    scale: float | None = None,
) -> SparsePlan:
    """A plan from any tile mask of any method.

    Args:
        mask: bool [tiles, slices], [H, tiles, slices] or [B, H, tiles, slices]; True computes.
            Tiles and slices count in `order` of the layout (by default: as stored).
        tile_queries, tile_keys: M and N.
        query_length, key_length: L_q and L_k where the last tile or slice is short.
        layout: grid, sinks and valid keys; only its order and `key_valid` matter here.
        tail: add the pooled estimate of what the mask skips.
        scale: softmax scale, D**-0.5 if None.

    Raises:
        InvalidArgument: a mask that does not fit the lengths; wrong tile sizes.
    """
    settings = Settings(tile_queries=tile_queries, tile_keys=tile_keys, tail=tail, order=order)
    if mask.dtype != torch.bool or not 2 <= mask.ndim <= 4:
        raise InvalidArgument("mask", (mask.dtype, tuple(mask.shape)),
                              "bool [tiles, slices], with [H] or [B, H] in front",
                              "Threshold scores first.")
    mask = mask[(None,) * (4 - mask.ndim)]
    batch, heads, tiles, slices = mask.shape
    if layout is None:
        layout = TokenLayout.flat(slices * tile_keys if key_length is None else key_length, None)
    keys = layout.length if key_length is None else key_length
    queries = tiles * tile_queries if query_length is None else query_length
    if -(-queries // tile_queries) != tiles or -(-keys // tile_keys) != slices:
        raise InvalidArgument(
            "mask tiles and slices", (tiles, slices),
            f"({-(-queries // tile_queries)}, {-(-keys // tile_keys)}) for L_q={queries}, L_k={keys}",
            "Pass query_length and key_length, and one row and column for short last tiles.")
    valid = _ordered_valid(layout, batch, keys, settings.order, mask.device)
    geo = geometry(layout, settings.order, queries, mask.device)
    parts = []
    for b, part in head_chunks(batch, heads, tiles * slices):
        row_valid = None if valid is None else valid[b]
        kept = mask[b, part] & (_valid_counts(keys, tile_keys, row_valid, mask.device) > 0)
        cells = merge_runs(kept, max(1, CELL // tile_keys))
        parts.append(_pack(kept, cells, tile_queries, tile_keys, queries, keys, row_valid))
    return _plan(parts, (batch, heads), tile_queries, tile_keys, geo, valid, tail, scale)


def _ordered_valid(layout, batch, keys, order, device):
    if layout.length != keys:
        raise InvalidArgument("layout.length", layout.length, f"L_k = {keys}",
                              "Count every token: front + T*H*W + back.")
    valid = layout.key_valid
    if valid is None:
        return None
    if valid.dtype != torch.bool or tuple(valid.shape) != (batch, keys):
        raise InvalidArgument("layout.key_valid", (valid.dtype, tuple(valid.shape)),
                              f"bool {(batch, keys)}", "Give one row per batch row.")
    tokens = geometry(replace(layout, query_start=None), order, 0, device).key_tokens
    return valid.to(device)[:, tokens]


def _pack(kept, cells, m, n, queries, keys, valid):
    """Bits [G, executed tiles, bytes], requested and executed scores [G], run order [G, runs] or None.

    Args:
        kept: [G, tiles, slices]. cells: the same, but in cells where N < 16: what tiles are grouped by.
    """
    weight = _valid_counts(keys, n, valid, kept.device).float()
    requested = _scores(kept, m, queries, weight)
    order = None
    if m < KERNEL_ROWS:
        order = group(cells, m, queries)
        tile = order[:, :: m // CELL, None].long() // (m // CELL)
        kept = kept.gather(1, tile.expand_as(kept))
        kept = merge_runs(kept.transpose(1, 2), KERNEL_ROWS // m).transpose(1, 2)
    executed = _scores(kept, max(m, KERNEL_ROWS), queries, weight)
    return pack(kept), requested, executed, order


def row_bytes(bits: int) -> int:
    """Bytes of a row of bits; rows end on 16 bytes."""
    return -(-bits // 128) * 16


def pack(kept: torch.Tensor) -> torch.Tensor:
    """Bool [..., n] -> uint8 [..., row_bytes(n)]: bit i%8 of byte i//8."""
    octets = pad(kept, (0, 8 * row_bytes(kept.shape[-1]) - kept.shape[-1])).unflatten(-1, (-1, 8))
    places = torch.arange(8, device=kept.device, dtype=torch.uint8)
    return (octets.to(torch.uint8) << places).sum(-1, dtype=torch.uint8)


def _valid_counts(keys, width, valid, device):
    """Valid keys in each run of `width`, uint8 [ceil(keys / width)]."""
    exists = torch.ones(keys, dtype=torch.uint8, device=device) if valid is None else valid
    return pad(exists, (0, -keys % width)).view(-1, width).sum(1, dtype=torch.uint8)


def _scores(kept, rows, queries, weight):
    """Number of scores in the kept slices of each head, [G] float64."""
    tile = torch.arange(kept.shape[1], device=kept.device)
    rows_of = (queries - tile * rows).clamp(max=rows).double()
    step = max(1, CHUNK_ELEMENTS // max(1, kept.shape[2]))
    keys = [torch.cat([t.float() @ weight for t in head.split(step)]) for head in kept]
    return torch.stack(keys).double() @ rows_of


def _plan(parts, shape, m, n, geo, valid, tail, scale):
    made = (None if p[0] is None else torch.cat(p).unflatten(0, shape) for p in zip(*parts, strict=True))
    return SparsePlan(*made, geo, valid, max(m, KERNEL_ROWS), n, tail, scale)
