"""Engine: which calls run dense and why, what happens on failure, and what the books say."""

import contextlib
import dataclasses
import gc
import logging
import weakref

import pytest
import torch
from fgattn import InvalidArgument, Settings, TokenLayout, attend, build_plan
from fgattn.backends import execute
from fgattn.backends.execute import plan_of
from fgattn.call import Call
from fgattn.outcomes import Outcome, Reason
from fgattn.runs.engine import SHORT_OF_MEMORY, Engine
from fgattn.runs.run import Run
from fgattn.settings import Policy
from fgattn.show.text import describe, headline
from fgattn.tensors import empty_like
from makers import FULL, by_text, tensors

CPU = torch.device("cpu")
LAYOUT = TokenLayout((4, 4, 8))  # 128 tokens
SETTINGS = Settings(threshold=2.0, tile_queries=64, tile_keys=4)
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


@pytest.mark.parametrize(
    ("steps", "wanted", "dense"),
    [
        (20, 2, 2),
        (20, 5, 5),
        (20, 8, 5),
        (8, 2, 2),
        (8, 3, 2),
        (7, 2, 1),
        (4, 2, 1),
        (3, 2, 0),
        (1, 2, 0),
        (20, 0, 0),
    ],
    ids=lambda x: str(x),
)
def test_warm_up_is_at_most_a_quarter(steps, wanted, dense):
    """Few-step models would otherwise never run sparse."""
    one = engine(Policy(warmup_steps=wanted))
    assert ran_sparse(one, falling(steps)) == [False] * dense + [True] * (steps - dense)
    report = one.end_run()
    assert by_text(report) == {k: n for k, n in (("warm-up step", dense), ("sparse", steps - dense)) if n}
    assert f"warm-up {dense} of {steps} steps" in describe(report.settings)


def test_sliders_moved_act_from_the_next_step():
    """Not on the step that runs; the report has all values, the next run has the engine's own."""
    one = engine(Policy(warmup_steps=1))
    sigmas = falling(8)
    one.begin_run(sigmas, True, CPU)
    ran = []
    for step, sigma in enumerate(sigmas[:-1]):
        one.begin_evaluation(sigma)
        ran.append(call(one))
        if step == 2:
            assert one.move(2.0, 50)  # a slider passes many values: the last one counts, capped at a quarter
            assert one.move(0.0, 9)
        ran.append(call(one))
    report = one.end_run()
    assert ran == [False] * 2 + [True] * 14
    assert report.sliders == ((0, 2.0, 1), (3, 0.0, 9))
    assert [s.warmup for s in report.steps] == [True] + [False] * 7
    assert "warm-up 1 of 8 steps, moved to threshold 0 and warm-up 9" in describe(report.settings)
    assert report.density > 0.6  # 0 keeps everything, in five of seven sparse steps
    assert not one.move(1.0, 1)
    ran_sparse(one, sigmas)
    assert one.end_run().sliders == ((0, 2.0, 1),)


@pytest.mark.parametrize(
    ("moves", "words"),
    [
        ([(1.5, 0)], ", moved to threshold 1.5"),
        ([(2.0, 3)], ", moved to warm-up 3"),
        ([(1.5, 3)], ", moved to threshold 1.5 and warm-up 3"),
        ([(1.5, 0), (2.0, 0)], ", moved to and fro"),
        ([(2.0, 0)], "of 4 steps"),
    ],
)
def test_moves_in_words(moves, words):
    """The last position of what moved."""
    one = engine()
    one.begin_run(falling(4), True, CPU)
    for move, sigma in zip([*moves, *moves[-1:] * 4], falling(4)[:-1], strict=False):
        one.begin_evaluation(sigma)
        one.move(*move)
    assert describe(one.end_run().settings).endswith(words)


def test_a_longer_warm_up_makes_coming_steps_dense():
    """And a shorter one ends it."""
    one = engine(Policy(warmup_steps=1))
    sigmas = falling(16)
    one.begin_run(sigmas, True, CPU)
    ran = []
    for step, sigma in enumerate(sigmas[:-1]):
        one.begin_evaluation(sigma)
        ran.append(call(one))
        one.move(2.0, {1: 4, 2: 0}.get(step, 1 if step < 1 else 4 if step < 2 else 0))
    assert ran == [False, True, False] + [True] * 13
    assert [s.warmup for s in one.end_run().steps][:4] == [True, False, True, False]


def test_a_moved_run_can_be_repeated():
    """The values of the report, set at its steps, give the same output bit by bit."""

    def run(moves):
        one, outputs, sigmas = engine(), [], falling(6)
        one.begin_run(sigmas, True, CPU)
        for step, sigma in enumerate(sigmas[:-1]):
            if step in moves:
                one.move(*moves[step])
            one.begin_evaluation(sigma)
            outputs.append(one.attention(Q, K, V, layout=LAYOUT, dense=lambda: DENSE, block=0))
        return torch.stack(outputs), one.end_run()

    wanted, report = run({2: (0.5, 0), 4: (4.0, 3)})
    again, _ = run({step: values for step, *values in report.sliders})
    assert torch.equal(wanted, again) and len({float(o.sum()) for o in wanted}) == 3


def test_a_moved_threshold_drops_kept_plans():
    """They were made with the old one; a moved warm-up leaves them."""
    one = engine(Policy(warmup_steps=0, reuse_steps=8))
    sigmas = falling(4)
    one.begin_run(sigmas, True, CPU)
    for sigma, move in zip(sigmas[:-1], ((2.0, 5), (0.5, 5), (0.5, 5), (0.5, 5)), strict=True):
        one.begin_evaluation(sigma)
        call(one)
        one.move(*move)
    report = one.end_run()
    assert report.plans == {"made": 2, "reused": 2}
    assert [step.planning > 0 for step in report.steps] == [True, False, True, False]


