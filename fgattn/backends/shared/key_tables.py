"""What planning looks up by key position or key cell: row in memory, number of keys, weight, existence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import pad

from ...layout import CELL, Geometry
from ...plan import pack
from .launch import key_rows


class KeyTables(NamedTuple):
    """What planning looks up by position of keys; B is 1 if all are valid."""

    rows: torch.Tensor  # int32 [B, key_cells * 16]: row of k, -1 for none
    counts: torch.Tensor  # int32 [B, key_cells]: valid keys
    weights: torch.Tensor  # fp32 [B, row_bytes(key_cells) * 8]: the same, nearly 0 past the end
    # int32 [B, key_cells]: the cell itself, or one that has keys in its place; None if all have keys
    sources: torch.Tensor | None
    cells: torch.Tensor  # uint8 [B, row_bytes(key_cells)]: bits of the cells with keys
    keys: torch.Tensor  # uint8 [B, row_bytes(L_k)]: bits of the keys


def key_tables(geo: Geometry, valid: torch.Tensor | None) -> KeyTables:
    """Tables for a geometry.

    Args:
        valid: None or bool [B, L_k], in the order; the tables of all keys are kept for the next call.
    """
    return geo.table("key tables", lambda: _made(geo, None)) if valid is None else _made(geo, valid)


def _made(geo: Geometry, valid: torch.Tensor | None) -> KeyTables:
    rows = key_rows(geo, valid)
    exists = rows >= 0
    counts = exists.view(len(rows), -1, CELL).sum(2, dtype=torch.int32)
    # What does not count stands for a cell that does: too little to show, but inf * 0 would be no number.
    weights = pad(counts.float(), (0, -counts.shape[1] % 128)).clamp(min=1e-30)
    sources, has_keys = None, counts > 0
    if valid is not None:
        itself = torch.arange(counts.shape[1], dtype=torch.int32, device=rows.device)
        sources = torch.where(has_keys, itself, has_keys.int().argmax(1, keepdim=True).int())
    return KeyTables(
        rows, counts, weights, sources, pack(has_keys), pack(rows[:, : len(geo.key_tokens)] >= 0)
    )
