"""One per patched model: decides call by call between dense and sparse, runs it, keeps the books.

    begin_run -> begin_evaluation -> attention (per call: reason for dense? plan, attend) -> end_run

Plans may serve several steps (Policy.reuse_steps); `plan_store` keeps them until the run ends.

A failure while sampling never ends the render: it is logged once, and the run goes on dense. Out of memory
first takes fewer heads at a time.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch

from . import runtime
from .attention import attend
from .order import TokenLayout
from .plan import SparsePlan, build_plan
from .plan_store import MADE, REUSED, PlanStore
from .settings import Policy, Settings
from .stats import Clock, RunReport, RunStats
from .tensors import declined

log = logging.getLogger("fgattn")
MIN_TOKENS_CUDA = 4096  # until the break-even is measured
UNKNOWN_BLOCK = -1
SHORT_OF_MEMORY = "short of memory: fewer heads at a time, plans are not kept"
OutOfMemory = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)


@dataclass
class _Run:
    """State of one sampling run."""

    sigmas: tuple[float, ...]
    full_noise: bool  # it begins where the model's noise schedule does
    settings: Settings
    policy: Policy
    final: int  # dense steps at the end
    stats: RunStats
    device_reason: str | None  # why the device cannot run sparse
    plans: PlanStore
    step: int = 0
    parts: int = 1  # that the heads are computed in
    moved: tuple[Settings, Policy] | None = None  # for the steps that have not begun

    @property
    def steps(self) -> int:
        return max(1, len(self.sigmas) - 1)

    def warmup(self, policy: Policy) -> int:
        """Dense steps at the start."""
        return min(policy.warmup_steps, self.steps // 4) if self.full_noise else 0

    def take_moved(self) -> None:
        """The sliders were moved: the step that begins has the new values, if they are new."""
        moved, self.moved = self.moved, None
        if moved == (self.settings, self.policy):
            return
        if moved[0] != self.settings:
            self.plans.clear()
        self.settings, self.policy = moved
        self.stats.sliders.append((self.step, self.settings.threshold, self.policy.warmup_steps))


class Engine:
    """Sparse attention for one model under one setting.

    Args:
        settings, policy: what the user chose.
        scope: context manager around everything that may allocate (ComfyUI records allocations).
        passthrough: exceptions that must reach the caller, such as ComfyUI's interrupt.
        notify: called once with the text of an error.
    """

    def __init__(
        self, settings: Settings, policy: Policy, *,
        scope: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
        passthrough: tuple[type[BaseException], ...] = (),
        notify: Callable[[str], None] = lambda text: None,
    ):
        self.settings, self.policy = settings, policy
        self.last_report: RunReport | None = None
        self._scope, self._passthrough, self._notify = scope, passthrough, notify
        self._run: _Run | None = None

    def begin_run(self, sigmas: Sequence[float], full_noise: bool, device: torch.device) -> None:
        """Start a run over a schedule.

        Args:
            sigmas: noise levels, one more than steps.
            full_noise: the run begins where the model's noise schedule does; only then warm up.
            device: where attention will run.
        """
        sigmas = tuple(sigmas)
        final = self.policy.final_dense_steps if sigmas and sigmas[-1] == 0 else 0
        with self._scope():
            stats = RunStats(Clock(device), scheduled=max(1, len(sigmas) - 1),
                             sliders=[(0, self.settings.threshold, self.policy.warmup_steps)])
            plans = PlanStore(self.policy.reuse_steps, self.policy.reuse_memory_mb * 10**6)
            self._run = _Run(sigmas, full_noise, self.settings, self.policy, final, stats,
                             _device_reason(device), plans)
            if self._run.device_reason:
                log.warning("FG-Attn runs dense: %s", self._run.device_reason)

    def begin_evaluation(self, sigma: float) -> None:
        """Note that the model is evaluated at this noise level; finds the step it belongs to."""
        if run := self._run:
            run.step = step_of(sigma, run.sigmas)
            if run.moved and not run.stats.began(run.step):
                run.take_moved()
            run.stats.begin_step(run.step, run.step < run.warmup(run.policy))
            run.plans.begin_evaluation(run.step)

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
                return run.stats.so_far(self._describe(run), self._implementation(run))
        return None

    def end_run(self) -> RunReport | None:
        """Read the books; the only place that waits for the device."""
        run, self._run = self._run, None
        if run:
            self.last_report = run.stats.report(self._describe(run), self._implementation(run))
        return self.last_report

    def decline(self, reason: str) -> None:
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
        if reason := self._unable(run, q, k, v):
            run.stats.calls[reason] += 1
            return dense()
        stats = run.stats
        stats.tokens = max(stats.tokens, q.shape[2])
        if reason := self._dense_by_policy(run, block):
            stats.calls[reason] += 1
            start = stats.clock.mark()
            out = dense()
            stats.timed(run.step, False, start, start, stats.clock.mark())
            return out
        try:
            with self._scope():
                out = self._sparse(run, q, k, v, layout, block, branch, scale)
        except self._passthrough:
            run.plans.clear()
            raise
        except Exception as error:
            run.plans.clear()
            stats.error = f"{type(error).__name__}: {error}"
            log.exception("FG-Attn failed; the rest of this run is dense")
            self._notify(f"dense: {stats.error}")
            stats.calls["error"] += 1
            return dense()
        stats.calls["sparse"] += 1
        return out

    def _sparse(self, run: _Run, q, k, v, layout, block, branch, scale) -> torch.Tensor:
        """Plan and attend. Out of memory drops the kept plans and halves the heads at a time, for good."""
        clock, heads = run.stats.clock, q.shape[1]
        while True:
            try:
                start = planned = clock.mark()
                if run.parts == 1:
                    out, planned = self._part(run, q, k, v, layout, block, branch, scale)
                else:
                    out = torch.empty_like(q)
                    for some in torch.arange(heads).tensor_split(run.parts):
                        of = slice(int(some[0]), int(some[-1]) + 1)
                        out[:, of], _ = self._part(
                            run, q[:, of], k[:, of], v[:, of], layout, block, branch, scale)
                run.stats.timed(run.step, True, start, planned or start, clock.mark())
                return out
            except OutOfMemory:
                if run.parts >= heads:
                    raise
            run.plans.close()
            run.parts = min(heads, 2 * run.parts)
            self.remark(SHORT_OF_MEMORY)

    def _part(self, run: _Run, q, k, v, layout, block, branch, scale):
        """The output, and the mark after planning, None if nothing was planned."""
        plan, outcome = self._plan(run, q, k, layout, block, branch, scale)
        planned = None if outcome == REUSED else run.stats.clock.mark()
        out = attend(q, k, v, plan)
        run.stats.add_plan(UNKNOWN_BLOCK if block is None else block, plan)
        run.stats.plans[outcome] += 1
        return out, planned

    def _plan(self, run: _Run, q, k, layout, block, branch, scale) -> tuple[SparsePlan, str]:
        """A kept plan or a new one, and which."""
        def build():
            return build_plan(q, k, run.settings, layout, scale=scale)

        if self.policy.reuse_steps == 1:
            return build(), MADE
        missing = ("an unknown block" if block is None else "an unknown conditioning branch" if branch is None
                   else "padded keys" if layout.key_valid is not None else None)
        if missing:
            run.stats.remarks[f"plans are not kept for calls with {missing}"] = None
            return build(), MADE
        place = layout.grid, layout.front, layout.back, layout.query_start
        return run.plans.plan((block, branch, place, q.shape, k.shape[2], scale, str(q.device)), build)

    def _unable(self, run: _Run, q, k, v) -> str | None:
        """Why this call cannot run sparse, whatever the step."""
        if run.device_reason:
            return run.device_reason
        minimum = self.policy.min_tokens or (MIN_TOKENS_CUDA if q.is_cuda else 0)
        if q.shape[2] < minimum:
            return f"fewer than {minimum} tokens"
        if q.is_cuda and (reason := runtime.unavailable(q)):
            return reason
        if q.is_cuda and q.dtype == torch.float32:
            run.stats.remarks["fp32 tensors are computed in bf16"] = None
        return declined(q, k, v)

    def _dense_by_policy(self, run: _Run, block: int | None) -> str | None:
        """Why a call that could run sparse shall not."""
        if run.stats.error:
            return "after an error"
        if run.step < run.warmup(run.policy):
            return "warm-up step"
        if run.step >= run.steps - run.final:
            return "final dense step"
        if block in self.policy.dense_blocks:
            return "dense block"
        return None

    def _describe(self, run: _Run) -> str:
        s = self.settings
        kept = f", plans serve {self.policy.reuse_steps} steps" if self.policy.reuse_steps > 1 else ""
        moved = ""
        if len(run.stats.sliders) > 1:
            _, threshold, warmup_steps = run.stats.sliders[-1]
            now = [f"threshold {threshold:g}"] * (threshold != s.threshold)
            now += [f"warm-up {warmup_steps}"] * (warmup_steps != self.policy.warmup_steps)
            moved = f", moved to {' and '.join(now) or 'and fro'}"
        return (f"{s.rule}, tiles {s.tile_queries}x{s.tile_keys}, {s.order} order, "
                f"tail {'on' if s.tail else 'off'}, "
                f"warm-up {run.warmup(self.policy)} of {run.steps} steps{kept}{moved}")

    def _implementation(self, run: _Run) -> str:
        if run.device_reason:
            return f"dense ({run.device_reason})"
        device = run.stats.clock.device
        return runtime.gpu_kernel(device) if device.type == "cuda" else "torch"


def step_of(sigma: float, sigmas: Sequence[float]) -> int:
    """Step i of a falling schedule with sigmas[i] >= sigma > sigmas[i + 1], to rounding.

    Samplers that evaluate between scheduled levels stay in the step they started from; above the
    first level it is step 0, at the end the last step.
    """
    at_or_above = sum(level >= sigma * (1 - 1e-4) for level in sigmas[:-1])
    return max(0, at_or_above - 1)


def _device_reason(device: torch.device) -> str | None:
    """Why nothing can run sparse on this device, or None."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"no sparse kernel for device type {device.type}"
    return runtime.missing() or runtime.device_reason(device)
