"""What the demo shows: progress, a table, and the two videos side by side."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from ..runs.reports import RunReport, StepReport
from ..show.palette import BACKGROUND, TEXT
from ..show.text import percent

PANEL_WIDTH = 416  # px of a video, at least
LABEL_HEIGHT = 30  # px
FRAME_TIME = 83  # ms
BAR = 24  # characters


class Progress:
    """A bar on standard error that redraws itself; one line at the end where nobody watches."""

    def __init__(self, name: str, steps: int):
        self.name, self.steps = name, steps
        self.start = time.perf_counter()

    def __call__(self, done: int) -> None:
        watched, last = sys.stderr.isatty(), done == self.steps
        if watched or last:
            filled = BAR * done // self.steps
            seconds = time.perf_counter() - self.start
            sys.stderr.write(
                f"{chr(13) * watched}{self.name:8} [{'#' * filled:-<{BAR}}] "
                f"step {done} of {self.steps}, {seconds:.0f} s{chr(10) * last}"
            )
            sys.stderr.flush()


def table(dense: RunReport, sparse: RunReport, error: float, decibels: float) -> str:
    """Both runs in two columns; times are medians over steps or calls."""
    before = dense.steps
    after = [step for step in sparse.steps if step.sparse_calls]
    rows = [
        ("", "dense", "FG-Attn"),
        ("time per step", _time(before, "total"), _time(after, "total")),
        ("  self-attention", _time(before, "attention"), _time(after, "attention", "planning")),
        ("    of which planning", "", _time(after, "planning")),
        ("self-attention call", _milliseconds(dense.dense_call), _milliseconds(sparse.sparse_call)),
        ("density, requested", percent(1), _percent(sparse.density)),
        ("density, executed", percent(1), _percent(sparse.executed_density)),
        ("final latent, relative error", "", _percent(error)),
        ("frames, PSNR against dense", "", f"{decibels:.1f} dB"),
    ]
    return "\n".join(f"{name:30}{left:>12}{right:>12}".rstrip() for name, left, right in rows)


def side_by_side(videos: Sequence[tuple[str, torch.Tensor]], path: Path) -> None:
    """Write labelled videos [F, H, W, 3] in 0..1, enlarged, next to each other as an animated WebP."""
    frames = []
    for pictures in zip(*(video for _, video in videos), strict=True):
        height, width = pictures[0].shape[:2]
        factor = -(-PANEL_WIDTH // width)
        size = (width * factor, height * factor)
        frame = Image.new("RGB", (size[0] * len(videos), size[1] + LABEL_HEIGHT), BACKGROUND)
        pen = ImageDraw.Draw(frame)
        for i, ((label, _), picture) in enumerate(zip(videos, pictures, strict=True)):
            pixels = (picture * 255).round().to(torch.uint8).cpu().numpy()
            frame.paste(
                Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC), (i * size[0], LABEL_HEIGHT)
            )
            pen.text(
                (i * size[0] + 10, LABEL_HEIGHT / 2), label, TEXT, ImageFont.load_default(16), anchor="lm"
            )
        frames.append(frame)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=FRAME_TIME, loop=0, quality=85)


def _time(steps: Sequence[StepReport], *parts: str) -> str:
    """Median over steps of the sum of some parts."""
    if not steps:
        return "-"
    return _milliseconds(statistics.median(sum(getattr(step, part) for part in parts) for step in steps))


def _milliseconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value / 1e3:.2f} s" if value >= 1e3 else f"{value:.3g} ms"


def _percent(value: float | None) -> str:
    return "-" if value is None else percent(value)
