"""One per patched model: decides call by call between dense and sparse, runs it, keeps the books.

    begin_run -> begin_evaluation -> attention (per call: reason for dense? plan, attend) -> end_run

Plans may serve several steps (Policy.reuse_steps); `plan_store` keeps them until the run ends. `watch` looks
at the calls, for maps and estimates of the error.

A failure while sampling never ends the render: it is logged once, and the run goes on dense. Out of memory
first takes fewer heads at a time.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import torch

from ..attention import attend, empty_like
from ..backends import runtime
from ..backends.runtime import OutOfMemory
from ..layout import TokenLayout
from ..outcomes import Outcome, Reason
from ..plan import SparsePlan, parts_for, plan_call
from ..settings import Policy, Settings, ranges
from ..tensors import declined, head_parts
from .break_even import Costs, costs, faster
from .clock import Clock
from .maps import NOBODY, Maps, Place
from .plan_store import MADE, REUSED, PlanStore
from .run import Run, step_of
from .stats import UNKNOWN_BLOCK, RunReport, RunSettings, RunStats
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
        last_report, last_maps: of the last run, once it has ended.
    """

    def __init__(
        self, settings: Settings, policy: Policy, *,
        scope: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
        passthrough: tuple[type[BaseException], ...] = (),
        notify: Callable[[str], None] = lambda text: None,
    ):
        self.settings, self.policy = settings, policy
        self.last_report: RunReport | None = None
        self.last_maps: Maps | None = None
        self._scope, self._passthrough, self._notify = scope, passthrough, notify
        self._places, self._asked = NOBODY, {}  # of tiles: of the last run's maps, of those to come
        self._run: Run | None = None

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
        self._run = self.last_report = self.last_maps = None  # nothing of an earlier run, should this fail
        sigmas = tuple(sigmas)
        final = self.policy.final_dense_steps if sigmas and sigmas[-1] == 0 else 0
        with self._scope():
            stats = RunStats(Clock(device), scheduled=max(1, len(sigmas) - 1),
                             sliders=[(0, self.settings.threshold, self.policy.warmup_steps)])
            plans = PlanStore(self.policy.reuse_steps, self.policy.reuse_memory_mb * 10**6)
            self._places, self._asked = self._asked or self._places, {}
            watch = Watch(stats, self._places, self.policy.estimate_error, self._passthrough)
            self._run = Run(sigmas, full_noise, self.settings, self.policy, final, stats,
                             _device_reason(device), plans, self._has_rule(device), watch)
            if self._run.device_reason:
                log.warning("FG-Attn runs dense: %s", self._run.device_reason.text)

    def begin_evaluation(self, sigma: float) -> None:
        """Note that the model is evaluated at this noise level; finds the step it belongs to."""
        if run := self._run:
            step = step_of(sigma, run.sigmas)
            is_new, run.step = step != run.step, step
            if run.moved and not run.stats.began(step):
                run.take_moved()
            if run.rule and is_new:  # sliders that moved end what was learnt
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
        run = self._run
        if run:
            run.moved = moved
        return run is not None

    def so_far(self) -> RunReport | None:
        """The books of the run that is going on, as far as they can be read without waiting."""
        if run := self._run:
            with self._scope():
                return run.stats.so_far(self._chosen(run), self._implementation(run))
        return None

    def end_run(self) -> RunReport | None:
        """Read the books, which waits for the device; None if no run was going on."""
        run, self._run = self._run, None
        if run is None:
            return None
        self._check_blocks(run)
        self.last_report = run.stats.report(self._chosen(run), self._implementation(run))
        self.last_maps = run.watch.end()
        return self.last_report

    def decline(self, reason: Reason) -> None:
        """Count a call that is left to dense attention before it gets here."""
        if self._run:
            self._run.stats.calls[reason] += 1

    def remark(self, text: str) -> None:
        """Note something that the user should know about this run, once."""
        if self._run:
            self._run.stats.remarks[text] = None

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layout: TokenLayout,
        dense: Callable[[], torch.Tensor], block: int | None = None,
        branch: Hashable | None = "all", scale: float | None = None,
    ) -> torch.Tensor:
        """One attention call, dense or sparse.

        Args:
            q, k, v: [B, H, L, D].
            layout: of the keys.
            dense: computes the call densely, [B, H, L_q, D].
            block: number of the transformer block, None if unknown.
            branch: what tells this call from others of the block in a step: conditionings, context
                window; None if unknown. Plans are kept only where block and branch are known.
            scale: softmax scale, D**-0.5 if None.
        """
        run = self._run
        if run is None:
            return dense()
        stats = run.stats
        stats.tokens = max(stats.tokens, q.shape[2])
        run.blocks.add(block)
        if reason := self._unable(run, q, k, v):
            stats.calls[reason] += 1
            run.watch.dense(run.step, block, reason)
            return dense()
        if reason := self._dense_by_policy(run, block) or self._too_dense(run, q, k, block):
            stats.calls[reason] += 1
            run.watch.dense(run.step, block, reason)
            start = stats.clock.mark()
            out = dense()
            stats.timed(run.step, False, [(start, start, stats.clock.mark())])
            return out
        try:
            with self._scope():
                out = self._sparse(run, q, k, v, layout, block, branch, scale)
            stats.calls[Reason(Outcome.SPARSE)] += 1
            return out
        except self._passthrough:
            run.plans.clear()
            raise
        except Exception as error:
            run.plans.clear()
            stats.failure = f"{type(error).__name__}: {error}"
            log.exception("FG-Attn failed; the rest of this run is dense")
            self._notify(f"dense: {stats.failure}")
            stats.calls[Reason(Outcome.FAILED)] += 1
            run.watch.dense(run.step, block, Reason(Outcome.FAILED))
        return dense()  # after the handler, which holds what was made until then

    def _sparse(self, run: Run, q, k, v, layout, block, branch, scale) -> torch.Tensor:
        """Plan and attend. Out of memory drops the kept plans and halves the heads at a time, for good."""
        heads = q.shape[1]
        while True:
            out = plan = None  # what is made next shall have the room of what was made before
            parts = max(run.parts, parts_for(q, k.shape[2], run.settings))
            try:
                out, spans = empty_like(q), []
                for of in head_parts(heads, parts):
                    plan = None
                    plan, span = self._part(
                        run, q[:, of], k[:, of], v[:, of], out[:, of], layout, block, branch, scale)
                    spans.append(span)
                run.stats.timed(run.step, True, spans)
                break
            except OutOfMemory:
                if parts >= heads:
                    raise
            run.plans.close()
            run.parts = min(heads, 2 * parts)
            self.remark(SHORT_OF_MEMORY)
        look_at = plan if parts == 1 else Reason(Outcome.IN_PARTS)
        run.watch.sparse(run.step, block, q, k, v, out, look_at, layout, self.settings.order, scale)
        return out

    def _part(self, run: Run, q, k, v, out, layout, block, branch, scale):
        """Write the output of some heads; their plan, and marks before and after planning and at the end."""
        start, summaries = run.stats.clock.mark(), None

        def build() -> SparsePlan:
            nonlocal summaries
            plan, summaries = plan_call(q, k, v, run.settings, layout, scale=scale)
            return plan

        plan, outcome = self._plan(run, build, q, k, layout, block, branch, scale)
        planned = start if outcome == REUSED else run.stats.clock.mark()
        attend(q, k, v, plan, summaries=summaries, out=out)
        run.stats.add_plan(run.step, _number(block), plan)
        run.stats.plans[outcome] += 1
        return plan, (start, planned, run.stats.clock.mark())

    def _plan(self, run: Run, build, q, k, layout, block, branch, scale) -> tuple[SparsePlan, str]:
        """A kept plan or a new one, and which."""
        if self.policy.reuse_steps == 1:
            return build(), MADE
        missing = ("an unknown block" if block is None else "an unknown conditioning branch" if branch is None
                   else "padded keys" if layout.key_valid is not None else None)
        if missing:
            run.stats.remarks[f"plans are not kept for calls with {missing}"] = None
            return build(), MADE
        place = layout.grid, layout.front, layout.back, layout.absent, layout.query_start
        return run.plans.plan((block, branch, place, q.shape, k.shape[2], scale, str(q.device)), build)

    def _unable(self, run: Run, q, k, v) -> Reason | None:
        """Why this call cannot run sparse, whatever the step."""
        if run.device_reason:
            return run.device_reason
        if q.is_cuda and run.stats.clock.device.index not in (None, q.device.index):
            return Reason(Outcome.OTHER_GPU)
        if q.shape[2] < self.policy.min_tokens:
            return Reason(Outcome.MIN_TOKENS, f"fewer than {self.policy.min_tokens} tokens")
        if q.is_cuda and (detail := runtime.unavailable(q)):
            return Reason(Outcome.DECLINED, detail)
        if run.rule and not faster(self._costs(q), q, k.shape[2]):
            return Reason(Outcome.TOO_SHORT)
        if q.is_cuda and q.dtype == torch.float32:
            run.stats.remarks["fp32 tensors are computed in bf16"] = None
        detail = declined(q, k, v)
        return Reason(Outcome.DECLINED, detail) if detail else None

    def _dense_by_policy(self, run: Run, block: int | None) -> Reason | None:
        """Why a call that could run sparse shall not."""
        if run.stats.failure:
            return Reason(Outcome.AFTER_FAILURE)
        if run.step < run.warmup(run.policy):
            return Reason(Outcome.WARM_UP)
        if run.step >= run.steps - run.final:
            return Reason(Outcome.FINAL_STEP)
        if block in self.policy.dense_blocks:
            return Reason(Outcome.DENSE_BLOCK)
        return None

    def _has_rule(self, device: torch.device) -> bool:
        """Whether the break-even rule decides; else `min_tokens` does."""
        return device.type == "cuda" and not self.policy.min_tokens

    def _costs(self, q) -> Costs:
        return costs(self.settings, q.shape[3], runtime.gpu_kernel(q.device))

    def _too_dense(self, run: Run, q, k, block: int | None) -> Reason | None:
        """Whether the block has kept so much in the steps before that dense attention is faster."""
        density = run.densities.get(_number(block))
        gains = density is None or faster(self._costs(q), q, k.shape[2], density)
        return None if gains else Reason(Outcome.TOO_DENSE)

    def _check_blocks(self, run: Run) -> None:
        """Say which of dense_blocks the run did not have, if it reached its last step."""
        absent = self.policy.dense_blocks - run.blocks
        if not absent or not run.blocks or run.step < run.steps - 1:
            return
        numbered = run.blocks != {None}
        run.stats.remarks[f"dense_blocks: this model has no block {ranges(absent)}" if numbered else
                          "dense_blocks has no effect: this model does not number its blocks"] = None

    def _chosen(self, run: Run) -> RunSettings:
        s, (_, threshold, warmup_steps) = self.settings, run.stats.sliders[-1]
        return RunSettings(
            s.method, s.strength, s.tile_queries, s.tile_keys, s.order, s.tail, run.warmup(self.policy),
            run.steps, self.policy.reuse_steps, moved=len(run.stats.sliders) > 1,
            moved_threshold=None if threshold == s.threshold else threshold,
            moved_warmup_steps=None if warmup_steps == self.policy.warmup_steps else warmup_steps)

    def _implementation(self, run: Run) -> str:
        if run.device_reason:
            return f"dense ({run.device_reason.text})"
        device = run.stats.clock.device
        return runtime.gpu_kernel(device) if device.type == "cuda" else "torch"


def _number(block: int | None) -> int:
    return UNKNOWN_BLOCK if block is None else block


def _device_reason(device: torch.device) -> Reason | None:
    """Why nothing can run sparse on this device, or None."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return Reason(Outcome.NO_KERNEL, f"no sparse kernel for device type {device.type}")
    detail = runtime.missing() or runtime.device_reason(device)
    return Reason(Outcome.NO_KERNEL, detail) if detail else None
