"""Run statistics: sums, medians and marks, without an engine."""

import types

import pytest
import torch
from fgattn.runs.clock import Clock
from fgattn.runs.reports import CellReport, RunReport, StepReport
from fgattn.runs.stats import RunStats
from makers import CHOSEN

CPU = torch.device("cpu")


class Ticks(Clock):
    """A clock that shows the times it is given, in seconds."""

    def __init__(self, *times):
        super().__init__(CPU)
        self.times = iter(times)

    def mark(self):
        return next(self.times)


def plan(requested, executed, queries=10, keys=20):
    return types.SimpleNamespace(
        requested=torch.tensor(requested, dtype=torch.float64),
        queries=queries,
        keys=keys,
        pairs=queries * keys,
        executed=torch.tensor(executed, dtype=torch.float64),
    )


def test_no_step_at_all():
    """A run that was interrupted at once has a report all the same."""
    report = RunStats(Clock(CPU)).report(CHOSEN, "torch")
    assert report.steps == () and report.blocks == () and report.calls == {} and report.remarks == ()
    assert report.total == 0 and report.planning == 0 and report.tokens == 0
    for name in (
        "dense_call",
        "sparse_call",
        "density",
        "executed_density",
        "peak_memory",
        "failure",
        "speedup",
    ):
        assert getattr(report, name) is None
    assert (report.settings, report.implementation, report.device) == (CHOSEN, "torch", "cpu")


def test_times_add_up():
    """Steps from their first evaluation to the next step's; attention and planning apart; ms."""
    stats = RunStats(Ticks(1.0, 3.0, 7.5))
    stats.begin_step(0)
    stats.begin_step(0)  # the second half of a cfg pair begins no step
    stats.timed(0, False, [(1.0, 1.0, 1.5)])
    stats.timed(0, False, [(1.5, 1.5, 1.75)])
    stats.begin_step(1)
    stats.timed(1, True, [(3.0, 3.125, 3.25)])
    report = stats.report(CHOSEN, "torch")
    assert report.steps == (
        StepReport(index=0, total=2000.0, attention=750.0, planning=0.0, sparse_calls=0, dense_calls=2),
        StepReport(index=1, total=4500.0, attention=125.0, planning=125.0, sparse_calls=1, dense_calls=0),
    )
    assert report.total == 6500.0 and report.planning == 125.0
    assert report.dense_call == 500.0 and report.sparse_call == 250.0 and report.speedup == 2.0


def test_samplers_that_come_back():
    """dpm_adaptive tries a later step before an earlier one: each lasts until the next begins, in time."""
    stats = RunStats(Ticks(1.0, 3.0, 7.5))
    stats.begin_step(2)
    stats.begin_step(1)
    report = stats.report(CHOSEN, "torch")
    assert [(step.index, step.total) for step in report.steps] == [(1, 4500.0), (2, 2000.0)]


def test_planning_of_calls_in_parts():
    """A call that takes its heads in four parts plans once, though it has four plans."""
    stats = RunStats(Ticks(0.0))
    stats.timed(0, True, 4 * [(0.0, 0.002, 0.005)])
    stats.timed(1, True, 4 * [(0.0, 0.0, 0.003)])
    stats.plans.update({"made": 4, "reused": 4})
    assert stats.report(CHOSEN, "torch").planning_saved == pytest.approx(8.0)


@pytest.mark.parametrize(("calls", "median"), [((1,), 1), ((3, 1, 2), 2), ((9, 1, 1, 1, 500), 1)], ids=str)
def test_call_times_are_medians(calls, median):
    """The first call compiles: a mean would report that."""
    stats = RunStats(Ticks(0.0))
    for length in calls:
        stats.timed(0, True, [(0.0, 0.0, length / 1000)])
    assert stats.report(CHOSEN, "torch").sparse_call == pytest.approx(median)


def test_planning_counts_by_the_share_of_calls_that_planned():
    """Four calls of 10 ms, one of which planned for 8: a call takes 12 ms, and 3 times 8 were saved."""
    stats = RunStats(Ticks(0.0))
    stats.timed(0, True, [(0.0, 0.008, 0.018)])
    for _ in range(3):
        stats.timed(1, True, [(0.0, 0.0, 0.010)])
    stats.plans.update({"made": 1, "reused": 3})
    report = stats.report(CHOSEN, "torch")
    assert report.sparse_call == pytest.approx(12.0) and report.planning_saved == pytest.approx(24.0)
    assert report.plans == {"made": 1, "reused": 3}


@pytest.mark.parametrize("only", [True, False], ids=["sparse", "dense"])
def test_no_comparison_without_both(only):
    """A gain that was not measured is not claimed."""
    stats = RunStats(Ticks(0.0))
    stats.timed(0, only, [(0.0, 0.0, 1.0)])
    assert stats.report(CHOSEN, "torch").speedup is None


def test_densities_by_block_and_over_all():
    """Weighted by the scores of each call, not a mean of shares."""
    stats = RunStats(Ticks(0.0))
    stats.add_plan(0, 5, plan([[50.0, 100.0]], [[100.0, 200.0]]))  # of 2 x 200
    stats.add_plan(1, 2, plan([[8.0]], [[8.0]], 4, 4))
    stats.add_plan(1, 5, plan([[0.0]], [[10.0]]))
    report = stats.report(CHOSEN, "torch")
    assert [(b.block, b.density, b.executed_density) for b in report.blocks] == [
        (2, 0.5, 0.5),
        (5, 0.25, 310 / 600),
    ]
    assert report.density == 158 / 616 and report.executed_density == 318 / 616
    assert report.cells == (CellReport(0, 5, 150 / 400), CellReport(1, 2, 0.5), CellReport(1, 5, 0.0))


