"""A run's report as text, the way the timing node, the demo and the log show it."""

from __future__ import annotations

from .stats import RunReport


def headline(report: RunReport) -> str:
    """One line: what ran sparse and what it gained, or why it was dense."""
    if report.error:
        return f"dense after an error: {report.error}"
    sparse = report.calls.get("sparse", 0)
    if not sparse:
        reasons = [r for r, _ in sorted(report.calls.items(), key=lambda item: -item[1])
                   if r != "cross-attention"]
        return f"dense: {reasons[0]}" if reasons else "attention never reached FG-Attn"
    gain = f"attention {report.speedup:.2f}x" if report.speedup else "no dense step to compare with"
    return f"sparse: {report.density:.0%} of scores, {gain}"


def text(report: RunReport) -> str:
    """The whole report, plain text with aligned columns."""
    lines = [headline(report), "", f"settings        {report.settings}",
             f"implementation  {report.implementation} on {report.device}, {report.tokens} tokens",
             f"run             {report.total / 1e3:.2f} s, {len(report.steps)} steps, "
             f"planning {report.planning:.1f} ms"]
    if report.peak_memory is not None:
        lines.append(f"peak VRAM       {report.peak_memory / 2**30:.2f} GiB")
    lines += ["", "attention call  " + _call_times(report)]
    if report.density is not None:
        lines.append(f"density         {report.density:.1%} requested, "
                     f"{report.executed_density:.1%} executed")
    lines += [f"remark          {remark}" for remark in report.remarks]
    if report.error:
        lines.append(f"error           {report.error}")
    lines += ["", "calls"] + [f"  {n:6d}  {outcome}" for outcome, n in sorted(
        report.calls.items(), key=lambda item: -item[1])]
    if report.steps:
        lines += ["", "step   total ms  attention  planning  sparse  dense"]
        lines += [f"{s.index + 1:4d} {s.total:10.1f} {s.attention:10.1f} {s.planning:9.1f} "
                  f"{s.sparse_calls:7d} {s.dense_calls:6d}" for s in report.steps]
    if report.blocks:
        lines += ["", "block  density  executed"]
        lines += [f"{b.block if b.block >= 0 else '?':>5} {b.density:8.1%} {b.executed_density:9.1%}"
                  for b in report.blocks]
    return "\n".join(lines)


def _call_times(report: RunReport) -> str:
    dense, sparse = report.dense_call, report.sparse_call
    if sparse is None:
        return "no sparse call" + (f"; dense {dense:.2f} ms" if dense else "")
    if dense is None:
        return f"sparse {sparse:.2f} ms; no dense step in this run to compare with"
    return f"dense {dense:.2f} ms, sparse {sparse:.2f} ms: {dense / sparse:.2f}x"
