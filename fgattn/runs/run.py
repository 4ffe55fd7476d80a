"""The state of one sampling run."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace

from ..backends.base import Costs, Eligible
from ..call import Call, needed
from ..outcomes import Outcome, Reason
from ..settings import Policy, Settings, ranges
from .break_even import faster
from .plan_store import PlanStore
from .reports import RunSettings
from .stats import UNKNOWN_BLOCK, CallPlace, RunStats
from .steps import Steps
from .watch import Watch


@dataclass(kw_only=True)
class Run:
    """State of one sampling run.

    `settings` and `policy` are those in force now; the engine has those that the next run begins with.
    """

    schedule: Steps  # where the sampler is
    steps: int  # of the schedule
    full_noise: bool  # it begins where the model's noise schedule does
    settings: Settings
    policy: Policy
    final: int  # dense steps at the end
    stats: RunStats
    answer: Eligible | Reason  # what runs sparse calls on the run's device, or why nothing can
    plans: PlanStore
    rule: bool  # of break_even, in force
    watch: Watch
    blocks: set[int | None] = field(default_factory=set)  # that called attention, None for those unknown
    densities: dict[int, float] = field(default_factory=dict)  # executed, by block, before this step
    parts: int = 1  # that the heads are computed in
    moved: tuple[Settings, Policy] | None = None  # for the steps that have not begun

    @property
    def device_reason(self) -> Reason | None:
        """Why nothing can run sparse on the run's device, or None."""
        return self.answer if isinstance(self.answer, Reason) else None

    @property
    def implementation(self) -> str:
        """What runs sparse calls, and why not what comes before it."""
        return self.answer.text if isinstance(self.answer, Eligible) else f"dense ({self.answer.text})"

    @property
    def step(self) -> int:
        return self.schedule.step

    def warmup(self, policy: Policy) -> int:
        """Dense steps at the start."""
        return min(policy.warmup_steps, self.steps // 4) if self.full_noise else 0

    def dense_by_policy(self, at: CallPlace) -> Reason | None:
        """Why a call that could run sparse shall not."""
        if self.step < self.warmup(self.policy):
            return Reason(Outcome.WARM_UP)
        if self.step >= self.steps - self.final:
            return Reason(Outcome.FINAL_STEP)
        if at.block in self.policy.dense_blocks:
            return Reason(Outcome.DENSE_BLOCK)
        return None

    def costs(self, call: Call, answer: Eligible) -> Costs | None:
        """Figures for the break-even rule, if it is in force and the backend has any."""
        return answer.backend.costs(call) if self.rule and answer.backend.costs else None

    def too_dense(self, call: Call, answer: Eligible, at: CallPlace) -> Reason | None:
        """Whether the block has kept so much in the steps before that dense attention is faster."""
        density = self.densities.get(number_of(at.block))
        if density is None or not (costs := self.costs(call, answer)) or faster(costs, call, density):
            return None
        return Reason(Outcome.TOO_DENSE)

    def plan_key(self, call: Call, at: CallPlace) -> Hashable | None:
        """What tells the call's plan from others that are kept; None where it is not to be kept."""
        if self.policy.reuse_steps == 1:
            return None
        missing = {
            "an unknown block": at.block is None,
            "an unknown conditioning branch": at.branch is None,
            "padded keys": call.key_valid is not None,
        }
        if why := next((name for name, is_so in missing.items() if is_so), None):
            self.stats.remarks[f"plans are not kept for calls with {why}"] = None
            return None
        layout = needed(call.layout)
        place = layout.grid, layout.front, layout.back, layout.absent, layout.query_start
        return at.block, at.branch, place, call.q.shape, call.k.shape[2], call.scale, str(call.device)

    def check_blocks(self) -> None:
        """Say which of dense_blocks the run did not have, if it reached its last step."""
        absent = self.policy.dense_blocks - self.blocks
        if not absent or not self.blocks or self.step < self.steps - 1:
            return
        numbered = self.blocks != {None}
        self.stats.remarks[
            f"dense_blocks: this model has no block {ranges(absent)}"
            if numbered
            else "dense_blocks has no effect: this model does not number its blocks"
        ] = None

    @property
    def chosen(self) -> RunSettings:
        """The settings that the run began with, and where its sliders stand since they were moved."""
        s, sliders = self.settings, self.stats.sliders
        (_, threshold, warmup), (_, last_threshold, last_warmup) = sliders[0], sliders[-1]
        first = replace(s, threshold=threshold)
        return RunSettings(
            method=s.method,
            strength=first.strength,
            tile_queries=s.tile_queries,
            tile_keys=s.tile_keys,
            order=s.order,
            tail=s.tail,
            warmup_steps=self.warmup(replace(self.policy, warmup_steps=warmup)),
            steps=self.steps,
            reuse_steps=self.policy.reuse_steps,
            moved=len(sliders) > 1,
            moved_threshold=None if last_threshold == threshold else last_threshold,
            moved_warmup_steps=None if last_warmup == warmup else last_warmup,
        )

    def take_moved(self) -> None:
        """The sliders were moved: the step that begins has the new values, if they are new."""
        moved = self.moved  # stays: a move that comes in between from another thread is not lost
        if moved in (None, (self.settings, self.policy)):
            return
        if moved[0] != self.settings:
            self.plans.clear()
        self.settings, self.policy = moved
        self.stats.sliders.append((self.step, self.settings.threshold, self.policy.warmup_steps))


def number_of(block: int | None) -> int:
    """Under which the books have a block."""
    return UNKNOWN_BLOCK if block is None else block