def test_a_move_is_not_lost():
    """The page's moves come from another thread, at any time: here while the step takes the one before."""

    class Racing(Run):
        @property
        def moved(self):
            value = self.__dict__["moved"]
            reads.append(value)
            if len(reads) == 2:  # the first one is to see whether there is a move
                assert one.move(5.0, 0)
            return value

        @moved.setter
        def moved(self, value):
            self.__dict__["moved"] = value

    one, reads = engine(), []
    one.begin_run(falling(4), True, CPU)
    one.run.__class__ = Racing
    one.move(0.5, 0)
    for sigma in falling(4)[:-1]:
        one.begin_evaluation(sigma)
        call(one)
    assert [threshold for _, threshold, _ in one.end_run().sliders] == [2.0, 0.5, 5.0]


@pytest.mark.parametrize(
    "values",
    [
        (-1.0, 2),
        (float("nan"), 2),
        (float("inf"), 2),
        ("1", 2),
        (None, 2),
        (True, 2),
        (1.0, -1),
        (1.0, 1.5),
        (1.0, True),
        (1.0, None),
    ],
    ids=str,
)
def test_wrong_moves_are_refused(values):
    """By the rules of the settings; the run goes on as it was."""
    one = engine()
    one.begin_run(falling(4), True, CPU)
    with pytest.raises(InvalidArgument):
        one.move(*values)
    one.begin_evaluation(1.0)
    assert call(one) and len(one.end_run().sliders) == 1


def test_no_warm_up_below_full_noise():
    """Image to video at half strength, or the second model of a pair: the layout is already there."""
    one = engine(Policy(warmup_steps=2))
    assert ran_sparse(one, falling(8), full_noise=False) == [True] * 8


@pytest.mark.parametrize(
    ("wanted", "last", "dense"),
    [(2, 0.0, 2), (0, 0.0, 0), (2, 0.3, 0), (9, 0.0, 8)],
    ids=["two", "none", "a slice that ends with noise", "more than there are"],
)
def test_final_steps(wanted, last, dense):
    """Only a run that ends without noise has final steps."""
    one = engine(Policy(warmup_steps=0, final_dense_steps=wanted))
    assert ran_sparse(one, falling(8, last)) == [True] * (8 - dense) + [False] * dense
    assert by_text(one.end_run()).get("final dense step", 0) == dense


def test_dense_blocks():
    """Blocks named by the user stay dense, unknown ones run sparse."""
    one = engine(Policy(warmup_steps=0, final_dense_steps=0, dense_blocks=frozenset({0, 2})))
    one.begin_run(falling(4), True, CPU)
    one.begin_evaluation(1.0)
    assert [call(one, block=b) for b in (0, 1, 2, 3, None)] == [False, True, False, True, True]
    report = one.end_run()
    assert by_text(report) == {"listed in dense_blocks": 2, "sparse": 3}
    assert [b.block for b in report.blocks] == [-1, 1, 3]


@pytest.mark.parametrize(
    ("seen", "remark"),
    [
        ((0, 1, 2), None),
        ((0, 1), "dense_blocks: this model has no block 2"),
        ((None,), "dense_blocks has no effect: this model does not number its blocks"),
    ],
    ids=repr,
)
def test_dense_blocks_that_are_not_there(seen, remark):
    """A slip in the block list is said, but not of a run that was stopped before all blocks were seen."""
    for evaluations in (4, 1):
        one = engine(Policy(warmup_steps=0, final_dense_steps=0, dense_blocks=frozenset({0, 2})))
        ran_sparse(one, falling(4), evaluations=falling(4)[:evaluations], blocks=seen)
        assert [*one.end_run().remarks] == ([remark] if remark and evaluations == 4 else [])


@pytest.mark.parametrize("block", [-1, "0", 1.5, True, (0,), [0], 10**400], ids=lambda b: str(b)[:9])
def test_what_is_no_block_is_unknown(block):
    """The call runs sparse, and the report has it, beside calls of blocks that are numbers."""
    one = engine(Policy(warmup_steps=0, final_dense_steps=0, dense_blocks=frozenset({1, 2})))
    one.begin_run(falling(1), True, CPU)
    one.begin_evaluation(1.0)
    assert [call(one, block=b) for b in (0, block, 1)] == [True, True, False]
    report = one.end_run()
    assert [b.block for b in report.blocks] == [-1, 0] and not report.failure
    assert [*report.remarks] == ["dense_blocks: this model has no block 2"]


def test_a_short_sequence_is_counted():
    """The report says how many tokens were too few."""
    one = engine(Policy(warmup_steps=0, min_tokens=129))
    assert ran_sparse(one, falling(4)) == [False] * 4
    assert one.end_run().tokens == 128


@pytest.mark.parametrize(("minimum", "sparse"), [(0, True), (128, True), (129, False)])
def test_min_tokens(minimum, sparse):
    """Short sequences gain nothing."""
    one = engine(Policy(warmup_steps=0, min_tokens=minimum))
    one.begin_run(falling(4), True, CPU)
    one.begin_evaluation(1.0)
    assert call(one) == sparse
    assert by_text(one.end_run()) == {"sparse" if sparse else f"fewer than {minimum} tokens": 1}


