"""Pictures of maps: every token in its colour, everything inside the picture, small grids and large ones."""

import numpy as np
import pytest
import torch
from fgattn import TokenLayout
from fgattn.outcomes import Outcome, Reason
from fgattn.runs.maps import MIDDLE, Maps, TileMap
from fgattn.show import map_chart, palette
from PIL import ImageColor, ImageDraw

TITLE, NOTE = "Block 3, head 1, step 7 of 20: keys that one tile of queries computes", "threshold 1, " * 30


def tile(grid, front=0, back=0, heads=2, share=0.3, order="cells"):
    """A map with random keys, whose tile is 64 tokens in the middle."""
    layout = TokenLayout(grid, front, back)
    made = np.random.default_rng(0)
    bits = np.packbits(made.random((heads, -(-layout.length // 16))) < share, 1, bitorder="little")
    rows = torch.arange(64, dtype=torch.int32)[None] + max(0, layout.length // 2 - 32)
    return TileMap(
        torch.from_numpy(bits),
        rows.clamp(max=layout.length - 1),
        torch.from_numpy(made.random(heads) * share),
        layout,
        order,
        16,
    )


@pytest.fixture
def inside(monkeypatch):
    """Every text is drawn inside its picture; returns what was drawn."""
    drawn, text = [], ImageDraw.ImageDraw.text

    def record(pen, xy, content, fill=None, font=None, anchor=None, **more):
        left, top, right, bottom = pen.textbbox(xy, content, font, anchor=anchor)
        width, height = pen.im.size
        assert left >= 0 and top >= 0 and right <= width and bottom <= height, content
        drawn.append(content)
        text(pen, xy, content, fill, font, anchor=anchor, **more)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return drawn


def pixels(image, colour):
    """Number of pixels of a colour above the legend."""
    return (np.asarray(image)[: -map_chart.FOOT] == ImageColor.getrgb(colour)).all(2).sum()


@pytest.mark.parametrize(
    "grid", [(1, 2, 2), (5, 8, 12), (13, 16, 24), (21, 45, 80), (33, 45, 80), (81, 90, 160)], ids=str
)
def test_every_token_is_drawn(inside, grid):
    """Counted in pixels, by colour; a picture for a screen at any grid."""
    found = tile(grid)
    image = map_chart.draw_map(found, 1, TITLE, NOTE)
    size = map_chart.arrangement(*grid)[1]
    area = (size - (size >= map_chart.SEPARATE)) ** 2
    own, computed = found.queries(1), found.keys(1)
    assert pixels(image, palette.OWN) >= own.sum() * area
    assert pixels(image, palette.COMPUTED) == (computed & ~own).sum() * area
    assert pixels(image, palette.SKIPPED) == (~computed & ~own).sum() * area
    assert 900 <= image.width <= 1700 and image.height <= 1300
    if grid == (13, 16, 24):
        assert {f"frame {i}" for i in range(1, 14)} <= set(inside)


def test_tokens_stand_where_they_are():
    """A single frame, raster order: the first slice is the start of the first row."""
    layout = TokenLayout((1, 4, 32))
    found = TileMap(
        torch.tensor([[1]], dtype=torch.uint8),
        torch.tensor([[127]]),
        torch.tensor([0.1]),
        layout,
        "raster",
        16,
    )
    image = np.asarray(map_chart.draw_map(found, 0, TITLE, ""))
    ys, xs = (image[: -map_chart.FOOT] == ImageColor.getrgb(palette.COMPUTED)).all(2).nonzero()
    size = map_chart.arrangement(1, 4, 32)[1]
    assert (xs.min(), xs.max()) == (map_chart.MARGIN, map_chart.MARGIN + 16 * size - 2)
    assert ys.max() - ys.min() == size - 2


def test_text_tokens_are_told_of(inside):
    """They have no place in a frame."""
    map_chart.draw_map(tile((2, 4, 8), front=20, back=10), 0, TITLE, NOTE)
    assert any("of 30 text or reference tokens" in text for text in inside)


def test_a_model_without_a_grid(inside):
    """Tokens in reading order, broken into rows."""
    image = map_chart.draw_map(tile((1, 1, 5000), order="raster"), 0, TITLE, NOTE)
    assert image.width < 1500 and any("reading order" in text for text in inside)


def maps_of(blocks, heads, dense=()):
    made = Maps()
    for block in range(blocks):
        if block in dense:
            made.skip(6, block, Reason(Outcome.DENSE_BLOCK))
        else:
            made.kept[6, block] = {MIDDLE: tile((2, 4, 8), heads=heads)}
    return made


@pytest.mark.parametrize(("blocks", "heads"), [(1, 1), (8, 3), (30, 12), (40, 40), (60, 56), (100, 128)])
def test_densities_of_every_block_and_head(inside, blocks, heads):
    """Inside the picture, whatever their number; the chosen cell is framed."""
    image = map_chart.draw_density(maps_of(blocks, heads), 6, 0, heads - 1, TITLE)
    assert pixels(image, palette.OWN) > 20 and image.width <= 1500 and image.height <= 1300
    assert any(text.startswith("share of scores asked for: mean") for text in inside)


def test_dense_blocks_are_grey_and_say_why(inside):
    map_chart.draw_density(maps_of(8, 12, dense=(0, 7)), 6, 3, 2, TITLE)
    assert inside.count("listed in dense_blocks") == 2 and "dense, or no map" in inside


def test_a_step_without_any_map(inside):
    """Words, not an empty picture."""
    map_chart.draw_density(maps_of(2, 2, dense=(0, 1)), 6, 0, 0, TITLE)
    assert "No block has a map in step 7: listed in dense_blocks." in inside


@pytest.mark.parametrize("text", ["", "short", "long words " * 60])
def test_messages(inside, text):
    map_chart.draw_message(TITLE * 3, text)
    assert " ".join(inside[1:]).strip() == text.strip()
