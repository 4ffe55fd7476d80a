"""Line plots as SVG text: no dependency, and the same data give the same file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 560, 46, 350  # of the frame; the legend is right of it
GREEN, BLUE, ORANGE, PURPLE = "#2a9d5c", "#3572b0", "#d98a1f", "#8a5bb5"
RED, BROWN, GREY, INK, RULE = "#c8453b", "#8c6239", "#6b7280", "#1f2933", "#d5dae0"


@dataclass(frozen=True)
class Axis:
    """Ticks; the first and the last are the ends, where no value lies beyond them."""

    ticks: Sequence[float]
    log: bool = False

    def covering(self, values: Sequence[float]) -> tuple[float, float]:
        return min([self.ticks[0], *values]), max([self.ticks[-1], *values])


@dataclass(frozen=True)
class Curve:
    name: str
    colour: str
    points: Sequence[tuple[float, float]]
    line: bool = True
    labels: Sequence[str] = ()


def draw(curves: Sequence[Curve], title: str, across: str, up: str, x: Axis, y: Axis, *, note: str) -> str:
    """An SVG picture; curves without points are left out."""
    curves = [curve for curve in curves if curve.points]
    at_x = _scale(x, [p[0] for c in curves for p in c.points], LEFT, RIGHT)
    at_y = _scale(y, [p[1] for c in curves for p in c.points], BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 24, title, size=14),
    ]
    for tick in x.ticks:
        parts += [
            _line(at_x(tick), TOP, at_x(tick), BOTTOM, RULE),
            _text(at_x(tick), BOTTOM + 16, f"{tick:g}", "middle"),
        ]
    for tick in y.ticks:
        parts += [
            _line(LEFT, at_y(tick), RIGHT, at_y(tick), RULE),
            _text(LEFT - 6, at_y(tick) + 4, f"{tick:g}", "end"),
        ]
    parts += [
        _text((LEFT + RIGHT) / 2, BOTTOM + 36, across, "middle"),
        _text(LEFT - 44, TOP - 8, up),
        _text(LEFT, HEIGHT - 8, note, size=10),
    ]
    for number, curve in enumerate(curves):
        places = [(at_x(a), at_y(b)) for a, b in curve.points]
        if curve.line:
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{curve.colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{curve.colour}"/>' for a, b in places]
        parts += _labels(curve, places, below=bool(number % 2))  # those of neighbours keep apart
        row = TOP + 12 + 22 * number
        parts += [
            f'<circle cx="{RIGHT + 22}" cy="{row - 4}" r="4" fill="{curve.colour}"/>',
            _text(RIGHT + 34, row, curve.name),
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _labels(curve: Curve, places: Sequence[tuple[float, float]], below: bool) -> list[str]:
    """Beside the points, off the line where it rises; above points without a line."""
    drawn = []
    for i, label in enumerate(curve.labels):
        (a, b), (a0, b0), (a1, b1) = places[i], places[max(i - 1, 0)], places[min(i + 1, len(places) - 1)]
        rises = (a1 - a0) * (b1 - b0) < 0
        left = (rises and not below) or a > RIGHT - 50
        where = (
            (a, b - 8, "middle")
            if not curve.line
            else (a - 6 if left else a + 6, b + 16 if below else b - 6, "end" if left else "start")
        )
        drawn.append(_text(*where[:2], label, where[2], 10, curve.colour))
    return drawn


def _scale(axis: Axis, values: Sequence[float], start: float, end: float):
    """Value -> pixel."""
    low, high = axis.covering(values)

    def place(value: float) -> float:
        along, whole = (math.log(x / low) if axis.log else x - low for x in (value, high))
        return start + along / whole * (end - start)

    return place


def _line(x0: float, y0: float, x1: float, y1: float, colour: str) -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12, colour: str = INK) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">'
        f"{escape(text)}</text>"
    )