def test_calls_that_cannot_run_sparse_go_dense_with_a_reason():
    """Counted under the reason, never an error."""
    one = engine()
    one.begin_run(falling(4), True, CPU)
    one.begin_evaluation(1.0)
    assert not call(one, k=K[:, :1], v=V[:, :1])
    one.decline(Reason(Outcome.CROSS_ATTENTION))
    one.decline(Reason(Outcome.CROSS_ATTENTION))
    report = one.end_run()
    assert by_text(report) == {"grouped heads (2 query heads, 1 key heads)": 1, "cross-attention": 2}
    assert report.failure is None and report.density is None and report.tokens == 128


def test_outside_a_run_everything_is_dense():
    """Another node may call the patched model without sampling."""
    one = engine()
    assert not call(one)
    one.begin_evaluation(1.0)
    one.decline(Reason(Outcome.CROSS_ATTENTION))
    assert one.end_run() is None
    assert ran_sparse(one, falling(2)) == [True, True]
    first = one.end_run()
    assert not call(one)
    assert one.end_run() is None and one.last_report is first


def test_a_run_that_cannot_start_has_no_report(monkeypatch):
    """Not that of the run before, which would be shown as its own."""
    one = engine()
    assert ran_sparse(one, falling(2)) == [True, True]
    one.end_run()
    monkeypatch.setattr("fgattn.runs.engine.Watch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        one.begin_run(falling(2), True, CPU)
    assert not call(one)
    assert one.end_run() is one.last_report is one.last_maps is None


class OnSecondGPU(torch.Tensor):
    device = torch.device("cuda", 1)


def test_a_second_gpu_runs_dense(monkeypatch):
    """The books, and the streams that are timed, are of the run's own GPU."""
    one = engine()
    one.begin_run(falling(4), True, CPU)
    one.begin_evaluation(1.0)
    one.run.stats.clock.device = torch.device("cuda", 0)

    def on_another(*given):
        return dataclasses.replace(to_plan(*given), q=OnSecondGPU(Q))

    to_plan = Call.to_plan
    monkeypatch.setattr(Call, "to_plan", on_another)
    assert not call(one)
    one.run.stats.clock.device = CPU  # there is no GPU that could time the end
    assert one.end_run().calls == {Reason(Outcome.OTHER_GPU): 1}


def test_absent_tokens_are_left_out():
    """No keys, zeros as queries, the others as with a mask over keys; in the maps and the estimate, too."""
    layout = TokenLayout((4, 4, 6), front=32, absent=tuple(range(20, 32)))
    there = torch.cat((torch.arange(20), torch.arange(32, 128)))
    one = Engine(
        Settings(threshold=0.0, tile_queries=16, tile_keys=16), Policy(warmup_steps=0, reuse_steps=2)
    )
    one.begin_run(falling(4), True, CPU)
    one.begin_evaluation(1.0)
    out = one.attention(Q, K, V, layout=layout, dense=lambda: DENSE, block=0)
    valid = torch.zeros(len(Q), 128, dtype=torch.bool)
    valid[:, there] = True
    masked = TokenLayout((4, 4, 6), front=32, key_valid=valid)
    expected = attend(
        Q, K, V, build_plan(Q, K, Settings(threshold=0.0, tile_queries=16, tile_keys=16), masked)
    )
    assert out.shape == Q.shape and not out[:, :, 20:32].any()
    assert torch.allclose(out[:, :, there], expected[:, :, there], atol=1e-5)
    report = one.end_run()
    assert by_text(report) == {"sparse": 1} and report.plans == {"made": 1} and not report.remarks
    assert report.estimated_error < 1e-5 and report.density == 1
    assert one.last_maps.find(-1, 0, 0)[1].keys(0).tolist() == valid[0].tolist()


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("stage", ["plan_of", "attend"])
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

        patch.setattr(f"fgattn.backends.execute.{stage}", fail)
        for sigma in (0.75, 0.5, 0.25):
            one.begin_evaluation(sigma)
            assert not call(one) and not call(one)
    assert notes == ["dense: RuntimeError: no kernel image"]
    (record,) = caplog.records
    assert record.exc_info and record.getMessage() == "FG-Attn failed; the rest of this run is dense"
    report = one.end_run()
    assert by_text(report) == {"sparse": 1, "error": 1, "after an error": 5}
    assert report.failure == "RuntimeError: no kernel image"
    assert ran_sparse(one, falling(2)) == [True, True] and one.end_run().failure is None


def test_layout_that_does_not_fit_turns_the_run_dense(caplog):
    """A model adapter that miscounts tokens must not end the render either."""
    one = engine()
    one.begin_run(falling(4), True, CPU)
    one.begin_evaluation(1.0)
    assert not call(one, layout=TokenLayout((4, 4, 7)))
    assert "layout.length: got 112" in one.end_run().failure and caplog.records


def test_interrupts_pass(monkeypatch, caplog):
    """The user's Cancel is no failure."""

    def interrupt(*_, **__):
        raise Interrupt

    notes = []
    one = engine(passthrough=(Interrupt,), notify=notes.append)
    one.begin_run(falling(4), True, CPU)
    monkeypatch.setattr("fgattn.backends.execute.attend", interrupt)
    with pytest.raises(Interrupt):
        call(one)
    assert not notes and not caplog.records
    assert one.end_run().failure is None


def failing(*_, **__):
    raise RuntimeError("out of luck")


@pytest.mark.parametrize("warmup_steps", [0, 1], ids=["sparse", "dense"])
def test_an_engine_that_cannot_tell_goes_on(warmup_steps, monkeypatch):
    """Who is told of a failure may fail, too; nor is a time that cannot be taken worth a render."""
    one = engine(Policy(warmup_steps=warmup_steps), notify=failing)
    one.begin_run(falling(8), True, CPU)
    one.begin_evaluation(1.0)
    monkeypatch.setattr("fgattn.runs.clock.Clock.mark", failing)
    assert not call(one) and not call(one)
    monkeypatch.undo()
    report = one.end_run()
    assert report.failure == "RuntimeError: out of luck" and sum(report.calls.values()) == 2


def test_what_is_guarded_costs_the_run_its_sparse_calls_only(caplog):
    """Said once, however often it fails; what must reach the caller does; without a run nothing happens."""
    one = engine(passthrough=(KeyError,))
    with one.guarded():
        failing()
    one.begin_run(falling(4), True, CPU)
    assert call(one)
    for _ in range(3):
        with one.guarded():
            failing()
    with pytest.raises(KeyError), one.guarded():
        raise KeyError
    assert not call(one) and len(caplog.records) == 1
    assert by_text(one.end_run()) == {"sparse": 1, "after an error": 1}
    assert ran_sparse(one, falling(2)) == [True, True]


def test_dense_failures_are_not_ours():
    """What the model's own attention raises reaches the caller."""
    one = engine(Policy(warmup_steps=1))
    one.begin_run(falling(8), True, CPU)

    def fail():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        one.attention(Q, K, V, layout=LAYOUT, dense=fail)
    assert one.end_run().failure is None


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
    build = plan_of

    def watched(*args, **options):
        seen.append(depth)
        return build(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fgattn.backends.execute.plan_of", watched)
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
        False,
        False,
        True,
        True,
        True,
        True,
        True,
        True,
    ]
    report = one.end_run()
    assert [(s.index, s.sparse_calls, s.dense_calls) for s in report.steps] == [
        (0, 0, 4),
        (1, 4, 0),
        (2, 4, 0),
        (3, 4, 0),
    ]
    assert by_text(report) == {"warm-up step": 4, "sparse": 12}
    assert report.tokens == 128 and report.device == "cpu" and report.implementation == "torch"
    assert describe(report.settings) == "threshold 2, tiles 64x4, cells order, tail on, warm-up 1 of 4 steps"
    assert report.steps[0].planning == 0 and all(s.planning > 0 for s in report.steps[1:])
    assert report.planning == pytest.approx(sum(s.planning for s in report.steps))
    assert report.speedup == pytest.approx(report.dense_call / report.sparse_call)
    assert report.total >= sum(s.attention + s.planning for s in report.steps)
    assert report.peak_memory is None


def test_engines_are_independent():
    """Two patched models in one graph (high and low noise) keep their own books and errors."""
    first, second = (
        engine(Policy(warmup_steps=2)),
        engine(Policy(warmup_steps=0, final_dense_steps=0, dense_blocks=frozenset({0}))),
    )
    first.begin_run(falling(8), True, CPU)
    second.begin_run(falling(4), True, CPU)
    for one in (first, second):
        one.begin_evaluation(0.5)
    assert call(first) and not call(second) and call(first)
    assert not call(first, layout=TokenLayout((1, 1, 1)))
    assert call(second, block=1)
    assert by_text(second.end_run()) == {"listed in dense_blocks": 1, "sparse": 1}
    assert by_text(first.end_run()) == {"sparse": 2, "error": 1}
    assert second.last_report.failure is None


def test_device_without_a_kernel_runs_dense(caplog):
    """Said once per run, counted under the reason."""
    one = engine()
    with caplog.at_level(logging.WARNING, "fgattn"):
        one.begin_run(falling(4), True, torch.device("meta"))
        one.begin_evaluation(1.0)
        assert not call(one) and not call(one)
    assert [r.getMessage() for r in caplog.records] == [
        "FG-Attn runs dense: no sparse kernel for device type meta"
    ]
    report = one.end_run()
    assert by_text(report) == {"no sparse kernel for device type meta": 2}
    assert report.implementation == "dense (no sparse kernel for device type meta)"


def test_an_empty_call_costs_no_maps():
    """There is nothing to look at; the calls that follow are looked at."""
    one = engine()
    one.begin_run(falling(1), True, CPU)
    one.begin_evaluation(1.0)
    for shape in ((0, 2, 256, 64), (1, 0, 256, 64), (1, 2, 0, 64)):
        q = torch.empty(shape)
        layout = TokenLayout((4, 8, 8) if shape[2] else (0, 8, 8))
        assert one.attention(q, q, q, layout=layout, dense=lambda: 1 / 0, block=0).shape == shape
    q = torch.randn(1, 2, 256, 64)
    one.attention(q, q, q, layout=TokenLayout((4, 8, 8)), dense=lambda: 1 / 0, block=0)
    report = one.end_run()
    assert by_text(report) == {"sparse": 4} and not report.remarks
    assert report.estimated_error is not None and list(one.last_maps.kept) == [(0, 0)]


def test_gradients_go_dense():
    """Nodes that train record gradients. ComfyUI samples in inference mode, whatever parameters require."""
    one, weight = engine(), torch.nn.Parameter(torch.ones(64))
    one.begin_run(falling(2), True, CPU)
    one.begin_evaluation(1.0)
    assert not call(one, q=Q * weight) and not call(one, v=V * weight)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert call(one, q=Q * weight, k=K * weight, v=V * weight)
    report = one.end_run()
    assert by_text(report) == {
        "gradients are wanted, and sparse attention has no backward pass": 2,
        "sparse": 2,
    }
    assert report.failure is None


def test_empty_schedule():
    """A sampler that is called with no schedule at all."""
    one = engine(Policy(warmup_steps=2, final_dense_steps=2))
    one.begin_run([], True, CPU)
    one.begin_evaluation(0.7)
    assert call(one)
    assert by_text(one.end_run()) == {"sparse": 1}


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


@pytest.mark.parametrize("factor", [0.98, 1.1], ids=["detail", "churn"])
def test_warm_up_and_final_steps_where_levels_are_off(factor):
    """What the sampler tells the model is not the schedule's: as many dense steps all the same."""
    one = engine(Policy(warmup_steps=2, final_dense_steps=1))
    sigmas = [8 * s / (1 + 7 * s) for s in falling(20)]  # the first levels are less than 1 % apart
    ran = ran_sparse(one, sigmas, evaluations=[factor * s for s in sigmas[:-1]])
    assert ran == [False] * 2 + [True] * 17 + [False]
    assert [s.index for s in one.end_run().steps] == [*range(20)]


def test_warm_up_where_the_first_level_is_repeated():
    """The report has one warm-up step of four, and so has the run."""
    one = engine(Policy(warmup_steps=2))
    assert ran_sparse(one, [1.0, 1.0, 0.75, 0.5, 0.0]) == [False] + [True] * 3
    report = one.end_run()
    assert "warm-up 1 of 4 steps" in describe(report.settings)
    assert [(s.index, s.warmup) for s in report.steps] == [(0, True), (1, False), (2, False), (3, False)]


def test_sampler_that_goes_back():
    """Restart samplers add noise again: the step follows the level, in either direction."""
    one = engine(Policy(warmup_steps=1))
    assert ran_sparse(one, falling(4), evaluations=[1.0, 0.5, 1.0, 0.25]) == [False, True, False, True]


def inputs(step, branch=0, length=128):
    """q, k, v of a step and a branch: all different."""
    return tensors(2, length, seed=100 * branch + step)


class Watched:
    """An engine at k steps per plan, with the steps whose calls made a plan."""

    def __init__(self, monkeypatch, steps, sigmas=None, **policy):
        self.engine, self.made, self.step, self.plans = (
            engine(Policy(warmup_steps=0, reuse_steps=steps, **policy), passthrough=(Interrupt,)),
            [],
            0,
            weakref.WeakSet(),
        )
        monkeypatch.setattr("fgattn.backends.execute.plan_of", self.build)
        self.engine.begin_run(sigmas or falling(6), True, CPU)

    def build(self, *args, **options):
        planned = plan_of(*args, **options)
        self.plans.add(planned.plan)
        self.made.append(self.step)
        return planned

    def at(self, step, sigma=None):
        self.step = step
        self.engine.begin_evaluation(1 - step / 6 if sigma is None else sigma)

    def call(self, q, k, v, layout=LAYOUT, block=0, **options):
        return self.engine.attention(q, k, v, layout=layout, dense=lambda: DENSE, block=block, **options)


@pytest.mark.parametrize(
    ("steps", "made"), [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4]), (3, [0, 3]), (6, [0])], ids=lambda x: str(x)
)
def test_a_plan_serves_its_steps(steps, made, monkeypatch):
    """The lists are old, the tail and the attention are of the call's own q, k and v, to the bit."""
    one = Watched(monkeypatch, steps)
    for step in range(6):
        one.at(step)
        q, k, v = inputs(step)
        plan = build_plan(*inputs(step - step % steps)[:2], SETTINGS, LAYOUT)
        assert torch.equal(one.call(q, k, v), attend(q, k, v, plan))
    assert one.made == made
    report = one.engine.end_run()
    reused = {"reused": 6 - len(made)} if len(made) < 6 else {}
    assert report.plans == {"made": len(made), **reused} and by_text(report) == {"sparse": 6}
    assert [s.planning > 0 for s in report.steps] == [step in made for step in range(6)]
    assert (report.planning_saved > 0) == (steps > 1)
    assert describe(report.settings).endswith(f", plans serve {steps} steps" if steps > 1 else "6 steps")


