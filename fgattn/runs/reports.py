"""Reports: what one sampling run did, as plain numbers; drawings and words are made from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..outcomes import Outcome, Reason

Kind = Literal["warm-up", "dense", "sparse", "reused"]


@dataclass(frozen=True)
class RunSettings:
    """What the user had chosen for a run, as far as it was in force.

    Attributes:
        strength: the threshold, or the parameter of another method.
        tile_queries, tile_keys: M queries, N keys.
        warmup_steps, steps: dense ones at the start, and all of the schedule.
        reuse_steps: steps that a plan serves.
        moved: the sliders were moved during the run.
        moved_threshold, moved_warmup_steps: where a slider was last set to; None if it stands where it did at
            the start.
    """

    method: str
    strength: float
    tile_queries: int
    tile_keys: int
    order: str
    tail: bool
    warmup_steps: int
    steps: int
    reuse_steps: int = 1
    moved: bool = False
    moved_threshold: float | None = None
    moved_warmup_steps: int | None = None


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
    estimated_error: float | None = None

    @property
    def kind(self) -> Kind:
        """ "reused" is sparse without planning."""
        if self.sparse_calls:
            return "sparse" if self.planning else "reused"
        return "warm-up" if self.warmup else "dense"


@dataclass(frozen=True)
class BlockReport:
    """One transformer block over the sparse steps of a run."""

    block: int
    density: float
    executed_density: float
    estimated_error: float | None = None


@dataclass(frozen=True)
class CellReport:
    """The sparse calls of one block in one step."""

    step: int
    block: int
    density: float


@dataclass(frozen=True)
class RunReport:
    """What one sampling run did; times in ms, memory in bytes.

    Attributes:
        tokens: longest eligible sequence.
        implementation: what ran sparse calls, or why none could.
        total: from the first model evaluation to the end.
        dense_call, sparse_call: median time of an eligible call in dense and in sparse steps; None
            if there was none. Planning is included, by the share of calls that had to plan.
        calls: number of attention calls by what became of them.
        peak_memory: of the CUDA device during the run; None on other devices.
        failure: the exception that turned the run dense, as text.
        plans: number of plans by what became of them (see `plan_store`); a call in parts has one a part.
        planning_saved: calls that planned nothing, times the median time of planning.
        scheduled: steps of the schedule.
        sliders: threshold and warm-up steps as the user had set them: (first step, threshold, warm-up), one
            entry unless they moved during the run. Enough to repeat it.
        cells: by step and block.
        estimated_error: mean relative error of the calls that were compared with dense attention (see
            `estimate`), of the run, a step or a block; None where none was.
    """

    settings: RunSettings
    tokens: int
    implementation: str
    device: str
    total: float
    steps: tuple[StepReport, ...]
    blocks: tuple[BlockReport, ...]
    calls: dict[Reason, int]
    dense_call: float | None
    sparse_call: float | None
    density: float | None
    executed_density: float | None
    peak_memory: int | None
    failure: str | None
    remarks: tuple[str, ...] = ()
    plans: dict[str, int] = field(default_factory=dict)
    planning_saved: float = 0.0
    scheduled: int = 0
    sliders: tuple[tuple[int, float, int], ...] = ()
    cells: tuple[CellReport, ...] = ()
    estimated_error: float | None = None

    def count(self, outcome: Outcome) -> int:
        """Number of attention calls with this outcome."""
        return sum(number for reason, number in self.calls.items() if reason.outcome is outcome)

    @property
    def planning(self) -> float:
        return sum(s.planning for s in self.steps)

    @property
    def speedup(self) -> float | None:
        """Dense over sparse time of an eligible call, measured inside this run."""
        if not self.dense_call or not self.sparse_call:
            return None
        return self.dense_call / self.sparse_call