def test_empty_calls_have_no_density():
    """A share of nothing is none: such a block is in no list, and the report can be read."""
    stats = RunStats(Clock(CPU))
    stats.begin_step(0)
    stats.add_plan(0, 3, plan([[0.0]], [[0.0]], queries=0))
    report = stats.report(CHOSEN, "torch")
    assert report.blocks == () and report.cells == () and report.density is None
    assert stats.densities() == {}
    stats.add_plan(0, 4, plan([[50.0]], [[100.0]]))
    report = stats.report(CHOSEN, "torch")
    assert (
        [(b.block, b.density) for b in report.blocks] == [(4, 0.25)] == [(4, c.density) for c in report.cells]
    )


def test_estimated_errors_are_means_of_calls():
    """By step, by block and over all; none where nothing was compared."""
    stats = RunStats(Ticks(1.0, 2.0, 3.0, 4.0))
    for step in range(3):
        stats.begin_step(step)
    for step, block, error in ((0, 5, 0.25), (0, 5, 0.75), (0, 2, 0.125), (1, 5, 0.5), (1, 2, None)):
        stats.add_plan(step, block, plan([[8.0]], [[8.0]], 4, 4))
        if error is not None:
            stats.add_estimate(step, block, torch.tensor(error))
    report = stats.report(CHOSEN, "torch")
    assert [s.estimated_error for s in report.steps] == [1.125 / 3, 0.5, None]
    assert [(b.block, b.estimated_error) for b in report.blocks] == [(2, 0.125), (5, 0.5)]
    assert report.estimated_error == 1.625 / 4


def test_an_error_that_is_no_number_is_none():
    """JSON has no NaN; the panel must live."""
    stats = RunStats(Ticks(1.0, 2.0))
    stats.begin_step(0)
    stats.add_plan(0, 0, plan([[8.0]], [[8.0]]))
    stats.add_estimate(0, 0, torch.tensor(float("nan")))
    report = stats.report(CHOSEN, "torch")
    for part in (report, report.steps[0], report.blocks[0]):
        assert part.estimated_error is None


def test_clock_measures_time():
    """Host marks are seconds, differences milliseconds."""
    clock = Clock(CPU)
    first, second = clock.mark(), clock.mark()
    assert second >= first and clock.milliseconds(1.0, 1.5) == 500.0


class Device(Clock):
    """A device that reaches a mark when it is told to; reading an earlier one is a mistake."""

    def __init__(self):
        super().__init__(CPU)
        self.marks, self.now = 0, -1

    def mark(self):
        self.marks += 1
        return self.marks - 1

    def passed(self, mark):
        return isinstance(mark, float) or mark <= self.now

    def milliseconds(self, start, end):
        if isinstance(start, float):
            return super().milliseconds(start, end)
        assert end <= self.now, "this would wait"
        return 10.0 * (end - start)


def test_so_far_never_waits():
    """After every single mark: only what the device has passed is read, and each later report has it too."""
    device = Device()
    stats = RunStats(device, scheduled=4)
    for step in range(4):
        stats.begin_step(step)
        for _ in range(2):
            start, planned, end = (device.mark() for _ in range(3))
            stats.timed(step, step > 0, [(start, planned if step else start, end)])
            if step > 0:
                stats.add_plan(step, 0, plan([[20.0 * step]], [[20.0 * step]]))
    seen = []
    for now in range(-1, device.marks):
        device.now = now
        seen.append(stats.so_far(CHOSEN, "torch"))
    assert [len(r.steps) for r in seen] == [0] * 8 + [1] * 7 + [2] * 7 + [3] * 7
    assert seen[-1].steps[1] == StepReport(1, 70.0, pytest.approx(20.0), pytest.approx(20.0), 2, 0)
    assert (seen[-1].scheduled, seen[-1].total) == (4, 210.0)
    assert seen[5].dense_call == pytest.approx(20.0) and seen[5].sparse_call is None
    assert seen[-1].density is None  # its copy is on the way
    device.now = device.marks
    assert stats.so_far(CHOSEN, "torch").density == pytest.approx(0.2)
    device.now = device.marks + 9
    full = stats.report(CHOSEN, "torch")
    assert [s.index for s in full.steps] == [0, 1, 2, 3] and full.steps[:3] == seen[-1].steps
    assert full.density == pytest.approx(0.2)


def test_so_far_changes_nothing():
    """A run that was watched has the report of one that was not."""
    watched, alone = (RunStats(Ticks(1.0, 3.0, 7.5, 8.0)) for _ in range(2))
    for stats in (watched, alone):
        for step, start in ((0, 1.0), (1, 3.0)):
            stats.begin_step(step)
            stats.timed(step, bool(step), [(start, start + 0.125, start + 0.25)])
            if stats is watched:
                stats.so_far(CHOSEN, "torch")
    assert watched.report(CHOSEN, "torch") == alone.report(CHOSEN, "torch")


def test_report_is_immutable():
    """The node, the chart and the log read the same one."""
    report = RunStats(Clock(CPU)).report(CHOSEN, "torch")
    with pytest.raises(AttributeError):
        report.tokens = 1
    assert isinstance(report, RunReport)
