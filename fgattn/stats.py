"""What a run did: marks taken while it samples, read once into a RunReport when it ends.

Nothing here waits for the GPU until `RunStats.report`: times are CUDA events, densities are sums on
the device.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

import torch

from .plan_store import REUSED


class Clock:
    """Marks in time on one device: CUDA events, or the host's clock elsewhere."""

    def __init__(self, device: torch.device):
        self.device = device

    def mark(self) -> torch.cuda.Event | float:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def milliseconds(self, start, end) -> float:
        """Time between two marks; waits for the later one."""
        if isinstance(start, float):
            return (end - start) * 1e3
        end.synchronize()
        return start.elapsed_time(end)


@dataclass(frozen=True)
class StepReport:
    """One step of the schedule; times in ms."""

    index: int
    total: float
    attention: float  # eligible calls only: dense ones, and kernel and tail of sparse ones
    planning: float
    sparse_calls: int
    dense_calls: int


@dataclass(frozen=True)
class BlockReport:
    """One transformer block over the sparse steps of a run."""

    block: int
    density: float
    executed_density: float


@dataclass(frozen=True)
class RunReport:
    """What one sampling run did; times in ms, memory in bytes.

    Attributes:
        settings: one line of text.
        tokens: longest eligible sequence.
        implementation: what ran sparse calls, or why none could.
        total: from the first model evaluation to the end.
        dense_call, sparse_call: median time of an eligible call in dense and in sparse steps; None
            if there was none. Planning is included, by the share of calls that had to plan.
        calls: number of attention calls by outcome ("sparse" or the reason for dense).
        peak_memory: of the CUDA device during the run; None on other devices.
        error: the exception that turned the run dense, as text.
        plans: number of sparse calls by what became of their plan (see `plan_store`).
        planning_saved: calls that reused a plan, times the median time of planning.
    """

    settings: str
    tokens: int
    implementation: str
    device: str
    total: float
    steps: tuple[StepReport, ...]
    blocks: tuple[BlockReport, ...]
    calls: dict[str, int]
    dense_call: float | None
    sparse_call: float | None
    density: float | None
    executed_density: float | None
    peak_memory: int | None
    error: str | None
    remarks: tuple[str, ...] = ()
    plans: dict[str, int] = field(default_factory=dict)
    planning_saved: float = 0.0

    @property
    def planning(self) -> float:
        return sum(s.planning for s in self.steps)

    @property
    def speedup(self) -> float | None:
        """Dense over sparse time of an eligible call, measured inside this run."""
        if not self.dense_call or not self.sparse_call:
            return None
        return self.dense_call / self.sparse_call


@dataclass
class RunStats:
    """Collects one run; `report` reads the device."""

    clock: Clock
    calls: Counter = field(default_factory=Counter)
    plans: Counter = field(default_factory=Counter)
    error: str | None = None
    remarks: dict[str, None] = field(default_factory=dict)
    tokens: int = 0
    _steps: dict[int, object] = field(default_factory=dict)  # step -> mark of its first evaluation
    _timed: list = field(default_factory=list)  # (step, sparse, start, planned, end)
    _scores: dict[int, torch.Tensor] = field(default_factory=dict)  # block -> requested, executed, all

    def __post_init__(self):
        if self.clock.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.clock.device)

    def begin_step(self, step: int) -> None:
        if step not in self._steps:
            self._steps[step] = self.clock.mark()

    def timed(self, step: int, sparse: bool, start, planned, end) -> None:
        """Note a call's marks; `planned` is `start` where nothing was planned."""
        self._timed.append((step, sparse, start, planned, end))

    def add_plan(self, block: int, plan) -> None:
        """Add a plan's counts to its block, on the device."""
        rows = plan.requested.numel() * plan.queries * plan.keys
        if block not in self._scores:
            self._scores[block] = torch.zeros(3, dtype=torch.float64, device=plan.requested.device)
        total = self._scores[block]
        total[0] += plan.requested.sum()
        total[1] += plan.executed.sum()
        total[2] += rows

    def report(self, settings: str, implementation: str) -> RunReport:
        """Wait for the device and add everything up."""
        end = self.clock.mark()
        starts = sorted(self._steps.items())
        bounds = [m for _, m in starts] + [end]
        timed = [(step, sparse, self.clock.milliseconds(a, p), self.clock.milliseconds(p, b))
                 for step, sparse, a, p, b in self._timed]
        steps = []
        for i, (step, mark) in enumerate(starts):
            mine = [t for t in timed if t[0] == step]
            sparse = sum(t[1] for t in mine)
            steps.append(StepReport(
                step, self.clock.milliseconds(mark, bounds[i + 1]), sum(t[3] for t in mine),
                sum(t[2] for t in mine), sparse, len(mine) - sparse))
        sparse_calls = [t[3] for t in timed if t[1]]
        planning = [t[2] for t in timed if t[1] and t[2] > 0]
        plan_time = _median(planning) or 0.0
        scores = torch.stack([*self._scores.values()]).tolist() if self._scores else []
        blocks = tuple(BlockReport(b, s[0] / s[2], s[1] / s[2])
                       for b, s in sorted(zip(self._scores, scores, strict=True)))
        sums = [sum(s[i] for s in scores) for i in range(3)]
        cuda = self.clock.device.type == "cuda"
        return RunReport(
            settings=settings, tokens=self.tokens, implementation=implementation,
            device=torch.cuda.get_device_name(self.clock.device) if cuda else str(self.clock.device),
            total=self.clock.milliseconds(bounds[0], end) if starts else 0.0,
            steps=tuple(steps), blocks=blocks, calls=dict(self.calls),
            dense_call=_median([t[3] for t in timed if not t[1]]),
            sparse_call=(_median(sparse_calls) + plan_time * len(planning) / len(sparse_calls)
                         if sparse_calls else None),
            density=sums[0] / sums[2] if scores else None,
            executed_density=sums[1] / sums[2] if scores else None,
            peak_memory=torch.cuda.max_memory_allocated(self.clock.device) if cuda else None,
            error=self.error, remarks=tuple(self.remarks), plans=dict(self.plans),
            planning_saved=self.plans[REUSED] * plan_time)


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None
