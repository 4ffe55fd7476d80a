"""Engine: which calls run dense and why, what happens on failure, and what the books say."""

import contextlib
import logging

import pytest
import torch
from fgattn import Settings, TokenLayout, attend, build_plan
from fgattn.engine import Engine, step_of
from fgattn.settings import Policy
from makers import tensors

CPU = torch.device("cpu")
LAYOUT = TokenLayout((4, 4, 8))  # 128 tokens
SETTINGS = Settings(2.0, 64, 4)
Q, K, V = tensors(2, 128)
DENSE = torch.full_like(Q, 7.0)  # the mark of the dense callable


def falling(steps, last=0.0):
    return [1.0 - (1.0 - last) * i / steps for i in range(steps + 1)]


def engine(policy=None, **options):
    return Engine(SETTINGS, policy or Policy(warmup_steps=0), **options)


def call(one, q=Q, k=K, v=V, layout=LAYOUT, block=0, **options):
    """Whether one attention call ran sparse."""
    out = one.attention(q, k, v, layout=layout, dense=lambda: DENSE, block=block, **options)
    return out is not DENSE


def ran_sparse(one, sigmas, full_noise=True, evaluations=None, blocks=(0,)):
    """Evaluate at every scheduled level (or the ones given); per evaluation, whether it ran sparse."""
    one.begin_run(sigmas, full_noise, CPU)
    result = []
    for sigma in sigmas[:-1] if evaluations is None else evaluations:
        one.begin_evaluation(sigma)
        result.append(all([call(one, block=b) for b in blocks]))
    return result


@pytest.mark.parametrize(("steps", "wanted", "dense"), [
    (20, 2, 2), (20, 5, 5), (20, 8, 5), (8, 2, 2), (8, 3, 2), (7, 2, 1), (4, 2, 1), (3, 2, 0), (1, 2, 0),
    (20, 0, 0)], ids=lambda x: str(x))
def test_warm_up_is_at_most_a_quarter(steps, wanted, dense):
    """Few-step models would otherwise never run sparse."""
    one = engine(Policy(warmup_steps=wanted))
    assert ran_sparse(one, falling(steps)) == [False] * dense + [True] * (steps - dense)
    report = one.end_run()
    assert report.calls == {k: n for k, n in (("warm-up step", dense), ("sparse", steps - dense)) if n}
    assert f"warm-up {dense} of {steps} steps" in report.settings


def test_no_warm_up_below_full_noise():
    """Image to video at half strength, or the second model of a pair: the layout is already there."""
    one = engine(Policy(warmup_steps=2))
    assert ran_sparse(one, falling(8), full_noise=False) == [True] * 8


@pytest.mark.parametrize(("wanted", "last", "dense"), [(2, 0.0, 2), (0, 0.0, 0), (2, 0.3, 0), (9, 0.0, 8)],
                         ids=["two", "none", "a slice that ends with noise", "more than there are"])
def test_final_steps(wanted, last, dense):
    """Only a run that ends without noise has final steps."""
    one = engine(Policy(warmup_steps=0, final_dense_steps=wanted))
    assert ran_sparse(one, falling(8, last)) == [True] * (8 - dense) + [False] * dense
    assert one.end_run().calls.get("final dense step", 0) == dense


def test_dense_blocks():
    """Blocks named by the user stay dense, unknown ones run sparse."""
    one = engine(Policy(0, 0, frozenset({0, 2})))
    one.begin_run(falling(4), True, CPU)
    one.begin_evaluation(1.0)
    assert [call(one, block=b) for b in (0, 1, 2, 3, None)] == [False, True, False, True, True]
    report = one.end_run()
    assert report.calls == {"dense block": 2, "sparse": 3}
    assert [b.block for b in report.blocks] == [-1, 1, 3]


@pytest.mark.parametrize(("minimum", "sparse"), [(0, True), (128, True), (129, False)])
def test_min_tokens(minimum, sparse):
    """Short sequences gain nothing."""
    one = engine(Policy(0, min_tokens=minimum))
    one.begin_run(falling(4), True, CPU)
    one.begin_evaluation(1.0)
    assert call(one) == sparse
    assert one.end_run().calls == {"sparse" if sparse else f"fewer than {minimum} tokens": 1}


def test_calls_that_cannot_run_sparse_go_dense_with_a_reason():
    """Counted under the reason, never an error."""
    one = engine()
    one.begin_run(falling(4), True, CPU)
    one.begin_evaluation(1.0)
    assert not call(one, k=K[:, :1], v=V[:, :1])
    one.decline("cross-attention")
    one.decline("cross-attention")
    report = one.end_run()
    assert report.calls == {"grouped heads (2 query heads, 1 key heads)": 1, "cross-attention": 2}
    assert report.error is None and report.density is None and report.tokens == 0


