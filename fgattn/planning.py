"""Plans: which pairs of a query and a key shall be computed, by a rule or by a mask."""

from __future__ import annotations

import torch

from .backends.execute import plan_of
from .backends.registry import required
from .call import Call, checked_scale, ordered_valid
from .errors import InvalidArgument, check_type
from .layout import CELL, MOST_TOKENS, TokenLayout, geometry
from .packing import Packing
from .plan import KERNEL_ROWS, SparsePlan, row_bytes, valid_counts
from .settings import Settings
from .tensors import any_of, check_tensor, head_chunks

CALL_BYTES = 250 * 10**6  # that a call with single keys shall need beside its tensors


def build_plan(
    q: torch.Tensor,
    k: torch.Tensor,
    settings: Settings,
    layout: TokenLayout,
    *,
    scale: float | None = None,
    impl: str | None = None,
) -> SparsePlan:
    """Select what to compute of softmax(scale * q k^T) v.

    Args:
        q: [B, H, L_q, D]; k: [B, H, L_k, D]; fp16, bf16, fp32 (bf16 is computed on a GPU) or float64.
        settings: method and its strength, tile sizes, tail, order.
        layout: of the keys; `layout.length` must be L_k.
        scale: softmax scale, D**-0.5 if None.
        impl: name of a backend, as for `attend`; None takes the first that can run. Plans of backends
            differ at most where a score is within 1e-4 of the threshold. Methods other than "threshold"
            are torch code whatever the backend.

    Raises:
        InvalidArgument: shapes, layout and settings that do not fit together; a scale that is not finite.
        Unsupported: tensors that no backend takes (fewer key heads than query heads, strides, gradients that
            are wanted), or that the named one does not.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 4 * 8 * 8, 64).unbind()
        >>> layout = TokenLayout((4, 8, 8))
        >>> plan = build_plan(q, k, Settings(threshold=0.0), layout)
        >>> dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        >>> torch.allclose(attend(q, k, v, plan), dense, atol=1e-5)
        True
    """
    call = Call.to_plan(q, k, None, settings, layout, scale)
    return plan_of(call, required(call, impl)).plan


def parts_for(call: Call) -> int:
    """Parts that heads are taken in, so that a call on a GPU needs CALL_BYTES beside q, k, v and the output.

    Bits of whole cells are small enough for one part. Kernels that need lists have room for them besides.
    """
    if not call.q.is_cuda or call.settings.tile_keys >= CELL:
        return 1
    return max(1, min(call.q.shape[1], -(-call_bytes(call) // CALL_BYTES)))


def call_bytes(call: Call) -> int:
    """Most that the kernels of planning and tail hold at a time: summaries, bits, the tail's output."""
    (batch, heads, queries, dim), keys = call.q.shape, call.k.shape[2]
    m, n = call.settings.tile_queries, call.settings.tile_keys
    query_cells, key_cells = -(-queries // CELL), -(-keys // CELL)
    bits = -(-queries // max(m, KERNEL_ROWS)) * row_bytes(-(-keys // n))
    words = 0 if n >= CELL or (n == 1 and m >= KERNEL_ROWS) else -(-queries // m) * row_bytes(keys)
    summaries = (query_cells + 2 * key_cells) * dim * 2
    second = (query_cells + key_cells) * dim * 2
    return batch * heads * (summaries + max(second, words + bits, bits + query_cells * dim * 4))


def plan_from_mask(
    mask: torch.Tensor,
    tile_queries: int,
    tile_keys: int,
    *,
    query_length: int | None = None,
    key_length: int | None = None,
    layout: TokenLayout | None = None,
    order: str = "raster",
    tail: bool = False,
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
        InvalidArgument: a mask that does not fit the lengths; wrong tile sizes; a scale that is not finite.
    """
    check_tensor("mask", mask, "Pass bool [tiles, slices], with [H] or [B, H] in front.")
    scale = checked_scale(scale)
    for name, length in (("query_length", query_length), ("key_length", key_length)):
        if length is not None and (type(length) is not int or not 0 <= length <= MOST_TOKENS):
            raise InvalidArgument(
                name, length, f"a whole number from 0 to {MOST_TOKENS}", "None is whole tiles."
            )
    settings = Settings(tile_queries=tile_queries, tile_keys=tile_keys, tail=tail, order=order)
    if mask.dtype != torch.bool or not 2 <= mask.ndim <= 4:
        raise InvalidArgument(
            "mask",
            (mask.dtype, tuple(mask.shape)),
            "bool [tiles, slices], with [H] or [B, H] in front",
            "Threshold scores first.",
        )
    mask = mask[(None,) * (4 - mask.ndim)]
    batch, heads, tiles, slices = mask.shape
    if layout is None:
        layout = TokenLayout.flat(slices * tile_keys if key_length is None else key_length, None)
    check_type("layout", layout, TokenLayout, "None has no grid.")
    keys = layout.length if key_length is None else key_length
    queries = tiles * tile_queries if query_length is None else query_length
    if -(-queries // tile_queries) != tiles or -(-keys // tile_keys) != slices:
        raise InvalidArgument(
            "mask tiles and slices",
            (tiles, slices),
            f"({-(-queries // tile_queries)}, {-(-keys // tile_keys)}) for L_q={queries}, L_k={keys}",
            "Pass query_length and key_length, and one row and column for short last tiles.",
        )
    valid = ordered_valid(layout, batch, keys, settings.order, mask.device)
    geo = geometry(layout, settings.order, queries, mask.device)
    packing = Packing(tile_queries, tile_keys, geo, valid, tail, scale)
    parts = []
    for b, part in head_chunks(batch, heads, tiles * slices):
        row_valid = packing.row_valid(b)
        kept = mask[b, part] & (valid_counts(keys, tile_keys, row_valid, mask.device) > 0)
        parts.append(packing.packed(kept, any_of(kept, max(1, CELL // tile_keys)), b))
    return packing.plan(parts, batch, heads)
