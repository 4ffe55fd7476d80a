"""Engine: one for each patched model. It decides call by call between dense and sparse, and keeps the books.

    begin_run -> begin_evaluation -> attention (per call: reason for dense? plan, attend) -> end_run

Plans may serve several steps (Policy.reuse_steps); `plan_store` keeps them until the run ends. `watch` looks
at the calls, for maps and estimates of the error.

A failure while sampling never ends the render: it is logged once, and the run goes on dense. Out of memory
first takes fewer heads at a time.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..backends import compile_log, execute, registry
from ..backends.base import Eligible, Planned
from ..call import Call
from ..layout import TokenLayout, release
from ..outcomes import Outcome, Reason
from ..plan import SparsePlan
from ..planning import parts_for
from ..settings import Policy, Settings, is_block
from ..tensors import empty_like, is_out_of_memory
from .break_even import faster
from .clock import Clock
from .maps import NOBODY, Maps, Place
from .plan_store import MADE, REUSED, PlanStore
from .reports import RunReport
from .run import Run, number_of
from .stats import CallPlace, RunStats
from .steps import Steps
from .watch import Watch

log = logging.getLogger("fgattn")
SHORT_OF_MEMORY = "short of memory: fewer heads at a time, plans are not kept"


class Engine:
    """Sparse attention for one model under one setting.

    Args:
        settings, policy: what the user chose.
        scope: context manager around everything that may allocate (ComfyUI records allocations).
        passthrough: exceptions that must reach the caller, such as ComfyUI's interrupt.
        notify: called once with the text of an error.

    Attributes:
        scope: as given.
        run: that is going on, or None.
        last_report, last_maps: of the last run, once it has ended.
    """

    def __init__(
        self,
        settings: Settings,
        policy: Policy,
        *,
        scope: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
        passthrough: tuple[type[BaseException], ...] = (),
        notify: Callable[[str], None] = lambda text: None,
    ):
        self.settings, self.policy = settings, policy
        self.last_report: RunReport | None = None
        self.last_maps: Maps | None = None
        self.scope, self._passthrough, self._notify = scope, passthrough, notify
        self._places: Mapping[str, Place] = NOBODY  # of the tiles in the last run's maps
        self._asked: dict[str, Place] = {}  # of those to come
        self.run: Run | None = None

    def watch_tile(self, key: str, place: Place) -> None:
        """Keep a query tile in the maps of the next run, beside those that others ask for.

        Runs that follow without being asked for any tile keep the same ones.

        Args:
            key: of who will look at it; has one tile.
            place: (frame, row, column) of a token, counted from 1; 0 is the middle.
        """
        self._asked[key] = place

    def begin_run(self, sigmas: Sequence[float], full_noise: bool, device: torch.device) -> None:
        """Start a run over a schedule.

        Args:
            sigmas: noise levels, one more than steps.
            full_noise: the run begins where the model's noise schedule does; only then warm up.
            device: where attention will run.
        """
        self._close()
        self.last_report = self.last_maps = None  # nothing of an earlier run, should this fail
        compile_log.start()
        try:
            with self.scope():
                self._places, self._asked = self._asked or self._places, {}
                steps = max(1, len(sigmas) - 1)
                stats = RunStats(
                    Clock(device),
                    scheduled=steps,
                    sliders=[(0, self.settings.threshold, self.policy.warmup_steps)],
                )
                self.run = Run(
                    schedule=Steps(sigmas),
                    steps=steps,
                    full_noise=full_noise,
                    settings=self.settings,
                    policy=self.policy,
                    final=self.policy.final_dense_steps if sigmas and sigmas[-1] == 0 else 0,
                    stats=stats,
                    answer=registry.on_device(device, self.settings),
                    plans=PlanStore(self.policy.reuse_steps, self.policy.reuse_memory_mb * 10**6),
                    rule=self._has_rule(device),
                    watch=Watch(stats, self._places, self.policy.estimate_error, self._passthrough),
                )
        except BaseException:
            compile_log.stop()
            raise
        if self.run.device_reason:
            log.warning("FG-Attn runs dense: %s", self.run.device_reason.text)

    def begin_evaluation(self, sigma: float) -> None:
        """Note that a sampler evaluates the model at this noise level; finds the step it belongs to."""
        if run := self.run:
            before, step = run.step, run.schedule.evaluated(sigma)
            if run.moved and not run.stats.began(step):
                run.take_moved()
            if run.rule and step != before:  # sliders that moved end what was learnt
                run.densities = run.stats.densities() if len(run.stats.sliders) == 1 else {}
            run.stats.begin_step(step, step < run.warmup(run.policy))
            run.plans.begin_evaluation(step)

    def move(self, threshold: float, warmup_steps: int) -> bool:
        """Change a run that is going on, from its next step to its end; False if there is none.

        The next run has the engine's own values again. May be called from another thread.

        Raises:
            InvalidArgument: for values that the settings do not take.
        """
        moved = (replace(self.settings, threshold=threshold), replace(self.policy, warmup_steps=warmup_steps))
        if run := self.run:
            run.moved = moved
        return run is not None

    def so_far(self) -> RunReport | None:
        """The books of the run that is going on, as far as they can be read without waiting."""
        if run := self.run:
            with self.scope():
                return run.stats.so_far(run.chosen, run.implementation)
        return None

    def end_run(self) -> RunReport | None:
        """Read the books, which waits for the device; None if no run was going on."""
        if (run := self._close()) is None:
            return None
        run.check_blocks()
        self.last_report = run.stats.report(run.chosen, run.implementation)
        self.last_maps = run.watch.end()
        return self.last_report

    def _close(self) -> Run | None:
        """Take the run that is going on out of the engine, if there is one."""
        run, self.run = self.run, None
        if run is not None:
            compile_log.stop()
        return run

    def release(self) -> None:
        """Give back what is kept for later calls: the model leaves the device."""
        release()

    def decline(self, reason: Reason) -> None:
        """Count a call that is left to dense attention before it gets here."""
        if self.run:
            self.run.stats.calls[reason] += 1

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Around what must not cost the render: after a failure in it the run is dense."""
        try:
            yield
        except Exception as error:
            if run := self.run:
                self._failed(run, error)

    def remark(self, text: str) -> None:
        """Note something that the user should know about this run, once."""
        if self.run:
            self.run.stats.remarks[text] = None

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        layout: TokenLayout,
        dense: Callable[[], torch.Tensor],
        **place: Any,
    ) -> torch.Tensor:
        """`attention_of` for callers that hold q, k, v [B, H, L, D] anyway."""
        return self.attention_of(lambda: (q, k, v), layout=layout, dense=dense, **place)

    def attention_of(
        self,
        tensors: Callable[[], tuple[torch.Tensor, ...]],
        *,
        layout: TokenLayout,
        dense: Callable[[], torch.Tensor],
        block: int | None = None,
        branch: Hashable | None = "all",
        scale: float | None = None,
    ) -> torch.Tensor:
        """One attention call, dense or sparse.

        Args:
            tensors: gives q, k, v [B, H, L, D]. Nothing holds them while `dense` runs, which may free them.
            layout: of the keys.
            dense: computes the call densely, [B, H, L_q, D].
            block: number of the transformer block; None, and what is no such number, if unknown.
            branch: what tells this call from others of the block in a step: conditionings, context
                window; None if unknown. Plans are kept only where block and branch are known.
            scale: softmax scale, D**-0.5 if None.
        """
        run = self.run
        if run is None:
            return dense()
        block = block if is_block(block) else None
        at = CallPlace(run.step, block, branch)
        run.blocks.add(block)
        out = self._sparse_or_reason(run, at, tensors, layout, scale)
        return self._dense(run, at, out, dense) if isinstance(out, Reason) else out

    def _sparse_or_reason(
        self, run: Run, at: CallPlace, tensors: Callable, layout: TokenLayout, scale: float | None
    ) -> torch.Tensor | Reason:
        """The output of a sparse call, or why the call shall be dense."""
        try:
            q, k, v = tensors()
            run.stats.tokens = max(run.stats.tokens, q.shape[2])
            if run.stats.failure:
                return Reason(Outcome.AFTER_FAILURE)
            if run.device_reason:
                return run.device_reason
            with self.scope():
                call = Call.to_plan(q, k, v, run.settings, layout, scale)
                answer = self._answer(run, call)
            if isinstance(answer, Reason):
                return answer
            if reason := run.dense_by_policy(at) or run.too_dense(call, answer, at):
                return reason
            with self.scope():
                out = self._sparse(run, call, answer, at)
            run.stats.calls[Reason(Outcome.SPARSE)] += 1
            return out
        except Exception as error:
            return self._failed(run, error)

    def _dense(self, run: Run, at: CallPlace, reason: Reason, dense: Callable) -> torch.Tensor:
        """A dense call; one that could run sparse, but shall not, is timed to compare with."""
        start = None
        with self.guarded():
            run.stats.calls[reason] += 1
            run.watch.dense(at, reason)
            start = run.stats.clock.mark() if reason.outcome.could_run else None
        out = dense()
        with self.guarded():
            if start is not None:
                run.stats.timed(run.step, False, [(start, start, run.stats.clock.mark())])
        return out

    def _failed(self, run: Run, error: Exception) -> Reason:
        """Note a failure, after which the run is dense; what fails then again is not said again."""
        run.plans.clear()
        if isinstance(error, self._passthrough):
            raise error
        if not run.stats.failure:
            run.stats.failure = f"{type(error).__name__}: {error}"
            log.exception("FG-Attn failed; the rest of this run is dense")
            with contextlib.suppress(Exception):
                self._notify(f"dense: {run.stats.failure}")
        return Reason(Outcome.FAILED)

    def _sparse(self, run: Run, call: Call, answer: Eligible, at: CallPlace) -> torch.Tensor:
        """Plan and attend. Out of memory drops the kept plans and halves the heads at a time, for good."""
        heads = call.q.shape[1]
        while True:
            out = plan = None  # what is made next shall have the room of what was made before
            parts = max(run.parts, parts_for(call))
            try:
                out, spans = empty_like(call.q), []
                for of, part in call.in_parts(parts):
                    plan = None
                    plan, span = self._part(run, part, answer, at, out if parts == 1 else out[:, of])
                    spans.append(span)
                run.stats.timed(run.step, True, spans)
                break
            except Exception as error:
                if parts >= heads or not is_out_of_memory(error):
                    raise
            run.plans.close()
            run.parts = min(heads, 2 * parts)
            self.remark(SHORT_OF_MEMORY)
        run.watch.sparse(at, call, out, plan if plan and parts == 1 else Reason(Outcome.IN_PARTS))
        return out

    def _part(
        self, run: Run, call: Call, answer: Eligible, at: CallPlace, out: torch.Tensor
    ) -> tuple[SparsePlan, tuple]:
        """Write the output of some heads; their plan, and marks before and after planning and at the end."""
        start = run.stats.clock.mark()
        planned, outcome = self._planned(run, call, answer, at)
        after = start if outcome == REUSED else run.stats.clock.mark()
        execute.attend(call, answer.backend, planned, out)
        run.stats.add_plan(run.step, number_of(at.block), planned.plan)
        run.stats.plans[outcome] += 1
        return planned.plan, (start, after, run.stats.clock.mark())

    def _planned(self, run: Run, call: Call, answer: Eligible, at: CallPlace) -> tuple[Planned, str]:
        """A kept plan or a new one, and which."""
        key = run.plan_key(call, at)
        if key is None:
            return execute.plan_of(call, answer.backend), MADE
        return run.plans.plan(key, lambda: execute.plan_of(call, answer.backend))

    def _answer(self, run: Run, call: Call) -> Eligible | Reason:
        """Whether this call can run sparse, whatever the step: asked once a call."""
        device = call.device
        if device.type == "cuda" and run.stats.clock.device.index not in (None, device.index):
            return Reason(Outcome.OTHER_GPU)
        if call.q.shape[2] < run.policy.min_tokens:
            return Reason(Outcome.MIN_TOKENS, f"fewer than {run.policy.min_tokens} tokens")
        answer = registry.choose(call, gain=True)
        if not isinstance(answer, Eligible):
            return answer
        if (costs := run.costs(call, answer)) and not faster(costs, call):
            return Reason(Outcome.TOO_SHORT)
        if device.type == "cuda" and call.q.dtype == torch.float32:
            self.remark("fp32 tensors are computed in bf16")
        return answer

    def _has_rule(self, device: torch.device) -> bool:
        """Whether the break-even rule decides; else `min_tokens` does."""
        return device.type == "cuda" and not self.policy.min_tokens
