"""The break-even rule: against what was measured, and in the engine's hands."""

import pytest
import torch
from benchmarks.measure import RESULTS
from benchmarks.results import Results
from fgattn import Settings, TokenLayout
from fgattn.backends import hopper, triton
from fgattn.backends.base import Costs
from fgattn.backends.shared.costs import FIGURES
from fgattn.call import Call
from fgattn.outcomes import Outcome
from fgattn.runs.break_even import faster
from fgattn.runs.engine import Engine
from fgattn.settings import Policy
from fgattn.show.text import headline
from makers import by_reason

CPU = torch.device("cpu")
LAYOUT = TokenLayout((4, 8, 16))
CLEAR = 1.2  # a row that is so much faster or slower must be on the rule's right side
ROWS = Results(RESULTS).measured("breakeven", impl="fgattn")


def a_call(length, heads=1, dim=128, settings=None):
    """A call of this size, without its memory."""
    q = torch.empty(1, heads, length, dim, device="meta")
    return Call(q, q, q, settings or Settings(), None, None, None, dim**-0.5)


def gains(backend, length, heads=1, dim=128, settings=None, **density):
    call = a_call(length, heads, dim, settings)
    return faster(backend.costs(call), call, **density)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "L{L} H{heads} D{D} N{N} {density}".format(**row))
def test_the_rule_fits_what_was_measured(row):
    """Where a stream of sparse calls was clearly faster or slower than dense ones, the rule says so."""
    gain = row["yardstick_ms"] / max(row["ms"], row["host_ms"])
    rule = gains(
        hopper.BACKEND, row["L"], row["heads"], row["D"], Settings(tile_keys=row["N"]), density=row["density"]
    )
    assert rule if gain > CLEAR else not rule if gain < 1 / CLEAR else True


def test_there_are_measurements():
    assert len(ROWS) > 50 and {row["D"] for row in ROWS} == {64, 128}


@pytest.mark.parametrize("settings", [Settings(), Settings(tile_keys=1), Settings(tile_queries=64)], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("backend", [hopper.BACKEND, triton.BACKEND], ids=lambda backend: backend.name)
def test_longer_and_sparser_is_better(settings, dim, backend):
    """The rule changes its mind once: from dense to sparse as length, heads and sparsity grow."""
    for sizes in (
        [(n, 12) for n in (500, 2000, 8000, 30000, 100000)],
        [(8000, heads) for heads in (1, 4, 16, 64, 256)],
    ):
        said = [gains(backend, *size, dim, settings) for size in sizes]
        assert said == sorted(said) and {*said} == {True, False}
    said = [
        gains(backend, 50000, 12, dim, settings, density=density) for density in (1.0, 0.8, 0.5, 0.3, 0.1)
    ]
    assert said == sorted(said) and {*said} == {True, False}


def test_a_slower_kernel_needs_less_density():
    """The portable kernel and small tiles gain later than the Hopper kernel with large ones."""
    assert gains(hopper.BACKEND, 32760, 12, density=0.7)
    assert not gains(hopper.BACKEND, 32760, 12, settings=Settings(tile_queries=64), density=0.85)
    assert not gains(triton.BACKEND, 32760, 12, density=0.6)
    assert set(FIGURES) == {(dim, one_by_one) for dim in (64, 128) for one_by_one in (True, False)}


class Ruled(Engine):
    """An engine whose rule is on, on a CPU, at the lengths of a test."""

    figures = Costs(rate=1e6, fixed=1.0, planning=0.2, speed=1.0, host=1.0)

    def _has_rule(self, device):
        return super()._has_rule(torch.device("cuda"))

    def begin_run(self, *args):
        super().begin_run(*args)
        run = self.run
        run.costs = lambda call, answer: self.figures if run.rule else None


def run(engine, lengths=(512,), blocks=(0,), thresholds=None):
    """Three steps of calls."""
    engine.begin_run([1.0, 0.6, 0.3, 0.0], False, CPU)
    generator = torch.Generator().manual_seed(0)
    for sigma in (1.0, 0.6, 0.3):
        engine.begin_evaluation(sigma)
        for length in lengths:
            layout = LAYOUT if length == LAYOUT.length else TokenLayout.flat(length)
            for block in blocks:
                q, k, v = torch.randn(3, 1, 1, length, 64, generator=generator)
                q = q * (8 if block == 1 else 0.1)  # block 1 is peaked
                engine.attention(q, k, v, layout=layout, dense=lambda v=v: v, block=block)
    return engine.end_run()


def test_short_calls_are_left_dense():
    """Too short at any density: dense, with the reason."""
    report = run(Ruled(Settings(threshold=1.5), Policy(warmup_steps=0)), lengths=(512, 64))
    assert report.count(Outcome.TOO_SHORT) == 3 and report.density is not None


def test_blocks_that_keep_too_much_go_dense():
    """From the step after the first, by block; the others stay sparse."""
    report = run(
        Ruled(Settings(threshold=1.0, tile_queries=16, tile_keys=16), Policy(warmup_steps=0)), blocks=(0, 1)
    )
    density = {b.block: b.executed_density for b in report.blocks}
    assert density[0] > 0.8 > density[1]
    assert report.calls == by_reason(sparse=4, too_dense=2)
    assert [(s.sparse_calls, s.dense_calls) for s in report.steps] == [(2, 0), (1, 1), (1, 1)]


def test_a_moved_slider_ends_what_was_learnt():
    """What a threshold kept says nothing of the next one."""
    engine = Ruled(Settings(threshold=0.0, tile_queries=16, tile_keys=16), Policy(warmup_steps=0))
    engine.begin_run([1.0, 0.6, 0.3, 0.0], False, CPU)
    q, k, v = torch.randn(3, 1, 1, LAYOUT.length, 64, generator=torch.Generator().manual_seed(0))
    for sigma in (1.0, 0.6, 0.3):
        engine.begin_evaluation(sigma)
        engine.attention(q, k, v, layout=LAYOUT, dense=lambda: v, block=0)
        if sigma == 0.6:
            engine.move(2.0, 0)
    assert [(s.sparse_calls, s.dense_calls) for s in engine.end_run().steps] == [(1, 0), (0, 1), (1, 0)]


def test_a_run_that_keeps_too_much_says_so():
    report = run(Ruled(Settings(threshold=0.0), Policy(warmup_steps=0)))
    assert report.calls == by_reason(sparse=1, too_dense=2)
    assert headline(report) == "mostly dense: too many scores kept for sparse to be faster"


def test_min_tokens_overrides_the_rule():
    """Any other value than 0 is the user's word."""
    report = run(Ruled(Settings(threshold=0.0), Policy(warmup_steps=0, min_tokens=64)), lengths=(512, 64))
    assert report.calls == by_reason(sparse=6)


def test_there_is_no_rule_on_a_cpu():
    assert not Engine(Settings(), Policy(warmup_steps=0))._has_rule(CPU)
    assert Engine(Settings(), Policy(warmup_steps=0))._has_rule(torch.device("cuda"))
