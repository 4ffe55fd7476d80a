"""Which step a sampler is in: from the order of its evaluations and their levels together."""

import random
from itertools import pairwise

import pytest
from fgattn.runs.steps import Steps

SCHEDULE = [14.6, 7.0, 3.0, 1.0, 0.2, 0.0]


def linear(steps):
    return [1 - i / steps for i in range(steps + 1)]


def shifted(steps, shift=8.0):
    """A flow model's schedule for video: its first levels are less than 1 % apart."""
    return [shift * t / (1 + (shift - 1) * t) for t in linear(steps)]


FLOW = linear(5)


def followed(sigmas, evaluated):
    steps = Steps(sigmas)
    return [steps.evaluated(sigma) for sigma in evaluated]


@pytest.mark.parametrize(
    ("sigmas", "evaluated", "steps"),
    [
        (SCHEDULE, SCHEDULE[:-1], [0, 1, 2, 3, 4]),
        (FLOW, FLOW[:-1], [0, 1, 2, 3, 4]),
        (FLOW, [s * (1 + 5e-5) for s in FLOW[:-1]], [0, 1, 2, 3, 4]),
        (FLOW, [s * (1 - 5e-5) for s in FLOW[:-1]], [0, 1, 2, 3, 4]),
        (SCHEDULE, [10.0, 7.1, 6.9, 0.21, 0.1], [0, 0, 1, 3, 4]),
        (SCHEDULE, [20.0, 14.7], [0, 0]),
        (SCHEDULE, [1e-3, 0.0], [4, 4]),
        (FLOW[2:], [0.6, 0.5, 0.4, 0.2], [0, 0, 1, 2]),
        (FLOW[:3], [1.0, 0.8, 0.7, 0.6], [0, 1, 1, 1]),
        ([1.0, 0.0], [1.0, 0.5, 0.0], [0, 0, 0]),
        ([1.0], [1.0], [0]),
        ([], [0.7], [0]),
        ([0.0, 0.0], [0.0, float("nan"), float("inf")], [0, 0, 0]),
        (linear(4), [1.0, 0.5, 1.0, 0.25], [0, 2, 0, 3]),
    ],
    ids=[
        "euler",
        "flow",
        "rounded up",
        "rounded down",
        "between levels",
        "above the first",
        "at the end",
        "slice that starts late",
        "slice that ends with noise",
        "one step",
        "no step",
        "no schedule",
        "no numbers",
        "goes back",
    ],
)
def test_levels(sigmas, evaluated, steps):
    """Where levels are the schedule's or between two of it, they alone tell the step."""
    assert followed(sigmas, evaluated) == steps


SCHEDULES = {"linear": linear(20), "shifted": shifted(20), "many": shifted(50, 12.0), "sde": [*SCHEDULE]}
FACTORS = [0.8, 0.98, 0.995, 1.0, 1.005, 1.1, 2**0.5]


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("sigmas", SCHEDULES.values(), ids=SCHEDULES)
def test_levels_that_are_off_by_a_factor(sigmas, factor):
    """Less than there is (more detail), or more (s_churn): every evaluation is of the next step."""
    assert followed(sigmas, [factor * s for s in sigmas[:-1]]) == [*range(len(sigmas) - 1)]


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("sigmas", SCHEDULES.values(), ids=SCHEDULES)
def test_correctors_at_the_next_level(sigmas, factor):
    """Heun, all levels off: a step begins with its corrector."""
    n = len(sigmas) - 1
    evaluated = [sigmas[0], *(s for s in sigmas[1:-1] for _ in range(2))]
    expected = [0, *(step for step in range(1, n) for _ in range(2))]
    assert followed(sigmas, [factor * s for s in evaluated]) == expected


@pytest.mark.parametrize("factor", [1.0, 1.07, 2**0.5])
@pytest.mark.parametrize("sigmas", SCHEDULES.values(), ids=SCHEDULES)
def test_correctors_after_churn(sigmas, factor):
    """Heun with s_churn: noise is added before the first evaluation of a step, not before the second."""
    evaluated = [x for now, then in pairwise(sigmas[:-1]) for x in (factor * now, then)]
    n = len(sigmas) - 1
    expected = [step for i in range(n - 1) for step in (i, i + 1)]
    assert followed(sigmas, [*evaluated, factor * sigmas[-2]]) == [*expected, n - 1]


@pytest.mark.parametrize("sigmas", SCHEDULES.values(), ids=SCHEDULES)
def test_halfway_evaluations(sigmas):
    """They belong to the step that they are halfway of, the last one too."""
    evaluated = [x for now, then in pairwise(sigmas) for x in (now, (now + then) / 2)]
    assert followed(sigmas, evaluated) == [i for i in range(len(sigmas) - 1) for _ in range(2)]


@pytest.mark.parametrize("change", [0.98, 0.9])
@pytest.mark.parametrize("sigmas", SCHEDULES.values(), ids=SCHEDULES)
def test_less_is_told_in_the_middle_of_a_run(sigmas, change):
    """The nodes that do so leave the first and the last steps alone; no step is passed over."""
    n = len(sigmas) - 1
    evaluated = [s * (change if n // 5 <= i < n - n // 5 else 1) for i, s in enumerate(sigmas[:-1])]
    assert followed(sigmas, evaluated) == [*range(n)]


@pytest.mark.parametrize(
    ("sigmas", "steps"),
    [
        ([1.0, 1.0, 0.75, 0.5, 0.0], [0, 1, 2, 3]),
        ([1.0, 1.0, 1.0, 0.5, 0.5, 0.0], [0, 1, 2, 3, 4]),
        ([0.9, 0.4, 0.4, 0.4], [0, 1, 2]),
    ],
)
def test_levels_that_come_twice(sigmas, steps):
    """Schedules that repeat a level: in the order of evaluations."""
    assert followed(sigmas, sigmas[:-1]) == steps


def test_a_schedule_that_rises():
    """Noise is added again in the middle of it."""
    sigmas = [1.0, 0.5, 0.8, 0.5, 0.3, 0.0]
    assert followed(sigmas, sigmas[:-1]) == [0, 1, 2, 3, 4]
    assert followed(sigmas, [1.0, 0.5, 0.5, 0.8, 0.8, 0.5, 0.5]) == [0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("factor", [1.0, 0.98])
@pytest.mark.parametrize("sigmas", SCHEDULES.values(), ids=SCHEDULES)
def test_samplers_that_go_back(sigmas, factor):
    """Restarts: from some step they return to an earlier level, go down by fewer levels, and go on."""
    n = len(sigmas) - 1
    down, again, rest = range(n - 1), (1, 3), range(n - 1, n)
    order = [*down, *again, *rest]
    assert followed(sigmas, [factor * sigmas[i] for i in order]) == order


@pytest.mark.parametrize("factor", [1.0, 0.98])
def test_evaluations_that_are_left_out(factor):
    """Caches of whole evaluations: the level tells how many steps have passed."""
    sigmas = shifted(20)
    order = [0, 1, 2, 5, 7, 8, 12, 19]
    assert followed(sigmas, [factor * sigmas[i] for i in order]) == order


def test_levels_of_the_samplers_own():
    """Adaptive samplers have no steps: those that end with the schedule's last level end in its last step."""
    for seed in range(50):
        draw = random.Random(seed)
        sigmas = shifted(draw.randint(1, 30))
        evaluated = [1.0, *sorted((draw.random() for _ in range(draw.randint(1, 40))), reverse=True)]
        steps = followed(sigmas, [*evaluated, 1e-3])
        assert steps[0] == 0 and steps == sorted(steps) and steps[-1] == len(sigmas) - 2