def test_one_step_is_one_plan_per_call(monkeypatch):
    """The default keeps nothing, not even within a step."""
    assert Policy().reuse_steps == 1
    one = Watched(monkeypatch, 1)
    for sigma in (1.0, 0.95):
        one.at(0, sigma)
        q, k, v = inputs(0)
        assert torch.equal(one.call(q, k, v), attend(q, k, v, build_plan(q, k, SETTINGS, LAYOUT)))
        assert not one.plans
    assert one.made == [0, 0] and one.engine.end_run().plans == {"made": 2}


def test_warm_up_makes_no_plan(monkeypatch):
    """Plans are made from the first sparse step on."""
    one = Watched(monkeypatch, 2)
    one.engine = engine(Policy(warmup_steps=1, reuse_steps=2))
    one.engine.begin_run(falling(6), True, CPU)
    for step in range(6):
        one.at(step)
        one.call(*inputs(step))
    assert one.made == [1, 3, 5]


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("what", ["branch", "block"])
def test_branches_and_blocks_do_not_mix(what, swapped, monkeypatch):
    """Every call computes with its own old plan; the other one's would give another result."""
    one, names = Watched(monkeypatch, 2), [("cond", None), ("uncond", None)]
    keys = [{"branch": n} for n in names] if what == "branch" else [{"block": n} for n in (3, 7)]
    for step in (0, 1):
        one.at(step)
        for i in (1, 0) if swapped and step else (0, 1):
            mine, other = (build_plan(*inputs(0, b)[:2], SETTINGS, LAYOUT) for b in (i, 1 - i))
            q, k, v = inputs(step, i)
            out = one.call(q, k, v, **keys[i])
            assert torch.equal(out, attend(q, k, v, mine))
            assert not torch.equal(out, attend(q, k, v, other))
    assert one.made == [0, 0]


