"""Run reports as a picture: time of every step, density of every block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from ..outcomes import Outcome
from ..runs.reports import RunReport, StepReport
from .palette import (
    ATTENTION,
    BACKGROUND,
    DENSE,
    EXECUTED,
    FAINT,
    GRID,
    PLANNING,
    REQUESTED,
    REST,
    REUSED,
    RULE,
    SPARSE,
    TEXT,
    WARM_UP,
)
from .text import describe, headline

WIDTH, RUN_HEIGHT, LEGEND_HEIGHT, EMPTY_HEIGHT = 900, 330, 44, 120  # px
MARGIN, GAP, TICK_TEXT = 24, 72, 44
PANEL_TOP, PANEL_BOTTOM = 108, 286  # in a run's part of the picture
STEPS_SHARE = 0.64  # of the width for the steps, the rest is for the blocks
OUTLIER = 3  # a step above this multiple of its run's median is cut off: compilation, mostly
SEEN = 0.002  # difference of densities that is drawn at all
HEADROOM = 1.08  # of a scale over its highest bar

LEGEND = (
    (WARM_UP, "warm-up"),
    (DENSE, "dense"),
    (SPARSE, "sparse"),
    (REUSED, "reused plan"),
    (PLANNING, "planning"),
    (REST, "rest of the step"),
    (REQUESTED, "density requested"),
    (EXECUTED, "executed on top"),
)

Box = tuple[float, float, float, float]  # left, right, top, bottom


def draw(reports: Sequence[tuple[str, RunReport]]) -> Image.Image:
    """A chart of named runs, one below the other, with one time scale. RGB, 900 px wide."""
    height = len(reports) * RUN_HEIGHT + LEGEND_HEIGHT
    image = Image.new("RGB", (WIDTH, height if reports else EMPTY_HEIGHT), BACKGROUND)
    pen = ImageDraw.Draw(image)
    if not reports:
        _centred(pen, WIDTH / 2, EMPTY_HEIGHT / 2, "no run yet")
        return image
    limit = _time_limit([report for _, report in reports])
    for number, (name, report) in enumerate(reports):
        _draw_run(pen, number * RUN_HEIGHT, name, report, limit)
    _draw_legend(pen, image.height - LEGEND_HEIGHT, [report for _, report in reports])
    return image


@dataclass(frozen=True)
class _Panel:
    """Bars over a framed area; values run from 0 at the bottom to `limit` at the top."""

    pen: ImageDraw.ImageDraw
    left: float
    right: float
    top: float
    bottom: float
    limit: float
    numbers: Sequence[int]  # of the bars; negative is unknown

    def frame(self, title: str, axis: str, scale: float) -> None:
        """Title, grid and ticks; the labels at the side are values / scale."""
        self.pen.text((self.left, self.top - 10), title, TEXT, font(13), anchor="ls")
        step = _nice(self.limit / scale / 4)
        for i in range(math.floor(self.limit / scale / step + 1e-6) + 1):
            y = self.y(i * step * scale)
            self.pen.line((self.left, y, self.right, y), GRID)
            self.pen.text((self.left - 8, y), f"{i * step:g}", FAINT, font(12), anchor="rm")
        self.pen.line((self.left, self.bottom, self.right, self.bottom), RULE)
        self.pen.text((self.right, self.bottom + 30), axis, FAINT, font(12), anchor="rs")
        free = self.left - TICK_TEXT  # right end of the last number
        every = max(1, round(_nice(len(self.numbers) / 8)))
        for i, number in enumerate(self.numbers):
            label = str(number) if number >= 0 else "?"
            half = self.pen.textlength(label, font(12)) / 2
            if (i == 0 or number % every == 0) and self.middle(i) - half > free:
                self.pen.text((self.middle(i), self.bottom + 5), label, FAINT, font(12), anchor="ma")
                free = self.middle(i) + half + 8

    def middle(self, i: int) -> float:
        return self.left + (self.right - self.left) * (i + 0.5) / len(self.numbers)

    def y(self, value: float) -> float:
        return self.bottom - (self.bottom - self.top) * min(value, self.limit) / self.limit

    def bar(self, i: int, parts: Sequence[tuple[float, str]]) -> None:
        """Bar i, stacked from the bottom."""
        slot = (self.right - self.left) / len(self.numbers)
        width = max(1, min(int(slot - max(1, 0.18 * slot)), 40))
        left = round(self.middle(i) - width / 2)
        start = 0.0
        for value, colour in parts:
            low, high = round(self.y(start)), round(self.y(start + value))
            if low > high:
                self.pen.rectangle((left, high, left + width - 1, low - 1), colour)
            start += value


def _draw_run(pen, top: int, name: str, report: RunReport, limit: float) -> None:
    wide = WIDTH - 2 * MARGIN
    name_font, line_font = font(20), font(16)
    pen.text((MARGIN, top + 34), name, TEXT, name_font, anchor="ls")
    after = MARGIN + pen.textlength(name, name_font) + 14
    colour = SPARSE if report.count(Outcome.SPARSE) and not report.failure else PLANNING
    pen.text(
        (after, top + 34),
        fit(pen, headline(report), line_font, WIDTH - MARGIN - after),
        colour,
        line_font,
        anchor="ls",
    )
    what = f"{report.device}, {report.tokens} tokens"
    if report.count(Outcome.SPARSE):
        what = f"{describe(report.settings)}; {report.implementation} on {what}"
    pen.text((MARGIN, top + 58), fit(pen, what, font(13), wide), FAINT, font(13), anchor="ls")
    left, right = MARGIN + TICK_TEXT, MARGIN + wide * STEPS_SHARE
    _draw_steps(pen, (left, right, top + PANEL_TOP, top + PANEL_BOTTOM), report.steps, limit)
    _draw_blocks(pen, (right + GAP, WIDTH - MARGIN, top + PANEL_TOP, top + PANEL_BOTTOM), report)


def _draw_steps(pen, box: Box, steps: Sequence[StepReport], limit: float) -> None:
    if not steps:
        return _draw_nothing(pen, box, "no step was timed")
    unit, scale = ("s", 1e3) if limit >= 2e3 else ("ms", 1.0)
    panel = _Panel(pen, *box, limit, [step.index + 1 for step in steps])
    panel.frame(f"time per step, {unit}", "step", scale)
    free = 0.0  # right end of the last note
    for i, step in enumerate(steps):
        rest = max(0.0, step.total - step.attention - step.planning)
        panel.bar(i, ((step.attention, ATTENTION[step.kind]), (step.planning, PLANNING), (rest, REST)))
        if step.total > limit:
            note = f"{step.total / 1e3:.3g} s"
            half = pen.textlength(note, font(12)) / 2
            x = min(max(panel.middle(i), panel.left + half), panel.right - half)
            if x - half >= free:
                pen.text(
                    (x, panel.top + 6),
                    note,
                    TEXT,
                    font(12),
                    anchor="ma",
                    stroke_width=2,
                    stroke_fill=BACKGROUND,
                )
                free = x + half + 6


def _draw_blocks(pen, box: Box, report: RunReport) -> None:
    if not report.blocks:
        return _draw_nothing(pen, box, "no sparse call")
    blocks = report.blocks
    top = max(b.executed_density for b in blocks)
    panel = _Panel(pen, *box, min(1.0, HEADROOM * max(top, 0.02)), [b.block for b in blocks])
    panel.frame("density per block, %", "block", 0.01)
    for i, block in enumerate(blocks):
        panel.bar(i, ((block.density, REQUESTED), (block.executed_density - block.density, EXECUTED)))


def _draw_nothing(pen, box, reason: str) -> None:
    left, right, top, bottom = box
    pen.rectangle((left, top, right, bottom), outline=GRID)
    _centred(pen, (left + right) / 2, (top + bottom) / 2, reason)


def _draw_legend(pen, top: int, reports: Sequence[RunReport]) -> None:
    x = MARGIN
    used = _colours(reports)
    for colour, label in (entry for entry in LEGEND if entry[0] in used):
        pen.rectangle((x, top + 12, x + 11, top + 23), colour)
        pen.text((x + 18, top + 18), label, FAINT, font(13), anchor="lm")
        x += 18 + pen.textlength(label, font(13)) + 18


def _colours(reports: Sequence[RunReport]) -> set[str]:
    """What these runs have."""
    steps = [step for report in reports for step in report.steps]
    blocks = [block for report in reports for block in report.blocks]
    used = {ATTENTION[step.kind] for step in steps}
    used |= {REST} if steps else set()
    used |= {PLANNING} if any(step.planning for step in steps) else set()
    used |= {REQUESTED} if blocks else set()
    used |= {EXECUTED} if any(b.executed_density - b.density >= SEEN for b in blocks) else set()
    return used


def _time_limit(reports: Sequence[RunReport]) -> float:
    """Top of the time scale, ms; outliers of a run do not stretch it."""
    highest = 0.0
    for report in reports:
        totals = sorted(step.total for step in report.steps)
        usual = [total for total in totals if total <= OUTLIER * totals[len(totals) // 2]]
        highest = max([highest, *usual])
    return HEADROOM * highest or 1.0


def _nice(step: float) -> float:
    """The smallest of 1, 2, 5, 10 ... times a power of ten that is at least `step`."""
    power = 10 ** math.floor(math.log10(step))
    return next(n * power for n in (1, 2, 5, 10) if n * power >= step * (1 - 1e-9))


def fit(pen, text: str, font, width: float) -> str:
    """The text on one line, shortened to a width in px."""
    text = " ".join(text.split())
    if pen.textlength(text, font) <= width:
        return text
    while text and pen.textlength(text + "...", font) > width:
        text = text[:-1]
    return text + "..."


def _centred(pen, x: float, y: float, text: str) -> None:
    pen.text((x, y), text, FAINT, font(14), anchor="mm")


def font(size: int):
    """The font of every picture."""
    return ImageFont.load_default(size)
