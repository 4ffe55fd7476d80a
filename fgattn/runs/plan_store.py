"""Keeps plans, so that calls of later steps need not plan again (`Policy.reuse_steps`), within a bound."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from ..backends.base import Planned
from ..plan import SparsePlan

MADE, REUSED, NOT_KEPT = "made", "reused", "not kept"  # what became of a call's plan


@dataclass(frozen=True)
class _Kept:
    plan: SparsePlan
    step: int  # that it was made in
    size: int


class PlanStore:
    """Plans by the key of the calls that they serve.

    A plan that is made in step s serves calls with the same key in steps s to s + steps - 1. Calls of one
    evaluation of the model never share a plan: models such as VACE run two attentions under one block number,
    so the second call with a key has a second plan.

    Args:
        steps: that a plan serves.
        limit: bytes of all kept plans; a plan that does not fit is not kept.
    """

    def __init__(self, steps: int, limit: int):
        self._steps, self.limit = steps, limit
        self._step = 0
        self._kept: dict[Hashable, _Kept] = {}
        self._calls: Counter = Counter()  # of this evaluation, by key

    @property
    def size(self) -> int:
        """Bytes of the kept plans."""
        return sum(kept.size for kept in self._kept.values())

    def begin_evaluation(self, step: int) -> None:
        """Count calls anew; drop the plans that are too old for this step, or of a later one."""
        self._step = step
        self._calls.clear()
        self._kept = {
            place: kept for place, kept in self._kept.items() if kept.step <= step < kept.step + self._steps
        }

    def plan(self, key: Hashable, build: Callable[[], Planned]) -> tuple[Planned, str]:
        """The plan of this evaluation's next call with this key: kept, or built; and which."""
        place = key, self._calls[key]
        self._calls[key] += 1
        if place in self._kept:
            return Planned(self._kept[place].plan), REUSED
        planned = build()
        size = size_of(planned.plan)
        if self.size + size > self.limit:
            return planned, NOT_KEPT
        self._kept[place] = _Kept(planned.plan, self._step, size)
        return planned, MADE

    def clear(self) -> None:
        self._kept.clear()

    def close(self) -> None:
        """Drop all plans and admit no more."""
        self.clear()
        self.limit = -1


def size_of(plan: SparsePlan) -> int:
    """Bytes that a plan holds by itself; its geometry is shared."""
    held = (plan.bits, plan.requested, plan.executed, plan.cell_order, plan.key_valid)
    return sum(x.untyped_storage().nbytes() for x in held if x is not None)