def test_block_number_that_comes_twice(monkeypatch):
    """VACE: two attentions under one number in an evaluation; each keeps its own plan."""
    one = Watched(monkeypatch, 2)
    for step in (0, 1):
        one.at(step)
        for i in (0, 1):
            q, k, v = inputs(step, i)
            plan = build_plan(*inputs(0, i)[:2], SETTINGS, LAYOUT)
            assert torch.equal(one.call(q, k, v), attend(q, k, v, plan))
    assert one.made == [0, 0]


def test_evaluations_of_a_step_share_their_plan(monkeypatch):
    """Heun and midpoint samplers: two evaluations a step, one plan every other step."""
    one = Watched(monkeypatch, 2)
    for step in range(4):
        for sigma in (1 - step / 6, 1 - (step + 0.5) / 6):
            one.at(step, sigma)
            one.call(*inputs(step))
    assert one.made == [0, 2]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"layout": TokenLayout((4, 4, 8))}, {"layout": TokenLayout((2, 8, 8))}),
        ({"layout": TokenLayout((3, 4, 8), 32)}, {"layout": TokenLayout((3, 4, 8), 0, 32)}),
        ({"scale": None}, {"scale": 0.3}),
        ({"branch": ("a", (0, 1))}, {"branch": ("a", (1, 2))}),
    ],
    ids=["grid", "sinks", "scale", "context window"],
)
def test_what_a_plan_depends_on(first, second, monkeypatch):
    """The same block and branch, but another question."""
    one = Watched(monkeypatch, 6)
    for step, options in enumerate((first, second, first, second)):
        one.at(step)
        one.call(*inputs(step), **options)
    assert one.made == [0, 1]


