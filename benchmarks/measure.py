"""GPU timing with a cold cache, errors, and CSV files that say where they come from."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
import triton

RESULTS = Path(__file__).parent / "results"
FLUSH_BYTES = 256 << 20  # larger than any L2
BUSY_CYCLES = 2_000_000  # about 1 ms: longer than queueing a call takes


def milliseconds(*runs: Callable[[], object], repeats: int = 20, warmup: int = 3) -> list[dict[str, float]]:
    """Median, 20th and 80th percentile of each run's GPU time in ms.

    The runs alternate, so that both sides of a ratio see the same clocks; L2 is flushed before
    each, and compilation and warm-up are excluded. The GPU is kept busy until the host has queued the
    run, as in a model's stream of calls.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for run in runs:
        for _ in range(warmup):
            run()
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, taken in zip(runs, times, strict=True):
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(BUSY_CYCLES)
            start.record()
            run()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end))
    summary = []
    for taken in times:
        low, median, high = torch.tensor(taken).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        summary.append({"ms": median, "ms_p20": low, "ms_p80": high})
    return summary


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 error; infinite if anything is not finite."""
    error = ((got.double() - expected.double()).norm() / expected.double().norm()).item()
    return error if error == error else float("inf")


def machine(commit: str) -> dict[str, str]:
    """What a figure needs beside it to mean something."""
    return {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "python": platform.python_version(), "date": datetime.date.today().isoformat(),
        "commit": commit,
    }


def checked_out() -> str:
    """Commit of this checkout, "unknown" outside git."""
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=RESULTS.parent,
                               capture_output=True, text=True)
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def write(name: str, rows: list[dict[str, object]], folder: Path, commit: str) -> None:
    """Write rows to a CSV file, each with the machine's columns, and print them."""
    folder.mkdir(parents=True, exist_ok=True)
    where = machine(commit)
    with open(folder / f"{name}.csv", "w", newline="") as file:
        table = csv.DictWriter(file, [*rows[0], *where], lineterminator="\n")
        table.writeheader()
        table.writerows({**{k: _short(v) for k, v in row.items()}, **where} for row in rows)
    for row in rows:
        print("  ".join(f"{k} {_short(v)}" for k, v in row.items()))


def _short(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value
