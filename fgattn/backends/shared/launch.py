"""What the launches of all kernels share: strides of broadcast tensors, rows of positions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...layout import CELL, Geometry

LOG2_E = 1.4426950408889634
SMALLEST = torch.finfo(torch.float32).tiny
# Arguments that Triton shall not compile variants for (being 1, or divisible by 16): each video length and
# number of heads would cost its own seconds.
COUNTS = [
    "heads",
    "first_head",
    "first_tensor",
    "queries",
    "query_cells",
    "keys",
    "key_cells",
    "tiles",
    "units",
    "slices",
    "span",
    "n_bytes",
    "cell_bytes",
]


@triton.jit
def _nothing():
    """A kernel by which the interpreter is recognised: it is then none of Triton's own type."""


@triton.jit
def batch_and_head(number, heads):
    """Batch row and head, int64, of the number-th of all B * H heads. Dividing 64 bits would be a call."""
    return (number // heads).to(tl.int64), (number % heads).to(tl.int64)


IS_INTERPRETED = not isinstance(_nothing, triton.JITFunction)


def shared_stride(x: torch.Tensor | None, dim: int = 0) -> int:
    """Stride of a dimension; 0 if it is 1, which serves every batch row or head."""
    return 0 if x is None or x.shape[dim] == 1 else x.stride(dim)


def scaled(q: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """q and a softmax scale above 0 that give the same scores, in base 2.

    Kernels scale the largest score, not every score, and masked scores are -inf, of which 0 makes NaN.
    """
    scale *= LOG2_E
    if abs(scale) < SMALLEST:
        return torch.zeros_like(q), 1.0
    return (q, scale) if scale > 0 else (-q, -scale)


def query_rows(geometry: Geometry) -> torch.Tensor:
    """Row of q at each query position, -1 past the end; int32 [1, query cells * 16]."""
    return geometry.table("query rows", lambda: _padded(geometry.query_tokens.to(torch.int32)[None]))


def key_rows(geometry: Geometry, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Row of k and v at each key position, -1 past the end; int32 [B or 1, key cells * 16].

    Args:
        valid: None or bool [B, L_k] in the order; keys that do not exist have -1.
    """
    if valid is None:
        return geometry.table("key rows", lambda: _padded(geometry.key_tokens.to(torch.int32)[None]))
    return _padded(geometry.key_tokens.to(torch.int32)[None].masked_fill(~valid, -1))


def _padded(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % CELL), value=-1)
