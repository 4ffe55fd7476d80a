"""The chart of run reports: always a legible picture, whatever a report lacks."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fgattn.runs.reports import BlockReport, RunReport, StepReport
from fgattn.show import chart, palette
from makers import CHOSEN, by_reason
from PIL import ImageColor, ImageDraw


def make_report(steps=12, dense=2, blocks=8, ms=100.0, **changes):
    """A run of `steps` steps of `ms`, the first `dense` of them dense."""
    report = RunReport(
        settings=CHOSEN,
        tokens=1728,
        implementation="torch",
        device="cpu",
        total=ms * steps,
        steps=tuple(
            StepReport(i, ms, 0.4 * ms, 0.1 * ms * (i >= dense), 8 * (i >= dense), 8 * (i < dense))
            for i in range(steps)
        ),
        blocks=tuple(BlockReport(i, 0.3, 0.4) for i in range(blocks)),
        calls=by_reason(sparse=8 * (steps - dense), warm_up=8 * dense),
        dense_call=2.0,
        sparse_call=1.0,
        density=0.3,
        executed_density=0.35,
        peak_memory=None,
        failure=None,
    )
    return replace(report, **changes)


NOTHING = {"calls": {}, "dense_call": None, "sparse_call": None, "density": None, "executed_density": None}
CASES = {
    "12 steps": make_report(),
    "1 step": make_report(1, 0, 1),
    "100 steps, 60 blocks": make_report(100, 4, 60),
    "dense": make_report(4, 4, 0, **NOTHING),
    "nothing": make_report(0, 0, 0, **NOTHING),
    "no dense step": make_report(dense=0, dense_call=None),
    "failed": make_report(failure="RuntimeError: " + "long " * 100),
    "long device name": make_report(device="GPU " * 80),
    "steps of no time": make_report(ms=0.0),
    "steps of a microsecond": make_report(ms=1e-3),
    "steps of an hour": make_report(ms=3.6e6),
    "unknown block that keeps nothing": replace(make_report(), blocks=(BlockReport(-1, 0.0, 0.0),)),
}


@pytest.fixture
def texts(monkeypatch):
    """Every text that is drawn, with its left and right end in px."""
    drawn, text = {}, ImageDraw.ImageDraw.text

    def record(pen, xy, content, fill=None, font=None, anchor=None, **more):
        left, _, right, _ = pen.textbbox(xy, content, font, anchor=anchor)
        drawn[content] = (left, right)
        text(pen, xy, content, fill, font, anchor=anchor, **more)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return drawn


def heights(image, colour):
    """Height in px of this colour in each pixel column of the first run's panels."""
    panels = np.asarray(image)[chart.PANEL_TOP : chart.PANEL_BOTTOM]
    return (panels == ImageColor.getrgb(colour)).all(2).sum(0)


@pytest.mark.parametrize("report", CASES.values(), ids=CASES.keys())
def test_any_report_makes_a_picture(report, texts):
    """Fixed width, height by the number of runs, and no text leaves the picture."""
    assert chart.draw([("FG-Attn", report)]).size == (900, chart.RUN_HEIGHT + chart.LEGEND_HEIGHT)
    two = chart.draw([("high noise", report), ("low noise", make_report())])
    assert two.mode == "RGB" and two.size == (900, 2 * chart.RUN_HEIGHT + chart.LEGEND_HEIGHT)
    assert min(left for left, _ in texts.values()) >= 0
    assert max(right for _, right in texts.values()) <= 900


def test_no_run_says_so(texts):
    """The timing node may be asked before the first run."""
    assert chart.draw([]).width == 900
    assert list(texts) == ["no run yet"]


def test_bars_are_as_high_as_the_times():
    """One sparse step: 40 % attention, 10 % planning, 50 % rest, with some headroom above."""
    image = chart.draw([("", make_report(1, 0, 0))])
    parts = [heights(image, colour).max() for colour in (palette.SPARSE, palette.PLANNING, palette.REST)]
    full = (chart.PANEL_BOTTOM - chart.PANEL_TOP) / chart.HEADROOM
    np.testing.assert_allclose(parts, [0.4 * full, 0.1 * full, 0.5 * full], atol=1.5)
    assert not heights(image, palette.DENSE).any()


ROOT = Path(__file__).parents[2]


