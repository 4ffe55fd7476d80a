"""Sums on the device by key: added to without waiting, read while they grow or at the end."""

from __future__ import annotations

from collections.abc import Hashable

import torch

ROOM = 64  # rows at first


class Sums:
    """Rows of float64 sums.

    Args:
        columns: in a row.
    """

    def __init__(self, columns: int):
        self._columns = columns
        self._rows: dict[Hashable, int] = {}
        self._table: torch.Tensor | None = None

    def __bool__(self) -> bool:
        return bool(self._rows)

    def row(self, key: Hashable, device: torch.device) -> torch.Tensor:
        """The sums of a key, [columns], zero at first; add to them in place."""
        at = self._rows.setdefault(key, len(self._rows))
        if self._table is None:
            self._table = torch.zeros(ROOM, self._columns, dtype=torch.float64, device=device)
        elif at == len(self._table):
            self._table = torch.cat((self._table, torch.zeros_like(self._table)))
        return self._table[at]

    def send(self) -> tuple[list[Hashable], torch.Tensor]:
        """Keys, and their sums on the way to the host: valid once the device has got here."""
        return [*self._rows], self._table[: len(self._rows)].to("cpu", non_blocking=True, copy=True)

    def read(self) -> dict[Hashable, list[float]]:
        """All sums; waits for the device."""
        if self._table is None:
            return {}
        return dict(zip(self._rows, self._table[: len(self._rows)].tolist(), strict=True))
