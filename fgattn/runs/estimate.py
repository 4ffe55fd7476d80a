"""How far sparse attention is from dense: a few query rows of some calls are computed densely, too."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..call import Call, needed
from ..layout import geometry

ROWS = 64  # random queries of an estimated call, the same ones in all heads
EVERY = 4  # of a step's blocks one is estimated, in the next step another one
LONG = 32_768  # tokens from which one in EVERY costs little on a GPU
SELDOM = 128  # the least frequent that shorter calls become
MASKED = 4  # times less often: attention with a mask has no kernel that splits keys


class Estimate:
    """Chooses calls and rows, with random numbers of its own; never waits for the device."""

    def __init__(self):
        self._generators: dict[torch.device, torch.Generator] = {}
        self._unnamed = 0  # calls of unknown blocks

    def due(self, step: int, block: int | None, call: Call) -> bool:
        """Whether to estimate this call."""
        if block is None:
            block = self._unnamed = self._unnamed + 1
        return (block + step) % every(call) == 0

    def estimated_error(self, call: Call, out: torch.Tensor) -> torch.Tensor:
        """Relative L2 error of some rows of the output [B, H, L_q, D], 0-d float32 on its device."""
        q, k, layout = call.q, call.k, needed(call.layout)
        if q.device not in self._generators:
            self._generators[q.device] = torch.Generator(q.device).manual_seed(0)
        geo = geometry(layout, "raster", q.shape[2], q.device)
        places = torch.randint(
            len(geo.query_tokens), (ROWS,), generator=self._generators[q.device], device=q.device
        )
        rows, valid = geo.query_tokens[places], layout.key_valid
        if layout.absent:
            there = torch.zeros(1, k.shape[2], dtype=torch.bool, device=k.device)
            there.index_fill_(1, geo.key_tokens, True)
            valid = there if valid is None else there & valid.to(k.device)
        expected = exact(q.index_select(2, rows), k, needed(call.v), valid, call.scale).float()
        missed = out.index_select(2, rows).float() - expected
        return torch.linalg.vector_norm(missed) / torch.linalg.vector_norm(expected)


def every(call: Call) -> int:
    """One of so many blocks is estimated: on a GPU an estimate takes 0.1 ms at any length, dense does not."""
    layout = needed(call.layout)
    is_masked = bool(layout.absent) or layout.key_valid is not None
    calls = EVERY * (MASKED if is_masked else 1)
    if not call.q.is_cuda:
        return calls
    return min(calls * max(1, round((LONG / call.q.shape[2]) ** 2)), max(calls, SELDOM))


def exact(q, k, v, key_valid: torch.Tensor | None, scale: float | None) -> torch.Tensor:
    """Dense attention of a few rows.

    For so few, PyTorch's flash kernel splits the keys over the GPU; cuDNN's, which it would take by itself,
    runs one program a head and takes 3 to 6 times as long.
    """
    if q.is_cuda and key_valid is None and q.dtype in (torch.float16, torch.bfloat16):
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]
    mask = None if key_valid is None else key_valid.to(q.device)[:, None, None, :]
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