def test_outside_a_run_everything_is_dense():
    """Another node may call the patched model without sampling."""
    one = engine()
    assert not call(one)
    one.begin_evaluation(1.0)
    one.decline("cross-attention")
    assert one.end_run() is None
    assert ran_sparse(one, falling(2)) == [True, True]
    first = one.end_run()
    assert not call(one)
    assert one.end_run() is first and one.last_report is first


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("stage", ["build_plan", "attend"])
def test_failure_turns_the_run_dense(stage, monkeypatch, caplog):
    """A failure while sampling: said once, dense for the rest of the run, sparse again in the next."""
    notes = []
    one = engine(notify=notes.append)
    one.begin_run(falling(4), True, CPU)
    one.begin_evaluation(1.0)
    assert call(one)
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR, "fgattn"):
        def fail(*_, **__):
            raise RuntimeError("no kernel image")

        patch.setattr(f"fgattn.engine.{stage}", fail)
        for sigma in (0.75, 0.5, 0.25):
            one.begin_evaluation(sigma)
            assert not call(one) and not call(one)
    assert notes == ["dense: RuntimeError: no kernel image"]
    (record,) = caplog.records
    assert record.exc_info and record.getMessage() == "FG-Attn failed; the rest of this run is dense"
    report = one.end_run()
    assert report.calls == {"sparse": 1, "error": 1, "after an error": 5}
    assert report.error == "RuntimeError: no kernel image"
    assert ran_sparse(one, falling(2)) == [True, True] and one.end_run().error is None


def test_layout_that_does_not_fit_turns_the_run_dense(caplog):
    """A model adapter that miscounts tokens must not end the render either."""
    one = engine()
    one.begin_run(falling(4), True, CPU)
    one.begin_evaluation(1.0)
    assert not call(one, layout=TokenLayout((4, 4, 7)))
    assert "layout.length: got 112" in one.end_run().error and caplog.records


def test_interrupts_pass(monkeypatch, caplog):
    """The user's Cancel is no failure."""
    def interrupt(*_, **__):
        raise Interrupt

    notes = []
    one = engine(passthrough=(Interrupt,), notify=notes.append)
    one.begin_run(falling(4), True, CPU)
    monkeypatch.setattr("fgattn.engine.attend", interrupt)
    with pytest.raises(Interrupt):
        call(one)
    assert not notes and not caplog.records
    assert one.end_run().error is None


def test_dense_failures_are_not_ours():
    """What the model's own attention raises reaches the caller."""
    one = engine(Policy(warmup_steps=1))
    one.begin_run(falling(8), True, CPU)

    def fail():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        one.attention(Q, K, V, layout=LAYOUT, dense=fail)
    assert one.end_run().error is None


