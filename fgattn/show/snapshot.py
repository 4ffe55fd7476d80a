"""What the page is told of a run while it samples: one message, whole every time, small enough to send often.

`Snapshot` is the definition of the message; `web/js/schema.js` holds a copy that a test compares. A change of
the fields is a new SCHEMA_VERSION.
"""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, dataclass, replace
from typing import Literal

from ..runs.reports import Kind, RunReport, RunSettings
from .text import by_number, headline

SCHEMA_VERSION = 3
MAX_BYTES = 22_000  # of a snapshot as JSON; the limits below keep it, the heat map takes what they leave
MAX_STEPS, MAX_BLOCKS, MAX_CALLS = 100, 64, 6  # the last, the first, the most frequent
MAX_SLIDERS = 16  # the last
MAX_TEXT, MAX_REASON = 160, 60  # characters

State = Literal["running", "done", "failed", "interrupted"]


@dataclass(frozen=True)
class Step:
    """A finished step; ms. A step is "reused" if it ran sparse without planning."""

    index: int
    total: float
    attention: float
    planning: float
    kind: Kind
    estimated_error: float | None


@dataclass(frozen=True)
class Sliders:
    """Where the sliders stood from a step on; they move during a run with the node's live switch on."""

    step: int
    threshold: float
    warmup_steps: int


@dataclass(frozen=True)
class Block:
    """Share of scores that the selection asked for; block -1 is unknown."""

    block: int
    density: float
    estimated_error: float | None


@dataclass(frozen=True)
class Calls:
    """Attention calls that became the same: a code that stays (`Outcome.code`), and words for people."""

    outcome: str
    text: str
    number: int


@dataclass(frozen=True)
class Snapshot:
    """One run so far; times in ms.

    Attributes:
        node: id of the FGAttnPatch node.
        run: differs from run to run.
        step, steps: finished, and scheduled.
        total: from the first model evaluation to the last finished step.
        dense_call, sparse_call, speedup, density: as in `RunReport`; None until known.
        estimated_error: as in `RunReport`, of the run, a step or a block; None until known.
        heat: density by step and block, base64. One byte for each of `blocks`, for each of the last steps of
            `timeline`, as many as there are: 0 if the block was not sparse, else 1 + 254 * density.
    """

    version: int
    node: str
    run: str
    state: State
    headline: str
    settings: RunSettings
    tokens: int
    step: int
    steps: int
    total: float
    dense_call: float | None
    sparse_call: float | None
    speedup: float | None
    density: float | None
    estimated_error: float | None
    timeline: tuple[Step, ...]
    blocks: tuple[Block, ...]
    calls: tuple[Calls, ...]
    heat: str
    sliders: tuple[Sliders, ...]


def snapshot(report: RunReport, node: str, run: str, state: State) -> dict:
    """A run's message, ready for JSON."""
    cut_short = state in ("interrupted", "failed")  # in the middle of a step
    steps = (report.steps[:-1] if cut_short else report.steps)[-MAX_STEPS:]
    calls = by_number(report.calls)[:MAX_CALLS]
    if state == "done" and report.failure:
        state = "failed"
    title = headline(report) if report.calls or state != "running" else "waiting for the first step"
    made = Snapshot(
        SCHEMA_VERSION,
        node,
        run,
        state,
        title[:MAX_TEXT],
        report.settings,
        report.tokens,
        step=1 + max((s.index for s in steps), default=-1),
        steps=report.scheduled,
        total=round(report.total, 1),
        dense_call=_rounded(report.dense_call),
        sparse_call=_rounded(report.sparse_call),
        speedup=_rounded(report.speedup),
        density=_rounded(report.density),
        estimated_error=_two_digits(report.estimated_error),
        timeline=tuple(
            Step(
                s.index,
                round(s.total, 1),
                round(s.attention, 1),
                round(s.planning, 1),
                s.kind,
                _two_digits(s.estimated_error),
            )
            for s in steps
        ),
        blocks=tuple(
            Block(b.block, round(b.density, 3), _two_digits(b.estimated_error))
            for b in report.blocks[:MAX_BLOCKS]
        ),
        calls=tuple(Calls(reason.outcome.code, reason.text[:MAX_REASON], number) for reason, number in calls),
        heat="",
        sliders=tuple(Sliders(*values) for values in report.sliders[-MAX_SLIDERS:]),
    )
    room = MAX_BYTES - len(json.dumps(asdict(made))) - 4  # base64 has four letters for three bytes
    return asdict(replace(made, heat=_heat(report, [s.index for s in steps], room * 3 // 4)))


def _heat(report: RunReport, steps: list[int], room: int) -> str:
    blocks = {b.block: i for i, b in enumerate(report.blocks[:MAX_BLOCKS])}
    fit = max(0, room) // max(1, len(blocks))
    rows = {step: bytearray(len(blocks)) for step in steps[max(0, len(steps) - fit) :]}
    for cell in report.cells:
        if cell.step in rows and cell.block in blocks:
            rows[cell.step][blocks[cell.block]] = 1 + round(254 * cell.density)
    return base64.b64encode(b"".join(rows.values())).decode()


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _two_digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.2g}")