def test_shapes_have_their_own_plans(monkeypatch):
    """A batch that memory splits, and another length, are planned for themselves."""
    one = Watched(monkeypatch, 6)
    q, k, v = inputs(0)
    calls = [(q, k, v), tuple(torch.cat((x, x)) for x in (q, k, v)), tuple(x[:, :1] for x in (q, k, v))]
    for step in (0, 1):
        for call in calls:
            one.at(step)  # so that none is the second call of its evaluation
            assert one.call(*call).shape == call[0].shape
        one.at(step)
        one.call(*inputs(step, length=64), layout=TokenLayout((2, 4, 8)))
    assert one.made == [0] * 4 and one.engine.end_run().failure is None


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"block": None}, "an unknown block"),
        ({"branch": None}, "an unknown conditioning branch"),
        ({"layout": TokenLayout((4, 4, 8), key_valid=torch.ones(1, 128, dtype=torch.bool))}, "padded keys"),
    ],
    ids=["block", "branch", "padding"],
)
def test_calls_that_cannot_be_told_apart_are_planned_anew(options, why, monkeypatch):
    """Said once; nothing is kept."""
    one = Watched(monkeypatch, 6)
    for step in range(3):
        one.at(step)
        one.call(*inputs(step), **options)
        assert not one.plans
    report = one.engine.end_run()
    assert one.made == [0, 1, 2] and report.plans == {"made": 3}
    assert report.remarks == (f"plans are not kept for calls with {why}",)


@pytest.mark.parametrize("end", ["end_run", "begin_run", "error", "interrupt"])
def test_plans_are_dropped(end, monkeypatch):
    """At the end of a run, however it ends, no plan is left in memory."""
    one = Watched(monkeypatch, 6)
    one.at(0)
    one.call(*inputs(0))
    one.call(*inputs(0, 1), block=1)
    kept = weakref.WeakSet(one.plans)
    assert len(kept) == 2
    if end == "end_run":
        one.engine.end_run()
    elif end == "begin_run":
        one.engine.begin_run(falling(6), True, CPU)
    else:

        def fail(*_, **__):
            raise Interrupt if end == "interrupt" else RuntimeError

        monkeypatch.setattr("fgattn.backends.execute.attend", fail)
        with pytest.raises(Interrupt) if end == "interrupt" else contextlib.nullcontext():
            one.call(*inputs(0), block=2)
    gc.collect()
    assert not kept


def test_a_full_store_is_counted(monkeypatch):
    """What does not fit is planned in every call; what was kept before goes on serving."""
    one = Watched(monkeypatch, 3)
    one.engine.run.plans.limit = 2 * 2 * (2 * 16 + 16)  # bits and counts of two plans
    for step in range(3):
        one.at(step)
        for block in range(3):
            q, k, v = inputs(step, block)
            plan = build_plan(*inputs(0 if block < 2 else step, block)[:2], SETTINGS, LAYOUT)
            assert torch.equal(one.call(q, k, v, block=block), attend(q, k, v, plan))
    assert one.made == [0, 0, 0, 1, 2]
    assert one.engine.end_run().plans == {"made": 2, "reused": 4, "not kept": 3}


def test_heads_in_parts_for_memory(monkeypatch):
    """What a large call does: the same numbers, one call in the books, and plans kept for each part."""
    q, k, v = tensors(4, 128)
    whole = attend(q, k, v, build_plan(q, k, SETTINGS, LAYOUT))
    monkeypatch.setattr("fgattn.runs.engine.parts_for", lambda *_: 3)
    one = engine(Policy(warmup_steps=0, reuse_steps=2))
    one.begin_run(falling(4), True, CPU)
    for sigma in falling(4)[:2]:
        one.begin_evaluation(sigma)
        out = one.attention(q, k, v, layout=LAYOUT, dense=lambda: DENSE, block=0)
        torch.testing.assert_close(out, whole)
    report = one.end_run()
    assert by_text(report) == {"sparse": 2} and not report.remarks
    assert report.plans == {"made": 3, "reused": 3}
    assert report.steps[0].planning > 0 and report.steps[1].planning == 0
    assert [*one.last_maps.skipped.values()] == [Reason(Outcome.IN_PARTS)] * 2


