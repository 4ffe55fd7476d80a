"""Plan store: who gets which plan, for how long, and what happens when it is full."""

import dataclasses

import pytest
import torch
from fgattn import Settings, TokenLayout, build_plan
from fgattn.backends.base import Planned
from fgattn.layout import Geometry
from fgattn.plan import SparsePlan
from fgattn.runs.plan_store import MADE, NOT_KEPT, REUSED, PlanStore, size_of
from makers import tensors


def made(nbytes=1000):
    """A plan whose tensors hold so many bytes; no two are the same object."""
    counts = torch.zeros(1, 1, dtype=torch.float64)
    bits = torch.zeros(1, 1, 1, nbytes - 2 * counts.nbytes, dtype=torch.uint8)
    return SparsePlan(bits, counts, counts.clone(), None, None, None, 64, 16, True, None)


class Store:
    """A store that remembers what it had built."""

    def __init__(self, steps, limit=10**6):
        self.inner, self.built = PlanStore(steps, limit), []

    def __call__(self, key, nbytes=1000):
        """What became of a call's plan; checks that it is the right object."""

        def build():
            self.built.append(made(nbytes))
            return Planned(self.built[-1])

        before = len(self.built)
        (plan, _), outcome = self.inner.plan(key, build)
        assert (outcome == REUSED) == (len(self.built) == before)
        assert outcome == REUSED or plan is self.built[-1]
        return outcome


@pytest.mark.parametrize(
    ("steps", "outcomes"),
    [(1, "MMMMMMM"), (2, "MRMRMRM"), (3, "MRRMRRM"), (50, "MRRRRRR")],
    ids=lambda x: str(x),
)
def test_a_plan_serves_so_many_steps(steps, outcomes):
    """Made at s, serves s to s + k - 1."""
    store, seen = Store(steps), []
    for step in range(7):
        store.inner.begin_evaluation(step)
        seen.append({MADE: "M", REUSED: "R"}[store("a")])
    assert "".join(seen) == outcomes


def test_each_call_gets_its_own_plan_back():
    """Blocks and branches, in any order of calls."""
    store = Store(2)
    store.inner.begin_evaluation(0)
    first = {
        key: store.inner.plan(key, lambda: Planned(made()))[0].plan for key in ("a", "b", ("c", 1), ("c", 2))
    }
    store.inner.begin_evaluation(1)
    for key in reversed(first):
        assert store.inner.plan(key, made) == (Planned(first[key]), REUSED)
    assert len({id(plan) for plan in first.values()}) == 4


def test_calls_of_one_evaluation_never_share():
    """Two attentions under one block number (VACE): first and second stay apart in later steps too."""
    store = Store(2)
    store.inner.begin_evaluation(0)
    assert [store("a"), store("b"), store("a")] == [MADE, MADE, MADE]
    first, other, second = store.built
    store.inner.begin_evaluation(1)
    assert store.inner.plan("a", made) == (Planned(first), REUSED)
    assert store.inner.plan("a", made) == (Planned(second), REUSED)
    assert store.inner.plan("b", made) == (Planned(other), REUSED)
    assert store("a") == MADE  # a third one was never seen before


def test_evaluations_of_one_step_share():
    """Heun and its like evaluate a step several times."""
    store = Store(2)
    for step, outcome in ((0, MADE), (0, REUSED), (1, REUSED), (1, REUSED), (2, MADE), (2, REUSED)):
        store.inner.begin_evaluation(step)
        assert store("a") == outcome


@pytest.mark.parametrize(
    ("steps", "outcomes"),
    [
        ((5, 2, 3), (MADE, MADE, REUSED)),
        ((0, 7, 8), (MADE, MADE, REUSED)),
        ((4, 5, 4), (MADE, REUSED, REUSED)),
        ((4, 3, 4), (MADE, MADE, REUSED)),
    ],
    ids=["back to an earlier step", "steps left out", "back to where it was made", "back and forth"],
)
def test_a_plan_serves_no_step_before_its_own(steps, outcomes):
    """Restart samplers add noise again: a plan made at less noise is none for more."""
    store = Store(2)
    for step, outcome in zip(steps, outcomes, strict=True):
        store.inner.begin_evaluation(step)
        assert store("a") == outcome


def test_old_plans_leave_the_store_when_a_step_begins():
    """Their memory is free before new ones are made."""
    store = Store(2)
    store.inner.begin_evaluation(0)
    store("a")
    store.inner.begin_evaluation(1)
    store("b")
    assert store.inner.size == 2000
    store.inner.begin_evaluation(2)
    assert store.inner.size == 1000 and store("b") == REUSED
    store.inner.clear()
    assert store.inner.size == 0 and store("c") == MADE


def test_a_full_store_admits_nothing_and_loses_nothing():
    """What was kept goes on serving; smaller plans may still fit; room appears when plans grow old."""
    store = Store(2, limit=3000)
    store.inner.begin_evaluation(0)
    assert [store("a"), store("b"), store("c", 1001), store("d"), store("e")] == [
        MADE,
        MADE,
        NOT_KEPT,
        MADE,
        NOT_KEPT,
    ]
    assert store.inner.size == 3000
    store.inner.begin_evaluation(1)
    assert [store(key) for key in "abcde"] == [REUSED, REUSED, NOT_KEPT, REUSED, NOT_KEPT]
    store.inner.begin_evaluation(2)
    assert store("c", 3000) == MADE and store.inner.size == 3000


def test_nothing_fits_into_nothing():
    """A limit of 0 turns keeping off."""
    store = Store(2, limit=0)
    store.inner.begin_evaluation(0)
    assert store("a") == NOT_KEPT and store.inner.size == 0


@pytest.mark.parametrize("m", [16, 128])
@pytest.mark.parametrize("n", [1, 16])
def test_size_is_that_of_the_tensors(m, n):
    """Bits, counts and cell order with all their storage; q, k and v are not held."""
    q, k, _ = tensors(3, 300, batch=2)
    plan = build_plan(q, k, Settings(threshold=1.0, tile_queries=m, tile_keys=n), TokenLayout((3, 10, 10)))
    tiles = -(-300 // max(m, 64))
    bits = 2 * 3 * tiles * 16 * -(-300 // (128 * n))
    assert size_of(plan) == bits + 2 * 2 * 3 * 8 + (2 * 3 * -(-300 // 16) * 4 if m == 16 else 0)
    held = [
        f.name
        for f in dataclasses.fields(plan)
        if not isinstance(getattr(plan, f.name), (int, float, bool, type(None), Geometry))
    ]
    assert set(held) <= {"bits", "requested", "executed", "cell_order"}


def test_a_large_video_fits_into_the_default_limit():
    """Wan 14B at 720p, 81 frames: 40 layers of 40 heads, two branches, M x N = 128 x 16, below 1.2 GB."""
    from fgattn.settings import Policy

    length, heads, layers, branches = 21 * 45 * 80, 40, 40, 2
    tiles, octets = -(-length // 128), -(-length // (8 * 16))
    assert (length, tiles, octets) == (75_600, 591, 591)
    counts = torch.zeros(branches, heads, dtype=torch.float64, device="meta")
    bits = torch.zeros(branches, heads, tiles, octets, dtype=torch.uint8, device="meta")
    plan = SparsePlan(bits, counts, counts, None, None, None, 128, 16, True, None)
    assert layers * size_of(plan) == 1_117_750_400
    assert layers * size_of(plan) <= Policy().reuse_memory_mb * 10**6 == 1.2e9
