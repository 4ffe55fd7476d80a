"""Running sums, by key, of tensors on a device: their terms stay there until somebody reads the sums."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

import torch

ROOM = 256  # rows of terms that wait one by one
K = TypeVar("K", bound=Hashable)


class Sums(Generic[K]):
    """Rows of float64 sums.

    Args:
        columns: in a row.
    """

    def __init__(self, columns: int):
        self._columns = columns
        self._totals: dict[K, list[float]] = {}
        self._waiting: list[tuple[K, int, tuple[torch.Tensor | float, ...]]] = []
        self._places: list[tuple[K, int, int, float]] = []  # key, column, number of elements, number
        self._elements = torch.empty(0, dtype=torch.float64)  # of all places
        self._sent: tuple[int, torch.Tensor] | None = None  # so many places, their elements on the host

    def __bool__(self) -> bool:
        return bool(self._totals or self._waiting or self._places)

    def add(self, key: K, column: int, *terms: torch.Tensor | float) -> None:
        """Add to the sums of a key from a column on: numbers, or all elements of tensors; never waits.

        The tensors shall not be written to any more.
        """
        self._waiting.append((key, column, terms))
        if len(self._waiting) >= ROOM:
            self._join()

    def send(self) -> None:
        """Send what there is on its way to the host: it has arrived once the device has got here."""
        self._join()
        self._sent = len(self._places), self._elements.to("cpu", non_blocking=True, copy=True)

    def arrived(self) -> dict[K, list[float]]:
        """The sums of all that was sent, once it has arrived."""
        if self._sent:
            (number, elements), self._sent = self._sent, None
            self._take(number, elements)
        return {key: [*row] for key, row in self._totals.items()}

    def read(self) -> dict[K, list[float]]:
        """All sums; waits for the device."""
        self._join()
        if self._places:
            self._take(len(self._places), self._elements)
        self._sent = None
        return {key: [*row] for key, row in self._totals.items()}

    def _join(self) -> None:
        """Make one tensor of those that wait."""
        tensors = [self._elements] if self._elements.numel() else []
        for key, column, terms in self._waiting:
            for i, term in enumerate(terms, column):
                if isinstance(term, torch.Tensor):
                    tensors.append(term.reshape(-1).double())
                    self._places.append((key, i, len(tensors[-1]), 0.0))
                else:
                    self._places.append((key, i, 0, term))
        self._waiting.clear()
        if tensors:
            self._elements = torch.cat(tensors)

    def _take(self, number: int, elements: torch.Tensor) -> None:
        """Add up the first places, whose elements are given."""
        values, at = elements.tolist(), 0
        for key, column, length, term in self._places[:number]:
            self._totals.setdefault(key, [0.0] * self._columns)[column] += sum(values[at : at + length], term)
            at += length
        self._places, self._elements = self._places[number:], self._elements[at:]
