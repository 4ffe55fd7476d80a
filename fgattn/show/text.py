"""A run's report as text, the way the timing node, the demo and the log show it.

Lines read well in proportional type, which the node uses and which folds spaces.
"""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Context

from ..outcomes import Outcome, Reason
from ..runs.plan_store import NOT_KEPT, REUSED
from ..runs.reports import BlockReport, RunReport, RunSettings, StepReport

TWO_DIGITS = Context(prec=2, rounding=ROUND_HALF_UP)


def headline(report: RunReport) -> str:
    """One line: what ran sparse and what it gained, or why it was dense."""
    if report.failure:
        return f"dense after an error: {report.failure}"
    if not report.count(Outcome.SPARSE):
        reasons = [r for r, _ in by_number(report.calls) if r.outcome is not Outcome.CROSS_ATTENTION]
        return f"dense: {reasons[0].text}" if reasons else "attention never reached FG-Attn"
    if report.count(Outcome.TOO_DENSE) > report.count(Outcome.SPARSE):
        return f"mostly dense: {Outcome.TOO_DENSE.value}"
    share = "" if report.density is None else f"{percent(report.density)} of scores, "
    return f"sparse: {share}{_gain(report)}{_estimated(report, ', est. error {}')}"


def text(report: RunReport) -> str:
    """The whole report."""
    lines = [summary(report)]
    if report.steps:
        lines += [
            "",
            *(
                f"step {s.index + 1}: {s.total:.1f} ms, attention {s.attention:.1f}, "
                f"planning {s.planning:.1f}; {s.sparse_calls} sparse, {s.dense_calls} dense"
                f"{_estimated(s, '; est. error {}')}"
                for s in report.steps
            ),
        ]
    if report.blocks:
        lines += [
            "",
            *(
                f"block {b.block if b.block >= 0 else '?'}: density {percent(b.density)}, "
                f"executed {percent(b.executed_density)}{_estimated(b, ', est. error {}')}"
                for b in report.blocks
            ),
        ]
    return "\n".join(lines)


def summary(report: RunReport) -> str:
    """The report without its steps and blocks."""
    lines = [
        headline(report),
        "",
        f"settings: {describe(report.settings)}",
        f"implementation: {report.implementation} on {report.device}, {report.tokens} tokens",
        f"run: {report.total / 1e3:.2f} s, {len(report.steps)} steps, planning {report.planning:.1f} ms",
        f"attention call: {_call_times(report)}",
    ]
    if report.density is not None and report.executed_density is not None:
        lines.append(
            f"density: {percent(report.density)} requested, {percent(report.executed_density)} executed"
        )
    if report.estimated_error is not None:
        lines.append(
            f"estimated error of attention: {percent(report.estimated_error)} against dense, "
            "from random query rows of some calls"
        )
    if reused := report.plans.get(REUSED):
        lines.append(
            f"plans: {sum(report.plans.values()) - reused} made, {reused} reused, which saved about "
            f"{report.planning_saved:.1f} ms of planning"
        )
    if not_kept := report.plans.get(NOT_KEPT):
        lines.append(f"plans not kept: {not_kept}, memory (reuse_memory_mb) is full")
    if report.peak_memory is not None:
        lines.append(f"peak VRAM: {report.peak_memory / 2**30:.2f} GiB")
    if len(report.sliders) > 1:
        lines += [
            f"sliders from step {step + 1}: threshold {threshold:g}, warm-up {warmup}"
            for step, threshold, warmup in report.sliders
        ]
    lines += [f"remark: {remark}" for remark in report.remarks]
    if report.failure:
        lines.append(f"error: {report.failure}")
    lines += ["", *(f"{number} calls: {reason.text}" for reason, number in by_number(report.calls))]
    return "\n".join(lines)


def describe(settings: RunSettings) -> str:
    """A run's settings as one line; `settingsText` in web/js/view.js has the same words."""
    s = settings
    words = [
        f"{s.method} {s.strength:g}",
        f"tiles {s.tile_queries}x{s.tile_keys}",
        f"{s.order} order",
        f"tail {'on' if s.tail else 'off'}",
        f"warm-up {s.warmup_steps} of {s.steps} steps",
    ]
    if s.reuse_steps > 1:
        words.append(f"plans serve {s.reuse_steps} steps")
    if s.moved:
        now = [] if s.moved_threshold is None else [f"threshold {s.moved_threshold:g}"]
        now += [] if s.moved_warmup_steps is None else [f"warm-up {s.moved_warmup_steps}"]
        words.append(f"moved to {' and '.join(now) or 'and fro'}")
    return ", ".join(words)


def percent(share: float) -> str:
    """A share with two digits: "0.43 %", "6.1 %", "12 %"; "<0.01 %" for less, "0 %" for nothing at all.

    The page writes the same text (`percent` in web/js/view.js): halves are rounded up.
    """
    share = float(share)
    if 0 < share < 1e-4:
        return "<0.01 %"
    return f"{TWO_DIGITS.create_decimal(100 * share).normalize():f} %"


def _estimated(part: RunReport | StepReport | BlockReport, words: str) -> str:
    """The estimated error of a run, a step or a block in words, or nothing."""
    return "" if part.estimated_error is None else words.format(percent(part.estimated_error))


def by_number(calls: dict[Reason, int]) -> list[tuple[Reason, int]]:
    """Calls by outcome, the most frequent first."""
    return sorted(calls.items(), key=lambda item: -item[1])


def _gain(report: RunReport) -> str:
    """Speed of attention against the run's own dense calls."""
    if report.speedup is None:
        return "no dense step to compare with"
    faster = report.speedup >= 1
    ratio = report.speedup if faster else 1 / report.speedup
    return f"attention {ratio:.2f}x {'faster' if faster else 'slower'}"


def _call_times(report: RunReport) -> str:
    dense, sparse = report.dense_call, report.sparse_call
    if sparse is None:
        return "no sparse call" + (f"; dense {dense:.2f} ms" if dense else "")
    if dense is None:
        return f"sparse {sparse:.2f} ms; no dense step in this run to compare with"
    return f"dense {dense:.2f} ms, sparse {sparse:.2f} ms"
