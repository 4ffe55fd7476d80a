"""Random runs of the engine: whatever a sampler does and whatever fails, the render comes out.

`RANDOM_RUNS=20000 python -m pytest tests/unit/test_random_runs.py` draws more of them. A failure names its
seed: `draw(seed)` is that run again.
"""

import contextlib
import os
import random

import pytest
import torch
from fgattn import InvalidArgument, Settings, TokenLayout
from fgattn.backends import execute
from fgattn.outcomes import Outcome, Reason
from fgattn.runs import engine as engine_module
from fgattn.runs.engine import Engine
from fgattn.runs.run import Run
from fgattn.runs.stats import RunStats
from fgattn.runs.watch import Watch
from fgattn.settings import TILE_KEYS, TILE_QUERIES, Policy
from fgattn.show.chart import draw as draw_chart
from fgattn.show.snapshot import snapshot
from fgattn.show.text import text
from makers import tensors

RUNS, EACH = int(os.environ.get("RANDOM_RUNS", 500)), 50
GRIDS = ((2, 4, 8), (3, 5, 7), (1, 6, 11), (5, 3, 4))
SHAPES = {grid: tensors(2, grid[0] * grid[1] * grid[2]) for grid in GRIDS}
ERRORS = (
    RuntimeError,
    ValueError,
    KeyError,
    MemoryError,
    torch.OutOfMemoryError,
    AssertionError,
    InvalidArgument,
)
PLACES = {  # what can fail, by where it is looked up
    "plan": (execute, "plan_of"),
    "attend": (execute, "attend"),
    "allocate": (engine_module, "empty_like"),
    "count": (RunStats, "add_plan"),
    "time": (RunStats, "timed"),
    "watch sparse calls": (Watch, "sparse"),
    "watch dense calls": (Watch, "dense"),
    "read": (RunStats, "so_far"),
    "decide": (Run, "dense_by_policy"),
}


class Interrupted(BaseException):
    """ComfyUI's interruption, which must get through."""


class ModelFailed(Exception):
    """The model's own error, of which the render dies with or without us."""


def error_of(r, kind):
    return kind("what", 1, "2", "remedy") if kind is InvalidArgument else kind("at random")


def failing(monkeypatch, r, shares):
    """Have each of these places fail in its share of the calls."""
    for name, share in shares.items():
        holder, attribute = PLACES[name]
        real = getattr(holder, attribute)

        def maybe(*args, _real=real, _share=share, **kwargs):
            if r.random() < _share:
                raise error_of(r, r.choice((*ERRORS, Interrupted)))
            return _real(*args, **kwargs)

        monkeypatch.setattr(holder, attribute, maybe)


def schedule(r):
    """Noise levels: falling, with levels that repeat, that rise in between, that end above zero, or none."""
    steps = r.choice((0, 1, 2, 4, 7, 12))
    levels = [1.0 - i / max(1, steps) for i in range(steps + 1)]
    if r.random() < 0.2 and steps > 1:
        levels[1] = levels[0]
    if r.random() < 0.1:
        r.shuffle(levels)
    if r.random() < 0.2:
        levels = levels[:-1]
    return levels


def evaluations(r, levels):
    """The levels at which a sampler evaluates: once or more a step, a little off, churned, and going back."""
    off = r.choice((1.0, 1.0, 0.98, 1.003))
    for i, level in enumerate(levels[:-1]):
        for _ in range(r.choice((1, 1, 1, 2, 3))):
            yield level * off * (1 + r.choice((0, 0, 0, 0.2)) * r.random())
        if r.random() < 0.1:
            yield levels[r.randrange(i + 1)]


