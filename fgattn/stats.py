"""What a run did: marks taken while it samples, read once into a RunReport when it ends.

Nothing here waits for the GPU until `RunStats.report`: times are CUDA events, densities are sums on
the device. `RunStats.so_far` reads what is finished and leaves out the rest.
"""

from __future__ import annotations

import copy
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

    def passed(self, mark) -> bool:
        """Whether the device has reached a mark; never waits."""
        return isinstance(mark, float) or mark.query()

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
    warmup: bool = False  # dense for being at the start of the run


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
        scheduled: steps of the schedule.
        sliders: threshold and warm-up steps as the user had set them: (first step, threshold, warm-up), one
            entry unless they moved during the run. Enough to repeat it.
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
    scheduled: int = 0
    sliders: tuple[tuple[int, float, int], ...] = ()

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
    """Collects one run; `report` reads the device.

    Attributes:
        scheduled, sliders: as in `RunReport`.
    """

    clock: Clock
    calls: Counter = field(default_factory=Counter)
    plans: Counter = field(default_factory=Counter)
    error: str | None = None
    remarks: dict[str, None] = field(default_factory=dict)
    tokens: int = 0
    scheduled: int = 0
    sliders: list[tuple[int, float, int]] = field(default_factory=list)
    _steps: dict[int, object] = field(default_factory=dict)  # step -> mark of its first evaluation
    _warmup: set[int] = field(default_factory=set)  # steps
    _timed: list = field(default_factory=list)  # (step, sparse, start, planned, end)
    _scores: dict[int, torch.Tensor] = field(default_factory=dict)  # block -> requested, executed, all
    _read: int = 0  # number of _timed whose marks are host times by now
    _copy: tuple | None = None  # of _scores, on its way to the host: blocks, counts, mark
    _arrived: dict[int, torch.Tensor] = field(default_factory=dict)  # _scores as of the last copy

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

    def so_far(self, settings: str, implementation: str) -> RunReport:
        """Report of the steps that are finished; never waits, so densities may be those of a while ago."""
        self._read_calls()
        self._read_scores()
        part = copy.copy(self)
        part._timed, part._scores = self._timed[:self._read], self._arrived
        passed = [(step, mark) for step, mark in self._steps.items() if self.clock.passed(mark)]
        part._steps = dict(passed[:-1])
        return part.report(settings, implementation, passed[-1][1] if passed else 0.0)

    def _read_calls(self) -> None:
        """Replace the marks of finished calls by host times, each once."""
        for i in range(self._read, len(self._timed)):
            step, sparse, start, planned, end = self._timed[i]
            if not self.clock.passed(end):
                return
            planning = self.clock.milliseconds(start, planned) / 1e3
            self._timed[i] = (
                step, sparse, 0.0, planning, planning + self.clock.milliseconds(planned, end) / 1e3)
            self._read = i + 1

    def _read_scores(self) -> None:
        """Take the copy of the counts that has arrived, if any, and send the next one on its way."""
        if self._copy and self.clock.passed(self._copy[2]):
            self._arrived, self._copy = dict(zip(self._copy[0], self._copy[1], strict=True)), None
        if self._scores and not self._copy:
            counts = torch.stack([*self._scores.values()]).to("cpu", non_blocking=True)
            self._copy = tuple(self._scores), counts, self.clock.mark()

    def report(self, settings: str, implementation: str, end=None) -> RunReport:
        """Wait for the device and add everything up.

        Args:
            end: mark of the end; now if None.
        """
        end = self.clock.mark() if end is None else end
        starts = sorted(self._steps.items())
        bounds = [m for _, m in starts] + [end]
        timed = [(step, sparse, self.clock.milliseconds(a, p), self.clock.milliseconds(p, b))
                 for step, sparse, a, p, b in self._timed]
        by_step: dict[int, list] = {}
        for call in timed:
            by_step.setdefault(call[0], []).append(call)
        steps = []
        for i, (step, mark) in enumerate(starts):
            mine = by_step.get(step, [])
            sparse = sum(t[1] for t in mine)
            steps.append(StepReport(
                step, self.clock.milliseconds(mark, bounds[i + 1]), sum(t[3] for t in mine),
                sum(t[2] for t in mine), sparse, len(mine) - sparse, step in self._warmup))
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
            planning_saved=self.plans[REUSED] * plan_time,
            scheduled=self.scheduled, sliders=tuple(self.sliders))


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None
