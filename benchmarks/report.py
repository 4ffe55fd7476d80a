"""Tables and plots of the results: from CSV files into marked places of README.md and benchmarks/README.md.

<!-- results: NAME -->        everything up to the closing mark is what SECTIONS[NAME] returns
<!-- end of results -->
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from . import demo_tables, measure, plot, targets
from .measure import RESULTS
from .results import MACHINE, NAMES, Results, mean, percent, plain, plain_mean, provenance, table
from .targets import MEASURED, TARGETS

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
MARKED = re.compile(r"(<!-- results: (.+?) -->\n).*?(<!-- end of results -->)", re.S)
BENCHMARKS = (
    "kernel",
    "plan",
    "quality",
    "generations",
    "end2end",
    "methods",
    "reuse",
    "breakeven",
    "first_use",
)
NAMED = ("impl", "M", "N", "threshold", "strength", "order", "shape")  # what tells rows apart
TILE_KEYS = (1, 2, 4, 8, 16, 32, 64, 128)


def write(folder: Path = RESULTS) -> None:
    """Bring the pages and the plots up to date with a folder of results."""
    results = Results(folder)
    for name in TARGETS:
        write_targets(results, name, RESULTS)
    for path in PAGES:
        path.write_text(page(path.read_text(), results))
    for name, picture in pictures(results).items():
        (RESULTS / name).write_text(picture)


def write_targets(results: Results, name: str, folder: Path) -> None:
    """The table of targets as a CSV file, from the rows of a benchmark if there are any."""
    if rows := results.rows(name):
        where = {column: rows[0][column] for column in MACHINE}
        measure.write(folder / f"{name}_targets.csv", targets.table(name, rows), where)


def page(text: str, results: Results) -> str:
    """The text with everything between marks made anew."""
    return MARKED.sub(lambda found: f"{found[1]}{SECTIONS[found[2]](results)}\n{found[3]}", text)


def pictures(results: Results) -> dict[str, str]:
    """SVG text by file name."""
    return {
        "kernel.svg": kernel_plot(results),
        "quality.svg": demo_tables.quality_plot(results),
        "generations.svg": demo_tables.generations_plot(results),
    }


def headline(results: Results) -> str:
    rows = results.measured("quality", impl="fgattn", M=128, N=16)
    parts = []
    for threshold in (1, 2):
        some = [row for row in rows if row["threshold"] == threshold]
        if some:
            parts.append(
                f"{mean(some, 'speedup'):.1f} times at threshold {threshold} "
                f"({percent(plain_mean(some, 'density'))} of scores, output error "
                f"{percent(mean(some, 'error'), 1)})"
            )
    if not parts:
        return "Not measured."
    gpu = rows[0]["gpu"].removeprefix("NVIDIA ")
    text = (
        f"- **Faster, measured**: on one {gpu} at 480p length (32 760 tokens, 12 heads) a whole call of "
        f"attention, planning and tail included, is faster than dense cuDNN attention: "
        f"{' and '.join(parts)}."
    )
    steps = [(row["shape"].split()[2], row["speedup"]) for row in results.measured("end2end", impl="fgattn")]
    if steps:
        text += (
            "\n- A step at the shapes of Wan 14B, random weights, 30 % of scores, is "
            + " and ".join(f"{speedup:.2f} times as fast at {size}" for size, speedup in steps)
            + "."
        )
    return text


def kernel_table(results: Results) -> str:
    lines = []
    for name, columns in (
        ("Hopper kernel, head size 128, M=128", {"impl": "hopper", "D": 128, "M": 128}),
        ("Hopper kernel, head size 128, M=64", {"impl": "hopper", "D": 128, "M": 64}),
        ("Hopper kernel, head size 64, M=128", {"impl": "hopper", "D": 64, "M": 128}),
        ("portable kernel, head size 128, M=128", {"impl": "triton", "D": 128, "M": 128}),
        ("portable kernel, head size 128, M=64", {"impl": "triton", "D": 128, "M": 64}),
        ("portable kernel, head size 64, M=128", {"impl": "triton", "D": 64, "M": 128}),
    ):
        found = _by_slice(results, **columns)
        if found:
            lines.append([name, *(f"{found[n]:.2f}" if n in found else "" for n in TILE_KEYS)])
    return table(["", *(f"N={n}" for n in TILE_KEYS)], lines, results, "kernel")


def peers_table(results: Results) -> str:
    """Every kernel beside ours on the same masks, and dense ones."""
    cases = ("all keys", "block-sparse peers", "sol_attn")
    rows = [row for case in cases for row in results.rows("kernel") if row.get("case") == case]
    lines, seen = [], set()
    for row in rows:
        if row["impl"] == "cudnn" and "cudnn" in seen:
            continue
        seen.add(row["impl"])
        tile = f"{row['M']} x {row['N']}" if "M" in row else "dense" if row["case"] == "all keys" else ""
        if row["status"] == MEASURED:
            lines.append(
                [
                    NAMES.get(row["impl"], row["impl"]),
                    tile,
                    percent(row["density"]),
                    f"{row['ms']:.2f}",
                    f"{row['yardstick_ms']:.2f}",
                    f"{row['tflops']:.0f}",
                    f"{row['ratio']:.2f}",
                    f"{row['error']:.1e}",
                ]
            )
    head = ["kernel", "mask tile", "density", "ms", "dense, ms", "TFLOP/s", "ratio", "error"]
    return table(head, lines, results, "kernel")


def targets_table(name: str) -> Callable[[Results], str]:
    def made(results: Results) -> str:
        lines = []
        rows = results.rows(name)
        for row in targets.table(name, rows) if rows else ():
            unit = f" {row['unit']}" if row["unit"] else ""
            sign = "≤" if row["sense"] == "at most" else "≥"
            value, stretch = ("" if row[c] is None else f"{row[c]:.3g}{unit}" for c in ("value", "stretch"))
            lines.append([row["figure"], value, f"{sign} {row['target']:g}{unit}", stretch, row["met"]])
        return table(
            ["figure", "measured", "target", "stretch", "met"], lines, results, name, f"{name}_targets"
        )

    return made


def plan_table(results: Results) -> str:
    lines = []
    for row in results.measured("plan", case="stages"):
        stage, share = row["impl"], percent(row["share"], 2)
        if stage == "cudnn":
            stage, share = "dense cuDNN", ""
        lines.append(
            [row["shape"], stage, row.get("N", ""), f"{row['ms']:.2f}", share, f"{row['error']:.1e}"]
        )
    return table(["shape", "stage", "N", "ms", "of dense", "error"], lines, results, "plan")


def end2end_table(results: Results) -> str:
    lines = [
        [
            row["shape"],
            f"{row['L']:,}".replace(",", " "),
            percent(row["density"]),
            f"{row['yardstick_ms'] / 1e3:.2f}",
            f"{row['ms'] / 1e3:.2f}",
            f"{row['speedup']:.2f} x",
            f"{row['error']:.1e}",
        ]
        for row in results.measured("end2end", impl="fgattn")
    ]
    head = ["step", "tokens", "density", "dense, s", "FG-Attn, s", "speed-up", "kernel error"]
    return table(head, lines, results, "end2end")


def breakeven_table(results: Results) -> str:
    groups: dict[tuple, dict[float, dict]] = {}
    for row in results.measured("breakeven", impl="fgattn", N=16):
        groups.setdefault((row["D"], row["heads"], row["L"]), {})[round(row["density"], 1)] = row
    lines = []
    for (dim, heads, length), found in groups.items():
        rows = [*found.values()]
        lines.append(
            [
                dim,
                heads,
                length,
                f"{rows[0]['yardstick_ms']:.2f}",
                *(f"{found[d]['ms']:.2f}" if d in found else "" for d in (0.1, 0.3, 0.6)),
                f"{plain_mean(rows, 'host_ms'):.2f}",
            ]
        )
    head = ["head size", "heads", "tokens", "dense", "10 %", "30 %", "60 %", "host"]
    return table(head, lines, results, "breakeven")


def first_use_table(results: Results) -> str:
    lines = [
        [
            row["busy"],
            row["cache"],
            row["kernels"],
            *(f"{row[part]:.1f}" for part in ("import_s", "selftest_s", "call_s", "seconds")),
        ]
        for row in results.measured("first_use")
    ]
    head = ["busy processes", "cache", "kernels compiled", "import", "self-test", "first call", "all, s"]
    return table(head, lines, results, "first_use")


def withheld_table(results: Results) -> str:
    """What was asked for and has no figure, with the reason."""
    lines = []
    for name in BENCHMARKS:
        for row in results.rows(name):
            if row.get("status") != MEASURED:
                what = ", ".join(f"{c} {row[c]}" for c in NAMED if c in row)
                line = [name, row.get("case", ""), what, row.get("status", "no status")]
                if line not in lines:
                    lines.append(line)
    if not lines:
        return "Nothing."
    head = ["benchmark", "case", "row", "why"]
    return plain(head, lines)


def kernel_plot(results: Results) -> str:
    curves = [
        plot.Curve(name, colour, sorted(_by_slice(results, **columns).items()))
        for name, colour, columns in (
            ("Hopper, M=128", plot.GREEN, {"impl": "hopper", "D": 128, "M": 128}),
            ("Hopper, M=64", plot.BLUE, {"impl": "hopper", "D": 128, "M": 64}),
            ("portable, M=128", plot.ORANGE, {"impl": "triton", "D": 128, "M": 128}),
        )
    ]
    for (impl, label), colour in zip(
        (
            ("flexattention", "FlexAttention"),
            ("flashattention-4", "FA4"),
            ("flashinfer", "FlashInfer"),
            ("sol_attn", "sol_attn"),
        ),
        (plot.PURPLE, plot.RED, plot.BROWN, plot.GREY),
        strict=True,
    ):
        rows = [
            row
            for row in results.measured("kernel", impl=impl)
            if "N" in row and abs(row["density"] - 0.3) < 0.01
        ]
        curves.append(
            plot.Curve(
                label,
                colour,
                [(row["N"], row["ratio"]) for row in rows],
                line=False,
                labels=[f"{row['M']}x{row['N']}" for row in rows],
            )
        )
    return plot.draw(
        curves,
        "Arithmetic rate at 30 % of the tiles, head size 128; dense cuDNN is 1",
        "N, keys that are kept or skipped together",
        "rate against dense",
        plot.Axis(TILE_KEYS, log=True),
        plot.Axis((0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)),
        note=provenance(results.rows("kernel")),
    )


SECTIONS: dict[str, Callable[[Results], str]] = {
    "headline": headline,
    "kernel": kernel_table,
    "peers": peers_table,
    "plan": plan_table,
    "end2end": end2end_table,
    "breakeven": breakeven_table,
    "first use": first_use_table,
    "withheld": withheld_table,
    **demo_tables.SECTIONS,
    **{f"{name} targets": targets_table(name) for name in TARGETS},
}


def _by_slice(results: Results, **columns) -> dict[int, float]:
    """N -> ratio of the even random lists at density 0.3 and 480p length."""
    rows = results.measured("kernel", case="random lists", L=32760, **columns)
    return {row["N"]: row["ratio"] for row in rows if abs(row["density"] - 0.3) < 0.01}