def test_memory_limit_is_in_megabytes(monkeypatch):
    """0 keeps nothing, 1 is enough for small plans."""
    for limit, made in ((0, [0, 1, 2]), (1, [0])):
        one = Watched(monkeypatch, 6, reuse_memory_mb=limit)
        for step in range(3):
            one.at(step)
            one.call(*inputs(step))
        assert one.made == made and one.engine.run.plans.limit == limit * 10**6


@pytest.mark.parametrize(("fits", "sparse"), [(4, True), (2, True), (1, True), (0, False)])
def test_out_of_memory_takes_fewer_heads_then_goes_dense(fits, sparse, monkeypatch):
    """A render near the card's limit must not die: kept plans go first, then heads are taken in parts."""
    q, k, v = tensors(4, 128)
    sizes, whole = [], attend(q, k, v, build_plan(q, k, SETTINGS, LAYOUT))

    made = weakref.WeakSet()

    compute = execute.attend

    def short(call, backend, planned, out):
        sizes.append(call.q.shape[1])
        made.add(planned.plan)
        if call.q.shape[1] > fits:
            raise torch.OutOfMemoryError("no room")
        return compute(call, backend, planned, out)

    def one_output(q):
        assert not outputs  # nor does the one of the attempt before take room
        outputs.add(out := empty_like(q))
        return out

    def dense():
        assert not outputs and not made and not one.run.plans.size
        return DENSE

    outputs = weakref.WeakSet()
    monkeypatch.setattr("fgattn.backends.execute.attend", short)
    monkeypatch.setattr("fgattn.runs.engine.empty_like", one_output)
    monkeypatch.setattr("fgattn.runs.engine.log.exception", lambda *_: None)  # pytest keeps what is logged
    one = engine(Policy(warmup_steps=0, reuse_steps=4))
    one.begin_run(falling(8), True, CPU)
    for sigma in falling(8)[:2]:
        one.begin_evaluation(sigma)
        out = one.attention(q, k, v, layout=LAYOUT, dense=dense, block=0)
        assert torch.equal(out, whole) if sparse else out is DENSE
        del out
    report = one.end_run()
    assert (SHORT_OF_MEMORY in report.remarks) == (fits < 4)
    assert by_text(report).get("sparse", 0) == (2 if sparse else 0)
    if fits == 1:  # the second call starts with what was found to fit
        assert sizes == [4, 2, 1, 1, 1, 1] + 4 * [1]
        assert report.plans == {"not kept": 8}
    if not sparse:
        assert report.failure.startswith("OutOfMemoryError")


@pytest.mark.parametrize("stage", ["plan_of", "attend"])
@pytest.mark.parametrize("error", FULL, ids=lambda error: f"{type(error).__name__} {str(error)[:40]}")
def test_out_of_memory_in_other_clothes(error, stage, monkeypatch):
    """Whatever type its error has, a full memory takes fewer heads, and the run stays sparse."""
    compute, sizes = getattr(execute, stage), []

    def short(call, *rest):
        sizes.append(call.q.shape[1])
        if call.q.shape[1] > 1:
            raise error
        return compute(call, *rest)

    monkeypatch.setattr(f"fgattn.backends.execute.{stage}", short)
    one = engine()
    assert ran_sparse(one, falling(2)) == [True, True] and sizes == [2, 1, 1, 1, 1]
    report = one.end_run()
    assert report.failure is None and report.remarks == (SHORT_OF_MEMORY,)


def watched_run(policy, blocks=(0, 1, 2, 3), **options):
    """An engine after a run of 8 steps over some blocks, and its outputs."""
    one = engine(policy, **options)
    one.begin_run(falling(8), True, CPU)
    outs = []
    for step, sigma in enumerate(falling(8)[:-1]):
        one.begin_evaluation(sigma)
        for block in blocks:
            q, k, v = inputs(step, block or 0)
            outs.append(one.attention(q, k, v, layout=LAYOUT, dense=lambda: DENSE, block=block))
    return one, outs


def test_estimated_errors_are_in_the_report():
    """By step and block, from a quarter of the calls; the run and its random numbers are not touched."""
    before = torch.get_rng_state()
    one, outs = watched_run(Policy(warmup_steps=2))
    report = one.end_run()
    assert [s.estimated_error is None for s in report.steps] == [True] * 2 + [False] * 6
    assert [b.estimated_error is None for b in report.blocks] == [False] * 4
    true = []
    for step in range(2, 8):
        q, k, v = inputs(step, -step % 4)  # the block whose turn it is
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        true.append(((outs[4 * step + -step % 4] - dense).norm() / dense.norm()).item())
    for step, error in zip(report.steps[2:], true, strict=True):
        assert step.estimated_error == pytest.approx(error, rel=0.3)
    assert report.estimated_error == pytest.approx(sum(s.estimated_error for s in report.steps[2:]) / 6)
    assert [(c.step, c.block) for c in report.cells] == [(s, b) for s in range(2, 8) for b in range(4)]
    assert torch.equal(torch.get_rng_state(), before)


