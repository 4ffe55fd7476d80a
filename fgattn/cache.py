"""A cache of index tensors that is bounded in bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar

import torch


class Sized(Protocol):
    """A value that knows how many bytes it holds now; it may grow later."""

    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=Sized)


class ByteCache(Generic[T]):
    """The values that were used last, at most `limit` bytes of them; the newest one always stays.

    Values are shared by all later calls, so they are built outside `torch.inference_mode` and are not kept
    where a mode such as FakeTensorMode replaces real tensors by others.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._values: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._values)

    @property
    def nbytes(self) -> int:
        """Bytes that all values hold now."""
        with self._lock:
            return sum(value.nbytes for value in self._values.values())

    def get(self, key: Hashable, build: Callable[[], T]) -> T:
        """The value of a key, built if it is not there."""
        if not makes_real_tensors():
            return build()
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
            value = self._values[key] = built_for_all(build)
            self.trim()
            return value

    def trim(self) -> None:
        """Drop what was used longest ago until the limit is kept; called when a value has grown."""
        with self._lock:
            while len(self._values) > 1 and self.nbytes > self.limit:
                self._values.popitem(last=False)

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._values.clear()


def makes_real_tensors() -> bool:
    """Whether a tensor that is made now is an ordinary one, as it is not under FakeTensorMode."""
    return type(torch.empty(0)) is torch.Tensor


def built_for_all(build: Callable[[], object]):
    """The result of `build`, without inference tensors: autograd refuses these in a later call."""
    with torch.inference_mode(False):
        return build()


def bytes_of(value: object) -> int:
    """Bytes of the tensors in a value: a tensor, a tuple of values, or anything else, which has none."""
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().nbytes()
    return sum(map(bytes_of, value)) if isinstance(value, tuple) else 0
