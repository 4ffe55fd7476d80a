"""A run's maps as pictures: keys of a query tile over the video's frames, density by block and head."""

from __future__ import annotations

import math
import textwrap

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from ..outcomes import Reason
from ..runs.maps import Maps, TileMap
from .chart import MARGIN, WIDTH, fit, font
from .palette import BACKGROUND, COMPUTED, FAINT, GRID, OWN, RAMP, RULE, SKIPPED, TEXT
from .text import percent

HEAD, FOOT, LABEL, GAP = 104, 52, 20, 12  # px: title, legend, frame number, between frames
FRAMES_WIDTH, FRAMES_HEIGHT = 1400, 1000  # px that the frames should fit in
LARGEST, SEPARATE = 16, 6  # px of a token; from this size on with a line between tokens
FLAT_ROW = 256  # tokens in a row where the grid is not known
CELL_WIDTH, CELL_HEIGHT = (9, 40), (9, 26)  # px, least and most, of a block and head
MATRIX_WIDTH, MATRIX_HEIGHT = 1120, 900  # px that the cells should fit in
SIDE, TOP = 64, 40  # px: block numbers, head numbers
NUMBERS = 26, 16  # px of a cell that has room for its number


def draw_map(found: TileMap, head: int, title: str, note: str) -> Image.Image:
    """The video's frames with the keys that the tile computes. RGB."""
    layout = found.layout
    computed, own = found.keys(head), found.queries(head)
    video, there = slice(layout.front, layout.length - layout.back), layout.length - len(layout.absent)
    frames = np.stack([_wrapped(x[video], layout.grid) for x in (computed, own)])
    known = frames.shape[1:] == tuple(layout.grid)
    count, height, width = frames.shape[1:]
    columns, size = arrangement(count, height, width)
    rows = -(-count // columns)
    wide = max(WIDTH, columns * (width * size + GAP) - GAP + 2 * MARGIN)
    tall = HEAD + rows * (LABEL + height * size + GAP) + FOOT
    image = Image.new("RGB", (wide, tall), BACKGROUND)
    pen = ImageDraw.Draw(image)
    _title(
        pen,
        wide,
        title,
        f"this tile computes {percent(computed.sum() / there)} of {there} keys; "
        f"the head asks for {percent(float(found.density[head]))} of its scores",
        note,
    )
    for i in range(count):
        x = MARGIN + i % columns * (width * size + GAP)
        y = HEAD + i // columns * (LABEL + height * size + GAP)
        here = frames[1, i].any()
        label = f"frame {i + 1}" if known else "tokens in reading order: this model's grid is not known"
        share = percent(frames[0, i].mean())
        room = width * size - pen.textlength(share, font(12)) - 6
        pen.text((x, y + LABEL - 5), label, OWN if here else TEXT, font(12), anchor="ls")
        if known and room > pen.textlength(label, font(12)):
            pen.text((x + width * size, y + LABEL - 5), share, FAINT, font(12), anchor="rs")
        image.paste(_tokens(frames[:, i], size), (x, y + LABEL))
    others = layout.front + layout.back - len(layout.absent)
    legend: list[tuple[str | None, str]] = [
        (OWN, f"the tile: {own.sum()} queries"),
        (COMPUTED, "keys that it computes"),
        (SKIPPED, "keys that it skips"),
    ]
    if others:
        share = (computed[: layout.front].sum() + computed[video.stop :].sum()) / others
        legend.append((None, f"{percent(share)} of {others} text or reference tokens computed"))
    _legend(pen, image.height - FOOT, legend)
    return image


def draw_density(maps: Maps, step: int, block: int, head: int, title: str) -> Image.Image:
    """Requested density of every block and head in a step, the chosen ones framed. RGB."""
    blocks = maps.densities(step)
    shares = {b: d for b, d in blocks.items() if not isinstance(d, Reason)}
    if not shares:
        reasons = [reason.text for reason in blocks.values() if isinstance(reason, Reason)]
        return draw_message(title, f"No block has a map in step {step + 1}: {(reasons or ['dense'])[0]}.")
    heads = max(map(len, shares.values()))
    highest = max(float(d.max()) for d in shares.values()) or 1.0
    w = _between(MATRIX_WIDTH // (heads + 2), CELL_WIDTH)
    h = _between(MATRIX_HEIGHT // len(blocks), CELL_HEIGHT)
    numbers = w >= NUMBERS[0] and h >= NUMBERS[1]
    mean_width = max(w, 40)
    left, top = MARGIN + SIDE, HEAD + TOP
    right = left + heads * w
    wide, tall = max(WIDTH, right + GAP + mean_width + MARGIN), top + len(blocks) * h + FOOT + GAP
    image = Image.new("RGB", (wide, tall), BACKGROUND)
    pen = ImageDraw.Draw(image)
    whole = np.concatenate([*shares.values()])
    _title(
        pen,
        image.width,
        title,
        f"share of scores asked for: mean {percent(whole.mean())}, from "
        f"{percent(whole.min())} to {percent(whole.max())}",
        f"{len(shares)} of {len(blocks)} blocks have a map",
    )
    pen.text((left, top - 24), "head", FAINT, font(12), anchor="ls")
    pen.text((right + GAP + mean_width / 2, top - 8), "mean", FAINT, font(12), anchor="ms")
    for i in range(0, heads, _every(w, 24)):
        pen.text((left + (i + 0.5) * w, top - 8), str(i), TEXT if i == head else FAINT, font(12), anchor="ms")
    for row, (number, densities) in enumerate(blocks.items()):
        y = top + row * h
        if row % _every(h, 14) == 0 or number == block:
            pen.text(
                (left - 8, y + h / 2),
                f"block {number}" if row == 0 else str(number),
                TEXT if number == block else FAINT,
                font(12),
                anchor="rm",
            )
        if isinstance(densities, Reason):
            pen.rectangle((left, y, right - 2, y + h - 2), GRID)
            if h >= NUMBERS[1]:
                pen.text(
                    (left + 8, y + h / 2 - 1),
                    fit(pen, densities.text, font(11), right - left - 16),
                    FAINT,
                    font(11),
                    anchor="lm",
                )
            continue
        for x, width, share in [
            *((left + i * w, w, d) for i, d in enumerate(densities)),
            (right + GAP, mean_width, densities.mean()),
        ]:
            colour = _ramp(float(share) / highest)
            pen.rectangle((x, y, x + width - 2, y + h - 2), colour)
            if (numbers or x > right) and h >= NUMBERS[1]:
                pen.text(
                    (x + width / 2 - 1, y + h / 2 - 1),
                    f"{100 * share:.0f}",
                    BACKGROUND if sum(colour) > 330 else TEXT,
                    font(11),
                    anchor="mm",
                )
        if number == block and head < len(densities):
            x = left + head * w
            pen.rectangle((x - 2, y - 2, x + w, y + h), outline=OWN, width=2)
    y = image.height - FOOT + 16
    for i in range(200):
        pen.rectangle((left + i, y, left + i, y + 10), _ramp(i / 199))
    pen.text((left - 8, y + 5), "0 %", FAINT, font(12), anchor="rm")
    pen.text((left + 208, y + 5), f"{percent(highest)} of the scores", FAINT, font(12), anchor="lm")
    if len(shares) < len(blocks):
        pen.rectangle((left + 330, y, left + 340, y + 10), GRID)
        pen.text((left + 348, y + 5), "dense, or no map", FAINT, font(12), anchor="lm")
    return image


def draw_message(title: str, text: str) -> Image.Image:
    """Words instead of a picture that cannot be drawn. RGB."""
    lines = textwrap.wrap(text, 104) or [""]
    image = Image.new("RGB", (WIDTH, 76 + 22 * len(lines)), BACKGROUND)
    pen = ImageDraw.Draw(image)
    pen.text((MARGIN, 36), fit(pen, title, font(20), WIDTH - 2 * MARGIN), TEXT, font(20), anchor="ls")
    for i, line in enumerate(lines):
        pen.text((MARGIN, 66 + 22 * i), line, OWN, font(15), anchor="ls")
    return image


def _wrapped(tokens: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    """Video tokens as [frames, rows, columns]; one that has no grid is broken into rows."""
    if grid[:2] != (1, 1) or grid[2] <= FLAT_ROW:
        return tokens.reshape(grid)
    return np.pad(tokens, (0, -len(tokens) % FLAT_ROW)).reshape(1, -1, FLAT_ROW)


def arrangement(count: int, height: int, width: int) -> tuple[int, int]:
    """Frames beside each other, and px of a token, as large as fits."""
    best = 1, 0.0
    for columns in range(1, count + 1):
        rows = -(-count // columns)
        size = min((FRAMES_WIDTH / columns - GAP) / width, (FRAMES_HEIGHT / rows - LABEL - GAP) / height)
        if size > best[1]:
            best = columns, size
    return best[0], _between(math.floor(best[1]), (1, LARGEST))


def _tokens(planes: np.ndarray, size: int) -> Image.Image:
    """A frame [computed or own, rows, columns]."""
    colours = np.array([ImageColor.getrgb(c) for c in (SKIPPED, COMPUTED, OWN)], np.uint8)
    pixels = colours[np.where(planes[1], 2, planes[0].astype(int))].repeat(size, 0).repeat(size, 1)
    if size >= SEPARATE:
        pixels[size - 1 :: size] = pixels[:, size - 1 :: size] = ImageColor.getrgb(BACKGROUND)
    return Image.fromarray(pixels)


def _title(pen, width: int, title: str, *notes: str) -> None:
    room = width - 2 * MARGIN
    pen.text((MARGIN, 36), fit(pen, title, font(20), room), TEXT, font(20), anchor="ls")
    for i, note in enumerate(notes):
        pen.text((MARGIN, 60 + 19 * i), fit(pen, note, font(13), room), FAINT, font(13), anchor="ls")


def _legend(pen, top: int, entries) -> None:
    x = MARGIN
    for colour, label in entries:
        if colour:
            pen.rectangle((x, top + 16, x + 11, top + 27), colour, outline=RULE)
            x += 18
        pen.text((x, top + 22), label, FAINT, font(13), anchor="lm")
        x += pen.textlength(label, font(13)) + 22


def _ramp(share: float) -> tuple[int, int, int]:
    """Colour of a share of the highest density."""
    at = min(max(share, 0.0), 1.0) * (len(RAMP) - 1)
    low = min(int(at), len(RAMP) - 2)
    pair = [np.array(ImageColor.getrgb(c)) for c in RAMP[low : low + 2]]
    red, green, blue = (int(n) for n in pair[0] + (pair[1] - pair[0]) * (at - low))
    return red, green, blue


def _between(value: int, limits: tuple[int, int]) -> int:
    return min(max(value, limits[0]), limits[1])


def _every(size: float, room: float) -> int:
    """One of how many cells of a size has a label, for labels that need this room."""
    least = room / size
    return next(n for n in (1, 2, 4, 5, 10, 20, 50) if n >= least)