def test_colours_are_those_of_the_panel():
    """The same node shows both: one variable of the panel for each role, and no role twice."""
    css = (ROOT / "web" / "js" / "panel.css").read_text(encoding="utf-8")
    assert dict(re.findall(r"--fgattn-([\w-]+): (#\w+);", css)) == palette.PANEL
    assert len(re.findall("|".join(palette.PANEL.values()), css)) == len(palette.PANEL)
    assert not {palette.REQUESTED, palette.EXECUTED} & {*palette.PANEL.values()}


def test_colours_stand_in_the_palette_alone():
    for path in (p for d in ("fgattn", "nodes") for p in (ROOT / d).rglob("*.py") if p.name != "palette.py"):
        assert not re.findall(r"#[0-9a-fA-F]{6}\b", path.read_text(encoding="utf-8")), path.name


def test_kinds_of_steps_have_their_colours():
    """A warm-up step, a dense one, one that plans, and one that reuses its plan."""
    steps = (
        StepReport(0, 9, 9, 0, 0, 4, True),
        StepReport(1, 9, 9, 0, 0, 4),
        StepReport(2, 9, 8, 1, 4, 0),
        StepReport(3, 9, 9, 0, 4, 0),
    )
    image = chart.draw([("", replace(make_report(blocks=0), steps=steps))])
    found = [np.flatnonzero(heights(image, colour)).mean() for colour in palette.ATTENTION.values()]
    assert found == sorted(found)


def test_the_legend_has_what_is_drawn(texts):
    """ "executed on top" is there only where more was executed than requested."""
    blocks = (BlockReport(0, 0.3, 0.3),)
    chart.draw([("", make_report()), ("", make_report(2, 2, 0))])
    assert {"sparse", "dense", "planning", "density requested", "executed on top"} <= texts.keys()
    assert not {"warm-up", "reused plan"} & texts.keys()
    texts.clear()
    chart.draw([("", replace(make_report(), blocks=blocks))])
    assert "density requested" in texts and "executed on top" not in texts


def test_dense_steps_look_different():
    """Two of twelve steps are dense: a sixth of the attention area."""
    image = chart.draw([("", make_report(12, 2))])
    dense, sparse = (heights(image, colour).sum() for colour in (palette.DENSE, palette.SPARSE))
    assert dense / (dense + sparse) == pytest.approx(2 / 12, abs=0.01)


def test_runs_share_one_time_scale():
    """The same bar is lower beside a slower run."""
    alone = heights(chart.draw([("", make_report())]), palette.REST).max()
    beside = heights(chart.draw([("", make_report()), ("", make_report(ms=200.0))]), palette.REST).max()
    assert beside == pytest.approx(alone / 2, abs=1.5)


def test_an_outlier_is_cut_off_and_labelled(texts):
    """A step that compiles kernels does not flatten the others."""
    usual = make_report()
    slow = replace(usual.steps[2], total=25e3)
    image = chart.draw([("", replace(usual, steps=(*usual.steps[:2], slow, *usual.steps[3:])))])
    assert heights(image, palette.DENSE).max() == heights(chart.draw([("", usual)]), palette.DENSE).max()
    assert "25 s" in texts


def test_units_follow_the_times(texts):
    """Milliseconds below 2 s, seconds from there."""
    chart.draw([("", make_report(ms=100.0))])
    assert "time per step, ms" in texts and "time per step, s" not in texts
    chart.draw([("", make_report(ms=9e3))])
    assert "time per step, s" in texts and {"2", "4", "6", "8"} <= texts.keys()


def test_density_is_requested_and_executed():
    """The executed share is stacked on the requested one."""
    image = chart.draw([("", replace(make_report(), blocks=(BlockReport(0, 0.2, 0.3),)))])
    requested, executed = (heights(image, colour).max() for colour in (palette.REQUESTED, palette.EXECUTED))
    assert requested == pytest.approx(2 * executed, abs=2)


def test_blocks_keep_their_numbers(texts):
    """Unknown is a question mark, and left-out blocks leave no wrong numbers."""
    blocks = tuple(BlockReport(number, 0.2, 0.2) for number in (-1, 4, 9, 30))
    chart.draw([("", replace(make_report(), blocks=blocks))])
    assert {"?", "4", "9", "30"} <= texts.keys() and "-1" not in texts
