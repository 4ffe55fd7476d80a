"""What the launches of all kernels share: the context, strides of broadcast tensors, rows of positions."""

from __future__ import annotations

import contextlib
import functools

import torch

from ...layout import CELL

LOG2_E = 1.4426950408889634
# Arguments that Triton shall not compile variants for (being 1, or divisible by 16): each video length and
# number of heads would cost its own seconds.
COUNTS = [
    "heads", "first_head", "first_tensor", "queries", "query_cells", "keys", "key_cells", "tiles", "units",
    "slices", "span", "n_bytes", "cell_bytes"]


def on_device(x: torch.Tensor):
    """Context in which Triton launches on x's GPU; nothing in the interpreter."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def shared_stride(x: torch.Tensor | None, dim: int = 0) -> int:
    """Stride of a dimension; 0 if it is 1, which serves every batch row or head."""
    return 0 if x is None or x.shape[dim] == 1 else x.stride(dim)


def position_rows(tokens: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Row at each position of the order, -1 for invalid ones and past the end: int32 [B or 1, cells * 16].

    Args:
        tokens: [L], row at each position; a geometry's, which are never written to.
        valid: None or bool [B, L], in the order.
    """
    if valid is None:
        return _rows_of(tokens)
    return _padded(tokens.to(torch.int32)[None].masked_fill(~valid, -1))


@functools.lru_cache(maxsize=32)
def _rows_of(tokens: torch.Tensor) -> torch.Tensor:  # tensors are looked up by identity
    return _padded(tokens.to(torch.int32)[None])


def _padded(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % CELL), value=-1)
