"""What a run did: marks taken while it samples, read once into a RunReport when it ends.

Times are CUDA events, densities are sums on the device. Only `RunStats.report` waits for the GPU, at the
end, and `densities`, where the break-even rule asks for it; `RunStats.so_far` reads what is finished.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..outcomes import Reason
from .clock import Clock
from .plan_store import REUSED
from .reports import BlockReport, CellReport, RunReport, RunSettings, StepReport
from .sums import Sums

UNKNOWN_BLOCK = -1  # number of all blocks that have none


class CallPlace(NamedTuple):
    """Where in a run a call is made.

    `branch` is what tells it from others of the block in a step: conditionings, context window.
    """

    step: int
    block: int | None  # None where the model does not number its blocks
    branch: Hashable | None  # None if unknown


@dataclass
class RunStats:
    """Collects one run; `report` reads the device.

    Attributes:
        scheduled, sliders: as in `RunReport`.
    """

    clock: Clock
    calls: Counter[Reason] = field(default_factory=Counter)
    plans: Counter = field(default_factory=Counter)
    failure: str | None = None
    remarks: dict[str, None] = field(default_factory=dict)
    tokens: int = 0
    scheduled: int = 0
    sliders: list[tuple[int, float, int]] = field(default_factory=list)
    _steps: dict[int, object] = field(default_factory=dict)  # step -> mark of its first evaluation
    _warmup: set[int] = field(default_factory=set)  # steps
    _timed: list = field(default_factory=list)  # (step, sparse, spans), see `timed`
    _sums: Sums[tuple[int, int]] = field(
        default_factory=lambda: Sums(5)
    )  # (step, block) -> the fields of a _Cell
    _read: int = 0  # number of _timed whose marks are host times by now
    _copy: object | None = None  # mark after which what _sums has sent has arrived
    _arrived: dict[tuple[int, int], list[float]] = field(default_factory=dict)  # _sums as of the last copy

    def __post_init__(self):
        if self.clock.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.clock.device)

    def began(self, step: int) -> bool:
        return step in self._steps

    def begin_step(self, step: int, warmup: bool = False) -> None:
        if not self.began(step):
            self._steps[step] = self.clock.mark()
            if warmup:
                self._warmup.add(step)

    def timed(self, step: int, sparse: bool, spans: list[tuple]) -> None:
        """Note a call's marks (start, planned, end), by part; `planned` is `start` where nothing was."""
        self._timed.append((step, sparse, spans))

    def add_plan(self, step: int, block: int, plan) -> None:
        """Add a plan's counts, which stay on the device."""
        pairs = plan.requested.numel() * plan.pairs
        self._sums.add((step, block), 0, plan.requested, plan.executed, pairs)

    def add_estimate(self, step: int, block: int, estimated_error: torch.Tensor) -> None:
        """Add a call's relative error, a 0-d tensor, which stays on the device."""
        self._sums.add((step, block), 3, estimated_error, 1)

    def densities(self) -> dict[int, float]:
        """Executed density by block, of all calls so far; waits for them.

        Asked at the start of a step, when samplers have waited anyway, so that runs repeat exactly.
        """
        blocks = _totals((block, _Cell(*sums)) for (_, block), sums in self._sums.read().items())
        return {b: cell.executed_density for b, cell in blocks.items() if cell.executed_density is not None}

    def so_far(self, settings: RunSettings, implementation: str) -> RunReport:
        """Report of the steps that are finished; never waits, so densities may be those of a while ago."""
        self._read_calls()
        self._read_counts()
        part = copy.copy(self)
        part._timed = self._timed[: self._read]
        passed = [(step, mark) for step, mark in self._steps.items() if self.clock.passed(mark)]
        part._steps = dict(passed[:-1])
        return part._report(settings, implementation, passed[-1][1] if passed else 0.0, self._arrived)

    def _read_calls(self) -> None:
        """Replace the marks of finished calls by host times, each once."""
        for i in range(self._read, len(self._timed)):
            step, sparse, spans = self._timed[i]
            if not self.clock.passed(spans[-1][2]):
                return
            planning, rest = (x / 1e3 for x in self._times(spans))
            self._timed[i] = step, sparse, [(0.0, planning, planning + rest)]
            self._read = i + 1

    def _times(self, spans: list[tuple]) -> tuple[float, float]:
        """Planning and the rest of a call, ms."""
        return (
            sum(self.clock.milliseconds(start, planned) for start, planned, _ in spans),
            sum(self.clock.milliseconds(planned, end) for _, planned, end in spans),
        )

    def _read_counts(self) -> None:
        """Take the copy of the counts that has arrived, if any, and send the next one on its way."""
        if self._copy is not None and self.clock.passed(self._copy):
            self._arrived, self._copy = self._sums.arrived(), None
        if self._sums and self._copy is None:
            self._sums.send()
            self._copy = self.clock.mark()

    def report(self, settings: RunSettings, implementation: str) -> RunReport:
        """Wait for the device and add everything up."""
        return self._report(settings, implementation, self.clock.mark(), self._sums.read())

    def _report(self, settings: RunSettings, implementation: str, end, sums: dict) -> RunReport:
        """Add up the steps until the mark `end`."""
        cells = [(key, _Cell(*sums[key])) for key in sorted(sums)]
        of_step = _totals((step, cell) for (step, _), cell in cells)
        of_block = _totals((block, cell) for (_, block), cell in cells)
        whole = _total(cell for _, cell in cells)
        starts = list(self._steps.items())  # as they began: some samplers come back to earlier steps
        bounds = [m for _, m in starts] + [end]
        timed = [(step, sparse, *self._times(spans)) for step, sparse, spans in self._timed]
        by_step: dict[int, list] = {}
        for call in timed:
            by_step.setdefault(call[0], []).append(call)
        steps = []
        for i, (step, mark) in enumerate(starts):
            mine = by_step.get(step, [])
            sparse = sum(t[1] for t in mine)
            steps.append(
                StepReport(
                    step,
                    self.clock.milliseconds(mark, bounds[i + 1]),
                    sum(t[3] for t in mine),
                    sum(t[2] for t in mine),
                    sparse,
                    len(mine) - sparse,
                    step in self._warmup,
                    of_step.get(step, _Cell()).estimated_error,
                )
            )
        sparse_calls = [t[3] for t in timed if t[1]]
        planning = [t[2] for t in timed if t[1] and t[2] > 0]
        plan_time, sparse_time = _median(planning) or 0.0, _median(sparse_calls)
        blocks = tuple(
            BlockReport(block, cell.density, cell.executed_density, cell.estimated_error)
            for block, cell in sorted(of_block.items(), key=lambda item: item[0])
            if cell.density is not None and cell.executed_density is not None
        )
        cuda = self.clock.device.type == "cuda"
        return RunReport(
            settings=settings,
            tokens=self.tokens,
            implementation=implementation,
            device=torch.cuda.get_device_name(self.clock.device) if cuda else str(self.clock.device),
            total=self.clock.milliseconds(bounds[0], end) if starts else 0.0,
            steps=tuple(sorted(steps, key=lambda step: step.index)),
            blocks=blocks,
            calls=dict(self.calls),
            dense_call=_median([t[3] for t in timed if not t[1]]),
            sparse_call=(
                None if sparse_time is None else sparse_time + plan_time * len(planning) / len(sparse_calls)
            ),
            density=whole.density,
            executed_density=whole.executed_density,
            peak_memory=torch.cuda.max_memory_allocated(self.clock.device) if cuda else None,
            failure=self.failure,
            remarks=tuple(self.remarks),
            plans=dict(self.plans),
            planning_saved=(len(sparse_calls) - len(planning)) * plan_time if self.plans[REUSED] else 0.0,
            scheduled=self.scheduled,
            sliders=tuple(self.sliders),
            cells=tuple(
                CellReport(step, block, cell.density)
                for (step, block), cell in cells
                if cell.density is not None
            ),
            estimated_error=whole.estimated_error,
        )


class _Cell(NamedTuple):
    """Sums over calls: pairs requested, executed, and all; relative errors, and how many of them."""

    requested: float = 0.0
    executed: float = 0.0
    pairs: float = 0.0
    errors: float = 0.0
    estimates: float = 0.0

    @property
    def density(self) -> float | None:
        return self.requested / self.pairs if self.pairs else None

    @property
    def executed_density(self) -> float | None:
        return self.executed / self.pairs if self.pairs else None

    @property
    def estimated_error(self) -> float | None:
        return self.errors / self.estimates if self.estimates and math.isfinite(self.errors) else None


def _totals(cells: Iterable[tuple[int, _Cell]]) -> dict[int, _Cell]:
    """Cells added up by a number."""
    groups: dict[int, list[_Cell]] = {}
    for number, cell in cells:
        groups.setdefault(number, []).append(cell)
    return {number: _total(group) for number, group in groups.items()}


def _total(cells: Iterable[_Cell]) -> _Cell:
    return _Cell(*map(sum, zip(*cells, strict=True)))


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None