def one_call(r, one, grid):
    """A call as some model makes it, and its dense output; also nonsense that a model might hand over."""
    q, k, v = SHAPES[grid]
    layout, block = TokenLayout(grid), r.choice((0, 1, 1, 2, None))
    kind = r.choice(("video",) * 40 + ("text", "short", "grouped", "half", "not finite") * 4 + ("broken",))
    if kind == "text":
        k = v = k[:, :, :7]
        layout = TokenLayout((1, 1, 7), query_start=None)
    elif kind == "short":
        q, k, v, layout = q[:, :, :3], k[:, :, :3], v[:, :, :3], TokenLayout.flat(3)
    elif kind == "grouped":
        k, v = k[:, :1], v[:, :1]
    elif kind == "half":
        q, k, v = (x.half() for x in (q, k, v))
    elif kind == "broken":
        layout = TokenLayout((grid[0] + 1, *grid[1:]))
    elif kind == "not finite":
        q = q.clone()
        q[0, 0, 0] = torch.inf
    expected = torch.full_like(q, 7.0)

    def dense():
        if r.random() < 0.002:
            raise ModelFailed
        return expected

    branch = r.choice(("cond", "uncond", None))
    out = one.attention(q, k, v, layout=layout, dense=dense, block=block, branch=branch)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert out is expected or kind == "not finite" or out.isfinite().all()


def run_of(seed, monkeypatch):
    """One run, with what it must keep to: its sparse calls, whether it failed, whether it was ended."""
    r = random.Random(seed)
    shares = {name: r.choice((0.005, 0.05, 0.5)) for name in PLACES if r.random() < 0.15}
    failing(monkeypatch, r, shares)

    def tell(said):
        if r.random() < 0.5:
            raise ConnectionError(said)

    settings = Settings(
        threshold=r.choice((0.0, 1.0, 3.0)),
        tile_queries=r.choice(TILE_QUERIES),
        tile_keys=r.choice(TILE_KEYS),
        tail=r.random() < 0.7,
    )
    policy = Policy(
        warmup_steps=r.choice((0, 0, 1, 5)),
        final_dense_steps=r.choice((0, 0, 1)),
        reuse_steps=r.choice((1, 1, 2, 3)),
        estimate_error=r.random() < 0.5,
        min_tokens=r.choice((0, 0, 50)),
    )
    one = Engine(settings, policy, passthrough=(Interrupted,), notify=tell)
    one.watch_tile("map", (0, 0, 0))
    levels, grid, calls, ended = schedule(r), r.choice(GRIDS), 0, None
    one.begin_run(levels, r.random() < 0.8, torch.device("cpu"))
    with contextlib.suppress(Interrupted, ModelFailed):
        for level in evaluations(r, levels):
            one.begin_evaluation(level)
            for _ in range(r.randint(1, 4)):
                calls += 1
                one_call(r, one, grid)
            if r.random() < 0.1:
                with contextlib.suppress(InvalidArgument):
                    one.move(r.choice((0.5, 2.0, -1.0, float("nan"))), r.choice((0, 1, 9)))
            if r.random() < 0.1:
                with contextlib.suppress(*ERRORS):  # the page asks; its route answers with the error
                    one.so_far()
        ended = True
    report = one.end_run()
    assert one.run is None and one.end_run() is None
    assert calls - sum(report.calls.values()) in ((0,) if ended else (0, 1))
    assert report.calls.get(Reason(Outcome.SPARSE), 0) == sum(report.plans.values() or [0]) or shares
    assert report.density is None or 0 <= report.density <= 1
    assert all(s.total >= 0 and s.attention >= 0 for s in report.steps)
    assert text(report) and snapshot(report, "1", "run", "done")
    if seed % 25 == 0:
        assert draw_chart([("run", report)]).size
    return report.count(Outcome.SPARSE), report.failure is not None, not ended


@pytest.mark.parametrize("first", range(0, RUNS, EACH))
def test_the_render_comes_out(first, monkeypatch, caplog):
    """No error of ours reaches the model, outputs are finite where dense ones are, and the books add up."""
    runs = []
    for seed in range(first, min(first + EACH, RUNS)):
        with monkeypatch.context() as patch:
            try:
                runs.append(run_of(seed, patch))
            except Exception as error:
                raise AssertionError(f"seed {seed}") from error
    sparse, failed, ended = zip(*runs, strict=True)
    assert sum(sparse) > EACH and any(failed) and any(ended), "runs must be of all kinds"