def test_estimates_can_be_turned_off():
    """The same output, to the bit, and nothing in the report."""
    (on, with_estimates), (off, without) = (
        watched_run(Policy(warmup_steps=2, estimate_error=wanted)) for wanted in (True, False)
    )
    assert all(torch.equal(a, b) for a, b in zip(with_estimates, without, strict=True))
    report = off.end_run()
    assert report.estimated_error is None and "est. error" not in headline(report)
    assert "est. error" in headline(on.end_run())
    assert len(off.last_maps.kept) == 6 * 4


@pytest.mark.parametrize("what", ["estimate.Estimate.estimated_error", "maps.Maps.keep"])
def test_failure_of_the_looking_leaves_the_run_alone(what, monkeypatch, caplog):
    """Out of memory or a bug there: said once, the rest of the run is sparse."""
    wanted = watched_run(Policy(warmup_steps=2))[1]

    def fail(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(f"fgattn.runs.{what}", fail)
    one, outs = watched_run(Policy(warmup_steps=2))
    assert all(torch.equal(a, b) for a, b in zip(outs, wanted, strict=True))
    report = one.end_run()
    assert by_text(report) == {"warm-up step": 8, "sparse": 24} and report.failure is None
    assert report.remarks == ("no more maps and error estimates: OutOfMemoryError: no room",)
    assert len(caplog.records) == 1


def test_maps_that_do_not_fit_on_the_host_cost_no_report(monkeypatch, caplog):
    """Bringing them there may fail near the limit of memory; so may looking, half way through."""

    def fail(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("fgattn.runs.maps.Maps.to_host", fail)
    one, _ = watched_run(Policy(warmup_steps=2))
    assert by_text(one.end_run())["sparse"] == 24 and one.last_maps is None and len(caplog.records) == 1
    monkeypatch.undo()
    one, _ = watched_run(Policy(warmup_steps=2))
    monkeypatch.setattr("fgattn.runs.maps.Maps.keep", fail)
    one.begin_evaluation(0.01)
    call(one, block=9)
    one.end_run()
    assert len(one.last_maps.kept) == 24 and one.last_maps.find(-1, 0, 0)[1].keys(0).any()


def test_interrupts_pass_through_the_looking(monkeypatch):
    def interrupt(*_):
        raise Interrupt

    monkeypatch.setattr("fgattn.runs.estimate.Estimate.estimated_error", interrupt)
    with pytest.raises(Interrupt):
        watched_run(Policy(warmup_steps=0), passthrough=(Interrupt,))


def test_maps_are_of_the_last_run():
    """At the place that was asked for before it began; dropped when the next one begins."""
    one = engine(Policy(warmup_steps=1, final_dense_steps=0, dense_blocks=frozenset({1})))
    assert one.last_maps is None
    one.watch_tile("7", (2, 3, 4))
    for steps in (4, 8):
        one.begin_run(falling(steps), True, CPU)
        assert one.last_maps is None
        for sigma in falling(steps)[:-1]:
            one.begin_evaluation(sigma)
            for block in (0, 1):
                call(one, block=block)
        one.end_run()
        maps = one.last_maps
        assert maps.places == {"7": (2, 3, 4)}
        assert [*maps.kept] == [(step, 0) for step in range(1, steps)]
        assert maps.skipped[0, 0] == Reason(Outcome.WARM_UP)
        assert maps.skipped[steps - 1, 1] == Reason(Outcome.DENSE_BLOCK)


def test_two_who_look_have_a_tile_each():
    """Of one run, until other tiles are asked for; nobody: the middle."""
    one = engine()

    def run():
        ran_sparse(one, falling(2))
        one.end_run()
        return one.last_maps

    assert run().places == {"": (0, 0, 0)}
    one.watch_tile("5", (9, 9, 9))
    one.watch_tile("5", (1, 1, 1))
    one.watch_tile("12:6", (4, 4, 8))
    for maps in (run(), run()):
        assert maps.places == {"5": (1, 1, 1), "12:6": (4, 4, 8)}
        first, last = (maps.find(0, 0, 0, place)[1].queries(0) for place in maps.places.values())
        assert first[0] and last[-1] and not (first & last).any()
    one.watch_tile("12:6", (2, 2, 2))
    assert maps.places["12:6"] == (4, 4, 8) and run().places == {"12:6": (2, 2, 2)}


def test_calls_that_failed_or_were_taken_in_parts_have_no_map(monkeypatch):
    """With the reason in its place."""
    one = engine(Policy(warmup_steps=0))
    one.begin_run(falling(4), True, CPU)
    one.begin_evaluation(1.0)
    call(one)
    one.run.parts = 2
    call(one, block=1)
    call(one, k=K[:, :1], v=V[:, :1], block=2)
    call(one, layout=TokenLayout((1, 1, 1)), block=3)
    call(one, block=4)
    one.end_run()
    assert [*one.last_maps.kept] == [(0, 0)]
    assert one.last_maps.skipped == {
        (0, 1): Reason(Outcome.IN_PARTS),
        (0, 2): Reason(Outcome.DECLINED, "grouped heads (2 query heads, 1 key heads)"),
        (0, 3): Reason(Outcome.FAILED),
        (0, 4): Reason(Outcome.AFTER_FAILURE),
    }


def test_unknown_blocks_share_their_books_but_not_their_maps():
    """A model that does not number its blocks."""
    one, _ = watched_run(Policy(warmup_steps=2), blocks=(None,) * 4)
    report = one.end_run()
    assert [b.block for b in report.blocks] == [-1] and report.estimated_error is not None
    assert [*one.last_maps.kept] == [(step, n) for step in range(2, 8) for n in range(4)]