def test_everything_that_allocates_is_in_scope():
    """ComfyUI counts allocations inside this scope only."""
    depth, seen = 0, []

    @contextlib.contextmanager
    def scope():
        nonlocal depth
        depth += 1
        yield
        depth -= 1

    one = engine(scope=scope)
    one.begin_run(falling(4), True, CPU)
    one.begin_evaluation(1.0)
    build = build_plan

    def watched(*args, **options):
        seen.append(depth)
        return build(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fgattn.engine.build_plan", watched)
        assert call(one)
        one.attention(Q, K[:, :1], V[:, :1], layout=LAYOUT, dense=lambda: seen.append(depth))
    assert seen == [1, 0] and depth == 0


@pytest.mark.parametrize("scale", [None, 0.3])
def test_sparse_output_is_that_of_the_library(scale):
    """The engine adds nothing to the numbers."""
    one = engine()
    one.begin_run(falling(2), True, CPU)
    plan = build_plan(Q, K, SETTINGS, LAYOUT, scale=scale)
    out = one.attention(Q, K, V, layout=LAYOUT, dense=lambda: DENSE, scale=scale)
    assert torch.equal(out, attend(Q, K, V, plan))


def test_densities_in_the_report_are_those_of_the_plans():
    """The numbers on the node, per block and over all, weighted by scores."""
    one = engine()
    one.begin_run(falling(2), True, CPU)
    plans = {0: [], 3: []}
    for sigma in (1.0, 0.5):
        one.begin_evaluation(sigma)
        for block, length in ((0, 128), (3, 128), (3, 64)):
            q, k, v = tensors(2, length, seed=block + int(10 * sigma) + length)
            layout = TokenLayout((length // 32, 4, 8))
            assert call(one, q, k, v, layout, block)
            plans[block].append(build_plan(q, k, SETTINGS, layout))
    report = one.end_run()

    def share(made, name):
        return sum(getattr(p, name).sum().item() for p in made) / sum(2 * p.queries * p.keys for p in made)

    for block in report.blocks:
        assert block.density == pytest.approx(share(plans[block.block], "requested"), abs=1e-12)
        assert block.executed_density == pytest.approx(share(plans[block.block], "executed"), abs=1e-12)
    every = plans[0] + plans[3]
    assert report.density == pytest.approx(share(every, "requested"), abs=1e-12)
    assert report.executed_density == pytest.approx(share(every, "executed"), abs=1e-12)
    assert 0 < report.density < 1 and report.blocks[0].density != report.blocks[1].density


def test_report_counts_steps_and_calls():
    """Two evaluations a step (cfg), two blocks: books per step."""
    one = engine(Policy(warmup_steps=1))
    sigmas = falling(4)
    assert ran_sparse(one, sigmas, evaluations=[s for s in sigmas[:-1] for _ in range(2)], blocks=(0, 1)) == [
        False, False, True, True, True, True, True, True]
    report = one.end_run()
    assert [(s.index, s.sparse_calls, s.dense_calls) for s in report.steps] == [
        (0, 0, 4), (1, 4, 0), (2, 4, 0), (3, 4, 0)]
    assert report.calls == {"warm-up step": 4, "sparse": 12}
    assert report.tokens == 128 and report.device == "cpu" and report.implementation == "torch"
    assert report.settings == "threshold 2, tiles 64x4, cells order, tail on, warm-up 1 of 4 steps"
    assert report.steps[0].planning == 0 and all(s.planning > 0 for s in report.steps[1:])
    assert report.planning == pytest.approx(sum(s.planning for s in report.steps))
    assert report.speedup == pytest.approx(report.dense_call / report.sparse_call)
    assert report.total >= sum(s.attention + s.planning for s in report.steps)
    assert report.peak_memory is None


def test_engines_are_independent():
    """Two patched models in one graph (high and low noise) keep their own books and errors."""
    first, second = engine(Policy(warmup_steps=2)), engine(Policy(0, 0, frozenset({0})))
    first.begin_run(falling(8), True, CPU)
    second.begin_run(falling(4), True, CPU)
    for one in (first, second):
        one.begin_evaluation(0.5)
    assert call(first) and not call(second) and call(first)
    assert not call(first, layout=TokenLayout((1, 1, 1)))
    assert call(second, block=1)
    assert second.end_run().calls == {"dense block": 1, "sparse": 1}
    assert first.end_run().calls == {"sparse": 2, "error": 1}
    assert second.last_report.error is None


def test_device_without_a_kernel_runs_dense(caplog):
    """Said once per run, counted under the reason."""
    one = engine()
    with caplog.at_level(logging.WARNING, "fgattn"):
        one.begin_run(falling(4), True, torch.device("meta"))
        one.begin_evaluation(1.0)
        assert not call(one) and not call(one)
    assert [r.getMessage() for r in caplog.records] == [
        "FG-Attn runs dense: no sparse kernel for device type meta"]
    report = one.end_run()
    assert report.calls == {"no sparse kernel for device type meta": 2}
    assert report.implementation == "dense (no sparse kernel for device type meta)"


def test_empty_schedule():
    """A sampler that is called with no schedule at all."""
    one = engine(Policy(2, 2))
    one.begin_run([], True, CPU)
    one.begin_evaluation(0.7)
    assert call(one)
    assert one.end_run().calls == {"sparse": 1}


SCHEDULE = [14.6, 7.0, 3.0, 1.0, 0.2, 0.0]
FLOW = falling(5)


@pytest.mark.parametrize(("sigmas", "evaluated", "steps"), [
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
], ids=["euler", "flow", "rounded up", "rounded down", "between levels", "above the first", "at the end",
        "slice that starts late", "slice that ends with noise", "one step", "no step"])
def test_step_of(sigmas, evaluated, steps):
    """The step that an evaluation belongs to, from its noise level alone."""
    assert [step_of(s, sigmas) for s in evaluated] == steps


def test_heun_and_correctors_belong_to_their_steps():
    """Second evaluations: at the next level (heun) they count there, between levels where they began."""
    one = engine(Policy(warmup_steps=1))
    sigmas = falling(4)
    heun = [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]
    assert ran_sparse(one, sigmas, evaluations=heun) == [False] + [True] * 6
    assert [s.index for s in one.end_run().steps] == [0, 1, 2, 3]
    midpoint = [1.0, 0.87, 0.75, 0.61, 0.5, 0.35, 0.25, 0.1]
    assert ran_sparse(one, sigmas, evaluations=midpoint) == [False, False] + [True] * 6
    assert [s.dense_calls + s.sparse_calls for s in one.end_run().steps] == [2, 2, 2, 2]


def test_sampler_that_goes_back():
    """Restart samplers add noise again: the step follows the level, in either direction."""
    one = engine(Policy(warmup_steps=1))
    assert ran_sparse(one, falling(4), evaluations=[1.0, 0.5, 1.0, 0.25]) == [False, True, False, True]
