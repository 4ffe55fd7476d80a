"""GPU timing with a cold cache, errors against float64, and CSV files that say where they come from."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import triton
from fgattn import Settings, SparsePlan, TokenLayout
from fgattn.backends import registry
from fgattn.backends.base import Backend, Eligible, Planned, Tail
from fgattn.backends.execute import attend, plan_of
from fgattn.call import Call
from fgattn.layout import CELL
from fgattn.tensors import empty_like

from .shapes import QKV

RESULTS = Path(__file__).parent / "results"
FLUSH_BYTES = 256 << 20  # larger than any L2
BUSY_CYCLES = 4_000_000  # about 2 ms: longer than queueing a call takes


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
    return [quantiles(taken) for taken in times]


def quantiles(times: list[float]) -> dict[str, float]:
    """Columns of a list of times in ms."""
    low, median, high = (
        torch.tensor(times, dtype=torch.float64)
        .quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
        .tolist()
    )
    return {"ms": median, "ms_p20": low, "ms_p80": high}


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 error; infinite if anything is not finite."""
    error = ((got.double() - expected.double()).norm() / expected.double().norm()).item()
    return error if error == error else float("inf")


def sampled_error(qkv: QKV, out, rows: int, *, kept=None, geometry=None, tail=None) -> float:
    """Worst relative error of three query tiles against float64 with a dense mask.

    Args:
        qkv, out: [1, H, L, D].
        rows: queries of a tile.
        kept: (head, tile) -> bool [L_k] by position; None is every key.
        geometry: order of tokens; None is as stored.
        tail: partial output [1, H, runs, D] and log-sum-exp [1, H, runs] that is merged, or None.
    """
    q, k, v = qkv
    heads, queries = q.shape[1:3]
    tiles, errors = -(-queries // rows), []
    query_tokens = torch.arange(queries, device=q.device) if geometry is None else geometry.query_tokens
    key_tokens = torch.arange(k.shape[2], device=q.device) if geometry is None else geometry.key_tokens
    for head, tile in ((0, 0), (heads - 1, tiles - 1), (heads // 2, tiles // 2)):
        position = torch.arange(tile * rows, min((tile + 1) * rows, queries), device=q.device)
        keys = key_tokens if kept is None else key_tokens[kept(head, tile)]
        scores = q[0, head, query_tokens[position]].double() @ k[0, head, keys].double().T
        scores *= q.shape[3] ** -0.5
        if tail is not None:
            pooled, total = (x[0, head, position // CELL].double() for x in tail)
            scores = torch.cat((scores, total[:, None]), 1)
        weights = scores.softmax(1)
        expected = weights[:, : len(keys)] @ v[0, head, keys].double()
        if tail is not None:
            expected += weights[:, -1:] * pooled
        errors.append(relative_error(out[0, head, query_tokens[position]], expected))
    return max(errors)


def planned_error(qkv: QKV, plan: SparsePlan, out) -> float:
    """Worst relative error of three query tiles of a plan with its tail, against float64."""

    def kept(head: int, tile: int) -> torch.Tensor:
        return plan.kept_keys(0, slice(head, head + 1))[0, tile]

    tail = tail_of(*qkv, plan)
    return sampled_error(qkv, out, plan.tile_rows, kept=kept, geometry=plan.geometry, tail=tail)


def machine(commit: str) -> dict[str, str]:
    """What a figure needs beside it to mean something."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "commit": commit,
    }


def checked_out() -> str:
    """Commit of this checkout, "unknown" outside git."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=RESULTS.parent, capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def write(path: Path, rows: Iterable[dict[str, object]], where: dict[str, str]) -> None:
    """Write rows to a CSV file, each followed by the machine's columns; empty where a row has no value."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = dict.fromkeys(name for row in rows for name in row)
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, [*columns, *where], lineterminator="\n")
        table.writeheader()
        table.writerows({**{k: short(v) for k, v in row.items()}, **where} for row in rows)


def short(value: object) -> object:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else value


def planned_attention(q, k, v, settings: Settings, layout: TokenLayout) -> tuple[torch.Tensor, SparsePlan]:
    """A sparse call as a run makes it: the plan's summaries serve the tail. Its output and its plan."""
    call = Call.to_plan(q, k, v, settings, layout)
    backend = registry.required(call, None)
    planned = plan_of(call, backend)
    return attend(call, backend, planned, empty_like(q)), planned.plan


def tail_of(q, k, v, plan: SparsePlan, impl: str | None = None) -> Tail:
    """The tail of a plan, with means made for it, by the fastest backend or a named one."""
    call = Call.under(plan, q, k, v)
    backend = registry.required(call, impl)
    assert backend.tail, f"the {backend.name} backend has no tail of its own"
    return backend.tail(call, Planned(plan))


def best_backend() -> Backend:
    """What runs the calls of a run on the current GPU."""
    answer = registry.on_device(torch.device("cuda"), Settings())
    if not isinstance(answer, Eligible):
        raise RuntimeError(answer.text)
    return answer.backend
