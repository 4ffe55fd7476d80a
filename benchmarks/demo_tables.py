"""Tables and plots of what the demo model gave: calls on its q, k and v, and whole generations."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from . import plot
from .results import NAMES, Results, mean, percent, plain_mean, provenance, table
from .targets import TAUS, Missing, decibels, geometric_mean, means, nearer_frames

LISTED = ((128, 16), (128, 1), (64, 16))  # tiles with a line for each threshold
SETTING = ("impl", "M", "N", "order", "threshold")
SOL_CURVES = (
    ("sol_attn, raster order", plot.RED, {"impl": "sol_attn", "order": "raster"}),
    ("sol_attn, cells order", plot.PURPLE, {"impl": "sol_attn", "order": "cells"}),
)


def quality_table(results: Results) -> str:
    return _quality(results, lambda impl, m, n, order, threshold: impl == "sol_attn" or (m, n) in LISTED)


def quality_summary(results: Results) -> str:
    """Ours at the useful thresholds."""
    return _quality(
        results, lambda impl, m, n, order, threshold: impl == "fgattn" and (m, n) in LISTED and threshold <= 2
    )


def _quality(results: Results, wanted: Callable[..., bool]) -> str:
    lines = []
    for key, rows in sorted(results.grouped("quality", *SETTING).items(), key=_place):
        if wanted(*key):
            lines.append(
                [
                    *_setting(key),
                    percent(plain_mean(rows, "density")),
                    percent(mean(rows, "error"), 1),
                    f"{mean(rows, 'ms'):.2f}",
                    f"{mean(rows, 'yardstick_ms'):.1f}",
                    f"{mean(rows, 'speedup'):.1f} x",
                ]
            )
    head = ["method", "M x N", "order", "threshold", "density", "error", "call, ms", "dense, ms", "speed-up"]
    return table(head, lines, results, "quality")


def tail_line(results: Results) -> str:
    """How much larger the error is without the tail, where that was measured."""
    parts = []
    found = results.grouped("quality", "threshold", impl="fgattn, no tail")
    for (threshold,), without in sorted(found.items()):
        tail = results.measured("quality", impl="fgattn", M=128, N=16, threshold=threshold)
        times = mean(without, "error") / mean(tail, "error")
        parts.append(f"{times:.1f} times as large at threshold {threshold:g}")
    if not parts:
        return "Not measured."
    return (
        "- **What is skipped still counts**: one pooled term per 16 keys, the tail. Without it the error "
        f"of the output is {' and '.join(parts)}."
    )


def generations_line(results: Results) -> str:
    try:
        gains = nearer_frames(results.rows("generations"))
    except Missing:
        return "Not measured."
    return (
        f"In `sol_attn`'s time of attention FG-Attn's frames are {sum(gains) / len(gains):.1f} dB closer "
        f"to dense ones, mean over tau {', '.join(f'{tau:g}' for tau in TAUS)}; {min(gains):.1f} dB at "
        "the worst."
    )


def quality_grid(results: Results) -> str:
    """Every tile shape at threshold 1."""
    found = results.grouped("quality", "M", "N", impl="fgattn", threshold=1)
    widths, lines = sorted({n for _, n in found}), []
    for m in sorted({m for m, _ in found}):
        for name, text in (
            ("error", lambda rows: percent(mean(rows, "error"), 1)),
            ("density", lambda rows: percent(plain_mean(rows, "density"))),
            ("executed", lambda rows: percent(plain_mean(rows, "executed_density"))),
            ("call, ms", lambda rows: f"{mean(rows, 'ms'):.2f}"),
        ):
            if m < 64 or name != "executed":  # larger tiles execute what they ask for
                cells = (text(found[m, n]) if (m, n) in found else "" for n in widths)
                lines.append([f"M={m}", name, *cells])
    return table(["", "", *(f"N={n}" for n in widths)], lines, results, "quality")


def generations_table(results: Results) -> str:
    """Seeds beside each other; the first line is dense."""
    dense = [row["ms"] for row in results.measured("generations", impl="cudnn")]
    lines = [[NAMES["cudnn"], "", "", "", "100 %", f"{geometric_mean(dense):.2f}", ""]] if dense else []
    for key, rows in sorted(results.grouped("generations", *SETTING).items(), key=_place):
        lines.append(
            [
                *_setting(key),
                percent(plain_mean(rows, "density")),
                f"{mean(rows, 'ms'):.2f}",
                _listed(rows, "psnr_db"),
            ]
        )
    seeds = ", ".join(str(s) for (s,) in results.grouped("generations", "seed"))
    head = ["method", "M x N", "order", "threshold", "density", "call, ms", f"PSNR, dB, seeds {seeds}"]
    return table(head, lines, results, "generations")


def methods_table(results: Results) -> str:
    """A line for each method and grain, densest first."""
    found = results.grouped("methods", "impl", "M", "N", "order", "strength")
    lines: dict[tuple, list[tuple[float, str]]] = {}
    for (impl, m, n, order, strength), rows in found.items():
        density = plain_mean(rows, "executed_density")
        lines.setdefault((impl, f"{m} x {n}", order), []).append(
            (-density, f"{strength:g}: {percent(density)}, {percent(mean(rows, 'error'), 1)}")
        )
    width = max(map(len, lines.values()), default=0)
    head = ["method", "M x N", "order", "strength: density, error", *[""] * (width - 1)]
    return table(
        head,
        [
            [*key, *(text for _, text in sorted(cells)), *[""] * (width - len(cells))]
            for key, cells in lines.items()
        ],
        results,
        "methods",
    )


def plan_age_table(results: Results) -> str:
    lines = [
        [
            age,
            percent(mean(rows, "attention_error"), 2),
            percent(max(row["worst_attention_error"] for row in rows), 1),
            percent(plain_mean(rows, "executed_density")),
        ]
        for (age,), rows in results.grouped("reuse", "plan_age").items()
    ]
    head = ["age of the plan, steps", "attention error", "worst call", "density"]
    return table(head, lines, results, "reuse")


def reuse_table(results: Results) -> str:
    lines = [
        [
            k,
            percent(mean(rows, "attention_error"), 2),
            _listed(rows, "psnr_db"),
            percent(plain_mean(rows, "executed_density")),
            f"{rows[0]['plans_made']} + {rows[0]['plans_reused']}",
            f"{plain_mean(rows, 'planning_ms'):.0f}",
            f"{plain_mean(rows, 'planning_saved_ms'):.0f}",
        ]
        for (k,), rows in results.grouped("reuse", "reuse_steps").items()
    ]
    seeds = ", ".join(str(s) for (s,) in results.grouped("reuse", "seed"))
    head = [
        "steps a plan serves",
        "attention error",
        f"PSNR, dB, seeds {seeds}",
        "density",
        "plans made + reused",
        "planning, ms",
        "saved, ms",
    ]
    return table(head, lines, results, "reuse")


def quality_plot(results: Results) -> str:
    dense = [row["ms"] for row in results.measured("quality", impl="cudnn")]
    curves = []
    for label, colour, columns in (
        ("FG-Attn 128 x 16", plot.GREEN, {"impl": "fgattn", "M": 128, "N": 16}),
        *SOL_CURVES,
    ):
        points = sorted(means(results.measured("quality", **columns), "threshold").items())
        curves.append(
            plot.Curve(
                label,
                colour,
                [(ms, 100 * error) for _, (error, ms) in points],
                labels=[f"{threshold:g}" for threshold, _ in points],
            )
        )
    name = f"dense cuDNN: {geometric_mean(dense):.1f} ms" if dense else "dense: not measured"
    return plot.draw(
        curves,
        "Output error against time of a whole call, demo model, 32 760 tokens, 12 heads",
        f"ms per call, planning and tail included ({name}); at the points: threshold",
        "error, %",
        plot.Axis((0, 2, 4, 6, 8)),
        plot.Axis((0.5, 1, 2, 5, 10, 20), log=True),
        note=provenance(results.rows("quality")),
    )


def generations_plot(results: Results) -> str:
    dense = [row["ms"] for row in results.measured("generations", impl="cudnn")]
    curves = []
    for label, colour, columns in (
        ("FG-Attn 128 x 16", plot.GREEN, {"impl": "fgattn", "M": 128, "N": 16}),
        ("FG-Attn 64 x 16", plot.BLUE, {"impl": "fgattn", "M": 64, "N": 16}),
        *SOL_CURVES,
    ):
        points = sorted(decibels(results.measured("generations", **columns), "threshold").items())
        curves.append(
            plot.Curve(
                label,
                colour,
                [point for _, point in points],
                labels=[f"{threshold:g}" for threshold, _ in points],
            )
        )
    name = f"dense cuDNN: {geometric_mean(dense):.1f} ms" if dense else "dense: not measured"
    return plot.draw(
        curves,
        "Frames of whole generations against dense ones, demo model, 32 760 tokens, 20 steps",
        f"ms per attention call, planning and tail included ({name}); at the points: threshold",
        "PSNR, dB",
        plot.Axis((0, 1, 2, 3, 4)),
        plot.Axis((20, 25, 30, 35, 40, 45)),
        note=provenance(results.rows("generations")),
    )


SECTIONS: dict[str, Callable[[Results], str]] = {
    "quality": quality_table,
    "quality summary": quality_summary,
    "quality grid": quality_grid,
    "generations": generations_table,
    "methods": methods_table,
    "plan age": plan_age_table,
    "reuse": reuse_table,
    "tail": tail_line,
    "generations line": generations_line,
}


def _place(item: tuple[tuple, list]) -> tuple:
    """Ours first, the tiles as listed; sol_attn by order as measured."""
    impl, m, n, order, threshold = item[0]
    return impl, -m, -n, order != "raster", threshold


def _setting(key: tuple) -> list[str]:
    impl, m, n, order, threshold = key
    return [NAMES.get(impl, impl), f"{m} x {n}", order, f"{threshold:g}"]


def _listed(rows: Iterable[dict], column: str) -> str:
    return ", ".join(f"{row[column]:.1f}" for row in rows)
