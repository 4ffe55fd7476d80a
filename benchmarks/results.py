"""Rows of the CSV files, and how they are shown in tables."""

from __future__ import annotations

import csv
from pathlib import Path

from .targets import MEASURED, geometric_mean

PROVENANCE = ("gpu", "torch", "triton", "date", "commit")
MACHINE = ("gpu", "torch", "triton", "python", "date", "commit")  # text, even where it looks like a number
NAMES = {
    "hopper": "FG-Attn, Hopper kernel",
    "triton": "FG-Attn, portable kernel",
    "fgattn": "FG-Attn",
    "fgattn, no tail": "FG-Attn without tail",
    "cudnn": "cuDNN (SDPA)",
    "sdpa flash": "flash (SDPA)",
    "flexattention": "FlexAttention",
    "flashattention-4": "FlashAttention-4",
    "flashinfer": "FlashInfer, variable blocks",
}


class Results:
    """Rows of the CSV files in a folder, numbers as numbers."""

    def __init__(self, folder: Path):
        self.folder = folder

    def rows(self, name: str) -> list[dict]:
        """Every row of NAME.csv, none if there is no such file."""
        path = self.folder / f"{name}.csv"
        if not path.exists():
            return []
        with open(path, newline="") as file:
            return [
                {k: v if k in MACHINE else _number(v) for k, v in row.items() if v != ""}
                for row in csv.DictReader(file)
            ]

    def measured(self, name: str, **columns) -> list[dict]:
        """Rows that hold a measurement and have these columns."""
        return [
            row
            for row in self.rows(name)
            if row.get("status") == MEASURED and all(row.get(k) == v for k, v in columns.items())
        ]

    def grouped(self, name: str, *by: str, **columns) -> dict[tuple, list[dict]]:
        """Measured rows that have all of some columns, by their values."""
        groups: dict[tuple, list[dict]] = {}
        for row in self.measured(name, **columns):
            if all(column in row for column in by):
                groups.setdefault(tuple(row[column] for column in by), []).append(row)
        return groups


def table(head: list[str], lines: list[list], results: Results, name: str, file: str = "") -> str:
    """A table that says where it comes from; a note that there is nothing if there is not."""
    if not lines:
        return "Not measured."
    source = f"{provenance(results.rows(name))}. `benchmarks/results/{file or name}.csv`"
    return f"{plain(head, lines)}\n\n{source}"


def plain(head: list[str], lines: list[list]) -> str:
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (head, ["---"] * len(head), *lines))


def provenance(rows: list[dict]) -> str:
    """Where rows come from, one line."""
    places = dict.fromkeys(tuple(row[c] for c in PROVENANCE) for row in rows)
    return "; ".join(
        f"{gpu}, torch {torch}, Triton {triton}, {date}, commit {commit}"
        for gpu, torch, triton, date, commit in places
    )


def mean(rows: list[dict], column: str) -> float:
    """Geometric, for errors and times."""
    return geometric_mean([row[column] for row in rows])


def plain_mean(rows: list[dict], column: str) -> float:
    return sum(row[column] for row in rows) / len(rows)


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
