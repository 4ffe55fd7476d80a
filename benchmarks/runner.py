"""The runner: checks and times cases, withholds what it cannot vouch for, writes CSV files.

A case is a group of runs on the same tensors; the first one is the yardstick of the others. A run is
checked right before it is timed, in the same process; where the check fails, its row says so and has
no time. Nothing that goes wrong in one case stops the others.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import targets
from .measure import machine, milliseconds, short, write
from .targets import MEASURED


@dataclass(frozen=True)
class Run:
    """One call that is timed, and how its result is judged.

    Attributes:
        name: goes into the column "impl".
        call: what is timed.
        error: of what the call returned; the row is withheld unless it is below `tolerance`.
        columns: more columns of the row; `density` makes ratios count work, not calls.
        missing: why this run cannot even be tried.
    """

    name: str
    call: Callable[[], Any] = lambda: None
    error: Callable[[Any], float] = lambda out: math.inf
    tolerance: float = 0.0
    columns: dict[str, Any] = field(default_factory=dict)
    missing: str | None = None


@dataclass(frozen=True)
class Case:
    """Runs that alternate.

    Attributes:
        columns: of every row.
        make: the tensors and the runs; the first run is the yardstick.
        figures: more columns from a timed row.
    """

    columns: dict[str, Any]
    make: Callable[[], list[Run]]
    repeats: int = 20
    warmup: int = 3
    figures: Callable[[dict], dict] = lambda row: {}


def rows_of(case: Case, clock=milliseconds) -> list[dict[str, Any]]:
    """One row per run: measured, or withheld with the reason."""
    try:
        runs = case.make()
    except Exception as failure:
        return [{**case.columns, "status": _withheld(failure)}]
    rows: list[dict[str, Any]] = []
    timed: list[tuple[Run, dict[str, Any]]] = []
    for run in runs:
        row = {**case.columns, "impl": run.name, **run.columns, **_judged(run)}
        rows.append(row)
        if row["status"] == MEASURED:
            timed.append((run, row))
    if not rows or rows[0]["status"] != MEASURED:  # ratios to nothing
        for _, row in timed:
            row["status"] = "withheld: its yardstick is not measured"
        return rows
    try:
        times = clock(*(run.call for run, _ in timed), repeats=case.repeats, warmup=case.warmup)
    except Exception as failure:
        for _, row in timed:
            row["status"] = _withheld(failure)
        return rows
    first = rows[0]
    for (_, row), taken in zip(timed, times, strict=True):
        row.update(taken)
    for _, row in timed:
        row.update(yardstick=first["impl"], yardstick_ms=first["ms"], speedup=first["ms"] / row["ms"])
        if "density" in row and "density" in first:
            row["ratio"] = row["speedup"] * row["density"] / first["density"]
        row.update(case.figures(row))
    return rows


def run(
    name: str, sources: Iterable[Callable], quick: bool, folder: Path, commit: str, *, clock=milliseconds
) -> None:
    """Measure a benchmark's sources; write NAME.csv and NAME_targets.csv, and print both.

    A source is a function of `quick` that yields cases, or rows that it has measured and checked itself.
    """
    where = machine(commit)
    rows: list[dict[str, Any]] = []
    for item in (item for source in sources for item in _items(source, quick)):
        found = rows_of(item, clock) if isinstance(item, Case) else [{"status": MEASURED, **item}]
        rows += found
        write(folder / f"{name}.csv", rows, where)  # after each case: a run that is killed leaves its rows
        for row in found:
            print("  ".join(f"{key} {short(value)}" for key, value in row.items()), flush=True)
    reached = targets.table(name, rows)
    if reached:
        write(folder / f"{name}_targets.csv", reached, where)
    for row in reached:
        print("  ".join(f"{key} {short(value)}" for key, value in row.items()), flush=True)


def _items(source: Callable, quick: bool) -> Iterator:
    try:
        yield from source(quick)
    except Exception as failure:
        yield {"case": source.__module__.rpartition(".")[2], "status": _withheld(failure)}


def _judged(run: Run) -> dict[str, Any]:
    if run.missing:
        return {"status": run.missing}
    try:
        error = run.error(run.call())
    except Exception as failure:
        return {"status": _withheld(failure)}
    judged = {"error": error, "tolerance": run.tolerance, "status": MEASURED}
    if not error < run.tolerance:
        judged["status"] = f"withheld: error {error:.2g}, not below {run.tolerance:g}"
    return judged


def _withheld(failure: Exception) -> str:
    traceback.print_exception(failure)
    return " ".join(f"withheld: {type(failure).__name__}: {failure}".split())[:160]
